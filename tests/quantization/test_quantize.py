"""`quantize`: sizes, results, and refused arguments."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.calibration.inference import batches_of
from keras_learnbits.quantization import quantize as module
from keras_learnbits.quantization.augmentation import can_be_varied, varied

L = keras.layers
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(96, 8, 8, 3)).astype("float32")


def image_net(seed=0, **head):
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(8, 3, padding="same", use_bias=False, name="first")(inputs)
    x = L.Activation("relu")(L.BatchNormalization(name="norm")(x))
    x = L.DepthwiseConv2D(3, strides=2, name="depthwise")(x)
    x = L.Dropout(0.3)(L.Conv2D(16, 1, activation="relu", name="second")(x))
    x = L.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, L.Dense(4, name="head", **head)(x), name="net")
    norm = model.get_layer("norm")
    norm.gamma.assign(rng.uniform(0.5, 1.5, 8))
    norm.moving_mean.assign(rng.normal(0, 0.2, 8))
    return model


NET, SEED = image_net(), np.array([0, 1])


def movement(model, net, x):
    """Root mean square difference of the outputs, in NumPy."""
    found, expected = (each.predict(x, verbose=0) for each in (model, net))
    return np.sqrt(np.mean(np.square(found - expected) / expected.var(axis=0)))


def small(model=NET, data=IMAGES, steps=0, **arguments):
    return klb.quantize(model, data, steps=steps, verbose=0, **arguments)


@pytest.mark.parametrize(
    "target",
    [{"target_bits": 2.5}, *thorough({"target_bytes": 700}, {"target_compression": 4.0})],
    ids=str,
)
def test_the_size_is_not_exceeded_and_no_layer_could_take_one_more_bit(target):
    model = small(**target)
    table = klb.bit_table(model)
    [(name, value)] = target.items()

    def size(more=()):
        """Bits, or packed bytes, with one more bit in some rows."""
        if name == "target_bits":
            return sum(row.weights * (row.bits + (row in more)) for row in table.rows)
        codes = sum(-(-row.weights * (row.bits + (row in more)) // 8) for row in table.rows)
        return table.packed_bytes - sum(row.code_bytes for row in table.rows) + codes

    most = {
        "target_bits": value * table.weights,
        "target_bytes": value,
        "target_compression": table.float_bytes / value,
    }[name]
    assert size() <= most
    assert all(size([row]) > most for row in table.rows if row.bits < 8)
    assert model.bits_are_frozen


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.floats(1, 8), st.integers(0, 3))
def test_random_nets_stay_within_their_budget(widths, bits, seed):
    keras.utils.set_random_seed(seed)
    x = inputs = keras.Input((6,))
    for number, width in enumerate(widths):
        y = L.Dense(width, activation="tanh")(x)
        x = L.Concatenate()([x, y]) if number % 2 else y
    model = small(keras.Model(inputs, x), RNG.normal(size=(16, 6)), target_bits=bits)
    assert klb.bit_table(model).mean_bits <= bits + 1e-9  # the tolerance of sizes
    assert np.isfinite(model.predict(np.ones((2, 6)), verbose=0)).all()


def test_no_width_is_outside_of_the_bounds():
    def widths(target_bits, **bounds):
        return {row.bits for row in klb.bit_table(small(target_bits=target_bits, **bounds)).rows}

    assert min(widths(2.2)) == 1
    assert min(widths(2.2, min_bits=2)) == 2
    assert widths(5, max_bits=4) == {4}
    assert widths(9, min_bits=9) == {9}


def test_equal_bounds_give_every_layer_the_same_width():
    for bits in (2, 12):
        model = small(target_bits=bits, min_bits=bits, max_bits=bits)
        assert {row.bits for row in klb.bit_table(model).rows} == {bits}


def test_compensated_rounding_moves_outputs_less_than_equal_widths_rounded_to_nearest():
    new = RNG.normal(size=(200, 8, 8, 3))
    ratios = []
    for seed in range(4):
        net = image_net(seed)
        uniform = klb.to_learned_bits(net)
        for kernel in uniform.quantized_tensors:
            kernel.bits.assign(3)
            kernel.fit_scale()
        ratios.append(movement(small(net, target_bits=3), net, new) / movement(uniform, net, new))
    assert np.mean(ratios) < 0.8


def test_training_brings_outputs_closer_on_other_examples():
    new = RNG.normal(size=(200, 8, 8, 3))
    rounded, trained = small(target_bits=2), small(target_bits=2, steps=60)
    assert movement(trained, NET, new) < 0.9 * movement(rounded, NET, new)
    report = trained.quantization
    assert report.movement < report.movement_rounded
    assert report.movement_rounded == pytest.approx(rounded.quantization.movement)


def test_the_reported_movement_is_that_of_the_examples_held_out():
    model = small(target_bits=2, steps=5)
    shuffled = IMAGES[np.random.default_rng(0).permutation(96)]
    held_out = shuffled[-12:]  # an eighth
    found, expected = (each.predict(held_out, verbose=0) for each in (model, NET))
    spread = NET.predict(shuffled[:-12], verbose=0).var(axis=0)
    assert model.quantization.movement == pytest.approx(
        np.sqrt(np.mean(np.square(found - expected) / spread)), rel=1e-3
    )
    same = np.mean(found.argmax(axis=-1) == expected.argmax(axis=-1))
    assert model.quantization.agreement == pytest.approx(same)


def test_the_rounded_model_is_kept_where_training_moves_other_examples_further(monkeypatch):
    def harmful(settling, examples, progress):
        settling.model.get_layer("head").bias.assign([9.0, 0, 0, 0])

    monkeypatch.setattr(module.Settling, "__call__", harmful)
    kept, rounded = small(target_bits=2, steps=1), small(target_bits=2)
    found, expected = (each.predict(IMAGES, verbose=0) for each in (kept, rounded))
    np.testing.assert_array_equal(found, expected)
    assert kept.quantization.movement == kept.quantization.movement_rounded


def test_the_original_does_not_change():
    before = [weight.copy() for weight in NET.get_weights()]
    small(target_bits=2, steps=3)
    for old, new in zip(before, NET.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert not NET.compiled


def test_an_interrupt_does_not_change_the_original(monkeypatch):
    before = [weight.copy() for weight in NET.get_weights()]
    for owner, work in ((module, "round_in_order"), (module.MeasuredWidths, "loss_table")):

        def interrupted(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(owner, work, interrupted)
        with pytest.raises(KeyboardInterrupt):
            small(target_bits=2, steps=3)
    for old, new in zip(before, NET.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_same_seed_gives_the_same_model_and_another_one_another():
    first, again, other = (small(target_bits=2, steps=4, seed=seed) for seed in (0, 0, 1))
    x = IMAGES[:8]
    np.testing.assert_array_equal(first.predict(x, verbose=0), again.predict(x, verbose=0))
    assert not np.array_equal(first.predict(x, verbose=0), other.predict(x, verbose=0))


def test_a_compiled_model_is_evaluated_and_trained_further_at_its_bits():
    net = image_net()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net.compile("sgd", loss, metrics=["accuracy"])
    model = small(net, (IMAGES, np.arange(96) % 4), target_bits=2)
    labels = np.arange(96) % 4
    bits = [row.bits for row in klb.bit_table(model).rows]
    assert set(model.evaluate(IMAGES, labels, verbose=0, return_dict=True)) >= {"loss", "accuracy"}
    model.fit(IMAGES, labels, epochs=2, verbose=0)
    assert [row.bits for row in klb.bit_table(model).rows] == bits


def test_a_model_comes_back_from_files_and_is_exported(tmp_path):
    model = small(target_bits=2, steps=2)
    expected = model.predict(IMAGES, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(IMAGES, verbose=0), expected)
    assert loaded.bits_are_frozen
    klb.save_packed(model, tmp_path / "model.safetensors")
    klb.export_litert(model, tmp_path / "model.tflite")  # checks its predictions
    klb.export_onnx(model, tmp_path / "model.onnx")
    plain = klb.to_keras(model).predict(IMAGES, verbose=0)
    np.testing.assert_allclose(plain, expected, rtol=1e-4, atol=1e-5)


def test_activations_are_calibrated_and_exported_in_integers(tmp_path):
    model = small(target_bits=4, activations=True, steps=2)
    rows = klb.bit_table(model).activations
    assert {row.bits for row in rows} == {8}
    assert all(row.bounds is not None for row in rows)
    report = klb.export_litert(model, tmp_path / "model.tflite", arithmetic="int8")
    assert "int8" in {row[3] for row in report.rows}
    assert movement(model, NET, IMAGES) < 0.5


def test_excluded_layers_stay_float():
    model = small(target_bits=3, exclude="head")
    assert [row.layer for row in klb.bit_table(model).rows] == ["first", "depthwise", "second"]
    np.testing.assert_array_equal(
        model.get_layer("head").kernel.numpy(), NET.get_layer("head").kernel.numpy()
    )


def test_only_layers_that_a_user_sees_are_named_where_none_is_excluded():
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, name="only")])
    for name in ("zzz", "functional*"):  # Keras keeps a functional model inside
        with pytest.raises(ValueError, match=r"must name layers.*layers=\['only'\]"):
            small(model, RNG.normal(size=(16, 4)), target_bits=4, exclude=name)


def test_frozen_layers_are_quantized_and_settled_too():
    net = image_net()
    net.trainable = False
    model = small(net, target_bits=2, steps=100)
    assert klb.bit_table(model).mean_bits <= 2
    rounded = small(net, target_bits=2)
    kernels = [each.get_layer("second").kernel.numpy() for each in (model, rounded)]
    assert not np.array_equal(*kernels)


HEADS = {
    "softmax": {"activation": "softmax"},
    "sigmoid": {"activation": "sigmoid"},
    "regression": {},
}


@pytest.mark.parametrize("head", thorough(*HEADS))
def test_heads_of_all_kinds_are_brought_closer(head):
    net = image_net(**HEADS[head])
    rounded, trained = (small(net, target_bits=2, steps=steps) for steps in (0, 40))
    assert trained.quantization.movement < rounded.quantization.movement


def sequence_net():
    inputs = keras.Input((12,), dtype="int32")
    x = L.Embedding(30, 8)(inputs)
    x = L.LayerNormalization()(x + L.MultiHeadAttention(2, 4)(x, x))
    x = L.LSTM(8, return_sequences=True)(x)
    return keras.Model(inputs, [L.Dense(30)(x), L.Dense(1, activation="sigmoid")(x[:, 0])])


@pytest.mark.parametrize("steps", thorough(5))
def test_token_sequences_attention_and_several_outputs_are_quantized(steps):
    keras.utils.set_random_seed(0)
    tokens = RNG.integers(0, 30, (48, 12))
    model = small(sequence_net(), tokens, target_bits=4, steps=steps)
    assert klb.bit_table(model).mean_bits <= 4
    assert model.quantization.movement < 0.5


def test_the_smallest_model_within_an_accuracy_drop_is_found():
    net = image_net()
    net.get_layer("head").bias.assign(-net.predict(IMAGES, verbose=0).mean(axis=0))
    labels = net.predict(IMAGES, verbose=0).argmax(axis=-1)  # the float accuracy is 1

    def accuracy_of(model):
        return np.mean(model.predict(IMAGES, verbose=0).argmax(axis=-1) == labels)

    model = small(net, max_accuracy_drop=0.1, validation_data=(IMAGES, labels))
    assert model.quantization.accuracy == pytest.approx((1, accuracy_of(model)))
    assert accuracy_of(model) >= 0.9
    mean_bits = klb.bit_table(model).mean_bits
    assert 1 < mean_bits < 8
    assert accuracy_of(small(net, target_bits=np.ceil(4 * mean_bits) / 4 - 0.25)) < 0.9


def test_an_accuracy_is_sought_between_the_bounds():
    labels = NET.predict(IMAGES, verbose=0).argmax(axis=-1)
    model = small(max_accuracy_drop=0.9, validation_data=(IMAGES, labels), min_bits=3)
    assert {row.bits for row in klb.bit_table(model).rows} == {3}


def test_an_accuracy_that_cannot_be_reached_is_warned_about(monkeypatch):
    monkeypatch.setattr(
        module, "Accuracy", lambda data, model: lambda predict: float(predict.model is NET)
    )
    for bounds, highest in (({}, 8), ({"max_bits": 4}, 4)):
        with pytest.warns(UserWarning, match=rf"Even at {highest}.0 mean bits .* is 0.0000"):
            model = small(max_accuracy_drop=0.1, **bounds)
        assert klb.bit_table(model).mean_bits == highest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of target_bits, .*Received: {}"),
        ({"target_bits": 2, "target_bytes": 9}, "exactly one"),
        ({"target_bits": 0}, "must be a positive number"),
        ({"target_bits": 0.5}, "lowest bit-widths reach: 1.0 bits"),
        ({"target_bytes": 10}, r"lowest bit-widths reach: \d+ bytes"),
        ({"max_accuracy_drop": 0.1}, "needs labelled `validation_data`"),
        ({"target_bits": 2, "steps": -1}, "`steps` must be"),
        ({"target_bits": 2, "batch_size": 0}, "`batch_size` must be"),
        ({"target_bits": 2, "verbose": "loud"}, "`verbose` must be"),
        ({"target_bits": 2, "seed": -1}, "`seed` must be"),
        ({"max_accuracy_drop": 5, "validation_data": (IMAGES, IMAGES)}, "`max_accuracy_drop`"),
        ({"max_accuracy_drop": 0.1, "validation_data": IMAGES}, "examples with labels"),
        ({"max_accuracy_drop": 0.1, "validation_data": iter([IMAGES])}, "read several times"),
        ({"target_bits": 2, "include": "nothing*"}, "`include` must name layers"),
        ({"target_bits": 2, "min_bits": 3}, "lowest bit-widths reach: 3.0 bits"),
        ({"target_bits": 2, "min_bits": 4, "max_bits": 3}, "min_bits <= max_bits <= 16"),
        ({"target_bits": 2, "max_bits": 17}, "min_bits <= max_bits <= 16.*max_bits=17"),
        ({"target_bits": 2, "max_bits": 2.5}, "must be integers.*max_bits=2.5"),
        ({"target_bits": 2, "min_bits": 0}, "`min_bits` must be an integer >= 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_done_is_refused_before_work_starts(arguments, message, monkeypatch):
    monkeypatch.setattr(
        module.MeasuredWidths, "loss_table", lambda *args: pytest.fail("work has started")
    )
    with pytest.raises(ValueError, match=message):
        klb.quantize(NET, IMAGES, **{"verbose": 0, **arguments})


def test_what_is_no_float_model_is_refused():
    with pytest.raises(ValueError, match=r"needs a Keras model, such as.*'model.keras'"):
        small("model.keras", target_bits=2)
    with pytest.raises(ValueError, match="needs a float model: give the original"):
        small(small(target_bits=4), target_bits=2)


def test_a_model_that_is_not_built_or_has_no_weights_is_refused_and_not_built():
    model = keras.Sequential([L.Dense(3)])
    with pytest.raises(ValueError, match="needs a built model.*built=False"):
        small(model, IMAGES, target_bits=2)
    assert not model.built
    with pytest.raises(ValueError, match="`quantize` needs a model with weights"):
        small(keras.Sequential([keras.Input((8, 8, 3)), L.Flatten()]), target_bits=2)


def test_losses_of_layers_do_not_remain_from_finished_graphs():
    inputs = keras.Input((4,))
    x = L.Dense(3, activity_regularizer="l2")(inputs)
    net = keras.Model(inputs, L.Dense(2)(L.ActivityRegularization(l1=0.1)(x)))
    x = RNG.normal(size=(24, 4)).astype("float32")
    labels = net.predict(x, verbose=0).argmax(axis=-1)
    model = small(net, x, target_bits=4, steps=1, validation_data=(x, labels))
    for each in (net, model):
        assert not any(map(tf.is_symbolic_tensor, each.losses))
        each(x)
        assert len(each.losses) == 2


def test_constant_and_huge_outputs_are_reported_as_such():
    inputs = keras.Input((3,))
    x, outputs = RNG.normal(size=(20, 3)), L.Dense(2)(inputs)
    with pytest.warns(UserWarning, match="constant on the examples, or nearly.*check that"):
        report = small(keras.Model(inputs, outputs), np.zeros((20, 3)), target_bits=2).quantization
    assert "outputs moved by 0.0% of their size" in str(report)
    huge = keras.Model(inputs, L.Rescaling(1e30)(outputs))
    report = small(huge, x, target_bits=2).quantization
    plain = small(keras.Model(inputs, outputs), x, target_bits=2).quantization
    assert report.movement == pytest.approx(plain.movement, rel=1e-4)


def test_a_report_with_numbers_that_are_not_finite_is_valid_json():
    report = dataclasses.replace(small(target_bits=4).quantization, movement=float("nan"))
    assert "; outputs are not finite; " in str(report)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["movement"] is None


def test_outputs_that_are_not_finite_are_refused():
    inputs = keras.Input((3,))
    outputs = keras.ops.log(L.Dense(2)(inputs))
    with pytest.raises(ValueError, match="must be finite on the example inputs"):
        small(keras.Model(inputs, outputs), RNG.normal(size=(20, 3)), target_bits=2)


def test_settings_that_cannot_be_copied_are_warned_about():
    net = image_net()

    def own_loss(y_true, y_pred):
        return keras.ops.mean(keras.ops.abs(y_true - y_pred))

    net.compile("sgd", own_loss)
    with pytest.warns(UserWarning, match=r"compile it before `evaluate`.*own_loss"):
        small(net, target_bits=2)


def test_tokens_in_floats_are_not_varied():
    tokens = RNG.integers(0, 30, (20, 12)).astype("float32")
    assert not can_be_varied(tokens)
    assert not can_be_varied({"tokens": tokens.astype("int32"), "image": IMAGES})
    assert can_be_varied(np.round(IMAGES))
    assert can_be_varied(tokens + 0.5)


@pytest.mark.parametrize(
    "policy",
    [
        "float64",
        "float16",
        *thorough("float32", "bfloat16", "mixed_float16", "mixed_bfloat16"),
    ],
)
def test_models_of_all_precisions_are_quantized(policy):
    keras.config.set_dtype_policy(policy)
    try:
        net = image_net()
    finally:
        keras.config.set_dtype_policy("float32")
    model = small(net, target_bits=3, steps=2)
    kernel, start = (each.get_layer("head").kernel for each in (model, net))
    assert kernel.dtype == start.dtype
    assert model.quantization.movement < 0.6


def test_batches_are_nearly_equal_so_that_means_over_them_are_means_over_examples():
    assert [len(batch) for batch in batches_of(np.zeros(129), 128)] == [64, 65]
    assert [len(batch) for batch in batches_of(np.zeros(128), 128)] == [128]
    joined = np.concatenate(list(batches_of(np.arange(77), 10)))
    np.testing.assert_array_equal(joined, np.arange(77))


def test_two_inputs_in_a_tuple_with_labels_are_quantized():
    inputs = [keras.Input((4,)), keras.Input((4,))]
    x = (RNG.normal(size=(24, 4)), RNG.normal(size=(24, 4)))
    net = keras.Model(inputs, L.Dense(2)(L.BatchNormalization()(L.Dense(6)(L.Add()(inputs)))))
    model = small(net, (x, np.ones(24)), target_bits=4, steps=2)
    assert klb.bit_table(model).mean_bits <= 4


class Cell(L.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense, self.state_size = L.Dense(3), 3

    def build(self, shape):
        self.dense.build((None, shape[-1] + 3))

    def call(self, x, states):
        y = keras.ops.tanh(self.dense(keras.ops.concatenate([x, states[0]], axis=-1)))
        return y, [y]


@pytest.mark.parametrize("steps", thorough(2))
def test_layers_inside_of_recurrent_loops_are_settled_with_the_rest(steps):
    inputs = keras.Input((5, 4))
    net = keras.Model(inputs, L.Dense(2)(L.RNN(Cell())(inputs)))
    model = small(net, RNG.normal(size=(24, 5, 4)), target_bits=4, steps=steps)
    assert klb.bit_table(model).mean_bits <= 4


def test_a_model_without_kernels_is_refused():
    model = keras.Sequential([keras.Input((8, 8, 3)), L.BatchNormalization()])
    with pytest.raises(ValueError, match="at least one layer to convert"):
        small(model, target_bits=2)


def test_progress_and_result_are_printed(capsys):
    klb.quantize(NET, IMAGES, target_bits=2, steps=3, verbose=2)
    lines = capsys.readouterr().out.splitlines()
    phases = [line.split(":")[0] for line in lines if line[0].isupper()]
    assert phases == ["Convert", "Measure", "Round", "Settle"]
    assert lines[-1].startswith("net: ")
    assert "mean bits; outputs moved by" in lines[-1]
    small(target_bits=2)
    assert capsys.readouterr().out == ""


def test_variations_keep_shapes_and_mix_at_most_half_of_another_example():
    ones = np.where(np.arange(8)[:, None, None, None] == 3, 1.0, 0.0) * np.ones((8, 16, 16, 3))
    found = varied(keras.ops.convert_to_tensor(ones, "float32"), SEED).numpy()
    assert found.shape == ones.shape
    means = found.mean(axis=(1, 2, 3))
    assert 0.5 <= means[3] <= 1
    assert 0 <= means[4] <= 0.5
    assert means[[0, 1, 2, 5, 6, 7]].max() == 0


def test_images_are_shifted_by_at_most_a_sixteenth_all_of_a_batch_alike():
    rows = RNG.normal(size=(16, 1, 1)) * np.ones((16, 16, 1))  # mirroring changes nothing
    padded = np.pad(rows, [[1, 1], [0, 0], [0, 0]], mode="reflect")
    shifts = set()
    for number in range(8):
        images = keras.ops.convert_to_tensor(np.stack([rows] * 6), "float32")
        found = varied(images, np.array([number, 0])).numpy()
        (shift,) = [
            row for row in range(3) if np.allclose(found, padded[row : row + 16], atol=1e-5)
        ]
        shifts.add(shift)
    assert len(shifts) > 1


def test_about_half_of_the_images_are_mirrored():
    image = np.zeros((16, 16, 1))
    image[:, :4] = 1
    images = keras.ops.convert_to_tensor(np.stack([image] * 200), "float32")
    found = varied(images, SEED).numpy()
    right = found[:, :, 8:].sum(axis=(1, 2, 3)) > found[:, :, :8].sum(axis=(1, 2, 3))
    assert 70 < right.sum() < 130

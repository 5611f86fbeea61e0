import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_learnbits as klb
from keras_learnbits.layers.discovery import quantized_kernels
from keras_learnbits.numerics import rounding
from keras_learnbits.training.objective import mean_bits

L = keras.layers


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype("float32")


def residual_net():
    """A net with a residual branch, a shared layer, a nested model, two inputs and two outputs."""
    image, extra = keras.Input((8, 8, 3), name="image"), keras.Input((5,), name="extra")
    stem = L.Conv2D(4, 3, padding="same", kernel_regularizer="l2", name="stem")(image)
    h = L.BatchNormalization(name="norm")(stem)
    h = L.SeparableConv2D(4, 3, padding="same", activation="relu", name="separable")(h) + h
    inner = keras.Input((8, 8, 4))
    block = keras.Model(inner, L.Conv2D(4, 1, name="mix")(inner), name="block")
    h = L.GlobalAveragePooling2D()(block(block(h)))
    shared = L.Dense(4, name="shared")
    merged = L.Concatenate()([shared(h), shared(L.Dense(4, name="lift")(extra))])
    return keras.Model(
        {"image": image, "extra": extra},
        {"a": L.Dense(2, name="a")(merged), "b": L.Dense(1, name="b")(keras.ops.sin(merged))},
        name="net",
    )


def inputs_of(model):
    rng = np.random.default_rng(1)
    return {
        name: rng.normal(size=(4, *tensor.shape[1:])).astype("float32")
        for name, tensor in model.input.items()
    }


def shake(model):
    """Sets every weight, including statistics, to a value other than its initial one."""
    rng = np.random.default_rng(2)
    for variable in model.weights:
        if variable.dtype == "float32":
            variable.assign(rng.uniform(0.2, 1.0, variable.shape) * rng.choice([-1, 1]))
        if "variance" in variable.name:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return model


def assert_close(a, b, relative):
    """Largest difference within a share of the largest value, output by output."""
    for one, other in zip(keras.tree.flatten(a), keras.tree.flatten(b), strict=True):
        one, other = np.asarray(one, "float64"), np.asarray(other, "float64")
        assert np.abs(one - other).max() <= relative * np.abs(other).max()


def test_a_functional_model_computes_the_same_at_16_bits():
    model = shake(residual_net())
    x = inputs_of(model)
    before = [w.numpy() for w in model.weights]
    learned = klb.to_learned_bits(model, bits=16)
    assert isinstance(learned, klb.LearnedBitModel)
    assert_close(learned(x), model(x), 1e-3)
    assert [layer.name for layer in learned.layers] == [layer.name for layer in model.layers]
    assert learned.name == "net"
    assert float(learned.get_layer("stem").kernel_regularizer.l2) == pytest.approx(0.01)
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight, value)
    assert len(quantized_kernels(learned)) == 8  # two of the separable one; shared ones once
    separate = {id(v) for v in learned.variables} & {id(v) for v in model.variables}
    assert not separate


def test_a_converted_model_trains_saves_and_comes_back(tmp_path):
    model = shake(residual_net())
    x = inputs_of(model)
    learned = klb.to_learned_bits(model, bits=4)
    y = {"a": np.ones((4, 2)), "b": np.ones((4, 1))}
    learned.compile("adam", {"a": "mse", "b": "mae"}, bit_reg=1.0, bit_gradient="straight_through")
    learned.fit(x, y, epochs=2, verbose=0)
    assert any(float(kernel.bits) != 4 for kernel in quantized_kernels(learned))
    learned.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_close(loaded(x), learned(x), 0)


def test_to_keras_gives_plain_layers_that_predict_the_same():
    model = shake(residual_net())
    x = inputs_of(model)
    learned = klb.to_learned_bits(model, bits=3)
    plain = klb.to_keras(learned)
    assert_close(plain(x), learned(x), 1e-5)
    assert [type(a) for a in plain.layers] == [type(b) for b in model.layers]


ELSEWHERE = """
import sys
import keras
import numpy as np

x = dict(np.load("x.npz"))
np.savez("plain.npz", **keras.models.load_model("plain.keras").predict(x, verbose=0))
assert "keras_learnbits" not in sys.modules

import keras_learnbits

np.savez("learned.npz", **keras.models.load_model("learned.keras").predict(x, verbose=0))
"""


@pytest.mark.thorough
def test_in_another_process_the_plain_model_needs_no_library_and_the_learned_one_its_import_alone(
    tmp_path,
):
    model = shake(residual_net())
    x = inputs_of(model)
    learned = klb.to_learned_bits(model, bits=3)
    learned.save(tmp_path / "learned.keras")
    klb.to_keras(learned).save(tmp_path / "plain.keras")
    np.savez(tmp_path / "x.npz", **x)
    subprocess.run([sys.executable, "-c", ELSEWHERE], check=True, cwd=tmp_path)
    for name in ("plain", "learned"):
        assert_close(dict(np.load(tmp_path / f"{name}.npz")), learned(x), 1e-5)


def test_a_sequential_model_stays_one_and_freezes_what_was_frozen(x):
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            L.Conv2D(4, 3, name="conv"),
            keras.Sequential([L.Conv2D(4, 3, name="inner"), L.Flatten()], name="block"),
            L.Dense(2, name="head"),
        ]
    )
    model.get_layer("conv").trainable = False
    learned = klb.to_learned_bits(model, bits=16)
    assert isinstance(learned, klb.LearnedBitSequential)
    assert_close(learned(x), model(x), 1e-3)
    assert not learned.get_layer("conv").trainable
    learned.compile("sgd", "mse")
    assert [kernel.layer.name for kernel in learned.trained_tensors] == ["inner", "head"]
    assert_close(klb.to_keras(learned)(x), learned(x), 1e-5)


@keras.saving.register_keras_serializable("tests")
class Block(L.Layer):
    """A user's layer that holds others and builds them when it is called."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense = L.Dense(units, name="dense")
        self.norms = [L.LayerNormalization(name="norm")]
        self.attention = L.MultiHeadAttention(2, 4, name="attention")

    def call(self, x):
        return self.norms[0](self.dense(x) + self.attention(x, x))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


class UserModel(keras.Model):
    """A user's model with a custom `call`."""

    def __init__(self, units=6, **kwargs):
        super().__init__(**kwargs)
        self.block = Block(units, name="block")
        self.blocks = {"head": L.Dense(2, name="head")}

    def call(self, x, training=None):
        return self.blocks["head"](self.block(x))


@pytest.fixture
def sequences():
    return np.random.default_rng(0).normal(size=(4, 5, 6)).astype("float32")


def test_layers_inside_a_users_layer_are_converted_inside(sequences, tmp_path):
    inputs = keras.Input((5, 6))
    model = shake(keras.Model(inputs, L.Dense(2, name="head")(Block(6, name="block")(inputs))))
    learned = klb.to_learned_bits(model, bits=16)
    assert len(quantized_kernels(learned)) == 6
    assert_close(learned(sequences), model(sequences), 2e-3)
    learned.save(tmp_path / "model.keras")
    assert_close(
        keras.models.load_model(tmp_path / "model.keras")(sequences), learned(sequences), 0
    )
    assert_close(klb.to_keras(learned)(sequences), learned(sequences), 1e-5)


def test_a_model_with_a_custom_call_is_converted_inside(sequences):
    model = UserModel(name="mine")
    model(sequences)
    shake(model)
    model.block.dense.trainable = False
    learned = klb.to_learned_bits(model, bits=16)
    assert_close(learned(sequences), model(sequences), 2e-3)
    learned.compile("sgd", "mse", bit_reg=10.0, bit_gradient="straight_through")
    learned.fit(sequences, np.ones((4, 5, 2)), verbose=0)
    moved = [kernel.name() for kernel in quantized_kernels(learned) if float(kernel.bits) < 16]
    assert moved == [
        "mine/block/attention/query/kernel",
        "mine/block/attention/key/kernel",
        "mine/block/attention/value/kernel",
        "mine/block/attention/attention_output/kernel",
        "mine/head/kernel",
    ]
    plain = klb.to_keras(learned)
    assert type(plain) is UserModel
    assert_close(plain(sequences), learned(sequences), 1e-5)


def test_a_model_with_a_custom_call_is_loaded_from_a_file(sequences, tmp_path):
    model = UserModel()
    model(sequences)
    learned = klb.to_learned_bits(model, bits=3)
    learned(sequences)
    learned.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(
        tmp_path / "model.keras", custom_objects={"UserModel": UserModel}
    )
    assert_close(loaded(sequences), learned(sequences), 0)


def test_recurrent_layers_are_converted_with_two_kernels_each(sequences):
    inputs = keras.Input((5, 6))
    h = L.Bidirectional(L.LSTM(4, return_sequences=True, name="lstm"), name="both")(inputs)
    model = keras.Model(inputs, L.GRU(3, name="gru")(h))
    learned = klb.to_learned_bits(model, bits=16)
    assert len(quantized_kernels(learned)) == 6
    assert_close(learned(sequences), model(sequences), 1e-3)


def test_state_other_than_weights_that_keras_saves_is_kept(x):
    model = keras.Sequential([keras.Input((8, 8, 3)), L.Normalization(), L.Conv2D(2, 3)])
    model.layers[0].adapt(3 * x + 1)
    assert_close(klb.to_learned_bits(model, bits=16)(x), model(x), 1e-3)


def test_policies_are_kept(x):
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), L.Conv2D(2, 3, dtype="mixed_bfloat16"), L.Flatten(), L.Dense(2)]
    )
    learned = klb.to_learned_bits(model, bits=16)
    assert [layer.dtype_policy.name for layer in learned.layers] == [
        "mixed_bfloat16", "float32", "float32",
    ]  # fmt: skip
    assert learned(x).dtype == tf.float32


def test_selection_by_name_path_class_and_function():
    model = residual_net()

    def converted(**selection):
        learned = klb.to_learned_bits(model, **selection)
        return sorted({kernel.layer.name for kernel in quantized_kernels(learned)})

    everything = ["a", "b", "lift", "mix", "separable", "shared", "stem"]
    assert converted() == everything
    assert converted(include="block/*") == converted(include="block") == ["mix"]
    assert converted(include=L.Dense) == ["a", "b", "lift", "shared"]
    assert converted(include=lambda layer: layer.name < "c") == ["a", "b", "mix"]  # all in `block`
    assert converted(exclude=["s*", L.Dense]) == ["mix"]
    assert converted(include=L.Dense, exclude="shared") == ["a", "b", "lift"]
    assert converted(include=model.get_layer("stem")) == ["stem"]
    shared = [model.get_layer("shared"), model.get_layer("lift")]
    assert converted(include=L.Dense, exclude=shared) == ["a", "b"]


def test_the_report_says_what_was_left_and_why():
    report = str(klb.to_learned_bits(residual_net(), exclude="shared").conversion)
    assert "stem       Conv2D              LearnedBitConv2D" in report
    assert "norm       BatchNormalization  left: no kernel" in report
    assert "shared     Dense               left: excluded" in report
    assert "block/mix  Conv2D              LearnedBitConv2D" in report


def test_a_second_call_converts_other_layers_with_other_settings():
    model = residual_net()
    first = klb.to_learned_bits(model, include="stem", bits=7, min_bits=6)
    quantized_kernels(first)[0].bits.assign(6.5)
    both = klb.to_learned_bits(first, bits=2)
    bits = {kernel.layer.name: float(kernel.bits) for kernel in quantized_kernels(both)}
    assert bits.pop("stem") == 6.5
    assert set(bits.values()) == {2.0}
    assert both.get_layer("stem").min_bits == 6
    with pytest.raises(
        ValueError, match="(?s)at least one layer to convert.*learns its bits already"
    ):
        klb.to_learned_bits(both)


def test_models_that_cannot_be_converted_are_refused():
    for model in (keras.Sequential([L.Dense(2)]), UserModel()):
        with pytest.raises(ValueError, match="needs a built model.*Received: model="):
            klb.to_learned_bits(model)
    with pytest.raises(ValueError, match="needs a Keras model"):
        klb.to_learned_bits(L.Dense(2))
    no_kernel = keras.Sequential([keras.Input((3,)), L.BatchNormalization()])
    with pytest.raises(ValueError, match="at least one layer to convert"):
        klb.to_learned_bits(no_kernel)


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("item", ["nothing", L.Conv3D])
def test_a_selection_that_matches_no_layer_is_refused(argument, item):
    with pytest.raises(ValueError, match=f"`{argument}` must name layers of the model. Received"):
        klb.to_learned_bits(residual_net(), **{argument: item})


def test_integer_layers_are_refused_by_name_unless_they_are_excluded():
    model = keras.Sequential(
        [keras.Input((4,)), L.Dense(3, name="int", dtype="int8_from_float32"), L.Dense(2)]
    )
    with pytest.raises(ValueError, match="Received: layer 'int', dtype policy 'int8_from_float32'"):
        klb.to_learned_bits(model)
    learned = klb.to_learned_bits(model, exclude="int")
    x = np.ones((2, 4), "float32")
    assert_close(learned(x), model(x), 0.01)
    with_lora = keras.Sequential([keras.Input((4,)), L.Dense(3, name="low", lora_rank=2)])
    with pytest.raises(ValueError, match="and no LoRA; exclude it. Received: layer 'low'"):
        klb.to_learned_bits(with_lora)


class NoConfig(L.Layer):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.dense = L.Dense(2)

    def call(self, x):
        return self.function(self.dense(x))


def test_a_layer_that_cannot_be_copied_is_named():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, NoConfig(lambda x: x)(inputs))
    with pytest.raises(ValueError, match="made from its `get_config`.*Received: 'no_config'"):
        klb.to_learned_bits(model)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="<= max_bits <= 16. Received: min_bits=1, max_bits=17"):
        klb.to_learned_bits(residual_net(), bits=17)


def test_scales_are_fitted_to_weights_of_any_distribution():
    """Weights that are not Gaussian: uniform ones, and a few large ones among zeros."""
    rng = np.random.default_rng(0)
    uniform = rng.uniform(-1, 1, (64, 2)).astype("float32")
    sparse = np.where(rng.random((64, 2)) < 0.05, 3.0, 0.0).astype("float32")
    model = keras.Sequential([keras.Input((64,)), L.Dense(2, use_bias=False)])
    for weights, bits, bound in ((uniform, 4, 0.006), (sparse, 8, 1e-3)):
        model.layers[0].kernel.assign(weights)
        learned = klb.to_learned_bits(model, bits=bits)
        (kernel,) = quantized_kernels(learned)
        assert float(kernel.squared_error() / kernel.squared_norm()) < bound


APPLICATIONS = {
    "MobileNetV2": 32, "ResNet50": 32, "EfficientNetB0": 32, "DenseNet121": 32, "ConvNeXtTiny": 32,
}  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "size"), APPLICATIONS.items())
def test_networks_of_keras_applications_are_converted_and_go_back(
    name, size, tmp_path, monkeypatch
):
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None
    )
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype("float32")
    learned = klb.to_learned_bits(model, bits=16)
    assert_close(learned(x), model(x), 1e-3)
    assert_close(klb.to_keras(learned)(x), learned(x), 1e-5)
    learned.save(tmp_path / "model.keras")
    assert_close(keras.models.load_model(tmp_path / "model.keras")(x), learned(x), 0)
    if name != "MobileNetV2":  # one is enough: XLA compiles for seconds for each shape
        monkeypatch.setattr(rounding, "COMPILED_SIZE", 2**62)
    learned.compile("sgd", "mse", bit_reg=100.0, bit_gradient="straight_through", run_eagerly=True)
    before = mean_bits(quantized_kernels(learned))
    learned.train_on_batch(x, np.ones((2, 10)))
    assert mean_bits(quantized_kernels(learned)) < before - 0.005


def test_a_stateful_layer_keeps_its_state_between_calls():
    model = keras.Sequential([keras.Input(batch_shape=(4, 5, 8)), L.LSTM(4, stateful=True)])
    learned = klb.to_learned_bits(model, bits=16)
    x = np.random.default_rng(0).normal(size=(4, 5, 8)).astype("float32")
    for _ in range(3):
        assert_close(learned(x), model(x), 1e-3)
    assert np.abs(learned(x) - learned(x)).max() > 1e-5


class Cell(L.Layer):
    """A cell with a dropout inside, whose seed moves on within the loop over time."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = self.state_size = units
        self.dense, self.dropout = L.Dense(units), L.Dropout(0.5)

    def build(self, input_shape):
        self.dense.build((None, input_shape[-1] + self.units))

    def call(self, inputs, states, training=False):
        joined = keras.ops.concatenate([inputs, states[0]], axis=-1)
        h = self.dropout(self.dense(joined), training=training)
        return h, [h]

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def test_a_custom_cell_with_dropout_trains():
    model = keras.Sequential([keras.Input((5, 8)), L.RNN(Cell(4))])
    learned = klb.to_learned_bits(model)
    learned.compile("sgd", "mse", bit_reg=10.0, bit_gradient="straight_through")
    learned.fit(np.ones((8, 5, 8)), np.ones((8, 4)), verbose=0)
    assert float(quantized_kernels(learned)[0].bits) < 8


@keras.saving.register_keras_serializable("tests")
class TwoDense(L.Layer):
    """Two layers with automatic names."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.a, self.b = L.Dense(4), L.Dense(4)

    def call(self, x):
        return self.b(self.a(x))


def test_layers_with_made_up_names_are_excluded_and_come_back(x, tmp_path):
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, TwoDense(name="two")(inputs))
    learned = klb.to_learned_bits(model, exclude=model.layers[1].a.name, bits=2)
    (kernel,) = quantized_kernels(learned)
    assert kernel.kernel is learned.layers[1].layer.b.kernel
    learned.save(tmp_path / "model.keras")
    keras.utils.clear_session()
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_close(loaded(x), learned(x), 0)
    assert_close(klb.to_keras(loaded)(x), learned(x), 1e-5)


def test_what_is_trainable_is_kept_layer_by_layer_and_weight_by_weight():
    shared = L.Dense(8, name="shared")
    inner = keras.Input((8,))
    nested = keras.Model(inner, L.Dense(8, name="own")(shared(inner)), name="nested")
    inputs = keras.Input((8,))
    model = keras.Model(inputs, L.Dense(2, name="head")(nested(shared(inputs))))
    shared.trainable = False
    model.get_layer("head").bias.trainable = False
    learned = klb.to_learned_bits(model)
    trained = [v for v in learned.trainable_weights if v.name in ("kernel", "bias")]
    assert len(trained) == len(model.trainable_weights)
    plain = klb.to_keras(learned)
    assert len(plain.trainable_weights) == len(model.trainable_weights)
    assert not plain.get_layer("shared").trainable


def test_what_is_trainable_is_kept_where_activations_make_a_branch_deeper():
    inputs = keras.Input((4,))
    a = L.Dense(4, name="a1", trainable=False)(inputs)
    a = L.Dropout(0.1)(L.ReLU()(L.BatchNormalization(name="norm")(a)))
    b = L.Dense(4, name="b2")(L.Dense(4, name="b1")(inputs))
    model = keras.Model(inputs, L.Add()([L.Dense(4, name="b3")(b), a]))
    learned = klb.to_learned_bits(model, activations=True)
    learned(np.random.default_rng(0).normal(size=(8, 4)), training=True)
    for converted in (learned, klb.to_keras(learned)):
        for layer in (each for each in model.layers if each.weights):
            wanted = {weight.name: weight.trainable for weight in layer.weights}
            found = {
                weight.name: weight.trainable for weight in converted.get_layer(layer.name).weights
            }
            assert {name: found[name] for name in wanted} == wanted


def test_masks_behind_quantized_activations_are_refused_in_plain_keras():
    inputs = keras.Input((4,), dtype="int32")
    x = L.Dense(3)(L.Embedding(5, 3, mask_zero=True)(inputs))
    learned = klb.to_learned_bits(
        keras.Model(inputs, L.GRU(2, name="gru")(x)), include="gru", activations=True
    )
    learned(np.array([[3, 1, 0, 0]]), training=True)
    with pytest.raises(ValueError, match="do not pass on masks.*layer='gru_input'"):
        klb.to_keras(learned)


def test_both_kernels_of_a_reversible_embedding_learn_their_bits():
    inputs = keras.Input((4,), dtype="int32")
    embedding = L.ReversibleEmbedding(6, 3, tie_weights=False, name="embedding")
    model = keras.Model(inputs, embedding(embedding(inputs), reverse=True))
    learned = klb.to_learned_bits(model, bits=16)
    names = [row.layer for row in klb.bit_table(learned).rows]
    assert names == ["embedding/embeddings", "embedding/reverse_embeddings"]
    tokens = np.array([[3, 1, 0, 5]])
    assert_close(learned(tokens), model(tokens), 1e-3)
    assert_close(klb.to_keras(learned)(tokens), learned(tokens), 1e-5)


@pytest.mark.parametrize("subclassed", [False, True])
def test_models_of_mixed_float16_scale_their_loss_in_a_float32_process(
    subclassed, sequences, tmp_path
):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = UserModel() if subclassed else keras.Sequential([keras.Input((6,)), L.Dense(2)])
        model(sequences if subclassed else np.ones((2, 6)))
    finally:
        keras.config.set_dtype_policy("float32")
    learned = klb.to_learned_bits(model)
    assert learned.dtype_policy.name == "mixed_float16"
    if subclassed:
        learned.save(tmp_path / "model.keras")
        objects = {"UserModel": UserModel, "Block": Block}
        learned = keras.models.load_model(tmp_path / "model.keras", objects)
    learned.compile("sgd", "mse")
    assert isinstance(learned.optimizer, keras.optimizers.LossScaleOptimizer)


def test_scales_stand_still_with_kernels_frozen_inside_a_wrapper(sequences, tmp_path):
    model = keras.Sequential(
        [keras.Input((5, 6)), L.TimeDistributed(L.Dense(4, trainable=False)), L.Dense(2)]
    )
    learned = klb.to_learned_bits(model)
    learned.save(tmp_path / "model.keras")
    for each in (learned, keras.models.load_model(tmp_path / "model.keras")):
        each.compile("sgd", "mse")
        assert len([v for v in each.trainable_weights if "log_scale" in v.name]) == 1
        each.layers[1].trainable = False
        assert each.trainable_weights == []


def test_to_keras_refuses_layers_that_it_cannot_replace():
    model = klb.LearnedBitSequential(
        [keras.Input((3, 8)), L.TimeDistributed(klb.LearnedBitDense(4, name="deep"))]
    )
    with pytest.raises(ValueError, match=r"not those that you put inside.*with \['deep'\] inside"):
        klb.to_keras(model)


def test_a_model_with_a_custom_call_is_converted_and_converted_back(sequences):
    model = UserModel()
    model(sequences)
    learned = klb.to_learned_bits(model, bits=3)
    assert_close(klb.to_keras(learned)(sequences), learned(sequences), 1e-5)


def test_a_converted_model_with_a_custom_call_inside_another_keeps_its_bits(sequences):
    model = UserModel()
    model(sequences)
    inner = klb.to_learned_bits(model, bits=3)
    inputs = keras.Input(sequences.shape[1:])
    outer = keras.Model(inputs, L.Dense(2, name="outer")(inner(inputs)))
    learned = klb.to_learned_bits(outer, bits=16)
    assert sorted({float(kernel.bits) for kernel in quantized_kernels(learned)}) == [3, 16]
    assert_close(learned(sequences), outer(sequences), 1e-3)
    assert_close(klb.to_keras(learned)(sequences), learned(sequences), 1e-5)


def test_a_weight_that_a_graph_takes_as_an_argument_is_refused():
    tokens = keras.Input((7,), dtype="int32")
    embedding = L.Embedding(9, 8, name="tokens")
    x = L.Dense(8)(embedding(tokens))
    tied = keras.ops.einsum("btd,vd->btv", x, embedding.embeddings)
    with pytest.raises(ValueError, match="Received: 'einsum.*called with \\['tokens/embeddings'"):
        klb.to_learned_bits(keras.Model(tokens, tied))


@pytest.mark.thorough
def test_a_converted_model_with_a_custom_call_is_exported(sequences, tmp_path):
    model = UserModel()
    model(sequences)
    learned = klb.to_learned_bits(model)
    expected = learned(sequences)
    plain = klb.to_keras(learned)
    plain(sequences)
    for name, each in (("learned", learned), ("plain", plain)):
        each.export(tmp_path / name, verbose=False)
        loaded = tf.saved_model.load(tmp_path / name)
        served = loaded.serve(sequences)
        np.testing.assert_allclose(served, expected, rtol=1e-4, atol=1e-5)

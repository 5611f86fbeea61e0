import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_learnbits as klb
from keras_learnbits.layers.discovery import quantized_kernels


@pytest.fixture
def model(make_model, data):
    model = make_model(bits=3)
    model.compile("adam", "mse", bit_reg=0.1, quantization_reg=0.0)
    model.fit(*data, batch_size=16, verbose=0)
    quantized_kernels(model)[0].bits.assign(3.0)
    return model


def test_the_measured_changes_are_those_of_the_evaluated_loss(model, data):
    def task_loss():
        return model.evaluate(*data, verbose=0, return_dict=True)["task_loss"]

    probe = klb.probe_bits(model, *data, batch_size=16)
    here = task_loss()
    assert [(c.layer, c.bits, c.step) for c in probe.changes] == [
        ("hidden", 3, -1), ("hidden", 3, 1), ("head", 8, -1),
    ]  # fmt: skip
    for change in probe.changes:
        bits = model.get_layer(change.layer).bits
        before = float(bits)
        bits.assign(change.bits + change.step)
        np.testing.assert_allclose(change.measured, task_loss() - here, rtol=1e-3, atol=1e-6)
        bits.assign(before)
        share = {"hidden": 48 / 64, "head": 16 / 64}[change.layer]
        np.testing.assert_allclose(change.price, 0.1 * share * change.step, rtol=1e-5)
        assert set(change.predicted) == {"measured", "difference", "straight_through", "paper"}


@pytest.mark.thorough
def test_the_standard_error_is_that_of_paired_differences(model, data):
    probe = klb.probe_bits(model, *data, batch_size=16)
    singles = [
        klb.probe_bits(model, data[0][i : i + 16], data[1][i : i + 16], batch_size=16)
        for i in range(0, 64, 16)
    ]
    each = np.array([[change.measured for change in single.changes] for single in singles])
    errors = [change.standard_error for change in probe.changes]
    np.testing.assert_allclose(errors, each.std(axis=0, ddof=1) / 2, rtol=1e-2)


@pytest.mark.thorough
def test_moves_follow_loss_plus_price(model, data):
    for price, move in ((0.0, None), (1e6, -1)):
        model.bit_reg.assign(price)
        probe = klb.probe_bits(model, *data)
        assert probe.moves["hidden"]["measured"] == probe.moves["hidden"]["loss"]
        gains = {c.step: -(c.measured + c.price) for c in probe.changes if c.layer == "hidden"}
        best = max(gains, key=gains.get) if max(gains.values()) > 0 else 0
        assert probe.moves["hidden"]["loss"] == best
        assert move in (None, best)


def test_a_probe_changes_nothing(model, data):
    variables = model.variables + model.optimizer.variables
    before = [tf.convert_to_tensor(v.value).numpy() for v in variables]
    klb.probe_bits(model, *data)
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


@pytest.mark.thorough
def test_estimators_see_the_data_they_are_given(model, data):
    x, y = data
    probe = klb.probe_bits(model, x, y, estimate_on=(x[:16], y[:16] + 1.0))
    other = klb.probe_bits(model, x[:16], y[:16] + 1.0)
    for change, seen in zip(probe.changes, other.changes, strict=True):
        np.testing.assert_allclose(change.predicted["measured"], seen.measured, rtol=1e-3)
        assert abs(change.measured - seen.measured) > 1e-4


def test_a_table_has_a_row_for_each_change_and_each_move(model, data):
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(16)
    lines = str(klb.probe_bits(model, dataset, layers=["hidden"])).splitlines()
    head, _, fewer, more, _, move, _, *explained = lines
    assert head.split()[:4] == ["layer", "bits", "loss", "+-"]
    assert "3 -> 2" in fewer
    assert "3 -> 4" in more
    assert move.split()[:2] == ["hidden", "move"]
    assert len({len(line) for line in (head, fewer, more)}) == 1
    assert [line.split(":")[0] for line in explained] == ["loss", "other columns"]


def test_an_unknown_layer_is_refused(model, data):
    with pytest.raises(ValueError, match=r"among \['hidden', 'head'\]. Received: \['typo'\]"):
        klb.probe_bits(model, *data, layers=["typo"])


@pytest.mark.thorough
def test_a_model_in_half_precision_is_probed(data):
    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input((6,))
    x = keras.layers.BatchNormalization()(klb.LearnedBitDense(8, bits=2)(inputs))
    model = klb.LearnedBitModel(inputs, klb.LearnedBitDense(2, dtype="float32")(x))
    model.compile("adam", "mse")
    for change in klb.probe_bits(model, *data).changes:
        assert np.isfinite([change.measured, *change.predicted.values()]).all()


@pytest.mark.thorough
def test_batches_weigh_by_their_examples(model, data):
    x, y = data
    uneven = klb.probe_bits(model, x, y, batch_size=48).changes[0].measured
    np.testing.assert_allclose(
        uneven, klb.probe_bits(model, x, y, batch_size=64).changes[0].measured, rtol=1e-3
    )


@pytest.mark.thorough
def test_other_and_unbuilt_models_are_refused(data):
    plain = keras.Sequential([keras.Input((6,)), klb.LearnedBitDense(2)])
    with pytest.raises(TypeError, match="needs a LearnedBitModel"):
        klb.probe_bits(plain, *data)
    unbuilt = klb.LearnedBitSequential([klb.LearnedBitDense(2)])
    unbuilt.compile("sgd", "mse")
    with pytest.raises(ValueError, match="must be built"):
        klb.probe_bits(unbuilt, *data)
    unbuilt.fit(*data, verbose=0)
    assert klb.probe_bits(unbuilt, *data).changes


@pytest.mark.thorough
def test_a_model_of_several_inputs_and_outputs_is_probed_on_lists(data):
    x, y = data
    inputs = [keras.Input((6,)), keras.Input((6,))]
    hidden = klb.LearnedBitDense(4, bits=3, name="hidden")(keras.layers.Add()(inputs))
    outputs = [klb.LearnedBitDense(2, bits=3, name=name)(hidden) for name in "ab"]
    model = klb.LearnedBitModel(inputs, outputs)
    model.compile("sgd", ["mse", "mse"])
    of_lists = klb.probe_bits(model, [x, x], [y, y])
    of_batches = klb.probe_bits(model, tf.data.Dataset.from_tensors(((x, x), (y, y))))
    assert [c.measured for c in of_lists.changes] == pytest.approx(
        [c.measured for c in of_batches.changes], rel=1e-3
    )


@pytest.mark.thorough
def test_one_layer_may_be_named_alone(model, data):
    names = list(klb.probe_bits(model, *data).moves)
    assert list(klb.probe_bits(model, *data, layers=names[0]).moves) == names[:1]


def test_where_no_bits_are_trained_there_is_nothing_to_probe(data):
    layer = klb.LearnedBitDense(2, trainable=False)
    model = klb.LearnedBitSequential([keras.Input((6,)), keras.layers.Dense(3), layer])
    model.compile("sgd", "mse")
    probe = klb.probe_bits(model, *data)
    assert probe.changes == []
    assert "No layer" in str(probe)


@pytest.mark.parametrize("x", [np.ones((8, 6)), {"a": np.ones((8, 6))}])
def test_arrays_without_targets_are_refused(x, make_model):
    model = make_model()
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match="arrays with their targets.*Received: y=None, x of type"):
        klb.probe_bits(model, x)

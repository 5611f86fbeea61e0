"""`quantize` with a target of bit operations: widths of weights and of activations."""

import keras
import numpy as np
import pytest

import keras_learnbits as klb
from keras_learnbits.calibration.activation_ranges import ActivationRanges
from keras_learnbits.calibration.output_distance import OutputDistance

L = keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(size=(128, 8, 8, 2)).astype("float32")


def net():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((8, 8, 2)), L.Conv2D(4, 3, activation="relu"), L.Conv2D(4, 3), L.ReLU(),
         L.Flatten(), L.Dense(3)]
    )  # fmt: skip


@pytest.mark.parametrize("steps", [0, 20])
def test_the_budget_is_used_and_not_exceeded(steps):
    full = klb.bit_table(klb.to_learned_bits(net(), activations=True)).bit_operations
    small = klb.quantize(
        net(), X, target_bit_operations=full // 5, activations=True, steps=steps, verbose=0
    )
    table = klb.bit_table(small)
    assert 0.9 * full / 5 < table.bit_operations <= full // 5
    assert len({row.bits for row in table.activations} | {row.bits for row in table.rows}) > 1
    assert all(row.bounds is not None for row in table.activations)


def test_more_operations_bring_outputs_closer():
    full = klb.bit_table(klb.to_learned_bits(net(), activations=True)).bit_operations
    movements = [
        klb.quantize(
            net(), X, target_bit_operations=full // part, activations=True, steps=0, verbose=0
        ).quantization.movement
        for part in (12, 6, 2)
    ]
    assert movements == sorted(movements, reverse=True)
    assert movements[-1] < 0.1 < movements[0]


def test_without_quantized_activations_the_target_is_refused():
    with pytest.raises(ValueError, match="give `activations=True`"):
        klb.quantize(net(), X, target_bit_operations=1e6, verbose=0)


def test_a_target_below_the_lowest_widths_is_refused_before_work():
    with pytest.raises(ValueError, match=r"lowest bit-widths reach: \d+ bit operations"):
        klb.quantize(net(), X, target_bit_operations=10, activations=True, verbose=0)


def test_ranges_at_each_width_are_those_of_float_activations():
    """The range at one width is that of an activation layer alone, which sees the same values."""
    model = klb.to_learned_bits(net(), activations=True)
    ranges = ActivationRanges(model, X, all_widths=True)
    values = net().layers[0](X)
    second = ranges.activations[1]
    for bits in (2, 5, 8):
        ranges.set(second, bits)
        alone = klb.LearnedBitActivation(bits, max_bits=8)
        for start in range(0, len(X), 32):
            alone(values[start : start + 32], training=True)
        np.testing.assert_allclose(second.layer.grid().step, alone.grid().step, rtol=0.05)


def test_trained_ranges_are_replaced_and_frozen_ranges_stay():
    model = klb.to_learned_bits(net(), activations=True)
    ActivationRanges(model, X, all_widths=False)
    first, second, _ = (each for each in model.layers if isinstance(each, klb.LearnedBitActivation))
    fitted = float(first.grid().step)
    for layer in (first, second):
        layer.trained_log_scale.assign(-1.0)
    second.trainable = False
    kept = float(second.grid().step)
    ranges = ActivationRanges(model, X, all_widths=True)
    assert len(ranges.activations) == 2
    assert float(first.grid().step) == pytest.approx(fitted)
    assert float(second.grid().step) == kept


def test_activations_that_are_always_zero_are_named():
    model = net()
    model.layers[0].bias.assign(np.full(4, -1e3))
    with (
        pytest.warns(UserWarning, match="constant on the examples"),
        pytest.warns(UserWarning, match="zero for all examples have no range.*conv2d_1_input"),
    ):
        klb.quantize(model, X, target_bits=4, activations=True, steps=0, verbose=0)


def test_fractional_widths_are_as_before_after_measuring():
    model = klb.to_learned_bits(net(), activations={"bits": 6.5})
    ranges = ActivationRanges(model, X, all_widths=True)
    reference = net().predict(X, verbose=0)
    ranges.loss_table(reference, OutputDistance(reference, net()), lambda: None)
    assert [float(each.bits) for each in ranges.activations] == [6.5] * 3


def test_losses_of_activations_fall_with_the_bits_and_the_model_stays():
    model = klb.to_learned_bits(net(), activations={"min_bits": 3})
    ranges = ActivationRanges(model, X, all_widths=True)
    before = [variable.numpy() for variable in model.variables]
    reference = net().predict(X, verbose=0)
    table = ranges.loss_table(reference, OutputDistance(reference, net()), lambda: None)
    assert table.shape == (3, 16)
    assert np.all(np.isinf(table[:, :2]))
    assert np.all(np.isinf(table[:, 8:]))
    assert np.all(np.diff(table[:, 2:8]) < 0)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)

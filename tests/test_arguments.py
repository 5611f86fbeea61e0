import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_learnbits as klb
from keras_learnbits.arguments import check_number
from keras_learnbits.layers.checks import check_finite_weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "2", None, True, [1], -1, 3, 2.5])
def test_what_is_no_number_within_the_bounds_is_refused_by_name(value):
    with pytest.raises(ValueError, match="`epochs` must be an integer >= 0 and < 3. Received: ep"):
        check_number("epochs", value, 0, below=3, integer=True)


@pytest.mark.parametrize("value", [0, 2, np.int64(1)])
def test_integers_of_all_kinds_within_the_bounds_are_taken(value):
    check_number("epochs", value, 0, below=3, integer=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda bad: klb.BitBudget(bad),
        lambda bad: klb.BitBudget(2.0, by=bad),
        lambda bad: klb.BitBudget(2.0, update_freq=bad),
        lambda bad: klb.BitBudget(max_accuracy_drop=0.1, float_accuracy=bad, validation_data=()),
        lambda bad: klb.FreezeBits(at=bad),
        lambda bad: klb.FreezeBits(quantization_reg=bad),
        lambda bad: klb.CollapseGuard(max_error=bad),
        lambda bad: klb.SignSGD(momentum=bad),
        lambda bad: klb.SignSGD(dead_zone=bad),
        lambda bad: klb.LearnedBitDense(2, bits=bad),
        lambda bad: klb.bit_gradients.Measured(interval=bad),
        lambda bad: klb.LearnedBitActivation(calibration_batches=bad),
        lambda bad: klb.LearnedBitSequential().compile(bit_reg=bad),
        lambda bad: klb.LearnedBitSequential().compile(quantization_reg=bad),
        lambda bad: klb.to_learned_bits(small(), bits=bad),
        lambda bad: klb.to_learned_bits(small(), min_bits=bad),
        lambda bad: klb.quantize(small(), np.ones((8, 4)), target_bits=2, min_bits=bad),
        lambda bad: klb.quantize(small(), np.ones((8, 4)), target_bits=2, max_bits=bad),
    ],
)
@pytest.mark.parametrize("bad", [float("nan"), "two"])
def test_arguments_that_are_no_numbers_are_refused(make, bad):
    with pytest.raises(ValueError, match="Received: "):
        make(bad)


def small():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="fc")], name="net")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("weight", ["gamma", "moving_variance"])
def test_weights_that_are_no_numbers_are_named_with_their_layer(value, weight):
    norm = keras.layers.BatchNormalization(name="norm")
    inner = keras.Sequential([norm], name="inner")
    model = keras.Sequential([keras.Input((4,)), inner, keras.layers.Dense(3)])
    check_finite_weights(model, "This")
    getattr(norm, weight).assign([1, value, 1, 1])
    with pytest.raises(ValueError, match=f"This needs .*`{weight}` of layer 'inner/norm'"):
        check_finite_weights(model, "This")


OTHER_BACKENDS = """
import keras

for backend in ("jax", "torch"):
    keras.backend.backend = lambda: backend
    try:
        import keras_learnbits
    except ImportError as error:
        print(error)
"""


@pytest.mark.thorough
def test_another_backend_is_refused_at_import():
    command = [sys.executable, "-c", OTHER_BACKENDS]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    refusals = process.stdout.splitlines()
    for refusal, backend in zip(refusals, ("jax", "torch"), strict=True):
        assert f"the backend '{backend}' instead of tensorflow" in refusal

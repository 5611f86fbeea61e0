"""Training that starts at widths allocated from measurements."""

import keras
import numpy as np
import pytest
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.allocation.targets import within
from keras_learnbits.calibration.output_distance import OutputDistance

pytestmark = pytest.mark.filterwarnings("ignore:Bit-widths were reduced when training ended")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 6)).astype("float32")
Y = RNG.normal(size=(64, 2)).astype("float32")


def float_net():
    keras.utils.set_random_seed(0)
    inputs = x = keras.Input((6,))
    for name, units in (("a", 12), ("b", 20), ("c", 10)):
        x = keras.layers.Dense(units, activation="relu", name=name)(x)
    return keras.Model(inputs, keras.layers.Dense(2, name="d")(x))


class Widths(keras.callbacks.Callback):
    """The bit-widths before each step, and the price after it."""

    def __init__(self):
        super().__init__()
        self.widths, self.prices = [], []

    def on_train_batch_begin(self, batch, logs=None):
        self.widths.append([int(t.integer_bits()) for t in self.model.quantized_tensors])

    def on_train_batch_end(self, batch, logs=None):
        self.prices.append(float(self.model.bit_reg.value))


def train(epochs=4, start=X, **settings):
    model = klb.to_learned_bits(float_net())
    gradient = klb.bit_gradients.Measured(interval=1)
    model.compile("adam", "mse", bit_gradient=gradient, bit_optimizer=klb.SignSGD(0.05), **settings)
    widths = Widths()
    budget = klb.BitBudget(target_bits=2.5, start=start, update_freq=1)
    callbacks = [budget, klb.FreezeBits(at=0.5), widths]
    model.fit(X, Y, batch_size=8, epochs=epochs, callbacks=callbacks, verbose=0)
    return model, widths


def test_the_first_step_has_the_widths_that_quantize_allocates():
    _, widths = train()
    small = klb.quantize(float_net(), X, target_bits=2.5, steps=0, verbose=0)
    # `quantize` holds out an eighth of the examples, so one layer may differ by a bit.
    expected = [row.bits for row in klb.bit_table(small).rows]
    assert np.abs(np.subtract(widths.widths[0], expected)).max() <= 1
    assert len(set(expected)) > 1


def test_the_size_stays_near_the_target_while_bits_move_and_ends_within_it():
    model, widths = train(epochs=8)
    sizes = [kernel.size for kernel in model.quantized_tensors]
    means = [np.dot(each, sizes) / sum(sizes) for each in widths.widths]
    assert means[0] <= 2.5
    assert max(means) < 4
    assert klb.bit_table(model).mean_bits <= 2.5


def test_no_width_jumps_by_more_than_a_bit_when_bits_are_frozen():
    _, widths = train(epochs=8)
    steps = np.abs(np.diff(widths.widths, axis=0))
    assert steps.max() <= 1
    assert steps.any()


class Drift(keras.callbacks.Callback):
    """Moves all bits far below the target, as those of a model that learns little at first."""

    def on_train_batch_begin(self, batch, logs=None):
        if not self.model.bits_are_frozen:
            for tensor in self.model.quantized_tensors:
                tensor.bits.assign(1.0)


@pytest.mark.parametrize("target", [2.5, *thorough(1.5, 4.0, 6.0)])
def test_a_target_is_used_up_although_bits_have_moved_away_from_it(target):
    model = klb.to_learned_bits(float_net())
    model.compile("adam", "mse", bit_gradient=klb.bit_gradients.Measured(interval=1))
    budget = klb.BitBudget(target_bits=target, start=X)
    callbacks = [budget, Drift(), klb.FreezeBits(at=0.5)]
    model.fit(X, Y, batch_size=8, epochs=4, callbacks=callbacks, verbose=0)
    assert 0.9 * target <= klb.bit_table(model).mean_bits <= target


def test_widths_are_permitted_within_a_number_of_bits():
    found = within(np.zeros((2, 5)), [0, 3], reach=2)
    np.testing.assert_array_equal(np.isfinite(found), [[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    found = within(np.zeros((2, 5)), [0, 3], reach=1)
    np.testing.assert_array_equal(np.isfinite(found), [[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])


def test_the_price_follows_predicted_losses_from_the_first_step():
    _, widths = train(bit_reg=7.0)
    assert widths.prices[0] != 7.0


def test_a_start_needs_a_size_and_a_built_model():
    with pytest.raises(ValueError, match=r"`start` allocates bits within a size.*max_accuracy"):
        klb.BitBudget(max_accuracy_drop=0.1, float_accuracy=0.9, validation_data=(X, Y), start=X)
    model = klb.LearnedBitSequential([klb.LearnedBitDense(4), klb.LearnedBitDense(2)])
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match="needs a built model"):
        model.fit(X, Y, callbacks=[klb.BitBudget(target_bits=3, start=X)], verbose=0)


def test_examples_that_the_model_does_not_take_are_refused():
    with pytest.raises(ValueError, match="must be inputs of the model"):
        train(start=X[:, :3])


def test_an_interrupted_start_does_not_change_the_model(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt  # the first kernel is rounded already, the others have 16 bits

    monkeypatch.setattr(OutputDistance, "__call__", interrupted)
    model = klb.to_learned_bits(float_net())
    model.compile("adam", "mse")
    before = [variable.numpy() for variable in model.variables]
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, callbacks=[klb.BitBudget(target_bits=3, start=X)], verbose=0)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_frozen_kernels_keep_bits_and_scales():
    model = klb.to_learned_bits(float_net(), bits=5)
    frozen = model.get_layer("b")
    frozen.trainable = False
    kernel = frozen.quantized_kernels["kernel"]
    kernel.log_scale.assign_add(np.full((1, 20), 0.3, "float32"))
    before = kernel.quantized().numpy()
    model.compile("adam", "mse", bit_optimizer=klb.SignSGD(0.01))
    budget = klb.BitBudget(target_bits=4, start=X)
    model.fit(X, Y, epochs=1, verbose=0, callbacks=[budget, klb.FreezeBits(at=0.5)])
    np.testing.assert_array_equal(kernel.quantized().numpy(), before)
    assert klb.bit_table(model).mean_bits <= 4

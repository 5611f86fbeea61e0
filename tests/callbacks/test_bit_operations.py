"""Budgets of bit operations: weights and activations allocated together, against brute force."""

import itertools

import keras
import numpy as np
import pytest

import keras_learnbits as klb
from keras_learnbits.callbacks.bit_operations import BitOperationsTarget, group_options

L = keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 6, 6, 2)).astype("float32")
Y = RNG.normal(size=(64, 3)).astype("float32")


def row(low, high):
    """Losses at 1 to 16 bits that fall, with noise, `inf` beyond the bounds."""
    losses = np.full(16, np.inf)
    losses[low - 1 : high] = np.sort(RNG.exponential(size=high - low + 1))[::-1]
    return losses


def test_options_are_those_that_no_other_is_better_than():
    kernels, inputs = [row(1, 3), row(2, 4)], row(2, 4)
    macs = [7, 5]
    everything = [
        (a * (macs[0] * b + macs[1] * c), inputs[a - 1] + kernels[0][b - 1] + kernels[1][c - 1])
        for a, b, c in itertools.product(range(2, 5), range(1, 4), range(2, 5))
    ]
    best = sorted(
        (cost, loss)
        for cost, loss in everything
        if not any((c <= cost and m < loss) or (c < cost and m <= loss) for c, m in everything)
    )
    options = group_options(kernels, macs, inputs)
    np.testing.assert_allclose(list(zip(options.costs, options.losses, strict=True)), best)
    for cost, (a, b, c) in zip(options.costs, options.widths, strict=True):
        assert cost == a * (macs[0] * b + macs[1] * c)


def net(**arguments):
    """Two kernels read the first activation, one the second; the operands of the sum are not
    multiplied.
    """
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 2))
    x = L.Conv2D(3, 3, padding="same", name="a")(inputs)
    shortcut = L.Conv2D(3, 1, name="b")(inputs)
    x = L.Flatten()(L.Add()([x, shortcut]))
    model = keras.Model(inputs, L.Dense(3, name="c")(x))
    return klb.to_learned_bits(
        model, activations={"bits": 4, "max_bits": 4}, bits=4, max_bits=4, **arguments
    )


@pytest.mark.parametrize("share", [0.2, 0.4, 0.7, 1.0])
def test_the_allocation_is_the_best_of_all(share):
    model = net()
    tensors = model.quantized_tensors
    losses = np.array([row(t.layer.min_bits, 4) for t in tensors])
    macs = {"a": 36 * 54, "b": 36 * 6, "c": 324}
    source = {"a": "a_input", "b": "a_input", "c": "c_input"}
    names = [tensor.name() for tensor in tensors]
    budget = share * sum(16 * number for number in macs.values())
    best = np.inf
    free = ["a", "b", "c", "a_input", "c_input"]
    for widths in itertools.product(
        range(1, 5), range(1, 5), range(1, 5), range(2, 5), range(2, 5)
    ):
        bits = dict(zip(free, widths, strict=True))
        if sum(number * bits[k] * bits[source[k]] for k, number in macs.items()) <= budget:
            loss = sum(losses[names.index(name), bits[name] - 1] for name in free)
            best = min(best, loss)
    found = BitOperationsTarget(budget).allocate_by(model, tensors, losses)
    by_name = {tensor.name(): bits for tensor, bits in found.items()}
    assert by_name.keys() == {*free}  # the operands of the sum keep their bits
    loss = sum(losses[names.index(name), bits - 1] for name, bits in by_name.items())
    assert loss == pytest.approx(best)
    for tensor, bits in found.items():
        tensor.bits.assign(bits)
    assert klb.bit_table(model).bit_operations <= budget


def test_training_ends_within_the_budget():
    model = net()
    model(X, training=True)
    full = klb.bit_table(model).bit_operations
    model.compile("adam", "mse", bit_optimizer=klb.SignSGD(0.3))
    budget = klb.BitBudget(target_bit_operations=0.4 * full, update_freq=2)
    model.fit(X, Y, batch_size=16, epochs=8, verbose=0, callbacks=[budget, klb.FreezeBits(at=0.7)])
    table = klb.bit_table(model)
    assert 0.25 * full < table.bit_operations <= 0.4 * full
    assert model.bits_are_frozen


def test_training_that_begins_at_measured_widths_stays_within_the_budget():
    model = net()
    model(X, training=True)
    full = klb.bit_table(model).bit_operations
    model.compile("adam", "mse", bit_optimizer=klb.SignSGD(0.01))
    budget = klb.BitBudget(target_bit_operations=0.4 * full, start=X)
    sizes = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs=None: sizes.append(
            klb.bit_table(model).bit_operations
        )
    )
    callbacks = [budget, klb.FreezeBits(at=0.5), watch]
    model.fit(X, Y, batch_size=16, epochs=4, verbose=0, callbacks=callbacks)
    assert 0.3 * full < sizes[0] <= 0.4 * full
    assert klb.bit_table(model).bit_operations <= 0.4 * full


def test_a_budget_below_the_lowest_widths_is_refused_with_the_lowest():
    model = net()
    lowest = 2 * (36 * 54 + 36 * 6 + 324)
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match=f"lowest bit-widths reach: {lowest} bit operations"):
        model.fit(X, Y, verbose=0, callbacks=[klb.BitBudget(target_bit_operations=lowest - 1)])
    with pytest.warns(UserWarning, match="Bit-widths were reduced when training ended"):
        model.fit(X, Y, verbose=0, callbacks=[klb.BitBudget(target_bit_operations=lowest)])
    assert klb.bit_table(model).bit_operations == lowest


@pytest.mark.parametrize(
    "layers",
    [
        [L.Dense(3)],
        [L.Reshape((6, 12)), L.LSTM(3), L.Dense(3)],
    ],
)
def test_kernels_without_known_operations_are_named(layers):
    float_inputs = len(layers) == 1
    model = klb.to_learned_bits(
        keras.Sequential([keras.Input((6, 6, 2)), L.Flatten(), *layers][: 2 + len(layers)]),
        activations=not float_inputs,
    )
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match=r"needs kernels whose multiplications are known.*kernels"):
        model.fit(X, Y, verbose=0, callbacks=[klb.BitBudget(target_bit_operations=1e9)])

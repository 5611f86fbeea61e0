"""Budgets of bit operations: weights and activations allocated together, against brute force."""

import itertools

import keras
import numpy as np
import pytest

import keras_learnbits as klb
from keras_learnbits.allocation.bit_operations import BitOperationsTarget, group_options

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


def train(model, share, epochs=2, callbacks=(), **settings):
    """Trains within a share of the operations at 4 bits; the widths before each step."""
    model(X, training=True)
    full = 16 * (36 * 54 + 36 * 6 + 324)
    model.compile("adam", "mse", bit_optimizer=klb.SignSGD(0.3))
    budget = klb.BitBudget(target_bit_operations=share * full, start=X)
    widths = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs=None: widths.append(
            [float(tensor.bits) for tensor in model.quantized_tensors]
        )
    )
    callbacks = [budget, *callbacks, watch]
    model.fit(X, Y, batch_size=16, epochs=epochs, verbose=0, callbacks=callbacks, **settings)
    assert klb.bit_table(model).bit_operations <= share * full
    return widths


@pytest.mark.parametrize("callbacks", [[], [klb.FreezeBits(at=0.5)]])
def test_training_keeps_the_widths_that_measurements_allocate(callbacks):
    model = net()
    widths = train(model, 0.4, callbacks=callbacks)
    assert len({*map(tuple, widths)}) == 1
    assert len({*widths[0]}) > 1
    assert klb.bit_table(model).bit_operations > 0.3 * 16 * (36 * 54 + 36 * 6 + 324)
    assert model.bits_are_frozen


def test_a_training_that_is_resumed_keeps_its_widths():
    model = net()
    before = train(model, 0.4)
    after = train(model, 0.4, initial_epoch=2, epochs=3)
    assert after[0] == before[0]
    assert model.bits_are_frozen


@pytest.mark.parametrize("budget_first", [True, False])
def test_a_freeze_before_the_first_step_has_the_measured_widths(budget_first):
    model = net()
    model(X, training=True)
    model.compile("adam", "mse")
    share = 0.4 * 16 * (36 * 54 + 36 * 6 + 324)
    budget = klb.BitBudget(target_bit_operations=share, start=X)
    callbacks = [budget, klb.FreezeBits(at=0)][:: 1 if budget_first else -1]
    model.fit(X, Y, epochs=1, verbose=0, callbacks=callbacks)
    frozen = [int(tensor.bits) for tensor in model.quantized_tensors]
    widths = train(net(), 0.4, epochs=1)
    assert frozen == widths[0]


def test_a_distilled_model_takes_a_budget_of_operations():
    student = net()
    student(X, training=True)
    teacher = keras.Sequential([keras.Input((6, 6, 2)), L.Flatten(), L.Dense(3)])
    loss = keras.distillation.LogitsDistillation(loss="mse")
    model = klb.LearnedBitDistiller(teacher, student, loss)
    model.compile("adam", "mse")
    share = 0.4 * 16 * (36 * 54 + 36 * 6 + 324)
    budget = klb.BitBudget(target_bit_operations=share, start=X)
    model.fit(X, Y, epochs=1, verbose=0, callbacks=[budget])
    assert klb.bit_table(student).bit_operations <= share


def test_a_gradient_that_predicts_no_losses_will_do():
    model = net()
    model(X, training=True)
    model.compile("adam", "mse", bit_gradient="straight_through")
    budget = klb.BitBudget(target_bit_operations=1e5, start=X)
    model.fit(X, Y, epochs=1, verbose=0, callbacks=[budget])
    assert klb.bit_table(model).bit_operations <= 1e5


def test_without_examples_to_measure_on_the_target_is_refused():
    with pytest.raises(ValueError, match="give `start`, a few hundred example inputs"):
        klb.BitBudget(target_bit_operations=1e6)


def test_a_budget_below_the_lowest_widths_is_refused_with_the_lowest():
    model = net()
    lowest = 2 * (36 * 54 + 36 * 6 + 324)
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match=f"lowest bit-widths reach: {lowest} bit operations"):
        model.fit(
            X, Y, verbose=0, callbacks=[klb.BitBudget(target_bit_operations=lowest - 1, start=X)]
        )
    model.fit(X, Y, verbose=0, callbacks=[klb.BitBudget(target_bit_operations=lowest, start=X)])
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
        model.fit(X, Y, verbose=0, callbacks=[klb.BitBudget(target_bit_operations=1e9, start=X)])

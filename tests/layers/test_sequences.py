"""Sequence models, converted from trained float models, on generated data."""

import keras
import numpy as np
import pytest

import keras_learnbits as klb

L = keras.layers
LENGTH, TOKENS, MARKER = 12, 8, 0


def marked(number, seed):
    """Which token follows the marker? Tokens of shape (number, 12), and that token."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, TOKENS, (number, LENGTH))
    indices = rng.integers(0, LENGTH - 1, number)
    tokens[np.arange(number), indices] = MARKER
    return tokens, tokens[np.arange(number), indices + 1]


def pointed_at(number, seed):
    """Which token is at the index in the first one? Tokens and that token, as in `marked`."""
    tokens = np.random.default_rng(seed).integers(1, TOKENS, (number, LENGTH))
    return tokens, tokens[np.arange(number), tokens[:, 0]]


def transformer():
    inputs = keras.Input((LENGTH,), dtype="int32")
    positions = L.Embedding(LENGTH, 32, name="positions")(keras.ops.cumsum(
        keras.ops.ones_like(inputs), axis=1) - 1)  # fmt: skip
    x = L.Embedding(TOKENS, 32, name="tokens")(inputs) + positions
    for block in range(2):
        attended = L.MultiHeadAttention(2, 16, name=f"attention{block}")(x, x)
        x = L.LayerNormalization()(x + attended)
        hidden = L.Dense(64, activation="relu", name=f"hidden{block}")(x)
        x = L.LayerNormalization()(x + L.Dense(32, name=f"out{block}")(hidden))
    return keras.Model(inputs, L.Dense(TOKENS, name="head")(x[:, 0]))


def bidirectional_lstm():
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = L.Embedding(TOKENS, 16, name="tokens")(inputs)
    x = L.Bidirectional(L.LSTM(32), name="lstm")(x)
    return keras.Model(inputs, L.Dense(TOKENS, name="head")(x))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("net", "sequences", "kernels"),
    [(transformer, pointed_at, 2 + 2 * 6 + 1), (bidirectional_lstm, marked, 1 + 4 + 1)],
)
def test_a_sequence_net_learns_four_bits_within_a_point_of_float(net, sequences, kernels):
    train, test = sequences(4096, seed=0), sequences(2000, seed=1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def fit(model, epochs, rate, callbacks=(), **settings):
        schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * 64)
        model.compile(keras.optimizers.Adam(schedule), loss, metrics=["accuracy"], **settings)
        model.fit(*train, batch_size=64, epochs=epochs, callbacks=list(callbacks), verbose=0)
        return model.evaluate(*test, batch_size=500, verbose=0, return_dict=True)["accuracy"]

    model = net()
    float_accuracy = fit(model, epochs=12, rate=3e-3)
    assert float_accuracy > 0.9  # guessing is right in one of seven
    learned = klb.to_learned_bits(model)
    callbacks = [klb.BitBudget(target_bits=4, update_freq=16), klb.FreezeBits(at=0.6)]
    settings = {"bit_gradient": klb.bit_gradients.Measured(interval=2)}
    settings["bit_optimizer"] = klb.SignSGD(0.04)
    accuracy = fit(learned, epochs=10, rate=2e-3, callbacks=callbacks, **settings)
    table = klb.bit_table(learned)
    assert len(table.rows) == kernels
    assert 3.7 < table.mean_bits <= 4
    assert accuracy >= float_accuracy - 0.01

import keras
import numpy as np
import pytest
import tensorflow as tf
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.layers.discovery import quantized_kernels
from keras_learnbits.layers.wrapper import LearnedBitWrapper

L = keras.layers

# A function that makes a layer, and its kernels' names.
LAYERS = {
    "LSTM": (lambda: L.LSTM(3), ["lstm_cell/kernel", "lstm_cell/recurrent_kernel"]),
    "GRU": (
        lambda: L.GRU(3, return_sequences=True),
        ["gru_cell/kernel", "gru_cell/recurrent_kernel"],
    ),
    "SimpleRNN": (
        lambda: L.SimpleRNN(3),
        ["simple_rnn_cell/kernel", "simple_rnn_cell/recurrent_kernel"],
    ),
    "Bidirectional": (
        lambda: L.Bidirectional(L.LSTM(3)),
        [
            f"{direction}_lstm/lstm_cell/{kernel}"
            for direction in ("forward", "backward")
            for kernel in ("kernel", "recurrent_kernel")
        ],
    ),
    "stacked cells": (
        lambda: L.RNN([L.GRUCell(3, name="a"), L.LSTMCell(2, name="b")]),
        [
            f"stacked_rnn_cells/{c}/{k}"
            for c in ("a", "b")
            for k in ("kernel", "recurrent_kernel")
        ],
    ),
    "TimeDistributed": (lambda: L.TimeDistributed(L.Dense(3, name="inner")), ["inner/kernel"]),
    "block": (
        lambda: keras.Sequential([L.Dense(4, name="a"), L.BatchNormalization(), L.Dense(2)]),
        None,
    ),
}  # fmt: skip
every_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(4, 5, 6)).astype("float32")


def with_quantized_kernels(wrapper, x):
    """The layer's outputs with the quantized weights assigned to its kernels, as an oracle."""
    kernels = quantized_kernels(wrapper)
    floats = [k.kernel.numpy() for k in kernels]
    for kernel in kernels:
        kernel.kernel.assign(kernel.quantized())
    outputs = wrapper.layer(x)
    for kernel, value in zip(kernels, floats, strict=True):
        kernel.kernel.assign(value)
    return outputs


@every_layer
def test_a_wrapped_layer_computes_what_it_computes_with_quantized_kernels(name, x):
    make, kernels = LAYERS[name]
    wrapper = LearnedBitWrapper(make(), bits=2)
    outputs = wrapper(x)
    assert kernels is None or list(wrapper.quantized_kernels) == kernels
    np.testing.assert_allclose(outputs, with_quantized_kernels(wrapper, x), atol=1e-6)
    assert np.abs(outputs - wrapper.layer(x)).max() > 1e-3


@pytest.mark.parametrize(
    "name", ["Bidirectional", *thorough(*(name for name in LAYERS if name != "Bidirectional"))]
)
def test_a_wrapped_layer_trains_and_comes_back_from_a_file(name, x, tmp_path):
    inputs = keras.Input(x.shape[1:])
    wrapper = LearnedBitWrapper(LAYERS[name][0](), bits=4, name="wrapped")
    model = klb.LearnedBitModel(inputs, wrapper(inputs))
    model.compile("sgd", "mse", bit_reg=10.0, bit_gradient="straight_through")
    before = [k.kernel.numpy() for k in quantized_kernels(model)]
    y = np.ones((4, *model.output_shape[1:]), "float32")
    model.fit(x, y, epochs=2, verbose=0)
    for kernel, old in zip(quantized_kernels(model), before, strict=True):
        assert float(kernel.bits) == pytest.approx(3.98)
        assert np.abs(kernel.kernel - old).max() > 0
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert klb.bit_table(loaded).rows == klb.bit_table(model).rows


def test_the_gradients_are_those_of_the_learned_bit_twin(x):
    twin = klb.LearnedBitDense(3, bits=2)
    wrapper = LearnedBitWrapper(L.Dense(3), bits=2)
    gradients = []
    for layer in (twin, wrapper):
        layer(x)
        (kernel,) = layer.quantized_kernels.values()
        kernel.kernel.assign(twin.quantized_kernels["kernel"].kernel)
        kernel.log_scale.assign(twin.quantized_kernels["kernel"].log_scale)
        variables = [kernel.kernel, kernel.log_scale]
        with tf.GradientTape() as tape:
            tape.watch(kernel.bits.value)
            loss = tf.reduce_sum(tf.square(layer(x)))
        gradients.append(tape.gradient(loss, [v.value for v in [*variables, kernel.bits]]))
    for of_twin, of_wrapper in zip(*gradients, strict=True):
        np.testing.assert_allclose(of_wrapper, of_twin, rtol=1e-4, atol=1e-5)


def test_attention_takes_its_masks_and_options(x):
    mask = np.tril(np.ones((4, 5, 5), bool))
    wrapper = LearnedBitWrapper(L.MultiHeadAttention(2, 4), bits=16, max_bits=16)
    outputs, scores = wrapper(x, x, attention_mask=mask, return_attention_scores=True)
    expected, expected_scores = wrapper.layer(
        x, x, attention_mask=mask, return_attention_scores=True
    )
    np.testing.assert_allclose(outputs, expected, atol=2e-3)
    np.testing.assert_allclose(scores, expected_scores, atol=2e-3)
    assert list(wrapper.quantized_kernels)[-1] == "attention_output/kernel"
    assert wrapper.quantized_kernels["query/kernel"].log_scale.shape == (1, 2, 4)


def test_masks_of_an_embedding_reach_the_layer_and_those_behind():
    tokens = np.array([[3, 1, 0, 0], [2, 0, 0, 0]])
    inputs = keras.Input((4,), dtype="int32")
    embedded = L.Embedding(5, 3, mask_zero=True)(inputs)
    wrapper = LearnedBitWrapper(L.GRU(3, return_sequences=True), bits=2)
    model = keras.Model(inputs, L.GlobalAveragePooling1D()(wrapper(embedded)))
    longer = np.concatenate([tokens, np.zeros((2, 3), int)], axis=1)
    steps = wrapper(model.layers[1](longer))
    np.testing.assert_allclose(model.layers[-1](steps), model.predict(tokens, verbose=0), rtol=1e-5)


def test_statistics_and_seeds_inside_move_on_in_training(x):
    block = keras.Sequential([L.Dense(4), L.BatchNormalization(), L.Dropout(0.5)])
    wrapper = LearnedBitWrapper(block)
    wrapper(x)
    before = block.layers[1].moving_mean.numpy()
    first, second = wrapper(x, training=True), wrapper(x, training=True)
    assert np.abs(block.layers[1].moving_mean - before).max() > 0
    assert np.abs(first - second).max() > 0


def test_losses_inside_are_those_of_the_float_kernel(x):
    inner = L.Dense(2, kernel_regularizer=keras.regularizers.L2(1.0), activity_regularizer="l2")
    wrapper = LearnedBitWrapper(inner, bits=1)
    outputs = wrapper(x)
    regularization = (inner.kernel.numpy() ** 2).sum()
    activity = 0.01 * (outputs.numpy() ** 2).sum() / 4
    np.testing.assert_allclose(
        sum(map(float, wrapper.losses)), regularization + activity, rtol=1e-5
    )


class Noted(L.Layer):
    """Two dense layers that add the mean square of the activations between them to the loss."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first, self.second = L.Dense(4), L.Dense(2)

    def build(self, shape):
        self.first.build(shape)
        self.second.build((*shape[:-1], 4))
        self.built = True

    def call(self, x):
        x = self.first(x)
        self.add_loss(keras.ops.mean(keras.ops.square(x)))
        return self.second(x)


def test_a_probe_counts_the_losses_that_a_layer_adds_once(data):
    model = klb.LearnedBitSequential([keras.Input((6,)), LearnedBitWrapper(Noted())])
    model.compile("sgd", "mse", bit_reg=0.0)
    evaluated = model.evaluate(*data, batch_size=64, verbose=0, return_dict=True)["loss"]
    batch = (*map(tf.constant, data), None)
    looked = model.losses_at(batch, tf.zeros((1, len(model.trained_tensors))), training=False)
    np.testing.assert_allclose(looked, [evaluated], rtol=1e-5)


def test_under_a_mixed_policy_kernels_are_rounded_in_float32(x):
    keras.config.set_dtype_policy("mixed_bfloat16")
    wrapper = LearnedBitWrapper(L.Dense(3), bits=2)
    inputs = keras.Input((5, 6))
    model = keras.Model(inputs, wrapper(inputs))
    outputs = model(x)
    assert outputs.dtype == tf.bfloat16
    (kernel,) = quantized_kernels(wrapper)
    expected = keras.ops.matmul(tf.cast(x, "bfloat16"), tf.cast(kernel.quantized(), "bfloat16"))
    np.testing.assert_array_equal(outputs, expected)


def test_a_frozen_wrapper_moves_nothing(x, data):
    inputs = keras.Input((6,))
    wrapper = LearnedBitWrapper(L.Dense(3), name="wrapped")
    model = klb.LearnedBitModel(inputs, klb.LearnedBitDense(2)(wrapper(inputs)))
    wrapper.trainable = False
    before = [v.numpy() for v in wrapper.variables]
    model.compile("sgd", "mse", bit_reg=10.0, bit_gradient="straight_through")
    model.fit(*data, verbose=0)
    for variable, value in zip(wrapper.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_excluded_kernels_stay_float(x):
    wrapper = LearnedBitWrapper(L.LSTM(3), exclude="*/recurrent_kernel")
    wrapper(x)
    assert list(wrapper.quantized_kernels) == ["lstm_cell/kernel"]


def test_what_learns_its_bits_already_is_left_alone(x):
    wrapper = LearnedBitWrapper(keras.Sequential([klb.LearnedBitDense(3), L.Dense(2, name="b")]))
    wrapper(x)
    assert list(wrapper.quantized_kernels) == ["b/kernel"]
    assert len(quantized_kernels(wrapper)) == 2


def test_a_layer_without_kernels_is_refused(x):
    with pytest.raises(ValueError, match="needs a layer with a kernel inside. Received: layer='re"):
        LearnedBitWrapper(L.ReLU(name="relu"))(x)
    with pytest.raises(ValueError, match="Received: layer=3"):
        LearnedBitWrapper(3)


def test_integer_kernels_are_refused(x):
    with pytest.raises(ValueError, match="quantizes float kernels.*policy 'int8_from_float32'"):
        LearnedBitWrapper(L.Dense(3, dtype="int8_from_float32"))(x)


@pytest.mark.thorough
@pytest.mark.parametrize("model_class", [klb.LearnedBitSequential, keras.Sequential])
@pytest.mark.parametrize("kind", [L.LSTM, L.GRU, L.SimpleRNN])
def test_a_recurrent_layer_that_its_first_step_builds_trains(kind, model_class, x):
    model = model_class([LearnedBitWrapper(kind(3)), klb.LearnedBitDense(2)])
    model.compile("adam", "mse")
    history = model.fit(x, np.ones((len(x), 2)), epochs=2, verbose=0).history
    assert history["loss"][1] < history["loss"][0]


def test_states_inside_are_reset(x):
    layers = [L.LSTM(3, stateful=True), L.Bidirectional(L.GRU(3, stateful=True))]
    for layer in layers:
        wrapper = LearnedBitWrapper(layer)
        first, second = wrapper(x).numpy(), wrapper(x).numpy()
        assert np.abs(second - first).max() > 1e-3
        for reset in (wrapper.reset_state, wrapper.reset_states):
            reset()
            np.testing.assert_array_equal(wrapper(x), first)

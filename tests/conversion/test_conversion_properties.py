"""Random small graphs: branches, shared layers, nested models, several inputs and outputs."""

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import keras_learnbits as klb

L = keras.layers
LENGTH, CHANNELS = 5, 4

# Each maps a tensor of shape (batch_size, 5, 4) to another of that shape.
LAYERS = {
    "dense": lambda: L.Dense(CHANNELS, activation="tanh"),
    "einsum": lambda: L.EinsumDense("abc,cd->abd", output_shape=(None, CHANNELS), bias_axes="d"),
    "conv": lambda: L.Conv1D(CHANNELS, 3, padding="same"),
    "transposed": lambda: L.Conv1DTranspose(CHANNELS, 3, padding="same"),
    "depthwise": lambda: L.DepthwiseConv1D(3, padding="same"),
    "separable": lambda: L.SeparableConv1D(CHANNELS, 3, padding="same", activation="relu"),
    "gru": lambda: L.GRU(CHANNELS, return_sequences=True),
    "both ways": lambda: L.Bidirectional(L.SimpleRNN(CHANNELS // 2, return_sequences=True)),
    "over time": lambda: L.TimeDistributed(L.Dense(CHANNELS)),
    "batch norm": lambda: L.BatchNormalization(),
    "layer norm": lambda: L.LayerNormalization(),
    "dropout": lambda: L.Dropout(0.3),
}


def graph(draw, depth=2):
    """A functional model of (5, 4) inputs."""
    inputs = [keras.Input((LENGTH, CHANNELS)) for _ in range(draw(st.integers(1, 2)))]
    tensors, layers = list(inputs), []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["layer", "layer", "shared", "add", "sine", "nested", "stack"]))
        x = draw(st.sampled_from(tensors))
        if kind == "add":
            y = L.Add()([x, draw(st.sampled_from(tensors))])
        elif kind == "sine":
            y = keras.ops.sin(x) + x
        else:
            if kind == "shared" and layers:
                layer = draw(st.sampled_from(layers))
            elif kind == "nested" and depth:
                layer = graph(draw, depth - 1)
            elif kind == "stack":
                names = draw(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=2))
                layer = keras.Sequential(
                    [keras.Input((LENGTH, CHANNELS)), *(LAYERS[name]() for name in names)]
                )
            else:
                layer = LAYERS[draw(st.sampled_from(sorted(LAYERS)))]()
            layers.append(layer)
            several = isinstance(layer, keras.Model) and len(layer.inputs) > 1
            y = layer([x, draw(st.sampled_from(tensors))] if several else x)
            y = y[0] if isinstance(y, list | tuple) else y
        tensors.append(y)
    tensors.append(L.Dense(CHANNELS)(tensors[-1]))  # so that there is a layer to convert
    outputs = tensors[-1] if depth < 2 else draw(st.sampled_from([tensors[-1], tensors[-2:]]))
    return keras.Model(inputs if len(inputs) > 1 else inputs[0], outputs)


def predictions(model, x):
    return [np.asarray(y, "float64") for y in keras.tree.flatten(model(x, training=False))]


def largest_difference(ys, others):
    scale = max(np.abs(y).max() for y in ys)
    return max(np.abs(y - z).max() for y, z in zip(ys, others, strict=True)) / scale


@pytest.mark.thorough
@pytest.mark.parametrize("part", range(4))  # to be run in as many processes
def test_a_hundred_random_graphs_are_converted_go_back_and_come_back_from_files(part, tmp_path):
    @seed(part)
    @settings(max_examples=25, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data(), st.integers(1, 8))
    def holds(data, bits):
        check(graph(data.draw), bits, tmp_path / "model.keras")

    holds()


def check(model, bits, path):
    rng = np.random.default_rng(0)
    for weight in model.weights:
        low, high = (0.5, 1.5) if "variance" in weight.name else (-0.7, 0.7)
        weight.assign(rng.uniform(low, high, weight.shape))
    x = [rng.normal(size=(3, LENGTH, CHANNELS)).astype("float32") for _ in model.inputs]
    x = x if len(x) > 1 else x[0]
    expected = predictions(model, x)

    assert largest_difference(expected, predictions(klb.to_learned_bits(model, bits=16), x)) < 1e-3

    learned = klb.to_learned_bits(model, bits=bits, activations=bits > 4)
    learned(x, training=True)  # fits the ranges of activations
    predicted = predictions(learned, x)
    assert largest_difference(predicted, predictions(klb.to_keras(learned), x)) < 1e-5

    learned.save(path)
    assert largest_difference(predicted, predictions(keras.models.load_model(path), x)) == 0
    keras.utils.clear_session()

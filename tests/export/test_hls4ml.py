"""The C++ of circuits, compiled by g++, equals the models in every output."""

import itertools
import os
import shutil

import keras
import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits._keras import calls
from keras_learnbits.export._exactness import output_levels, step_of

L = keras.layers
RNG = np.random.default_rng(0)
QUANTIZER = klb.LearnedScaleQuantizer(power_of_two=True)


@pytest.fixture(autouse=True, scope="module")
def unoptimized(tmp_path_factory):
    """A `g++` that compiles without optimizing, in half the time; hls4ml asks for `-O3`."""
    compiler = tmp_path_factory.mktemp("bin") / "g++"
    compiler.write_text(f'#!/bin/bash\nexec {shutil.which("g++")} "${{@/-O3/-O0}}"\n')
    compiler.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(compiler.parent), prepend=os.pathsep)
        yield


def activation(bits=6, **arguments):
    return klb.LearnedBitActivation(bits, power_of_two=True, **arguments)


def dense(units, bits=3, **arguments):
    return klb.LearnedBitDense(units, bits=bits, kernel_quantizer=QUANTIZER, **arguments)


def conv(filters, size, bits=3, **arguments):
    return klb.LearnedBitConv2D(filters, size, bits=bits, kernel_quantizer=QUANTIZER, **arguments)


def fitted(model, number=256):
    """The model with fitted activations, random biases, and inputs over more than their range."""
    x = keras.tree.map_structure(
        lambda each: RNG.normal(0, 1.2, (number, *each.shape[1:])).astype("float32"), model.input
    )
    for layer in model.layers:
        if getattr(layer, "use_bias", False) and hasattr(layer, "quantized_kernels"):
            layer.bias.assign(RNG.normal(0, 0.3, layer.bias.shape))
    model(x, training=True)
    return model, x


def check_equal(model, x, directory):
    graph = klb.export_hls4ml(model, directory)
    arrays = keras.tree.flatten(x)
    found = graph.predict(arrays[0] if len(arrays) == 1 else arrays)
    expected = keras.tree.flatten(model.predict(x, verbose=0))
    for got, wanted in zip(keras.tree.flatten(found), expected, strict=True):
        np.testing.assert_array_equal(got.reshape(wanted.shape), wanted)


def sequential(shape, *layers):
    return klb.LearnedBitModel(*chain(keras.Input(shape), layers))


def chain(inputs, layers):
    x = inputs
    for layer in layers:
        x = layer(x)
    return inputs, x


def residual():
    """Two convolutions of one input whose outputs are added."""
    inputs = keras.Input((6, 6, 3))
    x = activation()(inputs)
    ends = [activation()(conv(4, size, padding="same")(x)) for size in (1, 3)]
    return klb.LearnedBitModel(inputs, L.Add()(ends))


def merges():
    """Two quantized tensors, merged in all ways."""
    inputs = keras.Input((6, 6, 3))
    x = activation()(inputs)
    ends = [activation()(conv(4, size, padding="same")(x)) for size in (1, 3)]
    layers = [L.Subtract(), L.Multiply(), L.Average(), L.Maximum(), L.Minimum(), L.Concatenate(),
              L.Concatenate(axis=1)]  # fmt: skip
    return klb.LearnedBitModel(inputs, [layer(ends) for layer in layers])


def dictionary_of_two():
    inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((6,), name="b")}
    x = L.concatenate([dense(3)(activation()(each)) for each in inputs.values()])
    hidden = L.ReLU(name="1.a>name-with_signs")(x)
    outputs = {"first": dense(2)(activation()(hidden)), "second": dense(3)(activation()(x))}
    return klb.LearnedBitModel(inputs, outputs)


def nested_and_shared():
    block = klb.LearnedBitSequential(
        [keras.Input((4,)), activation(), dense(4, name="inner"), L.ReLU()], name="block"
    )
    inputs = keras.Input((4,))
    return klb.LearnedBitModel(inputs, dense(2)(activation()(block(block(inputs)))))


def read_output():
    """An output that another layer also reads, and one that is the rearranged input."""
    inputs = keras.Input((4,), name="input")
    hidden = dense(3, activation="relu")(activation()(inputs))
    last = dense(2)(activation(2)(hidden))
    return klb.LearnedBitModel(inputs, [L.Dropout(0.2)(hidden), last])


def read_output_of_a_nested_model():
    """The same within a nested model, whose outputs are those of the outer one."""
    block, inputs = read_output(), keras.Input((4,))
    return klb.LearnedBitModel(inputs, block(inputs))


NETS = {
    "digits": lambda: sequential(
        (8, 8, 1),
        *(activation(5), conv(8, 3, bits=2, activation="relu"), L.MaxPooling2D(2)),
        *(L.Flatten(), activation(5), L.Dropout(0.5), dense(10, bits=4)),
    ),
    "residual": residual,
    "read output": read_output,
    "depthwise": lambda: sequential(
        (7, 9, 3),
        *(activation(8), L.ZeroPadding2D(((1, 0), (2, 1)))),
        klb.LearnedBitDepthwiseConv2D(3, strides=2, bits=8, kernel_quantizer=QUANTIZER),
        *(L.ReLU(), activation(4)),
        klb.LearnedBitSeparableConv2D(5, 3, padding="same", bits=1, kernel_quantizer=QUANTIZER),
        L.GlobalMaxPooling2D(),
        *(activation(2), dense(3, bits=1)),
    ),
}


def joined_inputs():
    """Layers that move values come before the first quantizer."""
    inputs = {"int": keras.Input((4,), name="int"), "b": keras.Input((2, 2), name="b")}
    x = L.Concatenate()([inputs["int"], L.Flatten()(inputs["b"])])
    return klb.LearnedBitModel(inputs, dense(3)(activation()(L.Reshape((8,))(x))))


def moved_input():
    inputs = keras.Input((6, 6, 2))
    x = L.Permute((2, 1, 3))(L.Dropout(0.2)(L.ZeroPadding2D(1)(inputs)))
    x = activation()(L.MaxPooling2D(2)(x))
    return klb.LearnedBitModel(inputs, dense(3)(activation()(L.Flatten()(conv(3, 3)(x)))))


MORE_NETS = {
    "nested read output": read_output_of_a_nested_model,
    "joined inputs": joined_inputs,
    "moved input": moved_input,
    "averages": lambda: sequential(
        (8, 8, 3),
        *(activation(), conv(4, 3, padding="same"), L.AveragePooling2D(2), activation()),
        *(conv(5, 1), L.GlobalAveragePooling2D(), activation(), dense(2)),
    ),
    "sequence": lambda: sequential(
        (9, 3),
        activation(),
        klb.LearnedBitConv1D(4, 3, padding="causal", kernel_quantizer=QUANTIZER, bits=3),
        *(L.ZeroPadding1D((1, 2)), activation()),
        klb.LearnedBitSeparableConv1D(4, 3, kernel_quantizer=QUANTIZER, bits=3),
        *(L.MaxPooling1D(3, 2, padding="same"), L.Permute((2, 1)), L.Reshape((5, 4))),
        *(activation(), dense(3), L.AveragePooling1D(4)),
    ),
    "overlapping": lambda: sequential(
        (7, 7, 3), activation(), conv(4, 3, strides=2, padding="same"),
        L.MaxPooling2D(3, 2, padding="same"),
    ),
    "merges": merges,
    "several inputs and outputs": dictionary_of_two,
    "nested and shared": nested_and_shared,
}  # fmt: skip


@pytest.mark.parametrize("net", [*NETS, *thorough(*MORE_NETS)])
def test_the_circuit_predicts_what_the_model_predicts(net, tmp_path):
    keras.utils.set_random_seed(1)
    model, x = fitted((NETS | MORE_NETS)[net]())
    check_equal(model, x, tmp_path / "project")


KERNEL_BITS, ACTIVATION_BITS = st.integers(1, 8), st.integers(2, 8)
BLOCKS = st.lists(
    st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["conv", "depthwise", "pointwise"]),
            "bits": KERNEL_BITS,
            "input_bits": ACTIVATION_BITS,
            "padding": st.sampled_from(["same", "valid"]),
            "relu": st.booleans(),
            "sum_bits": st.none() | ACTIVATION_BITS,
            "pooling": st.sampled_from([None, L.MaxPooling2D, L.AveragePooling2D]),
        }
    ),
    min_size=1,
    max_size=3,
)


def random_net(blocks, bits, input_bits):
    """Blocks with separate widths, some with a shortcut, and a dense layer."""
    inputs = x = keras.Input((6, 6, 2))
    for block in blocks:
        x = before = activation(block["input_bits"])(x)
        large = min(x.shape[1:3]) >= 3
        settings = {"bits": block["bits"], "padding": block["padding"]}
        if block["kind"] == "depthwise" and large:
            settings["kernel_quantizer"] = QUANTIZER
            x = klb.LearnedBitDepthwiseConv2D(3, **settings)(x)
        else:
            x = conv(3, 3 if block["kind"] == "conv" and large else 1, **settings)(x)
        x = L.ReLU()(x) if block["relu"] else x
        if x.shape == before.shape and block["sum_bits"]:
            x = L.Add()([activation(block["sum_bits"])(x), before])
        if block["pooling"] and min(x.shape[1:3]) >= 2:
            x = block["pooling"](2)(x)
    return klb.LearnedBitModel(inputs, dense(3, bits)(activation(input_bits)(L.Flatten()(x))))


@pytest.mark.parametrize("number", [0, *thorough(*range(1, 12))])
def test_random_graphs_are_equal(number, tmp_path):
    directories = (tmp_path / str(index) for index in itertools.count())

    @seed(number)
    @settings(max_examples=1, deadline=None, database=None)
    @given(BLOCKS, KERNEL_BITS, ACTIVATION_BITS)
    def equal(blocks, bits, input_bits):
        check_equal(*fitted(random_net(blocks, bits, input_bits)), next(directories))

    equal()


def test_a_quantized_model_becomes_an_equal_circuit(tmp_path):
    """The path of a user: a trained Keras model with batch norm, `quantize`, `export_hls4ml`."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((12,)), L.Dense(16), L.BatchNormalization(), L.ReLU(), L.Dense(4)]
    )
    x = RNG.normal(size=(256, 12)).astype("float32")
    model.compile("adam", "mse")
    model.fit(x, x[:, :4], epochs=2, verbose=0)
    small = klb.quantize(
        model, x, target_bits=3, activations={"bits": 6}, power_of_two=True, steps=20, verbose=0
    )
    check_equal(small, x, tmp_path / "project")
    assert os.path.exists(tmp_path / "project" / "firmware" / "learned_bits.cpp")
    assert [path.name for path in tmp_path.iterdir()] == ["project"]


def test_steps_of_numbers():
    assert step_of(np.array([0.75, -2.0, 0.0])) == 0.25
    assert step_of(np.array([3.0 * 2**-40, 2.0**20])) == 2.0**-40
    assert step_of(np.zeros(2)) == np.inf


def test_levels_bound_what_the_layers_compute():
    """Each output is a multiple of its step and within its bound, for the inputs that reach it."""
    inputs = keras.Input((5, 5, 2))
    layers = [activation(3), conv(3, 3, bits=2), L.ReLU(), L.AveragePooling2D(2), L.Flatten()]
    model, x = fitted(klb.LearnedBitModel(*chain(inputs, layers)))
    known = {id(inputs): None}
    for call in calls(model):
        levels = output_levels(call, [known[id(each)] for each in call.inputs])
        known[id(call.outputs[0])] = levels
        values = keras.Model(inputs, call.outputs[0])(10 * x).numpy().astype("float64")
        assert np.all(values / levels.step == np.round(values / levels.step))
        assert np.all(np.abs(values) <= levels.largest)
        assert np.max(np.abs(values)) > 0.1 * np.max(levels.largest)


def free_scales():
    return klb.to_learned_bits(plain(), activations=True)


def plain(*layers, shape=(6,)):
    return keras.Sequential([keras.Input(shape), *(layers or [L.Dense(4), L.Dense(2)])])


def powers(*layers, shape=(6,), **arguments):
    arguments = {"activations": True} | arguments
    return klb.to_learned_bits(plain(*layers, shape=shape), power_of_two=True, **arguments)


def merged(layer):
    """Three dense layers of one input, merged."""
    inputs = keras.Input((6,))
    x = activation()(inputs)
    return klb.LearnedBitModel(inputs, layer([activation()(dense(3)(x)) for _ in range(3)]))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (free_scales, "its step is not a power of two: convert the model with"),
        (lambda: powers(activations=False), "'dense.*its input is not quantized"),
        (
            lambda: powers(bits=16),
            r"sums can have .* bits, and float32 is exact up to 24: use fewer",
        ),
        (lambda: powers(L.Dense(4, "softmax"), L.Dense(2)), "activation 'softmax' is not exact"),
        (lambda: powers(L.Dense(4), L.Softmax()), "a Softmax cannot be computed exactly"),
        (lambda: powers(L.LSTM(3), L.Dense(2), shape=(4, 3)), "LearnedBitWrapper cannot be comp"),
        (lambda: powers(L.Dense(4, "relu"), L.BatchNormalization(), L.Dense(2)), "fold_batch_norm"),
        (
            lambda: powers(L.Dense(4), L.Dense(2, name="left"), exclude="left"),
            "its kernel is float: convert it",
        ),
        (lambda: powers(L.Conv2D(4, 3, dilation_rate=2), shape=(9, 9, 3)), "no dilated convol"),
        (lambda: powers(L.Conv2D(4, 3, groups=2), shape=(9, 9, 4)), "no grouped convolutions"),
        (lambda: powers(L.DepthwiseConv2D(3, depth_multiplier=2), shape=(9, 9, 4)), "multiplier"),
        (lambda: powers(L.Conv2D(2, 1), L.AveragePooling2D(3), shape=(9, 9, 4)), "of 9 values"),
        (
            lambda: powers(L.Conv2D(2, 1), L.AveragePooling2D(2, padding="same"), shape=(9, 9, 4)),
            "use padding='valid'",
        ),
        (lambda: powers(L.Dense(4), L.ReLU(max_value=6), L.Dense(2)), "without slope, threshold"),
        (lambda: powers(L.Dense(4), shape=(None, 6)), "inputs of fixed sizes"),
        (lambda: powers(L.Rescaling(2.0), L.Dense(4)), "apply it to the data, before the model"),
        (lambda: merged(L.Add()), "merge them in pairs"),
        (lambda: merged(L.Average()), "merge them in pairs"),
    ],
)
def test_what_cannot_be_exact_is_refused_with_the_layer_and_the_way_out(model, message, tmp_path):
    model = model()
    shape = [size or 3 for size in model.input_shape[1:]]
    model(RNG.normal(size=(64, *shape)).astype("float32"), training=True)
    with pytest.raises(ValueError, match=message):
        klb.export_hls4ml(model, tmp_path / "project")
    assert not list(tmp_path.iterdir())


def test_an_activation_without_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'dense_input'; it has no range yet, or its input was z"):
        klb.export_hls4ml(powers(), tmp_path / "project")


def test_without_a_compiler_the_error_says_so(tmp_path, monkeypatch):
    model, _ = fitted(sequential((4,), activation(), dense(2)))
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"needs the compiler g\+\+.*`check=False`"):
        klb.export_hls4ml(model, tmp_path / "project")
    klb.export_hls4ml(model, tmp_path / "project", check=False)
    assert (tmp_path / "project" / "firmware").is_dir()


def test_a_circuit_that_predicts_something_else_replaces_nothing(tmp_path, monkeypatch):
    from hls4ml.model import ModelGraph

    model, _ = fitted(sequential((4,), activation(), dense(2)))
    klb.export_hls4ml(model, tmp_path / "project", check=False)
    (tmp_path / "project" / "mine.txt").write_text("kept")
    right = ModelGraph.predict
    monkeypatch.setattr(ModelGraph, "predict", lambda graph, x: right(graph, x) + 2.0**-20)
    with pytest.raises(ValueError, match=r"must predict exactly.*off by up to 9.5e-07 in 128 of"):
        klb.export_hls4ml(model, tmp_path / "project")
    assert [path.name for path in tmp_path.iterdir()] == ["project"]
    assert (tmp_path / "project" / "mine.txt").read_text() == "kept"


def test_only_a_project_of_hls4ml_is_replaced(tmp_path):
    model, _ = fitted(sequential((4,), activation(), dense(2)))
    (tmp_path / "thesis.tex").write_text("kept")
    with pytest.raises(FileExistsError, match="or an earlier project.* with thesis.tex"):
        klb.export_hls4ml(model, tmp_path, check=False)
    with pytest.raises(FileExistsError, match="thesis.tex"):
        klb.export_hls4ml(model, tmp_path / "thesis.tex", check=False)
    assert (tmp_path / "thesis.tex").read_text() == "kept"
    for name in ("first", "second"):
        klb.export_hls4ml(model, tmp_path / "project", check=False, project_name=name)
    assert (tmp_path / "project" / "firmware" / "second.cpp").exists()
    assert not (tmp_path / "project" / "firmware" / "first.cpp").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["project", "thesis.tex"]


# hls4ml leaves the file open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_hls4ml_finds_a_project_again(tmp_path):
    import hls4ml

    model, x = fitted(sequential((4,), activation(), dense(2)))
    klb.export_hls4ml(model, tmp_path / "project")
    graph = hls4ml.converters.link_existing_project(str(tmp_path / "project"))
    graph.compile()
    np.testing.assert_array_equal(graph.predict(x), model.predict(x, verbose=0))


def test_a_model_in_mixed_precision_becomes_the_circuit_of_its_float32_copy(tmp_path):
    model, x = fitted(sequential((4,), activation(), dense(3)))
    expected = model.predict(x, verbose=0)
    for layer in model.layers:
        layer.dtype_policy = keras.DTypePolicy("mixed_bfloat16")
    graph = klb.export_hls4ml(model, tmp_path / "project")
    np.testing.assert_array_equal(graph.predict(x), expected)

"""A file is run before it is kept: refused files, accepted files, and the inputs that are tried."""

import functools

import keras
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf
from export_models import dense_model, image_model, normalized_model, text_model
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.export import _check, litert
from keras_learnbits.export._check import DRAWS, check_file, difference, examples
from keras_learnbits.export._filters import exact_integers
from keras_learnbits.export._function import ModelFunction
from keras_learnbits.layers.quantized_tensors import QuantizedKernel

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:qonnx")
L = keras.layers
EXPORTERS = [klb.export_onnx, klb.export_litert, klb.export_qonnx]
every_exporter = pytest.mark.parametrize("export", EXPORTERS)


@pytest.fixture
def changed_code(monkeypatch):
    """Kernels are stored with one code one level higher or lower.

    LiteRT's exporter finds the kernel of a filter by its codes, so there the integers are changed.
    """
    stored = QuantizedKernel.stored

    def changed(kernel, name):
        right = stored(kernel, name)
        codes = right.codes.copy()
        codes.flat[0] += 1 if codes.flat[0] == 0 else -1
        return right._replace(codes=codes)

    def changed_integers(*arguments):
        right = exact_integers(*arguments)
        integers = right.integers.copy()
        integers.flat[0] += 2 if integers.flat[0] < 0 else -2
        return right._replace(integers=integers)

    def change(export):
        if export is klb.export_litert:
            monkeypatch.setattr(litert, "exact_integers", changed_integers)
        else:
            monkeypatch.setattr(QuantizedKernel, "stored", changed)

    return change


@every_exporter
@pytest.mark.parametrize("make", [functools.partial(dense_model, bits=7), *thorough(image_model)])
def test_a_file_that_predicts_something_else_is_refused_and_an_old_one_stays(
    export, make, tmp_path, changed_code
):
    path = tmp_path / "model"
    path.write_bytes(b"old")
    model = make()
    changed_code(export)
    with pytest.raises(ValueError, match=r"must predict what its model.*check=Fal.* off by up to "):
        export(model, path)
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["model"]
    export(model, path, check=False)
    assert path.read_bytes() != b"old"


@every_exporter
def test_a_file_that_is_wrong_is_not_there_where_none_was(export, tmp_path, changed_code):
    changed_code(export)
    with pytest.raises(ValueError, match="Received: model="):
        export(dense_model(bits=2), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_size_that_tf2onnx_has_fixed_is_noticed(tmp_path):
    inputs = keras.Input((None, 5))
    model = klb.to_learned_bits(keras.Model(inputs, L.TimeDistributed(L.Dense(3))(inputs)))
    said = r"of shape \(.*\), not \(3, \d+, 3\), for inputs of shapes"
    with pytest.raises(ValueError, match=said):
        klb.export_onnx(model, tmp_path / "model.onnx")
    signature = tf.TensorSpec((4, 9, 5))
    klb.export_onnx(model, tmp_path / "model.onnx", input_signature=signature)
    x = np.random.default_rng(0).normal(size=(4, 9, 5)).astype("float32")
    (found,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"input": x})
    np.testing.assert_allclose(found, model(x), rtol=1e-5, atol=1e-6)


@keras.saving.register_keras_serializable("test_export_checks")
class OnlyEleven(L.Layer):
    """A model whose inputs must have a length of 11, which its graph does not state."""

    def call(self, x):
        return keras.ops.reshape(x, (-1, 11))


@every_exporter
def test_without_inputs_that_the_model_accepts_a_warning_says_that_nothing_was_checked(
    export, tmp_path
):
    inputs = keras.Input((None,))
    x = OnlyEleven()(L.Rescaling(2.0)(inputs))
    model = klb.LearnedBitModel(inputs, klb.LearnedBitDense(3)(x), name="eleven")
    with pytest.warns(UserWarning, match="'eleven' was not compared with it.*input_signature"):
        export(model, tmp_path / "model")
    assert (tmp_path / "model").exists()
    export(model, tmp_path / "model", input_signature=tf.TensorSpec((None, 11)))


def test_a_check_begins_with_states_of_zero_and_does_not_change_them(tmp_path):
    cell = L.LSTM(3, stateful=True, unroll=True)
    inputs = keras.Input(batch_shape=(2, 4, 5))
    x = L.Dropout(0.5)(klb.LearnedBitWrapper(cell, bits=3)(inputs))
    model = klb.LearnedBitModel(inputs, klb.LearnedBitDense(2)(x))
    model(np.ones((2, 4, 5), "float32"))
    variables = [*model.variables, *cell.states]
    before = [variable.numpy() for variable in variables]
    state = np.random.get_state()[1]
    klb.export_onnx(model, tmp_path / "model.onnx")
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_predictions_that_are_no_numbers_must_be_the_same(tmp_path):
    inputs = keras.Input((6,))
    x = keras.ops.log(klb.LearnedBitDense(5)(inputs))
    model = klb.LearnedBitModel(inputs, x)
    tried = examples(model, [tf.TensorSpec((None, 6))], lambda inputs: [model(inputs[0]).numpy()])
    assert any(np.isnan(outputs[0]).any() for _, outputs in tried)
    for export in EXPORTERS:
        export(model, tmp_path / "model")


def fake(model, off=lambda call: 0.0):
    """Arguments of `check_file`: a function whose file is off by a share of its largest output."""
    function = ModelFunction(model)
    calls = []

    def run(inputs):
        calls.append([each.shape for each in inputs])
        outputs = function.predictions(inputs)
        return [each + off(len(calls)) * np.abs(each).max() for each in outputs]

    return function, (lambda path: run), calls


@pytest.mark.parametrize("make", [functools.partial(dense_model, bits=4), text_model])
def test_rounding_is_tolerated_and_more_is_not(make):
    model = make()
    function, load, _ = fake(model, lambda call: 2.0**-19)
    check_file("file", function, load)
    function, load, _ = fake(model, lambda call: 2.0**-10)
    with pytest.raises(ValueError, match=r"off by up to 0.00.*, where .* is tolerated"):
        check_file("file", function, load)


def test_a_value_that_is_rounded_to_another_level_does_not_make_a_file_wrong():
    function, load, calls = fake(normalized_model(), lambda call: 0.1 * (call == 1))
    check_file("file", function, load)
    assert len(calls) == 4  # two examples, drawn twice
    function, load, calls = fake(normalized_model(), lambda call: 0.1 * (call % 2))
    with pytest.raises(ValueError, match="off by"):
        check_file("file", function, load)
    assert len(calls) == 2 * DRAWS


def test_two_batch_sizes_and_two_sizes_of_what_is_open_are_tried():
    _, _, calls = tried = fake(dense_model(bits=2))
    check_file("file", *tried[:2])
    assert calls == [[(3, 12)], [(1, 12)]]
    inputs = keras.Input((None, None, 3))
    model = klb.LearnedBitModel(inputs, klb.LearnedBitConv2D(2, 3, padding="same")(inputs))
    _, _, calls = tried = fake(model)
    check_file("file", *tried[:2])
    assert calls == [[(3, 5, 5, 3)], [(1, 8, 8, 3)]]


def test_a_runtime_that_fails_is_quoted():
    function, _, _ = fake(dense_model(bits=2))

    def load(path):
        raise RuntimeError("no kernel for DEQUANTIZE")

    with pytest.raises(ValueError, match=r"fails on inputs of shapes .*: no kernel for DEQUANTIZE"):
        check_file("file", function, load)


def drawn(model, specs):
    """The inputs that are tried for a model."""

    def predict(inputs):
        structure = inputs[0] if len(inputs) == 1 else inputs
        return [each.numpy() for each in keras.tree.flatten([model(structure)])]

    return [inputs for inputs, _ in examples(model, specs, predict)]


def test_sizes_are_tried_until_the_model_accepts_them():
    x = inputs = keras.Input((None, None, 3))
    down = L.MaxPooling2D(4)(L.Conv2D(2, 3, padding="same")(x))
    model = keras.Model(inputs, L.Concatenate()([L.UpSampling2D(4)(down), x]))
    tried = drawn(model, [tf.TensorSpec((None, None, None, 3))])
    assert [each.shape for (each,) in tried] == [(3, 8, 8, 3), (1, 16, 16, 3)]
    model = keras.Model(inputs, L.Conv2D(2, 11, strides=5)(inputs))
    tried = drawn(model, [tf.TensorSpec((2, None, None, 3))])
    assert [each.shape for (each,) in tried] == [(2, 16, 16, 3), (2, 32, 32, 3)]


def test_integers_are_indices_of_the_smallest_embedding():
    a, b = keras.Input((40,), dtype="int32"), keras.Input((40,), dtype="int64")
    model = keras.Model([a, b], [L.Embedding(7, 2)(a), L.Embedding(50, 2)(b)])
    specs = [tf.TensorSpec((None, 40), "int32"), tf.TensorSpec((None, 40), "int64")]
    tried = drawn(model, specs)
    assert len(tried) == 2
    for inputs in tried:
        assert [each.dtype for each in inputs] == ["int32", "int64"]
        assert all(each.min() == 0 and each.max() == 6 for each in inputs)


def test_floats_are_tried_as_indices_and_booleans_are_drawn():
    inputs = keras.Input((60,))
    model = keras.Model(inputs, L.Embedding(4, 2)(inputs))
    assert {*np.unique(drawn(model, [tf.TensorSpec((None, 60))])[0][0])} == {0.0, 1.0, 2.0, 3.0}
    inputs = keras.Input((30,), dtype="bool")
    model = keras.Model(inputs, keras.ops.logical_not(inputs))
    ((first,), _) = drawn(model, [tf.TensorSpec((None, 30), "bool")])
    assert first.dtype == bool
    assert len(np.unique(first)) == 2


@pytest.mark.parametrize(
    "spec",
    [tf.TensorSpec((None,), "string"), tf.TensorSpec(None), tf.TensorSpec((2,), "complex64")],
)
def test_what_cannot_be_drawn_gives_no_examples(spec):
    assert examples(keras.Sequential(), [spec], lambda inputs: inputs) == []


def test_a_file_that_fails_on_sizes_that_are_too_small_is_right_if_it_does_on_no_others():
    inputs = keras.Input((None, 3))
    model = klb.LearnedBitModel(inputs, klb.LearnedBitDense(2)(inputs))
    function = ModelFunction(model)
    lengths = []

    def run(arrays):
        lengths.append(arrays[0].shape[1])
        if lengths[-1] < 20:
            raise RuntimeError("kernel size can't be greater than actual input size")
        return function.predictions(arrays)

    check_file("file", function, lambda path: run)
    assert lengths == [5, 16, 64, 96]


def test_models_without_open_dimensions_are_tried_once():
    model = keras.Sequential([keras.Input(batch_shape=(2, 3)), L.Dense(1)])
    assert [each.shape for (each,) in drawn(model, [tf.TensorSpec((2, 3))])] == [(2, 3)]


def test_a_difference_is_described_in_words():
    one = np.array([1.0, np.nan, np.inf])
    assert difference(one, one, 0.0) is None
    assert difference(one[:, None], one, 9.0) == "of shape (3, 1), not (3,)"
    assert difference(np.array([1.5, np.nan, np.inf]), one, 0.25).startswith("off by up to 0.5")
    assert difference(np.array([1.0, 0.0, np.inf]), one, 9.0).startswith("off by up to inf")
    assert difference(np.array([1.0, np.nan, -np.inf]), one, 9.0).startswith("off by up to inf")
    assert difference(np.array([3]), np.array([2]), 0.5).startswith("off by up to 1")
    assert _check.largest(one) == 1.0


@pytest.mark.parametrize(
    "first", [L.Rescaling(1 / 255), L.Normalization(mean=120.0, variance=60.0**2), L.Identity()]
)
def test_a_file_that_ignores_its_images_is_refused_whatever_their_range(first):
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(8, 3, activation="relu", bias_initializer="random_normal")(first(inputs))
    model = keras.Model(inputs, L.Dense(4)(L.GlobalAveragePooling2D()(x)))
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3)).astype("float32")
    quantized = klb.quantize(model, images, target_bits=4, activations=True, steps=0, verbose=0)
    function = ModelFunction(quantized)

    def load(path):
        return lambda inputs: function.predictions([0 * each for each in inputs])

    with pytest.raises(ValueError, match="must predict what its model predicts"):
        check_file("path", function, load, arithmetic=_check.INT8_ARITHMETIC)
    check_file("path", function, lambda path: function.predictions, _check.INT8_ARITHMETIC)

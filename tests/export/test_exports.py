"""Behaviour that all writers of files share: packages, files, names and refusals."""

import contextlib
import json
import os
import re

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from export_models import dense_model, image_model, normalized_model
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.export._files import write_atomically

L = keras.layers
EXPORTERS = {
    klb.export_litert: "ai_edge_litert",
    klb.export_onnx: "'onnx'",
    klb.export_qonnx: "'onnx'",
}
WRITERS = [klb.save_packed, *EXPORTERS]
every_writer = pytest.mark.parametrize("write", WRITERS)


@pytest.mark.parametrize(("export", "package"), EXPORTERS.items())
def test_a_missing_package_is_named_with_the_extra_that_installs_it(
    export, package, tmp_path, monkeypatch
):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ImportError, match=rf"pip install keras_learnbits\[export\].*{package}"):
        export(dense_model(bits=2), tmp_path / "model")


@every_writer
def test_a_failed_export_leaves_the_old_file(write, tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.write_bytes(b"old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(dense_model(bits=2), path)
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


@every_writer
def test_a_link_stays_and_the_file_that_it_points_to_keeps_its_mode(write, tmp_path):
    (tmp_path / "data").mkdir()
    real, link = tmp_path / "data" / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o600)
    link.symlink_to(os.path.join("data", "real"))
    write(dense_model(bits=2), link)
    assert os.readlink(link) == os.path.join("data", "real")
    assert real.stat().st_mode & 0o777 == 0o600
    assert len(real.read_bytes()) > 100
    assert sorted(each.name for each in tmp_path.iterdir()) == ["data", "link"]
    assert [each.name for each in real.parent.iterdir()] == ["real"]


def test_links_are_followed_to_their_end_and_may_point_to_nothing_yet(tmp_path):
    for name, target in (("first", "second"), ("second", "real")):
        (tmp_path / name).symlink_to(target)
    write_atomically(tmp_path / "first", b"new")
    assert (tmp_path / "real").read_bytes() == b"new"
    assert (tmp_path / "first").is_symlink()
    assert (tmp_path / "second").is_symlink()


@contextlib.contextmanager
def umask(mask):
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_that_the_umask_says_and_an_old_one_keeps_its_own(
    mask, mode, tmp_path
):
    with umask(mask):
        write_atomically(tmp_path / "new", b"")
        (tmp_path / "old").write_bytes(b"")
        (tmp_path / "old").chmod(0o666)
        write_atomically(tmp_path / "old", b"")
    assert (tmp_path / "new").stat().st_mode & 0o777 == mode
    assert (tmp_path / "old").stat().st_mode & 0o777 == 0o666


def test_a_file_that_only_its_owner_reads_is_never_readable_by_others(tmp_path):
    (tmp_path / "old").write_bytes(b"")
    (tmp_path / "old").chmod(0o400)
    modes = []
    write_atomically(tmp_path / "old", b"", lambda path: modes.append(os.stat(path).st_mode))
    assert [mode & 0o777 for mode in modes] == [0o400]


def test_what_a_check_refuses_leaves_nothing(tmp_path):
    (tmp_path / "old").write_bytes(b"old")

    def check(path):
        with open(path, "rb") as file:
            assert file.read() == b"new"
        raise ValueError("no")

    for name in ("old", "none"):
        with pytest.raises(ValueError, match="no"):
            write_atomically(tmp_path / name, b"new", check)
    assert [each.name for each in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"


def weight_of(model, name):
    return next(variable for variable in model.weights if variable.path.endswith(name))


FAULTY = {
    "a kernel": (dense_model, "hidden/kernel", np.nan),
    "an infinite kernel": (dense_model, "head/kernel", np.inf),
    "a bias": (dense_model, "head/bias", -np.inf),
    "a scale": (dense_model, "hidden/log_scale", np.nan),
    "a statistic": (lambda bits: image_model(), "batch_normalization/moving_variance", np.nan),
}


@every_writer
@pytest.mark.parametrize(
    "which", ["a kernel", "a bias", *thorough("an infinite kernel", "a scale", "a statistic")]
)
def test_a_weight_that_is_not_finite_is_named_and_no_file_is_written(write, which, tmp_path):
    make, name, value = FAULTY[which]
    model = make(bits=3)
    variable = weight_of(model, name)
    array = variable.numpy()
    array.flat[-1] = value
    variable.assign(array)
    with pytest.raises(ValueError, match=f"must be finite.*with 1 of {array.size} .* '{name}'"):
        write(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_finite_kernel_with_a_scale_that_makes_it_infinite_is_refused(tmp_path):
    model = dense_model(bits=3)
    weight_of(model, "hidden/log_scale").assign(np.full((1, 16), 200.0))
    for write in WRITERS:
        with pytest.raises(ValueError, match="must be finite.*'hidden/kernel'"):
            write(model, tmp_path / "model")


def metadata_of(path, write):
    if write is klb.export_litert:
        flat = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
        entries = {each.name.decode(): flat.buffers[each.buffer].data for each in flat.metadata}
        return json.loads(bytes(entries["keras_learnbits"]))
    (entry,) = onnx.load(path).metadata_props
    assert entry.key == "keras_learnbits"
    return json.loads(entry.value)


@pytest.mark.parametrize("export", EXPORTERS)
def test_the_metadata_have_the_version_and_the_bits_of_the_table(export, tmp_path):
    for model in (dense_model(bits=5), normalized_model()):
        export(model, tmp_path / "model")
        metadata, table = metadata_of(tmp_path / "model", export), klb.bit_table(model)
        assert metadata["library"] == "keras_learnbits"
        assert metadata["version"] == klb.__version__
        assert metadata["bits"] == {row.layer: row.bits for row in table.rows}
        activations = {row.layer: row.bits for row in table.activations}
        assert metadata.get("activation_bits", {}) == activations


@keras.saving.register_keras_serializable("test_exports")
class Own(keras.Model):
    """A model with a custom `call`, built when it is called."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense, self.other = L.Dense(3), L.Dense(3)

    def call(self, x):
        if isinstance(x, dict):
            return {"sum": self.dense(x["a"]) + self.other(x["b"])}
        if isinstance(x, list | tuple):
            return self.dense(x[0]) + self.other(x[1])
        return self.other(self.dense(x))


def ones(*shape):
    return np.ones(shape, "float32")


ARGUMENTS = {
    "a tensor": ones(2, 4),
    "a dictionary": {"a": ones(2, 4), "b": ones(2, 5)},
    "a list": [ones(2, 4), ones(2, 5)],
    "a sequence": ones(2, 7, 4),
}


@pytest.mark.parametrize("given", ["a dictionary", *thorough("a tensor", "a list", "a sequence")])
def test_a_model_with_a_custom_call_is_exported_for_the_shapes_that_it_was_called_with(
    given, tmp_path
):
    own = Own()
    own(ARGUMENTS[given])
    model = klb.to_learned_bits(own, bits=3)
    rng = np.random.default_rng(0)
    x = keras.tree.map_structure(
        lambda one: rng.normal(size=(5, *one.shape[1:])).astype("float32"), ARGUMENTS[given]
    )
    (expected,) = keras.tree.flatten(model(x))
    klb.export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = {"a dictionary": ["a", "b"], "a list": ["input_0", "input_1"]}.get(given, ["input"])
    assert [each.name for each in session.get_inputs()] == names
    feed = dict(zip(names, keras.tree.flatten(x), strict=True))
    np.testing.assert_allclose(session.run(None, feed)[0], expected, rtol=1e-4, atol=1e-5)
    klb.export_litert(model, tmp_path / "model.tflite")
    predict = Interpreter(str(tmp_path / "model.tflite")).get_signature_runner()
    assert predict(**feed).keys() == {"sum" if given == "a dictionary" else "output"}
    np.testing.assert_allclose(*predict(**feed).values(), expected, rtol=1e-4, atol=1e-5)


@keras.saving.register_keras_serializable("test_exports")
class Silent(Own):
    """A model that does not report the shapes for which it was built."""

    def get_build_config(self):
        return {"shape": 4}

    def build_from_config(self, config):
        self(ones(1, config["shape"]))


@pytest.mark.filterwarnings("ignore:Model 'silent' had a build config:UserWarning")
@pytest.mark.parametrize("export", EXPORTERS)
def test_a_model_that_does_not_say_what_it_is_called_with_needs_a_signature(export, tmp_path):
    own = Silent()
    own(ones(2, 4))
    model = klb.to_learned_bits(own, bits=3)
    with pytest.raises(ValueError, match="needs an `input_signature`.*Received: model='silent'"):
        export(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    export(model, tmp_path / "model", input_signature=tf.TensorSpec((None, 4), name="x"))


def test_the_docstrings_of_the_exporters_name_their_check():
    for export in EXPORTERS:
        # Python 3.13 removes the indentation of docstrings.
        assert re.search(r"\n +check: Whether to run the file", export.__doc__)

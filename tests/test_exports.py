import pytest
from export_models import dense_model

import keras_learnbits as klb

EXPORTERS = {
    klb.export_litert: "ai_edge_litert",
    klb.export_onnx: "'onnx'",
    klb.export_qonnx: "'onnx'",
}


@pytest.mark.parametrize(("export", "package"), EXPORTERS.items())
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    export, package, tmp_path, monkeypatch
):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ImportError, match=rf"pip install keras_learnbits\[export\].*{package}"):
        export(dense_model(bits=2), tmp_path / "model")


@pytest.mark.parametrize("export", EXPORTERS)
def test_a_failed_export_leaves_the_old_file(export, tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.write_bytes(b"old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        export(dense_model(bits=2), path)
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["model"]

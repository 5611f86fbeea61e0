"""The packed file: its documented format, writing and reading."""

import json
import math
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import zlib

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_learnbits as klb
from keras_learnbits.export import _files
from keras_learnbits.export.packed import load_packed, reader, save_packed
from keras_learnbits.export.packed.__main__ import main
from keras_learnbits.layers.discovery import quantized_kernels

ROOT = pathlib.Path(__file__).parents[3]


def make_model():
    """Per-channel, affine and separable kernels, floats and an integer."""
    inputs = keras.Input((6, 6, 2))
    x = klb.LearnedBitConv2D(4, 3, bits=3, name="conv")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = klb.LearnedBitSeparableConv2D(3, 2, bits=11, max_bits=16, name="separable")(x)
    x = keras.layers.Normalization(name="count")(keras.layers.Flatten()(x))
    dense = klb.LearnedBitDense(5, bits=6, kernel_quantizer="min_max", name="dense")
    return klb.LearnedBitModel(inputs, dense(x))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A model and the bytes of its file."""
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    model = make_model()
    save_packed(model, path, include_config=True)
    return model, path.read_bytes()


@pytest.fixture
def path(packed, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed[1])
    return path


def decoded_by_the_page(content):
    """The weights by name; a decoder written from docs/packed_format.md alone."""
    (n,) = struct.unpack_from("<Q", content)
    container, data = json.loads(content[8 : 8 + n]), content[8 + n :]
    assert container.pop("__metadata__") == {"keras_learnbits.packed": "1"}
    tensors = {name: data[slice(*each["data_offsets"])] for name, each in container.items()}
    header = json.loads(zlib.decompress(tensors.pop("header")))
    assert header["crc32"] == zlib.crc32(b"".join(tensors[name] for name in sorted(tensors)))
    types = {"U8": "u1", "I64": "<i8", "F32": "<f4", "BF16": "<u2"}
    left = {name: np.frombuffer(tensors[name], types[container[name]["dtype"]]) for name in tensors}

    def take(name, count):
        taken, left[name] = left[name][:count], left[name][count:]
        return taken

    weights = {}
    for weight in header["weights"]:
        shape = weight["shape"]
        size = int(np.prod(shape))
        if "dtype" in weight:
            values = take(weight["dtype"], size)
            if weight["dtype"] == "bfloat16":
                values = np.frombuffer(b"".join(b"\0\0" + v.tobytes() for v in values), "<f4")
            weights[weight["name"]] = values.reshape(shape)
            continue
        width = weight["bits"]
        stream = take("codes", math.ceil(size * width / 8))
        string = "".join(f"{byte:08b}"[::-1] for byte in stream)
        codes = [int(string[i * width : (i + 1) * width][::-1], 2) for i in range(size)]
        assert set(string[size * width :]) <= {"0"}
        scale_shape = [n if axis in weight["axes"] else 1 for axis, n in enumerate(shape)]
        step = take("scales", int(np.prod(scale_shape))).reshape(scale_shape)
        if weight["grid"] == "affine":
            offset = take("scales", step.size).reshape(scale_shape)
        else:
            offset = np.float32(-(2**width - 1) / 2)
        weights[weight["name"]] = step * (np.reshape(codes, shape).astype("float32") + offset)
    assert not any(rest.size for rest in left.values())
    return weights


@pytest.mark.parametrize("float_dtype", ["float32", "bfloat16"])
def test_a_decoder_written_from_the_page_reads_the_models_weights(packed, path, float_dtype):
    model, _ = packed
    save_packed(model, path, float_dtype=float_dtype)
    weights = decoded_by_the_page(path.read_bytes())
    assert weights.keys() == load_packed(path).keys()
    for name, array in load_packed(path).items():
        assert array.dtype == weights[name].dtype
        np.testing.assert_array_equal(array, weights[name])
    for kernel in quantized_kernels(model):
        np.testing.assert_array_equal(weights[kernel.kernel.path], kernel.quantized())


def test_the_page_names_every_tensor_and_the_version():
    page = (ROOT / "docs" / "packed_format.md").read_text()
    assert f'"{reader.FORMAT}": "{reader.VERSION}"' in page
    for name, (container_type, _) in reader.TENSORS.items():
        assert f"`{name}`" in page
        assert f"`{container_type}`" in page or name.startswith(("int", "uint"))


@pytest.mark.parametrize("bits", range(1, 17))
@given(data=st.data())
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
def test_packed_codes_are_the_bits_in_a_row(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=40))
    packed = reader.pack_codes(np.array(codes), bits)
    # Oracle: one long integer.
    whole = sum(code << (index * bits) for index, code in enumerate(codes))
    assert packed.tobytes() == whole.to_bytes(-(-len(codes) * bits // 8), "little")
    assert reader.unpack_codes(packed, bits, len(codes)).tolist() == codes


WITHOUT_TENSORFLOW = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "keras", "keras_learnbits", "ml_dtypes"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Refuse())

from reader import read_packed
import numpy as np

np.savez("arrays.npz", **{n.replace("/", "|"): a for n, a in read_packed(sys.argv[1]).arrays().items()})
"""  # noqa: E501


def test_the_reader_alone_reads_where_there_is_no_tensorflow(path, tmp_path):
    shutil.copy(reader.__file__, tmp_path / "reader.py")
    program = tmp_path / "program.py"
    program.write_text(WITHOUT_TENSORFLOW)
    subprocess.run([sys.executable, program, path], cwd=tmp_path, check=True)
    with np.load(tmp_path / "arrays.npz") as found:
        expected = load_packed(path)
        assert {name.replace("|", "/") for name in found} == expected.keys()
        for name in found:
            np.testing.assert_array_equal(found[name], expected[name.replace("|", "/")])


@pytest.mark.parametrize("call", [load_packed, lambda path: save_packed(make_model(), path)])
def test_without_safetensors_an_error_says_what_to_install(call, path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="need the library safetensors: `pip install safetenso"):
        call(path)


def test_other_readers_of_safetensors_see_the_tensors(path):
    tensors = reader.safetensors()[1].load_file(path)
    assert tensors.keys() == {"header", "codes", "scales", "float32", "int64"}


KILLED = """
import os, runpy, signal, sys

os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
runpy.run_path(sys.argv[1])["write_atomically"](sys.argv[2], b"half of a fi")
"""


def test_a_process_killed_in_mid_write_leaves_the_old_file(packed, path):
    process = subprocess.run([sys.executable, "-c", KILLED, _files.__file__, path])
    assert process.returncode == -signal.SIGKILL
    assert path.read_bytes() == packed[1]
    assert len(os.listdir(path.parent)) == 2  # the unfinished temporary file is still there


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(packed, path, step, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        save_packed(packed[0], path)
    assert path.read_bytes() == packed[1]
    assert os.listdir(path.parent) == [path.name]


def test_the_command_line_prints_the_bits(path, packed, capsys):
    main([str(path)])
    printed = capsys.readouterr().out
    table = klb.bit_table(packed[0])
    for row in table.rows:
        line = next(line for line in printed.splitlines() if line.startswith(row.layer))
        for cell in (f"{row.weights:,}", f" {row.bits} ", f"{row.code_bytes:,}"):
            assert cell in line
    assert f"{table.mean_bits:.2f}" in printed
    assert f"{len(packed[1]):,} bytes in the file" in printed


RUN_AS_A_COMMAND = """
import runpy, sys

runpy.run_module("keras_learnbits.export.packed", run_name="__main__")
heavy = {"tensorflow", "keras"} & sys.modules.keys()
assert not heavy, heavy

# Names that are requested later are available.
import keras_learnbits
from keras_learnbits import bit_table

assert {"save_packed", "__version__"} <= set(dir(keras_learnbits))
model = keras_learnbits.load_packed_model(sys.argv[1])
assert bit_table(model).rows
assert all(hasattr(keras_learnbits, name) for name in keras_learnbits.__all__)
assert not hasattr(keras_learnbits, "no_such_name")
"""


@pytest.mark.thorough
def test_the_command_needs_no_tensorflow_and_leaves_the_package_whole(path):
    command = [sys.executable, "-c", RUN_AS_A_COMMAND, path]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert "conv/kernel" in process.stdout


def test_the_command_line_runs_and_names_what_it_cannot_read(path):
    command = [sys.executable, "-W", "error", "-m", "keras_learnbits.export.packed"]
    process = subprocess.run([*command, path], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0
    assert "conv/kernel" in process.stdout
    path.write_bytes(b"no such thing")
    process = subprocess.run([*command, path], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    assert f"Cannot read packed file '{path}'" in process.stderr

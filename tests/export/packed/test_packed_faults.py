"""Faults of packed files: damaged and forged ones are refused."""

import contextlib
import json
import pathlib
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
from keras_learnbits.export.packed import PackedFileError, load_packed, reader, save_packed

ROOT = pathlib.Path(__file__).parents[3]


def make_model():
    inputs = keras.Input((6, 6, 2))
    x = klb.LearnedBitConv2D(4, 3, bits=3, name="conv")(inputs)
    x = keras.layers.Normalization()(keras.layers.Flatten()(x))
    dense = klb.LearnedBitDense(5, bits=6, kernel_quantizer="min_max", name="dense")
    return klb.LearnedBitModel(inputs, dense(x))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The bytes of a file."""
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    save_packed(make_model(), path, include_config=True)
    return path.read_bytes()


@pytest.fixture
def path(packed, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed)
    return path


def parts_of(content):
    """The container's JSON, and its tensors' bytes."""
    (n,) = struct.unpack_from("<Q", content)
    container, data = json.loads(content[8 : 8 + n]), content[8 + n :]
    tensors = {
        name: data[slice(*tensor["data_offsets"])]
        for name, tensor in container.items()
        if name != "__metadata__"
    }
    return container, tensors


def joined(container, data):
    text = json.dumps(container).encode()
    return struct.pack("<Q", len(text)) + text + data


def rewritten(content, **changes):
    """The file with other tensors: name to bytes, or None to leave one out."""
    container, tensors = parts_of(content)
    tensors = {name: part for name, part in {**tensors, **changes}.items() if part is not None}
    new, data = {"__metadata__": container["__metadata__"]}, b""
    for name, part in tensors.items():
        old = container.get(name, {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]})
        width = (old["data_offsets"][1] - old["data_offsets"][0]) // old["shape"][0]
        shape, offsets = [len(part) // width], [len(data), len(data) + len(part)]
        new[name] = {"dtype": old["dtype"], "shape": shape, "data_offsets": offsets}
        data += part
    return joined(new, data)


def with_header(content, edit):
    """The file with an edited header; container and checksum are right."""
    header = json.loads(zlib.decompress(parts_of(content)[1]["header"]))
    return rewritten(content, header=zlib.compress(json.dumps(edit(header) or header).encode()))


def set_weight(**values):
    return lambda content: with_header(content, lambda h: h["weights"][0].update(values))


def with_container(edit):
    def change(content):
        (n,) = struct.unpack_from("<Q", content)
        container = json.loads(content[8 : 8 + n])
        edit(container)
        return joined(container, content[8 + n :])

    return change


FAULTS = {
    "empty": (lambda c: b"", "a complete safetensors file"),
    "cut in the container": (lambda c: c[:100], "a complete safetensors file"),
    "cut in the data": (lambda c: c[:-1], "a complete safetensors file"),
    "longer": (lambda c: c + b"\0", "a complete safetensors file"),
    "huge container": (lambda c: struct.pack("<Q", 2**63) + c[8:], "a complete safetensors file"),
    "huge tensor": (
        with_container(lambda c: c["codes"].update(shape=[2**62], data_offsets=[0, 2**62])),
        "a complete safetensors file",
    ),
    "not ours": (with_container(lambda c: c.pop("__metadata__")), "its metadata must have the key"),
    "other version": (
        with_container(lambda c: c["__metadata__"].update({reader.FORMAT: "2"})),
        "its version must be '1'. Received: '2'",
    ),
    "other type": (
        with_container(lambda c: c["scales"].update(dtype="I32")),
        "must be of type F32",
    ),
    "other axes": (
        with_container(lambda c: c["scales"].update(shape=[1, *c["scales"]["shape"]])),
        "with one axis",
    ),
    "no header": (lambda c: rewritten(c, header=None), "must have a tensor 'header'"),
    "no codes": (lambda c: rewritten(c, codes=None), "as long as the weights in them"),
    "unknown tensor": (lambda c: rewritten(c, more=b"1"), "tensors must be among"),
    "empty tensor": (lambda c: rewritten(c, codes=b""), "not empty"),
    "short codes": (
        lambda c: rewritten(c, codes=parts_of(c)[1]["codes"][1:]),
        "as long as the weights in them",
    ),
    "no zlib": (lambda c: rewritten(c, header=b"{}"), "must be a zlib stream"),
    "half a zlib": (
        lambda c: rewritten(c, header=parts_of(c)[1]["header"][:-1]),
        "one whole zlib stream",
    ),
    "bomb": (lambda c: rewritten(c, header=zlib.compress(b" " * 2**25)), "at most 4194304 bytes"),
    "no JSON": (lambda c: rewritten(c, header=zlib.compress(b"{")), "must be JSON"),
    "deep JSON": (lambda c: rewritten(c, header=zlib.compress(b"[" * 10**5)), "must be JSON"),
    "no UTF-8": (lambda c: rewritten(c, header=zlib.compress(b'"\xff"')), "must be JSON"),
    "no object": (lambda c: with_header(c, lambda h: [1]), "must have library, crc32"),
    "missing key": (lambda c: with_header(c, lambda h: h.pop("crc32") and h), "must have library"),
    "other key": (lambda c: with_header(c, lambda h: {**h, "more": 1}), "must have library"),
    "library": (
        lambda c: with_header(c, lambda h: {**h, "library": 1}),
        "library must be a string",
    ),
    "config": (lambda c: with_header(c, lambda h: {**h, "config": []}), "config must be an object"),
    "weights": (lambda c: with_header(c, lambda h: {**h, "weights": {}}), "weights must be a list"),
    "same names": (set_weight(name="conv/bias"), "names of weights must differ"),
    "missing bits": (
        lambda c: with_header(c, lambda h: h["weights"][0].pop("bits") and h),
        "a weight must have the keys",
    ),
    "0 bits": (set_weight(bits=0), "bits must be an integer from 1 to 16. Received: 0"),
    "77 bits": (set_weight(bits=77), "Received: 77 in weight 'conv/kernel'"),
    "no integer bits": (set_weight(bits=3.0), "bits must be an integer"),
    "true bits": (set_weight(bits=True), "bits must be an integer"),
    "other bits": (set_weight(bits=4), "as long as the weights in them"),
    "huge shape": (set_weight(shape=[2**62, 2**62, 2, 4]), "as long as the weights in them"),
    "astronomic shape": (set_weight(shape=[10**4000] * 4), "axes, of lengths from 1"),
    "empty shape": (set_weight(shape=[0, 3, 2, 4]), "axes, of lengths from 1"),
    "negative shape": (set_weight(shape=[-3, -3, 2, 4]), "axes, of lengths from 1"),
    "many axes": (set_weight(shape=[1] * 33), "at most 32 axes"),
    "no shape": (set_weight(shape=None), "a shape must have"),
    "axes": (set_weight(axes=[4]), "axes must be rising axes of the shape"),
    "falling axes": (set_weight(axes=[3, 0]), "axes must be rising axes of the shape"),
    "grid": (set_weight(grid="mid_tread"), "grid must be one of"),
    "name": (set_weight(name="\x1b[2J"), "must be a printable string"),
    "dtype": (
        lambda c: with_header(c, lambda h: h["weights"][1].update(dtype="object")),
        "dtype must be one of",
    ),
    "checksum": (lambda c: with_header(c, lambda h: {**h, "crc32": 1}), "the CRC-32 must be"),
    "scales": (
        lambda c: resealed(c, scales=b"\xff" * len(parts_of(c)[1]["scales"])),
        "scales must be finite",
    ),
}


def resealed(content, **changes):
    """The file with other tensors and their checksum."""
    content = rewritten(content, **changes)
    tensors = parts_of(content)[1]
    others = b"".join(tensors[name] for name in sorted(tensors) if name != "header")
    return with_header(content, lambda h: {**h, "crc32": zlib.crc32(others)})


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_file(fault, path):
    change, message = FAULTS[fault]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(PackedFileError) as caught:
        load_packed(path)
    assert str(caught.value).startswith(f"Cannot read packed file '{path}': ")
    assert message in str(caught.value)
    assert "Received: " in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_a_refused_file_changes_no_model(path):
    model = make_model()
    before = [variable.numpy() for variable in model.weights]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PackedFileError):
        load_packed(path, into=model)
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_a_file_that_is_not_there_is_no_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_packed(tmp_path / "missing.safetensors")


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_damage_is_noticed_or_does_none(packed, data):
    content = bytearray(packed)
    kind = data.draw(st.sampled_from(["flip", "cut", "overwrite"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[at : at + data.draw(st.integers(1, 50))]
    else:
        junk = data.draw(st.binary(min_size=1, max_size=20))
        content[at : at + len(junk)] = junk
    try:
        arrays = reader.parse(bytes(content)).arrays()
    except PackedFileError:
        return
    for name, array in reader.parse(packed).arrays().items():
        np.testing.assert_array_equal(arrays[name], array)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_a_header_that_lies_is_refused_and_nothing_else_happens(packed, data):
    def edit(header):
        entry = data.draw(st.sampled_from([header, *header["weights"]]))
        entry[data.draw(st.sampled_from(sorted(entry)))] = data.draw(json_values)

    with contextlib.suppress(PackedFileError):
        reader.parse(with_header(packed, edit)).arrays()


@pytest.mark.thorough
def test_the_fuzzing_program_finds_no_crash(tmp_path):
    command = [sys.executable, ROOT / "experiments" / "fuzz_packed.py"]
    command += ["--files=600", "--files_per_worker=300", f"--output_dir={tmp_path}"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    result = json.loads((tmp_path / "fuzz_packed.json").read_text())
    assert result["files"] == 600 == result["refused"] + result["read"]
    assert result["crashes"] == result["hangs"] == result["read_otherwise_unnoticed"] == 0
    assert result["refused"] > 400

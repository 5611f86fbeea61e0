"""Reads packed files with NumPy and safetensors only; this file can be copied on its own.

    from reader import read_packed

    arrays = read_packed("model.safetensors").arrays()

`docs/packed_format.md` describes the format. Nothing in a file is trusted: all lengths are compared
with the file's size before memory is allocated, and nothing in a file is executed.
"""

import json
import math
import zlib
from typing import NamedTuple

import numpy as np

FORMAT = "keras_learnbits.packed"
VERSION = "1"
BITS = range(1, 17)
# Enough for about 40,000 weights. The limit protects against zlib streams that decompress to
# gigabytes.
MAX_HEADER_BYTES = 1 << 22
MAX_RANK = 32
MAX_LENGTH = 2**63 - 1
GRIDS = ("mid_rise", "affine")

# Dictionary of each type to its names in safetensors and in NumPy. NumPy has no bfloat16, which is
# read as integers.
TYPES = {
    "float32": ("F32", "<f4"),
    "bfloat16": ("BF16", "<u2"),
    "bool": ("BOOL", "|u1"),
    "int8": ("I8", "|i1"),
    "int16": ("I16", "<i2"),
    "int32": ("I32", "<i4"),
    "int64": ("I64", "<i8"),
    "uint8": ("U8", "|u1"),
    "uint16": ("U16", "<u2"),
    "uint32": ("U32", "<u4"),
    "uint64": ("U64", "<u8"),
}
TENSORS = {**TYPES, "header": TYPES["uint8"], "codes": TYPES["uint8"], "scales": TYPES["float32"]}


class PackedFileError(ValueError):
    """A file is not a packed file, or is damaged; the message names the file and the fault."""


def pack_codes(codes, bits):
    """Packs integers of `bits` bits each into bytes.

    Bit `j` of code `i`, counted from the least significant, is bit `(i * bits + j) % 8` of byte
    `(i * bits + j) // 8`. Unused bits of the last byte are 0.

    Args:
        codes: Integer array of any shape, read in C order; values in `0..2**bits - 1`.
        bits: Integer from 1 to 16.

    Returns:
        uint8 array of `ceil(codes.size * bits / 8)` bytes.

    Examples:
        >>> pack_codes(np.array([1, 2, 7]), bits=3).tolist()  # 7, 2, 1: 111 010 001 in binary
        [209, 1]
    """
    rows = codes.ravel().astype("<u2").view(np.uint8).reshape(-1, 2)
    return np.packbits(
        np.unpackbits(rows, axis=1, count=bits, bitorder="little"), bitorder="little"
    )


def unpack_codes(packed, bits, size):
    """The `size` integers that `pack_codes` packed, a uint16 array.

    Examples:
        >>> unpack_codes(np.array([209, 1], np.uint8), bits=3, size=3).tolist()
        [1, 2, 7]
    """
    rows = np.unpackbits(packed, count=size * bits, bitorder="little").reshape(size, bits)
    columns = np.packbits(rows, axis=1, bitorder="little")
    # One or two bytes per code, to be read as 16 bits.
    padded = np.pad(columns, [(0, 0), (0, 2 - columns.shape[1])])
    return padded.view("<u2")[:, 0].astype(np.uint16)


class PackedKernel(NamedTuple):
    """A quantized kernel: `step * (code + offset)` for each of its codes.

    Attributes:
        name: Name of the weight, e.g. `"conv1/kernel"`.
        shape: Tuple of integers.
        bits: Bit-width of the codes, 1 to 16.
        grid: `"mid_rise"`, with offset `-(2**bits - 1) / 2`, or `"affine"`, with stored offsets.
        axes: Axes of the kernel along which steps and offsets differ, in ascending order.
        data: Dictionary of `codes`, the packed bytes, and `scales`, float32: steps, then offsets.
    """

    name: str
    shape: tuple
    bits: int
    grid: str
    axes: tuple
    data: dict

    @property
    def size(self):
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def scale_shape(self):
        """Shape of steps and offsets; it broadcasts against the kernel's."""
        return tuple(n if axis in self.axes else 1 for axis, n in enumerate(self.shape))

    def lengths(self):
        """Dictionary of each tensor of the file to the kernel's number of elements in it."""
        arrays = 1 + (self.grid == "affine")
        return {
            "codes": -(-self.size * self.bits // 8),
            "scales": arrays * math.prod(self.scale_shape),
        }

    def codes(self):
        """Integer codes, a uint16 array of the kernel's shape."""
        return unpack_codes(self.data["codes"], self.bits, self.size).reshape(self.shape)

    def step_and_offset(self):
        """Two float32 arrays of shape `scale_shape`."""
        scales = self.data["scales"].astype(np.float32).reshape(-1, *self.scale_shape)
        mid_rise = np.full(self.scale_shape, -0.5 * (2**self.bits - 1), np.float32)
        return scales[0], scales[1] if self.grid == "affine" else mid_rise

    def array(self):
        """The quantized weights, a float32 array."""
        step, offset = self.step_and_offset()
        with np.errstate(over="ignore"):  # a damaged file may have huge scales
            return step * (self.codes().astype(np.float32) + offset)


class PackedArray(NamedTuple):
    """A weight that is not quantized.

    Attributes:
        name: Name of the weight, e.g. `"conv1/bias"`.
        shape: Tuple of integers.
        dtype: Key of `TYPES`, the type in the file.
        data: Dictionary of `dtype` to the elements in C order, of the NumPy type in `TYPES`.
    """

    name: str
    shape: tuple
    dtype: str
    data: dict

    @property
    def size(self):
        """Number of elements."""
        return math.prod(self.shape)

    def lengths(self):
        """Dictionary of each tensor of the file to the weight's number of elements in it."""
        return {self.dtype: self.size}

    def array(self):
        """The weight, an array of `dtype`; float32 for bfloat16."""
        elements = self.data[self.dtype].reshape(self.shape)
        if self.dtype == "bfloat16":
            # A bfloat16 is the upper half of a float32.
            return (elements.astype(np.uint32) << 16).view(np.float32)
        return elements.astype(self.dtype)


class PackedFile(NamedTuple):
    """The contents of a packed file.

    Attributes:
        weights: List of `PackedKernel` and `PackedArray`, in the model's order.
        library: Version of keras_learnbits that wrote the file.
        config: Configuration for `keras.saving.deserialize_keras_object`, or None.
    """

    weights: list
    library: str
    config: dict | None

    def arrays(self):
        """Dictionary of name to array; kernels are float32, as the model computes with them."""
        return {weight.name: weight.array() for weight in self.weights}


def read_packed(path):
    """Reads a packed file. Needs NumPy and safetensors only.

    Args:
        path: Path of the file.

    Returns:
        `PackedFile`; its method `arrays` returns the weights.

    Raises:
        OSError: The file cannot be opened.
        PackedFileError: It is not a packed file, has an unknown version, is truncated or damaged.

    Examples:
        >>> model = keras.Sequential(
        ...     [keras.Input((4,)), keras_learnbits.LearnedBitDense(2, bits=3)])
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> keras_learnbits.export.packed.save_packed(model, path)
        >>> kernel, bias = read_packed(path).weights
        >>> kernel.shape, kernel.bits, bool(kernel.codes().max() < 8)
        ((4, 2), 3, True)
    """
    with open(path, "rb") as file:
        content = file.read()
    try:
        return parse(content)
    except PackedFileError as fault:
        raise PackedFileError(f"Cannot read packed file {str(path)!r}: {fault}") from fault


def parse(content):
    """The `PackedFile` in the bytes of a file.

    Raises:
        PackedFileError: As for `read_packed`; the message lacks the name of the file.
    """
    tensors = _tensors(content)
    header = _unpacked_header(tensors.pop("header"))
    required = {"library", "crc32", "weights"}
    _check(
        isinstance(header, dict) and required <= header.keys() <= required | {"config"},
        "the header must have library, crc32, weights and perhaps config",
        header,
    )
    library, weights, config = header["library"], header["weights"], header.get("config")
    _check(isinstance(library, str), "library must be a string", library)
    _check(isinstance(weights, list), "weights must be a list", weights)
    _check(config is None or isinstance(config, dict), "config must be an object", config)
    weights = [_weight(entry) for entry in weights]
    names = {weight.name for weight in weights}
    _check(len(names) == len(weights), "names of weights must differ", names)
    lengths = {name: tensor.size for name, tensor in tensors.items()}
    _check(
        lengths == total_lengths(weights),
        f"tensors must be as long as the weights in them, {_short(total_lengths(weights))}",
        lengths,
    )
    crc32 = checksum(tensors)
    _check(header["crc32"] == crc32, f"the CRC-32 must be {crc32}", header["crc32"])
    scales = tensors.get("scales", np.empty(0))
    _check(bool(np.isfinite(scales).all()), "scales must be finite", scales)
    return PackedFile(_divided(weights, tensors), library, config)


def total_lengths(weights):
    """Dictionary of each tensor of a file with these weights to its number of elements."""
    lengths = {}
    for weight in weights:
        for name, length in weight.lengths().items():
            lengths[name] = lengths.get(name, 0) + length
    return lengths


def checksum(tensors):
    """CRC-32 of the bytes of all tensors, in the order of their names."""
    crc32 = 0
    for name in sorted(tensors):
        crc32 = zlib.crc32(tensors[name], crc32)
    return crc32


def safetensors():
    """The modules `safetensors` and `safetensors.numpy`.

    Raises:
        ImportError: They are not installed; the message says how to install them.
    """
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "Packed files need the library safetensors: `pip install safetensors`. "
            f"Received: {error}"
        ) from error
    return safetensors, safetensors.numpy


def _check(holds, rule, received, weight=None):
    if not holds:
        where = "" if weight is None else f" in weight {_short(weight)}"
        raise PackedFileError(f"{rule}. Received: {_short(received)}{where}")


def _short(value):
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _tensors(content):
    """Dictionary of name to flat array, a view of the container's bytes."""
    library, _ = safetensors()
    try:
        found = dict(library.deserialize(content))
    except library.SafetensorError as error:
        raise PackedFileError(
            f"it must be a complete safetensors file. Received: {error}"
        ) from error
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    _check(FORMAT in metadata, f"its metadata must have the key {FORMAT!r}", metadata)
    _check(metadata[FORMAT] == VERSION, f"its version must be {VERSION!r}", metadata[FORMAT])
    _check("header" in found, "it must have a tensor 'header'", sorted(found))
    tensors = {}
    for name, tensor in found.items():
        _check(name in TENSORS, f"tensors must be among {sorted(TENSORS)}", name)
        container_type, numpy_type = TENSORS[name]
        _check(
            tensor["dtype"] == container_type and len(tensor["shape"]) == 1 and tensor["data"],
            f"tensor {name!r} must be of type {container_type}, with one axis and not empty",
            (tensor["dtype"], tensor["shape"]),
        )
        tensors[name] = np.frombuffer(tensor["data"], numpy_type)
    return tensors


def _unpacked_header(packed):
    """The JSON value in the header, a zlib stream of at most `MAX_HEADER_BYTES` when unpacked."""
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(packed, MAX_HEADER_BYTES)
    except zlib.error as error:
        raise PackedFileError(f"the header must be a zlib stream. Received: {error}") from error
    _check(
        unpacker.eof and not unpacker.unused_data,
        f"the header must be one whole zlib stream of at most {MAX_HEADER_BYTES} bytes",
        f"{len(packed)} bytes that begin with {bytes(text[:20])}",
    )
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise PackedFileError(f"the header must be JSON. Received: {error}") from error


def _weight(entry):
    """A `PackedKernel` or `PackedArray` without its data, from an entry of the header."""
    kernel_keys = {"name", "shape", "bits", "grid", "axes"}
    array_keys = {"name", "shape", "dtype"}
    _check(
        isinstance(entry, dict) and entry.keys() in (kernel_keys, array_keys),
        f"a weight must have the keys {sorted(kernel_keys)} or {sorted(array_keys)}",
        entry,
    )
    name, shape = entry["name"], entry["shape"]
    _check(
        isinstance(name, str) and name.isprintable() and name,
        "the name of a weight must be a printable string",
        name,
    )
    _check(
        _integers(shape) and len(shape) <= MAX_RANK and all(0 < n <= MAX_LENGTH for n in shape),
        f"a shape must have at most {MAX_RANK} axes, of lengths from 1 to {MAX_LENGTH}",
        shape,
        name,
    )
    if "dtype" in entry:
        dtype = entry["dtype"]
        known = isinstance(dtype, str) and dtype in TYPES
        _check(known, f"dtype must be one of {sorted(TYPES)}", dtype, name)
        return PackedArray(name, tuple(shape), dtype, {})
    bits, grid, axes = entry["bits"], entry["grid"], entry["axes"]
    known = type(bits) is int and bits in BITS
    _check(known, f"bits must be an integer from {BITS[0]} to {BITS[-1]}", bits, name)
    _check(grid in GRIDS, f"grid must be one of {GRIDS}", grid, name)
    rising = _integers(axes) and axes == sorted(set(axes) & set(range(len(shape))))
    _check(rising, "axes must be rising axes of the shape", axes, name)
    return PackedKernel(name, tuple(shape), bits, grid, tuple(axes), {})


def _integers(value):
    # `type`, because `isinstance` takes `true` in JSON for an integer.
    return isinstance(value, list) and all(type(each) is int for each in value)


def _divided(weights, tensors):
    """The weights with their slices of the tensors, which have the order of the weights."""
    begin, divided = dict.fromkeys(tensors, 0), []
    for weight in weights:
        data = {}
        for name, length in weight.lengths().items():
            data[name] = tensors[name][begin[name] : begin[name] + length]
            begin[name] += length
        divided.append(weight._replace(data=data))
    return divided

"""Reads mutated packed files, as a worker of `fuzz_packed.py`.

python experiments/packed_mutations.py DIRECTORY SEED FILES

`DIRECTORY` has packed files to mutate. Prints the outcomes of the mutated files as JSON. Like a
user without TensorFlow, it imports `reader.py` only, so its memory is that of the reader.
"""

import collections
import functools
import json
import pathlib
import random
import re
import resource
import sys
import time
import traceback
import zlib

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "keras_learnbits" / "export" / "packed"))
import reader  # noqa: E402

MEMORY_LIMIT = 1 << 31
DEEP = "[" * 200_000
NASTY = (
    -1, 0, 1, 2, 17, 77, 1.5, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, -(10**30), 10**4000,
    float("nan"), float("inf"), True, False, None, "", "codes", "header", "float32", "affine",
    "mid_rise", "\x1b[2J", "\ud800", "a" * 10_000, [], [0], [-1], [2**62, 2**62], [1] * 100,
    [[]], {}, {"name": "w"},
)  # fmt: skip
LENGTHS = (0, 1, 7, 8, 100, 2**20, 2**31 - 1, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def _edited(value, rng):
    """A JSON value with one change somewhere inside."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    key, inner = rng.choice(items) if items else (None, None)
    if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
        new = _edited(inner, rng)
    elif type(inner) is int and rng.random() < 0.5:
        new = inner + rng.choice([-8, -1, 1, 8])
    else:
        new = rng.choice(NASTY)
    copied = value.copy()
    change = rng.choice(["value"] * 6 + ["drop", "add"])
    if not items or change == "add":
        if isinstance(value, dict):
            copied[rng.choice(["config", "bits", "dtype", "weights", "x"])] = new
        else:
            copied.insert(rng.randrange(len(value) + 1), new)
    elif change == "drop":
        del copied[key]
    else:
        copied[key] = new
    return copied


def _container(content):
    """The container's JSON object and its data."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _file(container, data):
    text = json.dumps(container).encode()
    return len(text).to_bytes(8, "little") + text + data


def _tensors(content):
    """Dictionary of name to a tensor's type, bytes of an element, and data."""
    container, data = _container(content)
    del container["__metadata__"]
    tensors = {}
    for name, tensor in container.items():
        begin, end = tensor["data_offsets"]
        tensors[name] = tensor["dtype"], (end - begin) // tensor["shape"][0], data[begin:end]
    return tensors


def _with_tensors(**changed):
    """A file of the current version, of tensors as `_tensors` returns them."""
    container, data = {"__metadata__": {reader.FORMAT: reader.VERSION}}, b""
    for name, (dtype, width, part) in changed.items():
        offsets = [len(data), len(data) + len(part)]
        shape = [len(part) // width]
        container[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += part
    return _file(container, data)


def _with_header(content, stream):
    """The file with another tensor `header`, and otherwise unchanged."""
    return _with_tensors(**{**_tensors(content), "header": ("U8", 1, stream)})


def _header_text(content):
    return zlib.decompress(_tensors(content)["header"][2])


def truncate(content, others, rng):
    """Removes bytes at the end, or adds some."""
    if rng.random() < 0.2:
        return content + rng.randbytes(rng.randint(1, 100))
    return content[: rng.randrange(len(content))]


def flip(content, others, rng):
    """Flips one to eight bits."""
    flipped = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def splice(content, others, rng):
    """Replaces a part by a part of this or another file."""
    source = rng.choice(others)
    begin, end = sorted(rng.choices(range(len(content)), k=2))
    start = rng.randrange(len(source))
    length = rng.choice([end - begin, rng.randint(0, 200)])
    return content[:begin] + source[start : start + length] + content[end:]


def lie_about_the_container(content, others, rng):
    """Changes the length before the JSON, or up to three values in the JSON."""
    if rng.random() < 0.2:
        length = int.from_bytes(content[:8], "little")
        lie = rng.choice([*LENGTHS, length - 1, length + 1, len(content)])
        return lie.to_bytes(8, "little") + content[8:]
    container, data = _container(content)
    for _ in range(rng.randint(1, 3)):
        container = _edited(container, rng)
    return _file(container, data)


def lie_in_the_header(content, others, rng):
    """Changes one to three values in the header's JSON; container and checksum are right."""
    header = json.loads(_header_text(content))
    for _ in range(rng.randint(1, 3)):
        header = _edited(header, rng)
    return _with_header(content, zlib.compress(json.dumps(header).encode()))


@functools.cache
def _bomb(piece, mebibytes):
    """A long JSON list: a zlib stream of a few kB that decompresses to many MiB."""
    packer, mebibyte = zlib.compressobj(), piece * ((1 << 20) // len(piece))
    stream = packer.compress(b"[")
    for _ in range(mebibytes):
        stream += packer.compress(mebibyte)
    return stream + packer.compress(b"0]") + packer.flush()


def spoil_the_header(content, others, rng):
    """Flips bits in the header's text or stream, or replaces it by wrong or too long text."""
    text = _header_text(content)
    kind = rng.randrange(5)
    if kind == 0:
        return _with_header(content, zlib.compress(flip(text, others, rng)))
    if kind == 1:
        return _with_header(content, zlib.compress(splice(text, [text], rng)))
    if kind == 2:
        return _with_header(content, flip(zlib.compress(text), others, rng))
    if kind == 3:
        return _with_header(
            content, _bomb(rng.choice([b"0", b" ", b"[],"]), rng.choice([1, 3, 20]))
        )
    return _with_header(
        content, zlib.compress(rng.choice([b"", b"[]", b"\xff\xfe", DEEP.encode()]))
    )


def reseal(content, others, rng):
    """Flips bits in the weights, and sets the checksum that fits them."""
    tensors = _tensors(content)
    del tensors["header"]
    name = rng.choice(sorted(tensors))
    dtype, width, data = tensors[name]
    tensors[name] = dtype, width, flip(data, others, rng)
    crc32 = 0
    for name in sorted(tensors):
        crc32 = zlib.crc32(tensors[name][2], crc32)
    header = {**json.loads(_header_text(content)), "crc32": crc32}
    stream = zlib.compress(json.dumps(header).encode())
    return _with_tensors(**tensors, header=("U8", 1, stream))


# Damage, which must be noticed unless all weights are unchanged; and forged files.
DAMAGE = (truncate, flip, splice)
LIES = (lie_about_the_container, lie_in_the_header, spoil_the_header, reseal)


def _same(arrays, others):
    return arrays.keys() == others.keys() and all(
        np.array_equal(arrays[name], others[name]) for name in arrays
    )


def _peak_bytes():
    """Peak memory of this process. (`getrusage` would count its parent's.)"""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def run(directory, seed, files):
    """Reads mutated files; returns counts, the time of the slowest read, and the peak memory."""
    rng = random.Random(seed)
    originals = [path.read_bytes() for path in sorted(directory.glob("*.safetensors"))]
    arrays = [reader.parse(content).arrays() for content in originals]
    path = directory / f"mutated-{seed}"
    counts, crashes, slowest = collections.Counter(), [], 0.0
    for _ in range(files):
        index = rng.randrange(len(originals))
        mutate = rng.choice(DAMAGE + LIES)
        path.write_bytes(mutate(originals[index], originals, rng))
        start = time.perf_counter()
        try:
            found = reader.read_packed(path).arrays()
        except reader.PackedFileError as error:
            outcome = "refused" if path.name in str(error) else "crashes"
        except BaseException:
            outcome = "crashes"
            crashes.append(traceback.format_exc())
        else:
            outcome = "read"
            if mutate in DAMAGE and not _same(found, arrays[index]):
                outcome = "read_otherwise_unnoticed"
        slowest = max(slowest, time.perf_counter() - start)
        counts[outcome] += 1
        counts[mutate.__name__, outcome] += 1
    path.unlink()
    return {
        "counts": {
            " ".join(key) if isinstance(key, tuple) else key: n for key, n in counts.items()
        },
        "crashes": crashes[:10],
        "slowest_seconds": slowest,
        "peak_bytes": _peak_bytes(),
    }


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    print(json.dumps(run(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))

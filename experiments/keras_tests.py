"""Runs Keras's unit tests of its layers on learned-bit layers, and counts how many pass.

python experiments/keras_tests.py --output_dir=runs/keras_tests

Runs the tests of Dense, EinsumDense, Embedding and all convolutions, which Keras's wheel contains,
or those of a checkout with that checkout's Keras (`--keras=/path/of/checkout`). In these tests
`layers.Dense` is the learned-bit twin at 16 bits. A run differs from Keras's in three ways:

- `assertAllClose` has atol and rtol of at least `--tolerance`, because 16 bits are not exact.
- `run_layer_test` expects additional variables: for each quantized kernel one trainable weight, the
  scales, and one non-trainable weight, the bits.
- Tests whose name contains one of `REFUSED` are deselected: twins refuse these uses by design.
"""

import collections
import json
import os
import pathlib
import sys

import keras
import pytest
from absl import app, flags

import keras_learnbits as klb
from keras_learnbits.tables import aligned_table

FLAGS = flags.FLAGS
flags.DEFINE_string("keras", None, "Checkout of Keras; the installed Keras if not given.")
flags.DEFINE_float("tolerance", 5e-3, "Lowest atol and rtol of `assertAllClose`.", lower_bound=0)
flags.DEFINE_string("output_dir", None, "Directory of keras_tests.json.")

SRC = "keras/src/layers"  # of files; also the module in which Keras's tests look up their layers
FILES = [f"core/{name}_test.py" for name in ("dense", "einsum_dense", "embedding")]
FILES += [f"convolutional/{name}conv_test.py" for name in ("", "depthwise_", "separable_")]
FILES += ["convolutional/conv_transpose_test.py"]
REFUSED = (
    "lora",  # adds to a frozen kernel; `enable_lora` raises
    "quantize",  # `layer.quantize(mode)` and dtype policies of quantized modes
    "int8",  # that mode: its kernels, scales and quantizers
    "int4",  # that mode: packing, blocks, groups
    "float8",  # that mode: histories of maxima
    "gptq",  # calibrated kernels, and files with them
    "awq",  # the same
    "legacy_load_own_variables",  # files of each quantized mode, with numbered variables
)
TWINS = [each for each in vars(klb).values() if hasattr(each, "quantized_weights")]
# Numbers that `run_layer_test` checks. For each quantized kernel they are larger by one.
COUNTS = ("trainable_weights", "non_trainable_weights", "non_trainable_variables")
OUTCOMES = ("passed", "failed", "skipped", "deselected")


def at_16_bits(twin):
    class At16Bits(twin):
        def __init__(self, *args, bits=16, min_bits=1, max_bits=16, **kwargs):
            super().__init__(*args, bits=bits, min_bits=min_bits, max_bits=max_bits, **kwargs)

    At16Bits.__name__ = At16Bits.__qualname__ = twin.__name__.removeprefix("LearnedBit")
    return keras.saving.register_keras_serializable("keras_tests")(At16Bits)


def adapt(case):
    """Makes Keras's class of test cases allow for rounding, and for the variables of twins."""
    assert_all_close, run_layer_test = case.assertAllClose, case.run_layer_test

    def close_enough(self, actual, desired, atol=1e-6, rtol=1e-6, **kwargs):
        atol, rtol = max(atol, FLAGS.tolerance), max(rtol, FLAGS.tolerance)
        assert_all_close(self, actual, desired, atol=atol, rtol=rtol, **kwargs)

    def with_more_variables(self, layer_cls, init_kwargs, **kwargs):
        kernels = len(getattr(layer_cls, "quantized_weights", ()))
        for name in (f"expected_num_{what}" for what in COUNTS):
            if kwargs.get(name) is not None:
                kwargs[name] += kernels
        run_layer_test(self, layer_cls, init_kwargs, **kwargs)

    case.assertAllClose, case.run_layer_test = close_enough, with_more_variables


class Plugin:
    """Selects tests, and records their outcomes: one counter per file, and reasons of failures."""

    def __init__(self):
        self.counts = {file: collections.Counter() for file in FILES}
        self.failures = {}

    def count(self, nodeid, outcome):
        self.counts[nodeid.split("::")[0].split(f"{SRC}/")[-1]][outcome] += 1

    def pytest_collection_modifyitems(self, items):
        refused = {item for item in items if any(name in item.name.lower() for name in REFUSED)}
        for item in refused:
            self.count(item.nodeid, "deselected")
        items[:] = [item for item in items if item not in refused]
        for base in {base for item in items for base in item.cls.__mro__}:
            if "run_layer_test" in vars(base):
                adapt(base)

    def pytest_runtest_setup(self):
        keras.utils.set_random_seed(0)  # so that counts are the same each time

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self.count(report.nodeid, report.outcome)
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash else report.longreprtext
            self.failures[report.nodeid.split("::", 1)[1]] = " ".join(reason.split())[:150]


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    root = pathlib.Path(keras.__file__).resolve().parents[1]
    wanted = pathlib.Path(FLAGS.keras or root).resolve()
    if not (wanted / "keras/__init__.py").is_file():
        raise app.UsageError(f"No checkout of Keras: --keras={FLAGS.keras}")
    if wanted != root:  # once more, with that Keras
        os.environ["PYTHONPATH"] = str(wanted)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    for twin in map(at_16_bits, TWINS):
        # Not in the public module, where the library looks up Keras's own layers.
        setattr(sys.modules[SRC.replace("/", ".")], twin.__name__, twin)
    plugin = Plugin()
    paths = [f"{root}/{SRC}/{file}" for file in FILES]
    options = ["-qq", "--no-summary", "-pno:cacheprovider", "-c/dev/null", f"--rootdir={root}"]
    code = pytest.main([*options, *paths], [plugin])  # without this repository's settings
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(f"pytest ended with {code!r}.")

    total = sum(plugin.counts.values(), collections.Counter())
    counters = {**plugin.counts, "all": total}
    rows = [(name, *(str(of[key]) for key in OUTCOMES)) for name, of in counters.items()]
    print(aligned_table([[("file", *OUTCOMES)], rows[:-1], rows[-1:]], left=1))
    print("numbers of tests; deselected: tests of uses that learned-bit layers refuse by design")
    print(*(f"{test}: {reason}" for test, reason in plugin.failures.items()), sep="\n")
    if FLAGS.output_dir:
        os.makedirs(FLAGS.output_dir, exist_ok=True)
        result = {
            "command": " ".join(["python", "experiments/keras_tests.py", *sys.argv[1:]]),
            "versions": {"keras_learnbits": klb.__version__, "keras": keras.__version__},
            "counts": counters,
            "failures": plugin.failures,
        }
        with open(os.path.join(FLAGS.output_dir, "keras_tests.json"), "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    app.run(main)

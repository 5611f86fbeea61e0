"""Imports go from a subpackage to lower levels, never upwards or in circles."""

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "keras_learnbits"
# From the lowest level up. Subpackages of one level do not import each other.
LEVELS = [
    {"_version", "tables", "arguments", "serialization", "_keras"},
    {"numerics"},
    {"quantizers"},
    {"layers"},
    {"estimators"},
    {"bit_gradients"},
    {"training"},
    {"inspection", "conversion", "calibration"},
    {"allocation", "export"},
    {"callbacks", "quantization"},
    {"command_line"},
    {"__init__", "__main__"},
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    """The dotted name of a module within the package, e.g. `layers.base`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


NAMES = {name_of(path): path for path in MODULES}


@functools.cache
def imports_of(name):
    """Names of the modules of the package that a module imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(NAMES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("keras_learnbits"):
            holder = node.module.removeprefix("keras_learnbits").removeprefix(".")
            for alias in node.names:
                inner = f"{holder}.{alias.name}".removeprefix(".")
                found.add(inner if inner in NAMES else holder or "__init__")
        elif isinstance(node, ast.Import):
            found |= {"__init__" for alias in node.names if alias.name == "keras_learnbits"}
    return found - {name}


def subpackage(name):
    return name.partition(".")[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_module_imports_from_its_own_subpackage_and_from_lower_levels_only(name):
    up = {
        other
        for other in imports_of(name)
        if subpackage(other) != subpackage(name)
        and LEVEL[subpackage(other)] >= LEVEL[subpackage(name)]
    }
    assert not up


def test_every_module_has_a_level_and_there_are_twelve_at_most():
    assert {subpackage(name) for name in NAMES} == LEVEL.keys()
    assert len(LEVELS) <= 12


def test_no_module_imports_itself_by_way_of_others():
    done, path = set(), []

    def visit(name):
        assert name not in path, f"circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            path.append(name)
            for other in imports_of(name):
                visit(other)
            done.add(path.pop())

    for name in NAMES:
        visit(name)

"""Imports of packages that only exports need."""

import importlib


def import_extra(*names, extra="export"):
    """Imports modules of optional packages, with an error that says how to install them.

    Args:
        *names: Names of modules, e.g. `"onnx"`, `"onnx.version_converter"`.
        extra: Name of the extra of this library that installs the packages.

    Returns:
        The module, or a list of the modules if there are several.

    Raises:
        ImportError: A package is not installed.
    """
    try:
        modules = [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise ImportError(
            f"Exports need the packages that `pip install keras_learnbits[{extra}]` brings, in a "
            f'clone `pip install -e ".[{extra}]"`. Received: {error}'
        ) from error
    return modules[0] if len(modules) == 1 else modules

import doctest
import importlib
import inspect
import pkgutil

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_learnbits as klb

MODULES = [module.name for module in pkgutil.walk_packages(klb.__path__, prefix="keras_learnbits.")]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_are_true(name):
    module = importlib.import_module(name)
    names = {**vars(module), "keras": keras, "np": np, "tf": tf, "keras_learnbits": klb}
    results = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


def test_every_public_name_has_an_example():
    for name in klb.__all__:
        documentation = inspect.getdoc(getattr(klb, name))
        assert ">>>" in documentation, name


def test_no_module_uses_private_keras_or_tensorflow():
    for name in MODULES:
        source = inspect.getsource(importlib.import_module(name))
        assert "keras.src" not in source
        assert "tensorflow.python" not in source

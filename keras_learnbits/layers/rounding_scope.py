"""A scope in which each kernel is rounded once."""

import contextlib
import threading

import tensorflow as tf


class _Rounded(threading.local):
    """Results by name, kernels and graph, None outside of any scope; and whether gradients by
    the bits are wanted.
    """

    results = None
    by_bits = True


_ROUNDED = _Rounded()


def once(name, of, function):
    """The result of a function; within `rounding_once` that of the first call in this graph."""
    if _ROUNDED.results is None:
        return function()
    key = name, of, tf.compat.v1.get_default_graph()
    if key not in _ROUNDED.results:
        _ROUNDED.results[key] = function()
    return _ROUNDED.results[key]


def rounding_once(by_bits=False):
    """A scope in which kernels, bits and scales do not change: each kernel is rounded once.

    Args:
        by_bits: Whether gradients by the bits are wanted.
    """
    return _state({}, by_bits)


def rounding_anew():
    """A scope within `rounding_once` that rounds each time, for the way back.

    Layers under `keras.RematScope` are called once more there, and their kernels' gradients flow
    through what is rounded in that call.
    """
    return _state(None, _ROUNDED.by_bits)


@contextlib.contextmanager
def _state(results, by_bits):
    outer = _ROUNDED.results, _ROUNDED.by_bits
    _ROUNDED.results, _ROUNDED.by_bits = results, by_bits
    try:
        yield
    finally:
        _ROUNDED.results, _ROUNDED.by_bits = outer

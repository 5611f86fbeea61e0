"""A scope in which each kernel is rounded once."""

import contextlib
import threading

import tensorflow as tf


class _State(threading.local):
    """Results by name, tensors and graph; None outside of any scope.

    Replicas trace their steps in threads of their own.
    """

    results = None


_STATE = _State()


def once(name, of, function):
    """The result of a function; within `rounding_once`, that of its first call in this graph.

    Args:
        name: Name of what is computed.
        of: What it is computed from, hashable.
        function: Function without arguments.
    """
    if _STATE.results is None:
        return function()
    key = name, of, tf.compat.v1.get_default_graph()
    if key not in _STATE.results:
        _STATE.results[key] = function()
    return _STATE.results[key]


def rounding_once():
    """A scope in which kernels, bits and scales must not change: each kernel is rounded once."""
    return _scope({})


def rounding_again():
    """A scope within `rounding_once` that rounds at each call, for the backward pass.

    `keras.RematScope` calls layers again there, and the gradients of their kernels flow through
    what is rounded in that call.
    """
    return _scope(None)


@contextlib.contextmanager
def _scope(results):
    outer, _STATE.results = _STATE.results, results
    try:
        yield
    finally:
        _STATE.results = outer

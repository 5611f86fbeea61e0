"""A scope in which each kernel is rounded once."""

import contextlib
import threading

import tensorflow as tf


class _State(threading.local):
    """Results of this thread by name, tensors and graph; None outside of a scope.

    `tf.distribute.MirroredStrategy` traces the step of each replica in a separate thread.
    """

    results = None


_STATE = _State()


def once(name, of, function):
    """The result of a function; within `rounding_once`, the result of its first call.

    Args:
        name: Name of the result.
        of: Hashable object that the result is computed from.
        function: Function without arguments.
    """
    if _STATE.results is None:
        return function()
    # A tensor of one graph cannot be used in another, e.g. in the body of a `tf.while_loop`.
    key = name, of, tf.compat.v1.get_default_graph()
    if key not in _STATE.results:
        _STATE.results[key] = function()
    return _STATE.results[key]


def rounding_once():
    """A scope in which each kernel is rounded once; kernels, bits and scales must not change."""
    return _scope({})


def rounding_again():
    """A scope within `rounding_once` in which kernels are rounded at each call.

    It is for the backward pass: a `keras.RematScope` calls layers again there, under another
    gradient tape, which must record the rounding.
    """
    return _scope(None)


@contextlib.contextmanager
def _scope(results):
    outer, _STATE.results = _STATE.results, results
    try:
        yield
    finally:
        _STATE.results = outer

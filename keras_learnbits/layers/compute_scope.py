"""What a layer computes with, and while it does.

Inside of a layer's `call`, `layer.kernel` is what the layer computes with; outside it is what it is
in Keras, the float `keras.Variable`.
"""

import contextlib
import functools
import threading

import tensorflow as tf


class _Computing(threading.local):
    """State of this thread. Replicas trace their steps in threads of their own."""

    layers = ()
    with_float_kernels = False
    keeping_scales = False


_COMPUTING = _Computing()


def is_computing(layer):
    """Whether this is inside of the layer's `call`."""
    return any(each is layer for each in _COMPUTING.layers)


def uses_float_kernels():
    """Whether this is within `computing_with_float_kernels`."""
    return _COMPUTING.with_float_kernels


def marking_call(call):
    """A layer's `call`, during which `is_computing` holds for the layer; of the same signature.

    Not `__call__`: `keras.RematScope` runs `call` once more by itself, for the gradients.

    Args:
        call: Function of a layer and its arguments.
    """
    if getattr(call, "marks_its_layer", False):
        return call

    @functools.wraps(call)
    def marked(layer, *args, **kwargs):
        outer = _COMPUTING.layers
        _COMPUTING.layers = (*outer, layer)
        try:
            return call(layer, *args, **kwargs)
        finally:
            _COMPUTING.layers = outer

    marked.marks_its_layer = True
    return marked


@contextlib.contextmanager
def computing_with_float_kernels(active=True):
    """A scope in which learned-bit layers compute with their float kernels, as Keras's do.

    Args:
        active: Whether they do; if False, nothing changes.
    """
    outer = _COMPUTING.with_float_kernels
    _COMPUTING.with_float_kernels = active or outer
    try:
        yield
    finally:
        _COMPUTING.with_float_kernels = outer


def follow_kernel(tensor):
    """Has scales follow their kernel when it is assigned, as by `layer.kernel.assign(values)`.

    Other values than those that scales were fitted to would be clipped to the old range without a
    word. Keras has no hook for it, so `assign` is replaced on this one variable. Optimizers assign
    to `kernel.value`, and steps in graphs are left alone. (Not of kernels in a `LearnedBitWrapper`,
    which layers inside of it load from files after their scales.)

    Args:
        tensor: `QuantizedKernel`.
    """
    assign = tensor.kernel.assign

    def assign_and_fit(value):
        result = assign(value)
        if tf.executing_eagerly() and not _COMPUTING.keeping_scales:
            tensor.fit_scale()
        return result

    tensor.kernel.assign = assign_and_fit


@contextlib.contextmanager
def keeping_scales():
    """A scope in which scales do not follow: they are assigned, or trained, themselves."""
    outer, _COMPUTING.keeping_scales = _COMPUTING.keeping_scales, True
    try:
        yield
    finally:
        _COMPUTING.keeping_scales = outer

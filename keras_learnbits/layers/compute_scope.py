"""What a layer computes with, by scopes of the calling thread.

Inside of a layer's `call`, `layer.kernel` is the quantized weight; outside, as in Keras, the float
`keras.Variable`.
"""

import contextlib
import functools
import threading

import tensorflow as tf

from keras_learnbits._keras import call_after_assign


class _State(threading.local):
    """State of this thread. Replicas trace their steps in threads of their own."""

    layers = ()
    float_kernels = False
    bit_gradients = True
    keeping_scales = False


_STATE = _State()


@contextlib.contextmanager
def _scope(**values):
    """A scope in which some of the state has other values."""
    outer = {name: getattr(_STATE, name) for name in values}
    vars(_STATE).update(values)
    try:
        yield
    finally:
        vars(_STATE).update(outer)


def is_computing(layer):
    """Whether this is inside of the layer's `call`."""
    return any(each is layer for each in _STATE.layers)


def marking_call(call):
    """A layer's `call`, during which `is_computing` holds for the layer; of the same signature.

    `call` is wrapped and not `__call__`, because `keras.RematScope` runs `call` again by itself to
    compute gradients.

    Args:
        call: Function of a layer and its arguments.
    """
    if getattr(call, "marks_its_layer", False):
        return call

    @functools.wraps(call)
    def marked(layer, *args, **kwargs):
        with _scope(layers=(*_STATE.layers, layer)):
            return call(layer, *args, **kwargs)

    marked.marks_its_layer = True
    return marked


def computing_with_float_kernels(active=True):
    """A scope in which learned-bit layers compute with their float kernels, as Keras's do.

    Args:
        active: Whether they do; False changes nothing.
    """
    return _scope(float_kernels=active or _STATE.float_kernels)


def uses_float_kernels():
    """Whether this is within `computing_with_float_kernels`."""
    return _STATE.float_kernels


def bit_gradients(wanted):
    """A scope in which gradients with respect to the bits flow through kernels, or do not.

    They flow outside of any such scope. Graphs without them are smaller.

    Args:
        wanted: Boolean.
    """
    return _scope(bit_gradients=wanted)


def wants_bit_gradients():
    """Whether gradients with respect to the bits are to flow."""
    return _STATE.bit_gradients


def keeping_scales():
    """A scope in which assignments to kernels leave their scales alone; see `follow_kernel`."""
    return _scope(keeping_scales=True)


def follow_kernel(tensor):
    """Fits scales again whenever their kernel is assigned, as by `layer.kernel.assign(values)`.

    Without this, values beyond the range of the old scales would be clipped silently. Optimizers
    assign to `kernel.value`, and assignments in graphs are left alone. Kernels in a
    `LearnedBitWrapper` are not followed, because the layers inside load them from files after
    their scales.

    Args:
        tensor: `QuantizedKernel`.
    """

    def fit_scale():
        if tf.executing_eagerly() and not _STATE.keeping_scales:
            tensor.fit_scale()

    call_after_assign(tensor.kernel, fit_scale)

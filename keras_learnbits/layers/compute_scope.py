"""Scopes that decide with which kernels layers compute, and with which gradients.

During a layer's `call`, `layer.kernel` is the quantized weight; at other times, as in Keras, it is
the float `keras.Variable`. A scope applies to the calling thread.
"""

import contextlib
import functools
import threading

import tensorflow as tf

from keras_learnbits._keras import call_after_assign


class _State(threading.local):
    """State of this thread.

    `tf.distribute.MirroredStrategy` traces the step of each replica in a separate thread, and a
    program may train one model while another thread predicts with the same layers.
    """

    layers = ()
    float_kernels = False
    bit_gradients = True
    keeping_scales = False
    observer = None
    calibrating = False


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
    """Whether the layer's `call` is running in this thread."""
    # A tuple, because layers call the layers inside them. Searched by identity, because layers may
    # define `__eq__`.
    return any(each is layer for each in _STATE.layers)


def marking_call(call):
    """Wraps the `call` of a layer class so that `is_computing` is true during a call.

    Args:
        call: Function of a layer and its arguments.

    Returns:
        Function of the same signature, from which Keras reads the arguments that the layer takes.
    """
    # `call` and not `__call__`, because the backward pass of a `keras.RematScope` runs `call` alone
    # (keras/src/layers/layer.py, `rematerialized_call`). Subclasses inherit the wrapped one.
    if getattr(call, "marks_its_layer", False):
        return call

    @functools.wraps(call)
    def marked(layer, *args, **kwargs):
        observe(layer, args, kwargs)
        with _scope(layers=(*_STATE.layers, layer)):
            return call(layer, *args, **kwargs)

    marked.marks_its_layer = True
    return marked


def observing_calls(observer):
    """A scope in which learned-bit layers report their inputs before they compute.

    Args:
        observer: Function of the layer and its first argument. It may change the layer's kernels.
    """
    return _scope(observer=observer)


def observe(layer, args, kwargs):
    """Reports a call of a layer to the observer, if there is one.

    Args:
        layer: A layer with quantized kernels.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
    """
    if _STATE.observer is not None:
        _STATE.observer(layer, args[0] if args else next(iter(kwargs.values())))


def calibrating_activations():
    """A scope in which quantized activations fit their ranges, and return their inputs unchanged.

    So all ranges are fitted to float activations.
    """
    return _scope(calibrating=True)


def is_calibrating():
    """Whether quantized activations fit their ranges now, as in `calibrating_activations`."""
    return _STATE.calibrating


def computing_with_float_kernels(active=True):
    """A scope in which learned-bit layers compute with their float kernels, like Keras layers.

    Args:
        active: Boolean; False makes a scope that changes nothing.
    """
    return _scope(float_kernels=active or _STATE.float_kernels)


def uses_float_kernels():
    """Whether layers compute with their float kernels."""
    return _STATE.float_kernels


def flowing_bit_gradients(wanted):
    """A scope in which quantized kernels have gradients with respect to bit-widths, or have none.

    Outside of any such scope they have them. Without them graphs are smaller.

    Args:
        wanted: Boolean, whether kernels have these gradients.
    """
    return _scope(bit_gradients=wanted)


def wants_bit_gradients():
    """Whether quantized kernels have gradients with respect to bit-widths."""
    return _STATE.bit_gradients


def keeping_scales():
    """A scope in which assignments to kernels do not change their scales; see `follow_kernel`."""
    return _scope(keeping_scales=True)


def follow_kernel(tensor):
    """Fits scales again when their kernel is assigned, e.g. by `layer.kernel.assign(values)`.

    Otherwise values outside of the range of the old scales would be clipped silently. Updates by
    optimizers, which assign to `kernel.value`, and assignments in graphs do not fit the scales.
    Kernels in a `LearnedBitWrapper` are not followed, because Keras loads them from a file after
    the scales, which belong to the wrapper.

    Args:
        tensor: `QuantizedKernel` with scales.
    """

    def fit_scale():
        if tf.executing_eagerly() and not _STATE.keeping_scales:
            tensor.fit_scale()

    call_after_assign(tensor.kernel, fit_scale)

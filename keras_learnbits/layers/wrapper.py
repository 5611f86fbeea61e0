"""`LearnedBitWrapper`: learned bits for the kernels of a layer and of all layers inside it."""

import fnmatch
import functools

import keras
import tensorflow as tf

from keras_learnbits._keras import ReplacedValues, set_hidden
from keras_learnbits.layers.base import OwnsBits
from keras_learnbits.layers.compute_scope import observe
from keras_learnbits.layers.layer_copy import copy_layer, dtype_setting
from keras_learnbits.layers.traversal import kernels_inside, layers_inside
from keras_learnbits.serialization import register


@register
class LearnedBitWrapper(OwnsBits, keras.layers.Layer):
    """Quantizes all kernels inside a layer, each with its own trainable bit-width.

    It is for layers that contain others, such as `MultiHeadAttention`, `Bidirectional` or a custom
    block, and for recurrent layers, whose kernel and recurrent kernel have separate bit-widths. The
    layer is called unchanged, while quantized values replace those of its kernels. So the kernels
    of a recurrent layer are rounded once per call instead of once per time step.

    Kernels are those of Keras's dense, embedding and convolutional layers and recurrent cells,
    and of subclasses of these. Learned-bit layers inside the layer are not changed.

    Args:
        layer: `keras.layers.Layer`; the wrapper takes the same inputs.
        exclude: Kernels that stay float: `fnmatch` patterns of paths inside the layer, e.g.
            `"query/*"`, or indices of kernels in their order. (Automatic names of layers may
            differ when a model is loaded, so files contain the indices.)
        **kwargs: `bits`, `min_bits`, `max_bits`, `kernel_quantizer` and `name`.

    Raises:
        ValueError: As for every learned-bit layer; or, when the wrapper is built, the layer has no
            kernel to quantize, or a kernel is not a float variable.

    Examples:
        >>> layer = LearnedBitWrapper(keras.layers.MultiHeadAttention(2, 4), bits=3)
        >>> layer(np.ones((2, 5, 6)), np.ones((2, 7, 6))).shape
        TensorShape([2, 5, 6])
        >>> list(layer.quantized_kernels)
        ['query/kernel', 'key/kernel', 'value/kernel', 'attention_output/kernel']
    """

    def __init__(self, layer, *, exclude=(), name=None, **kwargs):
        if not isinstance(layer, keras.layers.Layer):
            raise ValueError(
                f"`LearnedBitWrapper` needs a layer to wrap. Received: layer={layer!r}"
            )
        set_hidden(self, "layer", layer)  # Keras reads the signature of `call`, which needs it
        # The wrapped layer casts its inputs and variables according to its own policy.
        super().__init__(name=name or layer.name, dtype="float32", autocast=False, **kwargs)
        self.layer = layer
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.supports_masking = layer.supports_masking

    def build(self):
        excluded = []
        for number, (chain, weight_name, weight) in enumerate(kernels_inside(self.layer)):
            name = "/".join([*(each.name for each in chain), weight_name])
            if any(_matches(item, number, name) for item in self.exclude):
                excluded.append(number)
            else:
                self._quantize(name, chain[-1] if chain else self.layer, weight_name, weight)
        if not self.quantized_kernels:
            raise ValueError(
                "`LearnedBitWrapper` needs a layer with a kernel inside. "
                f"Received: layer={self.layer.name!r}, exclude={self.exclude}"
            )
        self.exclude = excluded

    def _quantize(self, name, layer, weight_name, weight):
        kernel = getattr(layer, weight_name)
        if not isinstance(kernel, keras.Variable) or "float" not in kernel.dtype:
            raise ValueError(
                "`LearnedBitWrapper` quantizes float kernels, without LoRA. "
                f"Received: {name!r} of type {type(kernel).__name__} in layer {self.name!r}, dtype "
                f"policy {layer.dtype_policy.name!r}"
            )
        while name in self.quantized_kernels:  # layers inside may have the same name
            name += "_"
        self.quantize_weight(name, kernel, weight.axes_of(layer), name.replace("/", ".") + "_")

    def __call__(self, *args, **kwargs):
        # Not `self.built`, which Keras sets for a restored layer even if nothing was built.
        if not self.quantized_kernels:
            # Variables must not be created in the graph of a training step. `tf.init_scope` leaves
            # the graph, as in Keras (keras/src/backend/tensorflow/core.py).
            with tf.init_scope():
                if not is_built(self.layer):
                    # A custom layer may create its sublayers' variables only when it is called.
                    self.layer(*keras.tree.map_structure(_symbolic, args),
                               **keras.tree.map_structure(_symbolic, kwargs))  # fmt: skip
                self.build()
        return super().__call__(*args, **kwargs)

    @property
    def call(self):
        """The layer's `call` with quantized kernels, with the same signature."""

        # A property, because Keras reads from the signature whether `call` takes `training` and
        # `mask`, which depends on the wrapped layer.
        def call(*args, **kwargs):
            return self._call_quantized(*args, **kwargs)

        return functools.update_wrapper(call, self.layer.call)

    def _call_quantized(self, *args, **kwargs):
        observe(self, args, kwargs)
        kernels = [(k.kernel, k.used_by_layer()) for k in self.quantized_kernels.values()]
        with ReplacedValues(kernels, self._refuse_assignment) as scope:
            outputs = self.layer(*args, **kwargs)
        for loss in scope.losses:
            # A copy, because keras/src/layers/layer.py collects losses by the `id` of their tensors
            # and would count a loss once that several layers share.
            self.add_loss(tf.identity(loss))
        return outputs

    def _refuse_assignment(self, kernel):
        raise ValueError(
            "A layer whose `call` assigns to its kernel cannot be quantized, because the kernel is "
            "rounded before the assignment; exclude the layer, or compute with a changed kernel. "
            f"Received: an assignment to {kernel.path!r} in layer {self.name!r}"
        )

    @property
    def metrics(self):
        """An empty list, although `layer` may have metrics."""
        # Keras collects the metrics of all layers inside a model by itself. It leaves out those of
        # compiled models inside (keras/src/trainers/trainer.py), and this property would add them.
        return []

    def reset_state(self):
        """Resets the states of stateful recurrent layers inside."""
        for layer in layers_inside(self.layer):
            if isinstance(layer, keras.layers.RNN):
                layer.reset_state()

    reset_states = reset_state  # Keras has both names

    def compute_mask(self, inputs, previous_mask):
        return self.layer.compute_mask(inputs, previous_mask)

    def compute_output_shape(self, *args, **kwargs):
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_output_spec(self, *args, **kwargs):
        return self.layer.compute_output_spec(*args, **kwargs)

    def plain_twin(self, float32=False):
        """A copy of the wrapped layer; it is not built.

        Args:
            float32: Whether the copy computes in float32 even if the layer has a mixed precision.
        """
        return copy_layer(self.layer, **dtype_setting(self.layer, float32))

    def get_build_config(self):
        return {"layer": self.layer.get_build_config()}

    def build_from_config(self, config):
        if build_without_call(self.layer, config["layer"]):
            self.build()

    def get_config(self):
        config = super().get_config()
        del config["dtype"]  # always float32, and no argument of `__init__`
        layer = keras.saving.serialize_keras_object(self.layer)
        layer.pop("build_config", None)  # the wrapper's own `build_from_config` builds the layer
        return {**config, "layer": layer, "exclude": self.exclude}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        layer = keras.saving.deserialize_keras_object(config["layer"], custom_objects)
        return cls(**{**config, "layer": layer})


def _matches(item, number, name):
    """Whether an item of `exclude` selects a kernel, by pattern or by index."""
    return fnmatch.fnmatch(name, item) if isinstance(item, str) else item == number


def is_built(layer):
    """Whether a layer and all layers inside are built."""
    return all(each.built for each in layers_inside(layer))


def build_without_call(layer, build_config):
    """Builds a layer and the layers inside, as far as this is possible without calling it.

    Args:
        layer: `keras.layers.Layer`.
        build_config: Dictionary, the `get_build_config` of a built layer of this class, or None.

    Returns:
        Whether the layer and all layers inside are built.
    """
    # keras/src/layers/layer.py, `build`: the default only notes that the layer is built. Sublayers
    # of such a layer are built when they are called.
    builds_when_called = type(layer).build is keras.layers.Layer.build
    if isinstance(layer, keras.Model) or not builds_when_called:
        if build_config and not is_built(layer):
            layer.build_from_config(build_config)
        # keras/src/models/model.py, `build_from_config`: a model without a `build` is called on
        # symbolic inputs, which does not set `built`.
        layer.built = layer.built or all(
            each.built for each in layers_inside(layer) if each is not layer
        )
    return is_built(layer)


def _symbolic(value):
    """A symbolic tensor like a tensor or an array; other values unchanged."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return keras.KerasTensor(value.shape, keras.backend.standardize_dtype(value.dtype))
    return value

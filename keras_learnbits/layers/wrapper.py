"""`LearnedBitWrapper`: learned bits for the kernels of any layer, however deep they lie."""

import fnmatch
import functools

import keras
import tensorflow as tf

from keras_learnbits._keras import ReplacedValues, set_hidden
from keras_learnbits.layers.base import OwnsBits
from keras_learnbits.layers.layer_copy import copy_layer, dtype_setting
from keras_learnbits.layers.traversal import kernels_inside, layers_inside
from keras_learnbits.serialization import register


@register
class LearnedBitWrapper(OwnsBits, keras.layers.Layer):
    """Quantizes all kernels inside a layer, each with a trainable bit-width of its own.

    For layers that hold others, such as `MultiHeadAttention`, `Bidirectional` or a block of your
    own, and for recurrent layers, whose kernel and recurrent kernel have bits each. The layer
    runs as it is, with its kernels' values replaced for the time of the call; so a recurrent
    layer's are rounded once, and not at every time step.

    Kernels are those of Keras's dense, embedding and convolutional layers and recurrent cells,
    and of classes derived from them. Layers inside that learn their bits themselves are left
    alone.

    Args:
        layer: `keras.layers.Layer`; called as this wrapper is.
        exclude: Kernels that stay as they are: patterns, as `fnmatch` takes them, of paths
            inside the layer, e.g. `"query/*"`, or numbers of kernels in their order. (Names that
            Keras made up may be others when a model is loaded, so files hold the numbers.)
        **kwargs: `bits`, `min_bits`, `max_bits`, `kernel_quantizer` and `name`.

    Raises:
        ValueError: As for every learned-bit layer; or, when it is built, the layer has no kernel
            to quantize, or one that is no float variable.

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
        set_hidden(self, "layer", layer)
        # The inner layer casts its inputs and variables according to its own policy.
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
        while name in self.quantized_kernels:
            name += "_"
        self.quantize_weight(name, kernel, weight.axes_of(layer), name.replace("/", ".") + "_")

    def __call__(self, *args, **kwargs):
        if not self.quantized_kernels:  # `built` is True for a layer that Keras has restored
            # Outside of the graph that a step may be traced in, as Keras builds its layers.
            with tf.init_scope():
                if not is_built(self.layer):
                    # Only the layer itself knows how to build itself from its arguments.
                    self.layer(*keras.tree.map_structure(_symbolic, args),
                               **keras.tree.map_structure(_symbolic, kwargs))  # fmt: skip
                self.build()
        return super().__call__(*args, **kwargs)

    @property
    def call(self):
        """The layer's `call` with quantized kernels; of the same signature."""

        def call(*args, **kwargs):
            return self._call_quantized(*args, **kwargs)

        return functools.update_wrapper(call, self.layer.call)

    def _call_quantized(self, *args, **kwargs):
        kernels = [(k.kernel, k.used_by_layer()) for k in self.quantized_kernels.values()]
        with ReplacedValues(kernels, self._refuse_assignment) as scope:
            outputs = self.layer(*args, **kwargs)
        for loss in scope.losses:
            # A new tensor: keras/src/layers/layer.py collects losses by the `id` of their tensors,
            # and would add a loss only once that several layers share.
            self.add_loss(tf.identity(loss))
        return outputs

    def _refuse_assignment(self, kernel):
        raise ValueError(
            "A layer whose `call` assigns to its kernel cannot be quantized, because it would be "
            "rounded before the assignment; exclude it, or have it compute with a changed kernel. "
            f"Received: an assignment to {kernel.path!r} in layer {self.name!r}"
        )

    @property
    def metrics(self):
        """None: Keras collects those of layers inside itself, and leaves those of models out."""
        return []

    def reset_state(self):
        """Resets the states of stateful recurrent layers inside, as those do."""
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
            float32: Whether it computes in float32 if the layer is of a mixed precision.
        """
        return copy_layer(self.layer, **dtype_setting(self.layer, float32))

    def get_build_config(self):
        return {"layer": self.layer.get_build_config()}

    def build_from_config(self, config):
        if build_without_call(self.layer, config["layer"]):
            self.build()

    def get_config(self):
        config = super().get_config()
        del config["dtype"]
        layer = keras.saving.serialize_keras_object(self.layer)
        layer.pop("build_config", None)
        return {**config, "layer": layer, "exclude": self.exclude}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        layer = keras.saving.deserialize_keras_object(config["layer"], custom_objects)
        return cls(**{**config, "layer": layer})


def _matches(item, number, name):
    """Whether an item of `exclude` names a kernel, by pattern or by number."""
    return fnmatch.fnmatch(name, item) if isinstance(item, str) else item == number


def is_built(layer):
    """Whether a layer and all that it holds are built."""
    return all(each.built for each in layers_inside(layer))


def build_without_call(layer, build_config):
    """Builds a layer and the layers inside, as far as Keras can before the layer is called.

    Args:
        layer: `keras.layers.Layer`.
        build_config: Dictionary, the `get_build_config` of a built layer of this kind; or None.

    Returns:
        Whether all of them are built.
    """
    builds_when_called = type(layer).build is keras.layers.Layer.build
    if isinstance(layer, keras.Model) or not builds_when_called:
        if build_config and not is_built(layer):
            layer.build_from_config(build_config)
        # Keras does not set `built` of models that are built by calling them.
        layer.built = layer.built or all(
            each.built for each in layers_inside(layer) if each is not layer
        )
    return is_built(layer)


def _symbolic(value):
    """A symbolic tensor in the place of a tensor or an array."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return keras.KerasTensor(value.shape, keras.backend.standardize_dtype(value.dtype))
    return value

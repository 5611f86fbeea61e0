"""`to_keras`: converts a learned-bit model to plain Keras layers."""

import keras

from keras_learnbits.conversion.copying import Copier, build_like, from_config, is_graph, like
from keras_learnbits.layers.activation import LearnedBitActivation
from keras_learnbits.layers.base import LearnedBitMixin, OwnsBits, keras_twin
from keras_learnbits.layers.checks import is_masked
from keras_learnbits.layers.discovery import quantized_kernels
from keras_learnbits.layers.float_weights import assign_all, float_weights
from keras_learnbits.layers.traversal import layers_inside
from keras_learnbits.layers.wrapper import LearnedBitWrapper
from keras_learnbits.training.model import LearnedBitSubclassed


def to_keras(model, float32=False):
    """The model in plain Keras layers that hold the quantized weights.

    It predicts what the model predicts, and loads without this library.

    Args:
        model: A built Keras model with learned-bit layers.
        float32: Whether layers of a mixed precision are to compute in float32.

    Returns:
        A new Keras model, not compiled: Sequential, functional, or of the class that was
        converted. A Sequential model with a `LearnedBitActivation` becomes a functional one, in
        which operations of `keras.ops` do what that layer does.

    Raises:
        ValueError: The model is not built, or has no learned-bit layer; or no training data
            flowed yet through a `LearnedBitActivation`, or a mask does, which `keras.ops` lose.

    Examples:
        >>> model = keras_learnbits.LearnedBitSequential(
        ...     [keras.Input((8,)), keras_learnbits.LearnedBitDense(2, bits=1)])
        >>> plain = to_keras(model)
        >>> type(plain.layers[0]).__name__, len(np.unique(plain.layers[0].kernel))
        ('Dense', 4)
    """
    return plain_copy(model, float32)[0]


def plain_copy(model, float32=False):
    """`to_keras`, and which weight became which.

    Args:
        model: As for `to_keras`.
        float32: As for `to_keras`.

    Returns:
        The plain model, and a dictionary of the `id` of each of the model's weights, bits and
        scales left out, to the plain model's.

    Raises:
        ValueError: As for `to_keras`.
    """
    if not isinstance(model, keras.Model) or not model.built or not quantized_kernels(model):
        raise ValueError(
            "`to_keras` needs a built Keras model with at least one learned-bit layer. "
            f"Received: model={model!r}"
        )
    copier = _ToKeras(float32)
    plain = copier.copy(model)
    ours = OwnsBits, LearnedBitActivation
    left = [layer.name for layer in layers_inside(plain) if isinstance(layer, ours)]
    if left:
        raise ValueError(
            "`to_keras` replaces learned-bit layers of a model, not those that you put inside "
            f"other layers. Received: model={model.name!r}, with {left} inside"
        )
    return plain, {id(old): new for old, new in copier.weight_pairs()}


class _ToKeras(Copier):
    """Puts plain layers with quantized weights in the place of learned-bit layers."""

    def __init__(self, float32):
        super().__init__()
        self.float32 = float32

    def copy(self, model):
        plain = super().copy(model)
        for layer in layers_inside(plain) if self.float32 else ():
            if layer.dtype_policy.name.startswith("mixed_"):
                layer.dtype_policy = "float32"
        return plain

    def rewires(self, model):
        return any(isinstance(layer, LearnedBitActivation) for layer in model.layers)

    def call(self, layer, *args, **kwargs):
        if isinstance(layer, LearnedBitActivation):
            (inputs,) = [*args, *(kwargs[name] for name in kwargs if name == "inputs")]
            if is_masked(inputs):
                raise ValueError(
                    "Operations of `keras.ops` do not pass on masks, so a quantized activation "
                    "behind a layer that masks cannot be put into plain Keras. "
                    f"Received: layer={layer.name!r}"
                )
            return layer.plain(inputs, "float32" if self.float32 else None)
        return layer(*args, **kwargs)

    def layer(self, layer):
        if isinstance(layer, LearnedBitActivation):
            return layer  # it is not called
        if isinstance(layer, LearnedBitWrapper):
            layer = layer.layer
        settings = {}
        if self.float32 and layer.dtype_policy.name.startswith("mixed_"):
            settings["dtype"] = "float32"  # by now, for layers that cast constants when built
        if isinstance(layer, LearnedBitMixin):
            config = {**layer.get_config(), **settings}
            for setting in ("bits", "min_bits", "max_bits", "kernel_quantizer"):
                del config[setting]
            return keras_twin(type(layer)).from_config(config)
        return from_config(type(layer), layer, settings)

    def holder(self, model):
        if not isinstance(model, LearnedBitSubclassed):
            raise ValueError(
                "Of models with a `call` of their own, `to_keras` converts those that "
                "`to_learned_bits` made; in others it cannot replace the layers. "
                f"Received: model={model.name!r}"
            )
        plain = like(model.wrapper.layer)
        build_like(model.wrapper.layer, plain)
        return plain

    def fill(self, old, new):
        if isinstance(old, LearnedBitSubclassed):
            old = old.wrapper
        if isinstance(old, LearnedBitWrapper):
            self.copy_state(old.layer, new)
        elif not isinstance(old, OwnsBits):
            if not is_graph(old):
                self.copy_state(old, new)
            return
        quantized = {id(k.kernel): k.quantized() for k in old.quantized_kernels.values()}
        weights = old.layer.weights if isinstance(old, LearnedBitWrapper) else float_weights(old)
        assign_all(new.weights, [quantized.get(id(weight), weight) for weight in weights])

"""A net of the experiments as a Keras model: in float, or with learned bits."""

import inspect

import keras
import tensorflow as tf

import keras_learnbits as klb


def float_model(net, name):
    """The net of Keras layers.

    Args:
        net: Function `build(Conv2D, Dense)` that returns inputs and outputs; it may also take
            `DepthwiseConv2D`.
        name: Name of the model.
    """
    return keras.Model(*net(**_layers(net, lambda layer: getattr(keras.layers, layer))), name=name)


def quantized_model(net, name, recipe, fixed_bits=None, end_bits=None):
    """The net of learned-bit layers.

    Args:
        net: Function `build(Conv2D, Dense)`, as for `float_model`.
        name: Name of the model.
        recipe: `recipes.Recipe`, with the quantizer and the bounds of the bits.
        fixed_bits: Integer, fixed bits of all layers; None if they are learned.
        end_bits: Integer, fixed bits of the first and the last layer instead.
    """
    plain = float_model(net, name).layers if end_bits else []
    names = [layer.name for layer in plain if hasattr(layer, "kernel")]

    def with_bits(layer):
        cls = getattr(klb, f"LearnedBit{layer}")

        def build(*args, name, **kwargs):
            bits = end_bits if name in names[:1] + names[-1:] else fixed_bits
            return cls(*args, name=name, **_widths(recipe, bits), **kwargs)

        return build

    return klb.LearnedBitModel(*net(**_layers(net, with_bits)), name=name)


def with_quantized_activations(net, name, recipe, activation_bits, fixed_bits=None):
    """The net with learned bits, and with quantized inputs of all layers.

    The input of the first layer and the operands of sums have 8 bits.

    Args:
        net, name, recipe, fixed_bits: As for `quantized_model`.
        activation_bits: Integer, fixed bits of the other inputs.
    """
    plain = float_model(net, name)
    first, *others = (layer.name for layer in plain.layers if hasattr(layer, "kernel"))
    widths = _widths(recipe, fixed_bits)
    # The first conversion also quantizes the operands of sums.
    model = klb.to_learned_bits(plain, include=first, activations=_fixed(8), **widths)
    if not others:
        return model
    return klb.to_learned_bits(model, exclude=first, activations=_fixed(activation_bits), **widths)


def take_weights(model, other):
    """Copies weights, scales and bits from another model with layers of the same names.

    Args:
        model: Model that takes them; it may have further layers, such as quantized activations.
        other: Model whose layers all exist in `model`.
    """
    for layer in other.layers:
        if layer.weights:
            model.get_layer(layer.name).set_weights(layer.get_weights())


class BatchNormalization(keras.layers.BatchNormalization):
    """Keras's layer, with TensorFlow's fused operation in training, for inputs `(N, H, W, C)`.

    Keras computes moments and normalization by a dozen operations in float32 that are bound by
    memory; `python experiments/fused.py` measures what this saves. Files hold Keras's layer.
    """

    def call(self, inputs, training=None, mask=None):
        if not (training and self.trainable):
            return super().call(inputs, training=False, mask=mask)
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=self.gamma,
            offset=self.beta,
            mean=[],
            variance=[],
            epsilon=self.epsilon,
            is_training=True,
        )
        # The operation returns the unbiased variance, and Keras keeps the biased one.
        number = tf.cast(tf.size(inputs) / inputs.shape[-1], tf.float32)
        variance *= (number - 1) / number
        for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(self.momentum * moving + (1 - self.momentum) * batch)
        return outputs


# Keras saves the module and the name of a class. With Keras's module, files do not need this one.
BatchNormalization.__module__ = "keras.layers"


def distillation(distance):
    """The distance of a model's logits from those of its teacher.

    Args:
        distance: `"divergence"` or `"squared_error"`.
    """
    # If a divergence is given by name, Keras 3.15.1 applies it to logits instead of probabilities.
    temperature, loss = {
        "divergence": (2.0, keras.losses.KLDivergence(reduction=None)),
        "squared_error": (1.0, keras.losses.MeanSquaredError(reduction=None)),
    }[distance]
    return keras.distillation.LogitsDistillation(temperature, loss=loss)


def _layers(net, make):
    """Dictionary of the names of the layer classes that a net takes to the results of `make`."""
    names = {"Conv2D", "Dense", "DepthwiseConv2D"} & {*inspect.signature(net).parameters}
    return {name: make(name) for name in names}


def _widths(recipe, bits):
    """Arguments of layers: the quantizer, and fixed bits or those of the recipe."""
    fixed = _fixed(bits) if bits else {}
    return {"kernel_quantizer": recipe.kernel_quantizer, **recipe.widths, **fixed}


def _fixed(bits):
    return dict.fromkeys(("bits", "min_bits", "max_bits"), bits)

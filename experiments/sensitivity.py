"""Increase of the loss if one layer of a float model is rounded, and all others are not."""

import numpy as np
import tensorflow as tf

import keras_learnbits as klb


def sensitivities(float_model, data, loss, widths):
    """Increase of the loss by rounding each layer alone: dictionary of layer to a list over widths.

    Args:
        float_model: Keras model; it is unchanged afterwards.
        data: Iterable of batches of images and labels, all of one size.
        loss: Keras loss.
        widths: List of bit-widths to round to.
    """

    @tf.function
    def loss_on(x, y):
        return loss(y, float_model(x, training=True))

    def mean_loss():
        return float(np.mean([loss_on(x, y) for x, y in data]))

    before = float_model.get_weights()  # with the moving statistics
    whole, added = mean_loss(), {}
    for width in widths:
        rounded = klb.to_keras(klb.to_learned_bits(float_model, bits=width))
        for layer in float_model.layers:
            if not hasattr(layer, "kernel"):
                continue
            layer.set_weights(rounded.get_layer(layer.name).get_weights())
            added.setdefault(layer.name, []).append(mean_loss() - whole)
            float_model.set_weights(before)
    return added

"""Augmentation of example inputs; the float model provides the outputs to imitate."""

import keras
import numpy as np
import tensorflow as tf

# Inputs with one of these numbers of channels are treated as images.
IMAGE_CHANNELS = (1, 3, 4)
# Largest shift of an image, as a fraction of its height and width.
SHIFT = 1 / 16


def can_be_varied(examples):
    """Whether examples can be augmented; integers such as tokens and categories cannot.

    Args:
        examples: Structure of arrays. Float arrays of rank 1 or 2 count as integers if they have no
            fractions.
    """
    return not any(map(_are_integers, keras.tree.flatten(examples)))


def _are_integers(array):
    if array.dtype.kind != "f":
        return True
    return array.ndim <= 2 and bool(np.all(array == np.round(array)))


def varied(batch, seed):
    """Augments a batch, so that few examples represent many.

    All images of a batch are shifted by the same few pixels, and half of them are mirrored. Then
    half of the examples are mixed with another one, as in mixup (arXiv 1710.09412).

    Args:
        batch: Structure of float tensors of shape `(batch_size, ...)`. Tensors of rank 4 with 1, 3
            or 4 channels in the last axis are images.
        seed: Tensor of two integers.

    Returns:
        Structure of tensors of the same shapes.
    """
    shared = tf.shape(keras.tree.flatten(batch)[0])[0]
    flipped = tf.random.stateless_uniform([shared], seed + 1) < 0.5
    share = tf.maximum(tf.random.stateless_uniform([shared], seed + 2, -0.5, 0.5), 0.0)
    return keras.tree.map_structure(
        lambda each: _mixed(_moved(each, seed, flipped) if _are_images(each) else each, share),
        batch,
    )


def _are_images(tensor):
    return tensor.shape.rank == 4 and tensor.shape[-1] in IMAGE_CHANNELS


def _moved(images, seed, flipped):
    size = images.shape[1:3]
    most = [int(SHIFT * each) for each in size]
    padding = [[0, 0], *([each, each] for each in most), [0, 0]]
    padded = tf.pad(images, padding, mode="REFLECT")
    row, column = (
        tf.random.stateless_uniform([], seed + 3 + axis, 0, 2 * each + 1, tf.int32)
        for axis, each in enumerate(most)
    )
    moved = padded[:, row : row + size[0], column : column + size[1]]
    moved = tf.ensure_shape(moved, images.shape)
    return tf.where(tf.reshape(flipped, [-1, 1, 1, 1]), moved[:, :, ::-1], moved)


def _mixed(tensor, share):
    """Each example mixed with the one before it, by its share."""
    ones = tf.ones([tensor.shape.rank - 1], tf.int32)
    share = tf.cast(tf.reshape(share, tf.concat([[-1], ones], 0)), tensor.dtype)
    return (1 - share) * tensor + share * tf.roll(tensor, 1, axis=0)

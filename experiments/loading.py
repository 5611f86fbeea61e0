"""Data of the programs: from `tensorflow_datasets` to batches."""

import os

import keras
import numpy as np
import tensorflow as tf
from absl import logging


def dataset(images, labels, batch_size, augment=None, shuffle_seed=None):
    """Batches of float images and one-hot labels, read from memory.

    Args:
        images: Array of images, uint8 or float.
        labels: Array of integers.
        batch_size: Number of examples per batch.
        augment: Function of a batch of images and a seed to a batch of images, or None.
        shuffle_seed: Seed of order and augmentation; with None the order is not changed.
    """
    scale = 1 / 255 if images.dtype == np.uint8 else 1.0
    # Tensors are captured by the function below; arrays would be copied for every batch.
    images, labels = tf.constant(images), tf.constant(keras.utils.to_categorical(labels))

    def batch(indices, seed):
        x = tf.gather(images, indices)
        x = augment(x, seed) if augment is not None else x
        return tf.cast(x, tf.float32) * scale, tf.gather(labels, indices)

    indices = tf.data.Dataset.range(len(images))
    if shuffle_seed is not None:
        indices = indices.shuffle(len(images), seed=shuffle_seed)
    # One seed per batch, so that batches that are made in parallel are the same in every run.
    seeds = tf.data.Dataset.random(shuffle_seed or 0, rerandomize_each_iteration=True).batch(2)
    batches = tf.data.Dataset.zip(indices.batch(batch_size), seeds)
    options = tf.data.Options()
    options.autotune.enabled = False  # it keeps `fit` waiting at the end of each epoch
    return batches.map(batch, num_parallel_calls=2).prefetch(4).with_options(options)


def shifted(images, seed, by, flip=False):
    """Shifts each image by up to `by` pixels, edges reflected, and may flip half of them.

    Args:
        images: Tensor of shape `(batch_size, height, width, channels)`.
        seed: Integer tensor of two elements.
        by: Largest shift in each direction, in pixels.
        flip: Whether to mirror images left to right, each with probability one half.

    Returns:
        Images of the same shape.
    """
    batch, (height, width, channels) = tf.shape(images)[0], images.shape[1:]

    def draw(salt, low, high):
        return tf.random.stateless_uniform((batch, 1), seed + salt, low, high, tf.int32)

    def reflected(size, offset):
        return size - 1 - tf.abs(size - 1 - tf.abs(tf.range(size) + offset))

    rows = reflected(height, draw(0, -by, by + 1))
    columns = reflected(width, draw(1, -by, by + 1))
    if flip:
        columns = tf.where(draw(2, 0, 2) == 1, width - 1 - columns, columns)
    pixels = tf.reshape(rows[:, :, None] * width + columns[:, None, :], (batch, -1))
    images = tf.reshape(images, (batch, height * width, channels))
    images = tf.gather(images, pixels, axis=1, batch_dims=1)
    return tf.reshape(images, (batch, height, width, channels))


def cut_out(images, seed, size):
    """Blackens a square of each image (arXiv 1708.04552), which may lie partly outside.

    Args:
        images: Tensor of shape `(batch_size, height, width, channels)`.
        seed: Integer tensor of two elements.
        size: Edge of the square in pixels.

    Returns:
        Images of the same shape.
    """

    def inside(length, salt):
        shape = (tf.shape(images)[0], 1)
        start = tf.random.stateless_uniform(shape, seed + salt, 0, length, tf.int32) - size // 2
        return tf.logical_and(tf.range(length) >= start, tf.range(length) < start + size)

    rows, columns = inside(images.shape[1], 3), inside(images.shape[2], 4)
    square = tf.logical_and(rows[:, :, None], columns[:, None, :])
    return tf.where(square[..., None], tf.zeros_like(images), images)


def load_tfds(name, data_dir):
    """Train and test arrays of a dataset of tensorflow_datasets.

    Raises:
        FileNotFoundError: The data are missing; the message says how to get them.
    """
    import tensorflow_datasets as tfds

    logging.set_verbosity(logging.ERROR)
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR")
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        arrays = tfds.as_numpy(
            builder.as_dataset(split=["train", "test"], batch_size=-1, as_supervised=True)
        )
    except (AssertionError, FileNotFoundError, ValueError) as error:
        raise FileNotFoundError(
            f"No {name} found in {data_dir or '~/tensorflow_datasets'}: point --data_dir or "
            f"TFDS_DATA_DIR at prepared data, or prepare them with `tfds build {name}`; "
            "experiments/digits.py needs no download."
        ) from error
    return arrays

"""Losses of one replica and of all replicas, under `tf.distribute`.

Keras divides the loss of a replica's examples by the number of replicas, so that gradients can be
summed over replicas:
https://www.tensorflow.org/tutorials/distribute/custom_training#define_the_loss_function
"""

import tensorflow as tf


def shared(loss):
    """The share of a loss that one replica adds to the sum over replicas.

    Args:
        loss: Scalar tensor, the mean over this replica's examples.
    """
    return loss / _replicas()


def unshared(loss):
    """The mean over this replica's examples, from the share that it adds to the sum.

    Args:
        loss: Scalar tensor, as `compute_loss` returns it.
    """
    return loss * _replicas()


def _replicas():
    return tf.distribute.get_strategy().num_replicas_in_sync

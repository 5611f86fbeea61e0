"""Structures of arrays, and the outputs of models for them."""

import itertools

import keras
import numpy as np
import tensorflow as tf

from keras_learnbits.training.counterfactual import training_argument

# Examples per call of a model.
BATCH = 128


def in_inference(model, inputs):
    """Outputs of a model in inference mode, whether or not its `call` takes `training`."""
    return model(inputs, **training_argument(model.call, False))


def outputs_of(model, inputs):
    """Outputs of a model in inference mode, in a call that leaves nothing in the model.

    Otherwise `model.losses` would hold tensors of the graph that the call was traced in, and the
    states of random numbers would advance.
    """
    with keras.StatelessScope(initialize_variables=False):
        return in_inference(model, inputs)


class Predictor:
    """Outputs of a model in inference mode, as arrays; the model is traced once, and unchanged.

    Args:
        model: A Keras model.

    Attributes:
        model: The model.
    """

    def __init__(self, model):
        self.model = model

        @tf.function(reduce_retracing=True, autograph=False)
        def outputs(batch):
            return outputs_of(model, batch)

        self._outputs = outputs

    def __call__(self, examples):
        """The outputs for a structure of arrays, also a structure of arrays."""
        parts = [self._outputs(as_tensors(batch)) for batch in batches_of(examples)]
        return keras.tree.map_structure(lambda *each: np.concatenate(each), *parts)


def batches_of(examples, size=BATCH):
    """Yields batches of a structure of arrays, of at most `size` examples and nearly equal size."""
    total = size_of(examples)
    edges = np.linspace(0, total, -(-total // size) + 1).astype(int)
    for pair in itertools.pairwise(edges):
        yield rows(examples, slice(*pair))


def rows(structure, index):
    """Some rows of each array of a structure."""
    return keras.tree.map_structure(lambda each: each[index], structure)


def size_of(structure):
    """Number of examples in a structure of arrays."""
    return len(keras.tree.flatten(structure)[0])


def as_tensors(structure):
    """A structure of tensors of a structure of arrays."""
    return keras.tree.map_structure(tf.convert_to_tensor, structure)

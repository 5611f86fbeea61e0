"""Finds and names the quantized tensors of a model."""

import itertools

from keras_learnbits._keras import mark, marked
from keras_learnbits.layers.quantized_tensors import QuantizedKernel


def quantized_tensors(model):
    """All quantized tensors of a model or layer: kernels, then activations.

    Args:
        model: A built Keras model or layer; of a distiller the student is used.

    Returns:
        List of `QuantizedTensor`, each once, in the order of the variables.
    """
    marking = _marking(model)
    return kernels_among(marking) + activations_among(marking)


def quantized_kernels(model):
    """All quantized kernels of a model or layer, each once, in the order of the variables.

    Args:
        model: A built Keras model or layer; of a distiller the student is used.

    Returns:
        List of `QuantizedKernel`.
    """
    return kernels_among(_marking(model))


def kernels_among(tensors):
    """The kernels in a list of `QuantizedTensor`s."""
    return [tensor for tensor in tensors if isinstance(tensor, QuantizedKernel)]


def activations_among(tensors):
    """The activations in a list of `QuantizedTensor`s."""
    return [tensor for tensor in tensors if not isinstance(tensor, QuantizedKernel)]


def learner_of(model):
    """The model whose bits are learned: the student of a distiller, otherwise the model itself."""
    return model.bit_learner() if hasattr(model, "bit_learner") else model


def _marking(model):
    # Found by their variables, because Keras lists the variables of a model but not all the layers
    # in it, such as those in lists or in layers of other libraries.
    owners = [quantized_tensor_of(variable) for variable in learner_of(model).variables]
    return list({id(owner): owner for owner in owners if owner is not None}.values())


def unique_names(tensors):
    """Names for logs and tables: names of layers, or their paths if names repeat.

    Args:
        tensors: List of `QuantizedTensor`.

    Returns:
        List of different strings, one for each tensor.
    """
    names = [tensor.name() for tensor in tensors]
    if len(set(names)) < len(names):
        names = [tensor.name(of_layer=tensor.layer.path) for tensor in tensors]
    repeated = {name for name in names if names.count(name) > 1}
    return [f"{name}_{index}" if name in repeated else name for index, name in enumerate(names)]


def free_name(name, taken):
    """The name, or if it is taken the name with the lowest free number.

    Args:
        name: String.
        taken: Set of names, to which the new one is added.

    Examples:
        >>> taken = set()
        >>> [free_name(name, taken) for name in ("a", "b", "a")]
        ['a', 'b', 'a_1']
    """
    numbered = (f"{name}_{number}" for number in itertools.count(1))
    free = next(each for each in itertools.chain([name], numbered) if each not in taken)
    taken.add(free)
    return free


def mark_variables(tensor, *variables):
    """Marks variables, so that their quantized tensor can be found; None is skipped."""
    for variable in variables:
        if variable is not None:
            mark(variable, tensor)


def quantized_tensor_of(variable):
    """The `QuantizedTensor` whose bit-width or scales a variable contains, or None."""
    return marked(variable)


def without_fixed_scales(variables):
    """The variables without the scales of kernels that are not trained."""
    # A `LearnedBitWrapper` has the scales of a kernel that belongs to a layer inside. Freezing that
    # layer does not freeze the variables of the wrapper.
    tensors = [quantized_tensor_of(variable) for variable in variables]
    return [
        variable
        for variable, tensor in zip(variables, tensors, strict=True)
        if tensor is None or tensor.trainable
    ]

"""A model as a function of its inputs and its quantized kernels, for all exporters.

Converters fold constants: a batch norm into the kernel before it, a transposition into the kernel
itself. Integers would be lost in this way. So a model is converted with its quantized kernels among
its *inputs*, which no converter can fold. Then an exporter replaces each such input by integers and
the operators that decode them.
"""

import json

import keras
import tensorflow as tf

from keras_learnbits._keras import (
    inputs_built_for,
    is_unnamed_input,
    layers_of_scope,
    symbolic_inputs,
)
from keras_learnbits._version import __version__
from keras_learnbits.conversion.to_keras import plain_copy
from keras_learnbits.export._weights import check_finite
from keras_learnbits.layers.discovery import (
    activations_among,
    free_name,
    quantized_kernels,
    quantized_tensors,
    unique_names,
)
from keras_learnbits.layers.traversal import layers_inside

# The key of the library's entry among the metadata of a file.
METADATA = "keras_learnbits"


class ModelFunction:
    """A model's predictions as a function of its inputs and its quantized kernels.

    Args:
        model: A built Keras model with learned-bit layers and float32 kernels. If it computes in a
            mixed precision, the function computes in float32.
        input_signature: Structure of `tf.TensorSpec` like the argument of the model; by default
            like its symbolic inputs, or float32 of the shapes that a model with a custom `call`
            was built for.

    Attributes:
        model: Model that was given.
        plain: Its copy in plain Keras layers.
        specs: List of `tf.TensorSpec`, one for each input.
        kernels: Dictionary of the names of the further arguments to `StoredKernel`.
        predict: `tf.function` of the inputs and the kernels, float32 tensors, to the outputs; the
            names of its arguments are those of `specs` and `kernels`.
        inputs: List of names of the inputs: dictionary keys, or the names of the model's `Input`s.
        outputs: List of names of the outputs: dictionary keys, or names of the last layers.

    Raises:
        ValueError: The model has no learned-bit layer or cannot be converted to plain Keras
            layers; a weight is not finite; a kernel is not float32; the shape of the inputs is
            unknown and there is no `input_signature`.
    """

    def __init__(self, model, input_signature=None):
        self.model = model
        self.plain, copies = plain_copy(model, float32=True)
        check_finite(model)
        kernels = quantized_kernels(model)
        named = list(zip(unique_names(kernels), kernels, strict=True))
        for name, kernel in named:
            if kernel.kernel.dtype != "float32":
                raise ValueError(
                    "Exports need float32 kernels; build the model with the policy float32 or a "
                    "mixed one and set its weights. "
                    f"Received: {kernel.kernel.dtype!r} in {name!r}"
                )
        self.kernels = {
            f"learned_bits_kernel_{number}": kernel.stored(name)
            for number, (name, kernel) in enumerate(named)
        }
        self._variables = [copies[id(kernel.kernel)] for kernel in kernels]
        if input_signature is None:
            input_signature = input_signature_of(model)
        self._signature = input_signature
        given = keras.tree.flatten(self._signature)
        self.inputs = _names(self._signature, [spec.name for spec in given], "input")
        # Names in TensorFlow's graphs must not have spaces, so exporters set the real names last.
        self.specs = [
            tf.TensorSpec(spec.shape, spec.dtype, f"learned_bits_input_{number}")
            for number, spec in enumerate(given)
        ]
        arguments = self.specs + [
            tf.TensorSpec(kernel.codes.shape, name=name) for name, kernel in self.kernels.items()
        ]
        self.predict = tf.function(self._predict, input_signature=arguments, autograph=False)
        self.predict.get_concrete_function()  # the trace sets `self._structure`
        self.outputs = _names(self._structure, _output_names(model), "output")

    def _predict(self, *tensors):
        inputs = keras.tree.pack_sequence_as(self._signature, tensors[: len(self.specs)])
        kernels = zip(self._variables, tensors[len(self.specs) :], strict=True)
        with keras.StatelessScope(list(kernels), initialize_variables=False):
            outputs = self.plain(inputs, training=False)
        self._structure = keras.tree.map_structure(lambda _: None, outputs)
        return keras.tree.flatten(outputs)

    def frozen(self, activation_twin=None):
        """The function of the inputs alone, with all weights as constants.

        Converters fold constants, and runtimes prepare them when they load a file; neither does so
        with variables.

        Args:
            activation_twin: Function from a `LearnedBitActivation` to the function that computes
                it; by default operations of `keras.ops`.

        Returns:
            Concrete function.
        """
        plain = self.plain
        if activation_twin is not None:
            plain, _ = plain_copy(self.model, True, activation_twin)
        constants = [(variable, variable.numpy()) for variable in plain.weights]

        def predict(*tensors):
            inputs = keras.tree.pack_sequence_as(self._signature, tensors)
            with keras.StatelessScope(constants, initialize_variables=False):
                return keras.tree.flatten(plain(inputs, training=False))

        function = tf.function(predict, input_signature=self.specs, autograph=False)
        return function.get_concrete_function()

    def predictions(self, inputs):
        """The predictions that a file must make.

        They are the model's, or those of its float32 copy if the model computes in a mixed
        precision.

        Args:
            inputs: List of arrays, one for each input.

        Returns:
            List of arrays, one for each output.
        """
        if any(layer.compute_dtype != "float32" for layer in layers_inside(self.model)):
            return self.predictions_at(inputs, [each.levels for each in self.kernels.values()])
        return predictions_of(self.model, self._signature, inputs)

    def predictions_at(self, inputs, kernels):
        """The predictions with other kernels.

        Args:
            inputs: List of arrays, one for each input.
            kernels: List of float32 arrays, one for each of `kernels`.
        """
        return [each.numpy() for each in self.predict(*map(tf.constant, [*inputs, *kernels]))]

    def layer_of(self, node):
        """The layer that a node of TensorFlow's graph comes from, for errors.

        Args:
            node: Name of the node, which begins with the scopes of its layers, e.g.
                `"functional_1/block_1/dense_1/Erfc"`.

        Returns:
            Name of the innermost layer; that of the node if no layer is found.
        """
        layers = {layer.name for layer in layers_inside(self.plain) if layer is not self.plain}
        for scope in reversed(node.split("/")):
            for name in layers_of_scope(scope):
                if name in layers:
                    return name
        return node

    def metadata(self):
        """JSON for the metadata of a file: library, version, and the bits of each layer."""
        tensors = activations_among(quantized_tensors(self.model))
        widths = [int(tensor.integer_bits()) for tensor in tensors]
        entries = {
            "library": METADATA,
            "version": __version__,
            "bits": {kernel.name: kernel.bits for kernel in self.kernels.values()},
            "activation_bits": dict(zip(unique_names(tensors), widths, strict=True)),
        }
        return json.dumps({key: value for key, value in entries.items() if value})


def predictions_of(model, signature, inputs):
    """Predictions of a model with its recurrent states at zero; the model does not change.

    Args:
        model: A built Keras model.
        signature: Structure of the model's argument.
        inputs: List of arrays, one for each leaf of the signature.

    Returns:
        List of arrays, one for each output.
    """
    tensors = [tf.constant(each) for each in inputs]
    recurrent = [layer for layer in layers_inside(model) if isinstance(layer, keras.layers.RNN)]
    states = [state for layer in recurrent if layer.stateful for state in layer.states]
    with keras.StatelessScope([(state, keras.ops.zeros_like(state)) for state in states]):
        outputs = model(keras.tree.pack_sequence_as(signature, tensors), training=False)
    return [each.numpy() for each in keras.tree.flatten(outputs)]


def input_signature_of(model):
    """Structure of `tf.TensorSpec` that a model was built for.

    Args:
        model: A built Keras model.

    Raises:
        ValueError: The shapes are unknown.
    """
    inputs = symbolic_inputs(model)
    if inputs is not None:
        return keras.tree.map_structure(lambda x: tf.TensorSpec(x.shape, x.dtype, x.name), inputs)
    inputs = inputs_built_for(model)
    if inputs is None:
        raise ValueError(
            "A model with a custom `call` needs an `input_signature`, a structure of "
            "`tf.TensorSpec` like its argument, unless its `get_build_config` has the shape of a "
            f"single argument. Received: model={model.name!r}"
        )
    # The batch size that the model was built with is arbitrary.
    return keras.tree.map_structure(lambda x: tf.TensorSpec((None, *x.shape[1:])), inputs)


def _output_names(model):
    """Names of the layers that return a model's outputs, in order; none if it has no graph."""
    if isinstance(model, keras.Sequential):
        return [model.layers[-1].name]
    return getattr(model, "output_names", [])


def _names(structure, known, otherwise):
    """Unique names for the leaves of a structure, in order.

    Args:
        structure: Nested dictionaries, lists and tuples.
        known: List of names for leaves without a key. It is ignored if its length is wrong.
        otherwise: Name of leaves that have neither; numbered if there are several leaves.
    """
    paths = [path for path, _ in keras.tree.flatten_with_path(structure)]
    names, taken = [], set()
    for index, path in enumerate(paths):
        name = known[index] if len(known) == len(paths) else None
        if any(isinstance(key, str) for key in path):
            name = "/".join(map(str, path))
        elif name is None or is_unnamed_input(name):
            name = otherwise if len(paths) == 1 else f"{otherwise}_{index}"
        names.append(free_name(name, taken))
    return names

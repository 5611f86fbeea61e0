"""What the exporters share: a model as a function of its inputs and its quantized kernels.

Converters fold constants: a batch norm into the kernel before it, a transposition into the
kernel itself. Integers would be lost, or would have to be found again. So a model is converted
with its quantized kernels among its *inputs*, where no converter can touch them; then an exporter
puts integers, and what decodes them, in the place of each such input.
"""

import json
import re

import keras
import tensorflow as tf

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
# What Keras calls the tensor of an `Input` without a name; it numbers those of a whole process.
UNNAMED_INPUT = re.compile(r"keras_tensor(_\d+)?")


class ModelFunction:
    """A model's predictions as a function of its inputs and its quantized kernels.

    Args:
        model: A built Keras model with learned-bit layers and float32 kernels. Where it computes
            in a mixed precision, the function computes in float32.
        input_signature: Structure of `tf.TensorSpec`, the argument that the model is called
            with; by default that of the model's symbolic inputs, or one of the shapes that a
            model with a `call` of its own was built for.

    Attributes:
        model: The model.
        plain: Its copy in plain Keras layers.
        specs: List of `tf.TensorSpec`, one for each input.
        kernels: Dictionary of the names of the further arguments to `StoredKernel`.
        predict: `tf.function` of the inputs and the kernels, float32 tensors, to the outputs; the
            names of its arguments are those of `specs` and `kernels`.
        inputs: Names of the inputs as users of the model know them: dictionary keys, or the names
            of the model's `Input`s.
        outputs: Names of the outputs: dictionary keys, or the names of the layers they come from.

    Raises:
        ValueError: The model has no learned-bit layer or cannot be converted to plain Keras
            layers; a weight is not finite; a kernel is not of float32; the shape of the inputs is
            not known and there is no `input_signature`.
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
        # Exporters give the inputs these names last: names in TensorFlow's graphs take no spaces.
        self.specs = [
            tf.TensorSpec(spec.shape, spec.dtype, f"learned_bits_input_{number}")
            for number, spec in enumerate(given)
        ]
        arguments = self.specs + [
            tf.TensorSpec(kernel.codes.shape, name=name) for name, kernel in self.kernels.items()
        ]
        self.predict = tf.function(self._predict, input_signature=arguments)
        self.predict.get_concrete_function()  # notes the structure of the outputs
        self.outputs = _names(self._structure, _output_names(model), "output")

    def _predict(self, *tensors):
        inputs = keras.tree.pack_sequence_as(self._signature, tensors[: len(self.specs)])
        kernels = zip(self._variables, tensors[len(self.specs) :], strict=True)
        with keras.StatelessScope(list(kernels), initialize_variables=False):
            outputs = self.plain(inputs, training=False)
        self._structure = keras.tree.map_structure(lambda _: None, outputs)
        return keras.tree.flatten(outputs)

    def predictions(self, inputs):
        """What a file must predict.

        These are the model's own predictions, or those of its float32 copy if the model computes
        in a mixed precision.

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
            node: Name of the node: the scopes of the layers that it lies in, e.g.
                `"functional_1/block_1/dense_1/Erfc"`.

        Returns:
            Name of the innermost layer; that of the node if it lies in none.
        """
        layers = {layer.name for layer in layers_inside(self.plain) if layer is not self.plain}
        for scope in reversed(node.split("/")):
            # A call opens the scope of its layer twice, so that TensorFlow adds a number to it.
            for name in (re.sub(r"_\d+$", "", scope), scope):
                if name in layers:
                    return name
        return node

    def metadata(self):
        """What a file says of itself: JSON of the library, its version, and the bits."""
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
    """What a model predicts, with the states of stateful layers at zero; nothing in it changes.

    Args:
        model: A built Keras model.
        signature: Structure that the model is called with.
        inputs: List of arrays, one for each of the signature.

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
        ValueError: It is not known.
    """
    if hasattr(model, "inputs"):
        # A Sequential that was built and not yet called has no `input`.
        given = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
        return keras.tree.map_structure(lambda x: tf.TensorSpec(x.shape, x.dtype, x.name), given)
    shapes = (model.get_build_config() or {}).get("input_shape")
    if shapes is None:
        raise ValueError(
            "A model with a `call` of its own needs an `input_signature`, a structure of "
            "`tf.TensorSpec` that it can be called with, if its `get_build_config` does not have "
            f"the shape of a single argument. Received: model={model.name!r}"
        )
    return _specs_of(shapes)


def _specs_of(shapes):
    """Specs of float32 tensors of a structure of shapes, with any number of examples."""
    if isinstance(shapes, dict):
        return {key: _specs_of(each) for key, each in shapes.items()}
    if all(size is None or isinstance(size, int) for size in shapes):
        return tf.TensorSpec((None, *shapes[1:]))
    return [_specs_of(each) for each in shapes]


def _output_names(model):
    """Names of the layers that a model's outputs come from, in order; none if it has no graph."""
    if isinstance(model, keras.Sequential):
        return [model.layers[-1].name]
    return getattr(model, "output_names", [])


def _names(structure, known, otherwise):
    """Different names for what is in a structure, in order.

    Args:
        structure: Nested dictionaries, lists and tuples.
        known: As many names, which take the place of keys where there are none, or None.
        otherwise: Name where neither is known; numbered if there are several.
    """
    paths = [path for path, _ in keras.tree.flatten_with_path(structure)]
    names, taken = [], set()
    for index, path in enumerate(paths):
        name = known[index] if len(known) == len(paths) else None
        if any(isinstance(key, str) for key in path):
            name = "/".join(map(str, path))
        elif name is None or UNNAMED_INPUT.fullmatch(name):
            name = otherwise if len(paths) == 1 else f"{otherwise}_{index}"
        names.append(free_name(name, taken))
    return names

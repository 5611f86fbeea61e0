"""Selection of the layers to convert, and the report about the conversion."""

import fnmatch
import inspect
import math

import keras

from keras_learnbits._keras import FunctionalModel, is_hidden_graph
from keras_learnbits.layers.base import OwnsBits
from keras_learnbits.layers.traversal import layers_inside, path_of
from keras_learnbits.layers.twins import kernels_of
from keras_learnbits.tables import aligned_table
from keras_learnbits.training.fitting import LearnedBitTraining


class Selection:
    """Decides which layers of a model are converted.

    Selecting a layer or model selects all layers inside it.

    Args:
        model: A built Keras model.
        include: Pattern, layer, layer class, function, list of these, or None for all layers.
        exclude: Pattern, layer, layer class, function, list of these, or None for no layer.

    Attributes:
        reasons: Dictionary of layer to the reason why it is not converted; None if it is.
        names: Dictionary of layer to its path.

    Raises:
        ValueError: A pattern or class matches no layer, there is no layer to convert, or a layer
            to convert has integer weights or LoRA.
    """

    def __init__(self, model, include, exclude):
        # The functional model inside a Sequential one has a name that the user has never seen.
        chains = {
            layer: chain
            for layer, chain in layers_inside(model).items()
            if not (chain and is_hidden_graph(layer, (model, *chain)[-2]))
        }
        included = None if include is None else _selected(chains, include, "include")
        excluded = set() if exclude is None else _selected(chains, exclude, "exclude")
        self.reasons = {
            layer: _reason_to_leave(chain, included, excluded)
            for layer, chain in chains.items()
            if chain
        }
        self.names = {layer: path_of(chain) for layer, chain in chains.items()}
        if None not in self.reasons.values():
            raise ValueError(
                "`to_learned_bits` needs at least one layer to convert. Received:\n"
                f"{self.report({})}"
            )
        for layer, reason in self.reasons.items():
            if reason is None:
                _check_kernels(layer, self.names[layer])

    def wants(self, layer):
        """Whether a layer's own kernels are converted."""
        return layer in self.reasons and self.reasons[layer] is None

    def report(self, conversions, activations=(), sizes=None, notes=()):
        """What each layer with weights was converted to, or the reason why it was not.

        Args:
            conversions: Dictionary of each converted layer to a string, the result.
            activations: List of the inserted `LearnedBitActivation`s.
            sizes: Tuple of two numbers, of weights with learned bits and of all weights; or None.
            notes: Iterable of further strings.

        Returns:
            `ConversionReport`.
        """
        rows = []
        for layer, reason in self.reasons.items():
            weights = sum(math.prod(v.shape) for v in _own_variables(layer))
            if weights:
                conversion = conversions.get(layer, f"left: {reason}")
                rows.append((self.names[layer], type(layer).__name__, weights, conversion))
        rows += [(layer.name, "", 0, f"inserted {type(layer).__name__}") for layer in activations]
        return ConversionReport(rows, sizes, notes)


# The line that explains the columns of a printed report.
LEGEND = (
    "conversion: the new class, or why the layer is not converted; weights: number of parameters"
)


class ConversionReport:
    """The converted layers, and the others with reasons; prints as an aligned table.

    Attributes:
        rows: List of tuples: path of a layer, its class, the number of its own weights, and what
            it was converted to or the reason why it was not.
        learned_weights: Number of weights with learned bits; None before the conversion.
        float_weights: Number of weights that stay float, including biases.
        notes: List of strings: what the conversion does not keep, or could not check.
    """

    def __init__(self, rows, sizes=None, notes=()):
        self.rows = rows
        self.learned_weights, total = sizes or (None, None)
        self.float_weights = None if sizes is None else total - self.learned_weights
        self.notes = list(notes)

    def __str__(self):
        body = [(path, kind, what, f"{weights:,}") for path, kind, weights, what in self.rows]
        head = ("layer", "type", "conversion", "weights")
        lines = [aligned_table([[head], body], left=3), LEGEND]
        if self.learned_weights is not None:
            share = self.learned_weights / (self.learned_weights + self.float_weights)
            lines.append(
                f"{self.learned_weights:,} weights ({share:.1%}) with learned bits, "
                f"{self.float_weights:,} ({1 - share:.1%}) left float"
            )
        return "\n".join(lines + self.notes)

    __repr__ = __str__


# Methods that a learned-bit model defines. The conversion does not keep those of a custom class.
REPLACED = (
    "train_step",
    "test_step",
    "predict_step",
    "compute_loss",
    "compute_metrics",
    "compile",
    "fit",
    "metrics",
)


def left_behind(model):
    """Notes for the report: custom methods of a model that the conversion does not keep."""
    # `getattr_static` finds properties such as `metrics` without calling them.
    names = [
        name
        for name in REPLACED
        if not any(
            inspect.getattr_static(type(model), name) is inspect.getattr_static(kind, name)
            for kind in (keras.Model, keras.Sequential, FunctionalModel)
        )
    ]
    if not names or isinstance(model, LearnedBitTraining):
        return []
    return [f"not kept: {', '.join(names)} of class {type(model).__name__}"]


def _selected(chains, items, argument):
    """The layers that `include` or `exclude` selects, with all layers inside them."""
    matched = set()
    for item in items if isinstance(items, list | tuple | set) else [items]:
        matches = _matcher(item, argument)
        hits = {layer for layer, chain in chains.items() if chain and matches(layer, chain)}
        # A function may select nothing, but a name that matches nothing is a mistake.
        if not hits and isinstance(item, str | type | keras.layers.Layer):
            raise ValueError(
                f"`{argument}` must name layers of the model. Received: {argument}={item!r}, "
                f"layers={[path_of(chain) for chain in chains.values() if chain]}"
            )
        matched |= hits
    return {layer for layer, chain in chains.items() if matched.intersection(chain)}


def _matcher(item, argument):
    """A function of a layer and its chain: whether an item of `include` selects the layer."""
    if isinstance(item, str):
        return lambda layer, chain: (
            fnmatch.fnmatch(layer.name, item) or fnmatch.fnmatch(path_of(chain), item)
        )
    if isinstance(item, keras.layers.Layer):
        return lambda layer, chain: layer is item
    if isinstance(item, type):
        return lambda layer, chain: isinstance(layer, item)
    if callable(item):
        return lambda layer, chain: item(layer)
    raise ValueError(
        f"`{argument}` takes patterns of names, layers, layer classes, functions of a layer, and "
        f"lists of these. Received: {argument}={item!r}"
    )


def _reason_to_leave(chain, included, excluded):
    """The reason why a layer is not converted; None if it is."""
    layer = chain[-1]
    if any(isinstance(holder, OwnsBits) for holder in chain):
        return "learns its bits already"
    if not layer.built:
        return "not built"
    if not kernels_of(layer):
        many = any(len(v.shape) > 1 for v in _own_variables(layer) if v.trainable)
        return "its class has no learned-bit twin" if many else "no kernel"
    if any(isinstance(holder, keras.layers.SpectralNormalization) for holder in chain):
        return "SpectralNormalization changes its kernel in every step"
    if layer in excluded:
        return "excluded"
    if included is not None and layer not in included:
        return "not included"
    return None


def _check_kernels(layer, name):
    for weight_name in kernels_of(layer):
        kernel = getattr(layer, weight_name)
        is_float = isinstance(kernel, keras.Variable) and "float" in kernel.dtype
        if not is_float or getattr(layer, "quantization_mode", None):
            raise ValueError(
                "A layer to convert must have float weights that Keras does not quantize itself, "
                f"and no LoRA; exclude it. Received: layer {name!r}, dtype policy "
                f"{layer.dtype_policy.name!r}"
            )


def _own_variables(layer):
    """Variables of a layer without those of the layers inside."""
    inside = {id(v) for other in layers_inside(layer) if other is not layer for v in other.weights}
    return [v for v in layer.weights if id(v) not in inside]

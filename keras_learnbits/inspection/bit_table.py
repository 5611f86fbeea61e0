"""`bit_table`: the bit-widths of a model, and its size."""

import math
from typing import NamedTuple

from keras_learnbits.inspection.operations import operations
from keras_learnbits.layers.activation import QuantizedActivation
from keras_learnbits.layers.discovery import (
    learner_of,
    quantized_kernels,
    quantized_tensor_of,
    quantized_tensors,
    unique_names,
)
from keras_learnbits.tables import aligned_table

FLOAT_BYTES = 4
# Lines that explain the columns of a printed table.
LEGEND = (
    "error: squared rounding error / squared norm; codes, scales [B]: bytes of integers and scales"
)
OPERATIONS_LEGEND = (
    "MACs: multiply-accumulates of one example; bit operations: MACs x bits x input bits"
)
BOUNDS_LEGEND = "values: of one example; lowest, highest: range of the levels"


class BitRow(NamedTuple):
    """One quantized kernel.

    Attributes:
        layer: Name of the layer, or its path if names repeat; `layer/kernel` if it has several
            kernels.
        shape: Shape of the kernel.
        weights: Number of weights.
        bits: Integer bit-width.
        error: Relative quantization error `||q - W||^2 / ||W||^2`.
        code_bytes: Bytes of the packed codes, `ceil(weights * bits / 8)`.
        scale_bytes: Bytes of scales and offsets, 4 each.
        macs: Number of multiply-accumulates for one example; None if it is not known, as in
            recurrent layers and models with a custom `call`.
        input_bits: Integer bit-width of the quantized activation that it multiplies; None if its
            input is not quantized.
    """

    layer: str
    shape: tuple
    weights: int
    bits: int
    error: float
    code_bytes: int
    scale_bytes: int
    macs: int | None = None
    input_bits: int | None = None

    @property
    def bit_operations(self):
        """`macs * bits * input_bits`; None if one of them is not known."""
        if self.macs == 0:  # an embedding, which multiplies nothing
            return 0
        if self.macs is None or self.input_bits is None:
            return None
        return self.macs * self.bits * self.input_bits

    @property
    def bytes(self):
        """Bytes of codes and scales."""
        return self.code_bytes + self.scale_bytes


class ActivationRow(NamedTuple):
    """One quantized activation.

    Attributes:
        layer: Name of the `LearnedBitActivation`; its path if names repeat.
        values: Number of activation values per example.
        bits: Integer bit-width.
        bounds: Lowest and highest level; None before its range is fitted.
        scale_bytes: Bytes of its scale.
    """

    layer: str
    values: int
    bits: int
    bounds: tuple | None
    scale_bytes: int = FLOAT_BYTES


class BitTable:
    """Rows and totals of a model; prints as an aligned table.

    Attributes:
        rows: List of `BitRow`.
        activations: List of `ActivationRow`.
        float_parameters: Number of parameters that stay in float32: biases, normalization
            (with its moving statistics) and layers that are not quantized.
    """

    def __init__(self, rows, activations, float_parameters):
        self.rows = rows
        self.activations = activations
        self.float_parameters = float_parameters

    @property
    def weights(self):
        """Number of quantized weights."""
        return sum(row.weights for row in self.rows)

    @property
    def mean_bits(self):
        """Mean bits over all quantized weights, `sum N_l B_l / sum N_l`."""
        return sum(row.weights * row.bits for row in self.rows) / self.weights

    @property
    def mean_activation_bits(self):
        """Mean bits over all values of quantized activations; None if there are none."""
        values = sum(row.values for row in self.activations)
        if not values:
            return None
        return sum(row.values * row.bits for row in self.activations) / values

    @property
    def macs(self):
        """Multiply-accumulates for one example; None unless all rows have them."""
        return _total(row.macs for row in self.rows)

    @property
    def bit_operations(self):
        """Sum of `macs * bits * input_bits` for one example; None unless all rows have it."""
        return _total(row.bit_operations for row in self.rows)

    @property
    def packed_bytes(self):
        """Bytes of everything that inference needs: codes, scales and float parameters."""
        scales = sum(row.scale_bytes for row in self.activations)
        return sum(row.bytes for row in self.rows) + scales + FLOAT_BYTES * self.float_parameters

    @property
    def float_bytes(self):
        """Bytes of the same model in float32, without scales."""
        return FLOAT_BYTES * (self.weights + self.float_parameters)

    @property
    def compression(self):
        """`float_bytes / packed_bytes`."""
        return self.float_bytes / self.packed_bytes

    def __str__(self):
        columns = _COLUMNS + (_OPERATIONS if self.activations else ())
        sums = {
            "weights": f"{self.weights:,}",
            "bits": f"{self.mean_bits:.2f}",
            "codes [B]": f"{sum(row.code_bytes for row in self.rows):,}",
            "scales [B]": f"{sum(row.scale_bytes for row in self.rows):,}",
            "MACs": _number(self.macs),
            "bit operations": _number(self.bit_operations),
        }
        floats = FLOAT_BYTES * self.float_parameters
        others = {
            "weights": f"{self.float_parameters:,}",
            "bits": "32",
            "codes [B]": f"{floats:,}",
            "scales [B]": "0",
        }
        names = [name for name, _ in columns]
        body = [[show(row) for _, show in columns] for row in self.rows]
        totals = [
            [title, *(each.get(name, "") for name in names[1:])]
            for title, each in (("quantized", sums), ("float32", others))
        ]
        return "\n".join(
            [
                aligned_table([[names], body, totals], left=2),
                LEGEND,
                *self._activation_lines(),
                f"{self.packed_bytes:,} bytes packed, {self.float_bytes:,} in float32: "
                f"{self.compression:.1f} times smaller, "
                f"{8 * self.packed_bytes / (self.weights + self.float_parameters):.2f} bits per "
                "parameter overall",
            ]
        )

    __repr__ = __str__

    def _activation_lines(self):
        if not self.activations:
            return []
        body = [
            (
                row.layer,
                f"{row.values:,}",
                str(row.bits),
                *("?" if row.bounds is None else f"{bound:.3g}" for bound in row.bounds or "??"),
                str(row.scale_bytes),
            )
            for row in self.activations
        ]
        values = sum(row.values for row in self.activations)
        total = ("activations", f"{values:,}", f"{self.mean_activation_bits:.2f}", "", "")
        total += (str(sum(row.scale_bytes for row in self.activations)),)
        head = ("activation", "values", "bits", "lowest", "highest", "scales [B]")
        table = aligned_table([[head], body, [total]], left=1)
        return [OPERATIONS_LEGEND, "", table, BOUNDS_LEGEND, ""]


def _number(value):
    return "" if value is None else f"{value:,}"


def _total(values):
    values = list(values)
    return None if None in values else sum(values)


# Columns of a printed table: the title, and a function of a `BitRow` to the text.
_COLUMNS = (
    ("layer", lambda row: row.layer),
    ("shape", lambda row: "x".join(map(str, row.shape))),
    ("weights", lambda row: f"{row.weights:,}"),
    ("bits", lambda row: str(row.bits)),
    ("error", lambda row: f"{row.error:.2%}"),
    ("codes [B]", lambda row: f"{row.code_bytes:,}"),
    ("scales [B]", lambda row: f"{row.scale_bytes:,}"),
)
# Those of models with quantized activations.
_OPERATIONS = (
    ("input bits", lambda row: _number(row.input_bits)),
    ("MACs", lambda row: _number(row.macs)),
    ("bit operations", lambda row: _number(row.bit_operations)),
)


def bit_table(model):
    """The bit-widths of a model, layer by layer, and its size in bytes.

    With quantized activations it also has the operations for one example: multiply-accumulates
    (MACs), and bit operations, the number of MACs times the bits of the weights times the bits of
    the inputs. Hardware that multiplies at the width of its operands takes area and energy in
    proportion to these.

    Args:
        model: A built Keras model with learned-bit layers; of a distiller the student is used.

    Returns:
        `BitTable`: print it, or read `.rows`, `.mean_bits`, `.packed_bytes`, `.float_bytes`,
        `.bit_operations`, `.activations`.

    Raises:
        ValueError: The model has no learned-bit layer, or is not built.

    Examples:
        >>> model = keras.Sequential(
        ...     [keras.Input((16,)), keras_learnbits.LearnedBitDense(2, bits=3)])
        >>> table = bit_table(model)
        >>> table.mean_bits, table.packed_bytes  # 32 codes of 3 bits, 2 scales and 2 biases
        (3.0, 28)
    """
    model = learner_of(model)
    kernels = quantized_kernels(model)
    if not kernels:
        raise ValueError(
            "`bit_table` needs a built model with at least one learned-bit layer. "
            f"Received: model={model.name!r}, built={model.built}"
        )
    known = operations(model)
    rows = []
    for kernel, name in zip(kernels, unique_names(kernels), strict=True):
        stored = kernel.stored(name)
        norm = float(kernel.squared_norm())
        macs, source = known.get(kernel, (None, None))
        arrays_of_scales = 1 if kernel.quantizer.is_mid_rise else 2  # steps, and offsets
        rows.append(
            BitRow(
                layer=name,
                shape=stored.codes.shape,
                weights=kernel.size,
                bits=stored.bits,
                error=float(kernel.squared_error()) / norm if norm else 0.0,
                code_bytes=stored.code_bytes,
                scale_bytes=FLOAT_BYTES * arrays_of_scales * stored.step.size,
                macs=macs,
                input_bits=None if source is None else int(source.integer_bits()),
            )
        )
    tensors = quantized_tensors(model)
    activations = [
        ActivationRow(name, tensor.size, int(tensor.integer_bits()), tensor.bounds())
        for tensor, name in zip(tensors, unique_names(tensors), strict=True)
        if isinstance(tensor, QuantizedActivation)
    ]
    # Bit-widths and scales are not parameters, and kernels are counted in their rows.
    counted = {id(v) for k in kernels for v in (k.kernel, k.bits, k.log_scale)}
    counted |= {
        id(v) for v in model.weights if isinstance(quantized_tensor_of(v), QuantizedActivation)
    }
    floats = sum(math.prod(v.shape) for v in model.weights if id(v) not in counted)
    return BitTable(rows, activations, floats)

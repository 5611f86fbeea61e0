"""The report of a quantization, as text and for JSON files."""

import dataclasses

import numpy as np

from keras_learnbits.inspection.bit_table import BitTable


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """The result of `keras_learnbits.quantize`; its attribute `quantization`.

    Attributes:
        table: `BitTable` of the quantized model.
        worth: Dictionary of layer to an array of shape `(16,)`: the squared change of the outputs,
            relative to their variance, with this layer alone at 1, 2, ... bits; `inf` beyond its
            bounds. It is measured up to 5 bits, or at the lowest width if that is more, and divided
            by 4 for each further bit.
        movement_rounded: Root mean square change of the outputs before weights were trained, in
            units of the outputs' standard deviation (see `unit`), on an eighth of the examples (at
            most 256) that no weight is trained on. If training does not lower it, the model before
            training is kept.
        movement: Root mean square change of the outputs at the end, in the same unit and on the
            same examples.
        agreement: Share of these examples for which the largest output is that of the float model;
            None for models with single outputs.
        examples: Number of example inputs.
        steps: Number of training steps.
        seconds: Duration of the call.
        accuracy: Pair of the float and the quantized model's accuracy on `validation_data`, or
            None.
        unit: What the movement is relative to: the "standard deviation" of the outputs, or their
            "size" if the outputs of the float model are constant.
    """

    table: BitTable
    worth: dict
    movement_rounded: float
    movement: float
    agreement: float | None
    examples: int
    steps: int
    seconds: float
    accuracy: tuple | None = None
    unit: str = "standard deviation"

    def __str__(self):
        table = self.table
        parts = [
            f"{table.packed_bytes:,} bytes, {table.compression:.1f} times smaller",
            f"{table.mean_bits:.2f} mean bits",
            f"outputs moved by {self.movement:.1%} of their {self.unit}"
            if np.isfinite(self.movement)
            else "outputs are not finite",
        ]
        if self.agreement is not None:
            parts.append(f"the largest output is the same for {self.agreement:.1%}")
        if self.accuracy is not None:
            parts.append(f"accuracy {self.accuracy[1]:.2%} (float: {self.accuracy[0]:.2%})")
        return "; ".join([*parts, f"{self.seconds:.0f} s"])

    def to_dict(self):
        """Numbers, strings, lists and dictionaries only, for a JSON file."""
        table = self.table
        return {
            "mean_bits": table.mean_bits,
            "packed_bytes": table.packed_bytes,
            "float_bytes": table.float_bytes,
            "bits": {row.layer: row.bits for row in table.rows},
            "weights": {row.layer: row.weights for row in table.rows},
            "worth": {layer: list(map(_finite, row)) for layer, row in self.worth.items()},
            "movement_rounded": _finite(self.movement_rounded),
            "movement": _finite(self.movement),
            "movement_unit": self.unit,
            "agreement": self.agreement,
            "examples": self.examples,
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "accuracy": None
            if self.accuracy is None
            else {"float": self.accuracy[0], "quantized": self.accuracy[1]},
        }


def _finite(value):
    """A number as JSON has it, which has neither infinity nor NaN: None in their place."""
    return float(value) if np.isfinite(value) else None

"""`BitState`: prices, freeze and predicted losses, for callbacks and users."""

import math
import warnings

import tensorflow as tf

from keras_learnbits.layers.discovery import quantized_kernels, unique_names
from keras_learnbits.training.compiling import BitCompiling


class BitState(BitCompiling):
    """Sets prices, freezes bits and predicts losses. Goes before the Keras model class."""

    def steer_price(self, name, value):
        """Sets a price until this `fit` ends or raises.

        Args:
            name: `"bit_reg"` or `"quantization_reg"`.
            value: A number.
        """
        self._learned_bit_optimizer().steer(name, value)

    def release_prices(self):
        """Restores the prices from before `steer_price`."""
        self._learned_bit_optimizer().release()

    def freeze_bits(self, bits=None):
        """Sets every bit-width to an integer and freezes it.

        Args:
            bits: List of integers, one for each of `quantized_tensors`, or dictionary of
                `QuantizedTensor` to integer; by default the current integer bit-widths.

        Raises:
            AttributeError: The model is not compiled.
            ValueError: `bits` does not have one integer within its bounds for each layer.
        """
        frozen, tensors = self.bits_frozen, self.quantized_tensors
        if bits is None:
            bits = self._integer_widths()
        bits = [bits.get(tensor) for tensor in tensors] if isinstance(bits, dict) else list(bits)
        bounds = [(tensor.layer.min_bits, tensor.layer.max_bits) for tensor in tensors]
        if len(bits) != len(bounds) or not all(
            width in range(low, high + 1) for width, (low, high) in zip(bits, bounds, strict=True)
        ):
            raise ValueError(
                "`bits` must be an integer within its layer's bounds for each quantized kernel "
                "and then for each quantized activation. "
                f"Received: bits={bits}, bounds={bounds}"
            )
        for tensor, width in zip(tensors, bits, strict=True):
            tensor.bits.assign(width)
        if tensors and not self.optimizer.built:
            # Keras saves an optimizer, which holds the freeze, only if it is built.
            self.optimizer.build(self.trainable_variables)
        frozen.assign(1.0)

    def freeze_bits_untrained(self, bits):
        """`freeze_bits` at the end of training.

        It warns about bit-widths that become smaller, because no weight is trained at them.
        """
        before = self._integer_widths()
        self.freeze_bits(bits)
        after = self._integer_widths()
        reduced = [
            f"{name!r} from {before[tensor]} to {after[tensor]}"
            for tensor, name in zip(after, unique_names(list(after)), strict=True)
            if after[tensor] < before[tensor]
        ]
        if reduced:
            warnings.warn(
                "Bit-widths were reduced when training ended, so no weight was trained at them: "
                f"{', '.join(reduced)} bits. Freeze them earlier with `FreezeBits(at=...)`, and "
                "let `EarlyStopping(start_from_epoch=...)` start after that epoch.",
                stacklevel=2,
            )

    def unfreeze_bits(self):
        """Lets the bit-widths change again."""
        self.bits_frozen.assign(0.0)

    def _integer_widths(self):
        """Dictionary of `QuantizedTensor` to its current bit-width, an integer."""
        return {tensor: int(tensor.integer_bits()) for tensor in self.quantized_tensors}

    def predicted_losses(self):
        """Predicts the loss at other bit-widths of each layer, with all other layers unchanged.

        Returns:
            The trained `QuantizedTensor`s, and a NumPy array of shape `(layers, 16)`: the loss at
            1, 2, ... bits relative to that at the current bit-width, without the price; `inf`
            outside of a layer's bounds.

        Raises:
            ValueError: The estimator does not predict losses at integer bit-widths, or the model
                is not built.
        """
        estimator = self._learned_bit_optimizer().bit_gradient
        if not estimator.predicts_losses:
            raise ValueError(
                "The loss at other bit-widths is predicted with bit_gradient='measured' or "
                f"'difference'. Received: bit_gradient={type(estimator).__name__}"
            )
        self.prepare_bits()
        trained = set(self.trained_tensors)
        indices = [i for i, tensor in enumerate(estimator.tensors) if tensor in trained]
        return [estimator.tensors[index] for index in indices], estimator.loss_table()[indices]

    def prepare_bits(self):
        """Creates the optimizer's state if training has not yet done so.

        Raises:
            ValueError: The model is not built, or has no learned-bit layer.
        """
        kernels = quantized_kernels(self)
        if not kernels:
            raise ValueError(
                "The model must be built, and have a learned-bit layer, before losses at other "
                f"bit-widths can be predicted. Received: model={self.name!r}, built={self.built}"
            )
        if not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)

    @property
    def losses_are_known(self):
        """Whether every layer has been probed, so that `predicted_losses` uses measurements."""
        estimator = self._learned_bit_optimizer().bit_gradient
        return estimator.predicts_losses and estimator.has_probed_all()

    def cheapest_integers(self):
        """The integer next to each latent bit-width that has less predicted loss plus price.

        Returns:
            Dictionary of `QuantizedTensor` to integer; the nearest integers if the estimator does
            not predict losses.
        """
        integers = self._integer_widths()
        if not self._learned_bit_optimizer().bit_gradient.predicts_losses:
            return integers
        tensors, losses = self.predicted_losses()
        penalties = self.bit_objective.penalty_table(self.quantized_tensors).numpy()
        penalty_of = dict(zip(self.quantized_tensors, penalties, strict=True))
        price = float(tf.convert_to_tensor(self.bit_reg.value))
        for tensor, row in zip(tensors, losses, strict=True):
            totals = row + price * penalty_of[tensor]
            latent = float(tensor.latent_bits())
            adjacent = {math.floor(latent), math.ceil(latent)}
            integers[tensor] = min(adjacent, key=lambda b: (totals[b - 1], b))
        return integers

"""`BitState`: what callbacks and users read and set while a model learns its bits."""

import math
import warnings

import tensorflow as tf

from keras_learnbits.layers.discovery import quantized_kernels, unique_names
from keras_learnbits.training.compiling import BitCompiling


class BitState(BitCompiling):
    """Prices, freezes and predicts losses of the bits. Goes before the Keras model class."""

    def steer_price(self, name, value):
        """Sets a price until this `fit` ends or raises.

        Args:
            name: `"bit_reg"` or `"quantization_reg"`.
            value: A number.
        """
        self._bit_state().steer(name, value)

    def release_prices(self):
        """Restores the prices before `steer_price`."""
        self._bit_state().release()

    def freeze_bits(self, bits=None):
        """Sets every bit-width to an integer and freezes it.

        Args:
            bits: List of integers, one for each of `quantized_tensors`, or dictionary of
                `QuantizedTensor` to integer; by default the bit-widths in use.

        Raises:
            ValueError: `bits` are not as many integers within the layers' bounds.
        """
        tensors = self.quantized_tensors
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
            self.optimizer.build(self.trainable_variables)  # or files would not keep the freeze
        self.bits_frozen.assign(1.0)

    def freeze_bits_untrained(self, bits):
        """`freeze_bits` at the end of training; warns about widths that fall, since no weight
        will be trained at them.
        """
        before = self._integer_widths()
        self.freeze_bits(bits)
        after = self._integer_widths()
        fallen = [
            f"{name!r} from {before[tensor]} to {after[tensor]}"
            for tensor, name in zip(after, unique_names(list(after)), strict=True)
            if after[tensor] < before[tensor]
        ]
        if fallen:
            warnings.warn(
                "Bit-widths fell as training ended, so no weight was trained at them: "
                f"{', '.join(fallen)} bits. Have `FreezeBits(at=...)` freeze them earlier, and "
                "`EarlyStopping(start_from_epoch=...)` wait for that epoch.",
                stacklevel=2,
            )

    def unfreeze_bits(self):
        """Lets the bit-widths move again."""
        self.bits_frozen.assign(0.0)

    def _integer_widths(self):
        """Dictionary of `QuantizedTensor` to the bit-width in use, an integer."""
        return {tensor: int(tensor.integer_bits()) for tensor in self.quantized_tensors}

    def predicted_losses(self):
        """Predicts the loss at each layer's bit-widths, with all other layers unchanged.

        Returns:
            The trained `QuantizedTensor`s, and a NumPy array of shape `(layers, 16)`: the loss at
            1, 2, ... bits relative to the present one, without the price; `inf` beyond a layer's
            bounds.

        Raises:
            ValueError: The estimator does not predict losses at integer bit-widths, or the model
                is not built.
        """
        estimator = self._bit_state().bit_gradient
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
        """Creates the optimizer's state where training has not yet done so.

        Raises:
            ValueError: The model is not built, or has no learned-bit layer.
        """
        kernels = quantized_kernels(self)
        if not kernels:
            raise ValueError(
                "The model must be built, and have a learned-bit layer, before what its bits are "
                f"worth is asked for. Received: model={self.name!r}, built={self.built}"
            )
        if not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)

    @property
    def losses_are_known(self):
        """Whether every layer was probed, so that `predicted_losses` rests on measurements."""
        estimator = self._bit_state().bit_gradient
        return estimator.predicts_losses and estimator.has_probed_all()

    def cheapest_integers(self):
        """The integer next to each latent bit-width that has less predicted loss plus price.

        Returns:
            Dictionary of `QuantizedTensor` to integer; the nearest ones if the estimator does not
            predict losses.
        """
        integers = self._integer_widths()
        if not self._bit_state().bit_gradient.predicts_losses:
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

"""`BitState`: what callbacks and users read and set while a model learns its bits."""

import math
import warnings

import tensorflow as tf

from keras_learnbits.layers.discovery import quantized_kernels, unique_names
from keras_learnbits.training.compiling import BitCompiling


class BitState(BitCompiling):
    """Prices, freezes and predicts losses of the bits. Goes before the Keras model class."""

    def steer_price(self, name, value):
        """Sets a price for the time of this `fit`; it is released when that ends, however.

        Args:
            name: `"bit_reg"` or `"quantization_reg"`.
            value: A number.
        """
        self._bit_state().steer(name, value)

    def release_prices(self):
        """Gives steered prices the values that they had before."""
        self._bit_state().release()

    def freeze_bits(self, bits=None):
        """Sets every bit-width to an integer and lets it stand still from now on.

        Args:
            bits: An integer for each quantized kernel and then each activation; by default the
                one in use.

        Raises:
            ValueError: `bits` are not as many integers within the layers' bounds.
        """
        tensors = self.quantized_tensors
        if bits is None:
            bits = [int(tensor.integer_bits()) for tensor in tensors]
        bounds = [(tensor.layer.min_bits, tensor.layer.max_bits) for tensor in tensors]
        if len(bits) != len(bounds) or not all(
            width in range(low, high + 1) for width, (low, high) in zip(bits, bounds, strict=True)
        ):
            raise ValueError(
                "`bits` must be an integer within its layer's bounds for each quantized kernel "
                "and then for each quantized activation. "
                f"Received: bits={list(bits)}, bounds={bounds}"
            )
        for tensor, width in zip(tensors, bits, strict=True):
            tensor.bits.assign(width)
        if tensors and not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)  # or a file would not keep the freeze
        self.bits_frozen.assign(1.0)

    def freeze_bits_untrained(self, bits):
        """`freeze_bits` as training ends; warns where widths fall, since no training follows."""
        tensors = self.quantized_tensors
        before = [int(tensor.integer_bits()) for tensor in tensors]
        self.freeze_bits(bits)
        after = [int(tensor.integer_bits()) for tensor in tensors]
        fallen = [
            f"{name!r} from {old} to {new}"
            for name, old, new in zip(unique_names(tensors), before, after, strict=True)
            if new < old
        ]
        if fallen:
            warnings.warn(
                "Bit-widths fell as training ended, so no weight was trained at them: "
                f"{', '.join(fallen)} bits. Have `FreezeBits(at=...)` freeze them earlier, and "
                "`EarlyStopping(start_from_epoch=...)` wait for that epoch.",
                stacklevel=2,
            )

    def predicted_losses(self):
        """What each layer's bit-width is predicted to do to the loss, others as they are.

        Returns:
            The trained `QuantizedTensor`s, and a NumPy array of shape `(layers, 16)`: the loss at
            1, 2, ... bits relative to the present one, price left out; `inf` beyond a layer's
            bounds.

        Raises:
            ValueError: The estimator does not predict losses of whole bits, or the model is not
                built.
        """
        estimator = self._bit_state().bit_gradient
        if not estimator.predicts_losses:
            raise ValueError(
                "The loss at other bit-widths is predicted with bit_gradient='measured' or "
                f"'difference'. Received: bit_gradient={type(estimator).__name__}"
            )
        self.prepare_bits()
        trained = {id(tensor) for tensor in self.trained_tensors}
        places = [i for i, tensor in enumerate(estimator.tensors) if id(tensor) in trained]
        return [estimator.tensors[place] for place in places], estimator.loss_table()[places]

    def unfreeze_bits(self):
        """Lets the bit-widths move again."""
        self.bits_frozen.assign(0.0)

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
        """Whether every layer was looked at, so that `predicted_losses` holds no guess."""
        estimator = self._bit_state().bit_gradient
        return estimator.predicts_losses and estimator.has_probed_all()

    def cheapest_integers(self):
        """The integer next to each latent bit-width that has less predicted loss plus price.

        Returns:
            A list of integers, one for each quantized kernel and then each activation; the
            nearest ones if the estimator does not predict losses.
        """
        tensors = self.quantized_tensors
        integers = {id(tensor): int(tensor.integer_bits()) for tensor in tensors}
        if self._bit_state().bit_gradient.predicts_losses:
            moving, losses = self.predicted_losses()
            penalties = self.bit_objective.penalty_table(tensors).numpy()
            price = float(tf.convert_to_tensor(self.bit_reg.value))
            for tensor, row in zip(moving, losses, strict=True):
                totals = row + price * penalties[tensors.index(tensor)]
                latent = float(tensor.latent_bits())
                beside = {math.floor(latent), math.ceil(latent)}
                integers[id(tensor)] = min(beside, key=lambda b: (totals[b - 1], b))
        return list(integers.values())

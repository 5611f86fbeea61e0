"""`CollapseGuard`: reports layers that quantization has broken."""

import warnings

import keras
import numpy as np

from keras_learnbits.arguments import check_number, choose
from keras_learnbits.layers.discovery import quantized_kernels, unique_names
from keras_learnbits.training.fitting import LearnedBitTraining


class CollapseGuard(keras.callbacks.Callback):
    """Checks each quantized kernel before training and after each epoch.

    It warns once for each layer and finding.

    Args:
        action: Reaction to a finding: `"warn"` only warns; `"raise_bits"` also adds one bit to the
            layer, unless bits are frozen; `"stop"` also ends the training.
        max_error: Highest relative quantization error `||q - W||^2 / ||W||^2` that is not reported.
            For Gaussian weights it is 0.36 at 1 bit; if all weights are rounded to 0, it is 1.
        max_saturation: Highest share of saturated weights that is not reported. A weight is
            saturated if it is more than half a step below the lowest or above the highest level.
        bounds: Whether to report layers whose bits are at `min_bits` or `max_bits`. This is
            frequent in healthy models, too.

    Attributes:
        findings: List of `(epoch, layer, finding)`; epoch -1 is before training. Findings are
            `"one level"`, `"saturated"`, `"error"` and `"bound"`.

    Raises:
        ValueError: `action` is unknown, or `max_error` or `max_saturation` is not a number.

    Examples:
        >>> layer = keras_learnbits.LearnedBitDense(1, kernel_initializer="ones", name="flat")
        >>> model = keras_learnbits.LearnedBitSequential([keras.Input((8,)), layer])
        >>> model.compile("adam", "mse")
        >>> guard = CollapseGuard()
        >>> with warnings.catch_warnings(action="ignore"):
        ...     history = model.fit(np.ones((8, 8)), np.ones((8, 1)), callbacks=[guard], verbose=0)
        >>> guard.findings[0]
        (-1, 'flat', 'one level')
    """

    def __init__(self, action="warn", max_error=0.75, max_saturation=0.5, bounds=False):
        super().__init__()
        actions = {"warn": self._warn, "raise_bits": self._raise_bits, "stop": self._stop}
        self._act = choose(action, actions, "action")
        check_number("max_error", max_error)
        check_number("max_saturation", max_saturation)
        self.max_error = max_error
        self.max_saturation = max_saturation
        self.bounds = bounds
        self.findings = []
        self._named = set()

    def on_train_begin(self, logs=None):
        self._check(-1)

    def on_epoch_end(self, epoch, logs=None):
        self._check(epoch)

    def _check(self, epoch):
        kernels = quantized_kernels(self.model)
        for name, kernel in zip(unique_names(kernels), kernels, strict=True):
            found = list(self._diagnose(kernel))
            for finding, described in found:
                self.findings.append((epoch, name, finding))
                if (name, finding) not in self._named:
                    self._named.add((name, finding))
                    warnings.warn(f"Layer {name!r} {described}", stacklevel=2)
            if found:
                self._act(kernel)

    def _diagnose(self, kernel):
        """Yields pairs of a finding and its description."""
        stored, latent = kernel.stored(), float(kernel.latent_bits())
        codes, bits = stored.codes, stored.bits
        weights = keras.ops.convert_to_numpy(kernel.kernel.value).astype(np.float32)
        if weights.size > 1 and (codes == codes.flat[0]).all():
            yield "one level", f"rounds all its weights to one level of {2**bits}."
        with np.errstate(all="ignore"):  # weights may be infinite, and steps 0
            position = weights / stored.step - stored.offset
        outside = float(np.mean((position < -0.5) | (position > stored.max_code + 0.5)))
        if outside > self.max_saturation:
            yield "saturated", f"has {outside:.0%} of its weights beyond its grid at {bits} bits."
        norm = float(kernel.squared_norm())
        error = float(kernel.squared_error()) / norm if norm else 0.0
        if not error <= self.max_error:  # also true of NaN
            yield "error", f"has a relative quantization error of {error:.2f} at {bits} bits."
        layer = kernel.layer
        if self.bounds and layer.min_bits < layer.max_bits:
            if latent <= layer.min_bits:
                yield "bound", f"is at its lowest bit-width, min_bits={layer.min_bits}."
            if latent >= layer.max_bits:
                yield "bound", f"is at its highest bit-width, max_bits={layer.max_bits}."

    def _warn(self, kernel):
        """Does nothing: there was a warning already."""

    def _raise_bits(self, kernel):
        learns_bits = isinstance(self.model, LearnedBitTraining)
        if kernel.trainable and not (learns_bits and self.model.bits_are_frozen):
            raised = min(int(kernel.integer_bits()) + 1, kernel.layer.max_bits)
            kernel.bits.assign(float(raised))

    def _stop(self, kernel):
        self.model.stop_training = True

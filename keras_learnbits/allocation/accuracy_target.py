"""`AccuracyTarget`: the smallest model that reaches a metric on validation data."""

import re
import warnings

import keras

from keras_learnbits.allocation.targets import WIDTHS, Target, descent, price_at
from keras_learnbits.calibration.examples import check_can_be_read_again

# Parts of the names of metrics, or of their classes, for which lower values are better.
LOWER_IS_BETTER = re.compile(
    "loss|error|entropy|divergence|hinge|poisson|false|perplexity|mse|mae|mape|msle|logcosh"
)


class AccuracyTarget(Target):
    """A metric on validation data that the model must reach when its bits are frozen.

    Args:
        least: Number, the lowest value of the metric that is accepted.
        data: Tuple `(x, y)` or dataset.
        metric: Name of the metric; higher values must be better.

    Raises:
        ValueError: The data cannot be read repeatedly to their end.
    """

    def __init__(self, least, data, metric):
        check_can_be_read_again(data, "validation_data")
        self.least = least
        self.data = data
        self.metric = metric

    def begin(self, model):
        model.predicted_losses()
        logs = self._evaluate(model)
        if self.metric not in logs:
            raise ValueError(
                "`metric` must be the name of one of the model's metrics. "
                f"Received: metric={self.metric!r}, metrics={sorted(logs)}"
            )
        kind = next((type(m).__name__ for m in _metrics(model) if m.name == self.metric), "")
        if LOWER_IS_BETTER.search(f"{self.metric} {kind}".lower()):
            raise ValueError(
                "`metric` must be one for which higher values are better, e.g. accuracy. "
                f"Received: metric={self.metric!r}"
            )

    def begin_epoch(self, model):
        if model.losses_are_known:
            _, prices, _, step = self._smallest_within(model)
            model.steer_price("bit_reg", price_at(prices, step))

    def permits(self, model):
        # The bit-widths were allocated by accuracy, and weights have been trained at them since, so
        # the accuracy has not become worse.
        return True

    def allocate(self, model):
        kernels, _, choices, step = self._smallest_within(model)
        return {k: int(WIDTHS[choice]) for k, choice in zip(kernels, choices[step], strict=True)}

    def _smallest_within(self, model):
        """Finds the smallest allocation that is accurate enough, by bisection over `descent`.

        Returns:
            The results of `descent`, and the index of the allocation.
        """
        # Bisection is exact if the metric falls with the size. Each evaluation is a pass over the
        # validation data, and a descent has up to 15 allocations per layer.
        kernels, prices, choices = descent(model)
        latent = [float(kernel.latent_bits()) for kernel in kernels]

        def accuracy(step):
            for kernel, choice in zip(kernels, choices[step], strict=True):
                kernel.bits.assign(float(WIDTHS[choice]))
            return self._evaluate(model)[self.metric]

        try:
            highest = accuracy(0)
            if highest < self.least:
                warnings.warn(
                    f"Even at the highest bit-widths `{self.metric}` is {highest:.4f} on the "
                    f"validation data, below the {self.least:.4f} that the budget requires.",
                    stacklevel=2,
                )
            enough, too_few = 0, len(choices)
            while too_few - enough > 1:
                step = (enough + too_few) // 2
                enough, too_few = (
                    (step, too_few) if accuracy(step) >= self.least else (enough, step)
                )
        finally:
            for kernel, bits in zip(kernels, latent, strict=True):
                kernel.bits.assign(bits)
        return kernels, prices, choices, enough

    def _evaluate(self, model):
        data = self.data if isinstance(self.data, tuple) else (self.data,)
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        logs = model.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)
        model.reset_metrics()
        return logs


def _metrics(model):
    """All metrics of a compiled model, and those inside them."""
    return [each for metric in model.metrics for each in (metric, *getattr(metric, "metrics", ()))]

"""`AccuracyTarget`: the smallest model within a metric on validation data."""

import re
import warnings

import keras

from keras_learnbits.callbacks.targets import WIDTHS, Target, descent, price_at

# Names of metrics, or of their classes, of which less is better.
FALLS = re.compile(
    "loss|error|entropy|divergence|hinge|poisson|false|perplexity|mse|mae|mape|msle|logcosh"
)


class AccuracyTarget(Target):
    """A metric on validation data that the model must reach when its bits are frozen.

    Args:
        least: Value that the metric must reach.
        data: Tuple `(x, y)` or dataset.
        metric: Name of the metric, higher is better.
    """

    def __init__(self, least, data, metric):
        self.least = least
        self.data = data
        self.metric = metric

    def begin(self, model):
        model.predicted_losses()
        logs = self._evaluate(model)
        if self.metric not in logs:
            raise ValueError(
                "`metric` must be one of the model's. "
                f"Received: metric={self.metric!r}, metrics={sorted(logs)}"
            )
        kind = next((type(m).__name__ for m in _metrics(model) if m.name == self.metric), "")
        if FALLS.search(f"{self.metric} {kind}".lower()):
            raise ValueError(
                "`metric` must be one of which more is better, as accuracy. "
                f"Received: metric={self.metric!r}"
            )

    def begin_epoch(self, model):
        if model.losses_are_known:
            _, prices, _, step = self._smallest_within(model)
            model.steer_price("bit_reg", price_at(prices, step))

    def permits(self, model):
        return True  # they were allocated by it, and weights have been trained at them since

    def allocate(self, model):
        kernels, _, choices, step = self._smallest_within(model)
        return {k: int(WIDTHS[choice]) for k, choice in zip(kernels, choices[step], strict=True)}

    def _smallest_within(self, model):
        """Bisects the allocations, by descending size, for the last that is accurate enough."""
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
                    f"validation data, below the {self.least:.4f} that the budget permits.",
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
    """All metrics of a compiled model, and those that they hold."""
    return [each for metric in model.metrics for each in (metric, *getattr(metric, "metrics", ()))]

"""Rounding with compensation: later weights compensate for the rounding error of each weight.

The method is GPTQ (Frantar et al., arXiv 2210.17323), which is OBQ (arXiv 2208.11580) in a fixed
order. Rounding a weight changes the layer's outputs; the weights that are not rounded yet are
changed so that the outputs on example inputs change least. NumPy, in float64.
"""

import numpy as np

# Added to the diagonal of the Gram matrix, as a fraction of its mean.
DAMPING = 0.01
# Number of weights that are rounded before all later weights are changed at once.
BLOCK = 64


class Compensation:
    """Rounds the kernel of one group of a layer for given example inputs.

    Args:
        gram: `sum x x^T` over the input vectors `x`, shape `(fan_in, fan_in)`. If sums overflowed,
            weights are rounded to nearest.

    Examples:
        Two inputs that are always equal: the second weight compensates for the first one's error.

        >>> rounded = Compensation(np.ones((2, 2)))(np.array([[0.3], [0.3]]), 1.0, 0.0, 1.0)
        >>> rounded.ravel().tolist()
        [0.0, 1.0]
    """

    def __init__(self, gram):
        gram = np.array(gram, "float64")
        if not np.all(np.isfinite(gram)):
            gram = np.eye(len(gram))  # as if inputs were independent: errors have no compensation
        # Weights of inputs that are always zero do not matter, and are rounded to nearest.
        unused = np.diag(gram) == 0
        mean = np.mean(np.diag(gram)[~unused]) if not np.all(unused) else 1.0
        gram[unused, unused] = mean
        gram[np.diag_indices_from(gram)] += DAMPING * mean
        # Weights of large inputs come first, when many other weights can still compensate.
        self._order = np.argsort(-np.diag(gram), kind="stable")
        gram = gram[np.ix_(self._order, self._order)]
        # Row `i` of this factor has the effect of the error of weight `i` on the weights after it.
        self._factor = np.linalg.cholesky(np.linalg.inv(gram)).T

    def __call__(self, weights, step, offset, max_code):
        """The rounded weights.

        Args:
            weights: Array of shape `(fan_in, outputs)`.
            step: Number, or array of shape `(outputs,)`, as in
                `keras_learnbits.numerics.grids.Grid`.
            offset: Number, or array of shape `(outputs,)`.
            max_code: Number.

        Returns:
            Float64 array of the shape of `weights`, of levels of the grid.
        """
        weights = np.array(weights, "float64")[self._order]
        rounded = np.empty_like(weights)
        for start in range(0, len(weights), BLOCK):
            end = min(start + BLOCK, len(weights))
            errors = np.zeros((end - start, weights.shape[1]))
            for i in range(start, end):
                codes = np.clip(np.floor(weights[i] / step - offset + 0.5), 0, max_code)
                rounded[i] = step * (codes + offset)
                error = (weights[i] - rounded[i]) / self._factor[i, i]
                weights[i + 1 : end] -= np.outer(self._factor[i, i + 1 : end], error)
                errors[i - start] = error
            weights[end:] -= self._factor[start:end, end:].T @ errors
        result = np.empty_like(rounded)
        result[self._order] = rounded
        return result

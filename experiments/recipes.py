"""How a net is trained: what works, and what was published."""

import functools

import keras

import keras_learnbits as klb

schedules = keras.optimizers.schedules
OPTIMIZERS = {
    "adamw": keras.optimizers.AdamW,
    "sgd": functools.partial(keras.optimizers.SGD, momentum=0.85, nesterov=True),
}


def fast_policy(cpuinfo="/proc/cpuinfo"):
    """`mixed_bfloat16` where the processor is known to multiply such numbers, else `float32`.

    On processors that do not, TensorFlow emulates it: steps take many times as long.

    Args:
        cpuinfo: Linux's file of the processor's features; without one none is known.
    """
    try:
        with open(cpuinfo) as file:
            features = set(file.read().split())
    except OSError:
        features = set()
    return "mixed_bfloat16" if features & {"amx_bf16", "avx512_bf16"} else "float32"


class Recipe:
    """An optimizer with a warm-up and a cosine; bits that move for three quarters of the training.

    Attributes:
        defaults: Values of flags that the user leaves open.
        kernel_quantizer, quantization_error: As in the library.
        loss_reduction: Of the cross-entropy over a batch.
        regularized: Whether images are augmented and labels smoothed.
    """

    defaults = {"bit_penalty": "bits"}
    kernel_quantizer = "learned_scale"
    quantization_error = "relative"
    loss_reduction = "sum_over_batch_size"
    regularized = True

    def optimizer(self, name, learning_rate, weight_decay, steps):
        warmup = steps // 10
        rate = schedules.CosineDecay(
            0.0, steps - warmup, warmup_target=learning_rate, warmup_steps=warmup
        )
        return OPTIMIZERS[name](rate, weight_decay=weight_decay)

    def bit_optimizer(self, step, momentum, learning_rate, steps, moving_steps):
        """By default the bits could cross their whole range in 0.4 of the time they move."""
        step = 7 / (0.4 * moving_steps) if step is None else step
        return klb.SignSGD(step, momentum=momentum or 0.0)

    def callbacks(self, freeze_at):
        return [klb.FreezeBits(at=freeze_at)]


class StraightThrough(Recipe):
    """Batch derivatives are mostly noise: the sign is that of a mean over some hundred steps."""

    def bit_optimizer(self, step, momentum, learning_rate, steps, moving_steps):
        """By default the bits could cross their whole range in 2/3 of the time they move."""
        step = 7 / (2 / 3 * moving_steps) if step is None else step
        return klb.SignSGD(step, momentum=0.99 if momentum is None else momentum)


class Published(Recipe):
    """Raghavan et al., "BitNet: Bit-Regularized Deep Neural Networks", arXiv 1708.04788.

    A rate `mu` of 1e-3 that is halved every 200 steps, for weights and bits; bits move by whole
    integers, by the sign of `mu` times their gradient, which is 0 below `eps`.

    The paper leaves open, and chosen here on held-out training examples: bits start at 8, their
    upper bound; `eps` is 7e-8; the loss is summed over the batch (with the mean, updates are
    smaller than half a step of the grid, and nothing is learned at all).
    """

    defaults = {
        "batch_size": 200,
        "learning_rate": 1e-3,
        "quantization_reg": 1e-3,
        "bit_reg": 1e-6,
        "bit_penalty": "levels",
        "bit_learning_rate": 1.0,
        "dtype_policy": "float32",
    }
    kernel_quantizer = "min_max"
    quantization_error = "squared"
    loss_reduction = "sum"
    regularized = False
    halving_steps = 200
    eps = 7e-8

    def optimizer(self, name, learning_rate, weight_decay, steps):
        return keras.optimizers.SGD(
            schedules.ExponentialDecay(learning_rate, self.halving_steps, 0.5, staircase=True)
        )

    def bit_optimizer(self, step, momentum, learning_rate, steps, moving_steps):
        dead_zone = schedules.ExponentialDecay(
            self.eps / learning_rate, self.halving_steps, 2.0, staircase=True
        )
        return klb.SignSGD(step, dead_zone=dead_zone)

    def callbacks(self, freeze_at):
        return []


RECIPES = {
    "measured": Recipe,
    "difference": Recipe,
    "straight_through": StraightThrough,
    "paper": Published,
}

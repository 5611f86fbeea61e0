"""Training recipes: that of this library, and the published one."""

import functools

import keras
import tensorflow as tf

import keras_learnbits as klb

schedules = keras.optimizers.schedules
# Found by `python experiments/published.py`: the float model on MNIST then has an error of 19.95%.
LOSS_WEIGHT = 3.4
OPTIMIZERS = {
    "adamw": keras.optimizers.AdamW,
    "sgd": functools.partial(keras.optimizers.SGD, momentum=0.85, nesterov=True),
}


def fast_policy(cpuinfo="/proc/cpuinfo"):
    """`mixed_bfloat16` if the processor has instructions for such numbers, else `float32`.

    On other processors TensorFlow emulates it, and steps take many times as long.

    Args:
        cpuinfo: Path of Linux's file of the processor's features; it may be missing.
    """
    try:
        with open(cpuinfo) as file:
            features = set(file.read().split())
    except OSError:
        features = set()
    return "mixed_bfloat16" if features & {"amx_bf16", "avx512_bf16"} else "float32"


class Recipe:
    """An optimizer with warm-up and cosine decay; bits are frozen after a part of the training.

    Attributes:
        defaults: Dictionary of default values of flags.
        kernel_quantizer: Quantizer of the learned-bit layers.
        quantization_error: Argument of `compile`.
        widths: Dictionary of arguments of the layers: initial bits, and their bounds.
        regularized: Whether images are augmented and labels smoothed.
    """

    defaults = {"bit_penalty": "bits", "loss_weight": 1.0}
    kernel_quantizer = "learned_scale"
    quantization_error = "relative"
    widths = {}
    regularized = True

    def optimizer(self, name, learning_rate, weight_decay, steps):
        warmup = steps // 10
        rate = schedules.CosineDecay(
            0.0, steps - warmup, warmup_target=learning_rate, warmup_steps=warmup
        )
        return OPTIMIZERS[name](rate, weight_decay=weight_decay)

    def bit_optimizer(self, step, momentum, learning_rate, steps, moving_steps):
        """By default bits can cross their whole range in 0.4 of the time before the freeze."""
        step = 7 / (0.4 * moving_steps) if step is None else step
        return klb.SignSGD(step, momentum=momentum or 0.0)

    def callbacks(self, freeze_at):
        return [klb.FreezeBits(at=freeze_at)]


class StraightThrough(Recipe):
    """Takes the sign of a mean over about 100 steps, because batch derivatives are mostly noise."""

    def bit_optimizer(self, step, momentum, learning_rate, steps, moving_steps):
        """By default bits can cross their whole range in 2/3 of the time before the freeze."""
        step = 7 / (2 / 3 * moving_steps) if step is None else step
        return klb.SignSGD(step, momentum=0.99 if momentum is None else momentum)


class Published(Recipe):
    """Raghavan et al., "BitNet: Bit-Regularized Deep Neural Networks", arXiv 1708.04788.

    The rate `mu` is 1e-3 and is halved every 200 steps, for weights and bits. Bits move by whole
    bits, by the sign of `mu` times their gradient, which counts as 0 within `eps` of 0.

    Some settings are not in the paper. Here bits start at 8 and stay between 2 and 16: the paper's
    run without a pull towards more bits ended at 2, and 16 is the maximum of this library (the
    paper's run without a pull towards fewer bits ended at 32). `eps` is 1e-8. With `loss_weight`
    the float model on MNIST has the published error of 19.95%; with the printed loss, the mean over
    the batch, it has another one.
    """

    defaults = {
        "batch_size": 200,
        "learning_rate": 1e-3,
        "loss_weight": LOSS_WEIGHT,
        "quantization_reg": 1e-3,
        "bit_reg": 1e-6,
        "bit_penalty": "levels",
        "bit_learning_rate": 1.0,
        "dtype_policy": "float32",
    }
    kernel_quantizer = "min_max"
    quantization_error = "squared"
    widths = {"bits": 8, "min_bits": 2, "max_bits": 16}
    regularized = False
    halving_steps = 200
    eps = 1e-8

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


class RoundEachEpoch(keras.callbacks.Callback):
    """The paper's baseline "linear": a float model that is rounded at the end of each epoch.

    Kernels are rounded on the range of their weights, before the model is evaluated.

    Args:
        bits: Bits of each weight, an integer.
    """

    def __init__(self, bits):
        super().__init__()
        self.bits = float(bits)

    def on_test_begin(self, logs=None):
        quantizer = klb.MinMaxQuantizer()
        for layer in self.model.layers:
            if hasattr(layer, "kernel"):
                kernel = tf.convert_to_tensor(layer.kernel.value)
                layer.kernel.assign(quantizer.quantize(kernel, tf.constant(self.bits)))


RECIPES = {
    "measured": Recipe,
    "difference": Recipe,
    "straight_through": StraightThrough,
    "paper": Published,
}

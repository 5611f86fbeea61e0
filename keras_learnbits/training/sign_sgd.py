"""`SignSGD`: gradient descent by the sign of the gradient."""

import keras

from keras_learnbits._keras import variable_index
from keras_learnbits.arguments import check_number
from keras_learnbits.serialization import register


@register
class SignSGD(keras.optimizers.Optimizer):
    """Gradient descent by the sign of the gradient: `w <- w - learning_rate * sign(m)`.

    With a `momentum` of 0, `m` is the gradient `g`. Otherwise it is the running mean,
    `m <- momentum * m + (1 - momentum) * g`, whose sign changes less often if the gradient is noisy
    ("signum"). Gradients are summed over replicas before the sign is taken. A variable does not
    move if its gradient is 0 or not finite, or if `|m| <= dead_zone`.

    Source: Raghavan et al., "BitNet: Bit-Regularized Deep Neural Networks", arXiv 1708.04788;
    with momentum, Bernstein et al., "signSGD", arXiv 1802.04434.

    Args:
        learning_rate: Step size, a float or a
            `keras.optimizers.schedules.LearningRateSchedule`; for bit-widths it is in bits.
        momentum: Weight of the past in the running mean, 0 <= momentum < 1.
        dead_zone: Magnitude of `m` up to which a variable does not move; a float >= 0 or a
            schedule.
        name: Name of the optimizer.
        **kwargs: Arguments of `keras.optimizers.Optimizer`.

    Raises:
        ValueError: `momentum` or `dead_zone` is out of range.

    Examples:
        >>> variable = keras.Variable(2.0)
        >>> SignSGD(learning_rate=0.25).apply([keras.ops.array(123.0)], [variable])
        >>> float(variable)
        1.75
    """

    def __init__(self, learning_rate=0.01, momentum=0.0, dead_zone=0.0, name="sign_sgd", **kwargs):
        check_number("momentum", momentum, 0, below=1)
        if not callable(dead_zone):
            check_number("dead_zone", dead_zone, 0)
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.momentum = momentum
        self.dead_zone = dead_zone

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self.means = self.add_optimizer_variables(variables, "mean") if self.momentum else None

    def update_step(self, gradient, variable, learning_rate):
        gradient = keras.ops.cast(gradient, variable.dtype)
        step = keras.ops.cast(learning_rate, variable.dtype)
        is_number = keras.ops.isfinite(gradient)
        mean = gradient = keras.ops.where(is_number, gradient, 0.0)
        if self.momentum:
            past = self.means[variable_index(self, variable)]
            mean = self.momentum * past + (1 - self.momentum) * gradient
            self.assign(past, keras.ops.where(is_number, mean, past))
            # A gradient of 0 means that the variable must not move, e.g. because it is frozen.
            mean = keras.ops.where(gradient != 0, mean, 0.0)
        sign = keras.ops.sign(mean)
        dead_zone = self.dead_zone(self.iterations) if callable(self.dead_zone) else self.dead_zone
        if callable(self.dead_zone) or dead_zone:
            beyond = keras.ops.abs(mean) > keras.ops.cast(dead_zone, variable.dtype)
            sign = keras.ops.where(beyond, sign, 0.0)
        self.assign_sub(variable, step * sign)

    def get_config(self):
        dead_zone = self.dead_zone
        if callable(dead_zone):
            dead_zone = keras.saving.serialize_keras_object(dead_zone)
        return {**super().get_config(), "momentum": self.momentum, "dead_zone": dead_zone}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        if isinstance(config.get("dead_zone"), dict):
            config["dead_zone"] = keras.saving.deserialize_keras_object(config["dead_zone"])
        return super().from_config(config, custom_objects)

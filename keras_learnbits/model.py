"""`LearnedBitModel`: a Keras model whose training step learns the bits, too."""

import inspect

import keras
import tensorflow as tf

from keras_learnbits import bit_gradients, penalties
from keras_learnbits.layers.base import quantized_kernels
from keras_learnbits.optimizers import LearnedBitOptimizer, SignSGD
from keras_learnbits.serialization import choose, register


@register
class BitMetrics(keras.metrics.Metric):
    """Means over examples of the parts of the loss: one entry in the logs for each.

    Args:
        names: Names of the entries.
        name: Name of the metric.
    """

    def __init__(self, names, name="bit_metrics", **kwargs):
        super().__init__(name=name, **kwargs)
        self.names = tuple(names)
        self.total = self.add_variable((len(self.names),), "zeros", name="total")
        self.count = self.add_variable((), "zeros", name="count")

    def update_state(self, values, sample_weight=1.0):
        """Adds values, a dictionary of name to scalar, for `sample_weight` examples."""
        values = keras.ops.stack([keras.ops.cast(values[name], "float32") for name in self.names])
        sample_weight = keras.ops.cast(sample_weight, "float32")
        self.total.assign_add(values * sample_weight)
        self.count.assign_add(sample_weight)

    def result(self):
        means = self.total / keras.ops.maximum(self.count, 1.0)
        return {name: means[index] for index, name in enumerate(self.names)}

    def get_config(self):
        return {"names": self.names, "name": self.name}


class LearnedBitTraining:
    """What makes a Keras model learn bits; goes before the Keras class.

    The loss that `fit` minimizes and `evaluate` reports is

        loss = task_loss + quantization_reg * quantization_error + bit_reg * bit_penalty

    and all these names appear in the logs, with `mean_bits`.

    Attributes:
        bit_reg: Price of the bits, a scalar `keras.Variable` that callbacks may change.
        quantization_reg: Weight of the quantization error, likewise.
        bits_frozen: 1.0 while the bits stand still, else 0.0; a `keras.Variable`.

    These three belong to the training: `compile` sets them anew, and they are saved with the
    optimizer.
    """

    def _add_bit_metrics(self):
        """Creates the metrics, once the Keras class is initialized."""
        self.bit_metrics = BitMetrics(
            ["task_loss", "quantization_error", "bit_penalty", "mean_bits", "bit_reg"]
        )

    def _bit_state(self):
        """The `LearnedBitOptimizer`, which keeps the state of the bits' training."""
        if not self.compiled:
            raise AttributeError("You must compile the model before accessing its bits' training.")
        return getattr(self.optimizer, "inner_optimizer", self.optimizer)

    @property
    def bit_reg(self):
        return self._bit_state().bit_reg

    @property
    def quantization_reg(self):
        return self._bit_state().quantization_reg

    @property
    def bits_frozen(self):
        return self._bit_state().bits_frozen

    def compile(
        self,
        optimizer="rmsprop",
        loss=None,
        loss_weights=None,
        metrics=None,
        weighted_metrics=None,
        *,
        bit_reg=1e-3,
        quantization_reg=1e-3,
        bit_penalty="bits",
        quantization_error="relative",
        bit_gradient="straight_through",
        bit_optimizer=None,
        **kwargs,
    ):
        """Configures training: Keras's arguments, and how bits are learned.

        Args:
            optimizer, loss, loss_weights, metrics, weighted_metrics, **kwargs: As in
                `keras.Model.compile`. The optimizer acts on the weights only.
            bit_reg: Price of the bits: with the default penalty, what one mean bit per weight
                may cost in loss. A number >= 0.
            quantization_reg: Weight of the quantization error in the loss. A number >= 0.
            bit_penalty: `"bits"`, the mean bits per weight, or `"levels"`, the published
                `sum 2**b`.
            quantization_error: `"relative"`, `||q - W||^2 / ||W||^2` averaged over the weights,
                or `"squared"`, the published `sum 1/2 ||q - W||^2`.
            bit_gradient: What the sign is taken of: `"straight_through"` or `"paper"`.
            bit_optimizer: `keras.optimizers.Optimizer` for the bits; `SignSGD(0.01)` by default,
                which moves each bit-width by 0.01 bits a step. Where its gradient is 0, as it is
                while bits are frozen, it must not move them.

        Raises:
            ValueError: A price is negative or not finite, a name is unknown, or the model is
                built and has no learned-bit layer.
        """
        for name, value in (("bit_reg", bit_reg), ("quantization_reg", quantization_reg)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"`{name}` must be a finite number >= 0. Received: {name}={value}")
        self._bit_penalty = choose(bit_penalty, penalties.BIT_PENALTIES, "bit_penalty")
        self._quantization_error = choose(
            quantization_error, penalties.QUANTIZATION_ERRORS, "quantization_error"
        )
        self._bit_gradient = choose(bit_gradient, bit_gradients.BIT_GRADIENTS, "bit_gradient")()
        if self.built and self.layers:
            self._check_kernels(quantized_kernels(self))
        super().compile(
            optimizer=_with_bit_optimizer(optimizer, bit_optimizer),
            loss=loss,
            loss_weights=loss_weights,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            **kwargs,
        )
        self.bit_reg.assign(bit_reg)
        self.quantization_reg.assign(quantization_reg)
        self._bit_compile_config = {
            "bit_reg": bit_reg,
            "quantization_reg": quantization_reg,
            "bit_penalty": bit_penalty,
            "quantization_error": quantization_error,
            "bit_gradient": bit_gradient,
        }

    def get_compile_config(self):
        config = super().get_compile_config()
        return {**config, **self._bit_compile_config} if config else config

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    def _check_kernels(self, kernels):
        if not kernels:
            raise ValueError(
                "A LearnedBitModel needs at least one learned-bit layer, such as LearnedBitDense. "
                f"Received: layers={[layer.name for layer in self.layers]}"
            )

    # The layers list their bits as non-trainable, so that other models leave them alone; here
    # they are trained.

    def _moving_bits(self):
        if not self.trainable:
            return []
        return [kernel.bits for kernel in quantized_kernels(self) if kernel.kernel.trainable]

    def _without_moving_bits(self, variables):
        moving = {id(bits) for bits in self._moving_bits()}
        return [variable for variable in variables if id(variable) not in moving]

    @property
    def trainable_variables(self):
        return super().trainable_variables + self._moving_bits()

    @property
    def trainable_weights(self):
        return super().trainable_weights + self._moving_bits()

    @property
    def non_trainable_variables(self):
        return self._without_moving_bits(super().non_trainable_variables)

    @property
    def non_trainable_weights(self):
        return self._without_moving_bits(super().non_trainable_weights)

    @property
    def bits_are_frozen(self):
        """Whether the bits stand still."""
        return bool(keras.ops.convert_to_numpy(self.bits_frozen.value))

    def freeze_bits(self):
        """Rounds every bit-width to the integer in use and lets it stand still from now on."""
        for kernel in quantized_kernels(self):
            kernel.bits.assign(kernel.integer_bits())
        self.bits_frozen.assign(1.0)

    def unfreeze_bits(self):
        """Lets the bit-widths move again."""
        self.bits_frozen.assign(0.0)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The task's loss plus the quantization error and the price of the bits.

        A subclass with a loss of its own adds it to `super().compute_loss(...)`, or leaves the
        two terms out.
        """
        task_loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        kernels = quantized_kernels(self)
        self._check_kernels(kernels)
        sizes = [kernel.size for kernel in kernels]
        bits = tf.stack([kernel.bits.value for kernel in kernels])
        error = self._quantization_error(
            tf.stack([kernel.squared_error() for kernel in kernels]),
            tf.stack([kernel.energy() for kernel in kernels]),
            sizes,
        )
        penalty = self._bit_penalty(bits, sizes)
        bit_reg = tf.convert_to_tensor(self.bit_reg.value)
        quantization_reg = tf.convert_to_tensor(self.quantization_reg.value)
        # Keras has divided the task's loss by the number of replicas; metrics want the whole.
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        self.bit_metrics.update_state(
            {
                "task_loss": task_loss * replicas,
                "quantization_error": error,
                "bit_penalty": penalty,
                "mean_bits": penalties.mean_bits(bits, sizes),
                "bit_reg": bit_reg,
            },
            sample_weight=_batch_size(x, y),
        )
        terms = (quantization_reg * error + bit_reg * penalty) / replicas
        return task_loss + tf.cast(terms, task_loss.dtype)

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if not all(layer.built for layer in (self, *self.layers)):  # bits to watch must exist
            self(tf.nest.map_structure(lambda t: keras.KerasTensor(t.shape, t.dtype), x))
        moving = [kernel for kernel in quantized_kernels(self) if kernel.kernel.trainable]
        with tf.GradientTape() as tape:
            tape.watch([kernel.bits.value for kernel in moving])
            y_pred = self(x, **self._training_argument())
            loss = self.compute_loss(x, y, y_pred, sample_weight, training=True)
            scaled_loss = self.optimizer.scale_loss(loss)
        variables = self.trainable_variables
        gradients = tape.gradient(scaled_loss, variables, self._one_if_finite(loss))
        gradients = self._estimate_bit_gradients(list(gradients), variables, moving)
        self._bit_gradient.before_update(moving)
        self.optimizer.apply(gradients, variables)
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss * replicas, sample_weight=_batch_size(x, y))
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _training_argument(self):
        takes = inspect.signature(self.call).parameters
        return {"training": True} if "training" in takes else {}

    def _one_if_finite(self, loss):
        """The gradient of the loss by itself; stops training by name if the loss is no number.

        Every gradient is computed from this one, so nothing is changed before the check. Under
        `jit_compile=True` there is none, since XLA leaves checks out.
        """
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            return None  # it skips such steps itself
        message = (
            "LearnedBitModel stops before this step changes any weight, since the loss is not "
            "finite. Look for NaN in the data, or lower the learning rate. Received: loss"
        )
        checked = tf.debugging.check_numerics(loss, message)
        return tf.cast(tf.math.is_finite(checked), loss.dtype)

    def _estimate_bit_gradients(self, gradients, variables, kernels):
        """Puts the estimator's gradients in the place of the straight-through ones."""
        index = {id(variable): i for i, variable in enumerate(variables)}
        step = bit_gradients.BitStep(
            kernels=kernels,
            kernel_gradients=[gradients[index[id(kernel.kernel)]] for kernel in kernels],
            bit_gradients=[gradients[index[id(kernel.bits)]] for kernel in kernels],
            price_gradients=self._price_gradients(kernels),
            quantization_reg=tf.convert_to_tensor(self.quantization_reg.value),
            loss_scale=self.optimizer.scale_loss(1.0),
        )
        moves = 1.0 - self.bits_frozen.value
        for kernel, gradient in zip(kernels, self._bit_gradient(step), strict=True):
            gradients[index[id(kernel.bits)]] = self.optimizer.scale_loss(moves * gradient)
        return gradients

    def _price_gradients(self, moving):
        """This replica's share of the derivative of `bit_reg * bit_penalty` by each bit-width."""
        kernels = quantized_kernels(self)
        bits = tf.stack([kernel.bits.value for kernel in kernels])
        with tf.GradientTape() as tape:
            tape.watch(bits)
            penalty = self._bit_penalty(bits, [kernel.size for kernel in kernels])
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        slopes = self.bit_reg.value * tape.gradient(penalty, bits) / replicas
        return [slopes[kernels.index(kernel)] for kernel in moving]


def _batch_size(x, y):
    return tf.shape(next(t for t in tf.nest.flatten((x, y)) if t is not None))[0]


def _with_bit_optimizer(optimizer, bit_optimizer):
    """Puts the bits' optimizer beside the user's, inside loss scaling if there is any."""
    optimizer = keras.optimizers.get(optimizer)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        config = optimizer.get_config()
        config["inner_optimizer"] = _with_bit_optimizer(optimizer.inner_optimizer, bit_optimizer)
        return keras.optimizers.LossScaleOptimizer(**config)
    if isinstance(optimizer, LearnedBitOptimizer):  # of a model compiled before
        optimizer, learned_by = optimizer.weight_optimizer, optimizer.bit_optimizer
        bit_optimizer = bit_optimizer or learned_by
    bit_optimizer = SignSGD() if bit_optimizer is None else keras.optimizers.get(bit_optimizer)
    return LearnedBitOptimizer(optimizer, bit_optimizer)


@register
class LearnedBitModel(LearnedBitTraining, keras.Model):
    """`keras.Model` whose `fit` learns weights and bit-widths together.

    Use it as `keras.Model`: with inputs and outputs, or as a base class with a `call` of your
    own. `LearnedBitSequential` is the same for a stack of layers.

    Example:
    >>> inputs = keras.Input((8,))
    >>> outputs = keras_learnbits.LearnedBitDense(1)(inputs)
    >>> model = LearnedBitModel(inputs, outputs)
    >>> model.compile("adam", "mse", bit_reg=0.1)
    >>> history = model.fit(np.ones((32, 8)), np.ones((32, 1)), verbose=0)
    >>> sorted(history.history)
    ['bit_penalty', 'bit_reg', 'loss', 'mean_bits', 'quantization_error', 'task_loss']
    """

    def __new__(cls, *args, **kwargs):
        if cls is LearnedBitModel and _is_functional(args, kwargs):
            cls = LearnedBitFunctional
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        if _is_functional(args, kwargs) and not isinstance(self, LearnedBitFunctional):
            _make_functional(type(self))
        super().__init__(*args, **kwargs)
        self._add_bit_metrics()


# Keras turns a class that is given inputs and outputs into a functional one for good, by changing
# the bases of all its ancestors, LearnedBitModel among them: models with a `call` of their own
# would no longer work. So there is a functional class of ours, and only users' classes are changed.


def _is_functional(args, kwargs):
    return len(args) + ("inputs" in kwargs) + ("outputs" in kwargs) >= 2


def _make_functional(cls):
    """Puts `LearnedBitFunctional` in the place of `LearnedBitModel` among a class's ancestors."""
    for base in cls.__bases__:
        if base is not LearnedBitModel and issubclass(base, LearnedBitModel):
            _make_functional(base)
    cls.__bases__ = tuple(
        LearnedBitFunctional if base is LearnedBitModel else base for base in cls.__bases__
    )


def _keras_functional_class():
    """The class that `keras.Model(inputs, outputs)` makes; it has no public name."""
    inputs = keras.Input(())
    return type(keras.Model(inputs, inputs))


@register
class LearnedBitFunctional(LearnedBitModel, _keras_functional_class()):
    """What `LearnedBitModel(inputs, outputs)` makes."""

    def __init__(self, inputs, outputs, name=None, **kwargs):
        super().__init__(inputs, outputs, name=name, **kwargs)


@register
class LearnedBitSequential(LearnedBitTraining, keras.Sequential):
    """`keras.Sequential` whose `fit` learns weights and bit-widths together.

    Example:
    >>> model = LearnedBitSequential([keras.Input((8,)), keras_learnbits.LearnedBitDense(1)])
    >>> model.compile("adam", "mse", bit_reg=0.1)
    >>> history = model.fit(np.ones((320, 8)), np.ones((320, 1)), verbose=0)
    >>> round(float(model.layers[0].bits), 2)  # ten steps of 0.01 bits
    7.9
    """

    def __init__(self, layers=None, trainable=True, name=None):
        super().__init__(layers, trainable=trainable, name=name)
        self._add_bit_metrics()

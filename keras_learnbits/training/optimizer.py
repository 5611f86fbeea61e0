"""The optimizer that updates weights, scales and bit-widths separately."""

import contextlib

import keras
import tensorflow as tf

from keras_learnbits import bit_gradients
from keras_learnbits.layers.compute_scope import keeping_scales
from keras_learnbits.layers.discovery import activations_among, quantized_tensor_of
from keras_learnbits.numerics.xla import compiled_updates
from keras_learnbits.serialization import register
from keras_learnbits.training.sign_sgd import SignSGD


@register
class LearnedBitOptimizer(keras.optimizers.MultiOptimizer):
    """Combines the user's optimizer for the weights with a separate one for the bits.

    `learning_rate` and `iterations` are those of the user's optimizer, so schedules, callbacks and
    TensorBoard work as usual. Weight decay, clipping, averaging and accumulation apply to the
    weights. Scales have a copy of the user's optimizer without weight decay, which would pull their
    logarithms towards 0, i.e. the scales towards 1.

    Args:
        optimizer: `keras.optimizers.Optimizer` for the weights.
        bit_optimizer: `keras.optimizers.Optimizer` for the bits, e.g. `SignSGD(0.01)`.
        bit_gradient: Estimator of the gradients with respect to the bits: name, config or
            `keras_learnbits.bit_gradients.BitGradient`. Its state is saved with this optimizer.
        name: Name of the optimizer.

    Attributes:
        weight_optimizer: Optimizer of the weights.
        scale_optimizer: Optimizer of the scales.
        bit_optimizer: Optimizer of the bits.
        bit_reg, quantization_reg, bits_frozen: State of the training, which the model has under
            the same names. It is here because it is saved with the optimizer, like the learning
            rate, and not with the weights.

    Raises:
        ValueError: `optimizer` is not an optimizer, or is a `MultiOptimizer`, which Keras cannot
            nest.
    """

    def __init__(self, optimizer, bit_optimizer, bit_gradient, name="learned_bit_optimizer"):
        single = isinstance(optimizer, keras.optimizers.Optimizer)
        if not single or isinstance(optimizer, keras.optimizers.MultiOptimizer):
            raise ValueError(
                "The optimizer of a LearnedBitModel must be a single one, because Keras does not "
                f"nest `MultiOptimizer`. Received: optimizer={optimizer}"
            )
        super().__init__(self._choose, loss_scale_factor=optimizer.loss_scale_factor, name=name)
        self.weight_optimizer = optimizer
        self.scale_optimizer = _following(optimizer)
        self.bit_optimizer = bit_optimizer
        bit_gradient = bit_gradients.get(bit_gradient)
        # A copy, because its state belongs to this optimizer.
        self.bit_gradient = bit_gradient.from_config(bit_gradient.get_config())
        self.bit_reg = self.add_variable((), name="bit_reg", dtype="float32")
        self.quantization_reg = self.add_variable((), name="quantization_reg", dtype="float32")
        self.bits_frozen = self.add_variable((), name="bits_frozen", dtype="float32")
        self._steered = {}  # dictionary of the name of a price to its value before `steer`

    def steer(self, name, value):
        """Sets `bit_reg` or `quantization_reg` until `release`."""
        price = getattr(self, name)
        self._steered.setdefault(name, float(tf.convert_to_tensor(price.value)))
        price.assign(value)

    def release(self):
        """Restores the prices from before `steer`."""
        for name, value in self._steered.items():
            getattr(self, name).assign(value)
        self._steered = {}

    @contextlib.contextmanager
    def released(self):
        """A scope with the prices from before `steer`, in which a model is saved."""
        steered = {n: float(tf.convert_to_tensor(getattr(self, n).value)) for n in self._steered}
        for name, value in self._steered.items():
            getattr(self, name).assign(value)
        try:
            yield
        finally:
            for name, value in steered.items():
                getattr(self, name).assign(value)

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        owners = [quantized_tensor_of(variable) for variable in variables]
        pairs = zip(owners, variables, strict=True)
        tensors = [owner for owner, variable in pairs if owner and variable is owner.bits]
        activations = [each.name() for each in activations_among(tensors)]
        if self.bit_gradient.kernels_only and activations:
            raise ValueError(
                "The bits of activations are learned with bit_gradient='measured' or "
                "'straight_through'; with others set `trainable=False` of these layers. Received: "
                f"bit_gradient={type(self.bit_gradient).__name__}, activations={activations}"
            )
        self.bit_gradient.build(tensors, self.add_variable)

    def _choose(self, variable):
        """The optimizer of a variable."""
        tensor = quantized_tensor_of(variable)
        if tensor is None:
            return self.weight_optimizer
        return self.bit_optimizer if variable is tensor.bits else self.scale_optimizer

    def _split(self, items, variables):
        """Yields each optimizer and the items that belong to it.

        Args:
            items: List of one item for each variable.
            variables: List of `keras.Variable`s.
        """
        # The optimizer of the weights comes last: its update advances `iterations`, and so the
        # learning rate of a schedule, which the optimizer of the scales reads in the same step.
        optimizers = (self.scale_optimizer, self.bit_optimizer, self.weight_optimizer)
        owners = [self._choose(variable) for variable in variables]
        for optimizer in optimizers:
            share = [item for item, owner in zip(items, owners, strict=True) if owner is optimizer]
            if share:
                yield optimizer, share

    # keras/src/optimizers/multi_optimizer.py, `apply`: Keras calls the optimizers in the order of
    # their first variables. Here the optimizer of the weights must be the last one, see `_split`,
    # and XLA compiles large updates.
    def apply(self, grads, trainable_variables):
        if not self.built:
            self.build(trainable_variables)
        pairs = list(zip(grads, trainable_variables, strict=True))
        for optimizer, share in self._split(pairs, trainable_variables):
            if optimizer is self.bit_optimizer and all(gradient is None for gradient, _ in share):
                raise ValueError(
                    "Bits move in the `train_step` of this library, which gives them a gradient. A "
                    "subclass with a custom `train_step` must call `super().train_step`; a custom "
                    "loss belongs in `compute_loss`. Received: no gradient of "
                    f"{[variable.path for _, variable in share]}"
                )
            # Eager updates assign kernels, which must not fit the scales again.
            with compiled_updates(optimizer), keeping_scales():
                optimizer.apply(*map(list, zip(*share, strict=True)))

    def finalize_variable_values(self, var_list):
        with keeping_scales():
            for optimizer, share in self._split(var_list, var_list):
                optimizer.finalize_variable_values(share)

    @property
    def learning_rate(self):
        return self.weight_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.weight_optimizer.learning_rate = learning_rate

    @property
    def iterations(self):
        return self.weight_optimizer.iterations

    @property
    def optimizers(self):
        # keras/src/callbacks/learning_rate_scheduler.py and others set the learning rate of all
        # optimizers in this attribute. The bits' optimizer must keep its own rate.
        raise AttributeError("Use `weight_optimizer` and `bit_optimizer`.")

    def get_config(self):
        return {
            "optimizer": keras.saving.serialize_keras_object(self.weight_optimizer),
            "bit_optimizer": keras.saving.serialize_keras_object(self.bit_optimizer),
            "bit_gradient": keras.saving.serialize_keras_object(self.bit_gradient),
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        for key in ("optimizer", "bit_optimizer", "bit_gradient"):
            config[key] = keras.saving.deserialize_keras_object(config[key], custom_objects)
        return cls(**config)


def _following(optimizer):
    """A copy of an optimizer that reads its learning rate and has no weight decay."""
    config = optimizer.get_config()
    config["name"] = f"{optimizer.name}_scales"
    config["learning_rate"] = lambda: optimizer.learning_rate
    for name in config:  # Muon has two
        if name.endswith("weight_decay") and config[name] is not None:
            config[name] = 0.0
    try:
        return type(optimizer).from_config(config)
    except TypeError as error:
        raise ValueError(
            "The scales of a LearnedBitModel are updated by a copy of the optimizer, so its "
            "`from_config` must accept what its `get_config` returns. "
            f"Received: optimizer={optimizer.name!r} of class {type(optimizer).__name__}, {error}"
        ) from error


def with_bits(optimizer, bit_optimizer, bit_gradient):
    """Combines an optimizer with one for the bits, inside loss scaling if there is any.

    Args:
        optimizer: Optimizer in any form that `keras.Model.compile` takes, including the optimizer
            of a compiled `LearnedBitModel`.
        bit_optimizer: Optimizer for the bits in the same forms. None takes that of such a model, or
            `SignSGD` with the step of `bit_gradient`.
        bit_gradient: `keras_learnbits.bit_gradients.BitGradient`.

    Returns:
        `LearnedBitOptimizer`, or a `keras.optimizers.LossScaleOptimizer` with one inside.
    """
    optimizer = keras.optimizers.get(optimizer)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        config = optimizer.get_config()
        config["inner_optimizer"] = with_bits(
            optimizer.inner_optimizer, bit_optimizer, bit_gradient
        )
        return keras.optimizers.LossScaleOptimizer(**config)
    if isinstance(optimizer, LearnedBitOptimizer):
        optimizer, learned_by = optimizer.weight_optimizer, optimizer.bit_optimizer
        bit_optimizer = bit_optimizer or learned_by
    if bit_optimizer is None:
        bit_optimizer = SignSGD(bit_gradient.bit_learning_rate)
    bit_optimizer = keras.optimizers.get(bit_optimizer)
    return LearnedBitOptimizer(optimizer, bit_optimizer, bit_gradient)

"""`LearnedBitDistiller`: bits learned from a teacher, such as the float model."""

import keras

from keras_learnbits.serialization import register
from keras_learnbits.training.compiling import BitCompiling
from keras_learnbits.training.fitting import LearnedBitTraining
from keras_learnbits.training.replicas import shared


class _ReplicaDistiller(keras.distillation.Distiller):
    """Keras's distiller with its loss divided by the number of replicas, as in other models."""

    def compute_loss(self, *args, **kwargs):
        return shared(super().compute_loss(*args, **kwargs))


@register
class LearnedBitDistiller(LearnedBitTraining, _ReplicaDistiller):
    """`keras.distillation.Distiller` whose `fit` learns the student's bits, too.

    `task_loss` is `student_loss_weight` times the loss against the labels, plus
    `1 - student_loss_weight` times the distillation loss. If the student's bits are frozen when the
    distiller is compiled, as those of `keras_learnbits.quantize` are, they stay frozen. After
    training, save `student`. Like Keras's class, a distiller ignores sample weights, and is saved
    without its compile settings.

    Two properties of Keras's class (3.15): `LogitsDistillation` needs its divergence as an object,
    `loss=keras.losses.KLDivergence(reduction=None)`; if it is given by name, Keras computes it from
    logits instead of probabilities. And losses that are objects, here and in `compile`, should have
    `reduction=None`, because the distiller takes the mean; other reductions divide by the number
    of replicas a second time.

    Args:
        *args: Arguments of `keras.distillation.Distiller`: `teacher`, `student`,
            `distillation_losses`, `student_loss_weight`, ...
        **kwargs: Arguments of `keras.distillation.Distiller`.

    Examples:
        >>> inputs = keras.Input((8,))
        >>> teacher = keras.Model(inputs, keras.layers.Dense(2)(inputs))
        >>> student = keras.Model(inputs, keras_learnbits.LearnedBitDense(2)(inputs))
        >>> divergence = keras.losses.KLDivergence(reduction=None)
        >>> distiller = LearnedBitDistiller(
        ...     teacher, student, keras.distillation.LogitsDistillation(2.0, loss=divergence))
        >>> distiller.compile("adam", "mse", bit_reg=1.0)
        >>> history = distiller.fit(np.ones((320, 8)), np.ones((320, 2)), verbose=0)
        >>> round(float(student.layers[-1].bits), 2)  # ten steps of 0.01 bits
        7.9
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Keras's distiller has no weights but those of the two models, and is unbuilt until its
        # first step. `BackupAndRestore` refuses that.
        self.built = self.teacher.built and self.student.built
        self._add_bit_metrics()

    def bit_learner(self):
        return self.student

    def _has_frozen_bits(self):
        return super()._has_frozen_bits() or (
            isinstance(self.student, BitCompiling) and self.student._has_frozen_bits()
        )

    def _computes_a_loss_itself(self):
        # Keras's distiller overrides `compute_loss`, but needs a loss in `compile`.
        return False

    def get_compile_config(self):
        # Without it Keras does not compile a loaded distiller. Keras's class passes the loss on to
        # its own attribute, so `super()` has none to restore.
        return None

"""`LearnedBitDistiller`: bits learned from a teacher, such as the float net."""

import keras

from keras_learnbits.serialization import register
from keras_learnbits.training.fitting import LearnedBitTraining
from keras_learnbits.training.replicas import shared


class _ReplicaDistiller(keras.distillation.Distiller):
    """Keras's, with its loss divided by the number of replicas, as that of other models is."""

    def compute_loss(self, *args, **kwargs):
        return shared(super().compute_loss(*args, **kwargs))


@register
class LearnedBitDistiller(LearnedBitTraining, _ReplicaDistiller):
    """`keras.distillation.Distiller` whose `fit` learns the student's bits, too.

    `task_loss` is then `student_loss_weight` times the loss against the labels plus the rest
    times the distillation loss. After training, `student` is the model to keep: save that one. As
    Keras's, a distiller does not use sample weights, and is saved without its compile settings.

    Two things to know about Keras's (3.15): `LogitsDistillation` needs its divergence as an object,
    `loss=keras.losses.KLDivergence(reduction=None)`; given by name, it is taken of the logits. And
    losses given as objects, here and in `compile`, should have `reduction=None`: the distiller
    takes the mean, which other reductions divide by the number of replicas once more.

    Args:
        *args: Those of `keras.distillation.Distiller`: `teacher`, `student`,
            `distillation_losses`, `student_loss_weight`, ...
        **kwargs: Likewise.

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
        self._add_bit_metrics()

    def bit_learner(self):
        return self.student

    def _computes_a_loss_itself(self):
        return False  # Keras's distiller does, from a loss of its own

    def get_compile_config(self):
        return None  # Keras's distiller keeps no loss that could be restored

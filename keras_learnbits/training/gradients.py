"""`Gradients`: the gradients of a training step, by variable."""

import tensorflow as tf


class Gradients:
    """Gradients of a loss with respect to variables.

    Args:
        variables: List of `keras.Variable`s.
        values: List of a tensor or `tf.IndexedSlices` for each variable, or None if the loss does
            not depend on it.
    """

    def __init__(self, variables, values):
        self.variables = variables
        self.values = list(values)
        # Keras's variables are not hashable.
        self._index = {id(variable): index for index, variable in enumerate(variables)}

    def of(self, variable):
        """The gradient with respect to a variable, or None."""
        return self.values[self._index[id(variable)]]

    def of_or_zero(self, variable):
        """The gradient with respect to a scalar variable; 0 if the loss does not depend on it."""
        gradient = self.of(variable)
        return tf.zeros(()) if gradient is None else gradient

    def replace(self, variable, gradient):
        """Sets the gradient with respect to a variable."""
        self.values[self._index[id(variable)]] = gradient

    def check(self, loss):
        """Stops training before a variable changes, unless loss and gradients are finite.

        A loss may be finite while a gradient is not: TensorFlow's ReLU maps NaN to 0. There is no
        check under `jit_compile=True`, because XLA drops checks.

        Args:
            loss: Scalar tensor.
        """
        present = [
            tf.convert_to_tensor(getattr(g, "values", g)) for g in self.values if g is not None
        ]
        # One number that is not finite if any gradient is not; a check of each takes longer.
        norm = tf.add_n([tf.cast(tf.nn.l2_loss(gradient), tf.float32) for gradient in present])
        found = tf.stack([tf.cast(loss, tf.float32), norm])
        message = (
            "LearnedBitModel stops before this step changes a trained weight, because its loss or "
            "the norm of its gradients is not finite. Look for NaN in the data, or lower the "
            "learning rate. Received: loss and squared norm"
        )
        # The optimizer reads the copies, which depend on the check.
        with tf.control_dependencies([tf.debugging.check_numerics(found, message)]):
            self.values = [
                g if g is None else tf.nest.map_structure(tf.identity, g, expand_composites=True)
                for g in self.values
            ]

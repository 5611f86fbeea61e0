"""`estimate_batch_norm`: moving statistics that belong to the weights as they are."""

import keras
import tensorflow as tf

MOVING_STATISTICS = ("moving_mean", "moving_variance")


def estimate_batch_norm(model, data):
    """Replaces the moving statistics of batch normalization by their means over data.

    While weights are quantized and bits move, moving averages lag behind; this takes the plain
    mean over batches of the statistics that training uses. Nothing else changes.

    Args:
        model: A built Keras model.
        data: Dataset, or other iterable, of batches of inputs or of tuples that begin with them.

    Raises:
        ValueError: `data` has no batch.

    Examples:
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization()])
        >>> estimate_batch_norm(model, [np.ones((4, 2)), 4 * np.ones((4, 2))])
        >>> model.layers[0].moving_mean.numpy().round(5).tolist()
        [2.5, 2.5]
    """
    moving = [v for v in model.non_trainable_variables if v.name in MOVING_STATISTICS]
    if not moving:
        return

    @tf.function
    def after_a_step(x, start):
        """The statistics `momentum * start + (1 - momentum) * batch`."""
        with keras.StatelessScope(
            [(v, tf.cast(tf.fill(v.shape, start), v.dtype)) for v in moving]
        ) as scope:
            model(x, training=True)
        return [scope.get_current_value(v) for v in moving]

    sums, batches, momenta = [tf.zeros(v.shape, v.dtype) for v in moving], 0, None
    for batch in data:
        x = batch[0] if isinstance(batch, tuple) else batch
        from_zero = after_a_step(x, tf.constant(0.0))
        if momenta is None:
            from_one = after_a_step(x, tf.constant(1.0))
            momenta = [one - zero for one, zero in zip(from_one, from_zero, strict=True)]
        sums = [total + new for total, new in zip(sums, from_zero, strict=True)]
        batches += 1
    if not batches:
        raise ValueError("The statistics need at least one batch. Received: none in `data`")
    for variable, total, momentum in zip(moving, sums, momenta, strict=True):
        # A layer that is not trained keeps its statistics.
        updated = batches * (1.0 - momentum)
        mean = tf.math.divide_no_nan(total, updated)
        variable.assign(tf.where(updated > 0, mean, tf.convert_to_tensor(variable.value)))

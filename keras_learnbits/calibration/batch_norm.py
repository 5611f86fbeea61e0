"""`estimate_batch_norm`: moving statistics that match the current weights."""

import keras
import tensorflow as tf

MOVING_STATISTICS = ("moving_mean", "moving_variance")


def estimate_batch_norm(model, data):
    """Replaces the moving statistics of batch normalization by their means over data.

    Moving averages lag behind the weights, in particular while bit-widths change. This takes the
    mean over batches of the statistics that training uses. Nothing else changes.

    Args:
        model: A built Keras model.
        data: Dataset or other iterable of batches: of inputs, or of tuples that begin with them.

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
    updated = []

    @tf.function(autograph=False)
    def after_a_step(x, start):
        """The statistics `momentum * start + (1 - momentum) * batch` after a training step."""
        # A stateless scope receives the assignments, so that the model does not change.
        with keras.StatelessScope(
            [(v, tf.cast(tf.fill(v.shape, start), v.dtype)) for v in updated]
        ) as scope:
            model(x, training=True)
        return [scope.get_current_value(v) for v in updated]

    sums, batches, momenta = [], 0, []
    for batch in data:
        x = batch[0] if isinstance(batch, tuple) else batch
        if not batches:
            updated += _updated_by_a_step(model, x, moving)
        from_zero = after_a_step(x, tf.constant(0.0))
        # Steps from two initial values, 0 and 1, give the momentum of each layer and the batch's
        # statistics, whatever the class of the layer.
        if not batches:
            from_one = after_a_step(x, tf.constant(1.0))
            momenta = [one - zero for one, zero in zip(from_one, from_zero, strict=True)]
            sums = [tf.zeros_like(each) for each in from_zero]
        sums = [total + new for total, new in zip(sums, from_zero, strict=True)]
        batches += 1
    if not batches:
        raise ValueError("The statistics need at least one batch. Received: no batch in `data`")
    for variable, total, momentum in zip(updated, sums, momenta, strict=True):
        share = batches * (1.0 - momentum)  # 0 for a layer with a momentum of 1
        mean = tf.math.divide_no_nan(total, share)
        variable.assign(tf.where(share > 0, mean, tf.convert_to_tensor(variable.value)))


def _updated_by_a_step(model, x, variables):
    """The variables that a training step changes; layers in inference mode keep theirs."""
    with keras.StatelessScope() as scope:
        model(x, training=True)
    return [v for v in variables if scope.get_current_value(v) is not None]

"""`BitLogger`: bit-widths and quantization errors in the logs."""

import os

import keras
import tensorflow as tf

from keras_learnbits.layers.discovery import quantized_kernels, quantized_tensors, unique_names

# Name of the chart of all layers in TensorBoard.
CHART = "bit-width [bits]"


class BitLogger(keras.callbacks.Callback):
    """Adds each layer's bits and quantization error to the logs.

    Callbacks share the logs. If this one is *before* `TensorBoard` and `CSVLogger`, then
    `bits/<layer>` and `quantization_error/<layer>` appear as curves and columns, and in `History`.
    The bits are the latent ones; rounded, they are those that layers use.

    Args:
        update_freq: `"epoch"`, or the number of batches between two entries. With a number,
            batch logs have the bits too, so that `TensorBoard(update_freq=...)` with the same
            number draws them over steps, and `steps` and `bits` are recorded.
        log_dir: Directory of the `TensorBoard` callback. TensorBoard then shows the bits of all
            layers in one chart, `bit-width [bits]`, over training steps. Each layer is a separate
            run `bits/<layer>`, because a chart draws one curve per run; its event file is open
            during training. With None there are only separate charts per layer.

    Attributes:
        names: Names of the quantized kernels, then of the activations.
        steps: List of the training steps at which bits were recorded. They are counted from the
            first epoch, also if an interrupted training is resumed (`initial_epoch`,
            `BackupAndRestore`) and the number of batches is known.
        bits: List with one list of latent bit-widths for each of these steps.

    Raises:
        ValueError: `update_freq` is neither `"epoch"` nor a positive integer.

    Examples:
        >>> model = keras_learnbits.LearnedBitSequential(
        ...     [keras.Input((8,)), keras_learnbits.LearnedBitDense(1, name="head")])
        >>> model.compile("adam", "mse")
        >>> history = model.fit(
        ...     np.ones((32, 8)), np.ones((32, 1)), callbacks=[BitLogger()], verbose=0)
        >>> [name for name in sorted(history.history) if "/" in name]
        ['bits/head', 'quantization_error/head']
    """

    def __init__(self, update_freq="epoch", log_dir=None):
        super().__init__()
        positive = isinstance(update_freq, int) and update_freq > 0
        if update_freq != "epoch" and not positive:
            raise ValueError(
                "`update_freq` must be 'epoch' or a positive number of batches. "
                f"Received: update_freq={update_freq!r}"
            )
        self.update_freq = update_freq
        self.log_dir = log_dir
        self.names, self.steps, self.bits = [], [], []
        self._epoch_start = self._step = 0
        self._writers = {}

    def on_train_end(self, logs=None):
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def on_epoch_begin(self, epoch, logs=None):
        if not self._step:  # a resumed training begins at a later epoch
            self._step = epoch * ((self.params or {}).get("steps") or 0)
        self._epoch_start = self._step

    def on_train_batch_end(self, batch, logs=None):
        # With `steps_per_execution` Keras calls this once for several batches; `batch` is the last.
        before, self._step = self._step, self._epoch_start + batch + 1
        if (
            self.update_freq != "epoch"
            and self._step // self.update_freq > before // self.update_freq
        ):
            self._record(logs)

    def on_epoch_end(self, epoch, logs=None):
        self._record(logs)
        if logs is not None:
            kernels = quantized_kernels(self.model)
            errors = tf.stack([kernel.squared_error() for kernel in kernels])
            squared_norms = tf.stack([kernel.squared_norm() for kernel in kernels])
            relative = tf.math.divide_no_nan(errors, squared_norms).numpy().tolist()
            # Kernels come first, which `zip` relies on: errors of activations are unknown here.
            for name, error in zip(self.names, relative, strict=False):
                logs[f"quantization_error/{name}"] = error

    def _record(self, logs):
        tensors = quantized_tensors(self.model)
        bits = tf.stack([tensor.bits.value for tensor in tensors]).numpy().tolist()
        self.names = unique_names(tensors)
        # The last batch of an epoch and the end of the epoch are the same step.
        if not self.steps or self.steps[-1] != self._step:
            self.steps.append(self._step)
            self.bits.append(bits)
            if self.log_dir is not None:
                self._draw(bits)
        if logs is not None:
            logs.update({f"bits/{n}": b for n, b in zip(self.names, bits, strict=True)})

    def _draw(self, bits):
        """Adds a point to each layer's curve in the chart of all layers."""
        for name, each in zip(self.names, bits, strict=True):
            if name not in self._writers:
                directory = os.path.join(self.log_dir, "bits", name)
                self._writers[name] = tf.summary.create_file_writer(directory)
            # `TensorBoard(update_freq=...)` allows writing in some steps only.
            with tf.summary.record_if(True), self._writers[name].as_default(step=self._step):
                tf.summary.scalar(CHART, each)

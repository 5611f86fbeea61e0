"""Callbacks of the programs: the seconds of each epoch, and a progress bar of one line."""

import time

import keras


class EpochSeconds(keras.callbacks.Callback):
    """Seconds of each epoch, validation included."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)


class Progress(keras.callbacks.ProgbarLogger):
    """Keras's progress bar with the metrics that fit in a line; the logs have all of them."""

    shown = ("loss", "task_loss", "accuracy", "mean_bits", "val_cross_entropy", "val_accuracy")

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, self._only_shown(logs))

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, self._only_shown(logs))

    def _only_shown(self, logs):
        return {name: logs[name] for name in self.shown if name in logs}

"""Learned bits on several workers: a loop over `strategy.run(model.train_step)`.

python experiments/multi_worker.py --workers=2

Keras's `fit` does not run under `MultiWorkerMirroredStrategy` (Keras issue 20585). TensorFlow's
training loop does: each worker runs this loop, and the model's training step combines gradients,
metrics and the estimators' state over workers. With `TF_CONFIG` set, the program is one worker of
that cluster; otherwise it starts `--workers` workers on this machine. Each prints the loss of each
epoch and its bits.
"""

import json
import os
import socket
import subprocess
import sys

import digits
import keras
import tensorflow as tf
from absl import app, flags, logging

import keras_learnbits as klb

FLAGS = flags.FLAGS
flags.DEFINE_integer("workers", 2, "Workers to start if TF_CONFIG is not set.", lower_bound=1)


def train(strategy):
    """Trains the net of `digits`; returns the loss of each epoch and the bits of each layer."""
    keras.utils.set_random_seed(FLAGS.seed)
    net = digits.PROBLEM.nets[FLAGS.model]
    with strategy.scope():
        model = klb.LearnedBitModel(*net(klb.LearnedBitConv2D, klb.LearnedBitDense))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(
            keras.optimizers.Adam(FLAGS.learning_rate),
            loss,
            bit_reg=FLAGS.bit_reg,
            bit_optimizer=klb.SignSGD(FLAGS.bit_learning_rate),
        )
        model.optimizer.build(model.trainable_variables)  # not within the traced step

    images, labels = digits.PROBLEM.load(None)[0]
    batches = tf.data.Dataset.from_tensor_slices((tf.cast(images, tf.float32), labels))
    batches = batches.batch(FLAGS.batch_size, drop_remainder=True)  # over all workers
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    batches = strategy.experimental_distribute_dataset(batches.with_options(options))

    @tf.function
    def step(batch):
        strategy.run(model.train_step, args=(batch,))

    losses = []
    for _ in range(FLAGS.epochs):
        for batch in batches:
            step(batch)
        losses.append(float(model.get_metrics_result()["loss"]))
        model.reset_metrics()
    model.freeze_bits()
    return losses, {row.layer: row.bits for row in klb.bit_table(model).rows}


def _start_workers():
    """Runs this program once for each worker of a cluster on the loopback address."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(FLAGS.workers)]
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    workers = []
    for index in range(FLAGS.workers):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(config)}
        workers.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
    if any([worker.wait() for worker in workers]):
        sys.exit("A worker failed.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    logging.set_verbosity(logging.ERROR)
    tf.get_logger().setLevel("ERROR")
    if "TF_CONFIG" not in os.environ and FLAGS.workers > 1:
        return _start_workers()
    if "TF_CONFIG" in os.environ:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        worker = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    else:
        strategy, worker = tf.distribute.get_strategy(), 0
    losses, bits = train(strategy)
    # One write, because all workers share this output.
    sys.stdout.write(json.dumps({"worker": worker, "losses": losses, "bits": bits}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    FLAGS.set_default("model", "cnn")
    FLAGS.set_default("epochs", 5)
    FLAGS.set_default("batch_size", 64)
    FLAGS.set_default("learning_rate", 3e-3)
    FLAGS.set_default("bit_reg", 0.05)
    FLAGS.set_default("bit_learning_rate", 0.1)
    app.run(main)

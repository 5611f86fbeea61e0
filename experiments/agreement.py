"""Do the estimators of bit gradients foretell what a bit more or fewer does to the loss?

TFDS_DATA_DIR=... python experiments/agreement.py --problem=mnist
TFDS_DATA_DIR=... python experiments/agreement.py --problem=cifar10
TFDS_DATA_DIR=... python experiments/agreement.py --bit_gradient=paper

Trains a net with learned bits, stops at several moments, and sets each layer in turn to 1, ..., 6
bits, all else as it is. There the loss on held-out training examples is measured with one bit
fewer and with one more; the estimators predict the same changes from some training batches. Writes
every change, and how well they agree, to `agreement.json`, and a picture. `in training` is what the
trained model itself predicts of these changes, `model.predicted_losses()`: from the single probes
of its training, each at one width, weighed with those of the other layers. `one number per layer`
is the best that it could know: what `measured` shows of a layer, all changes of its loss over those
of its squared error, times the change of the squared error.

With `--bit_gradient=paper` the net is trained as published, on its grids; it predicts no losses
itself.

Two losses are measured: that of `fit`, with batch normalization by the batch, as if its moving
statistics had followed the change, and with dropout; and that of `evaluate`.

`agreement of signs`: share of the changes above their standard error for which predicted and
measured change of the loss, each plus the price, have the same sign. `rank correlation`:
Spearman's, of predicted with measured changes of the loss. `slope`: of measured against predicted,
least squares through the origin.
"""

import json
import os
import sys

import cifar10
import common
import keras
import mnist
import numpy as np
import tensorflow as tf
from absl import app, flags
from curves import plt
from loading import dataset
from recipes import RECIPES, Published
from scipy import stats

import keras_learnbits as klb
from keras_learnbits.bit_gradients import BIT_GRADIENTS, Difference
from keras_learnbits.inspection.probe import BitProber
from keras_learnbits.tables import aligned_table

PROBLEMS = {"mnist": mnist.PROBLEM, "cifar10": cifar10.PROBLEM}
WIDTHS = range(1, 7)
FLAGS = flags.FLAGS

flags.DEFINE_enum("problem", "mnist", sorted(PROBLEMS), "Which net and data.")
flags.DEFINE_list("moments", ["1", "3", "6"], "Epochs after which to stop and measure.")
flags.DEFINE_list(
    "prices", ["0.003", "0.01", "0.03", "0.1", "0.3"], "Prices of a mean bit, for the signs."
)
flags.DEFINE_integer("estimate_batches", 10, "Training batches that the estimators see.")

LOSSES = ("fit", "evaluate")  # what is measured
IN_TRAINING = "in training"
ONE_NUMBER = "one number per layer"


class SecondOrder(Difference):
    """`difference` without its first-order term; squared gradients per layer."""

    def probe(self, step, errors):
        rows = []
        for kernel in step.tensors:
            gradient = tf.cast(step.kernel_gradients[kernel], tf.float32) / step.loss_unit
            squares = tf.square(gradient)
            fisher = tf.cast(step.batch_size, tf.float32) * self.share(squares)
            here, fewer, more = (
                tf.square(
                    kernel.quantized_at(tf.maximum(kernel.integer_bits() + b, 1.0)) - kernel.kernel
                )
                for b in (0.0, -1.0, 1.0)
            )
            rows.append([0.5 * tf.reduce_sum(fisher * (e - here)) for e in (fewer, more)])
        return tf.convert_to_tensor(rows), tf.not_equal(errors, 0.0)

    def share(self, squares):
        return tf.reduce_mean(squares)


class SecondOrderPerChannel(SecondOrder):
    """The same, squared gradients per output channel."""

    def share(self, squares):
        return tf.reduce_mean(squares, axis=range(squares.shape.rank - 1), keepdims=True)


def main(argv):
    del argv
    problem = PROBLEMS[FLAGS.problem]
    recipe = RECIPES[FLAGS.bit_gradient]()
    published = isinstance(recipe, Published)
    FLAGS.model = (
        FLAGS.model or (published and problem.published["model"]) or next(iter(problem.nets))
    )
    settings = recipe.defaults | problem.defaults_of(FLAGS.model)
    settings |= recipe.defaults if published else {}
    train, _ = problem.load(FLAGS.data_dir)
    held_out = FLAGS.validation_examples or 5000
    x, y = train[0][:-held_out], train[1][:-held_out]
    measured_on = dataset(train[0][-held_out:], train[1][-held_out:], 250)

    keras.utils.set_random_seed(FLAGS.seed)
    keras.config.set_dtype_policy(FLAGS.dtype_policy or settings["dtype_policy"])
    moments = [int(moment) for moment in FLAGS.moments]
    batch_size = settings["batch_size"]
    steps = max(moments) * -(-len(x) // batch_size)
    model = common.build(problem, recipe, learned=True)
    price = settings["bit_reg"] if published else 0.03
    model.compile(
        recipe.optimizer(
            settings["optimizer"], settings["learning_rate"], settings["weight_decay"], steps
        ),
        keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=settings["label_smoothing"]
        ),
        loss_weights=settings["loss_weight"],
        metrics=["accuracy"],
        bit_reg=price if FLAGS.bit_reg is None else FLAGS.bit_reg,
        bit_penalty=settings["bit_penalty"],
        quantization_error=recipe.quantization_error,
        bit_gradient=common.bit_gradient(),
        bit_optimizer=recipe.bit_optimizer(
            settings.get("bit_learning_rate"), None, settings["learning_rate"], steps, 0.75 * steps
        ),
    )
    augment = problem.augment if recipe.regularized else None
    batches = dataset(x, y, batch_size, augment, shuffle_seed=FLAGS.seed)
    estimators = {name: estimator() for name, estimator in BIT_GRADIENTS.items()}
    estimators["second order only"] = SecondOrder()
    estimators["second order, per channel"] = SecondOrderPerChannel()
    rows = klb.bit_table(model).rows
    probers = [
        {
            "fit": BitProber(model, [row.layer], estimators=estimators, training=True),
            "evaluate": BitProber(model, [row.layer], estimators={}, training=False),
        }
        for row in rows
    ]
    changes, epoch = [], 0
    for moment in moments:
        model.fit(batches, epochs=moment, initial_epoch=epoch, verbose=2)
        epoch = moment
        expected = {} if published else dict(zip(*model.predicted_losses(), strict=True))
        for prober in probers:
            changes += _changes_at(moment, model, prober, expected, measured_on, batches)
        print(f"Epoch {moment}: {len(changes)} changes so far", flush=True)
    _write(changes)


def _changes_at(moment, model, probers, expected, measured_on, batches):
    """The changes of one layer at each of the widths, as dictionaries."""
    (kernel,) = probers["fit"].tensors
    present, losses, found = float(kernel.bits), expected.get(kernel), []
    share = kernel.size / sum(each.size for each in model.quantized_tensors)
    seen = batches.take(FLAGS.estimate_batches)
    widths = range(1, WIDTHS[-1] + 2)
    errors = {bits: float(kernel.squared_error_at(tf.constant(float(bits)))) for bits in widths}
    for width in WIDTHS:
        if width < kernel.layer.min_bits:
            continue
        kernel.bits.assign(width)
        probes = [
            probers[loss](measured_on, estimate_on=seen if loss == "fit" else batches.take(1))
            for loss in LOSSES
        ]
        for changes in zip(*(probe.changes for probe in probes), strict=True):
            row = changes[0]._asdict()
            if losses is not None:
                row["predicted"][IN_TRAINING] = float(
                    losses[width - 1 + row["step"]] - losses[width - 1]
                )
            for key in ("measured", "standard_error"):
                row[key] = {
                    loss: getattr(change, key) for loss, change in zip(LOSSES, changes, strict=True)
                }
            row["squared_error"] = errors[width + row["step"]] - errors[width]
            found.append({"epoch": moment, **row, "size": share * row["step"]})
    kernel.bits.assign(present)
    _add_one_number(found)
    return found


def _add_one_number(changes):
    """Adds what the changes of one layer predict if they are all in proportion to its error."""
    errors = np.array([change["squared_error"] for change in changes])
    measured = np.array([change["predicted"]["measured"] for change in changes])
    sensitivity = max(measured @ np.sign(errors) / np.abs(errors).sum(), 0.0)
    for change, error in zip(changes, errors, strict=True):
        change["predicted"][ONE_NUMBER] = float(sensitivity * error)


def _summary(changes, loss):
    """How well each estimator agrees with the measurement of one of the losses."""
    prices = [float(price) for price in FLAGS.prices]
    measured, error = (
        np.array([change[key][loss] for change in changes])
        for key in ("measured", "standard_error")
    )
    size = np.array([change["size"] for change in changes])
    clear = np.abs(measured) > error
    rows = {}
    for name in changes[0]["predicted"]:
        predicted = np.array([change["predicted"][name] for change in changes])
        signs = [
            np.mean(
                np.sign(predicted + price * size)[clear] == np.sign(measured + price * size)[clear]
            )
            for price in prices
        ]
        rows[name] = {
            "rank_correlation": float(stats.spearmanr(predicted[clear], measured[clear])[0]),
            "slope": float(predicted[clear] @ measured[clear] / np.sum(predicted[clear] ** 2)),
            "agreement_of_signs": dict(zip(FLAGS.prices, map(float, signs), strict=True)),
        }
    return {"changes": len(changes), "above_standard_error": int(clear.sum()), "estimators": rows}


def _table(summary):
    head = ("estimator", "rank correlation", "slope", *(f"signs at {p}" for p in FLAGS.prices))
    rows = [
        (
            name,
            f"{row['rank_correlation']:.2f}",
            f"{row['slope']:.2g}",
            *(f"{share:.0%}" for share in row["agreement_of_signs"].values()),
        )
        for name, row in summary["estimators"].items()
    ]
    return aligned_table([[head], rows], left=1)


def _write(changes):
    paper = "-paper" if FLAGS.bit_gradient == "paper" else ""
    name = f"agreement-{FLAGS.problem}{paper}"
    output_dir = FLAGS.output_dir or os.path.join("runs", name)
    os.makedirs(output_dir, exist_ok=True)
    summaries = {loss: _summary(changes, loss) for loss in LOSSES}
    epochs = sorted({change["epoch"] for change in changes})
    result = {
        "command": " ".join(["python", "experiments/agreement.py", *sys.argv[1:]]),
        "dtype_policy": keras.config.dtype_policy().name,
        **summaries,
        "by_epoch": {
            epoch: {
                loss: _summary([change for change in changes if change["epoch"] == epoch], loss)
                for loss in LOSSES
            }
            for epoch in epochs
        },
        "each": changes,
    }
    with open(os.path.join(output_dir, "agreement.json"), "w") as file:
        json.dump(result, file, indent=1)
    _plot(changes, summaries["fit"], os.path.join(output_dir, "agreement.png"))
    for loss, summary in summaries.items():
        clear = f"{summary['above_standard_error']} of {summary['changes']} changes"
        print(f"Loss of `{loss}`: {clear} above their error")
        print(_table(summary))
    print(f"Files: {output_dir}")


def _plot(changes, summary, path):
    """Predicted against measured changes, a panel an estimator."""
    measured = np.array([change["measured"]["fit"] for change in changes])
    clear = np.abs(measured) > [change["standard_error"]["fit"] for change in changes]
    widths = np.array([change["bits"] for change in changes])
    names = [*BIT_GRADIENTS, IN_TRAINING]
    estimators = {n: row for n, row in summary["estimators"].items() if n in names}
    figure, axes = plt.subplots(
        1, len(estimators), figsize=(3 * len(estimators), 3.8), sharey=True, layout="constrained"
    )
    threshold = 1e-3
    for panel, (name, row) in zip(axes, estimators.items(), strict=True):
        predicted = np.array([change["predicted"][name] for change in changes])
        dots = panel.scatter(
            predicted[clear], measured[clear], c=widths[clear], s=12, cmap="viridis_r"
        )
        panel.set_xscale("symlog", linthresh=threshold)
        panel.set_yscale("symlog", linthresh=threshold)
        for line in (panel.axhline, panel.axvline):
            line(0, color="gray", linewidth=0.6)
        limit = 2 * max(np.abs(measured[clear]).max(), np.abs(predicted[clear]).max())
        panel.plot([-limit, limit], [-limit, limit], color="gray", linewidth=0.6)
        panel.set_xticks([-1, -1e-2, 0, 1e-2, 1])
        panel.set_yticks([-1, -1e-1, -1e-2, -1e-3, 0, 1e-3, 1e-2, 1e-1, 1])
        panel.set(
            title=f"{name}\nrank correlation {row['rank_correlation']:.2f}",
            xlabel="predicted change of loss [nats]",
        )
    axes[0].set_ylabel("measured change of loss [nats]")
    figure.colorbar(dots, ax=axes, label="bit-width [bits]")
    figure.suptitle(f"{FLAGS.problem}: one bit fewer or more, loss of fit on held-out examples")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    app.run(main)

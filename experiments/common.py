"""Code that the experiments share: flags, the training of one net, and the files that a run writes.

A program describes its data and its nets in a `Problem` and calls `run`. A net is a function
`build(Conv2D, Dense)` that returns inputs and outputs, so that the same code builds the float
baseline and the quantized model; it may also take `DepthwiseConv2D`.
"""

import dataclasses
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable

import keras
import nets
import numpy as np
import tensorflow as tf
from absl import app, flags
from curves import direction_changes, plot_bits, save_bits
from epochs import EpochSeconds, Progress
from loading import dataset
from recipes import OPTIMIZERS, RECIPES, Published, RoundEachEpoch

import keras_learnbits as klb
from keras_learnbits.training.penalties import BIT_PENALTIES

FLAGS = flags.FLAGS

flags.DEFINE_string("model", None, "Name of one of the program's nets.")
flags.DEFINE_integer("epochs", None, "Number of training epochs.", lower_bound=1)
flags.DEFINE_integer("batch_size", None, "Examples per training step.", lower_bound=1)
flags.DEFINE_float("learning_rate", None, "Peak rate of the weights' optimizer.", lower_bound=0)
flags.DEFINE_enum("optimizer", None, sorted(OPTIMIZERS), "Optimizer of the weights.")
flags.DEFINE_float("weight_decay", None, "Decoupled weight decay of --optimizer.", lower_bound=0)
flags.DEFINE_float("label_smoothing", None, "Label smoothing of the training loss.", 0, 1)
flags.DEFINE_float("loss_weight", None, "Weight of the task's loss.", lower_bound=0)
flags.DEFINE_float("bit_reg", None, "Price of the bits, in loss.", lower_bound=0)
flags.DEFINE_float("quantization_reg", 1e-3, "Weight of the quantization error.", lower_bound=0)
flags.DEFINE_float(
    "bit_learning_rate",
    None,
    "Step of the bits. By default it lets bits cross their range in a part of the training.",
    lower_bound=0,
)
flags.DEFINE_float("bit_momentum", None, "Momentum of the bits' optimizer.", lower_bound=0)
flags.DEFINE_float(
    "target_bits", None, "Mean bits per weight to reach; sets --bit_reg.", lower_bound=1
)
flags.DEFINE_bool(
    "start_measured", False, "Start at --target_bits, allocated from measurements on 1,024 images."
)
flags.DEFINE_bool(
    "start_quantized",
    False,
    "Start with the weights that `quantize` finds on 1,024 images, and keep the widths that it "
    "chooses for --target_bits, or --fixed_bits.",
)
flags.DEFINE_float(
    "freeze_at", 0.75, "Fraction of the epochs after which bits are frozen.", 0.05, 0.95
)
flags.DEFINE_enum(
    "bit_gradient",
    "measured",
    sorted(RECIPES),
    "Estimator of the bits' gradients. `paper` sets all flags not given to the published settings.",
)
flags.DEFINE_integer("interval", None, "Steps between probes of measured and difference.")
flags.DEFINE_integer(
    "probed_bits",
    None,
    "Width at which measured probes wider kernels, instead of one bit fewer.",
    lower_bound=1,
)
flags.DEFINE_enum("bit_penalty", None, sorted(BIT_PENALTIES), "Penalty on the bits.")
flags.DEFINE_integer(
    "fixed_bits", None, "Train with this fixed bit-width.", lower_bound=1, upper_bound=16
)
flags.DEFINE_integer("end_bits", None, "Fixed bits of the first and the last layer.", 1, 16)
flags.DEFINE_bool("float", False, "Train the float baseline only.")
flags.DEFINE_integer(
    "round_each_epoch", None, "Round the float baseline to this width after each epoch.", 1, 16
)
flags.DEFINE_bool("baseline", True, "Train the float baseline first, to print its accuracy.")
flags.DEFINE_string(
    "init_from", None, "Float `.keras` file with the initial weights; it is also the baseline."
)
flags.DEFINE_bool(
    "resume", False, "Save each epoch, and continue an interrupted run of the same flags."
)
flags.DEFINE_enum(
    "distill",
    None,
    ["divergence", "squared_error"],
    "Learn from the labels and from the outputs of the model of --init_from, by this distance.",
)
flags.DEFINE_integer(
    "activation_bits",
    None,
    "Bits of the inputs of layers; 8 in the first layer and in sums. Float by default.",
    1,
    8,
)
flags.DEFINE_string("dtype_policy", None, "Keras dtype policy, e.g. `mixed_bfloat16`.")
flags.DEFINE_integer("seed", 0, "Seed of weights, shuffling and augmentation.")
flags.DEFINE_integer("train_examples", None, "Number of training examples, the first ones.")
flags.DEFINE_integer(
    "validation_examples",
    0,
    "Number of held-out training examples to evaluate on instead of the test set, to choose "
    "settings.",
)
flags.DEFINE_string("data_dir", None, "Directory of prepared data of tensorflow_datasets.")
flags.DEFINE_string(
    "log_dir",
    None,
    "Directory of TensorBoard logs; `logs` under --output_dir by default.",
    allow_override=True,  # absl's logging has a flag of this name
)
flags.DEFINE_string(
    "output_dir", None, "Directory of the run's files; `runs/<program>-<model>` by default."
)


COMMON = {"optimizer": "adamw", "weight_decay": 0.0, "label_smoothing": 0.0}


@dataclasses.dataclass
class Problem:
    """Data, nets and default settings of one program.

    Attributes:
        load: Function from `data_dir` to `(x, y), (x, y)`, uint8 or float images and integer
            labels as NumPy arrays, for training and test.
        nets: Dictionary of name to `build(Conv2D, Dense)`, the default first.
        defaults: Dictionary of default values of flags.
        settings: Dictionary of net to a dictionary of values that override the defaults.
        published: Dictionary of flags of the published method in this program.
        initializers: Dictionary of net to a function of the float model and the training images
            that sets its initial weights; other nets are initialized by Keras.
        augment: Function of a batch of images and a seed to a batch of images, or None.
    """

    load: Callable
    nets: dict
    defaults: dict
    settings: dict = dataclasses.field(default_factory=dict)
    published: dict = dataclasses.field(default_factory=dict)
    initializers: dict = dataclasses.field(default_factory=dict)
    augment: Callable | None = None

    def defaults_of(self, net):
        """Default values of the flags for a net."""
        return COMMON | self.defaults | self.settings.get(net, {})


def run(problem):
    """Parses the flags, runs the program, and exits."""

    def main(argv):
        if len(argv) > 1:
            raise app.UsageError(f"Unknown arguments: {argv[1:]}")
        recipe = RECIPES[FLAGS.bit_gradient]()
        published = problem.published if isinstance(recipe, Published) else {}
        if not FLAGS["model"].present:
            FLAGS.model = published.get("model", next(iter(problem.nets)))
        if FLAGS.model not in problem.nets:
            raise app.UsageError(
                f"--model must be one of {', '.join(problem.nets)}. Received: {FLAGS.model}"
            )
        defaults = recipe.defaults | problem.defaults_of(FLAGS.model)
        if published:
            defaults |= recipe.defaults | published
        for name, value in defaults.items():
            if not FLAGS[name].present:
                FLAGS[name].value = value
        if FLAGS.distill and not FLAGS.init_from:
            raise app.UsageError("--distill needs the float model of --init_from.")
        if FLAGS.float and (FLAGS.fixed_bits or FLAGS.end_bits or FLAGS.target_bits):
            raise app.UsageError("--float excludes --fixed_bits, --end_bits and --target_bits.")
        if FLAGS.round_each_epoch and not FLAGS.float:
            raise app.UsageError("--round_each_epoch needs --float.")
        if FLAGS.float and (FLAGS.distill or FLAGS.activation_bits):
            raise app.UsageError("--float excludes --distill and --activation_bits.")
        if FLAGS.activation_bits and FLAGS.end_bits:
            raise app.UsageError("--activation_bits excludes --end_bits.")
        if FLAGS.start_measured and not (FLAGS.target_bits and FLAGS.init_from):
            raise app.UsageError("--start_measured needs --target_bits and --init_from.")
        if FLAGS.target_bits and FLAGS.fixed_bits:
            raise app.UsageError("--target_bits excludes --fixed_bits.")
        if FLAGS.start_quantized and not (
            FLAGS.init_from and (FLAGS.target_bits or FLAGS.fixed_bits)
        ):
            raise app.UsageError(
                "--start_quantized needs --init_from, and --target_bits or --fixed_bits."
            )
        if FLAGS.start_quantized and (FLAGS.end_bits or FLAGS.bit_gradient == "paper"):
            raise app.UsageError("--start_quantized excludes --end_bits and --bit_gradient=paper.")
        if FLAGS.start_quantized and FLAGS.start_measured:
            raise app.UsageError("--start_quantized excludes --start_measured.")
        if FLAGS.resume and FLAGS.baseline and not (FLAGS.init_from or FLAGS.float):
            raise app.UsageError("--resume resumes one training: add --nobaseline or --init_from.")
        if FLAGS.target_bits and FLAGS.bit_gradient not in ("measured", "difference"):
            raise app.UsageError("--target_bits needs --bit_gradient=measured or difference.")
        bit_gradient()
        _run(problem, recipe)

    app.run(main)


def _run(problem, recipe):
    name = os.path.splitext(os.path.basename(sys.argv[0]))[0]
    output_dir = FLAGS.output_dir or os.path.join("runs", f"{name}-{FLAGS.model}")
    os.makedirs(output_dir, exist_ok=True)
    try:
        train, test = problem.load(FLAGS.data_dir)
    except FileNotFoundError as error:
        sys.exit(str(error))
    if FLAGS.validation_examples:
        held_out = FLAGS.validation_examples
        test = tuple(array[-held_out:] for array in train)
        train = tuple(array[:-held_out] for array in train)
    train = tuple(array[: FLAGS.train_examples] for array in train)
    keras.config.set_dtype_policy(FLAGS.dtype_policy or "float32")

    float_model, float_accuracy = None, None
    if FLAGS.init_from:
        # The file may be of another dtype policy, which this processor may only emulate.
        float_model = build(problem, recipe, learned=False)
        float_model.set_weights(keras.models.load_model(FLAGS.init_from).get_weights())
        float_accuracy = _accuracy(float_model, test)
    elif FLAGS.baseline and not FLAGS.float:
        print(f"Float baseline: {FLAGS.epochs} epochs", flush=True)
        _, history, _ = _train(problem, recipe, train, test, output_dir, learned=False)
        float_accuracy = history["val_accuracy"][-1]
    learned = "Learned bits" if FLAGS.fixed_bits is None else f"{FLAGS.fixed_bits} bits, fixed"
    print(f"{'Float' if FLAGS.float else learned}: {FLAGS.epochs} epochs", flush=True)
    model, history, seconds = _train(
        problem, recipe, train, test, output_dir, not FLAGS.float, float_model
    )
    if FLAGS.float:
        float_accuracy = history["val_accuracy"][-1]

    result = {
        "command": " ".join(["python", f"experiments/{name}.py", *sys.argv[1:]]),
        "versions": {
            "keras_learnbits": klb.__version__,
            "keras": keras.__version__,
            "tensorflow": tf.__version__,
            "python": platform.python_version(),
        },
        "seed": FLAGS.seed,
        "epochs": FLAGS.epochs,
        "model": FLAGS.model,
        "dtype_policy": FLAGS.dtype_policy or "float32",
        "evaluated_on": "held-out training examples" if FLAGS.validation_examples else "test",
        "test_accuracy": history["val_accuracy"][-1],
        "test_loss": history["val_cross_entropy"][-1],
        "float_test_accuracy": float_accuracy,
        "mean_bits": None,
        "activation_bits": FLAGS.activation_bits,
        "distill": FLAGS.distill,
        "bits": {},
        "direction_changes": history.get("direction_changes"),
        "packed_bytes": None,
        "float_bytes": 4 * model.count_params(),
        "seconds_per_epoch": round(statistics.median(seconds), 2),
    }
    model.save(os.path.join(output_dir, "model.keras"))
    if not FLAGS.float:
        klb.save_packed(model, os.path.join(output_dir, "model.safetensors"))
        table = klb.bit_table(model)
        result |= {
            "mean_bits": table.mean_bits,
            "bits": {row.layer: row.bits for row in table.rows},
            "packed_bytes": table.packed_bytes,
            "float_bytes": table.float_bytes,
        }
        print(f"\n{table}")
    baseline = "" if float_accuracy is None else f" (float: {float_accuracy:.2%})"
    bits = "" if FLAGS.float else f" at {result['mean_bits']:.2f} mean bits"
    print(f"{result['evaluated_on']} accuracy {result['test_accuracy']:.2%}{bits}{baseline}")
    with open(os.path.join(output_dir, "result.json"), "w") as file:
        json.dump(result, file, indent=2)
    print(f"Files: {output_dir}", flush=True)


def _train(problem, recipe, train, test, output_dir, learned, float_model=None):
    """Trains one net, from the weights of `float_model` or else of the net's initializer.

    Returns:
        The model, the history of `fit` as a dictionary, the seconds of each epoch.
    """
    keras.utils.set_random_seed(FLAGS.seed)
    steps = FLAGS.epochs * -(-len(train[0]) // FLAGS.batch_size)
    model = fitted = build(problem, recipe, learned)
    start = float_model
    if start is None and FLAGS.model in problem.initializers:
        start = build(problem, recipe, learned=False)
        problem.initializers[FLAGS.model](start, train[0])
    if start is not None and learned:
        klb.warm_start(model, start)
    elif start is not None:
        model.set_weights(start.get_weights())
    if FLAGS.start_quantized and learned:
        fixed = FLAGS.fixed_bits
        bounds = {"min_bits": fixed, "max_bits": fixed} if fixed else {}
        target, images = FLAGS.target_bits or fixed, _examples(train[0])
        quantized = klb.quantize(start, images, target_bits=target, seed=FLAGS.seed, **bounds)
        nets.take_weights(model, quantized)
    if FLAGS.distill and learned:
        fitted = klb.LearnedBitDistiller(float_model, model, nets.distillation(FLAGS.distill))
    loss = keras.losses.CategoricalCrossentropy(
        from_logits=True,
        label_smoothing=FLAGS.label_smoothing if recipe.regularized else 0.0,
    )
    settings = {
        "optimizer": recipe.optimizer(
            FLAGS.optimizer, FLAGS.learning_rate, FLAGS.weight_decay, steps
        ),
        "loss": loss,
        "loss_weights": FLAGS.loss_weight,
        "metrics": [
            "accuracy",
            keras.metrics.CategoricalCrossentropy(name="cross_entropy", from_logits=True),
        ],
    }
    augment = problem.augment if recipe.regularized else None
    timer = EpochSeconds()
    callbacks = [timer]
    log_dir = FLAGS.log_dir or os.path.join(output_dir, "logs")
    logger = klb.BitLogger(max(1, steps // 2000), log_dir=log_dir)
    if learned:
        settings |= {
            "bit_reg": FLAGS.bit_reg,
            "quantization_reg": FLAGS.quantization_reg,
            "bit_penalty": FLAGS.bit_penalty,
            "quantization_error": recipe.quantization_error,
            "bit_gradient": bit_gradient(),
            "bit_optimizer": recipe.bit_optimizer(
                FLAGS.bit_learning_rate,
                FLAGS.bit_momentum,
                FLAGS.learning_rate,
                steps,
                FLAGS.freeze_at * steps,
            ),
        }
        tensorboard = keras.callbacks.TensorBoard(log_dir, write_graph=False)
        if FLAGS.target_bits and not FLAGS.start_quantized:
            by = 2 / 3 * FLAGS.freeze_at  # the rest of the time is for settling
            # Between two prices bits move by less than half a bit, at their default speed.
            update_freq = max(1, int(FLAGS.freeze_at * steps / 40))
            measured = _examples(train[0]) if FLAGS.start_measured else None
            budget = klb.BitBudget(
                FLAGS.target_bits, by=by, update_freq=update_freq, start=measured
            )
            callbacks.append(budget)
        freezing = [] if FLAGS.start_quantized else recipe.callbacks(FLAGS.freeze_at)
        callbacks += [logger, *freezing, tensorboard]
    if FLAGS.round_each_epoch:
        callbacks.append(RoundEachEpoch(FLAGS.round_each_epoch))
    if FLAGS.resume:
        backup = os.path.join(output_dir, "backup")
        callbacks.append(keras.callbacks.BackupAndRestore(backup, double_checkpoint=True))
    callbacks.append(Progress())
    fitted.compile(**settings)
    if FLAGS.start_quantized and learned:
        fitted.freeze_bits()
    history = fitted.fit(
        dataset(*train, FLAGS.batch_size, augment, shuffle_seed=FLAGS.seed),
        validation_data=dataset(*test, 1000),
        epochs=FLAGS.epochs,
        callbacks=callbacks,
        verbose=1 if sys.stdout.isatty() else 2,
    ).history
    if learned:
        starts = [math.ceil(callback.start(FLAGS.epochs)) for callback in freezing]
        freeze_step = min([FLAGS.epochs, *starts]) * steps // FLAGS.epochs
        plot_bits(logger, os.path.join(output_dir, "bits.png"), FLAGS.model, freeze_step)
        save_bits(logger, os.path.join(output_dir, "bits.csv"))
        history["direction_changes"] = direction_changes(logger, freeze_step)
    return model, history, timer.seconds[1:] or timer.seconds


def _examples(images):
    """1,024 images of the training set, in the form that the net takes."""
    chosen = np.random.default_rng(FLAGS.seed).choice(len(images), 1024, replace=False)
    scale = 1 / 255 if images.dtype == np.uint8 else 1.0
    return images[chosen].astype("float32") * np.float32(scale)


def bit_gradient():
    """The estimator that `--bit_gradient`, `--interval` and `--probed_bits` choose."""
    takers = {"interval": ("measured", "difference"), "probed_bits": ("measured",)}
    settings = {name: FLAGS[name].value for name in takers if FLAGS[name].value is not None}
    for name in settings:
        if FLAGS.bit_gradient not in takers[name]:
            raise app.UsageError(f"--{name} needs --bit_gradient={' or '.join(takers[name])}.")
    return klb.bit_gradients.BIT_GRADIENTS[FLAGS.bit_gradient](**settings)


def _accuracy(model, test):
    """Accuracy of a trained model, however it was compiled, or if it was not."""
    model.compile(loss="categorical_crossentropy", metrics=["accuracy"])
    return model.evaluate(dataset(*test, 1000), return_dict=True, verbose=0)["accuracy"]


def build(problem, recipe, learned):
    """The net of the flags, of learned-bit layers or of Keras layers."""
    net = problem.nets[FLAGS.model]
    if not learned:
        return nets.float_model(net, FLAGS.model)
    if FLAGS.activation_bits:
        return nets.with_quantized_activations(
            net, FLAGS.model, recipe, FLAGS.activation_bits, FLAGS.fixed_bits
        )
    return nets.quantized_model(net, FLAGS.model, recipe, FLAGS.fixed_bits, FLAGS.end_bits)

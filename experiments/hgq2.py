"""Training with HGQ2, from the same float model, with the same data and epochs.

TFDS_DATA_DIR=... python experiments/hgq2.py --init_from=model.keras --price=0.1 --per=layer

Only weights are quantized. Needs `pip install hgq2==0.2.0`. HGQ2 does not run under mixed
precision, so models are trained in float32. Adam updates its bit-widths from the derivative of loss
plus price, with a separate learning rate.
"""

import json
import os
import sys
from importlib import metadata

import cifar10
import hgq2_twins
import keras
import mnist
import numpy as np
from absl import app, flags
from loading import dataset
from recipes import Recipe

PROBLEMS = {"cifar10": cifar10.PROBLEM, "mnist": mnist.PROBLEM}
FLAGS = flags.FLAGS

flags.DEFINE_enum("program", "cifar10", sorted(PROBLEMS), "Program with the net and data.")
flags.DEFINE_float("price", 0.1, "Price of one mean bit per weight, in loss.", lower_bound=0)
flags.DEFINE_enum("per", "layer", sorted(hgq2_twins.SHARED), "Unit that has one bit-width.")
flags.DEFINE_integer("bits", 4, "Initial bit-widths, without the sign.", lower_bound=1)


def build(float_model):
    """The net with HGQ2's layers and the weights of the float model."""
    kernels = {
        layer.name: np.size(layer.kernel)
        for layer in float_model.layers
        if type(layer) in hgq2_twins.TAKEN
    }
    price = FLAGS.price / sum(kernels.values())

    def twin(layer):
        of_layer = price * kernels.get(layer.name, 0)
        return hgq2_twins.twin(layer, of_layer, FLAGS.per, FLAGS.bits)

    model = keras.models.clone_model(float_model, clone_function=twin)
    for ours, theirs in zip(model.layers, float_model.layers, strict=True):
        if theirs.name not in kernels:
            ours.set_weights(theirs.get_weights())
            continue
        ours.kernel.assign(theirs.kernel)
        if theirs.use_bias:
            ours.bias.assign(theirs.bias)
    return model, [model.get_layer(name) for name in kernels]


def in_float32(model):
    """The same net and weights under the float32 policy."""
    copy = keras.models.clone_model(
        model,
        clone_function=lambda layer: type(layer).from_config(
            {**layer.get_config(), "dtype": "float32"}
        ),
    )
    copy.set_weights(model.get_weights())
    return copy


def optimizer(quantized, steps):
    """The recipe's optimizer for weights, and Adam with a separate peak rate for bit-widths."""
    widths = {id(v) for layer in quantized for v in layer.kq.quantizer.trainable_variables}
    weights = Recipe().optimizer(FLAGS.optimizer, FLAGS.learning_rate, FLAGS.weight_decay, steps)
    bits = Recipe().optimizer("adamw", FLAGS.bit_learning_rate, 0.0, steps)
    return keras.optimizers.MultiOptimizer(lambda v: bits if id(v) in widths else weights)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    problem = PROBLEMS[FLAGS.program]
    defaults = problem.defaults_of(next(iter(problem.nets))) | {"bit_learning_rate": 0.01}
    for name, value in defaults.items():
        if name in FLAGS and not FLAGS[name].present:
            FLAGS[name].value = value
    train, test = problem.load(FLAGS.data_dir)
    if FLAGS.validation_examples:
        held_out = FLAGS.validation_examples
        test = tuple(array[-held_out:] for array in train)
        train = tuple(array[:-held_out] for array in train)
    keras.utils.set_random_seed(FLAGS.seed)
    float_model = keras.models.load_model(FLAGS.init_from)
    keras.config.set_dtype_policy("float32")
    model, quantized = build(in_float32(float_model))
    steps = FLAGS.epochs * -(-len(train[0]) // FLAGS.batch_size)
    model.compile(
        optimizer(quantized, steps),
        keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=FLAGS.label_smoothing
        ),
        metrics=[
            "accuracy",
            keras.metrics.CategoricalCrossentropy(name="cross_entropy", from_logits=True),
        ],
    )
    history = model.fit(
        dataset(*train, FLAGS.batch_size, problem.augment, shuffle_seed=FLAGS.seed),
        validation_data=dataset(*test, 1000),
        epochs=FLAGS.epochs,
        verbose=2,
    ).history
    sizes = [np.size(layer.kernel) for layer in quantized]
    stored = [hgq2_twins.stored_bits(layer) for layer in quantized]
    float_parameters = float_model.count_params() - sum(sizes)
    result = {
        "command": " ".join(["python", "experiments/hgq2.py", *sys.argv[1:]]),
        "versions": {name: metadata.version(name) for name in ("hgq2", "keras", "tensorflow")},
        "seed": FLAGS.seed,
        "epochs": FLAGS.epochs,
        "evaluated_on": "held-out training examples" if FLAGS.validation_examples else "test",
        "test_accuracy": history["val_accuracy"][-1],
        "test_loss": history["val_cross_entropy"][-1],
        "mean_bits": sum(stored) / sum(sizes),
        "bits": {
            layer.name: bits / size
            for layer, bits, size in zip(quantized, stored, sizes, strict=True)
        },
        "packed_bytes": sum(-(-bits // 8) for bits in stored) + 4 * float_parameters,
        "float_bytes": 4 * float_model.count_params(),
    }
    output_dir = FLAGS.output_dir or os.path.join("runs", f"hgq2-{FLAGS.program}")
    os.makedirs(output_dir, exist_ok=True)
    with open(os.path.join(output_dir, "result.json"), "w") as file:
        json.dump(result, file, indent=2)
    for name, bits in result["bits"].items():
        print(f"{name}: {bits:.2f} bits per weight")
    print(
        f"{result['evaluated_on']} accuracy {result['test_accuracy']:.2%} at "
        f"{result['mean_bits']:.2f} mean bits, {result['packed_bytes']:,} bytes"
    )


if __name__ == "__main__":
    app.run(main)

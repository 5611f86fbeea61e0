"""Small models with the mechanisms of examples on keras.io/examples: text, tables and graphs.

As in `keras_site_vision`.
"""

import keras
import numpy as np
import tensorflow as tf
from keras_site_vision import CLASSES, CLASSIFY, GRAY, LOGITS, REGRESS, OwnLoop

L, ops = keras.layers, keras.ops
PROBABILITIES = {"optimizer": "adam", "loss": "sparse_categorical_crossentropy"}
WORDS = np.array([[3, 1, 2, 4, 0], [2, 2, 5, 0, 0], [1, 4, 3, 2, 1], [5, 1, 0, 0, 0]])


def coupling(size):
    inputs = keras.Input((size,))
    x = L.Dense(8, activation="relu", kernel_regularizer="l2")(inputs)
    return keras.Model(inputs, [L.Dense(size, activation="tanh")(x), L.Dense(size)(x)])


class RealNVP(OwnLoop):
    def __init__(self, count):
        super().__init__()
        self.masks = np.array([[0, 1], [1, 0]] * (count // 2), "float32")
        self.tracker = keras.metrics.Mean(name="loss")
        self.couplings = [coupling(2) for _ in range(count)]

    def call(self, x, training=True):
        determinant, steps = 0.0, list(zip(self.couplings, self.masks, strict=True))
        for net, mask in steps[::-1] if training else steps:
            scale, shift = (each * (1 - mask) for each in net(x * mask))
            x = (x - shift) * ops.exp(-scale) if training else x * ops.exp(scale) + shift
            determinant -= ops.sum(scale, 1) if training else 0.0
        return x, determinant

    def loss_of(self, x):
        y, determinant = self(x)
        return ops.mean(0.5 * ops.sum(y**2, 1) - determinant)


def real_nvp():
    """Density estimation using Real NVP: a `call` that trains unless told otherwise."""
    model = RealNVP(4)
    x = np.random.default_rng(0).normal(size=(4, 2)).astype("float32")
    model(x)
    return model, x, [x, np.zeros(4)], {"optimizer": "adam", "loss": ["mse", "mse"]}


class CTC(L.Layer):
    def __init__(self, name=None):
        super().__init__(name=name)
        self.loss_of = keras.losses.CTC()

    def call(self, labels, predictions):
        self.add_loss(self.loss_of(ops.cast(labels, "int32"), predictions))
        return predictions


def captcha_reader():
    """OCR model for reading Captchas: a last layer that takes the targets and adds the loss."""
    image, labels = keras.Input((8, 8, 1), name="image"), keras.Input((None,), name="label")
    x = L.Reshape((4, 16))(L.MaxPooling2D(2)(L.Conv2D(4, 3, padding="same")(image)))
    x = L.Bidirectional(L.LSTM(4, return_sequences=True, dropout=0.2))(x)
    outputs = CTC(name="ctc")(labels, L.Dense(5, name="characters")(x))
    x = {"image": GRAY, "label": np.array([[1.0, 2], [3, 1], [2, 3], [1, 3]])}
    return keras.Model([image, labels], outputs), x, None, {"optimizer": "adam"}


class PositionalEmbedding(L.Layer):
    def __init__(self, length, vocabulary, width, **kwargs):
        super().__init__(**kwargs)
        self.tokens, self.positions = L.Embedding(vocabulary, width), L.Embedding(length, width)
        self.settings = {"length": length, "vocabulary": vocabulary, "width": width}

    def call(self, x):
        return self.tokens(x) + self.positions(ops.arange(ops.shape(x)[-1]))

    def compute_mask(self, inputs, mask=None):
        return ops.not_equal(inputs, 0)

    def get_config(self):
        return {**super().get_config(), **self.settings}


class TransformerLayer(L.Layer):
    def __init__(self, width, heads, **kwargs):
        super().__init__(**kwargs)
        self.settings = {"width": width, "heads": heads}
        self.attention, self.cross = (L.MultiHeadAttention(heads, width) for _ in range(2))
        self.dense = keras.Sequential([L.Dense(8, activation="relu"), L.Dense(width)])
        self.norm = L.LayerNormalization()
        self.supports_masking = True

    def call(self, x, encoded=None, mask=None):
        mask, decodes = None if mask is None else mask[:, None, :], encoded is not None
        x = x + self.attention(x, x, attention_mask=mask, use_causal_mask=decodes)
        if decodes:
            x = x + self.cross(x, encoded)
        return x + self.dense(self.norm(x))

    def get_config(self):
        return {**super().get_config(), **self.settings}


def translation():
    """English-to-Spanish translation with a Transformer: masks made by layers; a graph inside."""
    source = keras.Input((None,), dtype="int64", name="source")
    encoded = TransformerLayer(6, 2)(PositionalEmbedding(5, 6, 6)(source))
    target = keras.Input((None,), dtype="int64", name="target")
    given = keras.Input((None, 6), name="state")
    x = TransformerLayer(6, 2)(PositionalEmbedding(5, 6, 6)(target), given)
    x = L.Dense(6, activation="softmax")(L.Dropout(0.5)(x))
    outputs = keras.Model([target, given], x)([target, encoded])
    model = keras.Model({"source": source, "target": target}, outputs)
    return model, {"source": WORDS, "target": WORDS[::-1]}, WORDS, PROBABILITIES


loss_of_each = keras.losses.SparseCategoricalCrossentropy(reduction=None)
loss_tracker = keras.metrics.Mean(name="loss")


class MaskedLanguageModel(keras.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = loss_of_each(y, y_pred, sample_weight)
        loss_tracker.update_state(loss, sample_weight=sample_weight)
        return ops.sum(loss)

    @property
    def metrics(self):
        return [loss_tracker]


def masked_language_model():
    """End-to-end Masked Language Modeling: a class of functional models with `compute_loss`."""
    inputs = keras.Input((5,), dtype="int64")
    x = L.Embedding(6, 8, name="words")(inputs)
    x = L.LayerNormalization()(x + L.MultiHeadAttention(2, 4)(x, x, x))
    x = x + keras.Sequential([L.Dense(8, activation="relu")], name="ffn")(x)
    model = MaskedLanguageModel(inputs, L.Dense(6, activation="softmax")(x))
    return model, WORDS, WORDS, PROBABILITIES


class TokenAndPosition(L.Layer):
    def __init__(self, length, vocabulary, width):
        super().__init__()
        self.tokens, self.positions = L.Embedding(vocabulary, width), L.Embedding(length, width)

    def call(self, x):
        return self.tokens(x) + self.positions(ops.arange(ops.shape(x)[-1]))


class TransformerBlock(L.Layer):
    def __init__(self, width, heads, units, rate=0.1):
        super().__init__()
        self.attention = L.MultiHeadAttention(heads, width)
        self.ffn = keras.Sequential([L.Dense(units, activation="relu"), L.Dense(width)])
        self.norms = [L.LayerNormalization(), L.LayerNormalization()]
        self.dropout = L.Dropout(rate)

    def call(self, x):
        length = ops.shape(x)[1]
        causal = ops.arange(length)[:, None] >= ops.arange(length)
        x = self.norms[0](x + self.attention(x, x, attention_mask=causal[None]))
        return self.norms[1](x + self.dropout(self.ffn(x)))


def miniature_gpt():
    """Text generation with a miniature GPT: layers without config; an output without a loss."""
    inputs = keras.Input((5,), dtype="int32")
    x = TransformerBlock(8, 2, 8)(TokenAndPosition(5, 6, 8)(inputs))
    compiled = {"optimizer": "adam", "loss": [LOGITS, None]}
    return keras.Model(inputs, [L.Dense(6)(x), x]), WORDS, [WORDS, None], compiled


class SpeechTransformer(OwnLoop):
    def __init__(self, width=8, decoders=2, classes=6):
        super().__init__()
        self.tracker = keras.metrics.Mean(name="loss")
        self.decoders = decoders
        self.embed = TokenAndPosition(length=5, vocabulary=classes, width=width)
        self.encoder = keras.Sequential([L.Conv1D(width, 3), TransformerBlock(width, 2, width)])
        for number in range(decoders):
            setattr(self, f"decoder_{number}", L.MultiHeadAttention(2, width))
        self.classifier = L.Dense(classes)

    def call(self, inputs):
        encoded, y = self.encoder(inputs[0]), self.embed(inputs[1])
        for number in range(self.decoders):
            y = y + getattr(self, f"decoder_{number}")(y, encoded)
        return self.classifier(y)

    def loss_of(self, batch):
        predicted, wanted = self([batch[0], batch[1][:, :-1]]), batch[1][:, 1:]
        return ops.mean(ops.sparse_categorical_crossentropy(wanted, predicted, from_logits=True))


def speech_recognition():
    """Automatic Speech Recognition with Transformer: a list of inputs; layers set by name."""
    model = SpeechTransformer()
    x = [np.random.default_rng(0).normal(size=(4, 10, 3)).astype("float32"), WORDS]
    model(x)
    return model, x, WORDS, CLASSIFY


SIZES = {"work": 3, "place": 2}
FEATURES = {
    "work": np.array([2, 0, 1, 1]),
    "place": np.array([0, 1, 1, 0]),
    "age": np.array([0.3, 0.1, 0.9, 0.4], "float32"),
    "hours": np.array([0.5, 0.8, 0.2, 0.6], "float32"),
}


def feature_inputs():
    return {name: keras.Input((), name=name, dtype=str(x.dtype)) for name, x in FEATURES.items()}


class GatedResidualNetwork(L.Layer):
    def __init__(self, units, rate):
        super().__init__()
        self.units = units
        self.elu, self.linear = L.Dense(units, activation="elu"), L.Dense(units)
        self.gate, self.project = L.Dense(units, activation="sigmoid"), L.Dense(units)
        self.dropout, self.norm = L.Dropout(rate), L.LayerNormalization()

    def call(self, inputs):
        x = self.dropout(self.linear(self.elu(inputs)))
        if inputs.shape[-1] != self.units:
            inputs = self.project(inputs)
        return self.norm(inputs + x * self.gate(x))


class VariableSelection(L.Layer):
    def __init__(self, count, units, rate):
        super().__init__()
        self.encoders = {name: L.Embedding(size, units) for name, size in SIZES.items()}
        self.encoders |= {name: L.Dense(units) for name in FEATURES if name not in SIZES}
        self.networks = [GatedResidualNetwork(units, rate) for _ in range(count)]
        self.of_all = GatedResidualNetwork(units, rate)
        self.softmax = L.Dense(count, activation="softmax")

    def call(self, inputs):
        columns = {name: x if name in SIZES else x[:, None] for name, x in inputs.items()}
        encoded = [self.encoders[name](x) for name, x in columns.items()]
        shares = self.softmax(self.of_all(L.concatenate(encoded)))[..., None]
        each = [net(x) for net, x in zip(self.networks, encoded, strict=True)]
        return ops.sum(shares * ops.stack(each, axis=1), axis=1)


def gated_residual_network():
    """Classification with GRN and VSN: layers in dictionaries, some never called."""
    inputs = feature_inputs()
    x = VariableSelection(4, 6, 0.1)(inputs)
    return keras.Model(inputs, L.Dense(3)(x)), FEATURES, CLASSES, CLASSIFY


class DecisionTree(keras.Model):
    def __init__(self, depth, count, rate, classes):
        super().__init__()
        self.depth = depth
        chosen = np.random.choice(count, int(count * rate), replace=False)
        self.chosen = ops.convert_to_tensor(np.eye(count)[chosen], dtype="float32")
        self.pi = self.add_weight((2**depth, classes), "random_normal")
        self.decide = L.Dense(2**depth, activation="sigmoid", name="decision")

    def call(self, x):
        right = self.decide(ops.matmul(x, ops.transpose(self.chosen)))
        decisions, mu = ops.stack([right, 1 - right], axis=2), ops.ones((ops.shape(x)[0], 1, 1))
        for level in range(self.depth):
            mu = ops.reshape(mu, (-1, 2**level, 1)) * decisions[:, 2**level : 2 ** (level + 1)]
        return ops.matmul(ops.reshape(mu, (-1, 2**self.depth)), ops.softmax(self.pi))


def decision_forest():
    """Classification with Neural Decision Forests: a tensor drawn at random in `__init__`."""
    inputs = feature_inputs()
    columns = [L.Embedding(3, 2)(x) for name, x in inputs.items() if name in SIZES]
    columns += [x[:, None] for name, x in inputs.items() if name not in SIZES]
    x = L.BatchNormalization()(L.concatenate(columns))
    outputs = L.Average()([DecisionTree(2, 6, 0.5, 3)(x) for _ in range(3)])
    return keras.Model(inputs, outputs), FEATURES, CLASSES, PROBABILITIES


class GraphAttention(L.Layer):
    def __init__(self, units, kernel_initializer="glorot_uniform", **kwargs):
        super().__init__(**kwargs)
        self.units, self.start = units, keras.initializers.get(kernel_initializer)

    def build(self, shapes):
        self.kernel = self.add_weight((shapes[0][-1], self.units), self.start, name="kernel")
        self.built = True

    def call(self, inputs):
        nodes, edges = inputs
        z = ops.matmul(nodes, self.kernel)
        sources, targets = ops.take(z, edges[0], axis=0), ops.take(z, edges[1], axis=0)
        scores = ops.exp(ops.clip(ops.sum(sources * targets, 1, keepdims=True), -2, 2))
        return ops.segment_sum(scores * sources, edges[1], ops.shape(nodes)[0])


class GraphAttentionNetwork(keras.Model):
    def __init__(self, nodes, edges, units, heads, classes, **kwargs):
        super().__init__(**kwargs)
        self.nodes, self.edges = nodes, edges
        self.preprocess = L.Dense(units * heads, activation="relu")
        self.heads = [GraphAttention(units) for _ in range(heads)]
        self.output_layer = L.Dense(classes)

    def call(self, indices, training=False):
        x = self.preprocess(self.nodes)
        x = x + ops.relu(ops.concatenate([head([x, self.edges]) for head in self.heads], -1))
        return ops.take(self.output_layer(x), indices, axis=0)


def graph_attention():
    """Graph attention network (GAT): a model given the graph as tensors; custom kernels."""
    nodes = np.random.default_rng(0).normal(size=(6, 5))
    graph = tf.constant(nodes, "float32"), tf.constant([[0, 1, 2, 3, 4, 5], [1, 2, 0, 5, 3, 4]])
    model = GraphAttentionNetwork(*graph, units=4, heads=2, classes=3)
    model(CLASSES)
    return model, CLASSES, CLASSES, CLASSIFY


class MDEmbedding(L.Layer):
    def __init__(self, blocks, widths, width, name=None):
        super().__init__(name=name)
        owners = {word: number for number, block in enumerate(blocks) for word in block}
        pairs = tf.lookup.KeyValueTensorInitializer(list(owners), list(owners.values()))
        self.owner = tf.lookup.StaticHashTable(pairs, default_value=-1)
        self.encoders, self.projections = [], []
        for block, own in zip(blocks, widths, strict=True):
            lookup = L.StringLookup(vocabulary=block, mask_token=None, num_oov_indices=1)
            self.encoders.append(keras.Sequential([lookup, L.Embedding(len(block) + 1, own)]))
            self.projections.append(L.Lambda(lambda x: x) if own == width else L.Dense(width))

    def call(self, x):
        owner, total = self.owner.lookup(x), 0.0
        for number, encode in enumerate(self.encoders):
            mine = tf.cast(owner == number, "float32")[:, None]
            total += mine * self.projections[number](encode(x))
        return total


def memory_efficient_embeddings():
    """Memory-efficient embeddings for recommendation: strings, lookup tables, `Lambda`s inside."""
    user, movie = (keras.Input((), name=name, dtype="string") for name in ("user", "movie"))
    lookup = L.StringLookup(vocabulary=["u1", "u2", "u3"], mask_token=None, num_oov_indices=0)
    users = keras.Sequential([lookup, L.Embedding(3, 6)], name="users")(user)
    movies = MDEmbedding([["m1", "m2"], ["m3", "m4"]], [6, 3], 6, name="movies")(movie)
    score = 5 * keras.activations.sigmoid(L.Dot(axes=1)([users, movies]))
    x = [tf.constant(["u1", "u3", "u2", "u1"]), tf.constant(["m3", "m1", "m2", "m4"])]
    return keras.Model([user, movie], score), x, np.array([[1.0], [2], [5], [3]]), REGRESS

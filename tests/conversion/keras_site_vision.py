"""Small models of the mechanisms that examples of keras.io/examples have: images.

No code is taken from there. A layer here has a `get_config`, keywords that it passes on, or state
that is no Keras weight where its example's has. A function returns a model, inputs, targets, and
arguments of `compile`.
"""

import keras
import numpy as np
import tensorflow as tf

L, ops = keras.layers, keras.ops
CLASSES = np.array([0, 1, 2, 1])
LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
CLASSIFY = {"optimizer": "adam", "loss": LOGITS, "metrics": ["accuracy"]}
IMAGES = np.random.default_rng(0).uniform(size=(4, 8, 8, 4)).astype("float32")
COLOR, GRAY = IMAGES[..., :3], IMAGES[..., :1]
REGRESS = {"optimizer": "adam", "loss": "mse"}


class OwnLoop(keras.Model):
    """A custom `train_step` and metrics, as in many examples, for a `loss_of`."""

    @property
    def metrics(self):
        return [self.tracker]

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = self.loss_of(data)
        weights = self.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        self.tracker.update_state(loss)
        return {"loss": self.tracker.result()}


class Patches(L.Layer):
    def __init__(self, side):
        super().__init__()
        self.side = side

    def call(self, x):
        patches = ops.image.extract_patches(x, self.side)
        return ops.reshape(patches, (ops.shape(x)[0], -1, patches.shape[-1]))

    def get_config(self):
        return {**super().get_config(), "side": self.side}


class PatchEncoder(L.Layer):
    def __init__(self, count, width):
        super().__init__()
        self.count = count
        self.project, self.position = L.Dense(width), L.Embedding(count, width)

    def call(self, patches):
        return self.project(patches) + self.position(ops.arange(self.count)[None])

    def get_config(self):
        return {**super().get_config(), "count": self.count}


def vision_transformer():
    """Image classification with Vision Transformer: a `get_config` that lacks an argument."""
    normalize = L.Normalization()
    normalize.adapt(COLOR)
    inputs = keras.Input((8, 8, 3))
    x = keras.Sequential([normalize, L.Resizing(12, 12), L.RandomFlip("horizontal")])(inputs)
    x = PatchEncoder(9, 8)(Patches(4)(x))
    h = L.LayerNormalization()(x)
    x = L.Add()([L.MultiHeadAttention(2, 4, dropout=0.1)(h, h), x])
    h = L.Dropout(0.1)(L.Dense(8, activation=keras.activations.gelu)(L.LayerNormalization()(x)))
    x = L.Flatten()(L.Add()([h, x]))
    return keras.Model(inputs, L.Dense(3)(x)), COLOR, CLASSES, CLASSIFY


class WindowAttention(L.Layer):
    def __init__(self, width, window):
        super().__init__()
        self.window, self.qkv, self.project = window, L.Dense(3 * width), L.Dense(width)

    def build(self, shape):
        apart = np.arange(self.window)[:, None] - np.arange(self.window) + self.window - 1
        self.table = self.add_weight((2 * self.window - 1,), "zeros")
        self.apart = tf.Variable(apart, trainable=False)

    def call(self, x, mask):
        q, k, v = tf.split(self.qkv(x), 3, axis=-1)
        scores = tf.matmul(q, k, transpose_b=True) + tf.gather(self.table, self.apart)
        scores = tf.reshape(scores, (-1, mask.shape[0], self.window, self.window)) + mask
        scores = tf.reshape(scores, (-1, self.window, self.window))
        return self.project(tf.nn.softmax(scores) @ v)


class SwinBlock(L.Layer):
    def __init__(self, width, patches, window, shift):
        super().__init__()
        self.patches, self.window, self.shift = patches, window, shift
        self.norm, self.attention = L.LayerNormalization(), WindowAttention(width, window)
        self.mlp = keras.Sequential([L.Dense(2 * width, activation="gelu"), L.Dense(width)])

    def build(self, shape):
        sizes = [self.patches - self.window, self.window - self.shift, self.shift]
        regions = np.repeat([0.0, 1, 2], sizes).reshape(-1, self.window).astype("float32")
        apart = tf.where(regions[:, None] == regions[:, :, None], 0.0, -100.0)
        self.mask = tf.Variable(apart, trainable=False)

    def call(self, x):
        h = tf.roll(self.norm(x), -self.shift, 1)
        h = self.attention(tf.reshape(h, (-1, self.window, x.shape[-1])), mask=self.mask)
        x += tf.roll(tf.reshape(h, (-1, self.patches, x.shape[-1])), self.shift, 1)
        return x + self.mlp(x)


def swin_transformer():
    """Image classification with Swin Transformers: variables made in `build`, some not trained."""
    inputs = keras.Input((8, 8, 3))
    x = L.Reshape((16, 8))(L.Conv2D(8, 2, strides=2)(inputs))
    x = L.GlobalAveragePooling1D()(SwinBlock(8, 16, window=4, shift=2)(x))
    return keras.Model(inputs, L.Dense(3)(x)), COLOR, CLASSES, CLASSIFY


class Involution(L.Layer):
    def __init__(self, channels, groups, side, stride, name):
        super().__init__(name=name)
        self.channels, self.groups, self.side, self.stride = channels, groups, side, stride

    def build(self, shape):
        rows, columns, channels = shape[1] // self.stride, shape[2] // self.stride, shape[3]
        self.pool = L.AveragePooling2D(self.stride) if self.stride > 1 else tf.identity
        spread = L.Conv2D(self.side**2 * self.groups, 1)
        self.generate = keras.Sequential(
            [L.Conv2D(self.channels, 1), L.BatchNormalization(), L.ReLU(), spread]
        )
        self.shape_patches = L.Reshape((rows, columns, self.side**2, -1, self.groups))
        self.shape_output = L.Reshape((rows, columns, channels))

    def call(self, x):
        size = (-1, *self.shape_output.target_shape[:2], self.side**2, 1, self.groups)
        kernel = tf.reshape(self.generate(self.pool(x)), size)
        sides, strides = (1, self.side, self.side, 1), (1, self.stride, self.stride, 1)
        patches = tf.image.extract_patches(x, sides, strides, (1, 1, 1, 1), "SAME")
        return self.shape_output(tf.reduce_sum(kernel * self.shape_patches(patches), 3)), kernel


def involutional_network():
    """Involutional neural networks: layers and a function, made in `build`; two outputs."""
    inputs = keras.Input((8, 8, 4))
    x, _ = Involution(4, 1, 3, 1, name="first")(inputs)
    x, _ = Involution(4, 2, 3, 2, name="second")(L.ReLU()(x))
    return keras.Model([inputs], [L.Dense(3)(L.Flatten()(x))]), IMAGES, CLASSES, CLASSIFY


augmentation = keras.Sequential([L.Rescaling(2.0), L.Normalization(mean=1.0, variance=0.1)])


class Perceiver(keras.Model):
    def __init__(self, count, width, rounds, units):
        super().__init__()
        self.count, self.width, self.rounds, self.units = count, width, rounds, units

    def build(self, shape):
        size, width = (self.count, self.width), self.width
        self.latent = self.add_weight(size, "random_normal")
        self.patches, self.encoder = Patches(4), PatchEncoder(4, width)
        latent, data = keras.Input(size, name="latent"), keras.Input((4, width), name="data")
        attended = L.Attention(use_scale=True)([L.Dense(width)(latent), L.Dense(width)(data)])
        self.cross = keras.Model({"latent": latent, "data": data}, L.Add()([attended, latent]))
        self.attention = L.MultiHeadAttention(2, 4)
        self.head = keras.Sequential([L.Dense(unit) for unit in self.units])
        super().build(shape)

    def call(self, x):
        data = self.encoder(self.patches(augmentation(x)))
        latent = ops.repeat(self.latent[None], ops.shape(x)[0], axis=0)
        for _ in range(self.rounds):
            latent = self.cross({"latent": latent, "data": data})
            latent = latent + self.attention(latent, latent)
        return self.head(ops.mean(latent, axis=1))


def perceiver():
    """Image classification with Perceiver: a graph made in `build`; a global model is called."""
    model = Perceiver(3, 8, 2, [6, 3])
    model(COLOR)
    return model, COLOR, CLASSES, CLASSIFY


class PointRegularizer(keras.regularizers.Regularizer):
    def __init__(self, size, factor=0.001):
        self.size, self.factor, self.eye = size, factor, tf.eye(size)

    def __call__(self, x):
        x = tf.reshape(x, (-1, self.size, self.size))
        return tf.reduce_sum(self.factor * (tf.matmul(x, x, transpose_b=True) - self.eye) ** 2)


def point_net():
    """Point cloud classification with PointNet: an activity regularizer without `get_config`."""
    inputs = keras.Input((8, 3))
    x = L.BatchNormalization(momentum=0.0)(L.Conv1D(8, 1)(inputs))
    eye = keras.initializers.Constant(np.eye(3).flatten())
    transform = L.Dense(9, bias_initializer=eye, activity_regularizer=PointRegularizer(3))
    x = transform(L.GlobalMaxPooling1D()(L.Activation("relu")(x)))
    x = L.Conv1D(6, 1, activation="relu")(L.Dot(axes=(2, 1))([inputs, L.Reshape((3, 3))(x)]))
    outputs = L.Dense(3)(L.Dropout(0.3)(L.GlobalMaxPooling1D()(x)))
    return keras.Model(inputs, outputs), IMAGES[:, 0, :, :3], CLASSES, CLASSIFY


class ZeroDCE(OwnLoop):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        inputs = keras.Input((None, None, 3))
        self.net = keras.Model(inputs, L.Conv2D(6, 3, activation="tanh", padding="same")(inputs))

    def compile(self, learning_rate, **kwargs):
        super().compile(**kwargs)
        self.optimizer = keras.optimizers.Adam(learning_rate=learning_rate)
        self.filter = tf.reshape(tf.constant([-1.0, 1.0]), (1, 2, 1, 1))
        self.tracker = keras.metrics.Mean(name="total_loss")

    def call(self, x):
        for curve in tf.split(self.net(x), 2, axis=-1):
            x += curve * (x**2 - x)
        return x

    def loss_of(self, x):
        change = ops.mean(x - self(x), -1, keepdims=True)
        return ops.mean(tf.nn.conv2d(change, self.filter, 1, "SAME") ** 2)


def zero_dce():
    """Zero-DCE for low-light image enhancement: `compile`, and metrics that it makes."""
    model = ZeroDCE()
    model.compile(learning_rate=1e-4)
    model(COLOR)
    return model, COLOR, 0.5 + 0.5 * COLOR, REGRESS


class Sampling(L.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(1337)

    def call(self, inputs):
        noise = keras.random.normal(ops.shape(inputs[0]), seed=self.seed_generator)
        return inputs[0] + ops.exp(0.5 * inputs[1]) * noise


class VAE(OwnLoop):
    def __init__(self, encoder, decoder, **kwargs):
        super().__init__(**kwargs)
        self.encoder, self.decoder = encoder, decoder
        self.tracker = keras.metrics.Mean(name="total_loss")

    def call(self, x):
        return self.decoder(self.encoder(x)[2])

    def loss_of(self, x):
        mean, log_variance, sample = self.encoder(x)
        divergence = ops.mean(ops.exp(log_variance) + mean**2 - 1 - log_variance)
        return ops.mean((self.decoder(sample) - x) ** 2) + divergence


def variational_autoencoder():
    """Variational AutoEncoder: a model given two graphs; what it predicts is drawn at random."""
    inputs = keras.Input((8, 8, 1))
    x = L.Flatten()(L.Conv2D(4, 3, activation="relu", strides=2, padding="same")(inputs))
    mean, log_variance = L.Dense(2, name="mean")(x), L.Dense(2, name="log_variance")(x)
    outputs = [mean, log_variance, Sampling()([mean, log_variance])]
    encoder = keras.Model(inputs, outputs, name="encoder")
    inputs = keras.Input((2,))
    x = L.Reshape((4, 4, 2))(L.Dense(32, activation="relu")(inputs))
    x = L.Conv2DTranspose(1, 3, activation="sigmoid", strides=2, padding="same")(x)
    model = VAE(encoder, keras.Model(inputs, x, name="decoder"))
    model(GRAY)
    return model, GRAY, GRAY, REGRESS


class VectorQuantizer(L.Layer):
    def __init__(self, count, width, beta=0.25, **kwargs):
        super().__init__(**kwargs)
        self.count, self.width, self.beta = count, width, beta
        start = tf.random_uniform_initializer(-0.5, 0.5)
        self.codebook = tf.Variable(start((width, count), dtype="float32"), trainable=True)

    def call(self, x):
        flat = tf.reshape(x, (-1, self.width))
        apart = tf.reduce_sum(self.codebook**2, 0) - 2 * tf.matmul(flat, self.codebook)
        chosen = tf.one_hot(tf.argmin(apart, 1), self.count)
        quantized = tf.reshape(tf.matmul(chosen, self.codebook, transpose_b=True), tf.shape(x))
        apart = (tf.stop_gradient(quantized) - x) ** 2, (quantized - tf.stop_gradient(x)) ** 2
        self.add_loss(self.beta * tf.reduce_mean(apart[0]) + tf.reduce_mean(apart[1]))
        return x + tf.stop_gradient(quantized - x)


def vq_vae():
    """Vector-Quantized Variational Autoencoders: a codebook that is a `tf.Variable`; `add_loss`."""
    inputs = keras.Input((8, 8, 1))
    encoder = keras.Model(inputs, L.Conv2D(2, 3, strides=2, padding="same")(inputs))
    latent = keras.Input((4, 4, 2))
    decoder = keras.Model(latent, L.Conv2DTranspose(1, 3, strides=2, padding="same")(latent))
    outputs = decoder(VectorQuantizer(6, 2, name="quantizer")(encoder(inputs)))
    return keras.Model(inputs, outputs, name="vq_vae"), GRAY, GRAY, REGRESS


class PixelConv(L.Layer):
    def __init__(self, mask_type, **kwargs):
        super().__init__()
        self.mask_type = mask_type
        self.conv = L.Conv2D(**kwargs)

    def build(self, shape):
        self.conv.build(shape)
        sides = self.conv.kernel_size
        before = np.arange(np.prod(sides)) < np.prod(sides) // 2 + (self.mask_type == "B")
        self.mask = before.reshape(*sides, 1, 1).astype("float32")

    def call(self, x):
        self.conv.kernel.assign(self.conv.kernel * self.mask)
        return self.conv(x)


def pixel_cnn():
    """PixelCNN: a layer that assigns to the kernel of a layer inside whenever it is called."""
    inputs = keras.Input((8, 8, 1))
    x = PixelConv("A", filters=4, kernel_size=3, activation="relu", padding="same")(inputs)
    x = L.add([x, PixelConv("B", filters=4, kernel_size=3, padding="same")(x)])
    return keras.Model(inputs, L.Conv2D(1, 1, activation="sigmoid")(x)), GRAY, GRAY, REGRESS


@keras.saving.register_keras_serializable("tests")
def sinusoids(x):
    speeds = 2 * np.pi * ops.exp(ops.linspace(ops.log(1.0), ops.log(10.0), 2))
    return ops.concatenate([ops.sin(speeds * x), ops.cos(speeds * x)], axis=3)


def diffusion_net():
    """Denoising Diffusion Implicit Models: a `Lambda` of a registered function."""
    noisy, variances = keras.Input((8, 8, 3)), keras.Input((1, 1, 1))
    e = L.Lambda(sinusoids, output_shape=(1, 1, 4))(variances)
    x = L.Concatenate()([L.Conv2D(4, 1)(noisy), L.UpSampling2D(8, interpolation="nearest")(e)])
    h = L.BatchNormalization(center=False, scale=False)(L.AveragePooling2D(2)(x))
    h = L.UpSampling2D(2, interpolation="bilinear")(L.Conv2D(6, 3, padding="same")(h))
    outputs = L.Conv2D(3, 1)(L.Concatenate()([L.Activation("swish")(h), x]))
    x = [COLOR, np.full((4, 1, 1, 1), 0.3, "float32")]
    return keras.Model([noisy, variances], outputs), x, COLOR, REGRESS

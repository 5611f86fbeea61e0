"""Wrote the files in this folder with version 0.1.0, commit fde5b9f: `python make.py DIRECTORY`."""

import os
import sys

import keras
import numpy as np

import keras_learnbits as klb

rng = np.random.default_rng(0)


def sequential():
    layers = [
        keras.Input((6,)),
        klb.LearnedBitDense(5, activation="relu", bits=3, name="hidden"),
        klb.LearnedBitDense(2, bits=5, kernel_quantizer="min_max", name="head"),
    ]
    model = klb.LearnedBitSequential(layers, name="sequential")
    model.compile(
        keras.optimizers.Adam(0.01),
        "mse",
        metrics=["mae"],
        bit_reg=0.03,
        bit_optimizer=klb.SignSGD(0.02, momentum=0.5, dead_zone=1e-9),
        bit_gradient=klb.bit_gradients.Measured(interval=3),
    )
    x = rng.normal(size=(32, 6)).astype("float32")
    model.fit(x, x[:, :2], batch_size=8, epochs=3, verbose=0)
    model.freeze_bits()
    return model, x[:4]


def functional():
    inputs = keras.Input((8, 8, 3), name="image")
    x = klb.LearnedBitConv2D(4, 3, padding="same", bits=2, name="conv")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Activation("relu", name="relu")(x)
    x = klb.LearnedBitActivation(bits=4, name="levels")(x)
    x = klb.LearnedBitDepthwiseConv2D(3, bits=6, name="depthwise")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    outputs = klb.LearnedBitDense(3, name="head")(x)
    model = klb.LearnedBitModel(inputs, outputs, name="functional")
    model.compile(
        "sgd",
        "mse",
        bit_gradient="straight_through",
        bit_penalty="levels",
        quantization_error="squared",
        bit_reg=1e-5,
    )
    x = rng.normal(size=(16, 8, 8, 3)).astype("float32")
    model.fit(x, rng.normal(size=(16, 3)), batch_size=8, epochs=2, verbose=0)
    return model, x[:4]


def converted():
    tokens = keras.Input((7,), dtype="int32", name="tokens")
    x = keras.layers.Embedding(11, 6, name="embedding")(tokens)
    x = keras.layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = keras.layers.Bidirectional(keras.layers.LSTM(3), name="both")(x)
    plain = keras.Model(tokens, keras.layers.Dense(2, name="head")(x), name="converted")
    model = klb.to_learned_bits(plain, bits=4)
    model.compile("adam", "mse", bit_gradient="difference")
    x = rng.integers(0, 11, (4, 7))
    model.fit(x, rng.normal(size=(4, 2)), verbose=0)
    return model, x


if __name__ == "__main__":
    keras.utils.set_random_seed(0)
    for make in (sequential, functional, converted):
        model, x = make()
        name = os.path.join(sys.argv[1], model.name)
        model.save(f"{name}.keras")
        klb.save_packed(model, f"{name}.safetensors", include_config=True)
        np.savez(
            f"{name}.npz",
            x=x,
            y=model.predict(x, verbose=0),
            bits=[float(tensor.latent_bits()) for tensor in model.quantized_tensors],
            bit_reg=float(model.bit_reg.value),
            frozen=model.bits_are_frozen,
        )

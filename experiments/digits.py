"""Learned bits on scikit-learn's bundled handwritten digits: 1,797 images of 8x8, no download.

python experiments/digits.py
"""

import common
import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def load(data_dir):
    """Images scaled to 0..1; the same split for all seeds, 1,437 for training and 360 for test."""
    del data_dir
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    x, x_test, y, y_test = train_test_split(
        images, labels, test_size=360, stratify=labels, random_state=0
    )
    return (x, y), (x_test, np.asarray(y_test))


def cnn(Conv2D, Dense):
    """Two convolutions and two dense layers, 71,754 weights."""
    layers = keras.layers
    inputs = keras.Input((8, 8, 1))
    x = Conv2D(32, 3, padding="same", activation="relu", name="conv1")(inputs)
    x = Conv2D(32, 3, padding="same", activation="relu", name="conv2")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Flatten()(x)
    x = Dense(128, activation="relu", name="dense1")(x)
    x = layers.Dropout(0.3)(x)
    return inputs, Dense(10, name="dense2")(x)


def logistic(Conv2D, Dense):
    """Logistic regression."""
    inputs = keras.Input((8, 8, 1))
    return inputs, Dense(10, name="dense")(keras.layers.Flatten()(inputs))


PROBLEM = common.Problem(
    load=load,
    nets={"cnn": cnn, "logistic": logistic},
    defaults={"epochs": 40, "batch_size": 32, "learning_rate": 2e-3, "bit_reg": 0.03},
)

if __name__ == "__main__":
    common.run(PROBLEM)

"""Example inputs from all kinds of data."""

import tracemalloc

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_learnbits.calibration import examples
from keras_learnbits.calibration.examples import read_examples

X, Y = np.arange(120.0).reshape(40, 3), np.arange(40)
MODEL = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        rows = slice(10 * index, 10 * index + 10)
        return X[rows], Y[rows]


def batches():
    return (X[i : i + 10] for i in range(0, 40, 10))


@pytest.mark.parametrize(
    "data",
    [
        X,
        (X, Y),
        (X, Y, np.ones(40)),
        tf.constant(X),
        tf.data.Dataset.from_tensor_slices(X).batch(7),
        tf.data.Dataset.from_tensor_slices((X, Y)).batch(7),
        Batches(),
        batches(),
        keras.Variable(X),
    ],
    ids=lambda data: type(data).__name__,
)
def test_all_kinds_of_data_give_the_same_examples_without_their_labels(data):
    found = read_examples(data, MODEL, 8192, seed=0)
    assert found.dtype == np.float32
    # In random order, because data may be sorted by class.
    np.testing.assert_array_equal(found, X[np.random.default_rng(0).permutation(40)])


def test_of_arrays_a_random_sample_is_kept_and_of_the_rest_the_first():
    sample = read_examples(X, MODEL, 16, seed=3)
    assert len(sample) == 16
    assert {tuple(row) for row in sample} < {tuple(row) for row in X}
    np.testing.assert_array_equal(sample, read_examples(X, MODEL, 16, seed=3))
    assert not np.array_equal(sample, read_examples(X, MODEL, 16, seed=4))

    def endless():
        while True:
            yield X[:5]

    found = read_examples(endless(), MODEL, 12, 0)
    np.testing.assert_array_equal(np.sort(found, axis=0), np.sort(X[[*range(5)] * 3][:12], axis=0))


def test_integers_are_kept_for_a_model_that_takes_them_and_cast_for_one_that_does_not():
    images = np.arange(120, dtype="uint8").reshape(40, 3)
    assert read_examples(images, MODEL, 99, 0).dtype == np.float32
    tokens = keras.Sequential(
        [keras.Input((3,), dtype="int32"), keras.layers.Embedding(200, 2), keras.layers.Flatten()]
    )
    assert read_examples(images, tokens, 99, 0).dtype == np.int32
    assert read_examples(images.astype("float64"), tokens, 99, 0).dtype == np.int32


@pytest.mark.parametrize(
    ("dtype", "data"),
    [("uint8", X / 120), ("uint8", X - 1), ("uint8", X * 3), ("int32", X * 1e9), ("bool", X)],
    ids=lambda value: value if isinstance(value, str) else f"{value.min():g}..{value.max():g}",
)
def test_numbers_that_an_input_of_integers_cannot_hold_are_refused(dtype, data):
    inputs = keras.Input((3,), dtype=dtype)
    floats = keras.layers.Lambda(lambda x: keras.ops.cast(x, "float32"))(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(floats))
    for each in (data, iter([data])):
        with pytest.raises(ValueError, match=f"values that an input of type {dtype} holds.*from"):
            read_examples(each, model, 99, 0)
    kept = read_examples(X % 2, model, 99, 0)
    assert kept.dtype == dtype
    assert kept.sum() == (X % 2).sum()


def peak_of(function):
    """Bytes that Python and NumPy allocate while a function runs, at their peak."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_of_a_mapped_file_only_the_sample_is_read_and_converted(tmp_path):
    path, model = (
        tmp_path / "x.npy",
        keras.Sequential([keras.Input((1000,)), keras.layers.Dense(2)]),
    )
    np.save(path, np.zeros((4000, 1000), "uint8"))
    mapped = np.load(path, mmap_mode="r")
    sample = 20 * 1000 * 4  # bytes
    assert peak_of(lambda: read_examples(mapped, model, 20, 0)) < 4 * sample + 4e5 < mapped.size / 4


def test_batches_are_read_until_memory_is_full_and_are_not_held_twice(monkeypatch):
    monkeypatch.setattr(examples, "MOST_NUMBERS", 300_000)
    model = keras.Sequential([keras.Input((1000,)), keras.layers.Dense(2)])
    read = []

    def endless():
        while True:
            read.append(len(read))
            yield np.full((10, 1000), read[-1], "float32")

    found = []
    peak = peak_of(lambda: found.append(read_examples(endless(), model, 8192, 0)))
    assert sorted(found[0][:, 0]) == [number for number in range(30) for _ in range(10)]
    assert len(read) == 30
    assert peak < 1.5 * found[0].nbytes + 4e5


def test_several_inputs_are_a_list_or_a_dictionary():
    inputs = {"a": keras.Input((3,), name="a"), "b": keras.Input((1,), name="b")}
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs["a"]) + inputs["b"])
    found = read_examples({"a": X, "b": X[:, :1]}, model, 99, 0)
    assert set(found) == {"a", "b"}
    inputs = [keras.Input((3,)), keras.Input((1,))]
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs[0]) + inputs[1])
    assert [each.shape for each in read_examples([X, X[:, :1]], model, 9, 0)] == [(9, 3), (9, 1)]
    pairs = tf.data.Dataset.from_tensor_slices(((X, X[:, :1]), Y)).batch(7)
    for data in (pairs, ((X, X[:, :1]), Y)):
        found = read_examples(data, model, 99, 0)
        assert isinstance(found, list)
        np.testing.assert_array_equal(found[0][:, :1], found[1])


def test_a_dictionary_for_a_list_of_inputs_is_read_by_name():
    inputs = [keras.Input((3,), name="z"), keras.Input((3,), name="a", dtype="int32")]
    embedded = keras.layers.Flatten()(keras.layers.Embedding(200, 1)(inputs[1]))
    model = keras.Model(inputs, inputs[0] + embedded)
    found = read_examples({"a": X + 60, "z": X}, model, 99, 0)
    np.testing.assert_array_equal(found[0] + 60, found[1])
    assert [each.dtype for each in found] == [np.float32, np.int32]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (X[:7], r"at least 8 examples.*Received: float64\[7, 3\]"),
        (X[:0], "at least 8 examples"),
        (np.where(X == 7, np.nan, X), "finite numbers.*NaN or infinity"),
        (Y, r"must be inputs of the model.*int64\[40\] for inputs of shape \[\(None, 3\)\]"),
        (X[:, :2], r"Received: float64\[40, 2\]"),
        (X[:, :0], "must have numbers in each example"),
        (tf.RaggedTensor.from_row_lengths(X[0], [2, 1]), "pad ragged.*Received: RaggedTensor"),
        ([X, Y], "a list or dictionary several inputs"),
        ([X, X[:30]], "the same number for each input"),
        (iter([X[:9], X[:9, :2]]), "pad sequences to one length"),
        (iter([]), "dataset or generator without any"),
        ((X[i : i + 2] for i in range(2)), "at least 8 examples"),
        (np.full((40, 3), "cat"), "arrays of numbers"),
        (7, "array, a structure of arrays, or a dataset"),
        (None, "array, a structure of arrays, or a dataset"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_data_that_cannot_be_used_are_refused_with_what_was_received(data, message):
    with pytest.raises(ValueError, match=message):
        read_examples(data, MODEL, 8192, seed=0)


def test_a_model_with_a_custom_call_says_why_it_does_not_take_the_data():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def call(self, x):  # takes no `training`
            return self.dense(x)

    model = Own()
    model(X)
    assert read_examples(X, model, 99, 0).shape == X.shape
    with pytest.raises(ValueError, match=r"float32\[40, 2\], with which model 'own' fails"):
        read_examples(X[:, :2], model, 99, 0)

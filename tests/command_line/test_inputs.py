"""Arrays and images that `--data` may name."""

import tracemalloc

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_learnbits.calibration import examples
from keras_learnbits.command_line.inputs import read_inputs


def read(path, model, scale=None, in_order=True):
    found = read_inputs("--data", str(path), model, scale, in_order, seed=0)
    return keras.tree.map_structure(np.asarray, found)


def two_inputs():
    left, right = keras.Input((2,), name="left"), keras.Input((3,), name="right")
    return keras.Model([right, left], keras.layers.Concatenate()([left, right]))


def image_model(channels=3):
    return keras.Sequential([keras.Input((4, 6, channels)), keras.layers.Flatten()])


def write_images(folder, colors):
    for name, color in colors.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        pixels = np.broadcast_to(np.array(color, "uint8"), (8, 12, 3))
        path.write_bytes(tf.io.encode_png(pixels).numpy())


def test_an_archive_of_one_array_is_that_array(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    np.savez(tmp_path / "x.npz", anything=np.ones((5, 2)))
    assert read(tmp_path / "x.npz", model).tolist() == np.ones((5, 2)).tolist()


def test_arrays_are_put_in_the_order_of_the_inputs_that_they_are_named_as(tmp_path):
    np.savez(tmp_path / "x.npz", left=np.zeros((5, 2)), right=np.ones((5, 3)))
    right, left = read(tmp_path / "x.npz", two_inputs())
    assert (right.shape, left.shape) == ((5, 3), (5, 2))


def test_arrays_of_a_dictionary_keep_their_names(tmp_path):
    inputs = {name: keras.Input((2,), name=name) for name in ("one", "two")}
    model = keras.Model(inputs, keras.layers.Add()(list(inputs.values())))
    np.savez(tmp_path / "x.npz", two=np.ones((5, 2)), one=np.zeros((5, 2)))
    assert read(tmp_path / "x.npz", model)["two"].sum() == 10


def test_arrays_of_other_names_are_refused_with_both(tmp_path):
    np.savez(tmp_path / "x.npz", left=np.zeros((5, 2)), wrong=np.ones((5, 3)))
    with pytest.raises(ValueError, match="right.*wrong"):
        read(tmp_path / "x.npz", two_inputs())


def test_values_are_scaled_in_float32(tmp_path):
    np.save(tmp_path / "x.npy", np.full((2, 2), 255, "uint8"))
    scaled = read(tmp_path / "x.npy", None, scale=2.0)
    assert scaled.dtype == "float32"
    assert scaled.max() == 510


def test_of_a_large_file_only_rows_in_use_are_read_and_scaled(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((4000, 1000), "uint8"))
    tracemalloc.start()
    try:
        found = read_inputs("--data", str(tmp_path / "x.npy"), None, 0.5, False, seed=0)
        rows = found.rows(np.arange(0, 4000, 2))[5:15]
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    assert rows.dtype == "float32"
    assert rows.sum() == 10 * 1000 / 2


def test_no_more_images_are_read_than_memory_holds(tmp_path, monkeypatch):
    write_images(tmp_path, {f"{number}.png": (0, number, 0) for number in range(12)})
    monkeypatch.setattr(examples, "MOST_NUMBERS", 9 * 4 * 6 * 3)
    assert len(read(tmp_path, image_model(), in_order=False)) == 9
    assert len(read(tmp_path, image_model(), in_order=True)) == 12


def test_images_are_resized_in_the_order_of_their_paths(tmp_path):
    write_images(tmp_path, {"b/1.png": (0, 10, 0), "a.png": (200, 0, 0), "c.png": (0, 0, 255)})
    images = read(tmp_path, image_model())
    assert images.shape == (3, 4, 6, 3)
    assert images.dtype == "float32"
    assert np.allclose(images[:, 0, 0], [[200, 0, 0], [0, 10, 0], [0, 0, 255]])
    assert np.allclose(read(tmp_path, image_model(), scale=0.5)[2, 0, 0], [0, 0, 127.5])
    assert len(read(tmp_path, image_model(channels=1), in_order=False)) == 3


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--data must be a folder of images"):
        read(tmp_path, image_model())


def test_a_folder_for_a_model_of_other_inputs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="numpy.save"):
        read(tmp_path, two_inputs())


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.csv"])
def test_a_file_that_holds_no_arrays_is_refused_with_its_name(tmp_path, name):
    (tmp_path / name).write_text("1,2")
    with pytest.raises(ValueError, match=f"--data must be .*{name}"):
        read(tmp_path / name, two_inputs())

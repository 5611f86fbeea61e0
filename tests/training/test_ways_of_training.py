"""Each way in which Keras trains, with the default estimator of the bits."""

import signal
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.bit_gradients import Measured
from keras_learnbits.layers.discovery import quantized_kernels

SETTINGS = {"bit_reg": 0.05, "bit_gradient": Measured(interval=1)}


@pytest.mark.thorough
def test_layers_whose_activations_are_computed_again_learn_like_others():
    """Under `keras.RematScope` a layer is called again in the backward pass."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 6, 6, 2)).astype("float32"), rng.normal(size=(32, 3))

    def learned(mode):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((6, 6, 2))
        with keras.RematScope(mode):
            convolution = klb.LearnedBitConv2D(3, 3, bits=3)
        outputs = keras.layers.GlobalAveragePooling2D()(convolution(inputs))
        model = klb.LearnedBitModel(inputs, outputs)
        model.compile(keras.optimizers.SGD(0.5), "mse", quantization_reg=0.0)
        model.fit(x, y, epochs=3, shuffle=False, verbose=0)
        kernel = convolution.quantized_kernels["kernel"]
        return kernel.kernel.numpy(), kernel.log_scale.numpy()

    for again, kept in zip(learned("full"), learned(None), strict=True):
        np.testing.assert_allclose(again, kept, rtol=1e-4, atol=1e-5)


def compiled(model, optimizer="adam", loss="mse", **settings):
    settings = {**SETTINGS, "bit_optimizer": klb.SignSGD(0.25), **settings}
    model.compile(optimizer, loss, **settings)
    return model


def bits_of(model):
    return [float(kernel.latent_bits()) for kernel in quantized_kernels(model)]


def trained(make_model, x, y=None, settings=None, **arguments):
    """Bits and a weight after a training from the same start."""
    keras.utils.set_random_seed(1)
    model = compiled(make_model(bits=5), **(settings or {}))
    arguments = {"epochs": 2, "verbose": 0, **arguments}
    model.fit(x, y, **arguments)
    return bits_of(model), quantized_kernels(model)[0].kernel.numpy()


@pytest.mark.parametrize("policy", ["mixed_bfloat16", *thorough("mixed_float16")])
def test_mixed_precision_measures_and_moves_bits(policy, make_model, data):
    keras.config.set_dtype_policy(policy)
    model = compiled(make_model(bits=5), keras.optimizers.Adam(0.02))
    losses = model.fit(*data, batch_size=16, epochs=10, verbose=0).history["task_loss"]
    assert losses[-1] < losses[0] / 2
    assert bits_of(model) != [5.0, 8.0]
    assert all(4 * bits % 1 == 0 for bits in bits_of(model))  # they move by whole steps of 0.25
    assert all(kernel.kernel.dtype == "float32" for kernel in quantized_kernels(model))
    assert model.losses_are_known


@pytest.mark.parametrize(
    "settings",
    [{"run_eagerly": True}, *thorough({"jit_compile": True}, {"steps_per_execution": 2})],
    ids=str,
)
def test_measured_bits_are_the_same_in_every_way_of_execution(settings, make_model, data):
    arguments = {"batch_size": 16, "shuffle": False}
    bits, weights = trained(make_model, *data, **arguments)
    other_bits, other_weights = trained(make_model, *data, settings=settings, **arguments)
    assert bits == other_bits != [5.0, 8.0]
    np.testing.assert_allclose(other_weights, weights, rtol=1e-3, atol=1e-5)


def test_gradient_accumulation_moves_bits_each_step_and_weights_every_other(make_model, data):
    model = compiled(make_model(bits=5), keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    before = quantized_kernels(model)[0].kernel.numpy()
    model.fit(data[0][:16], data[1][:16], batch_size=16, verbose=0)
    np.testing.assert_array_equal(quantized_kernels(model)[0].kernel, before)
    assert bits_of(model) != [5.0, 8.0]
    model.fit(data[0][:16], data[1][:16], batch_size=16, verbose=0)
    assert np.abs(quantized_kernels(model)[0].kernel - before).max() > 0


@pytest.mark.thorough
def test_data_may_come_as_arrays_datasets_and_generators(make_model, data):
    x, y = data
    arguments = {"shuffle": False}
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]

    def generator():
        while True:
            yield from batches

    bits, weights = trained(make_model, x, y, batch_size=16, **arguments)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    for source, more in ((dataset, {}), (generator(), {"steps_per_epoch": 4})):
        other_bits, other_weights = trained(make_model, source, **more)
        assert other_bits == bits != [5.0, 8.0]
        np.testing.assert_allclose(other_weights, weights, rtol=1e-4, atol=1e-6)


@pytest.mark.thorough
def test_sample_weights_of_zero_leave_out_examples(make_model, data):
    """Half of the weights 0 and the others 2 give the same result as the other half alone."""
    x, y = data
    half = {"batch_size": 64, "shuffle": False}
    weights = np.repeat([2.0, 0.0], 32)
    bits, kernel = trained(make_model, x, y, sample_weight=weights, **half)
    alone_bits, alone = trained(make_model, x[:32], y[:32], **half)
    assert bits == alone_bits
    np.testing.assert_allclose(kernel, alone, rtol=1e-3, atol=1e-5)


@pytest.mark.thorough
def test_class_weights_are_sample_weights(data):
    x, labels = data[0], (data[1][:, 0] > 0).astype(int)

    def train(**arguments):
        keras.utils.set_random_seed(1)
        model = klb.LearnedBitSequential(
            [keras.Input((6,)), klb.LearnedBitDense(8, bits=5), klb.LearnedBitDense(2)]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        compiled(model, loss=loss)
        model.fit(x, labels, batch_size=16, shuffle=False, verbose=0, **arguments)
        return bits_of(model), quantized_kernels(model)[0].kernel.numpy()

    by_class = train(class_weight={0: 3.0, 1: 0.5})
    by_sample = train(sample_weight=np.where(labels == 0, 3.0, 0.5))
    assert by_class[0] == by_sample[0]
    np.testing.assert_allclose(by_class[1], by_sample[1], rtol=1e-5)
    assert np.abs(by_class[1] - train()[1]).max() > 1e-4


@pytest.mark.thorough
def test_several_losses_are_measured_by_their_weighted_sum(data):
    x, y = data
    inputs = keras.Input((6,))
    h = klb.LearnedBitDense(8, bits=5, name="hidden")(inputs)
    outputs = {name: klb.LearnedBitDense(1, bits=5, name=name)(h) for name in ("a", "b")}
    model = klb.LearnedBitModel(inputs, outputs)
    compiled(model, loss={"a": "mse", "b": "mae"}, loss_weights={"a": 1.0, "b": 0.0}, bit_reg=1e-3)
    targets = {"a": y[:, :1], "b": y[:, 1:]}
    model.freeze_bits()
    model.fit(x, targets, batch_size=16, epochs=40, verbose=0)  # targets for which bits matter
    model.unfreeze_bits()
    model.fit(x, targets, batch_size=16, epochs=20, verbose=0)
    bits = dict(zip(("hidden", "a", "b"), bits_of(model), strict=True))
    assert round(bits["b"]) == 1  # its loss has no weight, so its bits do not matter
    assert round(bits["a"]) > 1


PROGRAM = """
import os, signal, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import keras, numpy as np
import keras_learnbits as klb
from keras_learnbits.bit_gradients import Measured

backup, result, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])

class Kill(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

keras.utils.set_random_seed(1)
rng = np.random.default_rng(0)
x = rng.normal(size=(64, 6)).astype("float32")
y = (x @ rng.normal(size=(6, 2))).astype("float32")
model = klb.LearnedBitSequential(
    [keras.Input((6,)), klb.LearnedBitDense(8, bits=5, activation="relu"), klb.LearnedBitDense(2)])
model.compile("adam", "mse", bit_reg=0.05, bit_gradient=Measured(interval=3),
              bit_optimizer=klb.SignSGD(0.05))
model.fit(x, y, batch_size=8, epochs=6, shuffle=False, verbose=0,
          callbacks=[keras.callbacks.BackupAndRestore(backup), Kill()])
np.savez(result, *[np.asarray(v) for v in model.variables])
"""


@pytest.mark.thorough
def test_a_training_killed_and_restarted_ends_as_one_that_was_not(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))

    def run(name, kill_at):
        result = tmp_path / f"{name}.npz"
        arguments = [str(tmp_path / name), str(result), str(kill_at)]
        return subprocess.run([sys.executable, str(program), *arguments]).returncode, result

    _, uninterrupted = run("whole", -1)
    returned, result = run("killed", 3)
    assert returned == -signal.SIGKILL
    assert not result.exists()
    returned, resumed = run("killed", -1)
    assert returned == 0
    expected, found = np.load(uninterrupted), np.load(resumed)
    assert len(expected.files) > 6
    for name in expected.files:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-7)


class WithOldLoss(klb.LearnedBitSequential):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return 3.0 + super().compute_loss(x, y, y_pred, sample_weight)


def test_a_loss_without_the_argument_training_is_trained():
    model = WithOldLoss([keras.Input((4,)), klb.LearnedBitDense(1)])
    model.compile("sgd", "mse", bit_gradient=Measured(interval=1))
    x, y = np.ones((32, 4)), np.ones((32, 1))
    losses = model.fit(x, y, epochs=3, verbose=0).history["loss"]
    assert 3.0 < losses[-1] < losses[0]

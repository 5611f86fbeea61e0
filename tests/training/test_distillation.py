import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_learnbits as klb
from keras_learnbits.layers.discovery import quantized_kernels


def distiller(make_model, weight=0.25, **settings):
    """A distiller whose teacher is a linear layer, and the teacher."""
    teacher = keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)])
    divergence = keras.losses.KLDivergence(reduction=None)
    distillation = keras.distillation.LogitsDistillation(2.0, loss=divergence)
    model = klb.LearnedBitDistiller(teacher, make_model(), distillation, student_loss_weight=weight)
    model.compile(keras.optimizers.SGD(0.01), "mse", bit_optimizer=klb.SignSGD(0.1), **settings)
    return model


def test_the_task_loss_is_that_of_labels_and_teacher(make_model, data):
    x, y = data
    model = distiller(make_model)

    def softmax(z):
        e = np.exp(z / 2.0)
        return e / e.sum(axis=1, keepdims=True)

    student, teacher = model.student.predict(x, verbose=0), model.teacher.predict(x, verbose=0)
    p, q = softmax(teacher), softmax(student)
    divergence = 4.0 * (p * np.log(p / q)).sum(axis=1).mean()
    expected = 0.25 * ((student - y) ** 2).mean() + 0.75 * divergence
    found = model.evaluate(x, y, batch_size=64, verbose=0, return_dict=True)
    np.testing.assert_allclose(found["task_loss"], expected, rtol=1e-4)


def test_the_students_bits_fall_and_the_teacher_stays(make_model, data):
    model = distiller(make_model, bit_reg=100.0)
    before = model.teacher.get_weights()
    callbacks = [klb.BitBudget(target_bits=2.0, by=0.25), klb.BitLogger(), klb.FreezeBits(at=0.5)]
    history = model.fit(*data, batch_size=8, epochs=8, callbacks=callbacks, verbose=0)
    assert klb.bit_table(model.student).mean_bits <= 2.0
    assert "bits/hidden" in history.history
    for a, b in zip(before, model.teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


def test_frozen_bits_of_a_student_stay_until_they_are_released(make_model, data):
    student = make_model()
    student.compile("adam", "mse")
    student.freeze_bits([5] * len(student.quantized_tensors))
    teacher = klb.to_keras(make_model())
    model = klb.LearnedBitDistiller(
        teacher, student, keras.distillation.LogitsDistillation(loss="mse")
    )
    model.compile("adam", "mse", bit_reg=10.0, bit_gradient="straight_through")
    model.fit(*data, epochs=2, verbose=0)
    assert [float(tensor.bits) for tensor in student.quantized_tensors] == [5, 5]
    model.unfreeze_bits()
    model.fit(*data, epochs=1, verbose=0)
    assert max(float(tensor.bits) for tensor in student.quantized_tensors) < 5


@pytest.mark.thorough
def test_an_interrupted_distillation_goes_on_from_its_backup(make_model, data, tmp_path):
    def fit(*callbacks):
        keras.utils.set_random_seed(3)
        model = distiller(make_model, bit_reg=0.1)
        model.fit(*data, batch_size=8, epochs=4, shuffle=False, callbacks=callbacks, verbose=0)
        return model.student.get_weights()

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path)

    expected = fit()
    with pytest.raises(KeyboardInterrupt):
        fit(backup(), Interrupt())
    for weight, other in zip(fit(backup()), expected, strict=True):
        np.testing.assert_allclose(weight, other, rtol=1e-6, atol=1e-7)


def test_a_student_is_saved_by_itself(make_model, data, tmp_path):
    model = distiller(make_model)
    model.fit(*data, verbose=0)
    model.student.save(tmp_path / "student.keras")
    loaded = keras.models.load_model(tmp_path / "student.keras")
    np.testing.assert_array_equal(
        loaded.predict(data[0], verbose=0), model.predict(data[0], verbose=0)
    )


@pytest.mark.thorough
def test_a_saved_distiller_predicts_the_same(make_model, data, tmp_path):
    model = distiller(make_model)
    model.fit(*data, verbose=0)
    model.save(tmp_path / "distiller.keras")
    loaded = keras.models.load_model(tmp_path / "distiller.keras")
    np.testing.assert_array_equal(
        loaded.predict(data[0], verbose=0), model.predict(data[0], verbose=0)
    )


@pytest.mark.thorough
def test_two_replicas_distil_as_one(strategy, make_model, data):
    def train():
        model = distiller(make_model, bit_reg=0.05)
        losses = model.fit(*data, batch_size=64, epochs=3, shuffle=False, verbose=0).history["loss"]
        variables = [tf.convert_to_tensor(v.value).numpy() for v in model.student.variables]
        return losses, variables, [float(k.latent_bits()) for k in quantized_kernels(model)]

    one = train()
    keras.utils.set_random_seed(1)
    with strategy.scope():
        two = train()
    np.testing.assert_allclose(one[0], two[0], rtol=1e-4)
    assert one[2] == pytest.approx(two[2])
    for a, b in zip(one[1], two[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Bit-widths were reduced when training ended")
def test_bytes_are_those_of_the_student(make_model, data):
    model = distiller(make_model)
    target = klb.bit_table(model.student).packed_bytes - 30
    model.fit(*data, batch_size=16, callbacks=[klb.BitBudget(target_bytes=target)], verbose=0)
    assert target - 8 < klb.bit_table(model.student).packed_bytes <= target


@pytest.mark.thorough
def test_a_teacher_with_learned_bits_is_not_shown_or_changed(data):
    def net(name, bits):
        dense = klb.LearnedBitDense(2, bits=bits, name=name)
        return klb.LearnedBitSequential([keras.Input((6,)), dense])

    teacher, student = net("teacher", 4), net("student", 3)
    distillation = keras.distillation.LogitsDistillation(
        2.0, loss=keras.losses.KLDivergence(reduction=None)
    )
    model = klb.LearnedBitDistiller(teacher, student, distillation)
    model.compile("sgd", "mse", bit_reg=0.0)
    logger = klb.BitLogger()
    guard = klb.CollapseGuard("raise_bits", max_error=-1.0)
    with pytest.warns(UserWarning, match="student"):
        model.fit(*data, callbacks=[logger, guard], verbose=0)
    assert logger.names == ["student"]
    assert float(teacher.layers[0].bits) == 4
    assert float(student.layers[0].bits) > 3
    assert str(klb.bit_table(model)) == str(klb.bit_table(student))

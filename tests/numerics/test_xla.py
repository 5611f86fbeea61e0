import keras
import numpy as np
import pytest
import tensorflow as tf
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.numerics.xla import compiled_updates

optimizers = keras.optimizers
MAKERS = [
    lambda: optimizers.Adam(0.1, amsgrad=True, clipnorm=1.0),
    lambda: optimizers.SGD(0.1, momentum=0.9, nesterov=True, use_ema=True),
]
MORE_MAKERS = [
    lambda: optimizers.Adadelta(0.1),
    lambda: optimizers.Adafactor(0.1),
    lambda: optimizers.Adagrad(0.1),
    lambda: optimizers.Adamax(0.1),
    lambda: optimizers.AdamW(optimizers.schedules.CosineDecay(0.1, 5), weight_decay=0.1),
    lambda: optimizers.Ftrl(0.1),
    lambda: optimizers.Lamb(0.1),
    lambda: optimizers.Lion(0.1),
    lambda: optimizers.Muon(0.1),
    lambda: optimizers.Nadam(0.1),
    lambda: optimizers.RMSprop(0.1, centered=True, momentum=0.9),
]


class Custom(keras.optimizers.SGD):
    """An optimizer that is not one of Keras's."""


@pytest.fixture
def gradients():
    rng = np.random.default_rng(0)
    return tf.constant(rng.normal(size=(4, 512, 600)), tf.float32)


def applied(optimizer, gradients, small=5):
    """A large and a small variable after some updates, and whether XLA compiled any of them."""
    large = keras.Variable(np.ones(gradients.shape[1:], "float32"))
    variables = [large, keras.Variable(np.ones(small, "float32"))]
    optimizer.build(variables)

    @tf.function
    def step(gradient):
        with compiled_updates(optimizer):
            optimizer.apply([gradient, gradient[0, :small]], variables)

    for gradient in gradients:
        step(gradient)
    operations = step.get_concrete_function(gradients[0]).graph.get_operations()
    compiled = sum("_XlaMustCompile" in op.node_def.attr for op in operations)
    return [v.numpy() for v in variables], compiled


@pytest.mark.parametrize(
    "make", [*MAKERS, *thorough(*MORE_MAKERS)], ids=lambda make: type(make()).__name__
)
def test_compiled_updates_are_those_of_keras_and_compile_the_large_variable_alone(make, gradients):
    (large, small), compiled = applied(make(), gradients)
    assert compiled == 1
    # As Keras does it, operation by operation.
    expected = [keras.Variable(np.ones(shape, "float32")) for shape in (large.shape, 5)]
    optimizer = make()
    for gradient in gradients:
        optimizer.apply([gradient, gradient[0, :5]], expected)
    np.testing.assert_allclose(large, expected[0].numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(small, expected[1].numpy(), rtol=1e-5, atol=1e-6)


def test_an_optimizer_is_afterwards_as_it_was_also_after_an_error(gradients):
    optimizer = keras.optimizers.SGD(0.1)
    applied(optimizer, gradients)
    assert "update_step" not in vars(optimizer)

    @tf.function
    def failing():
        with compiled_updates(optimizer):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert "update_step" not in vars(optimizer)


def test_the_learning_rate_meets_weights_of_few_bits():
    """Muon multiplies the learning rate with tensors of the weights' dtype without a cast."""
    variable = keras.Variable(np.zeros((512, 600)), dtype="bfloat16")
    optimizer = keras.optimizers.Muon(0.1)
    optimizer.build([variable])

    @tf.function
    def step():
        with compiled_updates(optimizer):
            optimizer.apply([tf.ones(variable.shape, tf.bfloat16)], [variable])

    step()
    assert float(keras.ops.max(keras.ops.abs(variable))) > 0


def test_a_model_compiles_the_update_of_its_large_kernel():
    layer = klb.LearnedBitDense(600, use_bias=False)
    model = klb.LearnedBitSequential([keras.Input((512,)), layer])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)

    @tf.function
    def step():
        gradients = [tf.ones(v.shape) for v in model.trainable_variables]
        model.optimizer.apply(gradients, model.trainable_variables)

    operations = step.get_concrete_function().graph.get_operations()
    assert sum("_XlaMustCompile" in op.node_def.attr for op in operations) == 1


def test_optimizers_of_others_are_left_alone(gradients):
    _, compiled = applied(Custom(0.1), gradients)
    assert compiled == 0


def test_gradients_with_few_rows_are_left_alone():
    table = keras.Variable(np.ones((600, 600), "float32"))
    optimizer = keras.optimizers.SGD(0.5)
    optimizer.build([table])

    @tf.function
    def step():
        rows = tf.IndexedSlices(tf.ones((1, 600)), tf.constant([7]), tf.constant([600, 600]))
        with compiled_updates(optimizer):
            optimizer.apply([rows], [table])

    step()
    expected = np.ones((600, 600))
    expected[7] = 0.5
    np.testing.assert_array_equal(table, expected)


def test_steps_that_run_eagerly_compile_nothing():
    optimizer, variable = keras.optimizers.SGD(0.5), keras.Variable(np.ones((600, 600), "float32"))
    with compiled_updates(optimizer):
        assert "update_step" not in vars(optimizer)
        optimizer.apply([tf.ones((600, 600))], [variable])
    np.testing.assert_array_equal(variable, np.full((600, 600), 0.5))

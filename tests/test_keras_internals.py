"""What `keras_learnbits/_keras.py` relies on; each test has the name of its function."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_learnbits as klb
from keras_learnbits import _keras


def graph():
    inputs = keras.Input((3,))
    return inputs, keras.layers.Dense(2)(inputs)


def test_functional_model_is_the_class_that_keras_makes_of_inputs_and_outputs():
    assert type(keras.Model(*graph())) is _keras.FunctionalModel


def test_is_functional_call_decides_as_keras_does():
    inputs, outputs = graph()
    for args, kwargs in (
        ((), {}),
        ((), {"name": "a"}),
        ((inputs, outputs), {}),
        ((inputs,), {"outputs": outputs}),
        ((), {"inputs": inputs, "outputs": outputs}),
    ):
        made = isinstance(keras.Model(*args, **kwargs), _keras.FunctionalModel)
        assert _keras.is_functional_call(args, kwargs) == made


def test_replace_base_leaves_keras_nothing_to_rewrite():
    class Mine(klb.LearnedBitModel):
        def __init__(self, inputs, outputs):
            super().__init__(inputs=inputs, outputs=outputs)

    inputs = keras.Input((3,))
    bases = klb.LearnedBitModel.__bases__
    model = Mine(inputs, klb.LearnedBitDense(2)(inputs))
    assert model(np.ones((4, 3))).shape == (4, 2)
    assert isinstance(model, _keras.FunctionalModel)
    assert klb.LearnedBitModel.__bases__ == bases

    class WithCall(klb.LearnedBitModel):
        def call(self, inputs):
            return inputs + 1

    assert WithCall()(tf.ones(2)).numpy().tolist() == [2, 2]


def test_save_variables_stores_the_float_kernel_where_keras_stores_the_property():
    class Doubled(keras.layers.Dense):
        @property
        def kernel(self):
            return 2 * keras.layers.Dense.kernel.fget(self)

        save = _keras.save_variables

    layer = Doubled(2, use_bias=False)
    layer.build((None, 3))
    ours, theirs = {}, {}
    layer.save(ours)
    layer.save_own_variables(theirs)
    np.testing.assert_array_equal(2 * ours["0"].numpy(), theirs["0"])


def test_load_variables_reads_what_save_variables_wrote():
    one, other = keras.layers.Dense(2), keras.layers.Dense(2)
    store = {}
    for layer in (one, other):
        layer.build((None, 3))
    _keras.save_variables(one, store)
    _keras.load_variables(other, store)
    np.testing.assert_array_equal(other.kernel, one.kernel)


def test_call_after_assign_sees_assignments_and_not_the_updates_of_optimizers():
    variable, calls = keras.Variable([1.0, 2.0]), []
    _keras.call_after_assign(variable, lambda: calls.append(variable.numpy().tolist()))
    keras.optimizers.SGD(1.0).apply([tf.ones(2)], [variable])
    assert calls == []
    assert variable.numpy().tolist() == [0, 1]
    variable.assign([3.0, 4.0])
    assert calls == [[3, 4]]


def test_mark_is_found_among_the_variables_of_a_model_however_deep():
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    outer = keras.Sequential([keras.Input((3,)), inner])
    mark = object()
    _keras.mark(inner.layers[0].bias, mark)
    assert [_keras.marked(variable) for variable in outer.variables] == [None, mark]


def test_replaced_values_are_read_while_other_variables_are_assigned():
    replaced, other, outer = (keras.Variable(float(value)) for value in range(3))

    def refuse(variable):
        raise ValueError(variable.path)

    scope = _keras.ReplacedValues([(replaced, tf.constant(10.0))], refuse)
    with keras.StatelessScope([(outer, tf.constant(20.0))]) as stateless:
        with scope:
            assert [float(v.value) for v in (replaced, other, outer)] == [10, 1, 20]
            other.assign(11.0)
            assert float(other.value) == 11
            with pytest.raises(ValueError, match=replaced.path):
                replaced.assign(0.0)
        assert float(replaced.value) == 0
        assert float(stateless.get_current_value(other)) == 11
    assert float(other.value) == 1
    with scope:
        other.assign(11.0)
    assert float(other.value) == 11


def test_set_hidden_is_there_when_keras_reads_the_signature_of_call():
    class Late(keras.layers.Layer):
        def __init__(self, function):
            _keras.set_hidden(self, "function", function)
            super().__init__()

        @property
        def call(self):
            return self.function

    layer = Late(lambda inputs, training=False: inputs + float(training))
    model = keras.Sequential([keras.Input(()), layer])
    assert model(tf.ones(2), training=True).numpy().tolist() == [2, 2]
    assert model(tf.ones(2), training=False).numpy().tolist() == [1, 1]


def test_updating_with_replaces_the_update_of_each_variable_within_the_scope():
    variable, optimizer, seen = keras.Variable(1.0), keras.optimizers.SGD(1.0), []

    def update(update_step, gradient, variable, learning_rate):
        seen.append(float(gradient))
        update_step(2 * gradient, variable, learning_rate)

    with _keras.updating_with(optimizer, update):
        optimizer.apply([tf.constant(1.0)], [variable])
    optimizer.apply([tf.constant(1.0)], [variable])
    assert seen == [1]
    assert float(variable) == -2


def test_variable_index_finds_the_state_of_the_variable_that_update_step_receives():
    found = []

    class Recording(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            found.append(_keras.variable_index(self, variable))

    variables = [keras.Variable(1.0), keras.Variable(2.0)]
    Recording().apply([tf.constant(0.0)] * 2, variables)
    assert found == [0, 1]


def test_with_metrics_built_first_makes_the_variables_before_the_first_step(make_model, data):
    model = make_model()
    model.compile("adam", "mse", metrics=["mae"])
    before = len(model.metrics_variables)
    made = []
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(8)
    function = _keras.with_metrics_built_first(
        model, lambda iterator: made.append(len(model.metrics_variables))
    )
    function(iter(dataset))
    assert made[0] > before

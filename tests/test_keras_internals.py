"""The assumptions of `keras_learnbits/_keras.py`; each test has the name of its function."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_learnbits as klb
from keras_learnbits import _keras
from keras_learnbits.layers.traversal import layers_inside


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


class WithCall(keras.Model):
    """A model with a custom `call`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(2)

    def call(self, inputs):
        return self.dense(inputs)


def test_is_graph_tells_models_that_run_their_graph_from_those_with_a_call():
    class Doubled(keras.Sequential):
        def call(self, inputs, **kwargs):
            return 2 * super().call(inputs, **kwargs)

    class Tripled(keras.Model):
        def call(self, inputs, **kwargs):
            return 3 * super().call(inputs, **kwargs)

    assert _keras.is_graph(keras.Model(*graph()))
    assert _keras.is_graph(keras.Sequential([keras.layers.Dense(2)]))
    assert _keras.is_graph(klb.LearnedBitSequential([klb.LearnedBitDense(2)]))
    for custom in (WithCall(), Doubled([keras.layers.Dense(2)]), Tripled(*graph())):
        assert not _keras.is_graph(custom)


def test_clone_hands_operations_over_and_does_not_compile():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.ops.relu(keras.layers.Dense(2)(inputs)))
    model.compile("adam", "mse")
    copied, called = [], []

    def copy(operation):
        copied.append(type(operation).__name__)
        return operation

    def call(operation, *args, **kwargs):
        called.append(type(operation).__name__)
        return operation(*args, **kwargs)

    assert not _keras.clone(model, clone_function=copy, call_function=call).compiled
    # Without the detour through a bare model it would be compiled.
    assert keras.models.clone_model(model, clone_function=lambda each: each).compiled
    assert copied == called == ["Dense", "Relu"]


def test_calls_of_a_graph_are_in_order_with_their_tensors():
    inputs = keras.Input((3,), name="x")
    dense, add = keras.layers.Dense(3), keras.layers.Add()
    hidden = dense(inputs)
    outputs = add([dense(hidden), inputs])
    keras.layers.ReLU()(outputs)  # not part of the model
    found = _keras.calls(keras.Model(inputs, outputs))
    assert [call.operation for call in found] == [dense, dense, add]
    assert found[0].inputs == [inputs]
    assert found[0].outputs == found[1].inputs == [hidden]
    assert found[2].inputs == [*found[1].outputs, inputs]
    assert found[2].outputs == [outputs]
    sequential = keras.Sequential([inputs, dense, keras.layers.ReLU()])
    assert [call.operation for call in _keras.calls(sequential)] == sequential.layers


def test_symbolic_inputs_of_each_kind_of_model():
    given = {name: keras.Input((3,), name=name) for name in "ab"}
    functional = keras.Model(given, given["a"] + given["b"])
    assert _keras.symbolic_inputs(functional).keys() == {"a", "b"}
    assert _keras.symbolic_inputs(WithCall()) is None
    sequential = keras.Sequential([keras.layers.Dense(2)])
    assert _keras.symbolic_inputs(sequential) is None
    sequential.build((None, 3))
    with pytest.raises(AttributeError):
        sequential.input  # noqa: B018
    assert _keras.symbolic_inputs(sequential).shape == (None, 3)
    sequential(np.ones((4, 3)))
    assert _keras.symbolic_inputs(sequential).shape == (None, 3)


def test_inputs_built_for_are_those_of_a_single_argument():
    class OfTwo(keras.Model):
        def build(self, one_shape, other_shape):
            pass

        def call(self, one, other):
            return one + other

    class OfDictionary(keras.Model):
        def call(self, inputs):
            return inputs["a"] + inputs["b"]

    models = WithCall(), OfTwo(), OfDictionary()
    assert _keras.inputs_built_for(models[0]) is None
    for model, args in zip(models, ([1], [1, 1], [{"a": 1, "b": 1}]), strict=True):
        model(*keras.tree.map_structure(lambda _: np.ones((4, 3)), args))
    shapes = [
        keras.tree.map_structure(lambda each: each.shape, _keras.inputs_built_for(model))
        for model in (models[0], models[2])
    ]
    assert shapes == [(4, 3), {"a": (4, 3), "b": (4, 3)}]
    assert _keras.inputs_built_for(models[1]) is None


def test_is_hidden_graph_finds_the_model_inside_of_a_sequential_one():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    _, *inside = layers_inside(model)
    hidden = [each for each in inside if _keras.is_hidden_graph(each, model)]
    assert _keras.FunctionalModel in map(type, hidden)
    assert model.layers[0] not in hidden


def test_set_dtype_policy_changes_how_a_built_layer_computes():
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    _keras.set_dtype_policy(layer, "mixed_float16")
    assert layer.kernel.dtype == "float32"
    assert layer(np.ones((4, 3))).dtype == tf.float16


def test_is_mixed_is_true_of_policies_that_compute_in_another_dtype():
    for policy in ("mixed_float16", "mixed_bfloat16", "float32", "float16", "bfloat16"):
        layer = keras.layers.Dense(2, dtype=policy)
        assert _keras.is_mixed(layer) == (layer.compute_dtype != layer.variable_dtype)


def test_own_state_leaves_the_layers_inside_out():
    layer = keras.layers.Bidirectional(keras.layers.LSTM(2))
    layer.build((None, 4, 3))
    assert _keras.own_state(layer) == {}
    dense = keras.layers.Dense(2)
    dense.build((None, 3))
    assert [tuple(value.shape) for value in _keras.own_state(dense).values()] == [(3, 2), (2,)]


def test_has_assets_is_true_of_layers_with_a_vocabulary():
    assert _keras.has_assets(keras.layers.StringLookup(vocabulary=["a"]))
    assert not _keras.has_assets(keras.layers.Dense(2))


def test_copy_own_state_copies_weights_and_vocabularies():
    for source, target in (
        [keras.layers.Normalization() for _ in range(2)],
        [keras.layers.StringLookup() for _ in range(2)],
    ):
        source.adapt(np.array(["b", "a"]) if _keras.has_assets(source) else np.ones((4, 3)))
        if isinstance(target, keras.layers.Normalization):
            target.build((None, 3))
        _keras.copy_own_state(source, target)
        for one, other in zip(source.weights, target.weights, strict=True):
            np.testing.assert_array_equal(one, other)
        if _keras.has_assets(source):
            assert target.get_vocabulary() == source.get_vocabulary()


def test_is_unnamed_weight_recognizes_the_names_that_keras_makes_up():
    layer = keras.layers.Layer()
    for _ in range(2):
        assert _keras.is_unnamed_weight(layer.add_weight(()).name)
    assert not _keras.is_unnamed_weight(layer.add_weight((), name="bias").name)


def test_is_unnamed_input_recognizes_the_names_that_keras_makes_up():
    for _ in range(2):
        assert _keras.is_unnamed_input(keras.Input((3,)).name)
    assert not _keras.is_unnamed_input(keras.Input((3,), name="image").name)


def test_split_layer_name_separates_the_number_that_keras_adds():
    names = [keras.layers.LayerNormalization().name for _ in range(2)]
    stems, numbers = zip(*map(_keras.split_layer_name, names), strict=True)
    assert set(stems) == {"layer_normalization"}
    assert int(numbers[1]) == int(numbers[0] or 0) + 1


def test_reserve_names_makes_keras_count_beyond_the_names():
    stem = "reserved_for_this_test"
    _keras.reserve_names([stem, f"{stem}_7", "left_to_this_test_9"], {stem})
    assert keras.backend.get_uid(stem) > 8
    assert keras.backend.get_uid("left_to_this_test") == 1


def test_layers_of_scope_has_the_layer_that_made_an_operation():
    layer = keras.layers.Dense(2, name="head")
    traced = tf.function(lambda x: layer(x)).get_concrete_function(tf.TensorSpec((None, 3)))
    (scope,) = {
        op.name.split("/")[0] for op in traced.graph.get_operations() if op.type == "MatMul"
    }
    assert scope != "head"
    assert "head" in _keras.layers_of_scope(scope)


def test_scope_name_is_one_that_can_be_trained():
    def trained(name):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)], name=name)
        model.compile("sgd", "mse")
        return model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)

    with pytest.raises(ValueError, match="not a valid root scope name"):
        trained("__private")
    assert trained(_keras.scope_name("__private"))
    assert _keras.scope_name("__") is None


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

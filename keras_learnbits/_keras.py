"""Every reliance on undocumented behaviour of Keras 3.15 or TensorFlow 2.21, one function each.

Each names the file of Keras that it relies on, the mechanism, and what breaks if Keras changes.
`tests/test_keras_internals.py` has one test for each, of the same name.
"""

import contextlib
import functools
import re
import tempfile
from typing import NamedTuple

import keras
import tensorflow as tf

# keras/src/models/functional.py: the class of `keras.Model(inputs, outputs)` has no public name.
# It is found among the subclasses of `keras.Model`. Making a model to take its class would change
# the numbers in automatic names of layers. Without it, `LearnedBitModel(inputs, outputs)` fails.
FunctionalModel = next(cls for cls in keras.Model.__subclasses__() if cls.__name__ == "Functional")


def is_functional_call(args, kwargs):
    """Whether the arguments of a model class are inputs and outputs.

    keras/src/models/model.py, `functional_init_arguments`: their number and names decide whether
    `keras.Model(...)` makes a functional model.
    """
    return len(args) + ("inputs" in kwargs) + ("outputs" in kwargs) >= 2


def replace_base(cls, base, functional):
    """Makes a user's class functional, permanently, if it is called with inputs and outputs.

    keras/src/models/model.py, `inject_functional_model_class`: Keras rewrites the `__bases__` of
    the class and of all its ancestors, including `LearnedBitModel`. After that, models with a
    custom `call` would no longer work. So the bases of the user's classes are rewritten first, and
    Keras finds nothing left to rewrite.

    An alternative was a subclass made at run time and assigned to `self.__class__`. Its registered
    name differs from that of the user's class, so saved models could not be loaded.

    Args:
        cls: The user's class.
        base: Its ancestor that is to be replaced.
        functional: The functional class that replaces it.
    """
    for each in cls.__bases__:
        if each is not base and issubclass(each, base):
            replace_base(each, base, functional)
    cls.__bases__ = tuple(functional if each is base else each for each in cls.__bases__)


def is_graph(layer):
    """Whether a layer is a Sequential or functional model without a custom `call`.

    keras/src/models/sequential.py and functional.py: their `call` runs the graph of layers. A
    subclass that has another `call` may do something else with its layers, so it cannot be copied
    layer by layer. If Keras wraps `call` in the classes, all models count as custom ones, and
    `to_learned_bits` puts them into a `LearnedBitWrapper`.
    """
    return any(
        isinstance(layer, kind) and type(layer).call is kind.call
        for kind in (keras.Sequential, FunctionalModel)
    )


def clone(model, inputs=None, *, clone_function, call_function=None):
    """Copies the graph of a functional model; functions copy and call its operations.

    keras/src/models/cloning.py, `_clone_functional_model`: despite its name, `clone_function` gets
    the operations of `keras.ops` in the graph, too. Keras compiles the clone of a compiled model,
    so a model of the same graph that is not compiled is cloned instead. It is also of no custom
    class: Keras would make the clone of the model's class.

    Args:
        model: Functional model.
        inputs: Structure of symbolic inputs of the clone, as `model.input`.
        clone_function: Function from a layer or operation to the one that replaces it.
        call_function: Function of the new layer or operation and of its arguments.
    """
    bare = keras.Model(model.input, model.output, name=model.name)
    return keras.models.clone_model(bare, inputs, clone_function, call_function=call_function)


class Call(NamedTuple):
    """One call of a layer or operation in a graph.

    Attributes:
        operation: `keras.layers.Layer` or operation of `keras.ops`.
        inputs: List of the `keras.KerasTensor`s that it is called with.
        outputs: List of those that it returns.
    """

    operation: object
    inputs: list
    outputs: list


def calls(graph):
    """The calls in a Sequential or functional model, each after those that make its inputs.

    keras/src/ops/function.py: a graph keeps its calls as nodes, by their distance from the outputs;
    keras/src/ops/node.py: a node has the operation, its arguments, and its outputs. A model that is
    made of a graph's inputs and outputs has the nodes of just this graph. If Keras changes this,
    `fold_batch_norm`, `export_hls4ml` and the operations in `bit_table` fail.
    """
    # A name is given, because Keras numbers models without one.
    by_depth = keras.Model(graph.inputs, graph.outputs, name=graph.name)._nodes_by_depth
    return [
        Call(node.operation, list(node.arguments.keras_tensors), list(node.outputs))
        for depth in sorted(by_depth, reverse=True)
        for node in by_depth[depth]
        if not node.is_input
    ]


def symbolic_inputs(model):
    """Structure of the `keras.KerasTensor`s that a model's graph begins with; None without graph.

    keras/src/models/sequential.py: a Sequential has one input. Before it has a graph, `inputs`
    raises an AttributeError; `input` does so until the model is called on a symbolic tensor
    (keras/src/ops/operation.py). `Functional.input` (keras/src/models/functional.py) has the
    structure of the model's argument, which the list `inputs` has not. A subclassed model has
    neither. If Keras changes this, models cannot be copied or exported.
    """
    inputs = getattr(model, "inputs", None)
    if not inputs:
        return None
    return inputs[0] if isinstance(model, keras.Sequential) else model.input


def inputs_built_for(model):
    """Structure of float32 `keras.KerasTensor`s of the shapes a model was built for, or None.

    keras/src/layers/layer.py, `get_build_config`: Keras notes the shapes that `build` gets, but no
    dtypes: under `"input_shape"` that of the only argument, or of the first one if the class has no
    `build`, and under `"shapes_dict"` those of several. If Keras changes this, a model with a
    custom `call` needs an `input_signature` for exports, and is converted without comparing
    predictions.
    """
    shapes = (model.get_build_config() or {}).get("input_shape")
    if shapes is None:
        return None
    return keras.tree.map_shape_structure(lambda shape: keras.KerasTensor(shape, "float32"), shapes)


def is_hidden_graph(layer, holder):
    """Whether a layer is the functional model that Keras keeps inside a Sequential one.

    keras/src/models/sequential.py, `_functional`: the attribute is tracked as a layer, and not
    listed in `layers`. If Keras tracks more, those layers appear in the names of weights.
    """
    return isinstance(holder, keras.Sequential) and layer not in holder.layers


def set_dtype_policy(layer, policy):
    """Sets the dtype policy of a layer after it was made.

    keras/src/layers/layer.py: the setter of `dtype_policy` changes neither weights nor the layers
    inside. It is the only way for models, and for classes whose `__init__` takes no `dtype`.

    Args:
        layer: `keras.layers.Layer`.
        policy: Name, configuration or instance of a `keras.DTypePolicy` with float weights.
    """
    layer.dtype_policy = keras.dtype_policies.get(policy)


def is_mixed(layer):
    """Whether a layer has float32 weights and computes in a smaller dtype.

    keras/src/dtype_policies/dtype_policy.py, `_parse_name`: these policies are `"mixed_float16"`
    and `"mixed_bfloat16"`. If Keras names them differently, exports compute in their precision.
    """
    return layer.dtype_policy.name.startswith("mixed_")


def own_state(layer):
    """What Keras saves of a layer without the layers inside: dictionary of key to value.

    keras/src/saving/saving_lib.py, `_save_state`: Keras passes a dictionary of a file; a plain one
    also works. If Keras stops calling `save_own_variables`, copies have other weights, which
    `to_learned_bits` finds by comparing predictions.
    """
    store = {}
    layer.save_own_variables(store)
    return store


def has_assets(layer):
    """Whether a layer saves state in separate files, such as a vocabulary.

    keras/src/saving/saving_lib.py, `_save_state`: Keras asks whether the method exists.
    """
    return hasattr(layer, "save_assets")


def copy_own_state(source, target):
    """Copies what `own_state` returns, and files such as vocabularies.

    Args:
        source: `keras.layers.Layer`.
        target: Layer of the same class and configuration.
    """
    target.load_own_variables(own_state(source))
    if has_assets(source):
        with tempfile.TemporaryDirectory() as directory:
            source.save_assets(directory)
            target.load_assets(directory)


def is_unnamed_weight(name):
    """Whether Keras made up the name of a weight: `variable`, `variable_1`, ...

    keras/src/backend/common/variables.py and keras/src/utils/naming.py, `auto_name`: the number
    counts through the whole process. If Keras changes it, names of such weights in files depend on
    what else the process has created.
    """
    return re.fullmatch(r"variable(_\d+)?", name) is not None


def is_unnamed_input(name):
    """Whether Keras made up the name of an `Input`: `keras_tensor`, `keras_tensor_1`, ...

    keras/src/backend/common/keras_tensor.py and keras/src/utils/naming.py, `auto_name`. If Keras
    changes it, inputs and outputs of exported files have such names.
    """
    return re.fullmatch(r"keras_tensor(_\d+)?", name) is not None


def split_layer_name(name):
    """A layer's name without the number at its end, and that number as a string, or None.

    keras/src/utils/naming.py, `uniquify`: the second `Dense` without a name in a process is
    `dense_1`, the third `dense_2`. If Keras changes it, a packed file can no longer be loaded into
    a model whose layers have numbers other than those in the file.

    Examples:
        >>> split_layer_name("dense_1"), split_layer_name("dense")
        (('dense', '1'), ('dense', None))
    """
    return re.fullmatch(r"(.*?)(?:_(\d+))?", name).groups()


def reserve_names(names, stems):
    """Makes Keras give new operations names other than these.

    keras/src/utils/naming.py: `keras.backend.get_uid` counts up the number of the next automatic
    name. A layer that was loaded from a file as `add` is not counted, so the next operation
    `keras.ops.add` would have the same name, which Keras refuses in one graph. If Keras changes it,
    such models with quantized activations cannot be exported in a new process.

    Args:
        names: Names that are taken.
        stems: Names without a number of the operations that will be made.
    """
    for stem, number in map(split_layer_name, names):
        while stem in stems and keras.backend.get_uid(stem) <= int(number or 0):
            pass


def layers_of_scope(scope):
    """Possible names of the layer whose operations are in a scope of TensorFlow's graph.

    keras/src/layers/layer.py, `Layer.__call__`: Keras opens a scope of the layer's name twice, to
    build and to call. `tf.name_scope` makes names unique, so the second scope of `dense` is
    `dense_1`. If Keras changes it, errors of exporters name operations in place of layers.

    Examples:
        >>> layers_of_scope("dense_1")
        ['dense', 'dense_1']
    """
    return [re.sub(r"_\d+$", "", scope), scope]


def scope_name(name):
    """A name with which a model can be trained, or None for Keras to make one up.

    TensorFlow, `Graph.name_scope` in python/framework/ops.py, refuses a name with a leading `_` for
    an outermost scope. In training a model opens the outermost one
    (keras/src/layers/layer.py, `_open_name_scope`).
    """
    return name.lstrip("_") or None


# keras/src/layers/core/dense.py, embedding.py, convolutional/base_conv.py: these layers save the
# property `kernel`, which is the quantized weight here. The method of `keras.layers.Layer`,
# keras/src/layers/layer.py, saves the variables themselves, in the order of `_trainable_variables`
# and `_non_trainable_variables`. Without it, files would hold quantized weights, not float ones.
save_variables = keras.layers.Layer.save_own_variables
load_variables = keras.layers.Layer.load_own_variables


def call_after_assign(variable, function):
    """Calls a function after each `variable.assign(value)`.

    keras/src/backend/common/variables.py: Keras has no hook for assignments, so the method is
    replaced on this one instance. Optimizers of the TensorFlow backend assign to `variable.value`
    (keras/src/backend/tensorflow/optimizer.py, `assign_add` and others) and are not affected.

    Args:
        variable: `keras.Variable`.
        function: Function without arguments.
    """
    assign = variable.assign

    def assign_and_call(value):
        result = assign(value)
        function()
        return result

    variable.assign = assign_and_call


def mark(variable, mark):
    """Attaches an object to a variable, for `marked`.

    keras/src/backend/common/variables.py: instances of `keras.Variable` accept attributes. A model
    lists the variables of all layers inside, so marks are found without searching through layers. A
    dictionary by `id` would keep variables alive, or miss those of copies.
    """
    variable.learned_bits_mark = mark


def marked(variable):
    """The object that `mark` attached to a variable, or None."""
    return getattr(variable, "learned_bits_mark", None)


class ReplacedValues(keras.StatelessScope):
    """A scope in which some variables have other values; all others work as usual.

    keras/src/backend/common/stateless_scope.py: within a `keras.StatelessScope` variables read
    their value from `get_current_value`, and assignments call `add_update`. Scopes nest by
    `original_scope`. For an assignment the scope is left temporarily. If Keras changes this, the
    statistics of layers in a `LearnedBitWrapper` are no longer updated.

    Args:
        values: List of pairs of a variable and its value.
        refuse: Function that raises an error; it is called with a variable of `values` that is
            assigned.
    """

    def __init__(self, values, refuse):
        super().__init__(values, collect_losses=True, initialize_variables=False)
        self._replaced = {id(variable) for variable, _ in values}
        self._refuse = refuse

    def get_current_value(self, variable):
        value = super().get_current_value(variable)
        if value is None and self.original_scope is not None:
            return self.original_scope.get_current_value(variable)
        return value

    def add_update(self, update):
        variable, value = update
        if id(variable) in self._replaced:
            self._refuse(variable)
        self.__exit__()
        try:
            variable.assign(value)  # statistics, seeds, states
        finally:
            self.__enter__()


def set_hidden(layer, name, value):
    """Sets an attribute of a layer before `Layer.__init__` has run.

    keras/src/layers/layer.py: `Layer.__init__` reads the signature of `self.call`, and
    `Layer.__setattr__` tracks layers with a tracker that `__init__` makes. So a layer whose `call`
    depends on an attribute must put that into the instance's dictionary.
    """
    layer.__dict__[name] = value


@contextlib.contextmanager
def updating_with(optimizer, update):
    """A scope in which a function replaces an optimizer's update of each variable.

    keras/src/optimizers/base_optimizer.py, `_backend_update_step`: Keras calls
    `self.update_step(gradient, variable, learning_rate)` for each variable, and an attribute of the
    instance takes precedence over the method. A subclass would have another name in files.

    Args:
        optimizer: `keras.optimizers.Optimizer`.
        update: Function of the original `update_step` and its three arguments.
    """
    optimizer.update_step = functools.partial(update, optimizer.update_step)
    try:
        yield
    finally:
        del optimizer.update_step


def variable_index(optimizer, variable):
    """The index of a variable among those that an optimizer was built with.

    keras/src/optimizers/base_optimizer.py, `_get_variable_index`: Keras's optimizers use it to find
    the state of a variable. `update_step` may receive the `tf.Variable` of a `keras.Variable`
    (keras/src/backend/tensorflow/optimizer.py), so the variable's `id` cannot be used.
    """
    return optimizer._get_variable_index(variable)


def with_metrics_built_first(model, train_function):
    """A training function whose first call creates the variables of the compiled metrics.

    keras/src/trainers/compile_utils.py: Keras creates them when metrics are first called, in the
    first training step, which TensorFlow then traces twice because it created variables. Here
    `compute_metrics` is traced separately first. docs/speed.md, "The first step", has the time that
    this saves. If Keras changes this, the first step takes longer, and nothing else changes.

    Args:
        model: Model in training, whose layers are built.
        train_function: Function of an iterator over batches. After the first call the model uses it
            directly.
    """

    def first(iterator):
        model.train_function = train_function
        # `train_on_batch` has no such iterator. Under a strategy Keras makes the metrics first.
        if hasattr(iterator, "element_spec") and not _has_strategy(model):
            _build_metrics(model, iterator.element_spec)
        return train_function(iterator)

    return first


def _has_strategy(model):
    default = tf.distribute.get_strategy()
    return tf.distribute.has_strategy() or model.distribute_strategy is not default


def _build_metrics(model, spec):
    """Traces the metrics for data of a `tf.TypeSpec`, without running them."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(spec)
    if y is None or not all(isinstance(each, tf.TensorSpec) for each in tf.nest.flatten(spec)):
        return
    outputs = getattr(model.bit_learner(), "outputs", None) or []
    if len(outputs) != 1:  # the structure of several outputs is not known here
        return
    y_pred = tf.TensorSpec(outputs[0].shape, outputs[0].dtype)
    metrics = tf.function(lambda *data: model.compute_metrics(*data), autograph=False)
    metrics.get_concrete_function(x, y, y_pred, sample_weight)

"""`LearnedBitModel`, `LearnedBitSequential`: Keras models that learn their bits."""

import keras

from keras_learnbits._keras import FunctionalModel, clone, is_functional_call, replace_base
from keras_learnbits.serialization import register
from keras_learnbits.training.fitting import LearnedBitTraining


@register
class LearnedBitModel(LearnedBitTraining, keras.Model):
    """`keras.Model` whose `fit` learns weights and bit-widths together.

    Use it like `keras.Model`: with inputs and outputs, or as the base class of a model with a
    custom `call`. `LearnedBitSequential` is the same for a stack of layers.

    Examples:
        >>> inputs = keras.Input((8,))
        >>> outputs = keras_learnbits.LearnedBitDense(1)(inputs)
        >>> model = LearnedBitModel(inputs, outputs)
        >>> model.compile("adam", "mse", bit_reg=0.1)
        >>> history = model.fit(np.ones((32, 8)), np.ones((32, 1)), verbose=0)
        >>> sorted(history.history)
        ['bit_reg', 'loss', 'mean_bits', 'quantization_error', 'task_loss']
    """

    def __new__(cls, *args, **kwargs):
        # As in keras/src/models/model.py, `Model.__new__`: inputs and outputs make another class.
        if cls is LearnedBitModel and is_functional_call(args, kwargs):
            cls = LearnedBitFunctional
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        if is_functional_call(args, kwargs) and not isinstance(self, LearnedBitFunctional):
            replace_base(type(self), LearnedBitModel, LearnedBitFunctional)
        super().__init__(*args, **kwargs)
        self._add_bit_metrics()


@register
class LearnedBitFunctional(LearnedBitModel, FunctionalModel):
    """The class of `LearnedBitModel(inputs, outputs)`.

    Its graph may share a layer with a model inside it, e.g. a tied embedding. From a configuration
    Keras makes two layers of it, and then cannot load the weights. Here the configuration lists
    shared layers, so that each becomes one layer again.
    """

    def __init__(self, inputs, outputs, name=None, **kwargs):
        super().__init__(inputs, outputs, name=name, **kwargs)

    def get_config(self):
        config = super().get_config()
        shared = [paths for paths in _paths_of_layers(self).values() if len(paths) > 1]
        return {**config, "shared_layers": shared} if shared else config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        shared = config.pop("shared_layers", ())
        model = super().from_config(config, custom_objects)
        if not shared:
            return model
        by_path = {
            path: layer for layer, paths in _paths_of_layers(model).items() for path in paths
        }
        first = {by_path[path]: by_path[paths[0]] for paths in shared for path in paths[1:]}
        tied = _with_layers(model, first)
        return cls(tied.input, tied.output, name=model.name, trainable=model.trainable)


def _paths_of_layers(model, prefix=""):
    """Dictionary of each layer in the graph of a model, and in graphs inside it, to its paths."""
    paths = {}
    for layer in model.layers:
        path = prefix + layer.name
        paths.setdefault(layer, []).append(path)
        if isinstance(layer, FunctionalModel | keras.Sequential):
            for each, more in _paths_of_layers(layer, f"{path}/").items():
                paths.setdefault(each, []).extend(more)
    return paths


def _with_layers(model, others):
    """A functional model of the same layers, some of which are replaced.

    Args:
        model: Functional model.
        others: Dictionary of layer to the layer that replaces it.
    """

    def replaced(layer):
        is_graph = isinstance(layer, FunctionalModel)
        return _with_layers(layer, others) if is_graph else others.get(layer, layer)

    return clone(model, clone_function=replaced)


@register
class LearnedBitSubclassed(LearnedBitModel):
    """The class of models that `to_learned_bits` makes of models with a custom `call`.

    Args:
        wrapper: `LearnedBitWrapper` around such a model; its attribute `layer` is the model.
        **kwargs: `name` and the other arguments of `keras.Model`.
    """

    def __init__(self, wrapper, **kwargs):
        super().__init__(**kwargs)
        self.wrapper = wrapper
        if wrapper.quantized_kernels:
            self.build_from_config(wrapper.layer.get_build_config())
            self.built = True

    def build(self, input_shape):
        """Does nothing: the wrapper is built when it is made or called."""
        # Without this method Keras would not note the shapes that `get_build_config` returns
        # (keras/src/layers/layer.py, `build_wrapper`).

    def call(self, inputs, training=None):
        return self.wrapper(inputs)  # Keras passes `training` on to layers that take it

    def get_config(self):
        wrapper = keras.saving.serialize_keras_object(self.wrapper)
        dtype = keras.saving.serialize_keras_object(self.dtype_policy)
        settings = {"name": self.name, "trainable": self.trainable, "dtype": dtype}
        return {"wrapper": wrapper, **settings}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        wrapper = keras.saving.deserialize_keras_object(config["wrapper"], custom_objects)
        return cls(**{**config, "wrapper": wrapper})


@register
class LearnedBitSequential(LearnedBitTraining, keras.Sequential):
    """`keras.Sequential` whose `fit` learns weights and bit-widths together.

    Examples:
        >>> model = LearnedBitSequential([keras.Input((8,)), keras_learnbits.LearnedBitDense(1)])
        >>> model.compile("adam", "mse", bit_reg=0.1)
        >>> history = model.fit(np.ones((320, 8)), np.ones((320, 1)), verbose=0)
        >>> round(float(model.layers[0].bits), 2)  # ten steps of 0.01 bits
        7.9
    """

    def __init__(self, layers=None, trainable=True, name=None):
        super().__init__(layers, trainable=trainable, name=name)
        self._add_bit_metrics()

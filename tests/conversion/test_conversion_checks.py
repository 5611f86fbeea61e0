"""A conversion that would differ from the model is refused, or reports what is not kept."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from thorough import thorough

import keras_learnbits as klb

L = keras.layers
X = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")


def net(*layers):
    return keras.Sequential([keras.Input((8,)), *layers])


class WithState(L.Layer):
    """Multiplies by a table that Keras does not track."""

    def __init__(self, kind="variable", **kwargs):
        super().__init__(**kwargs)
        self.kind = kind
        self.dense = L.Dense(8)
        table = np.random.normal(size=(8, 3)).astype("float32")
        self.table = {"variable": tf.Variable, "array": np.asarray}[kind](table)

    def call(self, x):
        return keras.ops.matmul(self.dense(x), tf.convert_to_tensor(self.table))


@pytest.mark.parametrize("kind", ["variable", "array"])
def test_state_that_keras_does_not_copy_is_found_by_comparing_predictions(kind):
    model = net(WithState(kind))
    with pytest.raises(ValueError, match="must make the predictions of the model.* differ by"):
        klb.to_learned_bits(model)


class Gain(L.Layer):
    """Multiplies by a number that its configuration lacks."""

    gain = 1.0

    def call(self, x):
        return self.gain * x**2 + 1


def test_state_that_is_lost_is_found_for_inputs_of_any_range():
    gain = Gain()
    gain.gain = 3.0
    model = net(L.Rescaling(1 / 255), gain, L.Dense(3))
    with pytest.raises(ValueError, match="must make the predictions of the model.* differ by"):
        klb.to_learned_bits(model)


class Added(L.Layer):
    """State that affects only some inputs: a table indexed by the first input."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = tf.Variable(np.append(np.zeros(5), np.random.normal(size=5)))

    def call(self, x):
        index = tf.cast(tf.clip_by_value(x[:, :1], 0, 9), tf.int32)
        return x + tf.cast(tf.gather(self.table, index), x.dtype)


def test_an_example_of_the_users_is_what_is_compared():
    model = net(L.Dense(8), Added())
    klb.to_learned_bits(net(Added(), L.Dense(8)), x=np.zeros((2, 8)))
    with pytest.raises(ValueError, match="must make the predictions of the model"):
        klb.to_learned_bits(net(Added(), L.Dense(8)), x=np.full((2, 8), 7.0))
    with pytest.raises(ValueError, match="`x` must be an input that the model accepts"):
        klb.to_learned_bits(model, x=np.zeros((2, 5)))


@keras.saving.register_keras_serializable("checks")
class Sampling(L.Layer):
    """Adds noise in inference, too, as a variational autoencoder does."""

    def __init__(self, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.seed = seed
        self.generator = keras.random.SeedGenerator(seed)

    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x), seed=self.generator)

    def get_config(self):
        return {**super().get_config(), "seed": self.seed}


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("was_called", [True, False])
def test_a_model_that_samples_in_inference_is_converted_without_comparing(seed, was_called):
    model = net(L.Dense(6), Sampling(seed), L.Dense(3))
    if was_called:
        model(X)
    before = [np.array(v) for v in model.variables]
    (note,) = klb.to_learned_bits(model).conversion.notes
    assert "whose predictions are random" in note
    for now, then in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: keras.Sequential(
                [keras.Input((), dtype="string"), L.Hashing(5), L.Embedding(5, 2), L.Dense(1)]
            ),
            "took no random input",
        ),
        (lambda: net(L.Dense(8), L.GaussianNoise(0.1)), None),
        (lambda: keras.Sequential([keras.Input((None, None, 3)), L.Conv2D(2, 3)]), None),
        (lambda: keras.Sequential([keras.Input((6,)), L.Embedding(4, 2)]), None),
    ],
)
def test_the_report_says_where_nothing_was_compared(make, said):
    notes = klb.to_learned_bits(make()).conversion.notes
    assert (said is None) == (not notes)
    assert all(said in note for note in notes)


def test_comparing_changes_neither_seeds_nor_statistics_of_the_original():
    model = net(L.Dense(8), L.Dropout(0.5, seed=1), L.BatchNormalization())
    before = [np.array(v) for v in model.variables]
    klb.to_learned_bits(model)
    for now, then in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_half_precision_is_compared_with_its_own_tolerance():
    keras.config.set_dtype_policy("mixed_bfloat16")
    assert not klb.to_learned_bits(net(*(L.Dense(64) for _ in range(6)))).conversion.notes


class Masked(L.Dense):
    """Keeps its kernel triangular by assigning to it."""

    def call(self, x):
        self.kernel.assign(keras.ops.triu(self.kernel))
        return super().call(x)


class HoldsMasked(L.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.masked = Masked(8)

    def call(self, x):
        return self.masked(x)


@pytest.mark.parametrize("layer", [Masked(8), HoldsMasked()], ids=["class", "holder"])
def test_layers_that_assign_to_their_kernel_are_refused(layer):
    model = net(layer)
    with pytest.raises(ValueError, match="`call` assigns to its kernel .* exclude the layer"):
        klb.to_learned_bits(model)


class Block(L.Layer):
    """Puts the layers inside it into its configuration without serializing them."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, x):
        for layer in self.inner if isinstance(self.inner, list) else [self.inner]:
            x = layer(x)
        return x

    def get_config(self):
        return {**super().get_config(), "inner": self.inner}


@pytest.mark.parametrize(
    "inner",
    [lambda: L.Dense(8), lambda: [L.Dense(8), L.Dense(8)], lambda: keras.Sequential([L.Dense(8)])],
    ids=["layer", "list", "model"],
)
def test_layers_in_a_configuration_are_copied_not_shared(inner):
    model = net(Block(inner()))
    learned = klb.to_learned_bits(model)
    before = learned.predict(X, verbose=0)
    for weight in model.weights:
        weight.assign(0 * weight)
    np.testing.assert_array_equal(learned.predict(X, verbose=0), before)
    assert float(klb.bit_table(learned).mean_bits) == 8


class Shares(Block):
    """Passes the layer that it was made from on to its copy."""

    kept = {}

    def get_config(self):
        self.kept[self.name] = self.inner
        return {**L.Layer.get_config(self)}

    @classmethod
    def from_config(cls, config):
        return cls(cls.kept[config["name"]], **config)


def test_a_copy_that_shares_weights_with_the_original_is_refused():
    with pytest.raises(ValueError, match="must not share weights with the original"):
        klb.to_learned_bits(net(Shares(L.Dense(8))))


class Transposed(L.Layer):
    """A decoder tied to a dense layer."""

    def __init__(self, dense, **kwargs):
        super().__init__(**kwargs)
        self.dense = dense

    def call(self, x):
        return keras.ops.matmul(x, keras.ops.transpose(self.dense.kernel))

    def get_config(self):
        return {**super().get_config(), "dense": keras.saving.serialize_keras_object(self.dense)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "dense": keras.saving.deserialize_keras_object(config["dense"])})


@pytest.mark.parametrize("copy", [True, False])
def test_layers_tied_by_holding_another_are_refused_in_either_way(copy):
    dense = L.Dense(3)
    with pytest.raises(ValueError, match="share weights"):
        klb.to_learned_bits(net(dense, Transposed(dense)), copy=copy)


def test_tied_layers_may_be_taken_as_they_are_where_they_are_excluded():
    tied = L.Dense(3, name="tied")
    model = net(tied, Transposed(tied), L.Dense(2, name="head"))
    before = model.predict(X, verbose=0)
    learned = klb.to_learned_bits(model, include="head", copy=False, bits=16, max_bits=16)
    np.testing.assert_allclose(learned.predict(X, verbose=0), before, atol=1e-2)
    tied.kernel.assign(0 * tied.kernel)
    np.testing.assert_array_equal(learned.predict(X, verbose=0), 0 * before)


def test_a_layer_shared_with_a_model_inside_is_one_layer_also_in_a_loaded_file(tmp_path):
    embedding = L.ReversibleEmbedding(20, 6, name="tied")
    inner = keras.Input((5,), dtype="int32")
    encoder = keras.Model(inner, L.Dense(6)(embedding(inner)), name="encoder")
    outer = keras.Input((5,), dtype="int32")
    learned = klb.to_learned_bits(keras.Model(outer, embedding(encoder(outer), reverse=True)))
    learned.save(tmp_path / "model.keras")
    klb.save_packed(learned, tmp_path / "model.safetensors", include_config=True)
    x = np.arange(10).reshape(2, 5)
    for loaded in (
        keras.models.load_model(tmp_path / "model.keras"),
        klb.load_packed_model(tmp_path / "model.safetensors"),
    ):
        assert len(loaded.weights) == len(learned.weights)
        np.testing.assert_array_equal(loaded(x), learned(x))


class Plain(L.Layer):
    def __init__(self, units):
        super().__init__()
        self.units, self.dense = units, L.Dense(units)

    def call(self, x):
        return self.dense(x)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def test_a_class_that_takes_no_keywords_keeps_its_name_policy_and_what_is_trainable():
    layer = Plain(3)
    layer.name, layer.trainable = "mine", False
    layer.dtype_policy = keras.DTypePolicy("mixed_bfloat16")
    model = net(layer, L.Dense(2))
    learned = klb.to_learned_bits(model, bits=16, max_bits=16)
    wrapped = learned.layers[0].layer
    assert wrapped.name == "mine"
    assert not wrapped.trainable
    assert wrapped.dtype_policy.name == "mixed_bfloat16"
    np.testing.assert_allclose(learned(X), model(X), rtol=0.05, atol=0.05)


class NoConfig(L.Layer):
    def __init__(self, inner, scale):
        super().__init__()
        self.inner, self.scale, self.dense = inner, scale, L.Dense(8)

    def call(self, x):
        return self.scale * self.dense(self.inner(x))


class NoConfigModel(keras.Model):
    def __init__(self, scale):
        super().__init__()
        self.scale, self.dense = scale, L.Dense(8)

    def call(self, x):
        return self.scale * self.dense(x)


@pytest.mark.parametrize("kind", ["layer", *thorough("model", "lambda")])
def test_what_has_no_config_is_converted_as_it_is_and_trained(kind, tmp_path):
    make = {
        "layer": lambda: net(NoConfig(L.Dense(8), 2.0), L.Dense(8)),
        "model": lambda: NoConfigModel(2.0),
        "lambda": lambda: net(L.Dense(8), L.Lambda(lambda x: 2 * x)),
    }[kind]
    model = make()
    before = np.asarray(model(X))
    with pytest.raises(ValueError, match="copy=False"):
        klb.to_learned_bits(model)
    learned = klb.to_learned_bits(model, copy=False, bits=16, max_bits=16)
    np.testing.assert_allclose(learned(X), before, atol=1e-2)
    learned.compile("adam", "mse", bit_reg=1.0)
    learned.fit(X, X, epochs=2, verbose=0)
    assert klb.bit_table(learned).rows
    klb.save_packed(learned, tmp_path / "model.safetensors")


class Pairs(keras.Model):
    def train_step(self, data):
        raise RuntimeError

    @property
    def metrics(self):
        return []


def test_the_report_names_the_methods_that_are_not_kept():
    inputs = keras.Input((8,))
    learned = klb.to_learned_bits(Pairs(inputs, L.Dense(8)(inputs)))
    assert "not kept: train_step, metrics of class Pairs" in str(learned.conversion)
    assert not klb.to_learned_bits(net(L.Dense(8))).conversion.notes


def test_the_report_ends_with_how_many_weights_have_learned_bits():
    report = klb.to_learned_bits(net(L.Dense(64, name="body"), L.Dense(3, name="head"))).conversion
    assert (report.learned_weights, report.float_weights) == (8 * 64 + 64 * 3, 64 + 3)
    assert "704 weights (91.3%) with learned bits, 67 (8.7%) left float" in str(report)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_named_at_conversion(value):
    model = net(L.Dense(3, name="fc"))
    model.layers[0].bias.assign([0, value, 0])
    with pytest.raises(ValueError, match="`bias` of layer 'fc'"):
        klb.to_learned_bits(model)

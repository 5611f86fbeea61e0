"""Batch norms folded into the layers before them, compared with the original models."""

import keras
import numpy as np
import pytest
from thorough import thorough

import keras_learnbits as klb

L = keras.layers
RNG = np.random.default_rng(0)


def with_statistics(model):
    """The model with random statistics, gammas and betas, as after a training."""
    for layer in model.layers:
        if isinstance(layer, L.BatchNormalization):
            layer.set_weights([RNG.uniform(0.5, 2, w.shape) for w in layer.weights])
    return model


def kinds(model):
    return [type(layer).__name__ for layer in model.layers if not isinstance(layer, L.InputLayer)]


def same_predictions(model, other, x):
    np.testing.assert_allclose(other(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: L.Dense(5), (7,)),
        (lambda: L.Dense(5, use_bias=False), (4, 7)),
        (lambda: L.Conv2D(5, 3, use_bias=False), (6, 6, 3)),
        (lambda: L.DepthwiseConv2D(3, depth_multiplier=2), (6, 6, 3)),
        (lambda: L.SeparableConv2D(5, 3), (6, 6, 3)),
        *thorough(
            (lambda: L.Conv1D(6, 3, groups=3), (6, 3)),
            (lambda: L.Conv3D(5, 2), (4, 4, 4, 2)),
            (lambda: L.DepthwiseConv1D(3), (6, 3)),
            (lambda: L.SeparableConv1D(5, 3, depth_multiplier=2), (6, 3)),
            (lambda: L.Conv1DTranspose(5, 3), (6, 3)),
            (lambda: L.Conv2DTranspose(5, 3, strides=2), (6, 6, 3)),
            (lambda: L.Conv3DTranspose(5, 2), (3, 3, 3, 2)),
        ),
    ],
)
def test_every_kind_of_layer_predicts_as_with_its_batch_norm(layer, shape):
    model = keras.Sequential([keras.Input(shape), layer(), L.BatchNormalization(), L.ReLU()])
    x = RNG.normal(size=(4, *shape)).astype("float32")
    folded = klb.fold_batch_norm(with_statistics(model))
    assert kinds(folded) == [type(model.layers[0]).__name__, "ReLU"]
    same_predictions(model, folded, x)


@pytest.mark.parametrize("arguments", [{"center": False}, {"scale": False}])
def test_norms_without_offset_or_factor_are_folded(arguments):
    model = keras.Sequential([keras.Input((7,)), L.Dense(5), L.BatchNormalization(**arguments)])
    x = RNG.normal(size=(4, 7)).astype("float32")
    folded = klb.fold_batch_norm(with_statistics(model))
    assert kinds(folded) == ["Dense"]
    same_predictions(model, folded, x)


class Squared(L.Dense):
    def call(self, inputs):
        return keras.ops.square(super().call(inputs))


class WithReLU(L.BatchNormalization):
    def call(self, inputs, training=False, mask=None):
        return keras.ops.relu(super().call(inputs, training=training, mask=mask))


@pytest.mark.parametrize(("layer", "norm"), [(Squared, L.BatchNormalization), (L.Dense, WithReLU)])
def test_layers_that_compute_something_else_keep_their_norm(layer, norm):
    model = keras.Sequential([keras.Input((7,)), layer(5), norm(), L.Dense(2)])
    x = RNG.normal(size=(4, 7)).astype("float32")
    with keras.saving.custom_object_scope({"Squared": Squared, "WithReLU": WithReLU}):
        folded = klb.fold_batch_norm(with_statistics(model))
        learned = klb.to_learned_bits(model, power_of_two=True, bits=8)
    assert kinds(folded) == [layer.__name__, norm.__name__, "Dense"]
    same_predictions(model, folded, x)
    assert "folded" not in str(learned.conversion)


def test_norms_inside_of_wrapped_layers_are_left_and_not_reported():
    block = keras.Sequential([keras.Input((4,)), L.Dense(3), L.BatchNormalization()])
    model = keras.Sequential([keras.Input((5, 4)), L.TimeDistributed(block), L.Dense(2)])
    assert "folded" not in str(klb.to_learned_bits(model, power_of_two=True).conversion)
    klb.to_learned_bits(model, power_of_two=True, copy=False)


def test_an_output_keeps_the_name_of_its_norm():
    inputs = keras.Input((4,))
    outputs = [L.BatchNormalization(name="a")(L.Dense(3)(inputs)), L.Dense(2, name="b")(inputs)]
    model = keras.Model(inputs, outputs)
    model.compile("adam", {"a": "mse", "b": "mse"})
    x = RNG.normal(size=(16, 4)).astype("float32")
    small = klb.quantize(model, x, target_bits=4, power_of_two=True, steps=0, verbose=0)
    assert small.output_names == ["a", "b"]
    small.evaluate(x, {"a": np.zeros((16, 3)), "b": np.zeros((16, 2))}, verbose=0)


@pytest.mark.parametrize("gamma", [[1.0, -0.5, 2.0, 0.3, -1.5], [1.0, -0.5, 0.0, 0.3, 0.0]])
@pytest.mark.parametrize("bits", [2, *thorough(1, 3)])
def test_a_trained_learned_bit_layer_keeps_its_codes(bits, gamma):
    model = keras.Sequential([keras.Input((6,)), L.Dense(5), L.BatchNormalization()])
    learned = klb.to_learned_bits(with_statistics(model), bits=bits)
    kernel = learned.layers[0].quantized_kernels["kernel"]
    kernel.log_scale.assign(kernel.log_scale + RNG.normal(0, 0.3, kernel.log_scale.shape))
    learned.layers[1].gamma.assign(gamma)
    x = RNG.normal(size=(20, 6)).astype("float32")
    np.testing.assert_allclose(klb.fold_batch_norm(learned)(x), learned(x), rtol=1e-4, atol=1e-5)


def residual():
    inputs = keras.Input((6, 6, 4))
    x = L.BatchNormalization(name="before_any_layer")(inputs)
    x = L.Conv2D(4, 3, padding="same")(x)
    shortcut = x  # it is read twice, so its batch norm cannot be folded
    x = L.BatchNormalization(name="after_a_branch")(x)
    x = L.Conv2D(4, 3, padding="same", activation="relu")(x)
    x = L.BatchNormalization(name="after_an_activation")(x)
    x = L.Conv2D(4, 3, padding="same")(x)
    x = L.BatchNormalization(name="folded")(x)
    return keras.Model(inputs, L.add([x, shortcut]))


def test_norms_that_cannot_be_folded_stay():
    model = with_statistics(residual())
    folded = klb.fold_batch_norm(model)
    left = [layer.name for layer in folded.layers if isinstance(layer, L.BatchNormalization)]
    assert left == ["before_any_layer", "after_a_branch", "after_an_activation"]
    same_predictions(model, folded, RNG.normal(size=(2, 6, 6, 4)).astype("float32"))


def test_a_layer_that_is_called_twice_keeps_its_norm():
    inputs = keras.Input((4,))
    dense, norm = L.Dense(4), L.BatchNormalization()
    model = with_statistics(keras.Model(inputs, norm(dense(dense(inputs)))))
    folded = klb.fold_batch_norm(model)
    assert "BatchNormalization" in kinds(folded)
    same_predictions(model, folded, RNG.normal(size=(2, 4)).astype("float32"))


def test_norms_in_nested_models_are_folded():
    block = with_statistics(
        keras.Sequential([keras.Input((4,)), L.Dense(3, name="inner"), L.BatchNormalization()])
    )
    inputs = keras.Input((4,))
    model = keras.Model(inputs, L.Dense(2)(block(inputs)))
    folded = klb.fold_batch_norm(model)
    assert kinds(folded.layers[1]) == ["Dense"]
    same_predictions(model, folded, RNG.normal(size=(2, 4)).astype("float32"))


def test_a_model_with_a_constraint_keeps_its_norm():
    dense = L.Dense(3, kernel_constraint=keras.constraints.MaxNorm(1.0))
    model = keras.Sequential([keras.Input((4,)), dense, L.BatchNormalization()])
    assert kinds(klb.fold_batch_norm(model)) == ["Dense", "BatchNormalization"]


def test_frozen_layers_stay_frozen():
    model = keras.Sequential([keras.Input((4,)), L.Dense(3), L.BatchNormalization()])
    model.layers[0].trainable = False
    assert not klb.fold_batch_norm(model).trainable_weights


def test_a_learned_bit_model_keeps_its_bits_and_its_class():
    model = keras.Sequential(
        [keras.Input((6,)), L.Dense(5, name="a"), L.BatchNormalization(), L.Dense(3, name="b")]
    )
    learned = klb.to_learned_bits(with_statistics(model), bits=16, max_bits=16)
    learned.layers[0].bits.assign(15.0)
    folded = klb.fold_batch_norm(learned)
    assert type(folded) is klb.LearnedBitSequential
    assert [float(layer.bits) for layer in folded.layers] == [15.0, 16.0]
    x = RNG.normal(size=(4, 6)).astype("float32")
    np.testing.assert_allclose(folded(x), model(x), rtol=1e-2, atol=1e-2)


def test_a_model_with_a_custom_call_is_refused():
    class Custom(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="`fold_batch_norm` needs a built Sequential or func"):
        klb.fold_batch_norm(Custom())


def test_power_of_two_folds_and_says_so():
    model = with_statistics(
        keras.Sequential(
            [keras.Input((6, 6, 3)), L.Conv2D(4, 3, name="conv"), L.BatchNormalization(name="norm"),
             L.ReLU(), L.Flatten(), L.Dense(3)]
        )
    )  # fmt: skip
    learned = klb.to_learned_bits(model, power_of_two=True)
    assert kinds(learned) == ["LearnedBitConv2D", "ReLU", "Flatten", "LearnedBitDense"]
    assert "folded into conv" in str(learned.conversion)


def test_power_of_two_without_a_copy_asks_to_fold_first():
    model = keras.Sequential([keras.Input((4,)), L.Dense(3), L.BatchNormalization(name="norm")])
    with pytest.raises(ValueError, match=r"call `fold_batch_norm\(model\)` first.*'norm'"):
        klb.to_learned_bits(model, power_of_two=True, copy=False)
    klb.to_learned_bits(klb.fold_batch_norm(model), power_of_two=True, copy=False)

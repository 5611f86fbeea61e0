import functools

import keras
import numpy as np
import pytest

import keras_learnbits as klb


def net(conv, dense, model_class=keras.Model, units=3):
    inputs = keras.Input((6, 6, 2))
    x = conv(4, 3, name="conv")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    return model_class(inputs, dense(units, name="head")(keras.layers.Flatten()(x)))


def test_a_warm_start_computes_what_the_float_model_does_at_high_bits():
    plain = net(keras.layers.Conv2D, keras.layers.Dense)
    norm = plain.get_layer("norm")
    norm.set_weights([v + 0.5 for v in norm.get_weights()])
    plain.get_layer("conv").set_weights([10.0 * v for v in plain.get_layer("conv").get_weights()])

    def high(layer):
        return lambda *args, **kwargs: layer(*args, bits=16, max_bits=16, **kwargs)

    model = net(high(klb.LearnedBitConv2D), high(klb.LearnedBitDense), klb.LearnedBitModel)
    klb.warm_start(model, plain)
    x = np.random.default_rng(0).normal(size=(5, 6, 6, 2))
    expected = plain.predict(x, verbose=0)
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=2e-3 * expected.std())


def test_a_warm_start_fits_scales_and_leaves_bits():
    plain = net(keras.layers.Conv2D, keras.layers.Dense)
    model = net(klb.LearnedBitConv2D, klb.LearnedBitDense, klb.LearnedBitModel)
    model.get_layer("conv").bits.assign(3.0)
    klb.warm_start(model, plain)
    kernel = model.get_layer("conv").quantized_kernels["kernel"]
    assert float(kernel.bits) == 3
    least = float(kernel.squared_error())
    start = kernel.log_scale.numpy()
    for shift in (-0.2, 0.2):  # a wider and a narrower grid for all channels
        kernel.log_scale.assign(start + shift)
        assert float(kernel.squared_error()) > least


def test_other_layers_or_shapes_are_refused_and_change_nothing():
    plain = net(keras.layers.Conv2D, keras.layers.Dense, units=4)
    model = net(klb.LearnedBitConv2D, klb.LearnedBitDense, klb.LearnedBitModel)
    before = model.get_weights()
    with pytest.raises(ValueError, match="same shapes. .* layer 'head'"):
        klb.warm_start(model, plain)
    with pytest.raises(ValueError, match=r"only in model: \['conv', 'norm'\]"):
        klb.warm_start(
            model, keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, name="head")])
        )
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_adapted_normalization_is_warm_started_too():
    x = np.random.default_rng(0).normal(3.0, 5.0, (64, 4)).astype("float32")
    models = []
    for dense in (keras.layers.Dense, functools.partial(klb.LearnedBitDense, bits=8)):
        layers = [keras.layers.Normalization(name="norm"), dense(2, name="head")]
        models.append(keras.Sequential([keras.Input((4,)), *layers]))
    models[0].layers[0].adapt(x)
    klb.warm_start(models[1], models[0])
    expected = models[0](x).numpy()
    np.testing.assert_allclose(models[1](x), expected, atol=0.02 * expected.std())

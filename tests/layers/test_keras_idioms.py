"""Keras idioms work on learned-bit layers, or an error says what to write."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_learnbits as klb


@pytest.fixture
def layer():
    layer = klb.LearnedBitDense(3, bits=2, kernel_constraint="non_neg", kernel_regularizer="l2")
    layer.build((None, 4))
    return layer


def test_outside_of_call_the_kernel_is_the_float_variable(layer):
    assert isinstance(layer.kernel, keras.Variable)
    assert layer.kernel is layer.quantized_kernels["kernel"].kernel
    assert layer.kernel.path.endswith("/kernel")
    assert isinstance(layer.kernel.constraint, keras.constraints.NonNeg)
    assert isinstance(layer.kernel.regularizer, keras.regularizers.L2)


def test_inside_of_call_the_kernel_is_the_quantized_one_also_in_a_class_of_a_user():
    seen = []

    class Doubled(klb.LearnedBitDense):
        def call(self, inputs, training=None):
            seen.append(self.kernel)
            return 2.0 * super().call(inputs, training=training)

    layer = Doubled(3, bits=1)
    x = np.ones((2, 4), "float32")
    outputs = layer(x)
    quantized = layer.quantized_kernels["kernel"].quantized()
    np.testing.assert_array_equal(seen[-1], quantized)
    np.testing.assert_allclose(outputs, 2 * x @ quantized, rtol=1e-6)
    assert isinstance(layer.kernel, keras.Variable)


def test_after_a_call_that_raises_the_kernel_is_the_float_one_again(layer):
    with pytest.raises(Exception, match="size-incompatible"):
        layer.call(np.ones((2, 5), "float32"))
    assert isinstance(layer.kernel, keras.Variable)


def test_gradients_reach_the_float_kernel_when_a_step_is_checkpointed():
    x = np.ones((2, 4), "float32")
    layer = klb.LearnedBitDense(3, bits=1)
    layer.build((None, 4))
    gradients = []
    for remat in (False, True):
        call = keras.remat(layer.call) if remat else layer.call
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(call(x)))
        gradients.append(tape.gradient(loss, layer.kernel.value))
    np.testing.assert_allclose(*gradients, rtol=1e-6)


@pytest.mark.parametrize(
    ("layer", "shape", "names"),
    [
        (klb.LearnedBitDense(3), (2, 4), ["kernel"]),
        (klb.LearnedBitDepthwiseConv2D(3), (1, 4, 4, 2), ["kernel"]),
        (klb.LearnedBitConv1DTranspose(3, 2), (1, 4, 2), ["kernel"]),
        (klb.LearnedBitEmbedding(5, 3), (2,), ["embeddings"]),
        (klb.LearnedBitSeparableConv1D(3, 2), (1, 4, 2), ["depthwise_kernel", "pointwise_kernel"]),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_assigning_to_the_variable_counts_and_replacing_it_is_refused(layer, shape, names):
    layer(np.zeros(shape))
    for name in names:
        variable = getattr(layer, name)
        with pytest.raises(AttributeError, match=rf"`layer.{name}.assign\(values\)`. Received"):
            setattr(layer, name, np.zeros(variable.shape))
        variable.assign(np.full(variable.shape, 0.5))
        np.testing.assert_array_equal(getattr(layer, name), np.full(variable.shape, 0.5))


def test_scales_follow_a_kernel_that_is_assigned(layer):
    quantized = layer.quantized_kernels["kernel"]
    layer.kernel.assign(100 * np.random.default_rng(0).normal(size=(4, 3)))
    fitted = quantized.log_scale.numpy()
    assert quantized.squared_error() / quantized.squared_norm() < 0.2
    quantized.fit_scale()
    np.testing.assert_array_equal(quantized.log_scale, fitted)


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_scales_do_not_follow_the_steps_of_training(run_eagerly, data):
    layers = [keras.Input((6,)), klb.LearnedBitDense(2, bits=2, kernel_constraint="unit_norm")]
    model = klb.LearnedBitSequential(layers)
    model.compile(keras.optimizers.SGD(0.0), "mse", run_eagerly=run_eagerly)
    (kernel,) = [layer.quantized_kernels["kernel"] for layer in model.layers]
    kernel.log_scale.assign(kernel.log_scale + 1.0)
    before = kernel.log_scale.numpy()
    model.fit(*data, verbose=0)
    np.testing.assert_array_equal(kernel.log_scale, before)


def test_averaged_and_restored_weights_keep_their_own_scales(make_model, data, tmp_path):
    model = make_model(bits=2)
    model.compile(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5), "mse")
    (kernel, _) = (layer.quantized_kernels["kernel"] for layer in model.layers[1:])
    kernel.log_scale.assign(kernel.log_scale + 1.0)
    model.fit(*data, epochs=2, batch_size=64, verbose=0)
    kept = kernel.log_scale.numpy()
    weights = model.get_weights()
    model.set_weights(weights)
    np.testing.assert_array_equal(kernel.log_scale, kept)
    model.save_weights(tmp_path / "m.weights.h5")
    model.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(kernel.log_scale, kept)
    fitted = kernel.quantizer.fitted_log_scale(kernel.kernel.value, 2.0, kernel.log_scale.shape)
    assert np.abs(fitted - kept).max() > 0.1


def test_set_weights_takes_the_weights_of_the_float_layer_and_fits_scales(layer):
    kernel, bias = np.random.default_rng(0).normal(size=(4, 3)), np.arange(3.0)
    layer.set_weights([100 * kernel, bias])
    np.testing.assert_allclose(layer.kernel, 100 * kernel, rtol=1e-6)
    np.testing.assert_array_equal(layer.bias, bias)
    assert float(layer.bits) == 2
    quantized = layer.quantized_kernels["kernel"]
    assert quantized.squared_error() / quantized.squared_norm() < 0.2


def test_set_weights_of_a_model_takes_those_of_the_float_model_and_its_own(make_model):
    model = make_model(bits=3)
    weights = [
        np.random.default_rng(i).normal(size=s) for i, s in enumerate([(6, 8), 8, (8, 2), 2])
    ]
    model.set_weights(weights)
    np.testing.assert_allclose(model.layers[1].kernel, weights[0], rtol=1e-6)
    own = model.get_weights()
    model.layers[1].bits.assign(5.0)
    model.set_weights(own)
    assert float(model.layers[1].bits) == 3


def test_float_weights_of_other_shapes_are_refused_and_change_nothing(layer):
    before = layer.get_weights()
    with pytest.raises(ValueError, match="with the shapes of the present ones"):
        layer.set_weights([np.zeros((3, 4)), np.zeros(3)])
    for now, then in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_a_file_of_float_weights_leads_to_warm_start(tmp_path):
    plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="fc")])
    plain.save_weights(tmp_path / "float.weights.h5")
    model = klb.to_learned_bits(plain)
    with pytest.raises(ValueError, match="warm_start"):
        model.load_weights(tmp_path / "float.weights.h5")

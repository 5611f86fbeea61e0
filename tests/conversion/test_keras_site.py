"""Models like those in the examples of keras.io."""

import keras
import keras_site_models as site
import keras_site_vision as vision
import numpy as np
import pytest
from thorough import thorough

import keras_learnbits as klb
from keras_learnbits.layers.discovery import quantized_kernels

EXAMPLE = site.memory_efficient_embeddings
MORE_EXAMPLES = [
    vision.vision_transformer, vision.swin_transformer, vision.involutional_network,
    vision.perceiver, vision.point_net, vision.zero_dce, vision.variational_autoencoder,
    vision.vq_vae, vision.pixel_cnn, vision.diffusion_net, site.real_nvp, site.captcha_reader,
    site.translation, site.masked_language_model, site.miniature_gpt, site.speech_recognition,
    site.decision_forest, site.graph_attention, site.gated_residual_network,
]  # fmt: skip
CLASSES = {
    name: value
    for name, value in {**vars(vision), **vars(site)}.items()
    if isinstance(value, type) and value.__module__ in (vision.__name__, site.__name__)
}


def made(example):
    """The same model, data and arguments of `compile` at each call; no weight is zero."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(3)
    model, *others = example()
    rng = np.random.default_rng(4)
    for weight in model.trainable_weights:
        weight.assign_add(0.1 * rng.normal(size=weight.shape))
    return model, *others


def converted(model, **settings):
    return klb.to_learned_bits(model, bits=16, max_bits=16, **settings)


def predictions(model, x):
    """Predictions of a model whose random numbers start again."""
    for variable in model.variables:
        if "seed" in variable.path:
            variable.assign([0, 1])
    tensors = keras.tree.map_structure(keras.ops.convert_to_tensor, x)
    return [np.array(y) for y in keras.tree.flatten(model(tensors))]


def assert_close(ones, others, relative):
    """Largest difference within a share of the largest value, output by output."""
    for one, other in zip(ones, others, strict=True):
        assert np.abs(one - other).max() <= relative * np.abs(other).max()


def way_out(refusal):
    """Settings that the message of a refused conversion names."""
    ways = {"copy=False": {"copy": False}, "exclude the layer": {"exclude": "pixel_conv*"}}
    named = [settings for words, settings in ways.items() if words in refusal]
    assert named, f"no way out is named: {refusal}"
    return named[0]


def has_a_file(example, path):
    """Whether Keras itself saves and loads the model, which not all examples are made for."""
    model, x, *_ = made(example)
    try:
        model.save(path)
        loaded = keras.models.load_model(path, custom_objects=CLASSES, compile=False)
        assert_close(predictions(loaded, x), predictions(model, x), 1e-5)
    except (NotImplementedError, TypeError, ValueError, AssertionError):
        return False
    return True


# For some originals Keras also warns about layers that `build` cannot build, and about masks.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "example", [EXAMPLE, *thorough(*MORE_EXAMPLES)], ids=lambda example: example.__name__
)
def test_an_example_of_the_keras_site_is_converted_trained_and_loaded_or_refused_with_a_way_out(
    example, tmp_path
):
    goes_to_a_file = has_a_file(example, tmp_path / "original.keras")
    model, x, y, settings = made(example)
    expected = predictions(model, x)
    way = {}
    try:
        learned = converted(model)
    except ValueError as error:
        way = way_out(str(error))
        learned = converted(model, **way)
    assert_close(predictions(learned, x), expected, 5e-3)

    before = [np.array(kernel.kernel) for kernel in quantized_kernels(learned)]
    learned.compile(**settings)
    (loss,) = learned.fit(x, y, verbose=0).history["loss"]
    assert np.isfinite(loss)
    after = [np.array(kernel.kernel) for kernel in quantized_kernels(learned)]
    assert any((a != b).any() for a, b in zip(before, after, strict=True))
    trained = predictions(learned, x)
    assert_close(predictions(learned, x), trained, 0)  # predicting changes nothing

    if goes_to_a_file:
        learned.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras", custom_objects=CLASSES)
    else:
        klb.save_packed(learned, tmp_path / "model.safetensors")
        loaded = converted(made(example)[0], **way)
        klb.load_packed(tmp_path / "model.safetensors", into=loaded)
    assert_close(predictions(loaded, x), trained, 1e-5)

"""Bit-widths to begin a training at, allocated from measurements on example inputs."""

from keras_learnbits.calibration.examples import read_examples
from keras_learnbits.calibration.inference import Predictor
from keras_learnbits.calibration.measuring import (
    MOST_EXAMPLES,
    loss_table,
    measured_rows,
    set_width,
)
from keras_learnbits.calibration.output_distance import OutputDistance
from keras_learnbits.layers.compute_scope import computing_with_float_kernels
from keras_learnbits.layers.discovery import kernels_among, learner_of, quantized_kernels


def start_at_measured_widths(model, target, data):
    """Sets bit-widths within a target that move the outputs of the model least.

    They are those of `keras_learnbits.quantize`: one kernel at a time is rounded to each width. The
    float kernels stay; scales are fitted to the new widths. Kernels that are not trained keep bits
    and scales.

    Args:
        model: A built model that learns its bits.
        target: `SizeTarget`.
        data: Example inputs, as for `read_examples`.
    """
    learner = learner_of(model)
    examples = measured_rows(read_examples(data, learner, MOST_EXAMPLES, seed=0))
    with computing_with_float_kernels():
        reference = Predictor(learner)(examples)
    kernels = quantized_kernels(learner)
    distance = OutputDistance(reference, learner)
    losses = loss_table(learner, examples, reference, distance, lambda: None)
    trained = kernels_among(model.trained_tensors)
    rows = losses[[kernels.index(kernel) for kernel in trained]]
    for kernel, bits in target.allocate_by(model, trained, rows).items():
        set_width(kernel, bits)

"""Initial bit-widths for training, allocated from measurements on example inputs."""

from keras_learnbits.allocation.bit_operations import BitOperationsTarget
from keras_learnbits.calibration.activation_ranges import ActivationRanges
from keras_learnbits.calibration.examples import read_examples
from keras_learnbits.calibration.inference import Predictor
from keras_learnbits.calibration.measured_widths import MeasuredWidths
from keras_learnbits.calibration.measuring import MOST_EXAMPLES, measured_rows
from keras_learnbits.calibration.output_distance import OutputDistance
from keras_learnbits.layers.compute_scope import computing_with_float_kernels
from keras_learnbits.layers.discovery import learner_of


def start_at_measured_widths(model, target, data):
    """Sets the bit-widths within a target that change the outputs of the model least.

    They are those of `keras_learnbits.quantize`, which rounds one kernel at a time to each width.
    Float kernels do not change; scales are fitted to the new widths. Kernels that are not trained
    keep their bits and scales.

    Args:
        model: A built model that learns its bits.
        target: `SizeTarget`.
        data: Example inputs, in the forms that `read_examples` takes.
    """
    learner = learner_of(model)
    examples = measured_rows(read_examples(data, learner, MOST_EXAMPLES, seed=0))
    with computing_with_float_kernels():
        reference = Predictor(learner)(examples)
    joint = isinstance(target, BitOperationsTarget)
    ranges = ActivationRanges(learner, examples, all_widths=True) if joint else None
    measured = MeasuredWidths(learner, examples, ranges)
    distance = OutputDistance(reference, learner)
    losses = measured.loss_table(reference, distance, lambda: None)
    trained = [tensor for tensor in measured.tensors if tensor in model.trained_tensors]
    rows = losses[[measured.tensors.index(tensor) for tensor in trained]]
    measured.set(target.allocate_by(model, trained, rows))

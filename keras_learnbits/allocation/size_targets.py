"""The sizes that a model can be given, by the names of their arguments."""

from keras_learnbits.allocation.bit_operations import BitOperationsTarget
from keras_learnbits.allocation.targets import BitsTarget, BytesTarget, CompressionTarget

SIZE_TARGETS = {
    target.name: target
    for target in (BitsTarget, BytesTarget, CompressionTarget, BitOperationsTarget)
}

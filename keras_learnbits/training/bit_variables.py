"""`BitVariables`: the quantized tensors of a model, and its bit-widths as variables."""

from keras_learnbits.layers.discovery import quantized_tensors, without_fixed_scales
from keras_learnbits.layers.float_weights import TakesFloatWeights


class BitVariables(TakesFloatWeights):
    """Lists the bit-widths of trainable layers among a model's trainable variables.

    Layers list them among the non-trainable variables, so that other Keras models do not train
    them. Goes before the Keras model class.
    """

    # A method and not a property: keras/src/saving/saving_lib.py, `_walk_saveable`, reads all
    # properties, and would recurse endlessly into this model.
    def bit_learner(self):
        """The model whose bits are learned: this one; for a distiller its student."""
        return self

    @property
    def quantized_tensors(self):
        """All `QuantizedTensor`s: those of kernels, then those of activations."""
        return quantized_tensors(self)

    @property
    def trained_tensors(self):
        """The `QuantizedTensor`s of trainable layers, whose bit-widths are trained."""
        if not self.trainable:
            return []
        return [tensor for tensor in self.quantized_tensors if tensor.trainable]

    def _trained_bits(self):
        return [tensor.bits for tensor in self.trained_tensors]

    def _without_trained_bits(self, variables):
        # By `id`, because Keras's variables compare elementwise and are not hashable.
        trained = {id(bits) for bits in self._trained_bits()}
        return [variable for variable in variables if id(variable) not in trained]

    @property
    def trainable_variables(self):
        return without_fixed_scales(super().trainable_variables) + self._trained_bits()

    @property
    def trainable_weights(self):
        return without_fixed_scales(super().trainable_weights) + self._trained_bits()

    @property
    def non_trainable_variables(self):
        return self._without_trained_bits(super().non_trainable_variables)

    @property
    def non_trainable_weights(self):
        return self._without_trained_bits(super().non_trainable_weights)

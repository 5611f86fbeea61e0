"""Plugin of alkaid, which traces Keras models to Verilog (https://github.com/calad0i/alkaid).

alkaid finds `register` by the entry point `alkaid_keras`, and calls it before it traces a model.
"""


def register():
    """Registers the layers that `to_fixed_point` makes with alkaid."""
    import numpy as np
    from alkaid.converter.builtin.keras.layers import ReplayOperationBase
    from alkaid.trace.ops import quantize

    from keras_learnbits.export.fixed_point import FixedPoint, Padding

    # alkaid registers an operation when its class is made, for the layers in `handles`.
    class FixedPointOperation(ReplayOperationBase):
        handles = (FixedPoint,)

        def call(self, inputs):
            signed, bits, integer_bits = self.op.fixed_point_type()
            types = signed, integer_bits - signed, bits - integer_bits
            return quantize(inputs, *types, overflow_mode="SAT", round_mode="RND")

    class PaddingOperation(ReplayOperationBase):
        handles = (Padding,)

        def call(self, inputs):
            return np.pad(inputs, [(0, 0), *self.op.padding, (0, 0)])

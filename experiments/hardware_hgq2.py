"""HGQ2 models for `hardware.py`: a bit-width per weight and per activation, trained for EBOPs.

The recipe is that of its documentation (https://github.com/calad0i/HGQ2): quantizers of type `kbi`
that saturate for weights and of type `kif` that wrap for activations, a price per EBOP that rises
from a tenth to its value over the first half, and ranges traced on the training data at the end. An
EBOP is one bit of a weight times one bit of an activation; weights without bits are left out.
"""

import keras
import numpy as np
from hgq.config import LayerConfigScope, QuantizerConfigScope
from hgq.layers import QConv2D, QDense
from hgq.utils import trace_minmax
from hgq.utils.sugar import BetaScheduler, FreeEBOPs, PieceWiseSchedule


def run(build, net, data, test, price, epochs, batch_size):
    """Trains a net from scratch, and returns a dictionary with its accuracy and its EBOPs.

    Args:
        build: Function of the classes of convolutions and dense layers to a model.
        net: Name of the net.
        data: Pair of arrays, the training data.
        test: Pair of arrays, the test data.
        price: Number, the final price of an EBOP in loss.
        epochs: Number of epochs.
        batch_size: Number of examples per step.
    """
    with (
        QuantizerConfigScope(place="all", default_q_type="kbi", overflow_mode="SAT_SYM"),
        QuantizerConfigScope(place="datalane", default_q_type="kif", overflow_mode="WRAP"),
        LayerConfigScope(enable_ebops=True, beta0=price / 10),
    ):
        model = build(QConv2D, QDense)
    steps = epochs * -(-len(data[0]) // batch_size)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(3e-3, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    schedule = PieceWiseSchedule(
        [(0, price / 10, "log"), (epochs // 2, price, "constant"), (epochs, price, "constant")]
    )
    model.fit(
        *data, batch_size=batch_size, epochs=epochs, verbose=0,
        callbacks=[BetaScheduler(schedule), FreeEBOPs()],
    )  # fmt: skip
    operations = float(trace_minmax(model, data[0]))
    logits = model.predict(test[0], batch_size=500, verbose=0)
    return {
        "accuracy": float(np.mean(logits.argmax(axis=-1) == test[1])),
        "bit_operations": operations,
    }

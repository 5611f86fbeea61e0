"""Which cases of a matrix only the whole suite runs: `pytest -m "thorough or not thorough"`."""

import pytest


def thorough(*cases):
    """Parameters of `pytest.mark.parametrize`, marked; a tuple is one case of several values."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.thorough)
        for case in cases
    ]

"""Checks of arguments: numbers within bounds, and names to choose from."""

import numbers

import numpy as np


def check_number(name, value, low=-np.inf, high=np.inf, *, below=np.inf, integer=False):
    """Raises a ValueError unless an argument is a real number within bounds.

    Args:
        name: Name of the argument.
        value: Value of the argument.
        low: Number, the lowest value that is allowed.
        high: Number, the highest value that is allowed.
        below: Number that the value must be less than.
        integer: Whether the value must be an integer.

    Examples:
        >>> check_number("by", 0.5, 0, below=1)
        >>> check_number("by", float("nan"), 0, below=1)
        Traceback (most recent call last):
        ...
        ValueError: `by` must be a finite number >= 0 and < 1. Received: by=nan
    """
    kind = numbers.Integral if integer else numbers.Real
    # Booleans are integers in Python; `patience=True` is more likely a mistake than 1.
    is_kind = isinstance(value, kind) and not isinstance(value, bool | np.bool_)
    if is_kind and np.isfinite(value) and low <= value <= high and value < below:
        return
    bounds = [
        f"{sign} {bound}"
        for sign, bound in ((">=", low), ("<=", high), ("<", below))
        if np.isfinite(bound)
    ]
    rule = " ".join(["an integer" if integer else "a finite number", " and ".join(bounds)])
    raise ValueError(f"`{name}` must be {rule.strip()}. Received: {name}={value!r}")


def choose(name, choices, argument, custom=False):
    """Looks up the value that an argument names.

    Args:
        name: Value of the argument.
        choices: Dictionary of name to value.
        argument: Name of the argument, for the error.
        custom: Whether the argument may also be a function, which is then returned.

    Raises:
        ValueError: `choices` does not contain the name.

    Examples:
        >>> choose("a", {"a": 1}, "letter")
        1
    """
    if isinstance(name, str) and name in choices:
        return choices[name]
    if custom and callable(name):
        return name
    rule = f"one of {sorted(choices)}" + (", or a function" if custom else "")
    raise ValueError(f"`{argument}` must be {rule}. Received: {argument}={name!r}")

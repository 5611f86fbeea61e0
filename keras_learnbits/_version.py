"""The version of this library, which `setup.py` also reads."""

__version__ = "0.2.0"

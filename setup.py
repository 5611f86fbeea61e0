"""Package metadata of keras_learnbits."""

import pathlib
import re

from setuptools import find_packages, setup

here = pathlib.Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "keras_learnbits/_version.py").read_text())[1]

export = [
    "tf2onnx>=1.17",
    "onnx>=1.20.1",
    "onnxruntime>=1.24.1",
    "qonnx>=1.0",
    "ai-edge-litert>=2.1",
]
hardware = ["hls4ml>=1.3", "alkaid>=0.8.2"]
experiments = [
    "tensorflow-datasets>=4.9.9",
    "scikit-learn>=1.6",
    "scipy>=1.14",
    "matplotlib>=3.10",
]
docs = [
    "mkdocs>=1.6.1",
    "mkdocs-material>=9.7",
    "mkdocs-jupyter>=0.26.3",
    "beautifulsoup4>=4.15",
    "mkdocstrings>=1.0.8",
    "mkdocstrings-python>=2.0",
    "ruff>=0.14",  # wraps signatures
]
dev = [
    "pytest>=8.4",
    "pytest-xdist>=3.8",
    "hypothesis>=6.140",
    "build>=1.3",
    "nbclient>=0.11",  # executes the notebooks
    "ipykernel>=7.4",
]

setup(
    name="keras_learnbits",
    version=version,
    description="Keras models that learn how many bits each layer's weights need",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["keras_learnbits", "keras_learnbits.*"]),
    python_requires=">=3.11",
    entry_points={
        "console_scripts": ["keras_learnbits=keras_learnbits.command_line.main:main"],
        "alkaid_keras": ["keras_learnbits=keras_learnbits.export.alkaid:register"],
    },
    install_requires=[
        "tensorflow>=2.20",
        "keras>=3.15",
        "tensorboard>=2.20",
        "absl-py>=2.3",
        "numpy>=2.1",
        "safetensors>=0.8",
    ],
    extras_require={
        "experiments": experiments,
        "export": export,
        "hardware": hardware,
        "docs": docs,
        "dev": experiments + export + hardware + docs + dev,
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

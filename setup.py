"""Installs tscnc_tf: `pip install .`.

Extras: `datasets`, `docs`, `experiments`, `examples`, `litert`, `onnx`, `plots`, `test`.
"""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "tscnc_tf/__init__.py").read_text(encoding="utf-8"), re.M
)[1]
LITERT = ["ai-edge-litert>=2.1"]
DATASETS = ["scikit-learn", "pillow", "scipy"]
EXPERIMENTS = [*DATASETS, "filelock>=3.12", "pyyaml"]
PLOTS = ["matplotlib>=3.6"]
EXAMPLES = [*EXPERIMENTS, *PLOTS, *LITERT]
DOCS = ["furo", "latex2mathml", "myst-parser", "sphinx>=8", "sphinx-copybutton"]
ONNX = ["onnx>=1.19", "onnxruntime>=1.23", "tf2onnx>=1.17"]

setup(
    name="tscnc_tf",
    version=VERSION,
    description="Networks that are both tiny and hard to fool: TSCNC for Keras and TensorFlow",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["tscnc_tf", "tscnc_tf.*"]),
    package_data={"tscnc_tf": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "tensorflow>=2.19",
        "tf-keras>=2.19",
        "keras>=3.8",
        "tensorflow-model-optimization>=0.8",
        "cleverhans>=4.0",
        "numpy>=1.26",
        "rich>=13",
    ],
    extras_require={
        "datasets": DATASETS,
        "docs": DOCS,
        "examples": EXAMPLES,
        "experiments": EXPERIMENTS,
        "litert": LITERT,
        "onnx": ONNX,
        "plots": PLOTS,
        "test": [
            *DOCS,
            *EXAMPLES,
            *ONNX,
            "adversarial-robustness-toolbox",
            "hypothesis",
            "jax",
            "mypy",
            "pytest",
            "pytest-xdist",
            "ruff",
            "tensorboard",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "License :: OSI Approved :: Apache Software License",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)

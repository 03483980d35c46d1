"""Package metadata. ``pearl_ray/actors``, ``kernels`` and ``cluster`` are links to top-level folders."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "pearl_ray" / "__init__.py").read_text("utf-8"), re.M)
assert VERSION is not None

SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "pydantic>=2.7", "prometheus-client>=0.20", "sse-starlette>=2.1"]
BENCH = ["matplotlib>=3.8", "scipy>=1.11", "openai>=1.40", "httpx>=0.27"]
DEV = [
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "httpx>=0.27",
    "ruff>=0.8",
    "mypy>=1.11",
    "scipy>=1.11",
    "openai>=1.40",
    "jsonschema>=4.20",
    "schemathesis>=4",
    "playwright>=1.50",
]

setup(
    name="pearl-ray",
    version=VERSION.group(1),
    description="Large language models served with parallel speculative decoding (PEARL) on Ray actors",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["pearl_ray", "pearl_ray.*"]),
    package_data={"pearl_ray": ["assets/*", "serving/static/*", "py.typed"]},
    install_requires=[
        "ray>=2.60",
        "torch>=2.9",
        "transformers>=5",
        "safetensors>=0.5",
        "numpy>=1.26",
        "click>=8.1",
        "rich>=13.7",
        "gguf>=0.17",
        "msgspec>=0.19",
        "pyzmq>=26",
        "filelock>=3.13",
        "psutil>=5.9",
        "pyyaml>=6",
        "huggingface_hub>=1.0",
        "llguidance>=1.8",
    ],
    extras_require={"flash": ["flash-attn>=2.7"], "serve": SERVE, "bench": BENCH, "dev": DEV},
    entry_points={"console_scripts": ["pearl-ray = pearl_ray.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

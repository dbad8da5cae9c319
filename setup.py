"""Packaging of dist_vasp. Ranges of versions are here; constraints.txt pins the tested ones."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

BASE = [  # training and everything else on one rank
    "torch>=2.8,<3",
    "numpy>=2.0",
    "scipy>=1.14",
    "pyarrow>=20",
    "safetensors>=0.5",
    "duckdb>=1.3",
    "webdataset>=1.0",
    "jsonargparse[signatures]>=4.40",
    "pyyaml>=6.0",
    "jinja2>=3.1",
    "psutil>=6.0",
    "tqdm>=4.66",
    "packaging>=24",
    "shtab>=1.7",
]
TRAIN = [  # several ranks, TensorBoard, and the plot of `dist-vasp benchmark`
    "deepspeed>=0.19,<0.20",  # the trunk reaches into its ZeRO optimizers
    "tensorboard>=2.18",
    "matplotlib>=3.9",
    "setuptools",  # deepspeed imports it
]
SERVE = ["fastapi>=0.115", "uvicorn>=0.30"]
# pyspark needs Java 17 or later, and pandas for the functions that run on batches
SPARK = ["pyspark>=4.0", "pandas>=2.2"]
DEV = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6",
    "httpx>=0.27",  # of FastAPI's test client
    "ruff>=0.11",
    "mypy>=1.15",
    "pandas>=3",
    "polars>=1.0",
    "pytrec_eval-terrier>=0.5.9",
    # For tests of the GPU kernels on CPUs; the interpreter of 3.6 fails with numpy 2.4.
    # torch's CUDA build brings its own version.
    "triton>=3.7; sys_platform == 'linux' and platform_machine == 'x86_64'",
    "types-PyYAML",
    "types-psutil",
    "types-tqdm",
]

VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "dist_vasp/versions.py").read_text(), re.M)
assert VERSION

setup(
    name="dist-vasp",
    version=VERSION[1],
    description="VASP and EASE recommenders with the exact items x items matrix over many devices",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The dist_vasp maintainers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["recommender systems", "collaborative filtering", "VASP", "EASE", "DeepSpeed"],
    project_urls={
        "VASP paper": "https://arxiv.org/abs/2102.05774",
        "EASE paper": "https://arxiv.org/abs/1905.03375",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[*find_packages(include=["dist_vasp*", "data_tools*"]), "dist_vasp.configs"],
    package_dir={"dist_vasp.configs": "configs"},
    package_data={
        "dist_vasp": ["py.typed"],
        "dist_vasp.report": ["templates/*"],
        "dist_vasp.configs": ["*.yaml"],
    },
    entry_points={"console_scripts": ["dist-vasp = dist_vasp.commands.program:main"]},
    install_requires=BASE,
    extras_require={
        "train": TRAIN,
        "serve": SERVE,
        "spark": SPARK,
        "dev": [*TRAIN, *SERVE, *DEV],
        "docs": ["mkdocs-material==9.8.2"],
    },
)

"""Packaging of dist_vasp: versions are pinned in constraints.txt, which `make` uses."""

from setuptools import find_packages, setup

setup(
    name="dist_vasp",
    version="0.1.0",
    description="VASP and EASE with the exact items x items matrix partitioned over devices",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dist_vasp*", "data_tools*", "launch"]),
    package_data={"dist_vasp.report": ["templates/*"]},
    entry_points={"console_scripts": ["dist-vasp = dist_vasp.commands.program:main"]},
    install_requires=[
        "torch==2.13.0",
        "deepspeed==0.19.8",
        "webdataset==1.0.2",
        "numpy>=2.0",
        "scipy>=1.14",
        "pyarrow>=20",
        "duckdb>=1.3",
        "safetensors>=0.5",
        "jsonargparse[signatures]>=4.40",
        "pyyaml>=6.0",
        "tensorboard>=2.18",
        "tqdm>=4.66",
        "psutil>=6.0",
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "packaging>=24",
        "setuptools",
    ],
    extras_require={
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "ruff>=0.11",
            "mypy>=1.15",
            "pandas>=3",
            "pytrec_eval-terrier>=0.5.9",
            # For tests of the GPU kernels on CPUs; the interpreter of 3.6 fails with numpy 2.4.
            # torch's CUDA build brings its own version.
            "triton>=3.7; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "types-PyYAML",
            "types-psutil",
            "types-tqdm",
        ],
        # pyspark needs Java 17 or later, and pandas for the functions that run on batches
        "spark": ["pyspark>=4.0", "pandas>=2.2"],
        "docs": ["mkdocs-material==9.8.2"],
    },
)

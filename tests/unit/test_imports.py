"""Imports go one way (DESIGN.md, section 8), and nothing is ever unpickled or evaluated."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from tests.support.paths import PYTHONPATH, ROOT

TABLES = {"dist_vasp.data.ids"} | {
    f"dist_vasp.data.tables.{name}"
    for name in (
        "columns",
        "csv_blocks",
        "csv_file",
        "csv_header",
        "csv_rows",
        "encodings",
        "inputs",
        "movielens",
        "options",
        "parquet_file",
        "read",
        "streams",
        "values",
    )
}  # import each other alone
BASE = TABLES | {
    "dist_vasp.require",
    "dist_vasp.extras",
    "dist_vasp.versions",
    "dist_vasp.turns",
    "dist_vasp.data.positives",
    "dist_vasp.data.role_columns",
    "dist_vasp.data.rows",
    "dist_vasp.data.hashing",
    "dist_vasp.data.block",
    "dist_vasp.data.manifest",
    "dist_vasp.data.shard",
    "dist_vasp.data.items",
    "dist_vasp.data.users",
    "dist_vasp.parallel.partition",
    "dist_vasp.parallel.network",
    "dist_vasp.parallel.launched",
    "dist_vasp.parallel.link",
    "dist_vasp.parallel.local_ranks",
    "dist_vasp.parallel.clock",
    "dist_vasp.parallel.liveness",
    "dist_vasp.parallel.secret",
    "dist_vasp.kernels.precision",
    "dist_vasp.kernels.latent",
    "dist_vasp.kernels.interface",
    "dist_vasp.kernels.compiled",
    "dist_vasp.kernels.cuda_latent",
    "dist_vasp.kernels.cuda_residual",
    "dist_vasp.kernels.cuda",
    "dist_vasp.kernels.triton_kernels",
    "dist_vasp.kernels.triton_rows",
    "dist_vasp.kernels.choose",
    "dist_vasp.places",
    "dist_vasp.recognise",
    "dist_vasp.locks",
    "dist_vasp.temporary",
    "dist_vasp.files",
    "dist_vasp.text",
    "dist_vasp.console",
    "dist_vasp.command_line",
    "dist_vasp.help_text",
    "dist_vasp.progress",
    "dist_vasp.failure",
    "dist_vasp.signals",
    "dist_vasp.bounded_json",
    "dist_vasp.tensor_file",
}  # import nothing of ours
ROOMS = [
    "parallel.comm",
    "parallel.agree",
    "parallel.start",
    "data",
    "kernels",
    "model",
    "config",
    "plan",
    "checkpoint",
    "ranking",
    "training",
    "recommender",
    "measure",
    "compare",
    "report",
    "doctor",
    "commands",
    "__main__",
]  # each imports itself, those before it and BASE
WITHIN_BASE = {
    "dist_vasp.kernels.interface": {"dist_vasp.kernels.latent", "dist_vasp.kernels.precision"},
    "dist_vasp.kernels.compiled": {"dist_vasp.kernels.interface"},
    "dist_vasp.kernels.cuda_residual": {"dist_vasp.kernels.interface"},
    "dist_vasp.kernels.cuda": {
        "dist_vasp.kernels.compiled",
        "dist_vasp.kernels.cuda_latent",
        "dist_vasp.kernels.cuda_residual",
        "dist_vasp.kernels.interface",
        "dist_vasp.kernels.triton_kernels",
        "dist_vasp.kernels.triton_rows",
    },
    "dist_vasp.kernels.triton_rows": {"dist_vasp.kernels.triton_kernels"},
    "dist_vasp.kernels.choose": {
        "dist_vasp.kernels.compiled",
        "dist_vasp.kernels.cuda",
        "dist_vasp.kernels.interface",
    },
    "dist_vasp.places": {"dist_vasp.recognise"},
    "dist_vasp.temporary": {"dist_vasp.places"},
    "dist_vasp.files": {"dist_vasp.locks", "dist_vasp.places", "dist_vasp.temporary"},
    "dist_vasp.command_line": {"dist_vasp.help_text"},
    "dist_vasp.console": {"dist_vasp.text"},
    "dist_vasp.parallel.local_ranks": {"dist_vasp.signals"},
    "dist_vasp.parallel.link": {"dist_vasp.parallel.secret", "dist_vasp.text"},
    "dist_vasp.parallel.liveness": {
        "dist_vasp.parallel.link",
        "dist_vasp.parallel.secret",
        "dist_vasp.text",
    },
    "dist_vasp.data.role_columns": {"dist_vasp.data.positives"},
    "dist_vasp.data.block": {"dist_vasp.data.rows"},
    "dist_vasp.data.manifest": {"dist_vasp.data.positives", "dist_vasp.bounded_json"},
    "dist_vasp.data.shard": {
        "dist_vasp.data.block",
        "dist_vasp.data.hashing",
        "dist_vasp.data.manifest",
    },
    "dist_vasp.data.items": {"dist_vasp.data.hashing", "dist_vasp.data.manifest"},
    "dist_vasp.data.users": {"dist_vasp.data.manifest"},
    "dist_vasp.tensor_file": {"dist_vasp.bounded_json"},
    "dist_vasp.failure": {
        "dist_vasp.extras",
        "dist_vasp.places",
        "dist_vasp.signals",
        "dist_vasp.text",
    },
}  # the only imports inside BASE
SHARED_WITH_TOOLS = {
    f"dist_vasp.{name}"
    for name in (
        "data.rows",
        "data.hashing",
        "data.block",
        "data.manifest",
        "data.shard",
        "data.items",
        "data.users",
        "data.positives",
        "data.role_columns",
        "files",
        "places",
        "text",
        "console",
        "signals",
        "command_line",
        "failure",
        "progress",
    )
}
FILES = sorted(
    p for top in ("dist_vasp", "data_tools", "launch") for p in (ROOT / top).rglob("*.py")
)
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES
}
ONLY_IMPORTERS = {
    "torch.distributed": ("dist_vasp.parallel.comm", "dist_vasp.parallel.start"),
    "deepspeed": ("dist_vasp.training.step.zero",),
}
PICKLES = ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")


def imported(tree: ast.AST) -> set[str]:
    """Every module that is imported, inside functions too, but not for types alone.

    `from package import module` names the module.
    """
    names = set()
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            both = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {
                name if name in MODULES or name in ONLY_IMPORTERS else node.module for name in both
            }
    return names


def level(module: str) -> int:
    """0 for BASE, then the room's place; launch on top, and the package, which offers what is below
    it."""
    if module in BASE:
        return 0
    if module == "dist_vasp":
        return 1 + ROOMS.index("doctor")
    if module.split(".")[0] == "launch":
        return 1 + len(ROOMS)
    return 1 + next(
        i for i, room in enumerate(ROOMS) if f"{module}.".startswith(f"dist_vasp.{room}.")
    )


def within(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def allowed(importer: str, name: str) -> bool:
    if importer in TABLES:
        return name in TABLES
    if importer in BASE:
        return name in WITHIN_BASE.get(importer, ())
    if within(importer, "data_tools"):
        return name in SHARED_WITH_TOOLS or name in TABLES or within(name, "data_tools")
    if within(name, "data_tools"):
        return importer == "dist_vasp.commands.demo"
    if within(importer, "launch"):
        return within(name, "dist_vasp.commands")
    return level(name) == 0 or level(name) <= level(importer)


@pytest.mark.parametrize("module", [m for m, path in MODULES.items() if path.stat().st_size])
def test_imports_go_one_way(module):
    names = imported(ast.parse(MODULES[module].read_text()))
    ours = {
        name
        for name in names
        if name.split(".")[0] in ("dist_vasp", "data_tools", "launch", "tests", "benchmarks")
    }
    wrong = {name for name in ours if name not in MODULES or not allowed(module, name)}
    assert not wrong, f"{module} must not import {sorted(wrong)}"
    for package, only in ONLY_IMPORTERS.items():
        assert module in only or not any(within(name, package) for name in names), (
            f"only {only} may import {package}"
        )
    assert not any(within(name, p) for name in names for p in PICKLES), f"{module} imports a pickle"


@pytest.mark.parametrize("module", [m for m, path in MODULES.items() if path.stat().st_size])
def test_nothing_is_unpickled_or_evaluated(module):
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in (
                "eval",
                "exec",
                "torch.load",
                "__import__",
                "builtins.eval",
                "builtins.exec",
            ), called
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle":
                    assert (
                        isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                    ), ast.unparse(node)
        if isinstance(node, ast.Attribute) and module not in ONLY_IMPORTERS["torch.distributed"]:
            assert ast.unparse(node) != "torch.distributed"


def test_every_package_init_is_empty():
    for path in FILES:
        if path.name == "__init__.py" and path.parent.name != "dist_vasp":
            assert not path.read_text().strip(), path


def test_the_package_loads_nothing_until_asked_and_never_deepspeed():
    """`from dist_vasp import Recommender` is for a server: no trainer, no launcher."""
    lazy = "import sys, dist_vasp; assert 'torch' not in sys.modules; "
    asked = (
        "from dist_vasp import Recommender; bad = {'deepspeed', "
        "'dist_vasp.training', 'data_tools'} & set(sys.modules); assert not bad, bad"
    )
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    done = subprocess.run(
        [sys.executable, "-c", lazy + asked],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(ImportError, match="cannot import name 'Trainer'"):
        from dist_vasp import Trainer  # noqa: F401


def test_benchmarks_compute_as_a_user_would():
    """Nothing that they import from tests chooses Triton's interpreter, or one thread."""
    names = {"TRITON_INTERPRET", "OMP_NUM_THREADS"}
    code = f"import os, benchmarks.step; assert not {names!r} & os.environ.keys()"
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_an_optimizer_does_not_load_the_compiler_of_torch():
    """It takes a second of every start, and one GPU does without it."""
    code = (
        "import sys, torch; from dist_vasp.config.schema import OptimizerConfig; "
        "from dist_vasp.training.step.optimizer import InPlaceAdam; "
        "InPlaceAdam([torch.zeros(1)], OptimizerConfig()); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

"""The package: one version, configurations that are found by name, extras that are named."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

import dist_vasp
from dist_vasp import extras
from dist_vasp.config import shipped
from dist_vasp.config.command_line import make_parser, parse
from dist_vasp.failure import failure_of
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def metadata(tmp_path_factory) -> dict:
    """What setup.py hands to setuptools."""
    found: dict = {}
    code = (
        (ROOT / "setup.py").read_text().replace("from setuptools import find_packages, setup", "")
    )
    names = {
        "__file__": str(ROOT / "setup.py"),
        "setup": lambda **given: found.update(given),
        "find_packages": lambda include: include,
    }
    exec(compile(code, "setup.py", "exec"), names)
    return found


def test_there_is_one_version(metadata):
    assert metadata["version"] == dist_vasp.__version__
    written = [
        path.name
        for path in ROOT.rglob("*.*")
        if path.suffix in (".py", ".toml", ".cff")
        and ".venv" not in path.parts
        and f'"{dist_vasp.__version__}"' in path.read_text()
    ]
    assert written == ["versions.py"]


def test_what_is_installed(metadata):
    assert not [name for name in metadata["packages"] if name.startswith(("launch", "tests"))]
    assert metadata["package_dir"] == {"dist_vasp.configs": "configs"}
    wanted = metadata["install_requires"]
    assert not [text for text in wanted if "==" in text], "ranges; constraints.txt pins"
    extra = metadata["extras_require"]
    assert set(extra["train"]) | set(extra["serve"]) <= set(extra["dev"])
    pinned = (ROOT / "constraints.txt").read_text().lower().replace("_", "-")
    for text in [*wanted, *extra["dev"], *extra["spark"]]:
        name = re.match(r"[\w-]+", text)[0].lower().replace("_", "-")
        if name != "setuptools":
            assert f"\n{name}==" in pinned, f"constraints.txt does not pin {name}"


def test_a_shipped_configuration_is_found_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert set(shipped.shipped_configs()) == whole
    for name in ("ml-1m", "ml-1m.yaml", "configs/ml-1m.yaml"):
        config, _ = parse(make_parser("train.py", ""), ["--config", name])
        assert config.model.kind == "vasp"
        assert f"{name} is not here; using {ROOT / 'configs' / 'ml-1m.yaml'}" in (
            capsys.readouterr().err
        )
    Path("ml-1m.yaml").write_text(yaml.safe_dump({"model": {"kind": "ease"}}))
    assert parse(make_parser("train.py", ""), ["--config", "ml-1m.yaml"])[0].model.kind == "ease"
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match=r"elsewhere/ml-1m\.yaml cannot be read"):
        parse(make_parser("train.py", ""), ["--config", "elsewhere/ml-1m.yaml"])


def test_a_missing_extra_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError) as raised:
        extras.require_library("deepspeed", "training on 2 ranks")
    assert str(raised.value) == (
        "training on 2 ranks needs deepspeed, which is not installed; "
        'pip install "dist-vasp[train]"'
    )
    failure = failure_of(ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn"))
    assert (failure.status, failure.is_bug) == (2, False)
    assert failure.text == 'uvicorn is not installed; pip install "dist-vasp[serve]"'
    assert failure_of(ModuleNotFoundError("No module named 'x'", name="x")).is_bug

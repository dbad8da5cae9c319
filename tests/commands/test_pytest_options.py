"""The options of the test suite, given as CONTRIBUTING.md says."""

import subprocess
import sys

import pytest

from tests.support.paths import ROOT


def run_pytest(*arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_folder_of_real_data(tmp_path):
    """Without a test named: the markers come from pyproject.toml, so pytest has found the
    project."""
    assert "`pytest --data=DIR`" in (ROOT / "CONTRIBUTING.md").read_text()
    assert "@pytest.mark.data" in run_pytest(f"--data={tmp_path}", "--markers")


@pytest.mark.slow
def test_tests_of_real_data_are_skipped_without_it(tmp_path):
    told = run_pytest(
        f"--data={tmp_path}", "-rs", "-m", "data", "tests/unit/data_tools/test_split.py"
    )
    assert f"no real data under {tmp_path}; pass --data=DIR" in told

"""The helps of all commands, and how options are called."""

from __future__ import annotations

import importlib
import re
import subprocess

import pytest
import shtab

from dist_vasp.command_line import as_last_word, did_you_mean
from dist_vasp.commands import completion, program
from dist_vasp.config.parser_errors import known_keys


def help_of(name: str, monkeypatch, subcommand: bool = True):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", [f"dist-vasp {name}" if subcommand else f"launch/{name}.py"])
    return importlib.import_module(program.parser_of(name)).parser()


@pytest.mark.parametrize("name", sorted(program.COMMANDS))
def test_a_help_is_short_and_the_other_one_whole(name, monkeypatch):
    parser = help_of(name, monkeypatch)
    short, whole = parser.format_help(), parser.whole_help()
    assert len(short.splitlines()) <= 40, short
    assert short.startswith(f"usage: dist-vasp {name} ")
    assert "--help-all" in short
    shown = set(re.findall(r"^  (?:-\w, )?(--[\w.-]+)", short, re.M))
    every = set(re.findall(r"--[\w.-]+\b", whole))
    assert {"--help", "--help-all"} < shown <= every
    for option in ("--local_rank", "--job", "--round_trip"):
        assert option not in short, "options that are not for users"


@pytest.mark.parametrize("name", ["train", "plan", "benchmark", "doctor"])
def test_keys_are_left_to_the_other_help(name, monkeypatch):
    parser = help_of(name, monkeypatch)
    assert not [key for key in known_keys() if f"  --{key} " in parser.format_help() and "." in key]
    assert all(f"--{key} " in parser.whole_help() for key in known_keys())


def test_ranks_are_an_option_of_the_program_alone(monkeypatch):
    for name in ("train", "evaluate", "recommend"):
        assert "--ranks N" in help_of(name, monkeypatch).format_help()
        script = help_of(name, monkeypatch, subcommand=False).format_help()
        assert "--ranks" not in script and script.startswith(f"usage: launch/{name}.py")


def test_a_suggestion_is_not_what_was_typed():
    assert did_you_mean("--outptu", ["--output", "--out"]) == ", did you mean --output?"
    assert did_you_mean("--output", ["--output", "--outputs"]) == ""
    assert did_you_mean("run.seeds", known_keys()) == ", did you mean run.seed?"
    assert all(did_you_mean(key, known_keys()) == "" for key in known_keys())


def test_a_positional_argument_has_a_name_too():
    assert as_last_word(["a", "--output", "b", "--k", "3"], "--output") == ["a", "--k", "3", "b"]
    assert as_last_word(["--output=b", "a"], "--output") == ["a", "b"]
    assert as_last_word(["a", "b"], "--output") == ["a", "b"]
    assert as_last_word(["a", "--output"], "--output") == ["a", "--output"]


def test_the_completion_knows_every_command_and_option():
    """The script is bash that defines words; a shell is not needed to make it."""
    script = shtab.complete(completion._whole_program(), "bash")
    for name in program.COMMANDS:
        assert f"_shtab_dist_vasp_{name}_option_strings=" in script
    assert "--run.seed" in script and "--histories" in script
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")

"""The configuration that trains a run's best model again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from dist_vasp.checkpoint.header import Header, Position
from dist_vasp.commands.configs import main
from dist_vasp.config.command_line import from_dict, load
from dist_vasp.config.schema import SearchConfig, Stage
from dist_vasp.training.again import settled
from tests.support.runs import write_run

STAGES = [Stage(3, 0.1), Stage(2, 0.01), Stage(4, 0.001)]


def header(config: dict, position: Position) -> Header:
    return Header(
        position=position,
        config=asdict(from_dict(config)),
        must_match={},
        vocabulary_sha256="v",
        shards_sha256="s",
        n_items=5,
        optimizer={},
    )


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(1, [Stage(1, 0.1)]), (3, STAGES[:1]), (4, [STAGES[0], Stage(1, 0.01)]), (9, STAGES)],
)
def test_a_training_has_the_epochs_of_its_best_checkpoint(epoch, expected):
    raw = {
        "data": {"shards": "old"},
        "optimizer": {"schedule": [asdict(stage) for stage in STAGES]},
        "run": {"dir": "old", "max_steps": 70, "seed": 3},
    }
    found = settled(header(raw, Position(epoch, 0, epoch * 7)))
    assert found.optimizer.schedule == expected
    assert (found.data.shards, found.run.dir, found.run.max_steps, found.run.seed) == ("", "", 0, 3)
    within = settled(header(raw, Position(epoch, 2, epoch * 7 + 2)))
    assert within.optimizer.schedule == STAGES and within.run.max_steps == epoch * 7 + 2


def test_a_closed_form_has_the_keys_that_were_chosen():
    raw = {
        "model": {"kind": "ease", "ease_lambda": 20.0, "ease_xi": 0.3},
        "search": {
            "ease_lambda": [20.0, 10.0],
            "ease_xi": [0.0, 0.3],
            "rule": "one_standard_error",
        },
    }
    found = settled(header(raw, Position(0, 0, 3)))
    assert found.search == SearchConfig()
    assert (found.model.ease_lambda, found.model.ease_xi) == (20.0, 0.3)


def test_the_command_writes_it(tmp_path, capsys):
    run, output = tmp_path / "run", tmp_path / "final.yaml"
    write_run(run, [1, 2, 3, 4, 5], "vasp", 1)
    main([str(run)])
    printed = capsys.readouterr().out
    assert printed.startswith(f"# The model of {run}, checkpoint best-00000001, with nothing left")
    main([str(run), "--output", str(output)])
    assert output.read_text() == printed
    assert f"{output}: the model of {run}" in capsys.readouterr().out
    config = load(output)
    assert (config.data.shards, config.run.dir, config.run.max_steps) == ("", "", 1)
    with pytest.raises(ValueError, match="exists"):
        main([str(run), "--output", str(output)])


@pytest.mark.parametrize("name", ["no-such-thing", "empty"])
def test_what_is_neither_is_an_error(tmp_path: Path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    expected = {
        "no-such-thing": "no-such-thing is neither a configuration nor the folder of a run",
        "empty": "empty holds no checkpoint; name the run.dir",
    }
    with pytest.raises(ValueError, match=expected[name]):
        main([name])

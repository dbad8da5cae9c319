"""Configuration files and command lines, and the sentence that each mistake gives."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import re
import textwrap
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from dist_vasp.config.command_line import from_dict, load, make_parser, parse
from dist_vasp.config.parser_errors import known_keys
from dist_vasp.config.schema import Config, LossConfig, ModelConfig, OptimizerConfig, Stage
from tests.support.paths import ROOT


def command_line(*argv: str) -> Config:
    return parse(make_parser("test", "a test"), argv)[0]


def refused(tmp_path: Path, key: str, value: str) -> list[str]:
    """The messages for `key: value` (YAML) in a file, on the command line and in a checkpoint's
    header."""
    nested = yaml.safe_load(value)
    for part in reversed(key.split(".")):
        nested = {part: nested}
    file = tmp_path / "mistake.yaml"
    file.write_text(yaml.safe_dump(nested))
    messages = []
    for attempt in (
        lambda: load(file),
        lambda: command_line(f"--{key}={value}"),
        lambda: from_dict(nested),
    ):
        with pytest.raises(ValueError) as error:
            attempt()
        messages.append(str(error.value))
    return messages


# --- what is accepted -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_file_under_configs_loads(path):
    sections = {f.name for f in fields(Config)}
    if not set(yaml.safe_load(path.read_text())) <= sections:
        pytest.skip("not the configuration of one training run")
    config = load(path)
    assert config.data.shards and config.run.dir
    header = re.findall(r"^# [A-Z]\w+(?=:)", path.read_text(), re.M)
    assert header[:4] == [
        "# Purpose",
        "# Hardware",
        "# Time",
        "# Expected",
    ]


def test_defaults_are_the_papers():
    config = command_line()
    assert config == Config()
    assert (
        config.model.hidden,
        config.model.latent,
        config.model.encoder_layers,
        config.model.decoder_layers,
    ) == (
        4096,
        2048,
        7,
        5,
    )
    assert (config.loss.alpha, config.loss.gamma, config.loss.kl_weight) == (0.25, 2.0, 1.0)
    assert (config.data.batch_size, config.parallel.lanes, config.parallel.zero_stage) == (
        1024,
        48,
        1,
    )
    assert config.optimizer.schedule == [Stage(50, 5e-5), Stage(20, 1e-5), Stage(20, 1e-6)]
    assert config.epochs == 90


OF_PURESVD = tuple(f"search.svd_{name}" for name in ("rank", "user_exponent", "item_exponent"))
REFUSED = (*OF_PURESVD, "model.neighbours")
"""Keys that ease refuses, the last one beside data.auxiliary."""
CHANGED = {
    "data": {
        "shards": "a folder/ü",
        "auxiliary": "views",
        "batch_size": 77,
        "halves": False,
        "input_dropout": 0.2,
        "ratings": True,
        "workers": 0,
    },
    "model": {
        "kind": "ease",  # takes every key, because it uses hardly any
        "hidden": 5,
        "latent": 3,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "latent_head": False,
        "ease_lambda": 7.0,
        "ease_dtype": "fp64",
        "ease_dropout": 0.4,
        "ease_user_exponent": -0.5,
        "ease_item_exponent": -0.3,
        "ease_lambda_exponent": 0.7,
        "ease_auxiliary": 0.5,
        "ease_xi": 0.1,
        "init_from_ease": "runs/ease",
        "neighbours": 0,
        "nease_scale": 8.0,
        "nease_offset": -8.0,
        "nease": "apart",
        "autorec_encoder": "identity",
        "recvae_encoder_epochs": 2,
        "recvae_decoder_epochs": 4,
        "svd_rank": 9,
        "svd_user_exponent": -1.0,
        "svd_item_exponent": -0.5,
        "svd_iterations": 3,
    },
    "search": {
        "rule": "one_standard_error",
        "ease_user_exponent": [0.0, -0.5],
        "ease_item_exponent": [0.1],
        "ease_lambda_exponent": [0.2],
        "ease_dropout": [0.3],
        "ease_xi": [0.4],
        "ease_auxiliary": [0.25],
        "ease_lambda": [5.0, 6.0],
        "svd_rank": [],
        "svd_user_exponent": [],
        "svd_item_exponent": [],
    },
    "loss": {
        "kind": "multinomial",
        "alpha": 0.5,
        "gamma": 1.5,
        "kl_weight": 0.1,
        "kl_anneal_steps": 9,
    },
    "optimizer": {
        "name": "adamw",
        "beta1": 0.8,
        "beta2": 0.99,
        "eps": 1e-9,
        "momentum_decay": 0.0,
        "item_state": "lean",
        "weight_decay": 0.01,
        "nease_lr": 0.1,
        "nease_decay": 0.5,
        "l2": 0.01,
        "clip_norm": 1.0,
        "accumulation": 3,
        "reset_on_stage": True,
        "schedule": [{"epochs": 2, "lr": 1e-3}, {"epochs": 1, "lr": 0.0}],
    },
    "parallel": {
        "partitions": 2,
        "replicas": 3,
        "zero_stage": 3,
        "lanes": 12,
        "block_columns": 64,
        "precision": "bf16",
        "trunk_dtype": "bf16",
        "compile": "never",
        "interface": "eth0",
    },
    "run": {
        "dir": "runs/x",
        "seed": 9,
        "max_steps": 5,
        "checkpoint_every_steps": 7,
        "keep": 1,
        "evaluate_every_epochs": 0,
        "recall_denominator": "held_out",
        "metrics": "hr@10,gini@5",
        "best_by": "map@10",
        "wandb": "films",
        "mlflow": "mlruns",
    },
    "device": "cpu",
}


def test_round_trips(tmp_path):
    before = copy.deepcopy(CHANGED)
    changed = from_dict(CHANGED)
    assert asdict(changed) == CHANGED == before
    for key in known_keys():
        section, _, name = key.rpartition(".")
        default, now = (
            getattr(getattr(c, section) if section else c, name) for c in (Config(), changed)
        )
        assert default != now or key in REFUSED, f"{key} was not changed"
    file = tmp_path / "run.yaml"
    for config in (Config(), changed):
        file.write_text(config.to_yaml(), encoding="utf-8")
        assert load(file) == config
        assert from_dict(asdict(config)) == config
        assert from_dict(yaml.safe_load(config.to_yaml())) == config


def test_the_command_line_wins_over_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {hidden: 8, latent: 4}\noptimizer:\n  schedule:\n  - {epochs: 2, lr: 1.0e-3}\n"
    )
    config = command_line(
        f"--config={file}",
        "--model.latent",
        "5",
        "--optimizer.schedule=[{epochs: 7, lr: 0.5}]",
        "--device",
        "cpu",
    )
    assert (config.model.hidden, config.model.latent) == (8, 5)
    assert config.optimizer.schedule == [Stage(7, 0.5)]
    assert config.device == "cpu"
    assert command_line("--local_rank=3") == Config()  # the deepspeed launcher adds it


def test_the_weight_of_the_kl_rises_linearly_to_its_end():
    risen = LossConfig(kl_weight=0.2, kl_anneal_steps=4)
    assert [risen.kl_weight_at(step) for step in (0, 1, 2, 4, 9)] == [0.0, 0.05, 0.1, 0.2, 0.2]
    assert [LossConfig(kl_weight=0.3).kl_weight_at(step) for step in (0, 1)] == [0.3, 0.3]


def test_halves_follow_the_model_unless_said_otherwise():
    assert [command_line(f"--model.kind={kind}").halves for kind in ("vasp", "flvae", "nease")] == [
        True,
        True,
        False,
    ]
    for kind in ("multvae", "recvae"):
        assert not command_line(f"--model.kind={kind}", "--loss.kind=multinomial").halves
    assert command_line("--model.kind=nease", "--data.halves=true").halves is True
    assert command_line("--data.halves=false").halves is False
    assert command_line("--data.halves=null").halves is True


def test_schedule():
    config = Config(
        optimizer=OptimizerConfig(schedule=[Stage(2, 0.1), Stage(1, 0.2), Stage(3, 0.3)])
    )
    assert config.epochs == 6
    assert [config.lr(epoch) for epoch in range(8)] == [0.1, 0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3]
    assert [config.stage(epoch) for epoch in range(8)] == [0, 0, 1, 2, 2, 2, 2, 2]


def test_nothing_can_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().device = "cpu"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().hidden = 1  # type: ignore[misc]


# --- --help ---------------------------------------------------------------------------------------


def field_docstrings(cls: type) -> dict[str, str | None]:
    """The string that follows each field of a class and of its bases."""
    meanings: dict[str, str | None] = {}
    for base in [base for base in cls.__mro__ if is_dataclass(base)]:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                documented = isinstance(following, ast.Expr) and isinstance(
                    following.value, ast.Constant
                )
                text = str(following.value.value) if documented else None
                meanings[statement.target.id] = text
    return meanings


def test_help_lists_every_key_with_its_meaning(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    text = " ".join(make_parser("test", "a test").whole_help().split())
    assert all(field_docstrings(Stage).values())
    for section in fields(Config):
        maker = section.default_factory
        for f in fields(maker) if is_dataclass(maker) else [section]:
            key = f"{section.name}.{f.name}" if is_dataclass(maker) else f.name
            meaning = field_docstrings(maker if is_dataclass(maker) else Config)[f.name]
            meaning = " ".join((meaning or "").split())
            assert meaning, f"{key} has no docstring"
            assert re.search(rf"--{re.escape(key)}[ ,]", text), f"{key} is not in --help"
            place = [m.start() for m in re.finditer(rf" --{re.escape(key)}[ ,]", text)][-1]
            entry = text[place : text.index("default: ", place) + 9]
            assert entry.count(" --") == 1 + (f" --{key}+ " in entry), (
                f"--help lacks type or default of {key}"
            )
            assert meaning.rstrip(".") in entry, f"--help gives {key} another meaning"
            assert "type: " in entry


def test_known_keys_are_the_fields():
    assert known_keys() == [
        key
        for name, value in asdict(Config()).items()
        for key in ([f"{name}.{k}" for k in value] if isinstance(value, dict) else [name])
    ]


# --- what is refused: every message names key, value, what was expected and what to do ------------


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("model.hiden", "4", "model.hidden"),
        ("modle.hidden", "4", "model.hidden"),
        ("run.seeds", "4", "run.seed"),
        ("devise", "cpu", "device"),
        ("data.zzzzzzzz", "4", None),
    ],
)
def test_unknown_key(tmp_path, key, value, meant):
    for message in refused(tmp_path, key, value):
        assert message.startswith(f"{key} is not a key of the configuration; ")
        assert (f"did you mean {meant}?" in message) == (meant is not None)
        assert "--help" in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.hidden", "four", "a whole number"),
        ("model.hidden", "2.5", "a whole number"),
        ("data.batch_size", "true", "a whole number"),
        ("data.halves", "maybe", "true, false or null"),
        ("model.latent_head", "3", "true or false"),
        ("loss.alpha", "some", "a number"),
        ("loss.gamma", ".nan", ""),
        ("loss.alpha", ".nan", ""),
        ("optimizer.eps", ".nan", ""),
        ("optimizer.clip_norm", ".inf", ""),
        ("loss.gamma", ".inf", ""),
        ("optimizer.schedule", "[{epochs: 3, lr: .nan}]", ""),
        ("optimizer.schedule", "5", "list"),
        ("optimizer.schedule", "[{epochs: many, lr: 0.1}]", "a whole number"),
        ("optimizer.schedule", "[{epochs: 3}]", "lr"),
        ("model.kind", "vase", "'vasp', 'wide_deep', 'flvae', 'multvae'"),
        ("optimizer.name", "sgd", "'nadam', 'adam', 'adamw'"),
        ("loss.kind", "hinge", "'focal', 'cosine', 'mse', 'bce', 'multinomial'"),
        ("parallel.precision", "fp8", "'fp32', 'tf32', 'bf16'"),
    ],
)
def test_wrong_type_or_choice(tmp_path, key, value, expected):
    for message in refused(tmp_path, key, value):
        assert key in message
        assert expected in message
        assert "; " in message
        assert "\n" not in message and "object at 0x" not in message
        if value[0] not in "[.":
            assert str(yaml.safe_load(value)) in message


@pytest.mark.parametrize(
    "key", ["data.batch_size", "model.kind", "loss.alpha", "optimizer.schedule", "run.keep"]
)
def test_null_is_not_a_value(tmp_path, key):
    for message in refused(tmp_path, key, "null"):
        assert key in message
        assert "None" in message or "null" in message or "Expected" in message


@pytest.mark.slow
def test_null_is_refused_for_every_key():
    for name in known_keys():
        section, _, field = name.rpartition(".")
        if name == "data.halves":
            continue
        with pytest.raises(ValueError, match=f"{name} is None, expected"):
            from_dict({section: {field: None}} if section else {field: None})


@pytest.mark.parametrize("value", ["3", "null", "[1, 2]", "text"])
def test_a_section_is_a_section(tmp_path, value):
    file = tmp_path / "mistake.yaml"
    file.write_text(f"model: {value}\n")
    for attempt in (lambda: load(file), lambda: from_dict({"model": yaml.safe_load(value)})):
        with pytest.raises(ValueError, match="model") as error:
            attempt()
        assert "object at 0x" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["a: b: c\n", "model: [\n", "- 1\n", "\t- x\n", "!!python/object/apply:os.getcwd []\n", "\x00"],
)
def test_a_file_that_is_no_configuration(tmp_path, text):
    file = tmp_path / "mistake.yaml"
    file.write_text(text)
    with pytest.raises(
        ValueError,
        match=r"mistake\.yaml.*; expected .*configuration|mistake\.yaml holds .*, "
        r"expected sections with keys",
    ):
        load(file)
    with pytest.raises(ValueError, match=r"missing\.yaml"):
        load(tmp_path / "missing.yaml")
    with pytest.raises(ValueError, match=r"config"):
        load(tmp_path)


IMPOSSIBLE = [
    (
        {"model.kind": "vasp", "loss.kind": "cosine"},
        "loss.kind is 'cosine', expected one of focal for model.kind vasp",
    ),
    (
        {"model.kind": "flvae", "loss.kind": "mse"},
        "loss.kind is 'mse', expected one of focal, multinomial for model.kind flvae",
    ),
    (
        {"model.kind": "nease", "loss.kind": "multinomial"},
        "loss.kind is 'multinomial', expected one of focal, cosine, mse, bce",
    ),
    (
        {"optimizer.weight_decay": 0.1},
        "optimizer.weight_decay is 0.1, expected 0 with nadam; use optimizer.name adamw",
    ),
    (
        {"data.batch_size": 47},
        "parallel.lanes is 48, expected at most data.batch_size = 47; lower it or raise the batch",
    ),
    ({"parallel.zero_stage": 4}, "parallel.zero_stage is 4, expected 0, 1, 2 or 3"),
    (
        {"parallel.precision": "fp32", "parallel.trunk_dtype": "bf16"},
        "parallel.trunk_dtype is 'bf16', expected fp32, as parallel.precision says",
    ),
    ({"device": "tpu"}, "device is 'tpu', expected auto, cuda or cpu"),
    (
        {"optimizer.schedule": []},
        "optimizer.schedule is [], expected at least one {epochs, lr}; add a stage",
    ),
    (
        {"optimizer.schedule": [{"epochs": 0, "lr": 0.1}]},
        "optimizer.schedule[0].epochs is 0, expected at least 1",
    ),
    (
        {"optimizer.schedule": [{"epochs": 1, "lr": 0.1}, {"epochs": 1, "lr": -1.0}]},
        "optimizer.schedule[1].lr is -1.0, expected",
    ),
    ({"optimizer.beta1": 1.0}, "optimizer.beta1 is 1.0, expected 0 <= beta < 1"),
    ({"optimizer.beta2": -0.1}, "optimizer.beta2 is -0.1, expected 0 <= beta < 1"),
    ({"optimizer.eps": 0.0}, "optimizer.eps is 0.0, expected a positive number"),
    ({"loss.alpha": 1.5}, "loss.alpha is 1.5, expected 0 to 1"),
    ({"run.seed": 1 << 63}, f"run.seed is {1 << 63}, expected less than 2^63"),
    *[
        ({key: 0}, f"{key} is 0, expected at least 1")
        for key in (
            "data.batch_size",
            "model.hidden",
            "model.latent",
            "model.encoder_layers",
            "model.decoder_layers",
            "optimizer.accumulation",
            "parallel.replicas",
            "parallel.lanes",
            "run.keep",
        )
    ],
    *[
        ({key: -1}, f"{key} is -1")
        for key in (
            "data.workers",
            "loss.gamma",
            "loss.kl_weight",
            "optimizer.momentum_decay",
            "optimizer.weight_decay",
            "optimizer.clip_norm",
            "parallel.partitions",
            "run.seed",
            "run.max_steps",
            "run.checkpoint_every_steps",
            "run.evaluate_every_epochs",
        )
    ],
]


@pytest.mark.parametrize(
    ("changes", "message"), IMPOSSIBLE, ids=[" ".join(changes) for changes, _ in IMPOSSIBLE]
)
def test_impossible_values_and_combinations(changes, message):
    raw: dict = {}
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (raw.setdefault(section, {}) if section else raw)[name] = value
    with pytest.raises(ValueError) as error:
        from_dict(raw)
    assert message in str(error.value)
    assert "; " in str(error.value), "it does not say what to do"


def test_unknown_arguments_and_missing_values():
    for argv, words in (
        (["stray"], "stray"),
        (["--model.hidden"], "--model.hidden"),
        (["--optimizer.schedule[0].lr", "3"], "optimizer.schedule[0].lr is not a key"),
        (["--config"], "--config"),
    ):
        with pytest.raises(ValueError) as error:
            command_line(*argv)
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model:\n  hidden: 8\n  hidden: 16\n",
            r"mistake\.yaml: model\.hidden is there twice, in line 2 and in line "
            r"3; keep one of them",
        ),
        (
            "model: {hidden: 8}\nloss: {}\nmodel: {latent: 4}\n",
            r"model is there twice, in line 1 and in line 3",
        ),
        (
            "optimizer:\n  schedule:\n  - {epochs: 1, lr: 0.1, epochs: 2}\n",
            r"optimizer\.schedule\[0\]\.epochs is there twice",
        ),
    ],
)
def test_a_key_that_is_there_twice(tmp_path, text, message):
    file = tmp_path / "mistake.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(file)


def test_an_alias_is_not_a_key_that_is_there_twice(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("optimizer:\n  schedule:\n  - &stage {epochs: 1, lr: 0.1}\n  - *stage\n")
    assert len(load(file).optimizer.schedule) == 2

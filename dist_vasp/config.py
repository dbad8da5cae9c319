"""The configuration of a run: frozen dataclasses, read by jsonargparse.

`parse` reads YAML and the command line. ValueError names the key, what was received, what was
expected and how to fix it. Impossible combinations are errors here, before anything is built.
"""

from __future__ import annotations

import copy
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings

from dist_vasp.bounded_json import DEEPEST, read_bytes
from dist_vasp.model.registry import KINDS, ModelKeys, OptimizerKeys, kind_of
from dist_vasp.require import require

set_parsing_settings(docstring_parse_attribute_docstrings=True)


LARGEST_YAML = 256 << 10  # bytes of a configuration
MOST_VALUES = 20_000  # that a configuration stands for, aliases written out
_LONGEST_WORD = 100  # of a choice or a number that is given as text


@dataclass(frozen=True)
class Stage:
    """A stretch of the learning-rate schedule."""

    epochs: int
    """Epochs at this rate."""
    lr: float
    """Learning rate."""


@dataclass(frozen=True)
class DataConfig:
    """data: what is read, and how."""

    shards: str = ""
    """Folder that `python -m data_tools.shard` wrote."""
    batch_size: int = 1024
    """Users per optimizer step over all ranks; with halves each user gives two rows."""
    halves: bool | None = None
    """Split each user's items anew every epoch into halves that predict each other; null: yes,
    except for model.kind nease."""
    input_dropout: float = 0.0
    """Share of the inputs' interactions that is left out, drawn anew every epoch; targets keep all
    of theirs."""
    workers: int = 1
    """Loader processes per rank that run ahead of training; 0 loads in the training process."""


@dataclass(frozen=True)
class ModelKind:
    """The key of `model` that all kinds share."""

    kind: Literal[tuple(KINDS)] = "vasp"  # type: ignore[valid-type]
    """vasp multiplies flvae and nease, which also train alone; wide_deep adds their logits; ease is
    the closed form and uses neither loss nor optimizer."""


@dataclass(frozen=True)
class ModelConfig(ModelKeys, ModelKind):
    """model: its kind, and the keys of the kinds."""


@dataclass(frozen=True)
class LossConfig:
    """loss: what is minimised."""

    kind: Literal["focal", "cosine", "mse", "bce", "multinomial"] = "focal"
    """focal for every model; cosine, mse, bce for nease; multinomial for flvae."""
    alpha: float = 0.25
    """Focal weight of the ones; the zeros weigh 1 - alpha."""
    gamma: float = 2.0
    """Focal exponent."""
    kl_weight: float = 1.0
    """Weight of the KL divergence (mean over rows and latent dimensions)."""


@dataclass(frozen=True)
class UpdateRule:
    """The keys of `optimizer` that all kinds share."""

    name: Literal["nadam", "adam", "adamw"] = "nadam"
    """Update rule."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-7
    """Added to the root of the second moment."""
    momentum_decay: float = 4e-3
    """Nadam's momentum decay."""
    item_state: Literal["full", "lean"] = "full"
    """Second moments of the item matrices: one per weight, or (lean) one per row, which costs next
    to no memory."""
    weight_decay: float = 0.0
    """Decoupled weight decay; adamw only."""
    clip_norm: float = 0.0
    """Largest joint gradient norm of trunk and item matrices; 0 does not clip."""
    accumulation: int = 1
    """Micro-batches per optimizer step; changes memory, not the result."""
    reset_on_stage: bool = False
    """Forget the moments where the learning rate changes, as the authors' code does."""
    schedule: list[Stage] = field(
        default_factory=lambda: [Stage(50, 5e-5), Stage(20, 1e-5), Stage(20, 1e-6)]
    )
    """Stages of the learning rate; their epochs add up to the run."""


@dataclass(frozen=True)
class OptimizerConfig(OptimizerKeys, UpdateRule):
    """optimizer: one update rule for the trunk and the item matrices."""


@dataclass(frozen=True)
class ParallelConfig:
    """parallel: how ranks share the work; changes speed and memory, not the result."""

    partitions: int = 0
    """Ranks that share one copy of the item matrices; 0: all ranks of a replica."""
    replicas: int = 1
    """Copies of the item matrices."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage of the trunk, 0 to 3: what of it is partitioned over all ranks."""
    lanes: int = 48
    """Reading lanes: a multiple of the number of ranks, at most batch_size.

    Part of the order of users: keep it when resuming.
    """
    block_columns: int = 0
    """Items of a block of the output side, which is made, used and dropped before the next; 0: 256
    on a CPU, 2048 on a GPU."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Compile the loss and the update with torch.compile (needs g++ on a CPU); auto: where a rank
    holds 4M item weights or more."""
    trunk_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the trunk; bf16 at stages 1 to 3.

    Item matrices, logits and losses are always fp32.
    """
    interface: str = ""
    """Network interface of gloo and NCCL; empty: the loopback on one machine, else the libraries'
    choice."""


@dataclass(frozen=True)
class RunConfig:
    """run: where results go and how often."""

    dir: str = ""
    """Folder of the run: metrics, checkpoints, result.json.

    A run that stopped goes on from here.
    """
    seed: int = 0
    """Seed of initialisation, order, halves and noise."""
    max_steps: int = 0
    """Stop after this many optimizer steps in total; 0: the whole schedule."""
    checkpoint_every_steps: int = 0
    """Save every so many steps; 0: at the end of every epoch."""
    keep: int = 2
    """Newest checkpoints to keep, besides the best."""
    evaluate_every_epochs: int = 1
    """Evaluate on validation every so many epochs; 0: never."""
    recall_denominator: Literal["min", "held_out"] = "min"
    """Recall@k divides by min(k, held-out items), or (held_out, as in LightGCN's literature) by all
    held-out items."""
    wandb: str = ""
    """Project of Weights & Biases that also gets the metrics; empty: none.

    Needs the library wandb.
    """
    mlflow: str = ""
    """Tracking URI of MLflow (a server, or a folder) that also gets the metrics; empty: none.

    Needs the library mlflow.
    """


@dataclass(frozen=True)
class Config:
    """Everything a run needs to know."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: RunConfig = field(default_factory=RunConfig)
    device: str = "auto"
    """auto (CUDA where there is one), cuda or cpu."""

    @property
    def halves(self) -> bool:
        default = kind_of(self.model.kind).halves
        return default if self.data.halves is None else self.data.halves

    @property
    def epochs(self) -> int:
        return sum(stage.epochs for stage in self.optimizer.schedule)

    def lr(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0; beyond the schedule the last one."""
        for stage in self.optimizer.schedule:
            if epoch < stage.epochs:
                return stage.lr
            epoch -= stage.epochs
        return self.optimizer.schedule[-1].lr

    def stage(self, epoch: int) -> int:
        """Index of the schedule's stage that `epoch` lies in."""
        for index, stage in enumerate(self.optimizer.schedule):
            if epoch < stage.epochs:
                return index
            epoch -= stage.epochs
        return len(self.optimizer.schedule) - 1

    def to_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False)


_SECTIONS = ("data", "model", "loss", "optimizer", "parallel", "run")


def check(config: Config) -> Config:
    """Refuse values and combinations that cannot work; returns the config."""
    for section in _SECTIONS:
        for key, value in asdict(getattr(config, section)).items():
            given = value is not None or (section, key) == ("data", "halves")
            require(
                given,
                f"{section}.{key}",
                value,
                "a value",
                "set it, or leave the key out for its default",
            )
    d, m, o, p, r = config.data, config.model, config.optimizer, config.parallel, config.run
    positive = {
        "data.batch_size": d.batch_size,
        "optimizer.accumulation": o.accumulation,
        "parallel.replicas": p.replicas,
        "parallel.lanes": p.lanes,
        "run.keep": r.keep,
    }
    for key, value in positive.items():
        require(value >= 1, key, value, "at least 1", "raise it")
    require(
        d.workers <= 256,
        "data.workers",
        d.workers,
        "at most 256 processes a rank",
        "one or two keep up with training",
    )
    not_negative = {
        "data.workers": d.workers,
        "loss.gamma": config.loss.gamma,
        "loss.kl_weight": config.loss.kl_weight,
        "optimizer.momentum_decay": o.momentum_decay,
        "optimizer.weight_decay": o.weight_decay,
        "optimizer.clip_norm": o.clip_norm,
        "parallel.partitions": p.partitions,
        "parallel.block_columns": p.block_columns,
        "run.seed": r.seed,
        "run.max_steps": r.max_steps,
        "run.checkpoint_every_steps": r.checkpoint_every_steps,
        "run.evaluate_every_epochs": r.evaluate_every_epochs,
    }
    for key, value in not_negative.items():
        require(
            0 <= value < math.inf,
            key,
            value,
            "0 or more, and finite",
            "raise it" if value < 0 else "lower it",
        )
    rows = d.batch_size * (2 if config.halves else 1)
    require(
        o.accumulation <= rows,
        "optimizer.accumulation",
        o.accumulation,
        f"at most the {rows} rows of a step",
        "lower it",
    )
    no_password = re.search(r"://[^/]*@", r.mlflow) is None
    require(
        no_password,
        "run.mlflow",
        "a URI with a user or password",  # the value itself would end up in a log
        "a URI without them, because config.yaml keeps it",
        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    )
    require(r.seed < 1 << 63, "run.seed", r.seed, "less than 2^63", "lower it")
    for key, value in (("optimizer.beta1", o.beta1), ("optimizer.beta2", o.beta2)):
        require(0 <= value < 1, key, value, "0 <= beta < 1", "the usual values are 0.9 and 0.999")
    require(
        0 < o.eps < math.inf, "optimizer.eps", o.eps, "a positive number", "the usual value is 1e-7"
    )
    require(
        0 <= config.loss.alpha <= 1,
        "loss.alpha",
        config.loss.alpha,
        "0 to 1",
        "the paper uses 0.25",
    )
    require(
        len(o.schedule) > 0,
        "optimizer.schedule",
        o.schedule,
        "at least one {epochs, lr}",
        "add a stage",
    )
    for i, stage in enumerate(o.schedule):
        require(
            stage.epochs >= 1,
            f"optimizer.schedule[{i}].epochs",
            stage.epochs,
            "at least 1",
            "raise it or drop the stage",
        )
        require(
            0 <= stage.lr < 1e3,
            f"optimizer.schedule[{i}].lr",
            stage.lr,
            "a rate of 0 or more",
            "the paper starts at 5e-5",
        )
    require(
        0 <= d.input_dropout < 1,
        "data.input_dropout",
        d.input_dropout,
        "0 <= share < 1",
        "0.3 did well on MovieLens 1M",
    )
    m.check_keys()
    o.check_rates()
    kind = kind_of(m.kind)
    kind.check(config)
    require(
        config.loss.kind in kind.losses,
        "loss.kind",
        config.loss.kind,
        f"one of {', '.join(kind.losses)} for model.kind {m.kind}",
        "change one of the two",
    )
    require(
        o.weight_decay == 0 or o.name == "adamw",
        "optimizer.weight_decay",
        o.weight_decay,
        f"0 with {o.name}",
        "use optimizer.name adamw",
    )
    require(
        p.zero_stage in (0, 1, 2, 3),
        "parallel.zero_stage",
        p.zero_stage,
        "0, 1, 2 or 3",
        "1 suits most clusters",
    )
    require(
        p.trunk_dtype == "fp32" or p.zero_stage > 0,
        "parallel.trunk_dtype",
        p.trunk_dtype,
        "fp32 with parallel.zero_stage 0, whose bias correction runs one step ahead in bf16",
        "use stage 1, 2 or 3",
    )
    require(
        p.lanes <= d.batch_size,
        "parallel.lanes",
        p.lanes,
        f"at most data.batch_size = {d.batch_size}",
        "lower it or raise the batch",
    )
    require(
        config.device in ("auto", "cuda", "cpu"),
        "device",
        config.device,
        "auto, cuda or cpu",
        "choose one of them",
    )
    return config


# --- files ----------------------------------------------------------------------------------------


def read_yaml(path: str | Path, what: str) -> Any:
    """The content of a YAML file; ValueError where it cannot be read or a key is there twice, of
    which YAML takes the last.

    `what` says in messages what was expected.
    """
    try:
        try:
            text = read_bytes(path, LARGEST_YAML).decode()
            node = yaml.compose(text, yaml.SafeLoader)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        _count_values(node, {}, 0)
        _refuse_twice(node, str(path), "", set())
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        at = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{at} is not YAML ({error.problem}); expected {what}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(
            f"{path} cannot be read ({reason}); expected a YAML file with {what}"
        ) from None
    except _DuplicateKeyError:
        raise
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read ({error}); expected a YAML file with {what}"
        ) from None


class _DuplicateKeyError(ValueError):
    """A key that is there twice."""


def _count_values(node: yaml.Node | None, counted: dict[int, int], depth: int) -> int:
    """The number of values under `node` once every alias is written out; ValueError where they are
    too many or endless.

    Aliases of aliases make a file of some lines stand for more values than memory holds.
    """
    if id(node) in counted:
        if not counted[id(node)]:
            raise ValueError(
                "an alias stands for a value that holds the alias itself; write it out"
            )
        return counted[id(node)]
    if depth > DEEPEST:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels")
    if node is not None:
        counted[id(node)] = 0  # being counted
    children = (
        [child for pair in node.value for child in pair]
        if isinstance(node, yaml.MappingNode)
        else []
    )
    children = list(node.value) if isinstance(node, yaml.SequenceNode) else children
    n = 1 + sum(_count_values(child, counted, depth + 1) for child in children)
    if n > MOST_VALUES:
        raise ValueError(
            f"it stands for more than {MOST_VALUES:,} values once its aliases are written out"
        )
    if node is not None:
        counted[id(node)] = n
    return n


def _refuse_twice(node: yaml.Node | None, path: str, prefix: str, seen: set[int]) -> None:
    """ValueError where a mapping under `node` has a key twice."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            _refuse_twice(child, path, f"{prefix.removesuffix('.')}[{i}].", seen)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = f"{prefix}{key.value}", key.start_mark.line + 1
            if key.value in lines:
                raise _DuplicateKeyError(
                    f"{path}: {name} is there twice, in line {lines[key.value]} and in line "
                    f"{line}; keep one of them"
                )
            lines[str(key.value)] = line
            _refuse_twice(value, path, f"{name}.", seen)


class _ConfigFile(ActionConfigFile):
    """`--config FILE`, looked through before it is taken."""

    def __call__(
        self, parser: Any, namespace: Any, value: Any, option_string: str | None = None
    ) -> None:
        try:
            raw = read_yaml(value, "the sections of a configuration, such as configs/demo.yaml")
            if not isinstance(raw, dict):
                raise ValueError(
                    f"{value} holds {raw!r:.40}, expected sections with keys, such as "
                    "configs/demo.yaml"
                )
        except ValueError as error:
            raise _FileError(str(error)) from None
        super().__call__(parser, namespace, value, option_string)


class _FileError(ValueError):
    """A mistake in a configuration file that already reads well."""


# --- command line ---------------------------------------------------------------------------------


def make_parser(prog: str, description: str) -> ArgumentParser:
    """A parser with `--config FILE` and one `--section.key` for every field of Config; add further
    arguments to it."""
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument(
        "--config",
        action=_ConfigFile,
        help="YAML file with the sections below; command-line values win over it",
    )
    parser.add_class_arguments(Config, None)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "--local_rank", type=int, default=None, help="set by the deepspeed launcher; ignored"
    )
    return parser


def parse(parser: ArgumentParser, argv: Sequence[str] | None = None) -> tuple[Config, Any]:
    """(checked Config, all parsed arguments); ValueError in one readable sentence for anything that
    does not fit."""
    try:
        namespace = parser.parse_args(argv)
        _require_sections(namespace)
        made = parser.instantiate(namespace)
    except _FileError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # jsonargparse raises ArgumentError; yaml and others what they like
        raise ValueError(_readable(str(error))) from None
    config = Config(**{f.name: getattr(made, f.name) for f in fields(Config)})
    return check(config), namespace


def from_dict(raw: dict[str, Any]) -> Config:
    """The Config that `dataclasses.asdict` took apart; ValueError where it does not fit this
    version."""
    _refuse_text(raw)
    parser = make_parser("config", "configuration")
    try:
        namespace = parser.parse_object(copy.deepcopy(raw))  # it writes into what it is given
        _require_sections(namespace)
        made = parser.instantiate(namespace)
    except Exception as error:
        raise ValueError(_readable(str(error))) from None
    return check(Config(**{f.name: getattr(made, f.name) for f in fields(Config)}))


def _refuse_text(raw: dict[str, Any]) -> None:
    """ValueError where text stands for a list or a table: the parser would read it as YAML, aliases
    and all."""
    for section in fields(Config):
        values, maker = raw.get(section.name), section.default_factory
        types: dict[str, Any] = (
            {f.name: f.type for f in fields(maker)} if isinstance(maker, type) else {}
        )  # type: ignore[arg-type]
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, str) and len(value) > _LONGEST_WORD and types.get(name) != "str":
                raise ValueError(
                    f"{section.name}.{name:.40} is a text of {len(value):,} characters, expected "
                    f"{types.get(name)}"
                )


def _require_sections(namespace: Any) -> None:
    for section in _SECTIONS:
        value = getattr(namespace, section)
        require(
            isinstance(value, Namespace),
            section,
            value,
            "a section of keys",
            f"write `{section}:` with its keys indented below",
        )


def known_keys() -> list[str]:
    """Every `section.key` of the configuration."""
    keys = []
    for section in fields(Config):
        maker = section.default_factory
        keys += (
            [f"{section.name}.{f.name}" for f in fields(maker)]
            if isinstance(maker, type)
            else [section.name]
        )  # type: ignore[arg-type]
    return keys


def _readable(message: str) -> str:
    message = (
        " ".join(message.split())
        .replace("Parser key ", "")
        .replace("<class '", "")
        .replace("'>", "")
        .replace("typing.", "")
    )
    unknown = (
        re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
        or re.search(r"unrecognized arguments: --()([^\s=]+)", message)
        or re.search(r"Option '()([\w.]+)' is not accepted", message)
    )
    if unknown:
        key = ".".join(part for part in unknown.groups() if part)
        close = difflib.get_close_matches(key, known_keys(), 1, 0.6)
        hint = f"did you mean {close[0]}? " if close else ""
        return (
            f"{key} is not a key of the configuration; {hint}`--help` lists every key with its "
            "type, default and meaning"
        )
    return f"{_of_type(message)}; `--help` lists every key with its type, default and meaning"


_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list of {epochs, lr}",
}


def _of_type(message: str) -> str:
    """jsonargparse's remarks on types in our words."""
    key = r'"([\w.]+)"'
    inner = re.search(rf"{key}: Problem with given class_path '[\w.]+': (.*)", message)
    if inner:
        return f"{inner[1]}: {_of_type(inner[2])}"
    wrong = re.search(rf"{key}: Expected an? (.+?)\. Got value: (.*)", message)
    if wrong:
        choice = re.fullmatch(r"Literal\[(.*)\]", wrong[2])
        expected = f"one of {choice[1]}" if choice else _TYPES.get(wrong[2], wrong[2])
        return f"{_name(wrong[1])} is {wrong[3]!r}, expected {expected}"
    union = re.search(rf"{key}: Does not validate .*Union subtypes .*Given value: (.*)", message)
    if union:
        return f"{union[1]} is {union[2]!r}, expected true, false or null"
    section = re.search(rf"{key}: Unable to load config '(.*?)'", message)
    if section:
        return (
            f"{section[1]} is {section[2]!r}, expected a section of keys such as "
            f"--{section[1]}.KEY VALUE"
        )
    stray = re.fullmatch(r"unrecognized arguments: ([^-].*)", message)
    if stray:
        return f"{stray[1]!r} follows no option; name a configuration with --config FILE"
    return message.removeprefix("argument ")


def _name(key: str) -> str:
    """A key of the configuration as it is, an option of a command with its dashes."""
    return (
        key
        if "." in key or key in {f.name for f in fields(Config)} | {f.name for f in fields(Stage)}
        else f"--{key}"
    )


def load(path: str | Path) -> Config:
    """The Config in a YAML file."""
    return parse(make_parser("config", "configuration file"), ["--config", str(path)])[0]

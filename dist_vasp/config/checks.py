"""Refuse values and combinations that cannot work, before anything is built."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, replace

from dist_vasp.config.metric_names import OF_TARGET, parse_metrics
from dist_vasp.config.schema import (
    SECTIONS,
    Config,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
)
from dist_vasp.model.registry import kind_of
from dist_vasp.require import require, require_finite

MOST_SETTINGS = 10_000


def check(config: Config) -> Config:
    """Raise ValueError for the first key that does not fit; return the config."""
    _check_given(config)
    _check_data(config.data)
    _check_run(config.run)
    _check_optimizer(config.optimizer)
    _check_parallel(config.parallel, config.data)
    _check_model(config)
    _check_search(config)
    _check_auxiliary(config)
    rows = config.data.batch_size * (2 if config.halves else 1)
    require(
        config.optimizer.accumulation <= rows,
        "optimizer.accumulation",
        config.optimizer.accumulation,
        f"at most the {rows} rows of a step",
        "lower it",
    )
    require(
        config.device in ("auto", "cuda", "cpu"),
        "device",
        config.device,
        "auto, cuda or cpu",
        "choose one of them",
    )
    return config


def _check_given(config: Config) -> None:
    for section in SECTIONS:
        for key, value in asdict(getattr(config, section)).items():
            given = value is not None or (section, key) == ("data", "halves")
            action = "set it, or leave the key out for its default"
            require(given, f"{section}.{key}", value, "a value", action)


def _at_least_one(**keys: int) -> None:
    for key, value in keys.items():
        require(value >= 1, key.replace("__", "."), value, "at least 1", "raise it")


def _check_data(data: DataConfig) -> None:
    _at_least_one(data__batch_size=data.batch_size)
    require_finite("data.workers", data.workers)
    require(
        data.workers <= 256,
        "data.workers",
        data.workers,
        "at most 256 processes a rank",
        "one or two keep up with training",
    )
    require(
        0 <= data.input_dropout < 1,
        "data.input_dropout",
        data.input_dropout,
        "0 <= share < 1",
        "0.3 did well on MovieLens 1M",
    )


def _check_run(run: RunConfig) -> None:
    _at_least_one(run__keep=run.keep)
    for key in ("seed", "max_steps", "checkpoint_every_steps", "evaluate_every_epochs"):
        require_finite(f"run.{key}", getattr(run, key))
    require(run.seed < 1 << 63, "run.seed", run.seed, "less than 2^63", "lower it")
    parse_metrics(run.metrics, "run.metrics")
    best_by = parse_metrics(run.best_by, "run.best_by")
    require(
        len(best_by) == 1 and best_by[0].of_target,
        "run.best_by",
        run.best_by,
        f"one metric of {', '.join(OF_TARGET)}, such as ndcg@100",
        "name one that compares lists with what users chose",
    )
    require(
        re.search(r"://[^/]*@", run.mlflow) is None,
        "run.mlflow",
        "a URI with a user or password",  # the value itself would end up in a log
        "a URI without them, because config.yaml keeps it",
        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    )


def _check_optimizer(o: OptimizerConfig) -> None:
    _at_least_one(optimizer__accumulation=o.accumulation)
    for key in ("momentum_decay", "weight_decay", "l2", "clip_norm"):
        require_finite(f"optimizer.{key}", getattr(o, key))
    for key, value in (("optimizer.beta1", o.beta1), ("optimizer.beta2", o.beta2)):
        require(0 <= value < 1, key, value, "0 <= beta < 1", "the usual values are 0.9 and 0.999")
    usual = "the usual value is 1e-7"
    require(0 < o.eps < math.inf, "optimizer.eps", o.eps, "a positive number", usual)
    require(
        o.weight_decay == 0 or o.name == "adamw",
        "optimizer.weight_decay",
        o.weight_decay,
        f"0 with {o.name}",
        "use optimizer.name adamw",
    )
    stages = o.schedule
    require(
        len(stages) > 0, "optimizer.schedule", stages, "at least one {epochs, lr}", "add a stage"
    )
    for i, stage in enumerate(stages):
        where, action = f"optimizer.schedule[{i}]", "raise it or drop the stage"
        require(stage.epochs >= 1, f"{where}.epochs", stage.epochs, "at least 1", action)
        expected, action = "a rate of 0 or more", "the paper starts at 5e-5"
        require(0 <= stage.lr < 1e3, f"{where}.lr", stage.lr, expected, action)


def _check_parallel(p: ParallelConfig, data: DataConfig) -> None:
    _at_least_one(parallel__replicas=p.replicas, parallel__lanes=p.lanes)
    require_finite("parallel.partitions", p.partitions)
    require_finite("parallel.block_columns", p.block_columns)
    require(
        p.zero_stage in (0, 1, 2, 3),
        "parallel.zero_stage",
        p.zero_stage,
        "0, 1, 2 or 3",
        "1 suits most clusters",
    )
    require(
        p.precision == "auto" or p.trunk_dtype in ("", p.precision),
        "parallel.trunk_dtype",
        p.trunk_dtype,
        f"{p.precision}, as parallel.precision says, whose earlier name it is",
        "leave it out",
    )
    require(
        p.lanes <= data.batch_size,
        "parallel.lanes",
        p.lanes,
        f"at most data.batch_size = {data.batch_size}",
        "lower it or raise the batch",
    )


def _check_model(config: Config) -> None:
    loss, model, kind = config.loss, config.model, kind_of(config.model.kind)
    computed = kind.closed_form is not None
    require_finite("loss.gamma", loss.gamma)
    require_finite("loss.kl_weight", loss.kl_weight)
    require_finite("loss.kl_anneal_steps", loss.kl_anneal_steps)
    require(0 <= loss.alpha <= 1, "loss.alpha", loss.alpha, "0 to 1", "the paper uses 0.25")
    model.check_keys()
    config.optimizer.check_keys()
    kind.check(config)
    require(
        not config.data.ratings or computed or (kind.reads_ratings and not config.halves),
        "data.ratings",
        config.data.ratings,
        "false, unless model.kind is autorec and data.halves is not true",
        "leave it out",
    )
    optimizer = config.optimizer
    require(
        computed or not (optimizer.l2 and optimizer.clip_norm),
        "optimizer.l2",
        optimizer.l2,
        f"0 with optimizer.clip_norm {optimizer.clip_norm:g}",
        "leave one of the two out",
    )
    require(
        computed or loss.kind in kind.losses,
        "loss.kind",
        loss.kind,
        f"one of {', '.join(kind.losses)} for model.kind {kind.name}",
        "change one of the two",
    )


def _check_auxiliary(config: Config) -> None:
    folder, model = config.data.auxiliary, config.model
    counts = model.ease_auxiliary > 0 or any(config.search.ease_auxiliary)
    closed_form = kind_of(model.kind).closed_form
    beside = ""  # what does not go with auxiliary interactions
    if not closed_form or "ease_auxiliary" not in closed_form.keys:
        beside = f"model.kind {model.kind}"
    elif model.neighbours:
        beside = f"model.neighbours {model.neighbours}"
    remedy = "leave it out, or use model.kind ease with all inputs"
    require(not (beside and folder), "data.auxiliary", folder, f"none with {beside}", remedy)
    found = model.ease_auxiliary
    require(not (beside and counts), "model.ease_auxiliary", found, f"0 with {beside}", remedy)
    require(
        counts or not folder,
        "model.ease_auxiliary",
        found,
        "more than 0 with data.auxiliary",
        "set it, or values of search.ease_auxiliary",
    )
    require(
        bool(folder) or not counts,
        "data.auxiliary",
        folder,
        "a data folder with model.ease_auxiliary",
        "set it, or leave ease_auxiliary out",
    )


def _check_search(config: Config) -> None:
    lists = {name: values for name, values in config.search.lists.items() if values}
    for name, values in lists.items():
        key, kind = f"search.{name}", kind_of(config.model.kind)
        require(
            kind.closed_form is not None,
            key,
            values,
            f"[] with model.kind {kind.name}",
            "only closed forms are searched",
        )
        assert kind.closed_form is not None
        searchable = [k for k in kind.closed_form.keys if hasattr(config.search, k)]
        require(
            name in searchable,
            key,
            values,
            f"[] with model.kind {kind.name}",
            f"search {', '.join(searchable)} instead",
        )
        require(len(set(values)) == len(values), key, values, "different values", "drop the others")
        for value in values:
            try:
                replace(config.model, **{name: value}).check_keys()
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
    n_settings = math.prod(len(values) for values in lists.values())
    require(
        n_settings <= MOST_SETTINGS,
        "search",
        f"{n_settings:,} combinations",
        f"at most {MOST_SETTINGS:,}",
        "shorten its lists",
    )
    require(
        0 not in config.search.ease_lambda,
        "search.ease_lambda",
        config.search.ease_lambda,
        "positive values",
        "drop the 0",
    )
    n_lambdas = len(config.search.ease_lambda)
    closed_form = kind_of(config.model.kind).closed_form
    searches_lambda = (
        closed_form is not None
        and closed_form.walked == "ease_lambda"
        and (n_lambdas > 1 or (not n_lambdas and config.model.ease_lambda == 0))
    )
    require(
        config.search.rule == "best" or searches_lambda,
        "search.rule",
        config.search.rule,
        "best where no lambda is searched",
        "leave it out, or search several lambdas",
    )

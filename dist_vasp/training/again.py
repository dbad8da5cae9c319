"""The configuration that trains the best model of a run once more, on other shards."""

from __future__ import annotations

from dataclasses import replace

from dist_vasp.checkpoint.header import Header
from dist_vasp.config.command_line import from_dict
from dist_vasp.config.schema import Config, SearchConfig
from dist_vasp.model.registry import kind_of


def settled(header: Header) -> Config:
    """Return the configuration of a checkpoint with nothing left to choose on validation.

    A closed form has the keys that its search chose. A training has the epochs that the checkpoint
    had seen, so that more users give more steps; one that was stopped within an epoch has its
    steps. `data.shards`, `data.auxiliary` and `run.dir` are empty. ValueError where the
    configuration does not fit this version.
    """
    config = from_dict(header.config)
    data, run = replace(config.data, shards="", auxiliary=""), replace(config.run, dir="")
    config = replace(config, data=data, run=replace(run, max_steps=0))
    if kind_of(config.model.kind).closed_form:
        return replace(config, search=SearchConfig())
    position, stages = header.position, []
    if position.step_in_epoch:
        return replace(config, run=replace(config.run, max_steps=position.step))
    left = position.epoch
    for stage in config.optimizer.schedule:
        stages.append(replace(stage, epochs=min(stage.epochs, left)))
        left -= stages[-1].epochs
    stages = [stage for stage in stages if stage.epochs]
    return replace(config, optimizer=replace(config.optimizer, schedule=stages))

"""What is compared: models, their runs, and the comparison as a whole."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_vasp.config.command_line import from_dict
from dist_vasp.config.metric_names import Metric, parse_metrics
from dist_vasp.config.schema import Config, RunConfig
from dist_vasp.model.registry import kind_of


@dataclass(frozen=True)
class Model:
    """One row of the report: a trained model, a baseline, or an ensemble of rows above it.

    `config` leaves run.seed and run.dir open.
    """

    name: str
    seeds: tuple[int, ...]
    config: Config | None  # None for a baseline and an ensemble
    source: str  # the file, `inline`, the baseline, or `ensemble`
    overrides: dict[str, Any]
    # of an ensemble: names of models and their weights, None where they are fitted on validation
    members: tuple[tuple[str, float | None], ...] = ()
    fit: str = ""  # the metric that weights are fitted by, "" for the likelihood

    @property
    def is_baseline(self) -> bool:
        """Whether nothing is trained."""
        return self.config is None and not self.members

    @property
    def is_fitted(self) -> bool:
        """Whether it is an ensemble whose weights are fitted on validation users."""
        return bool(self.members) and self.members[0][1] is None

    @property
    def what(self) -> str:
        """Return the model in a few words."""
        if self.is_fitted:
            names = ", ".join(name for name, _ in self.members)
            by = f" by {parse_metrics(self.fit, '')[0].title}" if self.fit else ""
            return f"product of {names}, weights fitted on validation{by}"
        if self.members:
            return "product of " + ", ".join(
                f"{name} ^ {weight:g}" for name, weight in self.members
            )
        if self.config is None:
            return f"baseline {self.source}"
        kind, c = self.config.model.kind, self.config
        if kind_of(kind).closed_form:
            return f"{kind}, closed form"
        limit = f", at most {c.run.max_steps} steps" if c.run.max_steps else ""
        start = f" from ease ({c.model.nease})" if c.model.init_from_ease else ""
        return (
            f"{kind}{start}, loss {c.loss.kind}, {'halves' if c.halves else 'whole rows'}, "
            f"{c.epochs} epochs{limit}"
        )


@dataclass(frozen=True)
class Run:
    """One model with one seed; its files lie in `folder` under the name `stem`."""

    model: Model
    seed: int
    folder: Path
    config: Config | None
    members: tuple[Run, ...] = ()  # of an ensemble
    metrics: tuple[Metric, ...] = ()  # beyond the default ones

    @property
    def stem(self) -> str:
        return f"{self.model.name}-seed{self.seed}"

    @property
    def dir(self) -> Path:
        """Return run.dir of the training."""
        return self.folder / self.stem

    def file(self, ending: str) -> Path:
        """Return a file of this run, beside its run.dir."""
        return self.folder / f"{self.stem}.{ending}"


@dataclass(frozen=True)
class Comparison:
    """The whole of a compare file."""

    path: str
    shards: str
    reference: str
    seeds: tuple[int, ...]
    models: tuple[Model, ...]
    metrics: tuple[Metric, ...] = ()  # beyond the default ones

    @property
    def best_by(self) -> str:
        """Return the validation metrics by which the models' best checkpoints are chosen."""
        chosen = [model.config.run.best_by for model in self.models if model.config]
        names = dict.fromkeys(chosen or [RunConfig.best_by])
        return " or ".join(parse_metrics(name, "run.best_by")[0].title for name in names)

    @property
    def recall_denominator(self) -> str:
        """Return what Recall@k divides by, for every model and baseline."""
        return next(
            (model.config.run.recall_denominator for model in self.models if model.config), "min"
        )

    def runs(self, output: str | Path) -> list[Run]:
        """Return all runs, the first seed of every model first.

        So the report can be read early if the rest is called off.
        """
        folder = Path(output) / "runs"
        found: dict[tuple[str, int], Run] = {}
        alone = {model.name for model in self.models if len(model.seeds) == 1}
        for place in range(max(len(model.seeds) for model in self.models)):
            for model in self.models:
                if place < len(model.seeds):
                    seed = model.seeds[place]
                    members = tuple(
                        found[name, 0 if name in alone else place] for name, _ in model.members
                    )
                    found[model.name, place] = Run(
                        model, seed, folder, _config_of(model, seed, folder), members, self.metrics
                    )
        return list(found.values())


def _config_of(model: Model, seed: int, folder: Path) -> Config | None:
    if model.config is None:
        return None
    raw = asdict(model.config)
    raw["run"] |= {"seed": seed, "dir": str(folder / f"{model.name}-seed{seed}")}
    return from_dict(raw)

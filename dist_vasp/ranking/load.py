"""Load a trained model from a run directory or an export, on any number of ranks."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_vasp.checkpoint import folder as folders
from dist_vasp.checkpoint.header import Header, ModelHeader
from dist_vasp.checkpoint.read import Checkpoint, open_checkpoint, verify
from dist_vasp.checkpoint.weights import fill_module, load_weights, shapes_of
from dist_vasp.config.command_line import from_dict
from dist_vasp.config.schema import Config
from dist_vasp.data import positives
from dist_vasp.data.items import ItemTable, read_items_file
from dist_vasp.data.manifest import ITEMS_FILE, MANIFEST, Manifest
from dist_vasp.data.positives import PositiveRule
from dist_vasp.kernels.choose import kernels_for_scores
from dist_vasp.kernels.interface import Arithmetic
from dist_vasp.kernels.precision import choose_precision
from dist_vasp.model.build import make_trunk, measure_size, new_model
from dist_vasp.model.registry import kind_of
from dist_vasp.parallel.agree import agreed
from dist_vasp.parallel.comm import Ranks, all_gather_bytes
from dist_vasp.ranking.export import is_export, open_export
from dist_vasp.ranking.scoring import TrainedModel

_RULE_BYTES = 1 << 16
ENSEMBLE = "ensemble.json"  # names the members of one (ranking/ensemble.py)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to score, its vocabulary, and the checkpoint it came from."""

    config: Config
    checkpoint: Checkpoint[ModelHeader]
    items: ItemTable
    model: TrainedModel
    positives: PositiveRule | None = None


def load_model(run_dir: str | Path, name: str | None, ranks: Ranks) -> LoadedModel:
    """Load the checkpoint `name` of a run, or the model of an exported folder.

    `name` None: the best checkpoint by validation NDCG@100, else the newest. AgreedError when there
    is no such checkpoint or a file of it is damaged.
    """
    run_dir = Path(run_dir)
    opened = folders.open_together(lambda: open_model(run_dir, name), _reopen, ranks)
    assert opened is not None
    with agreed(ranks):
        config = from_dict(opened.header.config)
        items = read_items_file(
            run_dir / ITEMS_FILE, opened.header.n_items, opened.header.vocabulary_sha256
        )
        rule = positives_of(opened)
    rule = rule_of_rank_0(rule, ranks)
    verify(opened, ranks)
    with agreed(ranks):
        check_size(opened, config)
        arithmetic = scoring_arithmetic(config, ranks.device)
        model = new_model(config, opened.header.n_items, ranks, arithmetic)
        trunk = make_trunk(config.model, arithmetic=arithmetic)
        tensors = load_weights(opened, model.slices(), shapes_of(trunk))
        model.refresh()
        if trunk is not None:
            fill_module(trunk, tensors)
            trunk.to(ranks.device).eval().requires_grad_(False)
    opened.close()
    return LoadedModel(config, opened, items, TrainedModel(model, trunk), rule)


def scoring_arithmetic(config: Config, device: torch.device) -> Arithmetic:
    """How a trained model scores on a device: as its training evaluated it.

    A closed form keeps float32 products.
    """
    kernels = kernels_for_scores(config.parallel.compile, device)
    if kind_of(config.model.kind).closed_form:
        return Arithmetic(kernels=kernels)
    precision = choose_precision(config.parallel.wanted_precision, device)
    return Arithmetic(precision=precision, kernels=kernels)


def open_model(folder: str | Path, name: str | None = None) -> Checkpoint[ModelHeader]:
    """Open an exported folder, or a run's checkpoint `name` (else its best, else its newest)."""
    if not isinstance(folder, str | os.PathLike) or not isinstance(name, str | None):
        raise ValueError(
            f"the model is {folder!r:.80}, its checkpoint {name!r:.80}; "
            "expected the path of a folder, and a name or None"
        )
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise ValueError(
            f"{folder} is not a folder; "
            "pass the run.dir of a training run, or a folder of launch/export.py"
        )
    if (folder / ENSEMBLE).is_file():
        raise ValueError(
            f"{folder} is an ensemble, expected a single model; "
            "pass the folder of one of its members"
        )
    if is_export(folder):
        if name is not None:
            raise ValueError(
                f"{folder} is an exported model and has no checkpoint {name}; "
                "leave --checkpoint out"
            )
        return folders.persist(lambda: open_export(folder))
    return folders.open_found(folder / "checkpoints", name)


def _reopen(path: Path) -> Checkpoint[ModelHeader]:
    return open_export(path) if is_export(path) else open_checkpoint(path)


def positives_of(opened: Checkpoint[ModelHeader]) -> PositiveRule | None:
    """Return the rule that made the positives the model was trained on; None where it is not known.

    Runs of earlier versions do not hold it. Their shards do, where they are still the same.
    """
    header = opened.header
    if header.positives is not None or not isinstance(header, Header):
        return header.positives
    try:
        manifest = Manifest.load(from_dict(header.config).data.shards)
        return manifest.positives if manifest.shards_sha256 == header.shards_sha256 else None
    except ValueError:
        return None


def rule_of_rank_0(rule: PositiveRule | None, ranks: Ranks) -> PositiveRule | None:
    """Return the rule that rank 0 knows: the shards of a run may not be there on every host."""
    known = json.dumps(positives.for_header(rule)).encode()
    with agreed(ranks):
        if len(known) > _RULE_BYTES:
            raise ValueError(
                f"the rule of positives takes {len(known):,} bytes, "
                f"at most {_RULE_BYTES:,} are read; shorten --missing"
            )
    return positives.in_header(
        json.loads(all_gather_bytes(known, ranks.world, ranks.device, _RULE_BYTES)[0])
    )


def refuse_ratings(config: Config, path: str | Path) -> None:
    """Raise ValueError where a model reads ratings, which histories are read without."""
    if config.ratings:
        raise ValueError(
            f"{path} was trained on ratings (data.ratings), and lists are made from items alone; "
            "train it without data.ratings, or measure it with launch/evaluate.py"
        )


def check_size(opened: Checkpoint[ModelHeader], config: Config) -> None:
    """Raise ValueError where the config describes a larger model than the files hold, before
    memory of that size is taken."""
    n_items = opened.header.n_items
    described = 4 * measure_size(config, n_items).parameters
    stored = sum(os.fstat(handle.fileno()).st_size for handle in opened.handles.values())
    if described > stored:
        raise ValueError(
            f"{opened.path / opened.header.FILE} describes a model of {described:,} bytes, "
            f"its files hold {stored:,}; {opened.remedy}"
        )


def check_vocabulary(header: ModelHeader, folder: str | Path, manifest: Manifest) -> None:
    """ValueError unless the shards in `folder` have the vocabulary the model was trained on."""
    if manifest.vocabulary_sha256 != header.vocabulary_sha256:
        raise ValueError(
            f"{folder} has a vocabulary of {manifest.n_items} items "
            f"(hash {manifest.vocabulary_sha256[:12]}...) but the checkpoint was trained on "
            f"{header.n_items} (hash {header.vocabulary_sha256[:12]}...); "
            "pass the shards it was trained on"
        )


def shards_of(loaded: LoadedModel) -> tuple[str, str]:
    """Return the data folder that the model was trained on, and what to tell the user about it.

    A run may have been moved together with its data. So if the folder in the configuration does not
    hold the data, the same path relative to run.dir is tried. ValueError where neither holds it.
    """
    header, named = loaded.checkpoint.header, loaded.config.data.shards
    run_dir = loaded.checkpoint.path.parent.parent
    if not named or not isinstance(header, Header):
        raise ValueError(
            f"{loaded.checkpoint.path} does not say which data it was trained on; pass --shards DIR"
        )
    exists = (Path(named) / MANIFEST).is_file()
    expected = header.data_sha256
    if exists and expected in ("", Manifest.load(named).data_sha256):
        return named, ""
    moved = os.path.normpath(run_dir / (header.shards_from_run or named))
    if (
        expected
        and (Path(moved) / MANIFEST).is_file()
        and Manifest.load(moved).data_sha256 == expected
    ):
        return (
            moved,
            f"data.shards {named} is not the data of this run here; {moved} is, and is used",
        )
    if exists:
        raise ValueError(
            f"{named} is not the data that {run_dir} was trained on any more: it was prepared "
            f"again; pass --shards {named} to use it all the same, "
            "or --shards with the folder of the earlier data"
        )
    relative = (
        ""
        if Path(named).is_absolute()
        else ", a path relative to the folder where training was started"
    )
    raise ValueError(
        f"{run_dir} was trained on the shards in {named}{relative}: it holds no {MANIFEST} here; "
        "pass --shards DIR with the folder where they are now"
    )

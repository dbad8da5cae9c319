"""Export a trained model: one folder of weights, vocabulary and a header, nothing of the training.

    EXPORT/  export.json                         config, vocabulary, SHA-256 of each file
             items.parquet                       original ids, popularity, titles
             trunk.safetensors                   parameters of the trunk (none for NEASE)
             items-PPPPP-of-PPPPP.safetensors    as in a checkpoint, without moments
             MODEL_CARD.md                       for people: data, metrics, training, limits
             trunk.pt2                           if asked for: the trunk as a torch.export program

The tensors are those of a checkpoint in the same files and blocks, so an export gives bitwise the
scores of its run. It exists whole or not at all (`dist_vasp.files`). trunk.pt2 is for other
programs; here it is hashed and never loaded.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from dist_vasp.checkpoint.header import Header, ModelHeader, common_fields
from dist_vasp.checkpoint.json_header import write_header
from dist_vasp.checkpoint.read import Checkpoint, open_model_folder, readable
from dist_vasp.data.items import ItemTable, read_items_file
from dist_vasp.data.manifest import ITEMS_FILE
from dist_vasp.data.positives import PositiveRule
from dist_vasp.files import new_folder
from dist_vasp.model.trunk import Trunk
from dist_vasp.places import check_folder
from dist_vasp.ranking.model_card import MODEL_CARD, Origin, model_card
from dist_vasp.tensor_file import write_safetensors

PROGRAM = "trunk.pt2"
RESTORE = "restore it, and load the model again"
_FILE = re.compile(
    r"items\.parquet|MODEL_CARD\.md|trunk\.pt2|trunk\.safetensors|items-\d{5}-of-\d{5}\.safetensors"
)
_TRAINING = (
    ".exp_avg",
    ".exp_avg_sq",
    ".start",
    ".old",
)  # moments, what optimizer.nease_decay draws to, and the encoder before the present phase
_LOCAL = (
    ("data", "shards"),
    ("run", "dir"),
    ("run", "wandb"),
    ("run", "mlflow"),
)  # keys of the config that mean nothing on another machine


@dataclass(frozen=True, kw_only=True)
class ExportHeader(ModelHeader):
    """`export.json`. Where `item_axis` is missing, the tensors have the axes of format 1."""

    FILE = "export.json"
    VERSIONS = (1,)
    FIX_HEADER = "export the run again"
    FIX_FILE = "export the run again"

    source: str
    """Name of the checkpoint that was exported."""
    validation: dict[str, Any] | None = None
    """Its validation metrics; None where it was not the best checkpoint."""

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        if not isinstance(raw["source"], str):
            raise TypeError("source is not text")
        fields = common_fields(raw, _FILE, "an export")
        return cls(**fields, source=raw["source"], validation=raw.get("validation"))

    def _content(self) -> dict[str, Any]:
        own = {"source": self.source, "validation": self.validation}
        return own | super()._content()


def is_export(folder: Path) -> bool:
    return (folder / ExportHeader.FILE).is_file()


def open_export(folder: Path) -> Checkpoint[ExportHeader]:
    """Open an exported folder; ValueError if its header is damaged or of another version."""
    return open_model_folder(ExportHeader, folder)


def export(
    opened: Checkpoint[ModelHeader],
    items_file: Path,
    output: str | Path,
    trunk: Trunk | None = None,
    progress: Callable[[int, int], None] | None = None,
    rule: PositiveRule | None = None,
) -> str:
    """Write the weights of a checkpoint (or of an export) and the vocabulary to a new folder;
    returns one line on what was written.

    A card of the model is written, too; with `trunk` also that program. `rule` goes into the
    header: what makes a positive of a history. The caller has verified the checkpoint.
    `progress(bytes done, bytes in all)` is called after each tensor. ValueError where the folder
    exists, the disk is too small or fails.
    """
    output = check_folder(output)
    files = _weight_files(opened)
    needed = export_bytes(opened, items_file)
    if trunk is not None:
        needed += sum(4 * p.numel() for p in trunk.parameters())
    free = shutil.disk_usage(output.parent).free
    if free < needed * 1.01 + (1 << 20):
        raise ValueError(
            f"{output.parent} has {free / 1e9:.2f} GB free but the export needs "
            f"{needed / 1e9:.2f} GB; free some space"
        )
    written = 0

    def count(n_bytes: int) -> None:
        nonlocal written
        written += n_bytes
        if progress:
            progress(written, needed)

    with new_folder(output) as temporary:
        digests = {
            name: write_safetensors(temporary / name, tensors, count)
            for name, tensors in files.items()
        }
        if trunk is not None:
            digests[PROGRAM] = write_program(trunk, temporary / PROGRAM)
        with readable(items_file, RESTORE):
            data = items_file.read_bytes()
        digests[ITEMS_FILE] = _write(data, temporary / ITEMS_FILE)
        # It may have been replaced since the model was loaded.
        items = read_items_file(
            temporary / ITEMS_FILE,
            opened.header.n_items,
            opened.header.vocabulary_sha256,
            items_file,
        )
        digests[MODEL_CARD] = _write(_card(opened, items, rule), temporary / MODEL_CARD)
        write_header(temporary, _header(opened, digests, rule))
    return f"{output}: {opened.header.n_items:,} items, {needed / 1e6:,.1f} MB, from {opened.name}"


def _card(opened: Checkpoint[ModelHeader], items: ItemTable, rule: PositiveRule | None) -> bytes:
    """Return the card of the model; that of an export is kept."""
    if MODEL_CARD in opened.header.files:
        with readable(opened.path / MODEL_CARD, RESTORE):
            return (opened.path / MODEL_CARD).read_bytes()
    return model_card(opened, _origin(opened), items, rule).encode()


def _weight_files(opened: Checkpoint[ModelHeader]) -> dict[str, dict[str, Tensor]]:
    """The weights of each safetensors file, mapped."""
    names = sorted(name for name in opened.header.files if name.endswith(".safetensors"))
    return {name: _weights(opened, name) for name in names}


def export_bytes(opened: Checkpoint[ModelHeader], items_file: Path) -> int:
    """What an export takes on the disk, without a program of the trunk."""
    tensors = [t for file in _weight_files(opened).values() for t in file.values()]
    with readable(items_file, RESTORE):
        return sum(4 * t.numel() for t in tensors) + items_file.stat().st_size


def _weights(opened: Checkpoint[ModelHeader], file: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint's file that are weights, mapped."""
    tensors, _ = opened.tensors(file).map()
    return {name: t for name, t in tensors.items() if not name.split("[")[0].endswith(_TRAINING)}


class _Scoring(nn.Module):
    """W1 x (B, H) -> the trunk's sources, as ranking uses it: without noise or penalty."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, pre_BH: Tensor) -> tuple[Tensor, ...]:
        sources, _ = self.trunk(pre_BH)
        return tuple(sources)


def write_program(trunk: Trunk, file: Path) -> str:
    """The trunk as a torch.export program of any batch size, once it gives what the trunk gives;
    returns the file's SHA-256."""
    scoring, hidden = _Scoring(trunk).eval(), len(trunk.input_bias)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        example = torch.randn((2, hidden), generator=generator)
        program = torch.export.export(
            scoring, (example,), dynamic_shapes={"pre_BH": {0: torch.export.Dim("batch")}}
        )
        for n_rows in (1, 7):
            pre_BH = torch.randn((n_rows, hidden), generator=generator)
            for ours, theirs in zip(scoring(pre_BH), program.module()(pre_BH), strict=True):
                if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6):
                    raise RuntimeError(
                        "the exported trunk differs from the model by "
                        f"{(ours - theirs).abs().max().item():.3g}"
                    )
    torch.export.save(program, file)
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write(data: bytes, target: Path) -> str:
    with open(target, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    return hashlib.sha256(data).hexdigest()


def _origin(opened: Checkpoint[ModelHeader]) -> Origin:
    """Return the checkpoint behind a model, and its validation metrics if it was the best one."""
    header = opened.header
    if isinstance(header, ExportHeader):
        return Origin(header.source, header.validation)
    if isinstance(header, Header) and opened.name.startswith("best-"):
        return Origin(opened.name, header.best)
    return Origin(opened.name, None)


def _header(
    opened: Checkpoint[ModelHeader], digests: dict[str, str], rule: PositiveRule | None
) -> ExportHeader:
    header = opened.header
    config = copy.deepcopy(header.config)
    for section, key in _LOCAL:
        if key in config.get(section, {}):
            config[section][key] = ""
    origin = _origin(opened)
    axes = header.item_axis
    if axes is not None:
        axes = {name: axis for name, axis in axes.items() if not name.endswith(_TRAINING)}
    return ExportHeader(
        source=origin.checkpoint,
        n_items=header.n_items,
        vocabulary_sha256=header.vocabulary_sha256,
        positives=rule,
        validation=origin.validation,
        config=config,
        item_axis=axes,
        files=digests,
    )

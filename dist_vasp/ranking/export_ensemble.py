"""An ensemble as one folder to carry to where lists are made.

    EXPORT/  ensemble.json            the members and their weights (ranking/ensemble.py)
             MODEL_CARD.md            for people: the members, the ensemble's metrics, limits
             member-00/, member-01/   one exported model each (ranking/export.py)

The folder is an ensemble: everything that takes one takes it. It exists whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dist_vasp.files import new_folder
from dist_vasp.places import check_folder
from dist_vasp.ranking.ensemble import ENSEMBLE, describe_ensemble
from dist_vasp.ranking.export import export, export_bytes
from dist_vasp.ranking.model_card import MODEL_CARD, ensemble_card, evaluation_of
from dist_vasp.ranking.scoring import Ensemble
from dist_vasp.ranking.sources import Sources


def export_ensemble(
    sources: Sources, output: str | Path, progress: Callable[[int, int], None] | None = None
) -> str:
    """Write every member and the list of members to a new folder; returns a line on what it holds.

    `progress(bytes done, bytes in all)` is called meanwhile. ValueError where the folder exists or
    the disk is too small or fails.
    """
    assert isinstance(sources.model, Ensemble)
    output = check_folder(output)
    sizes = [export_bytes(source.opened, source.items_file) for source in sources.members]
    with new_folder(output) as temporary:
        folders = []
        for k, source in enumerate(sources.members):
            folders.append(temporary / f"member-{k:02d}")
            step = _Offset(progress, sum(sizes[:k]), sum(sizes))
            export(
                source.opened,
                source.items_file,
                folders[-1],
                progress=step,
                rule=sources.positives,
            )
        text = describe_ensemble(temporary, folders, sources.model.weights)
        (temporary / ENSEMBLE).write_text(text)
        (temporary / MODEL_CARD).write_text(_card(sources, folders))
    n_items, n_members = len(sources.items.keys), len(folders)
    return f"{output}: {n_members} members, {n_items:,} items, {sum(sizes) / 1e6:,.1f} MB"


def _card(sources: Sources, folders: list[Path]) -> str:
    assert isinstance(sources.model, Ensemble)
    kinds = [source.kind for source in sources.members]
    names = [folder.name for folder in folders]
    members = list(zip(names, kinds, sources.model.weights, strict=True))
    evaluation = evaluation_of(sources.folder)
    return ensemble_card(members, sources.items, sources.positives, evaluation)


class _Offset:
    """The progress of one member as a part of the whole."""

    def __init__(
        self, progress: Callable[[int, int], None] | None, before: int, total: int
    ) -> None:
        self.progress, self.before, self.total = progress, before, total

    def __call__(self, done: int, of_member: int) -> None:
        if self.progress:
            self.progress(self.before + done, self.total)

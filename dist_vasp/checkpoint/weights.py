"""Load the weights of a checkpoint or export into a model, whatever layout wrote them.

Every command that trains or ranks on several ranks goes through `load_weights`. Each rank reads its
own items from whichever files hold them, and the whole trunk.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dist_vasp.checkpoint.header import TRUNK, ModelHeader
from dist_vasp.checkpoint.read import Checkpoint, StoredItems, readable, stored_items
from dist_vasp.model.neighbours import IDS
from dist_vasp.model.slices import ItemSlice
from dist_vasp.tensor_file import check_dtype

Weights = Checkpoint[ModelHeader]
Shapes = Mapping[str, Sequence[int]]
Ranges = dict[tuple[str, int, int], list[tuple[int, int]]]
_READ_BYTES = 4 << 20  # of a stored tensor that are read at a time where it is copied in part


def load_weights(
    opened: Weights,
    pieces: list[ItemSlice],
    trunk_shapes: Shapes,
    old_rows_I: np.ndarray | None = None,
) -> dict[str, Tensor]:
    """Fill `pieces` from the items files and return the tensors of the trunk, on the CPU.

    pieces: this rank's slices of the item matrices; to resume a training, those of their moments
    too. trunk_shapes: the wanted tensors of the trunk; empty where the model has none.
    old_rows_I: int64, the checkpoint's row of every item of the model, -1 for an item that it does
    not know, which keeps the values it has; None where both have the same items.

    Raises ValueError unless every wanted tensor is there in its shape, every item of it once, and
    holds numbers that training can continue from. The caller has verified the files.
    """
    if old_rows_I is None:
        _read_items(opened, pieces)
    else:
        _read_known_items(opened, pieces, old_rows_I)
    trunk = _read_trunk(opened, trunk_shapes) if trunk_shapes else {}
    check_numbers(opened, [*((p.name, p.tensor) for p in pieces), *trunk.items()])
    return trunk


def fill_module(module: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the loaded tensors of a trunk into a plain module."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(tensors[name])


def shapes_of(module: torch.nn.Module | None) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a plain trunk; of none where there is no trunk."""
    return {name: tuple(p.shape) for name, p in module.named_parameters()} if module else {}


def check_numbers(opened: Weights, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError where a tensor holds NaN, infinity, numbers whose squares are infinite, a
    negative second moment, or item rows that there are not."""
    for name, tensor in tensors:
        if not tensor.numel():
            continue
        low, high = torch.aminmax(tensor.detach())  # NaN if any is; no copy of the tensor
        if not tensor.is_floating_point():
            n_items, first, last = opened.header.n_items, int(low), int(high)
            fits = first >= 0 and last < n_items
            problem = (
                "" if fits else f"item rows from {first} to {last}, expected 0 to {n_items - 1}"
            )
        elif not (torch.isfinite(low) and torch.isfinite(high)):
            problem = "NaN or infinite numbers"
        elif name.endswith(".exp_avg_sq"):
            problem = "negative numbers" if low < 0 else ""
        elif torch.isfinite(torch.maximum(-low, high).square()):
            problem = ""
        else:
            extent = f"numbers from {low.item():.3g} to {high.item():.3g}"
            problem = f"{extent}, beyond what fp32 can compute with"
        if problem:
            raise ValueError(f"{opened.path}: {name} holds {problem}; {opened.remedy}")


# --- the trunk ------------------------------------------------------------------------------------


def _read_trunk(opened: Weights, shapes: Shapes) -> dict[str, Tensor]:
    if TRUNK not in opened.header.files:
        raise ValueError(f"{opened.path / opened.header.FILE} lists no {TRUNK}; {opened.remedy}")
    stored = opened.tensors(TRUNK)
    with readable(stored.path, opened.remedy):
        for name, shape in shapes.items():
            found = stored.stored.get(name)
            if found is None or found.shape != tuple(shape):
                raise ValueError(f"{stored.path} has no {name} of shape {tuple(shape)}")
            check_dtype(f"{stored.path}: {name}", found.dtype, torch.float32)
        return {name: stored.read(name) for name in shapes}


# --- items ----------------------------------------------------------------------------------------


def _read_items(opened: Weights, pieces: list[ItemSlice]) -> None:
    """Fill the pieces of a model with the checkpoint's own items; only what overlaps is read."""
    filled: Ranges = {(p.name, p.lo, p.hi): [] for p in pieces}
    by_name = _by_name(pieces)
    for stored in stored_items(opened):
        for piece in by_name[stored.name]:
            first, last = max(stored.lo, piece.lo), min(stored.hi, piece.hi)
            if first < last:
                with readable(stored.file.path, opened.remedy):
                    _check_shape(stored, piece, piece.tensor.shape[0])
                    _copy_range(stored, piece, first, last)
                filled[(piece.name, piece.lo, piece.hi)].append((first, last))
    _check_filled(opened, filled)


def _read_known_items(opened: Weights, pieces: list[ItemSlice], old_rows_I: np.ndarray) -> None:
    """Fill those items of the pieces that the checkpoint knows; one stored tensor is read at a
    time."""
    n_items = opened.header.n_items
    filled: Ranges = {(p.name, 0, n_items): [] for p in pieces}
    by_name = _by_name(pieces)
    for stored in stored_items(opened):
        if stored.name not in by_name:
            continue
        with readable(stored.file.path, opened.remedy):
            for piece in by_name[stored.name]:
                rows = n_items if _is_item_to_item(piece) else piece.tensor.shape[0]
                _check_shape(stored, piece, rows)
            if stored.hi > n_items:
                raise ValueError(f"{stored.file.path}: {stored.key} is not among {n_items} items")
            tensor = stored.file.read(stored.key)
            old_ids = None
            if stored.name + IDS in by_name:
                ids_key = f"{stored.name}{IDS}[{stored.lo}:{stored.hi}]"
                if ids_key not in stored.file.stored:
                    raise ValueError(f"{stored.file.path} has no {ids_key}")
                old_ids = stored.file.read(ids_key)
                if old_ids.shape != tensor.shape:
                    shape = tuple(old_ids.shape)
                    raise ValueError(f"{stored.file.path}: {ids_key} has shape {shape}")
        filled[(stored.name, 0, n_items)].append((stored.lo, stored.hi))
        if stored.name.endswith(IDS):
            continue  # the inputs of W are those of the new data
        for k, piece in enumerate(by_name[stored.name]):
            if old_ids is None:
                _copy_known(tensor, stored, piece, old_rows_I)
            else:
                ids = by_name[stored.name + IDS][k]
                _copy_known_inputs(tensor, old_ids, stored, (piece, ids), old_rows_I)
    _check_filled(opened, filled)


def _by_name(pieces: list[ItemSlice]) -> defaultdict[str, list[ItemSlice]]:
    by_name: defaultdict[str, list[ItemSlice]] = defaultdict(list)
    for piece in pieces:
        by_name[piece.name].append(piece)
    return by_name


def _check_shape(stored: StoredItems, piece: ItemSlice, n_rows: int) -> None:
    """Raise ValueError unless a stored tensor is cut along the piece's axis, and is as wide as it.

    n_rows: its rows, where the items are not the rows.
    """
    where = f"{stored.file.path}: {stored.key}"
    is_weight = piece.tensor.is_floating_point()  # of any precision; fp32 is stored
    wanted = torch.float32 if is_weight else torch.int32
    check_dtype(where, stored.file.stored[stored.key].dtype, wanted)
    if stored.axis != piece.item_dim:
        raise ValueError(
            f"{where} has its items along axis {stored.axis}, expected axis {piece.item_dim}"
        )
    expected = list(piece.tensor.shape)
    expected[0] = n_rows
    expected[stored.axis] = stored.hi - stored.lo
    shape = list(stored.file.shape(stored.key))
    if shape != expected:
        raise ValueError(f"{where} has shape {shape}, expected {expected}")


def _is_item_to_item(piece: ItemSlice) -> bool:
    """Whether both axes hold items: the rows are input items, the columns output items."""
    return piece.item_dim == 1


def _copy_range(stored: StoredItems, piece: ItemSlice, first: int, last: int) -> None:
    """Copy the items [first, last), some rows of the stored tensor at a time."""
    shape = stored.file.shape(stored.key)
    target = piece.tensor.narrow(piece.item_dim, first - piece.lo, last - first)
    items = slice(first - stored.lo, last - stored.lo)
    rows = (0, shape[0]) if piece.item_dim else (items.start, items.stop)
    at_once = max(1, _READ_BYTES // (4 * max(math.prod(shape[1:]), 1)))
    for start in range(*rows, at_once):
        stop = min(start + at_once, rows[1])
        read = stored.file.read(stored.key, start, stop)
        into = target[start - rows[0] : stop - rows[0]]
        into.copy_(read[:, items] if piece.item_dim else read)


def _copy_known(
    tensor: Tensor, stored: StoredItems, piece: ItemSlice, old_rows_I: np.ndarray
) -> None:
    """Fill those items of `piece` whose old row lies in the range that `stored` covers."""
    mine = old_rows_I[piece.lo : piece.hi]
    here = np.flatnonzero((mine >= stored.lo) & (mine < stored.hi))
    if not len(here):
        return
    source = tensor.movedim(stored.axis, 0)[torch.from_numpy(mine[here] - stored.lo)]
    target = piece.tensor.movedim(piece.item_dim, 0)
    if _is_item_to_item(piece):
        known = np.flatnonzero(old_rows_I >= 0)
        rows = target[torch.from_numpy(here)]
        old = torch.from_numpy(old_rows_I[known])
        rows[:, torch.from_numpy(known)] = source[:, old].to(rows)
        source = rows
    target[torch.from_numpy(here)] = source.to(target)


def _copy_known_inputs(
    tensor: Tensor,
    old_ids: Tensor,
    stored: StoredItems,
    pieces: tuple[ItemSlice, ItemSlice],
    old_rows_I: np.ndarray,
) -> None:
    """Fill those weights of a support whose input was one of the same item before; the others keep
    the values they have. pieces: the weights and their ids."""
    weight, ids = pieces
    mine = old_rows_I[weight.lo : weight.hi]
    here = np.flatnonzero((mine >= stored.lo) & (mine < stored.hi))
    at_once = max(1, _READ_BYTES // max(old_ids.shape[1] * ids.tensor.shape[1], 1))
    for some in np.split(here, range(at_once, len(here), at_once)):
        rows, old = torch.from_numpy(some), torch.from_numpy(mine[some] - stored.lo)
        wanted_nK = torch.from_numpy(old_rows_I[ids.tensor[rows].cpu().numpy()])
        same_nKK = wanted_nK[:, :, None] == old_ids[old][:, None, :]
        found_nK = same_nKK.any(dim=2)
        source_nK = tensor[old].gather(1, same_nKK.byte().argmax(dim=2))
        target_nK = weight.tensor[rows]
        found_nK = found_nK.to(target_nK.device)
        weight.tensor[rows] = torch.where(found_nK, source_nK.to(target_nK), target_nK)


def _check_filled(opened: Weights, filled: Ranges) -> None:
    """Raise ValueError unless the ranges of every (name, lo, hi) make up its items, each once."""
    for (name, lo, hi), ranges in filled.items():
        end = lo
        for first, last in sorted(ranges):
            end = last if first == end else -1  # a gap, or items that are stored twice
        if end != hi:
            raise ValueError(
                f"{opened.path} does not hold {name} for all items {lo} to {hi - 1} once; "
                f"{opened.remedy}"
            )

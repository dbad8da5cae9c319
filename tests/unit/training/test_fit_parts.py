"""The parts of a closed form: what is written is read, and nothing else is trusted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dist_vasp.model.slices import ItemSlice
from dist_vasp.training.closed_form import parts as fit_parts
from dist_vasp.training.closed_form.parts import Parts, clear_leftovers, has_parts, remove_parts

N_ITEMS, K = 40, 3
KEYS = {"hash of data.shards": "abc", "ease_lambda": 0.1}


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    monkeypatch.setattr(fit_parts, "SECONDS_BETWEEN_PARTS", 0.0)


class Case:
    """A folder of parts, and what was said of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, list[str]()

    def parts(self, kind: str = "inputs", keys: dict | None = None, width: int = K) -> Parts:
        dtype = torch.int32 if kind == "inputs" else torch.float32
        given = KEYS if keys is None else keys
        return Parts(self.folder, kind, given, N_ITEMS, width, dtype, self.said.append)

    def read(self, lo: int = 0, hi: int = N_ITEMS, **given) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the items [lo, hi), 0 where there is none, and which there are."""
        parts = self.parts(**given)
        rows = torch.zeros((hi - lo, given.get("width", K)), dtype=parts._dtype)
        is_done, seconds = parts.read(ItemSlice("rows", lo, hi, 0, rows))
        assert 0 <= seconds < 60 and (seconds > 0) == is_done.any()
        return rows.numpy(), is_done

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*"))


def inputs(items: np.ndarray) -> torch.Tensor:
    """Some K inputs of each item, ascending."""
    return torch.from_numpy(np.sort((items[:, None] + [1, 2, 5]) % N_ITEMS, axis=1)).int()


@pytest.fixture
def case(tmp_path) -> Case:
    """The inputs of the items 10 to 29, in two parts."""
    case = Case(tmp_path / "parts")
    parts = case.parts()
    for lo in (10, 20):
        parts.add(np.arange(lo, lo + 10), inputs(np.arange(lo, lo + 10)))
    assert len(case.files) == 2
    return case


@pytest.mark.parametrize(("lo", "hi"), [(0, N_ITEMS), (15, 25), (0, 10), (29, 30)])
def test_each_rank_reads_the_items_that_it_owns(case, lo, hi):
    rows, is_done = case.read(lo, hi)
    items = np.arange(lo, hi)
    np.testing.assert_array_equal(is_done, (items >= 10) & (items < 30))
    np.testing.assert_array_equal(rows[is_done], inputs(items)[is_done])
    assert not rows[~is_done].any() and not case.said


def test_weights_of_items_with_gaps(case):
    items, parts = np.array([3, 4, 17, 39]), case.parts("weights")
    written = torch.randn(4, K)
    parts.add(items[:2], written[:2])
    parts.add(items[2:], written[2:])
    rows, is_done = case.read(kind="weights")
    np.testing.assert_array_equal(is_done.nonzero()[0], items)
    np.testing.assert_array_equal(rows[items], written)


def test_rows_wait_until_a_part_is_due(tmp_path, monkeypatch):
    case = Case(tmp_path / "parts")
    parts = case.parts()
    monkeypatch.setattr(fit_parts, "SECONDS_BETWEEN_PARTS", 1e9)
    parts.add(np.arange(0, 5), inputs(np.arange(0, 5)))
    assert not case.folder.exists(), "a short computation writes nothing"
    monkeypatch.setattr(fit_parts, "SECONDS_BETWEEN_PARTS", 0.0)
    parts.add(np.arange(5, 9), inputs(np.arange(5, 9)))
    assert [path.name for path in case.files] == ["inputs-0000000000-0000000009.safetensors"]
    assert case.read()[1].nonzero()[0].tolist() == list(range(9))


def test_a_part_is_a_safetensors_file_that_says_what_it_is(case):
    with safe_open(case.files[0], "numpy") as file:
        assert file.get_tensor("items").tolist() == list(range(10, 20))
        assert json.loads(file.metadata()["made_for"]) == {"format": 1, "rows": "inputs", **KEYS}


# --- what is not trusted --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [{"keys": KEYS | {"ease_lambda": 0.2}}, {"keys": {"hash of data.shards": "abc"}}],
    ids=["another value", "a key less"],
)
def test_what_was_made_for_something_else_is_ignored(case, given):
    rows, is_done = case.read(**given)
    assert not is_done.any() and not rows.any()
    (said,) = case.said
    assert said.startswith("2 parts are ignored, and computed again: ")
    assert said.endswith("0000000020.safetensors: it was made for other data or other keys")
    case.read()
    assert len(case.said) == 1, "they are still there for the keys that they were made for"


def test_a_file_of_another_kind_or_name_is_ignored(case):
    first = case.files[0]
    (case.folder / "inputs-0-40.safetensors").write_bytes(first.read_bytes())
    (case.folder / "notes.txt").write_text("mine")
    os.rename(first, case.folder / "weights-0000000010-0000000020.safetensors")
    assert not case.read(10, 20, kind="weights")[1].any()
    assert case.read()[1].sum() == 10 and len(case.said) == 1


def test_no_truncation_and_no_flipped_bit_is_trusted(case):
    path = case.files[0]
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    places = [*range(0, length, 7), *rng.integers(0, len(whole), 60)]
    damaged = [whole[:n] for n in (0, 1, 8, length, len(whole) - 4, len(whole) - 1)]
    damaged += [whole + b"\0\0\0\0"]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    expected = inputs(np.arange(10, 20)).numpy()
    for content in damaged:
        path.write_bytes(content)
        rows, is_done = case.read(10, 20)
        assert not rows[~is_done].any()
        if is_done.any():  # a name that the format has no use for, or a space
            np.testing.assert_array_equal(rows, expected)
            assert content[length:] == whole[length:]


def _fewer(items: torch.Tensor, rows: torch.Tensor):
    return items[:-1], rows


def _wide(items: torch.Tensor, rows: torch.Tensor):
    return items, torch.cat([rows, rows[:, -1:] + 100], dim=1)


def _floats(items: torch.Tensor, rows: torch.Tensor):
    return items, rows.float()


def _beyond(items: torch.Tensor, rows: torch.Tensor):
    return items, rows.index_fill(1, torch.tensor([K - 1]), N_ITEMS)


def _negative(items: torch.Tensor, rows: torch.Tensor):
    return items, rows.index_fill(1, torch.tensor([0]), -1)


def _itself(items: torch.Tensor, rows: torch.Tensor):
    rows = rows.clone()
    rows[0, 0] = items[0]
    return items, rows


def _descending(items: torch.Tensor, rows: torch.Tensor):
    return items.flip(0), rows.flip(0)


def _twice(items: torch.Tensor, rows: torch.Tensor):
    return items, rows[:, :1].repeat(1, K)


def _other_items(items: torch.Tensor, rows: torch.Tensor):
    return items + N_ITEMS, rows


def _nothing(items: torch.Tensor, rows: torch.Tensor):
    return items[:0], rows[:0]


WRONG = [
    (_fewer, "shapes"),
    (_wide, "shapes"),
    (_nothing, "shapes"),
    (_floats, "rows is of dtype F32, expected I32"),
    (_beyond, "items outside of 0 to 39"),
    (_negative, "items outside of 0 to 39"),
    (_other_items, "items outside of 0 to 39"),
    (_itself, "an item that is its own input"),
    (_descending, "do not ascend"),
    (_twice, "do not ascend"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[c.__name__[1:] for c, _ in WRONG])
def test_rows_that_no_fit_writes_are_refused(case, change: Callable, message):
    """Also with a right SHA-256."""
    items = np.arange(10, 20)
    tensors = dict(
        zip(("items", "rows"), change(torch.from_numpy(items).int(), inputs(items)), strict=True)
    )
    made_for = case.parts()._made_for
    metadata = {"made_for": made_for, "seconds": "1.5"}
    metadata["sha256"] = fit_parts._sha256(made_for, "1.5", *tensors.values())
    with open(case.files[0], "wb") as handle:
        fit_parts.write_tensors(handle, tensors, metadata=metadata)
    rows, is_done = case.read(10, 20)
    assert not is_done.any() and not rows.any()
    (said,) = case.said
    assert said.startswith("a part is ignored, and computed again: ") and message in said
    assert said.count(str(case.files[0])) == 1


def test_links_and_folders_are_no_parts(case, tmp_path):
    first, second = case.files
    os.rename(first, tmp_path / "elsewhere")
    first.symlink_to(tmp_path / "elsewhere")
    second.unlink()
    second.mkdir()
    assert not case.read()[1].any() and "2 parts" in case.said[0]


# --- the folder -----------------------------------------------------------------------------------


def test_a_part_that_cannot_be_written_is_said_once(case):
    case.folder.rename(case.folder.with_name("moved"))
    case.folder.write_text("a file in its place")
    parts = case.parts()
    for lo in (0, 5):
        parts.add(np.arange(lo, lo + 5), inputs(np.arange(lo, lo + 5)))
    (said,) = case.said
    assert said.startswith("parts are no longer saved: ")


def test_parts_of_a_kind_or_the_whole_folder_are_removed(case):
    parts = case.parts("weights")
    parts.add(np.arange(4), torch.ones(4, K))
    remove_parts(case.folder, "weights")
    assert len(case.files) == 2 and has_parts(case.folder)
    half = case.folder / ".inputs-0000000000-0000000010.safetensors.0123456789abcdef.tmp"
    half.write_bytes(b"x")
    clear_leftovers(case.folder)
    assert not half.exists() and len(case.files) == 2
    remove_parts(case.folder)
    assert not case.folder.exists() and not has_parts(case.folder)
    remove_parts(case.folder)
    clear_leftovers(case.folder)


def test_without_a_folder_nothing_is_read_or_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = Parts(None, "inputs", KEYS, N_ITEMS, K, torch.int32, print)
    parts.add(np.arange(5), inputs(np.arange(5)))
    rows = torch.zeros((N_ITEMS, K), dtype=torch.int32)
    assert not parts.read(ItemSlice("rows", 0, N_ITEMS, 0, rows))[0].any()
    assert not list(tmp_path.iterdir())

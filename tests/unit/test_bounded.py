"""Files from outside are read within bounds: one message, before memory is spent."""

from __future__ import annotations

import json
import os
import struct

import pytest
import torch
import yaml

from dist_vasp.bounded_json import DEEPEST, LARGEST, parse_json, read_json
from dist_vasp.checkpoint.header import Header
from dist_vasp.checkpoint.json_header import header_sha256
from dist_vasp.checkpoint.read import open_checkpoint
from dist_vasp.config.command_line import from_dict, load
from dist_vasp.config.schema import Config
from dist_vasp.config.yaml_file import LARGEST_YAML, read_yaml
from dist_vasp.data.manifest import Manifest
from dist_vasp.ranking.ensemble import MOST_MEMBERS, read_ensemble
from dist_vasp.tensor_file import MOST_TENSORS, map_tensors, write_safetensors


def test_json_within_bounds(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": [1, {"b": None}]}))
    assert read_json(path) == {"a": [1, {"b": None}]}
    assert parse_json("[" * DEEPEST + "]" * DEEPEST)


@pytest.mark.parametrize(
    "text",
    ["[" * 65 + "]" * 65, "[" * 100_000, '{"a":' * 500 + "1" + "}" * 500, "[" * 900 + "]" * 900],
)
def test_json_that_is_too_deep(text):
    with pytest.raises(ValueError, match=r"nested deeper than 64|is not JSON"):
        parse_json(text)


def test_json_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "x.json"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a hole
    with pytest.raises(ValueError, match=f"it has {1 << 40:,} bytes, expected at most {LARGEST:,}"):
        read_json(path)
    (tmp_path / "manifest.json").symlink_to(path)
    with pytest.raises(
        ValueError, match=r"manifest\.json is not a manifest of this project: it has .* bytes"
    ):
        Manifest.load(tmp_path)


def test_json_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        read_json(tmp_path)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "stands for more than 20,000 values"),
        ("a: &a [*a]\n", "holds the alias itself"),
        ("a: &a {b: *a}\n", "holds the alias itself"),
        ("[" * 5000, r"nested too deeply|not YAML"),
        ("[" * 70 + "]" * 70, "nested deeper than 64"),
        ("# " + "x" * LARGEST_YAML, "bytes, expected at most"),
    ],
)
def test_yaml_that_is_too_much(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    for read in (lambda: read_yaml(path, "a configuration"), lambda: load(path)):
        with pytest.raises(ValueError, match=message) as error:
            read()
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_yaml_with_a_few_aliases_is_read(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: &a {x: 1}\nb: *a\nc: [*a, *a]\n")
    assert read_yaml(path, "it") == yaml.safe_load(path.read_text())


def test_a_stored_configuration_holds_no_yaml():
    raw = {"optimizer": {"schedule": LAUGHS}}
    with pytest.raises(ValueError, match=r"optimizer\.schedule is a text of .* characters"):
        from_dict(raw)


def test_accumulation_is_at_most_the_rows_of_a_step(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        yaml.safe_dump({"data": {"batch_size": 64}, "optimizer": {"accumulation": 128}})
    )
    assert load(path).optimizer.accumulation == 128  # two rows a user
    path.write_text(
        yaml.safe_dump({"data": {"batch_size": 64}, "optimizer": {"accumulation": 10**9}})
    )
    with pytest.raises(
        ValueError,
        match=r"optimizer\.accumulation is 1000000000, expected at most the 128 rows of a step",
    ):
        load(path)
    assert Config().optimizer.accumulation == 1


def tensor_file(path, header: dict | bytes, body: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        ({"a": entry([2], [0, 8])}, 4, "tensors end at byte"),
        ({"a": entry([2], [0, 8])}, 16, "tensors end at byte"),
        ({"a": entry([2**31, 2**31, 4], [0, 8])}, 8, "expected 73,786,976,294,838,206,464 of them"),
        ({"a": entry([2**62], [0, 8])}, 8, "has shape"),
        ({"a": entry([-2], [0, 8])}, 8, "has shape"),
        ({"a": entry([True], [0, 4])}, 4, "has shape"),
        ({"a": entry([2.0], [0, 8])}, 8, "has shape"),
        ({"a": entry([1] * 9, [0, 4])}, 4, "has shape"),
        ({"a": entry([2], [8, 0])}, 8, "expected 8 of them"),
        ({"a": entry([1], [0, 4]), "b": entry([1], [0, 4])}, 4, "a tensor begins at byte"),
        ({"a": entry([1], [0, 4]), "b": entry([1], [8, 12])}, 12, "a tensor begins at byte"),
        ({"a": entry([1], None)}, 4, "has shape"),
        ({"a": [1]}, 4, "is not described"),
        ({"a": entry([2], [0, 8], "F16")}, 8, "is of dtype F16, expected F32"),
        ([], 0, "is not a table"),
        (b"{" * 200, 0, "cannot be read as safetensors"),
        (b'{"a":' * 2000, 0, "cannot be read as safetensors"),
        (
            {f"t{i}": 0 for i in range(MOST_TENSORS + 1)},
            0,
            "lists 65,537 tensors, expected at most 65,536",
        ),
    ],
)
def test_headers_of_tensors(tmp_path, header, body, message):
    path = tmp_path / "x.safetensors"
    tensor_file(path, header, bytes(body))
    with pytest.raises(ValueError, match=message):
        map_tensors(path)


def test_a_header_that_claims_to_be_huge(tmp_path):
    path = tmp_path / "x.safetensors"
    for length in (2**40, 2**63, 17):
        tensor_file(path, {}, length=length)
        with pytest.raises(ValueError, match="its header has"):
            map_tensors(path)


def test_rows_of_a_stored_tensor(tmp_path):
    from dist_vasp.tensor_file import TensorFile

    tensors = {
        "a": torch.randn(7, 3),
        "b": torch.randn(5),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.0),
    }
    write_safetensors(tmp_path / "x", tensors)
    with open(tmp_path / "x", "rb") as handle:
        file = TensorFile(handle, tmp_path / "x")
        for name, tensor in tensors.items():
            assert torch.equal(file.read(name), tensor) and file.shape(name) == tensor.shape
        assert torch.equal(file.read("a", 2, 5), tensors["a"][2:5])
        os.truncate(tmp_path / "x", os.path.getsize(tmp_path / "x") - 4)
        with pytest.raises(ValueError, match="ends at byte"):
            file.read("scalar")


def test_members_of_an_ensemble(tmp_path):
    member = {"run": "run", "checkpoint": "", "weight": 1.0}
    content = {
        "format_version": 1,
        "vocabulary_sha256": "v",
        "n_items": 3,
        "members": [member] * (MOST_MEMBERS + 1),
    }
    header = {**content, "header_sha256": header_sha256(content)}
    (tmp_path / "ensemble.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match="it has 65 members, expected at most 64"):
        read_ensemble(tmp_path)
    (tmp_path / "ensemble.json").unlink()
    with pytest.raises(ValueError, match=r"ensemble\.json cannot be read"):
        read_ensemble(tmp_path)


def test_files_of_a_checkpoint(tmp_path):
    header = {
        "format_version": 1,
        "files": {f"items-{i:05d}-of-20000.safetensors": "0" for i in range(20000)},
    }
    (tmp_path / "checkpoint.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match="is damaged") as error:
        open_checkpoint(tmp_path)
    assert len(str(error.value)) < 600


def test_blocks_of_columns_fit_a_file():
    from types import SimpleNamespace

    from dist_vasp.config.schema import ParallelConfig
    from dist_vasp.training.checks import check_memory

    ranks = SimpleNamespace(device=torch.device("cuda"), layout=SimpleNamespace(partitions=2))
    check_memory(Config(), 100_000, ranks)
    with pytest.raises(
        ValueError,
        match=r"parallel\.block_columns is 1, which cuts the W of 50,000 items into 50,000 blocks",
    ):
        check_memory(Config(parallel=ParallelConfig(block_columns=1)), 100_000, ranks)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (bytes(50), "it is not UTF-8 text"),
        (b'{"a":\n[1,}', "line 2 is not JSON"),
        (b"\xff\xfe{", "it is not UTF-8 text"),
        (b"9" * 6000, "it holds a number of more digits than any of ours"),
        (b"[1]", "a value is of another kind than expected"),
        (b"7", "a value is of another kind than expected"),
        (b"null", "a value is of another kind than expected"),
        (b"{}", "the key 'format_version' is missing"),
        (b'{"format_version": 1}', "the key '.*' is missing"),
    ],
)
def test_what_is_wrong_with_a_json_file_is_said_in_words(tmp_path, data, message):
    for name in (Header.FILE, "ensemble.json", "manifest.json"):
        (tmp_path / name).write_bytes(data)
    for load_it in (open_checkpoint, read_ensemble, Manifest.load):
        with pytest.raises(
            ValueError, match=rf"\.json is (damaged \(|not a manifest of this project: ){message}\b"
        ):
            load_it(tmp_path)


@pytest.mark.parametrize("weight", [0, -1, 10**400, float("inf"), True, "1"])
def test_the_weights_of_an_ensemble_are_numbers_above_0(tmp_path, weight):
    content = {"format_version": 1, "vocabulary_sha256": "v", "n_items": 3}
    content["members"] = [{"run": "a", "checkpoint": "", "weight": weight}]
    content["header_sha256"] = header_sha256(content)
    (tmp_path / "ensemble.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"the weight of a member is not a number above 0"):
        read_ensemble(tmp_path)

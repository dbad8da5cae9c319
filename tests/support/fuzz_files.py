"""Damaged and malicious shards and checkpoints: each a pure function of its integer seed and of the
sound folder.

`mutate(seed, folder)` changes one file of `folder`, which holds `shards/` and two runs, `vasp/` and
`nease/`. For two of three seeds the checksum that guards the file is made right again, where there
is one, so that what lies behind it meets the damage: for half of all files.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_vasp.checkpoint.header import Header
from dist_vasp.checkpoint.json_header import header_sha256
from dist_vasp.data.hashing import sha256_of
from dist_vasp.data.manifest import MANIFEST

CANARY = (
    "canary"  # a file in the working directory: whoever unpickles or evaluates a payload creates it
)
Random = np.random.Generator
Mutator = Callable[[bytes, Random], bytes]


@dataclass(frozen=True)
class Mutation:
    """What was done to which file; `vouched`: its checksum was made right again.

    `run`: the run it belongs to, if any.
    """

    file: str
    kind: str
    vouched: bool
    run: str | None


class Payload:
    def __reduce__(self) -> tuple:
        return open, (CANARY, "w")


def pickled() -> bytes:
    return pickle.dumps(Payload())


def pt_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2), "payload": Payload()}, buffer)
    return buffer.getvalue()


def gz_bomb(inner: bytes, random: Random) -> bytes:
    """A tar of 2 GB of zeros that gzip makes small; with an extra field that puts a tar's magic
    where a check may look."""
    blob = gzip.compress(inner[:512] + bytes(1 << 22), 9, mtime=0)
    if random.integers(2):  # FEXTRA: magic at offset 257 of the file
        extra = bytearray(300)
        extra[257 - 12 : 262 - 12] = b"ustar"
        blob = (
            blob[:3]
            + bytes([blob[3] | 4])
            + blob[4:10]
            + struct.pack("<H", len(extra))
            + bytes(extra)
            + blob[10:]
        )
    return blob + gzip.compress(bytes(1 << 24), 9, mtime=0) * 128


# --- any bytes ------------------------------------------------------------------------------------


def flip(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.integers(1, 9)):
        changed[random.integers(len(data))] ^= random.integers(1, 256)
    return bytes(changed)


def flip_early(data: bytes, random: Random) -> bytes:
    """In the first kilobyte, where headers are."""
    return flip(data[:1024], random) + data[1024:]


def truncate(data: bytes, random: Random) -> bytes:
    return data[: random.integers(len(data))]


def zero_range(data: bytes, random: Random) -> bytes:
    start, length = random.integers(len(data)), random.integers(1, 600)
    return data[:start] + bytes(min(length, len(data) - start)) + data[start + length :]


def insert(data: bytes, random: Random) -> bytes:
    start = random.integers(len(data) + 1)
    return data[:start] + random.bytes(random.integers(1, 1025)) + data[start:]


def repeat_range(data: bytes, random: Random) -> bytes:
    start = random.integers(len(data))
    return data[:start] + data[start : start + random.integers(1, 2000)] + data[start:]


def replace_whole(data: bytes, random: Random) -> bytes:
    choices = [
        b"",
        bytes(len(data)),
        random.bytes(2000),
        pickled(),
        pt_file(),
        b"{" * 100_000,
        gzip.compress(data, mtime=0),
    ]
    return choices[random.integers(len(choices))]


ANY = [flip, flip, flip_early, truncate, zero_range, insert, repeat_range, replace_whole]


# --- tars -----------------------------------------------------------------------------------------


def untar(data: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(m, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]


def retar(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """As it stands: the sizes in the headers are not made right."""
    parts = []
    for info, body in members:
        parts += [info.tobuf(tarfile.GNU_FORMAT), body, bytes(-len(body) % 512)]
    return b"".join(parts) + bytes(1024)


def member(name: str, body: bytes, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    new = tarfile.TarInfo(name)
    new.size = len(body)
    for field, value in fields.items():
        setattr(new, field, value)
    return new, body


def swap_bodies(data: bytes, random: Random) -> bytes:
    members = untar(data)
    i, j = random.integers(len(members), size=2)
    (info_i, body_i), (info_j, body_j) = members[i], members[j]
    members[i], members[j] = member(info_i.name, body_j), member(info_j.name, body_i)
    return retar(members)


def strange_member(data: bytes, random: Random) -> bytes:
    """A link, a device, a path that leads outside, a second member of a name, a pickle: added or in
    place of a real one."""
    members = untar(data)
    at = int(random.integers(len(members)))
    info, body = members[at]
    key = info.name.split(".")[0]
    choices = [
        member(info.name, b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member(info.name, b"", type=tarfile.LNKTYPE, linkname="../../etc/passwd"),
        member(info.name, b"", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        member(info.name, b"", type=tarfile.FIFOTYPE),
        member(info.name, b"", type=tarfile.DIRTYPE),
        member(f"/tmp/{CANARY}.{info.name.split('.', 1)[1]}", body),
        member(f"../../{info.name}", body),
        member(info.name, body),
        member(f"{key}.pickle", pickled()),
        member(f"{key}.extra.pt", pt_file()),
        member(f"{key}.pyd", pickled()),
        member(info.name, pickled()),
        member("\udcff\n\x1b[31m" + info.name, body),
    ]
    chosen = choices[random.integers(len(choices))]
    members[at : at + int(random.integers(2))] = [chosen]
    return retar(members)


def huge_member(data: bytes, random: Random) -> bytes:
    """A header that claims far more than there is: plain, sparse with holes, or an extended
    header."""
    members = untar(data)
    at = int(random.integers(len(members)))
    info, body = members[at]
    size = int(random.choice([10**9, 2**33, 2**40, 2**62]))
    kind = random.integers(3)
    if kind == 0:
        members[at] = member(info.name, body, size=size)
        return retar(members)
    if kind == 1:  # GNU's old sparse format: one piece of data, then a hole up to `size`
        new, _ = member(info.name, body, type=tarfile.GNUTYPE_SPARSE)
        header = bytearray(new.tobuf(tarfile.GNU_FORMAT))
        header[386:410] = b"%011o\x00%011o\x00" % (0, len(body))
        header[483:495] = b"\x80" + size.to_bytes(11, "big")
        header[148:156] = b"        "
        header[148:156] = b"%06o\x00 " % sum(header)
        before, after = retar(members[:at])[:-1024], retar(members[at + 1 :])
        return before + bytes(header) + body + bytes(-len(body) % 512) + after
    pax = tarfile.TarInfo("pax")
    pax.type, pax.size = tarfile.XHDTYPE, size
    record = b"30 GNU.sparse.size=99999999999\n"
    return retar([*members[:at], (pax, record), *members[at:]])


def bad_npy(data: bytes, random: Random) -> bytes:
    """One array with a header that lies, or that is an expression."""
    members = untar(data)
    at = int(random.integers(len(members)))
    info, body = members[at]
    length = int.from_bytes(body[8:10], "little")
    values = body[10 + length :]
    texts = [
        "{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000,), }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (4611686018427387904, 4), }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (-1,), }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (True,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (), }",
        f"{{'descr': __import__('os').system('touch {CANARY}'), 'fortran_order': "
        f"False, 'shape': (1,), }}",
        f"open({CANARY!r}, 'w')",
        "(" * 900,
        "[" * 400 + "]" * 400,
        "{'descr': [('a', '<i4', (1000000,))] , 'fortran_order': False, 'shape': (1000000,), }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (" + "9" * 900 + ",), }",
    ]
    text = texts[random.integers(len(texts))].encode()
    version = b"\x01\x00" + struct.pack("<H", len(text))
    if random.integers(3) == 0:
        version = b"\x02\x00" + struct.pack("<I", int(random.choice([len(text), 2**31, 2**32 - 1])))
    members[at] = member(
        info.name, b"\x93NUMPY" + version + text + (values if random.integers(2) else pickled())
    )
    return retar(members)


def bad_values(data: bytes, random: Random) -> bytes:
    """Numbers that are out of range, out of order, or merely different."""
    members = untar(data)
    at = int(random.integers(len(members)))
    info, body = members[at]
    array = np.lib.format.read_array(io.BytesIO(body), allow_pickle=False).copy()
    limits = np.iinfo(array.dtype)
    if len(array):
        values = [
            limits.min,
            limits.max,
            0,
            1,
            limits.max // 2,
            int(array.max()) + 1,
            int(array[random.integers(len(array))]),
        ]
        array[random.integers(len(array))] = values[random.integers(len(values))]
        if random.integers(4) == 0:
            array = array[::-1]
        elif random.integers(4) == 0:
            array = array[: random.integers(len(array))]
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    members[at] = member(info.name, buffer.getvalue())
    return retar(members)


TAR = [
    swap_bodies,
    strange_member,
    strange_member,
    huge_member,
    bad_npy,
    bad_npy,
    bad_values,
    bad_values,
    gz_bomb,
]


# --- JSON -----------------------------------------------------------------------------------------

ABSURD: list[Any] = [
    *(
        0,
        1,
        -1,
        2,
        3,
        2**31,
        2**47,
        2**53,
        2**63,
        10**30,
        1e308,
        -0.5,
        0.5,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        "x",
        "../../etc/passwd",
        "/etc/passwd",
        "a\x00b",
        "\ud800",
        "x" * 5000,
        "items-00000-of-00001.safetensors",
    ),
    *(
        None,
        True,
        False,
        [],
        {},
        [[]],
        {"users": 1},
        {"__class__": "os.system"},
        {"class_path": "os.system"},
    ),
]


def paths(value: Any, at: tuple = ()) -> list[tuple]:
    """Where every value of a JSON document lies."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [at] * bool(at) + [path for key, child in inner for path in paths(child, (*at, key))]


def change_json(value: Any, random: Random) -> Any:
    """Another value, another key, or none, at one or a few places."""
    for _ in range(int(random.choice([1, 1, 1, 2, 4]))):
        places = paths(value)
        *where, last = places[random.integers(len(places))]
        parent = value
        for key in where:
            parent = parent[key]
        action = random.integers(8)
        if action == 0:
            del parent[last]
        elif action == 1 and isinstance(parent, dict):
            parent[ABSURD[random.integers(15, 23)]] = parent.pop(last)
        elif action == 2 and isinstance(parent[last], int) and not isinstance(parent[last], bool):
            parent[last] += int(random.choice([1, -1, 10**6]))
        else:
            parent[last] = ABSURD[random.integers(len(ABSURD))]
    return value


def absurd_json(data: bytes, random: Random) -> bytes:
    return json.dumps(change_json(json.loads(data), random), indent=1).encode()


def absurd_counts(data: bytes, random: Random) -> bytes:
    """A manifest whose numbers are huge and agree with each other."""
    raw = json.loads(data)
    factor = int(random.choice([2, 10**6, 2**40, 2**60]))
    names = ["users", "interactions", "heldout", "bytes"]
    for name in random.permutation(names)[: random.integers(1, 4)]:
        for split in raw["splits"].values():
            for entry in [split, *split["shards"]]:
                if name in entry:
                    entry[name] *= factor
    if random.integers(2):
        raw["n_items"] *= factor
    return json.dumps(raw).encode()


def json_text(data: bytes, random: Random) -> bytes:
    """Text that strains the parser rather than the reader."""
    text = data.decode()
    choices = [
        text.replace("1", "1" + "0" * 5000, 1),
        text.replace(":", ": " + "[" * 50_000, 1),
        text.replace("{", '{"a":' * 50_000, 1),
        text + text,
        text.replace("{", '{"files": {}, "splits": 1, ', 1),
        "\ufeff" + text,
        text.replace("}", ",}", 1),
        f"__import__('os').system('touch {CANARY}')",
    ]
    chosen = choices[random.integers(len(choices))]
    return chosen.encode("utf-16" if random.integers(6) == 0 else "utf-8")


# --- safetensors ----------------------------------------------------------------------------------


def taken_apart(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_together(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def header_length(data: bytes, random: Random) -> bytes:
    choices = [
        0,
        1,
        7,
        10**8 + 1,
        2**32,
        2**63,
        2**64 - 1,
        len(data) - 8,
        len(data),
        int.from_bytes(data[:8], "little") + 1,
    ]
    return struct.pack("<Q", choices[random.integers(len(choices))]) + data[8:]


def header_text(data: bytes, random: Random) -> bytes:
    _, body = taken_apart(data)
    choices = [
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"{}",
        b"null",
        b'{"__metadata__": {"format": "pickle"}}',
        pickled(),
        b"\xff" * 64,
    ]
    text = choices[random.integers(len(choices))]
    return struct.pack("<Q", len(text)) + text + body


def swap_tensors(data: bytes, random: Random) -> bytes:
    header, body = taken_apart(data)
    names = list(header)
    a, b = (names[i] for i in random.integers(len(names), size=2))
    kind = random.integers(3)
    if kind == 0:
        header[a], header[b] = header[b], header[a]
    elif kind == 1:
        header[a]["data_offsets"] = header[b]["data_offsets"]
    else:
        header[a + ".exp_avg" if random.integers(2) else b] = header.pop(a)
    return put_together(header, body)


def lying_tensor(data: bytes, random: Random) -> bytes:
    """Another range of items, shape, offset or dtype."""
    header, body = taken_apart(data)
    name = list(header)[random.integers(len(header))]
    entry = header[name]
    kind = random.integers(5)
    if kind == 0:
        stem = name.split("[")[0]
        ranges = [
            "[0:0]",
            "[0:1000000000000]",
            "[5:2]",
            "[-1:4]",
            "[0:30]",
            "[30:60]",
            "[" + "9" * 30 + ":3]",
            "",
            "[0:1][0:30]",
        ]
        header[stem + ranges[random.integers(len(ranges))]] = header.pop(name)
    elif kind == 1:
        shapes = [
            [],
            [0],
            [10**12, 10**12],
            [2**63, 2],
            [-1],
            entry["shape"][::-1],
            [int(np.prod(entry["shape"]))],
            [1.5],
            "x",
        ]
        entry["shape"] = shapes[random.integers(len(shapes))]
    elif kind == 2:
        start, end = entry["data_offsets"]
        offsets = [
            [0, 2**63],
            [end, start],
            [start + 4, end + 4],
            [0, len(body)],
            [-4, end],
            [start, end - 4],
        ]
        entry["data_offsets"] = offsets[random.integers(len(offsets))]
    elif kind == 3:
        entry["dtype"] = ["I32", "U32", "F64", "F16", "BF16", "BOOL", "C64", "F8_E4M3", "X", 3][
            random.integers(10)
        ]
    else:
        del header[name]
    return put_together(header, body)


def strange_numbers(data: bytes, random: Random) -> bytes:
    """Weights and moments that are NaN, infinite, negative, huge or slightly different."""
    header, body = taken_apart(data)
    values = np.frombuffer(body, "<f4").copy()
    strange = [np.nan, np.inf, -np.inf, -1.0, 3e38, -3e38, 1e20, 1e-40, 0.0, 0.1, 100.0]
    value = strange[random.integers(len(strange))]
    if random.integers(2):
        values[random.integers(len(values))] = value
    else:
        entry = header[list(header)[random.integers(len(header))]]
        start, end = (o // 4 for o in entry["data_offsets"])
        values[start:end] = value
    return put_together(header, values.tobytes())


SAFETENSORS = [
    header_length,
    header_text,
    swap_tensors,
    swap_tensors,
    lying_tensor,
    lying_tensor,
    strange_numbers,
    strange_numbers,
]


# --- one file of a folder -------------------------------------------------------------------------

TARGETS: list[tuple[float, str, list[Mutator]]] = [
    (0.34, "shards/*.tar", TAR),
    (0.10, f"shards/{MANIFEST}", [absurd_json, absurd_json, absurd_counts, json_text]),
    (0.06, "shards/*.parquet", [flip, truncate]),
    (0.20, "*/checkpoints/[sb]*-*/items-*", SAFETENSORS),
    (0.12, "*/checkpoints/[sb]*-*/trunk.*", SAFETENSORS),
    (0.14, f"*/checkpoints/[sb]*-*/{Header.FILE}", [absurd_json, absurd_json, json_text]),
    (0.04, "*/items.parquet", [flip, truncate]),
]


def target(seed: int) -> tuple[str, list[Mutator], Random]:
    """The pattern of the files that `seed` chooses from, the mutators made for them, and the
    generator for all that follows."""
    random = np.random.default_rng([2024, seed])
    _, pattern, special = TARGETS[
        random.choice(len(TARGETS), p=[weight for weight, _, _ in TARGETS])
    ]
    return pattern, special, random


def mutate(seed: int, folder: Path) -> Mutation:
    pattern, special, random = target(seed)
    files = sorted(folder.glob(pattern))
    path = files[random.integers(len(files))]
    mutators = special if random.integers(10) < 7 else ANY
    mutator = mutators[random.integers(len(mutators))]
    data = path.read_bytes()
    changed = mutator(data, random)
    path.write_bytes(changed)
    vouched = seed % 3 != 0 and vouch(path, folder)
    run = path.relative_to(folder).parts[0]
    return Mutation(
        str(path.relative_to(folder)), mutator.__name__, vouched, None if run == "shards" else run
    )


def vouch(path: Path, folder: Path) -> bool:
    """Make the checksum of a changed file right; False where nothing holds one, or the file that
    holds it cannot be read."""
    data = path.read_bytes()
    if path.name == Header.FILE:
        try:
            header = json.loads(data)
            header["header_sha256"] = header_sha256(header)
        except (ValueError, TypeError, RecursionError):
            return False
        path.write_text(json.dumps(header))
        return True
    guard = path.with_name(Header.FILE if path.parent.parent.name == "checkpoints" else MANIFEST)
    if path.name == MANIFEST or not guard.is_file():
        return False
    raw = json.loads(guard.read_text())
    if guard.name == Header.FILE:
        raw["files"][path.name] = sha256_of(data)
        raw["header_sha256"] = header_sha256(raw)
    elif path.name in raw["files"]:
        raw["files"][path.name] = sha256_of(data)
    for split in raw["splits"].values() if guard.name == MANIFEST else ():
        for shard in split["shards"]:
            if shard["name"] == path.name:
                shard.update(bytes=len(data), sha256=sha256_of(data))
    guard.write_text(json.dumps(raw))
    return True

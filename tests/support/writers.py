"""Everything that writes a file, and where it must not: on a full disk, on a read-only one, over
what is not its own, twice at once.

`python -m tests.support.writers` runs all of it and prints a table; tests/faults/test_writers.py
runs the same cases as tests.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from dist_vasp.files import sole_writer
from dist_vasp.locks import lock_or_owner
from tests.support.disks import fill, read_only, small_disk
from tests.support.invoke import Commands, Done
from tests.support.wrong_inputs import prepare

DISK = "disk"  # the small filesystem, in the folder of the commands
_SHARD = (
    "python -m data_tools.shard interactions.parquet {out} --val_users 10 "
    "--test_users 20 --users_per_shard 30"
)
_TRAIN = "python launch/train.py --config small.yaml --run.dir {out}"
_EVALUATE = "python launch/evaluate.py --run run --device cpu"
_RECOMMEND = (
    "python launch/recommend.py --run export --histories many.csv --k 5 --device cpu --output {out}"
)
_SYNTHESIZE = "python -m data_tools.synthesize {out} --users 2000 --items 50 --interactions 40000"
_BENCHMARK = (
    "python launch/benchmark.py --config small.yaml --steps 1 --rounds 1 --modes "
    "weak --output {out}"
)

# name: (the command, its output, the name whose lock it holds)
WRITERS = {
    "synthesize": (_SYNTHESIZE, "x.parquet", ""),
    "shard": (_SHARD, "data", ""),
    "train": (_TRAIN, "new", ".lock"),
    "evaluate --json": (f"{_EVALUATE} --json {{out}}", "x.json", ""),
    "evaluate --per_user": (f"{_EVALUATE} --per_user {{out}}", "x.parquet", ""),
    "recommend csv": (_RECOMMEND, "x.csv", ""),
    "recommend parquet": (_RECOMMEND, "x.parquet", ""),
    "recommend jsonl": (_RECOMMEND, "x.jsonl", ""),
    "export": ("python launch/export.py --run run --output {out}", "x", ""),
    "ensemble": (
        "python launch/ensemble.py --members run flvae --output {out}",
        "x",
        "ensemble.json",
    ),
    "compare": (
        "python launch/compare.py --config compare.yaml --output {out}",
        "x",
        "report.json",
    ),
    "report": ("python launch/report.py run --users 0 --out {out}", "x.html", ""),
    "benchmark": (_BENCHMARK, "x", "benchmark.json"),
    "plan --json": ("python launch/plan.py --config small.yaml --json {out}", "x.json", ""),
    "doctor --json": (
        "python launch/doctor.py --config small.yaml --ranks 1 --json {out}",
        "x.json",
        "",
    ),
}
SLOW = ("doctor --json",)  # it starts ranks before it writes
OVERWRITES = (
    "synthesize",
    "shard",
    "recommend csv",
    "recommend parquet",
    "recommend jsonl",
)  # the others have no such option

_JSON = (
    "run/result.json",
    "shards/manifest.json",
    "export/export.json",
    "both/ensemble.json",
    "run/new/../environment.json",
)
_JSON += (
    "run/checkpoints/best/checkpoint.json",
    "run/checkpoints/new.json",
    "rates.json",
    "small.yaml",
    "pipe",
    "taken",
    "link",
)
_JSON += (
    "/dev/null",
    "both/x/../ensemble.json",
    "run/tensorboard/new.json",
    "run/closed-form-parts",
    "lists.jsonl",
)
_PARQUET = (
    "run/items.parquet",
    "shards/items.parquet",
    "shards/users-test.parquet",
    "export/items.parquet",
    "interactions.parquet",
)
_PARQUET += ("shards/users-validation.parquet", "link.parquet", "hard.parquet", "less.parquet")
_HOMES = (
    "run",
    "export",
    "both",
    "taken",
    "run/checkpoints",
    "run/tensorboard",
    "run/checkpoints/step-00000009",
    "small.yaml",
)
_LINKED = [
    f"linked-{name}"
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "result.json",
        "checkpoints",
        "tensorboard",
        "closed-form-parts",
        ".lock",
    )
]
PROTECTED = {
    "synthesize": _PARQUET,
    "shard": (*_HOMES, "interactions.parquet", "spoilt-shards", "link.parquet", "pipe"),
    "train": (
        "shards",
        "other",
        "export",
        "both",
        "own",
        "small.yaml",
        "run/checkpoints/new",
        "linked-run",
        *_LINKED,
    ),
    "evaluate --json": _JSON,
    "evaluate --per_user": _PARQUET,
    "recommend csv": (
        "many.csv",
        "few.csv",
        "link.csv",
        "hard.csv",
        "latin.csv",
        "taken/../many.csv",
        "spoilt.csv",
    ),
    "recommend parquet": _PARQUET,
    "recommend jsonl": ("run/metrics.jsonl", "notes.jsonl"),
    "export": (*_HOMES, "shards", "empty", "link"),
    "ensemble": (*(home for home in _HOMES if home != "both"), "shards", "foreign"),
    "compare": ("foreign", "linked-runs"),
    "report": (
        "run/config.yaml",
        "run/metrics.jsonl",
        "page.html",
        "shards/train-000000.tar",
        "run/checkpoints/x.html",
        "link",
    ),
    "benchmark": ("foreign",),
    "plan --json": _JSON,
    "doctor --json": _JSON,
}


def set_up(folder: Path) -> None:
    """Put files of somebody else beside the inputs of wrong_inputs.py."""
    rows = [f"{user},{item}\n" for user in range(4000) for item in (user % 40, (user * 7 + 1) % 40)]
    (folder / "many.csv").write_text("user,item\n" + "".join(rows) + "5000,90001\n")
    for name in ("link", "link.csv", "link.parquet"):
        (folder / name).symlink_to(
            "interactions.parquet" if name.endswith("parquet") else "many.csv"
        )
    (folder / "hard.parquet").hardlink_to(folder / "interactions.parquet")
    (folder / "hard.csv").hardlink_to(folder / "many.csv")
    (folder / "spoilt.csv").write_text('"user","rank","item","score"\n')
    (folder / "spoilt.skipped.csv").write_text("mine\n")
    (folder / "lists.jsonl").write_text('{"user": 1, "rank": 1, "item": 1, "score": 0.5}\n')
    (folder / "notes.jsonl").write_text('{"a": 1}\n')
    (folder / "page.html").write_text("<!doctype html><html lang=en>mine")
    os.mkfifo(folder / "pipe")
    for name in ("empty", "linked-runs"):
        (folder / name).mkdir()
    (folder / "linked-runs" / "runs").symlink_to("../empty")
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "result.json",
        "checkpoints",
        "tensorboard",
        "closed-form-parts",
        ".lock",
    ):
        copy, victim = folder / f"linked-{name}", folder / f"victim-{name}"
        shutil.copytree(folder / "run", copy, symlinks=True)
        if name == "closed-form-parts":  # which a finished run has no more
            (copy / name).mkdir()
        (copy / name).rename(victim)
        (copy / name).symlink_to(f"../{victim.name}")


def line_of(writer: str, out: str) -> str:
    return WRITERS[writer][0].format(out=out) + (" --overwrite" if writer in OVERWRITES else "")


def state(folder: Path) -> dict[str, str]:
    """Everything in a folder by name: kind and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode) and path.name != "filler":
            found[str(path)] = (
                "" if path.name == ".lock" else hashlib.sha256(path.read_bytes()).hexdigest()
            )
        else:
            found[str(path)] = os.readlink(path) if stat.S_ISLNK(mode) else str(stat.S_IFMT(mode))
    return found


def complaint(done: Done, *patterns: str) -> str:
    """What is wrong with the answer of a command that had to be refused; empty where it is
    right."""
    if done.status != 2:
        return f"status {done.status}: {done.err[-300:]}"
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    if len(lines) != 1 or "Traceback" in done.err or "Exception ignored" in done.err:
        return f"not one line: {done.err[-600:]}"
    missing = [pattern for pattern in patterns if not re.search(pattern, lines[0])]
    return f"{lines[0]!r} lacks {missing}" if missing else ""


def on_a_full_disk(writer: str, folder: Path, commands: Commands, leave: int = 0) -> str:
    with small_disk(folder / DISK, "2m" if not leave else "3m") as disk:
        fill(disk, leave)
        out = f"{DISK}/{WRITERS[writer][1]}"
        done = commands.run(line_of(writer, out))
        if leave and done.status == 0:  # it was small enough
            return ""
        wrong = complaint(done, DISK, "free some space")
        left = {path.removeprefix(f"{disk}/") for path in state(disk)} - {"filler"}
        # run.dir and the folder of a comparison are the user's own, to start again in
        names = r"\.lock|runs.*|config\.yaml|environment\.json|metrics\.jsonl|items\.parquet"
        allowed = rf"(new|x)(/({names}|checkpoints|tensorboard.*))?"
        if writer not in ("train", "compare"):
            allowed = ""
        foreign = [
            name for name in left if not re.fullmatch(allowed, name) or name.endswith(".tmp")
        ]
        return wrong or (f"left {foreign}" if foreign else "")


def on_a_read_only_disk(writer: str, folder: Path, commands: Commands) -> str:
    with small_disk(folder / DISK) as disk, read_only(disk):
        return complaint(
            commands.run(line_of(writer, f"{DISK}/{WRITERS[writer][1]}")),
            DISK,
            "Read-only file system",
        )


def over_what_is_not_its_own(writer: str, folder: Path, commands: Commands) -> str:
    before, wrong = state(folder), []
    for target in PROTECTED[writer]:
        found = complaint(commands.run(line_of(writer, target)))
        after = state(folder)
        if after != before:
            changed = sorted(
                name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
            )
            found += f" changed {[name.removeprefix(f'{folder}/') for name in changed[:4]]}"
            before = after
        if found:
            wrong.append(f"{target}: {found}")
    return "; ".join(wrong)


def while_another_writes_it(writer: str, folder: Path, commands: Commands) -> str:
    _, name, lock = WRITERS[writer]
    with tempfile.TemporaryDirectory(dir=folder) as place, ExitStack() as held:
        output = Path(place) / name
        if lock:
            output.mkdir()
        if lock == ".lock":
            held.enter_context(_run_lock(output / lock))
        else:
            held.enter_context(sole_writer(output / lock if lock else output))
        before_it = state(output.parent)
        wrong = complaint(
            commands.run(line_of(writer, str(output.relative_to(folder)))),
            "another command|in use by",
        )
        return wrong or ("" if state(output.parent) == before_it else "it left something")


def _run_lock(path: Path) -> ExitStack:
    held = lock_or_owner(path)
    assert not isinstance(held, str)
    stack = ExitStack()
    stack.callback(held.close)
    return stack


def again_over_its_own(writer: str, folder: Path, commands: Commands) -> str:
    """What a command wrote, the same command may write again; `train` then has nothing to do."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        out = str((Path(place) / WRITERS[writer][1]).relative_to(folder))
        for _ in range(2):
            done = commands.run(line_of(writer, out))
            refused = writer == "export" and _ == 1
            if done.status != (2 if refused else 0) and not (
                writer == "doctor --json" and done.status == 1
            ):
                return f"status {done.status}: {done.err[-300:]}"
        left = [
            path.name
            for path in Path(place).rglob("*")
            if re.search(r"\.(tmp|old|lock)$", path.name) and path.name != ".lock"
        ]
        return f"left {left}" if left else ""


SITUATIONS: dict[str, Callable[[str, Path, Commands], str]] = {
    "full disk": on_a_full_disk,
    "disk that fills": lambda writer, folder, commands: on_a_full_disk(
        writer, folder, commands, 4096
    ),
    "read-only": on_a_read_only_disk,
    "not its own": over_what_is_not_its_own,
    "twice at once": while_another_writes_it,
    "again": again_over_its_own,
}


def rows(folder: Path, commands: Commands) -> Iterator[tuple[str, dict[str, str]]]:
    for writer in WRITERS:
        yield (
            writer,
            {name: situation(writer, folder, commands) for name, situation in SITUATIONS.items()},
        )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        all_commands = Commands(Path(place))
        prepare(Path(place), all_commands)
        set_up(Path(place))
        print(
            "| writer | " + " | ".join(SITUATIONS) + " |\n" + "|---" * (len(SITUATIONS) + 1) + "|",
            flush=True,
        )
        bad = []
        for name_of_writer, found in rows(Path(place), all_commands):
            cells = [
                f"{len(PROTECTED[name_of_writer])} refused"
                if s == "not its own" and not w
                else "WRONG"
                if w
                else "good"
                for s, w in found.items()
            ]
            print(f"| {name_of_writer} | " + " | ".join(cells) + " |", flush=True)
            bad += [
                f"{name_of_writer}, {situation}: {wrong}"
                for situation, wrong in found.items()
                if wrong
            ]
        print("\n".join(bad))
        sys.exit(bool(bad))

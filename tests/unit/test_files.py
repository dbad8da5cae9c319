"""A file or folder of ours appears whole or not at all, never over what is not ours, and by one
command at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import secrets
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from dist_vasp import files, locks, places, recognise, temporary
from dist_vasp.checkpoint import header
from dist_vasp.data.manifest import ITEMS_FILE, MANIFEST, SPLITS, shard_name, users_file
from dist_vasp.files import new_file, new_folder, open_append, replace_text, sole_writer
from dist_vasp.ranking import export, load
from tests.support.disks import fill, read_only, small_disk


def write(path: Path, data: bytes = b"new", **options) -> None:
    with new_file(path, "--output", **options) as handle:
        handle.write(data)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- a file ---------------------------------------------------------------------------------------


def test_a_file_appears_with_the_modes_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "a")
    finally:
        os.umask(before)
    assert (tmp_path / "a").read_bytes() == b"new" and names(tmp_path) == ["a"]
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, b"old"])
def test_nothing_appears_when_the_work_fails(tmp_path, error, before):
    if before:
        (tmp_path / "a").write_bytes(before)

    def work() -> None:
        with new_file(tmp_path / "a", overwrite=True) as handle:
            handle.write(b"half")
            raise error

    with pytest.raises(error):
        work()
    assert names(tmp_path) == (["a"] if before else [])
    assert not before or (tmp_path / "a").read_bytes() == before


@pytest.mark.parametrize("make", [new_file, new_folder])
def test_a_signal_at_any_moment_leaves_nothing(tmp_path, make):
    """An exception comes before each line of the module in turn, as a signal's handler would raise
    it."""
    counted, limit = 0, 0

    def trace(frame, event, argument):
        nonlocal counted
        if frame.f_code.co_filename not in (files.__file__, temporary.__file__):
            return None
        if event == "line":
            counted += 1
            if counted == limit:
                raise KeyboardInterrupt
        return trace

    for moment in range(1, 200):
        counted, limit = 0, moment
        before = sys.gettrace()  # a measurement of line coverage
        sys.settrace(trace)
        try:
            with make(tmp_path / "a"):
                pass
        except KeyboardInterrupt:
            pass
        else:
            break
        finally:
            sys.settrace(before)
        left = [name for name in names(tmp_path) if name != "a"]
        assert not [name for name in left if name.endswith((".tmp", ".old"))], moment
        for path in tmp_path.iterdir():
            path.rmdir() if path.is_dir() else path.unlink()
    assert 20 < moment < 199


def test_the_folders_above_are_made_where_asked_and_go_again(tmp_path):
    write(tmp_path / "x" / "y" / "a", make_parents=True)
    assert (tmp_path / "x" / "y" / "a").read_bytes() == b"new"
    with pytest.raises(SystemExit), new_file(tmp_path / "z" / "y" / "a", make_parents=True):
        raise SystemExit
    assert names(tmp_path) == ["x"]


def test_a_temporary_name_that_is_taken_is_not_written_through(tmp_path, monkeypatch):
    (tmp_path / "victim").write_text("mine")
    monkeypatch.setattr(secrets, "token_hex", lambda n: "0" * 15 + "x")
    (tmp_path / f".a.{'0' * 15}x.tmp").symlink_to("victim")
    with pytest.raises(ValueError, match="cannot be written"):
        write(tmp_path / "a")
    with pytest.raises(ValueError, match="cannot be written"):
        replace_text(tmp_path / "a", "new")
    assert (tmp_path / "victim").read_text() == "mine" and not (tmp_path / "a").exists()


def test_temporary_names_differ(tmp_path):
    seen = set()
    for _ in range(5):
        with new_file(tmp_path / "a"):
            seen |= set(names(tmp_path))
    assert len({name for name in seen if name.endswith(".tmp")}) == 5


def test_a_long_name(tmp_path):
    write(tmp_path / ("é" * 127))
    assert names(tmp_path) == ["é" * 127]
    with pytest.raises(ValueError, match="File name too long"):
        write(tmp_path / ("é" * 128))


def _special(folder: Path, kind: str) -> Path:
    path = folder / "special"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    elif kind == "device":
        return Path("/dev/null")
    elif kind == "folder":
        path.mkdir()
    else:
        if kind == "link":
            (folder / "victim").write_text("mine")
        path.symlink_to(folder / "victim")
    return path


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder", "link", "dangling link"])
def test_only_a_regular_file_is_replaced(tmp_path, kind):
    path = _special(tmp_path, kind)
    before = names(tmp_path)
    for attempt in (
        lambda: write(path, overwrite=True),
        lambda: replace_text(path, "x"),
        lambda: open_append(path),
    ):
        with pytest.raises(ValueError, match=f"is a {kind.split()[-1]}"):
            attempt()
    assert names(tmp_path) == before and (
        kind != "link" or (tmp_path / "victim").read_text() == "mine"
    )


def test_places_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    for path, message in {
        tmp_path / "no" / "a": "no does not exist; create it first",
        tmp_path / "file" / "a": "file is not a folder",
        tmp_path / "..": "is a folder",
        Path(): "is a folder",
    }.items():
        with pytest.raises(ValueError, match=message):
            write(path)


def test_an_existing_file_is_replaced_where_asked_and_ours(tmp_path):
    path = tmp_path / "a"
    path.write_text("ours")
    for options in (
        {"overwrite": False},
        {"overwrite": True, "ours": lambda p: False},
        {"ours": lambda p: False},
    ):
        with pytest.raises(ValueError, match="exists"):
            write(path, **options)
    assert path.read_text() == "ours"
    write(path, overwrite=True, ours=recognise.begins_with(b"ours", b"theirs"))
    path.write_bytes(b"")
    write(path, overwrite=True, ours=lambda p: False)
    assert path.read_bytes() == b"new"


def test_json_is_recognised_by_what_it_holds(tmp_path):
    path = tmp_path / "a"
    ours = recognise.is_json(lambda found: found["kind"] == "mine")
    for text, expected in {
        '{"kind": "mine"}': True,
        '{"kind": 1}': False,
        "[]": False,
        "{}": False,
        "[" * 9999: False,
    }.items():
        path.write_text(text)
        assert recognise.recognised(ours, path) is expected, text[:20]
    path.write_bytes(b"\xff\xfe")
    assert not recognise.recognised(ours, path)


@pytest.mark.parametrize("spelling", ["itself", "dots", "symbolic", "hard"])
def test_an_input_is_never_replaced(tmp_path, spelling):
    source = tmp_path / "in.csv"
    source.write_text("mine")
    path = {"itself": source, "dots": tmp_path / "x" / ".." / "in.csv"}.get(
        spelling, tmp_path / "out.csv"
    )
    (tmp_path / "x").mkdir()
    if spelling == "symbolic":
        path.symlink_to(source)
    elif spelling == "hard":
        path.hardlink_to(source)
    with pytest.raises(
        ValueError, match=r"--output .*is the file of --histories, which would be lost"
    ):
        write(path, overwrite=True, inputs=[("--histories", source), ("--other", None)])
    assert source.read_text() == "mine"


def test_a_file_of_an_input_folder_is_never_replaced(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("mine")
    with pytest.raises(
        ValueError, match=r"a\.csv is a file of --histories .*in, which would be lost"
    ):
        write(tmp_path / "in" / "a.csv", overwrite=True, inputs=[("--histories", tmp_path / "in")])
    write(tmp_path / "in" / "b.csv", inputs=[("--histories", tmp_path / "in")])
    assert (tmp_path / "in" / "a.csv").read_text() == "mine"


def test_names_of_a_run_and_of_data_are_protected(tmp_path):
    """The names are those that the modules use."""
    run, data, exported, both = (tmp_path / name for name in ("run", "data", "export", "both"))
    best = run / "checkpoints" / "best-00000001"
    best.mkdir(parents=True)
    (run / "tensorboard").mkdir()
    for folder, name in (
        (data, MANIFEST),
        (exported, export.ExportHeader.FILE),
        (both, load.ENSEMBLE),
        (best, header.Header.FILE),
    ):
        folder.mkdir(exist_ok=True)
        (folder / name).touch()
    protected = [
        run / name
        for name in ("config.yaml", "environment.json", "metrics.jsonl", "result.json", ".lock")
    ]
    protected += [
        run / "checkpoints" / "mine.csv",
        best / header.TRUNK,
        best / "mine.csv",
        run / "tensorboard" / "mine.csv",
    ]
    protected += [
        best / header.items_file(0, 2),
        run / ITEMS_FILE,
        both / load.ENSEMBLE,
    ]
    protected += [
        data / MANIFEST,
        data / ITEMS_FILE,
        data / shard_name("test", 7),
    ]
    protected += [data / users_file(split) for split in SPLITS]
    protected += [
        exported / name
        for name in (export.ExportHeader.FILE, ITEMS_FILE, export.PROGRAM, header.TRUNK)
    ]
    (tmp_path / "elsewhere").symlink_to(run)
    protected += [
        tmp_path / "elsewhere" / "result.json",
        run / "checkpoints" / ".." / "result.json",
    ]
    for path in protected:
        for make in (new_file, new_folder):
            with (
                pytest.raises(ValueError, match=r"would be a file of|is a link|exists"),
                make(path, "--output", True),
            ):
                pass
    for path in (
        run / "report.html",
        data / "lists.csv",
        exported / "lists.csv",
        both / "test.json",
    ):
        write(path)


def test_a_whole_disk_and_a_read_only_one(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        (disk / "old").write_bytes(b"old")
        fill(disk)
        before = names(disk)
        table = pa.table({"a": list(range(90_000))})

        def parquet() -> None:
            with (
                new_file(disk / "a", "--output") as handle,
                pq.ParquetWriter(handle, table.schema, compression="none") as writer,
            ):
                writer.write_table(table)

        def csv() -> None:
            with (
                new_file(disk / "a", "--output") as handle,
                pa_csv.CSVWriter(handle, table.schema) as writer,
            ):
                writer.write_table(table)

        def folder() -> None:
            with new_folder(disk / "a", "--output") as inside:
                (inside / "b").write_bytes(b"x" * 10_000)

        def append() -> None:
            with open_append(disk / "old", "choose another --output") as handle:
                handle.write(b"x" * 10_000)

        def text() -> None:
            replace_text(disk / "old", "x" * 10_000, "choose another --output")

        everything = (lambda: write(disk / "a", b"x" * 10_000), parquet, csv, folder, append, text)
        for attempt in everything:
            with pytest.raises(
                ValueError,
                match=r"disk/\w+ cannot be written \(No space left on device\); free "
                r"some space or ",
            ):
                attempt()
            assert names(disk) == before and (disk / "old").read_bytes().startswith(b"old")
        with read_only(disk):
            for attempt in everything:
                with pytest.raises(
                    ValueError,
                    match=r"cannot be written \(Read-only file system\); choose another --output",
                ):
                    attempt()
        assert names(disk) == before


def test_appending_leaves_a_hard_linked_copy_alone(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "copy").hardlink_to(tmp_path / "a")
    with open_append(tmp_path / "a") as handle:
        handle.write(b"2")
    assert (tmp_path / "a").read_bytes() == b"12" and (tmp_path / "copy").read_bytes() == b"1"


# --- one command at a time ------------------------------------------------------------------------


def test_two_writers_of_one_output_exclude_each_other(tmp_path):
    for make in (new_file, new_folder):
        path = tmp_path / make.__name__
        with make(path, "--output"):
            with pytest.raises(
                ValueError, match=rf"--output {path} is being written by another command"
            ):
                write(path)
            write(tmp_path / f"{make.__name__}-b")
    assert names(tmp_path) == ["new_file", "new_file-b", "new_folder", "new_folder-b"]


def _race(folder: Path, number: int, start, won) -> None:
    start.wait()
    for attempt in range(20):
        try:
            with new_file(folder / f"a{attempt}", overwrite=False) as handle:
                handle.write(b"%d" % number * 5000)
            won.put((attempt, number))
        except ValueError as error:
            if "another command" not in str(error) and "exists" not in str(error):
                raise


def test_of_many_processes_one_writes(tmp_path):
    context = multiprocessing.get_context("fork")
    start, won = context.Barrier(4), context.Queue()
    racers = [
        context.Process(target=_race, args=(tmp_path, number, start, won)) for number in range(4)
    ]
    for racer in racers:
        racer.start()
    winners = [won.get(timeout=60) for _ in range(20)]
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    assert won.empty() and sorted(attempt for attempt, _ in winners) == list(range(20))
    for attempt, number in winners:
        assert (tmp_path / f"a{attempt}").read_bytes() == b"%d" % number * 5000
    assert len(names(tmp_path)) == 20


def test_what_a_killed_process_left_blocks_nothing_and_goes(tmp_path):
    code = (
        "import sys, time; from dist_vasp.files import new_file\n"
        "with new_file(sys.argv[1]) as handle:\n    print('begun', flush=True); time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(files.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "a"], env=environment, stdout=subprocess.PIPE
    )
    assert process.stdout and process.stdout.readline()
    with pytest.raises(ValueError, match="another command"):
        write(tmp_path / "a")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(names(tmp_path)) == 2
    (tmp_path / ".ab.0123456789abcdef.tmp").touch()  # of another output
    (tmp_path / ".a.mine.tmp").touch()
    write(tmp_path / "a")
    assert names(tmp_path) == [".a.mine.tmp", ".ab.0123456789abcdef.tmp", "a"]


def test_a_filesystem_without_locks(tmp_path, monkeypatch):
    def none(descriptor, how):
        raise OSError(files.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with sole_writer(tmp_path / "a"):
        write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_lock_that_is_no_file_is_left_alone(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".a.lock").symlink_to("victim")
    with pytest.raises(ValueError, match="cannot be written"):
        write(tmp_path / "a")
    (tmp_path / ".b.lock").mkdir()
    with pytest.raises(ValueError, match="cannot be written"):
        write(tmp_path / "b")
    assert (tmp_path / "victim").read_text() == "mine"


# --- a folder -------------------------------------------------------------------------------------


def fill_folder(path: Path, text: str, **options) -> None:
    with new_folder(
        path,
        "--output",
        files_of=lambda folder: json.loads((folder / "list").read_text()),
        **options,
    ) as inside:
        (inside / "a").write_text(text)
        (inside / "list").write_text('["a", "list"]')


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_replaces_an_earlier_one(tmp_path, exchange, monkeypatch):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    fill_folder(tmp_path / "a", "1")
    with pytest.raises(ValueError, match="exists"):
        fill_folder(tmp_path / "a", "2")
    fill_folder(tmp_path / "a", "2", overwrite=True)
    assert (tmp_path / "a" / "a").read_text() == "2" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("foreign", ["notes.txt", "folder", "link", ".DS_Store"])
def test_a_folder_that_holds_something_else_stays(tmp_path, foreign):
    fill_folder(tmp_path / "a", "1")
    path = tmp_path / "a" / foreign
    if foreign == "folder":
        path.mkdir()
    elif foreign == "link":
        (tmp_path / "a" / "a").unlink()
        (tmp_path / "a" / "a").symlink_to("/etc/hostname")
        path = tmp_path / "a" / "a"
    else:
        path.touch()
    with pytest.raises(ValueError, match=f"holds '{path.name}', which this command did not write"):
        fill_folder(tmp_path / "a", "2", overwrite=True)
    assert path.exists() and names(tmp_path) == ["a"]


def test_an_input_inside_a_folder_keeps_it(tmp_path):
    fill_folder(tmp_path / "a", "1")
    with pytest.raises(ValueError, match=r"holds .* of --titles, which would be lost"):
        fill_folder(
            tmp_path / "a", "2", overwrite=True, inputs=[("--titles", tmp_path / "a" / "a")]
        )


def test_a_failed_exchange_puts_the_earlier_folder_back(tmp_path, monkeypatch):
    fill_folder(tmp_path / "a", "1")
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    rename = os.rename

    def fails(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(files.errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(ValueError, match="Input/output error"):
        fill_folder(tmp_path / "a", "2", overwrite=True)
    assert (tmp_path / "a" / "a").read_text() == "1" and names(tmp_path) == ["a"]


def test_a_folder_that_was_moved_aside_comes_back(tmp_path):
    """A process was killed between the two renames of a filesystem without exchange."""
    fill_folder(tmp_path / "a", "1")
    (tmp_path / "a").rename(tmp_path / f".a.{'0' * 16}.old")
    with pytest.raises(ValueError, match="exists"):
        fill_folder(tmp_path / "a", "2", overwrite=False)
    assert (tmp_path / "a" / "a").read_text() == "1" and names(tmp_path) == ["a"]


def test_errors_of_the_work_are_not_taken_for_those_of_the_disk(tmp_path):
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "a"):
        (tmp_path / "absent").read_text()
    with pytest.raises(ValueError, match="cannot be written"), new_folder(tmp_path / "a") as inside:
        (inside / "b" / "c").write_text("")
    assert not names(tmp_path)


@pytest.mark.parametrize("name", ["x" * 5000, "file/below", "loop"])
def test_a_path_that_cannot_be_used_is_said_in_one_line(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError) as raised:
        (tmp_path / name).read_bytes()
    assert re.fullmatch(
        rf"{tmp_path}/\w.* cannot be used \(.+\); correct that, or name another place",
        places.path_error(raised.value),
    )
    assert len(places.path_error(raised.value)) < 400
    assert not places.path_error(OSError("an error of ours")) and not places.path_error(
        KeyError("x")
    )

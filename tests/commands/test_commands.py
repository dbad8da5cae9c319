"""The launch scripts as a user meets them: files, exit statuses, one readable line per mistake
(DESIGN.md, section 7)."""

from __future__ import annotations

import fcntl
import io
import json
import pickle
import re
import shutil
import socket
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.csv as pa_csv
import pytest
import yaml

from dist_vasp.config.command_line import load
from dist_vasp.data.hashing import sha256_of
from dist_vasp.parallel.agree import AgreedError
from tests.support.invoke import fails, run_script, succeeds
from tests.support.make_shards import write_folder
from tests.support.sizes import sizes

N_ITEMS, STEPS_PER_EPOCH, STEPS = 60, 6, 9
METRICS = [
    "ndcg@100",
    "ndcg@100_se",
    "ndcg@20",
    "ndcg@20_se",
    "recall@20",
    "recall@20_se",
    "recall@50",
    "recall@50_se",
    "coverage@100",
]
METRICS += ["n_users", "n_users_unscored"]


def rows(n: int, seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [
        np.sort(random.choice(N_ITEMS, random.integers(1, 15), replace=False)) for _ in range(n)
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    heldout = [(row[1:], row[:1] if u % 4 else row[:0]) for u, row in enumerate(rows(20, 1))]
    write_folder(path, rows(96, 0), heldout[:8], heldout[8:], n_items=N_ITEMS)
    return path


def training(shards: Path | str, run_dir: Path | str, *more: str) -> list[str]:
    """Arguments of a small run; later ones win."""
    return [
        *("--data.shards", str(shards), "--run.dir", str(run_dir), "--device", "cpu"),
        *("--data.batch_size", "16", "--parallel.lanes", "4", "--run.max_steps", str(STEPS)),
        *sizes(),
        *("--optimizer.schedule", "[{epochs: 1, lr: 0.01}, {epochs: 2, lr: 0.001}]"),
        *more,
    ]


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    """A run of STEPS steps in one go."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    out = succeeds("train", *training(shards, path))
    assert re.search(r"test: NDCG@100 0\.\d+", out)
    return path


@pytest.fixture
def copied(shards, tmp_path) -> Path:
    """The shards, to be damaged."""
    return Path(shutil.copytree(shards, tmp_path / "shards"))


def lines_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# --- what a run leaves ----------------------------------------------------------------------------


def test_files_of_a_run(run, shards):
    result = json.loads((run / "result.json").read_text())
    assert list(result) == [
        "validation",
        "test",
        "seconds_training",
        "epochs",
        "world_size",
        "checkpoint",
        "checkpoint_sha256",
    ]
    for split, n_users, n_unscored in (("validation", 6, 2), ("test", 9, 3)):
        assert sorted(result[split]) == sorted(METRICS)
        assert (result[split]["n_users"], result[split]["n_users_unscored"]) == (
            n_users,
            n_unscored,
        )
        assert all(0 <= result[split][name] <= 1 for name in METRICS[:9])
    assert (result["world_size"], result["epochs"]) == (1, STEPS / STEPS_PER_EPOCH)
    assert result["seconds_training"] > 0

    lines = lines_of(run)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "loss" not in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for line in steps:
        assert {
            "step",
            "epoch",
            "loss",
            "focal",
            "kl",
            "lr",
            "grad_norm",
            "users_per_second",
        } <= line.keys()
        assert line["epoch"] == (line["step"] - 1) // STEPS_PER_EPOCH
        assert line["memory"] > 1e7 and line["bytes_moved"] == 0 and line["nease_logit_std"] > 0
        assert line["lr"] == (0.01 if line["epoch"] == 0 else 0.001)
        assert line["loss"] == pytest.approx(line["focal"] + line["kl"], rel=1e-12)
    assert [(line["epoch"], line["split"]) for line in evaluations] == [
        (0, "validation"),
        (1, "validation"),
    ]
    assert all({"epoch", "split", *METRICS} <= line.keys() for line in evaluations)
    best = max(evaluations, key=lambda line: line["ndcg@100"])
    assert result["checkpoint"] == f"best-{best['step']:08d}"
    assert result["validation"] == pytest.approx({name: best[name] for name in METRICS}, rel=1e-6)

    resolved = load(run / "config.yaml")
    assert (resolved.data.shards, resolved.model.hidden, resolved.run.max_steps) == (
        str(shards),
        8,
        STEPS,
    )
    names = {p.name for p in (run / "checkpoints").iterdir()}
    # a step checkpoint that is kept keeps the best one that it names
    assert names == {
        "best",
        "best-00000006",
        result["checkpoint"],
        "step-00000006",
        "step-00000009",
    }
    assert {p.name for p in run.iterdir() if not p.name.startswith(".")} == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
        "items.parquet",
        "trained-users.parquet",
        "result.json",
    }
    assert not list(run.rglob("*.pkl")) and not list(run.rglob("*.pt"))
    (start,) = json.loads((run / "environment.json").read_text())["starts"]
    assert (start["after_step"], start["ranks"], start["hosts"], start["device"]) == (
        0,
        1,
        1,
        "cpu",
    )
    assert start["versions"]["torch"] and socket.gethostname() not in json.dumps(start)


def test_evaluate_says_what_the_run_said(run, shards, tmp_path, call):
    from launch.evaluate import main

    result = json.loads((run / "result.json").read_text())
    out = succeeds("evaluate", "--run", run, "--json", tmp_path / "test.json", "--device", "cpu")
    assert json.loads((tmp_path / "test.json").read_text()) == {"test": result["test"]}
    assert result["checkpoint"] in out and f"{result['test']['ndcg@100']:.4f}" in out
    call(
        main,
        "--run",
        run,
        "--split",
        "validation",
        "--json",
        tmp_path / "validation.json",
        "--device",
        "cpu",
    )
    assert json.loads((tmp_path / "validation.json").read_text()) == {
        "validation": result["validation"]
    }
    call(
        main,
        "--run",
        run,
        "--checkpoint",
        "step-00000006",
        "--shards",
        shards,
        "--json",
        tmp_path / "other.json",
    )
    assert json.loads((tmp_path / "other.json").read_text())["test"].keys() == result["test"].keys()
    call(
        main, "--baseline", "popularity", "--shards", shards, "--json", tmp_path / "popularity.json"
    )
    popularity = json.loads((tmp_path / "popularity.json").read_text())["test"]
    assert sorted(popularity) == sorted(METRICS) and popularity != result["test"]


def test_evaluate_on_two_ranks_says_the_same(run, tmp_path):
    succeeds("evaluate", "--run", run, "--json", tmp_path / "test.json", "--device", "cpu", ranks=2)
    found, expected = (
        json.loads((tmp_path / "test.json").read_text())["test"],
        json.loads((run / "result.json").read_text())["test"],
    )
    assert found == pytest.approx(expected, rel=1e-9)


def test_metrics_by_name_and_the_best_checkpoint_by_one_of_them(shards, tmp_path, call):
    from launch.evaluate import main
    from launch.train import main as train

    asked = ["--run.metrics", "hr@5,diversity@5", "--run.best_by", "map@7"]
    asked += ["--model.kind", "nease"]
    call(train, *training(shards, tmp_path / "run", *asked))
    evaluations = [line for line in lines_of(tmp_path / "run") if "loss" not in line]
    best = max(evaluations, key=lambda line: line["map@7"])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["checkpoint"] == f"best-{best['step']:08d}"
    added = {"map@7", "map@7_se", "hr@5", "hr@5_se", "diversity@5"}
    assert result["test"].keys() == {*METRICS, *added}
    output = ["--json", tmp_path / "test.json", "--device", "cpu"]
    call(main, "--run", tmp_path / "run", *output)
    assert json.loads((tmp_path / "test.json").read_text())["test"] == result["test"]
    call(main, "--run", tmp_path / "run", *output, "--metrics", "gini@3")
    found = json.loads((tmp_path / "test.json").read_text())["test"]
    assert found.keys() == {*METRICS, "gini@3"}
    other = training(shards, tmp_path / "run", *asked, "--run.best_by", "hr@5")
    with pytest.raises(AgreedError, match=r"run\.best_by was 'map@7' and is now 'hr@5'"):
        call(train, *other)


def test_recommend(run, tmp_path, call):
    from launch.recommend import main

    histories, output = tmp_path / "histories.csv", tmp_path / "lists.csv"
    histories.write_text("user,item\nann,1000\nann,1005\nbob,1001\nbob,99\neve,98\n")
    arguments = [
        "--run",
        run,
        "--histories",
        histories,
        "--k",
        3,
        "--output",
        output,
        "--device",
        "cpu",
    ]
    out = succeeds("recommend", *arguments)
    assert (
        "6 recommendations for 2 users; 1 users without a list are in" in out
        and "2 of unknown items" in out
    )
    table = pa_csv.read_csv(output).to_pydict()
    assert table["user"] == ["ann"] * 3 + ["bob"] * 3
    assert table["rank"] == [1, 2, 3] * 2
    assert not {1000, 1005} & set(table["item"][:3]) and 1001 not in table["item"][3:]
    assert all(1000 <= item < 1000 + N_ITEMS for item in table["item"])
    assert all(0 < score < 1 for score in table["score"])
    assert pa_csv.read_csv(tmp_path / "lists.skipped.csv").to_pydict()["user"] == ["eve"]

    before = output.read_bytes()
    for changed, message in (
        ({}, r"lists\.csv exists; pass --overwrite"),
        (
            {"--output": tmp_path / "o.csv", "--histories": tmp_path / "no.csv"},
            r"no\.csv does not exist",
        ),
        ({"--output": tmp_path / "o.csv", "--k": 0}, "--k is 0, expected at least 1"),
        (
            {"--output": tmp_path / "o.csv", "--run": tmp_path / "no"},
            "no is not a folder; pass the run.dir",
        ),
        ({"--output": tmp_path / "o.txt"}, r"ends in \.txt, expected one of"),
    ):
        values = dict(zip(arguments[::2], arguments[1::2], strict=True)) | changed
        with pytest.raises(ValueError, match=message):
            call(main, *(a for pair in values.items() for a in pair))
    assert output.read_bytes() == before
    call(main, *arguments, "--overwrite")
    assert output.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "histories.csv",
        "lists.csv",
        "lists.skipped.csv",
    ]


def test_a_run_in_two_parts_equals_one_in_one_go(run, shards, tmp_path):
    parts = tmp_path / "parts"
    out = succeeds("train", *training(shards, parts, "--run.max_steps", "4"))
    assert "on cpu in fp32; " in out and "earlier name" not in out
    assert json.loads((parts / "result.json").read_text())["epochs"] == 4 / STEPS_PER_EPOCH
    cut = (parts / "metrics.jsonl").read_text()
    # as a kill leaves it: lines of steps that were not saved, and half a line
    (parts / "metrics.jsonl").write_text(
        cut + '{"step": 5, "epoch": 0, "loss": 1.0}\n{"step": 6, "epo'
    )
    changed = ("--data.workers", "0", "--run.keep", "5", "--parallel.trunk_dtype", "fp32")
    out = succeeds("train", *training(shards, parts, *changed))
    assert "resumed from step 4" in out
    assert (
        "parallel.trunk_dtype is an earlier name of parallel.precision; "
        "set parallel.precision to fp32 instead"
    ) in out
    for name in ("trunk.safetensors", "items-00000-of-00001.safetensors"):
        whole, resumed = (
            (path / "checkpoints" / "step-00000009" / name).read_bytes() for path in (run, parts)
        )
        assert whole == resumed, f"{name} differs"
    losses = [
        [
            (line["step"], line["loss"], line["grad_norm"])
            for line in lines_of(path)
            if "loss" in line
        ]
        for path in (run, parts)
    ]
    assert losses[0] == losses[1]


def test_a_run_that_is_done_only_says_so_again(run, shards, tmp_path, call):
    from launch.train import main

    done = shutil.copytree(run, tmp_path / "done", symlinks=True)
    call(main, *training(shards, done))
    before, after = (json.loads((path / "result.json").read_text()) for path in (run, done))
    assert after == before
    assert lines_of(done) == lines_of(run)
    with pytest.raises(
        ValueError,
        match=r"is at step 9, beyond the 5 steps asked for; lengthen "
        r"optimizer\.schedule or run\.max_steps",
    ):
        call(main, *training(shards, done, "--run.max_steps", "5"))


def test_dry_run_writes_nothing(run, shards, tmp_path, call, capsys):
    from launch.train import main

    call(main, *training(shards, tmp_path / "new"), "--dry_run")
    assert "would start anew" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()
    call(main, *training(shards, run), "--dry_run")
    assert "would resume from step-00000009" in capsys.readouterr().out


# --- mistakes that end the process ----------------------------------------------------------------


def test_train_exits_with_2_and_one_line(shards, copied, tmp_path):
    run_dir = tmp_path / "run"
    line = fails("train", *training(shards, run_dir), "--model.hiden", "8")
    assert "model.hiden is not a key of the configuration; did you mean model.hidden?" in line
    file = copied / "test-000000.tar"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    line = fails("train", *training(copied, run_dir))
    assert (
        f"{file} has " in line
        and "SHA-256" in line
        and "restore it or shard the data again" in line
    )
    assert not run_dir.exists()


def test_ranks_that_do_not_divide_the_lanes(shards, tmp_path):
    line = fails("train", *training(shards, tmp_path / "run", "--parallel.lanes", "5"), ranks=2)
    assert "parallel.lanes is 5 but 2 ranks do not divide it" in line
    assert not (tmp_path / "run").exists()


def test_evaluate_and_recommend_exit_with_2_and_one_line(tmp_path):
    assert "expected either --run RUN_DIR or --baseline popularity" in fails("evaluate")
    output = tmp_path / "o.csv"
    histories = tmp_path / "h.csv"
    histories.write_text("user,item\n1,2\n")
    line = fails(
        "recommend",
        "--run",
        tmp_path,
        "--histories",
        histories,
        "--output",
        output,
        "--device",
        "cpu",
    )
    assert "holds no checkpoint" in line
    assert not output.exists()


def test_debug_shows_the_traceback(tmp_path):
    done = run_script("train", "--debug", "--device", "cpu", "--run.dir", tmp_path / "run")
    assert done.returncode == 2
    assert "Traceback" in done.stderr and "error: data.shards is not set" in done.stderr


# --- mistakes, in this process: nothing but the message differs from those above ------------------


def refused(call, message: str, *arguments) -> str:
    from launch.train import main

    with pytest.raises(ValueError, match=message) as error:
        call(main, *arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_configuration_mistakes(shards, tmp_path, call):
    run_dir = tmp_path / "run"
    refused(
        call,
        r"model\.hidden is 'wide', expected a whole number",
        *training(shards, run_dir, "--model.hidden", "wide"),
    )
    refused(
        call,
        r"parallel\.lanes is 17, expected at most data\.batch_size = 16",
        *training(shards, run_dir, "--parallel.lanes=17"),
    )
    refused(call, r"run\.dir is not set; pass --run\.dir", *training(shards, ""))
    refused(
        call,
        r"nowhere holds no manifest\.json; expected a folder written by",
        *training(tmp_path / "nowhere", run_dir),
    )
    refused(call, r"data\.shards is not set; pass --data\.shards", *training("", run_dir))
    refused(
        call,
        r"parallel\.partitions 2 x .*1 ranks",
        *training(shards, run_dir, "--parallel.partitions=2"),
    )
    refused(call, r"no\.yaml cannot be read \(No such file", "--config", tmp_path / "no.yaml")
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump({"modle": {"hidden": 8}}))
    refused(
        call,
        r"modle\.hidden is not a key .* did you mean model\.hidden",
        "--config",
        tmp_path / "typo.yaml",
    )
    assert not run_dir.exists()


def vouch_for(folder: Path, name: str) -> None:
    """Make the manifest's size and checksum of a shard those of the file as it is."""
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / name).read_bytes()
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            if shard["name"] == name:
                shard.update(bytes=len(data), sha256=sha256_of(data))
    (folder / "manifest.json").write_text(json.dumps(manifest))


class Payload:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_damaged_shards(copied, tmp_path, call):
    run_dir, file = tmp_path / "run", copied / "train-000001.tar"
    whole, manifest = file.read_bytes(), (copied / "manifest.json").read_bytes()

    def shard_is(data: bytes, message: str, vouched: bool = True) -> None:
        (copied / "manifest.json").write_bytes(manifest)
        file.write_bytes(data)
        if vouched:
            vouch_for(copied, file.name)
        assert str(file) in refused(call, message, *training(copied, run_dir))

    shard_is(whole[:-2000], r"damaged or replaced", vouched=False)
    shard_is(whole[:1500], r"train-000001\.tar")
    shard_is(b"", r"not an uncompressed tar archive")
    shard_is(b"\x1f\x8b" + whole, r"not an uncompressed tar archive")

    trace = tmp_path / "unpickled"
    for name in ("00000016.evil.pkl", "00000016.items.npy", "00000099.user_keys.npy"):
        payload = pickle.dumps(Payload(trace))
        if name.endswith(".npy"):
            array = io.BytesIO()
            np.save(array, np.array([Payload(trace)], dtype=object), allow_pickle=True)
            payload = array.getvalue()
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as out:
            with tarfile.open(fileobj=io.BytesIO(whole)) as old:
                members = [(m.name, old.extractfile(m).read()) for m in old if m.name != name]
            assert members[0][0].startswith("00000016.")
            for member, data in [members[0], (name, payload), *members[1:]]:
                entry = tarfile.TarInfo(member)
                entry.size = len(data)
                out.addfile(entry, io.BytesIO(data))
        shard_is(archive.getvalue(), r"unexpected members|not a readable npy|says dtype")
    assert not trace.exists(), "a pickle in a shard was run"

    file.unlink()
    refused(
        call,
        r"train-000001\.tar cannot be read .*manifest\.json lists it",
        *training(copied, run_dir),
    )
    for text, message in (
        ("{", "is not a manifest of this project"),
        ('{"format_version": 7}', "format_version is 7, this version reads 1"),
    ):
        (copied / "manifest.json").write_text(text)
        refused(call, message, *training(copied, run_dir))
    assert not run_dir.exists()


def test_another_vocabulary(run, shards, copied, tmp_path, call):
    from launch.evaluate import main as evaluate

    other = tmp_path / "other"
    write_folder(other, rows(96, 0), n_items=N_ITEMS + 1)
    with pytest.raises(
        ValueError,
        match=r"vocabulary of 61 items .* was trained on 60 .*pass the shards it was trained on",
    ):
        call(
            evaluate,
            "--run",
            run,
            "--shards",
            other,
            "--json",
            tmp_path / "o.json",
            "--device",
            "cpu",
        )
    with pytest.raises(ValueError, match="has no test users; choose another --split"):
        call(
            evaluate,
            "--baseline",
            "popularity",
            "--shards",
            other,
            "--json",
            tmp_path / "o.json",
            "--device",
            "cpu",
        )
    assert not (tmp_path / "o.json").exists()

    resumed = shutil.copytree(run, tmp_path / "resumed", symlinks=True)
    shutil.copyfile(other / "items.parquet", copied / "items.parquet")
    refused(
        call,
        r"items\.parquet lists 61 items .*expected 60 .*another preparation",
        *training(copied, tmp_path / "new"),
    )
    assert not (tmp_path / "new").exists()
    shutil.copyfile(other / "items.parquet", resumed / "items.parquet")
    with pytest.raises(ValueError, match=r"items\.parquet lists 61 items"):
        call(evaluate, "--run", resumed, "--device", "cpu")


def test_a_run_dir_that_is_in_use(run, shards, tmp_path, call):
    folder = shutil.copytree(run, tmp_path / "run", symlinks=True)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with open(folder / ".lock", "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(
            call,
            r"run\.dir .*run is in use by process \d+ on .*; wait for it to end",
            *training(shards, folder),
        )
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    (tmp_path / "file").write_text("")
    refused(
        call, r"run\.dir .*file.* cannot be written", *training(shards, tmp_path / "file" / "run")
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.hidden", "16", r"model\.hidden was 8 and is now 16"),
        ("loss.gamma", "1", r"loss\.gamma was 2\.0 and is now 1\.0"),
        ("optimizer.name", "adam", r"optimizer\.name was 'nadam' and is now 'adam'"),
        ("data.batch_size", "12", r"data\.batch_size was 16 and is now 12"),
        ("data.halves", "false", r"data\.halves was True and is now False"),
        ("parallel.lanes", "2", r"parallel\.lanes was 4 and is now 2"),
        ("run.seed", "1", r"run\.seed was 0 and is now 1"),
    ],
)
def test_what_a_resumed_run_may_not_change(run, shards, tmp_path, call, key, value, message):
    folder = shutil.copytree(run, tmp_path / "run", symlinks=True)
    refused(
        call,
        rf"cannot be resumed: {message}; set it back, or start a new run\.dir",
        *training(shards, folder, f"--{key}", value),
    )
    assert lines_of(folder) == lines_of(run)
    assert (folder / "config.yaml").read_text() == (run / "config.yaml").read_text()


def test_other_shards_cannot_resume(run, tmp_path, call):
    folder = shutil.copytree(run, tmp_path / "run", symlinks=True)
    write_folder(tmp_path / "other", rows(96, 9), n_items=N_ITEMS)
    refused(
        call, r"cannot be resumed: hash of data\.shards was ", *training(tmp_path / "other", folder)
    )


def test_a_damaged_checkpoint_is_not_resumed(run, shards, tmp_path, call):
    from launch.train import main

    folder = shutil.copytree(run, tmp_path / "run", symlinks=True)
    file = folder / "checkpoints" / "step-00000009" / "trunk.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused(
        call,
        r"step-00000009/trunk\.safetensors has SHA-256 .* remove this checkpoint and resume",
        *training(shards, folder),
    )
    folder = shutil.copytree(
        run, tmp_path / "again", symlinks=True
    )  # the lock of the other ends with this process
    shutil.rmtree(folder / "checkpoints" / "step-00000009")
    call(main, *training(shards, folder, "--run.evaluate_every_epochs", "0"))
    resumed, whole = (
        path / "checkpoints" / "step-00000009" / "trunk.safetensors" for path in (folder, run)
    )
    assert resumed.read_bytes() == whole.read_bytes()


def test_evaluate_mistakes(run, shards, tmp_path, call):
    from launch.evaluate import main

    json_file = tmp_path / "o.json"
    for arguments, message in (
        (
            ["--run", run, "--baseline", "popularity"],
            "expected either --run RUN_DIR or --baseline popularity",
        ),
        (["--baseline", "popularity"], "--baseline needs data; pass --shards DIR"),
        (["--baseline", "popularity", "--shards", tmp_path], r"holds no manifest\.json"),
        (["--run", tmp_path / "no"], r"no is not a folder; pass the run\.dir of a training run"),
        (["--run", tmp_path], "holds no checkpoint; name the run.dir"),
        (
            ["--run", run, "--checkpoint", "last"],
            "last is not a checkpoint; .* holds best, best-0.*step-00000009",
        ),
        (
            ["--run", run, "--json", tmp_path / "no" / "o.json"],
            "the folder .*no does not exist; create it first",
        ),
        (["--run", run, "--shards", tmp_path / "no"], r"no holds no manifest\.json"),
    ):
        with pytest.raises(ValueError, match=message):
            call(main, "--json", json_file, "--device", "cpu", *arguments)
    assert not json_file.exists()

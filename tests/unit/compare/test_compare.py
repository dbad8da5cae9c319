"""A whole comparison, end to end: its report, a stop and its continuation, and its mistakes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from dist_vasp.compare.jobs import peak_resident
from dist_vasp.compare.statistics import (
    read_scores,
)
from tests.support.compare_file import written
from tests.support.invoke import run_script
from tests.support.jobs import PATIENCE_S, environment
from tests.support.make_shards import write_folder
from tests.support.paths import ROOT

N_ITEMS = 60
TINY = {
    "model": {"kind": "nease", "hidden": 8, "latent": 4, "encoder_layers": 2, "decoder_layers": 2},
    "device": "cpu",
}
TINY |= {"data": {"batch_size": 16, "workers": 0}, "parallel": {"lanes": 4}}
TINY |= {"optimizer": {"schedule": [{"epochs": 3, "lr": 0.01}]}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    path, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    rows = [np.sort(rng.choice(N_ITEMS, rng.integers(4, 15), replace=False)) for _ in range(136)]
    held_out = [(row[1:], row[:1] if u % 4 else row[:0]) for u, row in enumerate(rows[96:])]
    write_folder(path, rows[:96], held_out[:10], held_out[10:], n_items=N_ITEMS)
    return path


def start(tmp_path: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        str(ROOT / "launch" / "compare.py"),
        "--config",
        str(tmp_path / "compare.yaml"),
        "--output",
        str(output),
    ]
    streams = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "start_new_session": True,
    }
    return subprocess.Popen([*command, *more], env=environment(), cwd=ROOT, **streams)


def finish(tmp_path: Path, output: Path, *more: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of compare.py."""
    arguments = ["--config", tmp_path / "compare.yaml", "--output", output, *more]
    done = run_script("compare", *arguments)
    return done.returncode, done.stdout, done.stderr


def dry_run(tmp_path: Path, output: Path, *more: str) -> str:
    """What `--dry_run` prints, in this process."""
    from launch.compare import main

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert (
            main(
                [
                    "--config",
                    str(tmp_path / "compare.yaml"),
                    "--output",
                    str(output),
                    "--dry_run",
                    *more,
                ]
            )
            == 0
        )
    return out.getvalue()


@pytest.mark.slow
def test_a_whole_comparison(shards, tmp_path):
    models = [
        {"name": "popularity", "baseline": "popularity"},
        {"name": "nease", "config": TINY, "overrides": {"run.metrics": "mrr@4"}},
        {
            "name": "ease",
            "config": TINY,
            "overrides": {"model.kind": "ease", "model.ease_lambda": 5},
        },
        {"name": "both", "ensemble": {"nease": 1, "ease": 2}},
        {"name": "fitted", "ensemble": ["nease", "ease"], "fit": "ndcg@10"},
        {
            "name": "broken",
            "config": TINY,
            "overrides": {"parallel.interface": "nowhere0"},
            "seeds": [0],
        },
    ]
    of_file = {"shards": str(shards), "reference": "nease", "metrics": "hr@3,gini@5"}
    written(tmp_path, models=models, **of_file)
    output = tmp_path / "out"
    runs = output / "runs"

    out = dry_run(tmp_path, output)
    assert not output.exists()
    assert "9 runs of 6 models, 0 done, 9 to do; reference nease" in out

    # A failed run is named and the others go on.
    status, out, err = finish(tmp_path, output)
    assert status == 1, out + err
    assert err == "error: 1 run failed: broken-seed0\n"
    assert re.search(r"\[6/9\] broken-seed0: FAILED with status 2: .*nowhere0", out)
    assert re.search(r"\[7/9\] nease-seed1: done in \d+ s, test NDCG@100 0\.\d{4}", out)

    # The report tells what evaluate.py found.
    report, text = (
        json.loads((output / "report.json").read_text()),
        (output / "report.md").read_text(),
    )
    assert [m["name"] for m in report["models"]] == [
        "popularity",
        "nease",
        "ease",
        "both",
        "fitted",
    ]
    assert report["verdict"] in text and report["verdict"] in out
    assert "1 run failed" in text and "broken-seed0, status 2" in text
    page = (output / "report.html").read_text(encoding="ascii")
    for shown in ("broken-seed0", "HR@3", "Gini@5", "Paired difference", report["winner"]):
        assert shown in page, shown
    nease, popularity = report["models"][1], report["models"][0]
    tests = [json.loads((runs / f"nease-seed{k}.test.json").read_text())["test"] for k in (0, 1)]
    results = [json.loads((runs / f"nease-seed{k}" / "result.json").read_text()) for k in (0, 1)]
    for metric in ("ndcg@100", "recall@20", "recall@50"):
        found = nease["metrics"][metric]
        assert found["by_seed"] == pytest.approx([t[metric] for t in tests], rel=1e-12)
        assert found["by_seed"] == pytest.approx([r["test"][metric] for r in results], rel=1e-12)
        assert (
            found["mean"] == pytest.approx(np.mean(found["by_seed"]))
            and found["n_users"] == tests[0]["n_users"] == 23
        )  # 30, 7 of them without a target
        difference = popularity["metrics"][metric]["mean"] - found["mean"]
        assert popularity["difference"][metric]["mean"] == pytest.approx(difference)
    assert "difference" not in nease
    assert (
        nease["cost"]["peak_memory"] > 50e6
        and nease["cost"]["seconds_job"] > nease["cost"]["seconds_training"] > 0
    )
    assert nease["cost"]["users_per_second"] > 0 and nease["cost"]["parameters"] == N_ITEMS**2
    assert popularity["cost"]["seconds_training"] is None
    users = pq.read_table(output / "per_user.parquet")
    assert users.column_names[:4] == ["model", "seed", "key", "id"] and len(users) == 8 * 30

    # An ensemble is evaluated, and costs what its members cost.
    ease, both, fitted = report["models"][2:]
    assert both["cost"]["parameters"] == 2 * N_ITEMS**2 and both["cost"]["users_per_second"] is None
    assert both["cost"]["seconds_training"] == pytest.approx(
        sum(m["cost"]["seconds_training"] for m in (nease, ease))
    )
    assert (
        both["seeds"] == [0, 1]
        and both["trained"]
        and both["what"] == "product of ease ^ 2, nease ^ 1"
    )
    assert both["metrics"]["ndcg@100"]["by_seed"] != nease["metrics"]["ndcg@100"]["by_seed"]
    header = json.loads((runs / "both-seed1" / "ensemble.json").read_text())
    assert [(m["run"], m["weight"]) for m in header["members"]] == [
        ("../ease-seed0", 2.0),
        ("../nease-seed1", 1.0),
    ]
    assert fitted["what"] == "product of nease, ease, weights fitted on validation by NDCG@10"
    for seed in (0, 1):
        header = json.loads((runs / f"fitted-seed{seed}" / "ensemble.json").read_text())
        assert {m["run"] for m in header["members"]} <= {f"../nease-seed{seed}", "../ease-seed0"}
        log = (runs / f"fitted-seed{seed}.log").read_text()
        assert "validation users" in log

    # Metrics asked for by the file, or by a model, are those of every model.
    assert report["metrics_asked"] == ["hr@3", "gini@5", "mrr@4"]
    for name in ("hr@3", "mrr@4"):
        by_seed = [test[name] for test in tests]
        assert nease["metrics"][name]["by_seed"] == pytest.approx(by_seed, rel=1e-12)
        difference = popularity["metrics"][name]["mean"] - np.mean(by_seed)
        assert popularity["difference"][name]["mean"] == pytest.approx(difference)
    assert nease["gini@5"]["by_seed"] == [test["gini@5"] for test in tests]
    assert {"hr@3", "mrr@4", "mrr@4_tail"} <= set(users.column_names)
    assert "| model | HR@3 | Gini@5 | MRR@4 |" in text
    assert "| paired difference | HR@3 | MRR@4 |" in text

    for heading in (
        "## Metrics",
        "## Further metrics",
        "## Long tail",
        "## Cost",
        "## How this was made",
    ):
        assert heading in text

    # A finished run is not repeated; one that was cut short goes on where it stood.
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")}
    (runs / "nease-seed1" / "result.json").unlink()
    shutil.rmtree(runs / "nease-seed1" / "checkpoints" / "step-00000018")
    written(tmp_path, models=models[:4], **of_file)
    out = dry_run(tmp_path, output)
    assert re.search(r"both-seed0 .* done\n", out)
    assert re.search(r"nease-seed0 .* done\n", out) and re.search(
        r"nease-seed1 .* begun, resumes from step-00000012", out
    )
    status, out, err = finish(tmp_path, output)
    assert (status, err) == (0, ""), out + err
    assert (
        "4 of 6 runs are done already" in out and "[1/2] nease-seed1: resuming the training" in out
    )
    assert "[2/2] both-seed1: evaluating" in out
    assert "resumed from step 12" in (runs / "nease-seed1.log").read_text()
    after = {path: path.stat().st_mtime_ns for path in before if path.exists()}
    assert all(after[path] == before[path] for path in after if "seed0" in str(path))
    again = json.loads((output / "report.json").read_text())
    assert again["models"][1]["metrics"] == nease["metrics"] and not again["failures"]

    # Another metric is evaluated, but nothing is trained again.
    out = dry_run(tmp_path, output, "--metrics", "hr@3,map@7")
    assert "0 done, 6 to do" in out and out.count("trained, to be evaluated") == 3

    # Another configuration is not taken for the same run.
    out = dry_run(tmp_path, output, "--model.kind", "flvae")
    assert (
        "7 runs of 4 models, 1 done, 6 to do" in out
        and out.count("begun, resumes from step-00000018") == 2
    )


@pytest.mark.slow
def test_without_the_reference_there_is_no_report(shards, tmp_path):
    broken = {"name": "broken", "config": TINY, "overrides": {"parallel.interface": "nowhere0"}}
    written(tmp_path, shards=str(shards), reference="broken", models=[broken], seeds=[0])
    status, out, err = finish(tmp_path, tmp_path / "out")
    assert status == 1 and "FAILED with status 2" in out
    assert err.startswith(
        "error: 1 run failed: broken-seed0; no report: the reference broken has no finished run"
    )
    assert not (tmp_path / "out" / "report.md").exists()


def alive_in(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in argument for argument in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_is_passed_on_and_the_same_command_goes_on(shards, tmp_path, ranks):
    models = [{"name": "nease", "config": TINY}, {"name": "popularity", "baseline": "popularity"}]
    written(tmp_path, shards=str(shards), reference="nease", models=models, seeds=[0])
    output = tmp_path / "out"
    metrics, log = (
        output / "runs" / "nease-seed0" / "metrics.jsonl",
        output / "runs" / "nease-seed0.log",
    )
    endless = [
        "--ranks",
        str(ranks),
        "--optimizer.schedule",
        "[{epochs: 100000, lr: 0.001}]",
        "--run.evaluate_every_epochs",
        "0",
    ]
    process = start(tmp_path, output, *endless)
    deadline = time.monotonic() + PATIENCE_S
    while not metrics.is_file() or not metrics.read_text().count("\n") > 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (
        process.returncode == 130
        and "stopped on request; the same command resumes from here" in out
    ), out + err
    assert "stopped on request after step" in log.read_text()
    assert not alive_in(output) and not (output / "report.md").exists()
    step = int(re.findall(r"stopped on request after step (\d+)", log.read_text())[0])

    status, out, err = finish(tmp_path, output, *endless, "--run.max_steps", str(step + 3))
    assert status == 0, out + err
    assert f"resumed from step {step}" in log.read_text()
    job = json.loads((output / "runs" / "nease-seed0.job.json").read_text())
    assert len(job["peak_memory"]) == ranks and min(job["peak_memory"]) > 50e6


def test_command_line_mistakes(shards, tmp_path):
    from launch.compare import main

    config = written(tmp_path, shards=str(shards))
    base = ["--config", str(config), "--output", str(tmp_path / "out"), "--dry_run"]
    for more, message in (
        (["--ranks", "0"], "--ranks is 0, expected at least 1"),
        (["--ranks", "3", "--parallel.partitions", "2"], "3"),
        (["--model.hidden"], r"--model\.hidden has no value"),
        (["--model.hidden", "much"], r"models\[0\] \(a\): .*hidden"),
        (["--hidden", "3"], "--hidden is not an option"),
        (["--run.seed", "3"], r"the command line: run\.seed belongs to the comparison; set seeds"),
        (["--shards", str(tmp_path)], r"holds no manifest\.json"),
    ):
        with pytest.raises(ValueError, match=message):
            main([*base, *more])
    status, out, err = finish(tmp_path, tmp_path / "out", "--ranks", "0")
    assert (status, out, err) == (2, "", "error: --ranks is 0, expected at least 1\n")
    assert not (tmp_path / "out").exists()


def test_peak_memory_is_kept_after_it_was_given_back():
    code = "import numpy as np; a = np.ones(25_000_000); del a; print('x', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"x\n"
        assert peak_resident(process.pid) > 200e6 > psutil.Process(process.pid).memory_info().rss
        process.communicate(b"\n")
    assert peak_resident(process.pid) == 0


def test_files_that_do_not_belong_together(shards, tmp_path):
    import pyarrow as pa

    for name, keys in (("a", [1, 2]), ("b", [1, 3])):
        pq.write_table(
            pa.table({"key": pa.array(keys, pa.uint64()), "ndcg@100": [0.1, 0.2]}), tmp_path / name
        )
    (tmp_path / "c").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="are of different users"):
        read_scores("x", {0: tmp_path / "a", 1: tmp_path / "b"})
    with pytest.raises(ValueError, match=r"c cannot be read .*; remove it and start again"):
        read_scores("x", {0: tmp_path / "c"})

"""What one GPU can do: each line with its bar, one table, and JSON: benchmarks/gpu.sh [--small]
[--netflix DIR] [--ml1m DIR] [--gowalla DIR] [--only G1,G3] [--json FILE]

A line that fails or takes too long does not stop the others. Without --ml1m and --gowalla (folders
of data_tools.shard) the lines that need them are left out. --small rehearses on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

LIMIT = 470.0  # seconds for everything
SEEDS = (0, 1, 2)
TINY = ("--model.hidden", "32", "--model.latent", "16", "--data.batch_size", "32")
TINY += ("--parallel.lanes", "8")


@dataclass(frozen=True)
class Line:
    """A line of the table. met: None where there is no bar to meet, or nothing was measured."""

    name: str
    what: str
    bar: str
    found: str
    met: bool | None


class Bench:
    """Runs the stages, each as processes of their own with a time limit."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.small = options, folder, options.small
        self.device = "cpu" if options.small else "cuda"
        self.shards = options.netflix or folder / "netflix-like"
        self.slower = 5 if options.small else 1  # a CPU may be busy
        self.deadline = time.monotonic() + options.seconds * self.slower
        self.plain_ms = 0.0  # of a bf16 step, for the ratios of G2

    # --- processes --------------------------------------------------------------------------------

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, process: subprocess.Popen[str], seconds: float) -> str:
        """What a process printed; RuntimeError where it failed or took too long."""
        limit = min(seconds * self.slower, self.deadline - time.monotonic())
        try:
            out, _ = process.communicate(timeout=max(limit, 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            self.keep(process, process.communicate()[0])
            raise RuntimeError(f"more than {limit:.0f} s") from None
        if process.returncode:
            self.keep(process, out)
            said = [line for line in out.splitlines() if line.strip()] or ["nothing printed"]
            raise RuntimeError(f"status {process.returncode}: {said[-1][:120]}")
        return out

    def keep(self, process: subprocess.Popen[str], out: str) -> None:
        """Put what a process printed into the log of failures."""
        with open(self.folder / "failed.log", "a") as log:
            log.write(f"{process.args}\n{out}\n")

    def run(self, seconds: float, *arguments: str) -> str:
        return self.finish(self.start(*arguments), seconds)

    def stage(self, seconds: float, *arguments: str) -> dict[str, Any]:
        """The JSON line of a stage of benchmarks/gpu_stages.py."""
        out = self.run(seconds, "-m", "benchmarks.gpu_stages", *arguments)
        return json.loads(out.splitlines()[-1])

    def step(self, config: str, shards: Path, *more: str, against: str = "") -> dict[str, Any]:
        """The sides of benchmarks/step.py."""
        found = self.folder / "step.json"
        command = ["-m", "benchmarks.step", "--config", config, "--shards", str(shards)]
        command += ["--against", against, "--device", self.device, "--json", str(found)]
        command += ["--steps", "3" if self.small else "30", *(TINY if self.small else ()), *more]
        # a side that does not answer is left out, and ours is told all the same
        command += ["--wait", str(75 * self.slower)]
        self.run(200 if against else 110, *command)
        return json.loads(found.read_text())["sides"]

    # --- lines ------------------------------------------------------------------------------------

    def make_shards(self) -> Iterator[Line]:
        sizes = (
            ("500", "600", "9000", "128") if self.small else ("17769", "61440", "7500000", "40960")
        )
        if self.options.netflix:
            return
        names = ("--items", "--users", "--interactions", "--test_users")
        options = [word for pair in zip(names, sizes, strict=True) for word in pair]
        out = self.run(90, "-m", "benchmarks.synthetic_shards", str(self.shards), *options)
        yield Line("data", "synthetic shards", "", out.strip().rpartition(" in ")[2], None)

    def netflix_step(self) -> Iterator[Line]:
        sides = self.step(
            "configs/netflix.yaml", self.shards, "--precision", "bf16", against="compiled"
        )
        ours = sides["ours"]
        self.plain_ms = ours["ms"]
        yield at_most("G1", "netflix.yaml bf16, ms a step", 20, ours["ms"])
        yield at_least("G1", "users/s", 50_000, ours["users_per_second"])
        yield at_most("G1", "peak memory, GB", 12, ours["peak_gb"])
        theirs = sides["compiled"]
        if "error" in theirs:
            raise RuntimeError(f"compiled plain torch: {theirs['error']}")
        yield at_least("G1", "times as fast as compiled plain torch", 2, theirs["times_ours"])
        yield Line("G1", "compiled plain torch, ms a step", "", f"{theirs['ms']:.1f}", None)

    def other_precisions(self) -> Iterator[Line]:
        for precision, bar in (("tf32", 35), ("fp32", 100)):
            what = f"netflix.yaml {precision}, ms a step"
            yield from self.guarded("G2", what, lambda p=precision, w=what, b=bar: [
                at_most("G2", w, b, self.netflix_ms("--precision", p))
            ])  # fmt: skip
        changes = {
            "with clipping": ("--optimizer.clip_norm", "1.0"),
            "with lean state": ("--optimizer.item_state", "lean"),
        }
        for what, change in changes.items():
            yield from self.guarded("G2", f"bf16 {what}", lambda w=what, c=change: [
                at_most(
                    "G2", f"bf16 {w}, times the plain bf16 step", 1.15,
                    self.netflix_ms("--precision", "bf16", *c) / self.plain_ms,
                )
            ])  # fmt: skip

    def netflix_ms(self, *more: str) -> float:
        return self.step("configs/netflix.yaml", self.shards, *more)["ours"]["ms"]

    def small_model(self) -> Iterator[Line]:
        shards = self.shards if self.small else self.options.ml1m
        if not shards:
            yield Line("G3", "ml-1m.yaml", "", "no --ml1m", None)
            return
        ms = self.step("configs/ml-1m.yaml", shards, "--precision", "bf16")["ours"]["ms"]
        yield at_most("G3", "ml-1m.yaml bf16, ms a step", 8, ms)
        running = {
            (precision, seed): self.start(*self.training("configs/ml-1m.yaml", shards, *options))
            for precision in ("bf16", "fp32")
            for seed in SEEDS
            for options in [
                ("--parallel.precision", precision, "--run.seed", str(seed), "--run.dir",
                 str(self.folder / f"ml1m-{precision}-{seed}"))
            ]
        }  # fmt: skip
        for process in running.values():
            self.finish(process, 150)
        tests = {key: self.result(f"ml1m-{key[0]}-{key[1]}") for key in running}
        half, full = (
            mean(tests[name, seed]["ndcg@100"] for seed in SEEDS) for name in ("bf16", "fp32")
        )
        error = mean(tests["fp32", seed]["ndcg@100_se"] for seed in SEEDS)
        yield Line(
            "G3",
            "test NDCG@100 of three seeds, bf16 / fp32",
            f"within {error:.4f}",
            f"{half:.4f} / {full:.4f}",
            abs(half - full) <= error,
        )

    def training(self, config: str, shards: Path, *options: str) -> list[str]:
        command = ["launch/train.py", "--config", config, "--data.shards", str(shards)]
        command += ["--device", self.device, *options]
        if self.small:
            command += ["--run.max_steps", "3", "--run.evaluate_every_epochs", "0", *TINY]
        return command

    def result(self, run: str) -> dict[str, float]:
        return json.loads((self.folder / run / "result.json").read_text())["test"]

    def start_up(self) -> Iterator[Line]:
        more = ["--parallel.precision", "bf16", *(TINY if self.small else ())]
        for what, bar in (("cold", 25), ("warm", 15)):
            found = self.stage(
                130, "first_step", str(self.folder), "configs/netflix.yaml", str(self.shards),
                self.device, *more,
            )  # fmt: skip
            name = f"start to first step, {what} kernel cache, s"
            yield at_most("G4", name, bar, found["seconds"])

    def closed_form(self) -> Iterator[Line]:
        n_items = "700" if self.small else "40981"
        found = self.stage(60, "inverse", n_items, self.device)
        assert found["finite"]
        yield at_most("G5", f"inverse of {n_items} items, s", 10, found["seconds"])
        if not self.options.gowalla:
            yield Line("G5", "EASE on Gowalla", ".1765 / .1467", "no --gowalla", None)
            return
        run = ["launch/train.py", "--config", "configs/ease-gowalla.yaml", "--data.shards"]
        run += [str(self.options.gowalla), "--device", self.device]
        self.run(120, *run, "--run.dir", str(self.folder / "gowalla"))
        test = self.result("gowalla")
        figures = f"{test['recall@20']:.4f} / {test['ndcg@20']:.4f}"
        name = "EASE on Gowalla, Recall@20 / NDCG@20"
        yield Line("G5", name, "0.1765 / 0.1467", figures, figures == "0.1765 / 0.1467")

    def evaluation(self) -> Iterator[Line]:
        more = TINY if self.small else ()
        found = self.stage(
            90, "evaluate", "configs/netflix.yaml", str(self.shards), self.device, *more
        )
        yield at_least("G6", "evaluation, users/s", 50_000, found["users_per_second"])

    def suite(self) -> Iterator[Line]:
        # -v, so that a suite which takes too long has told what failed until then
        options = ["-o", "addopts=", "-v", "-rfE", "-n", "12", "--dist", "loadfile"]
        process = self.start("-m", "pytest", *options, "-m", "not slow")
        try:
            said = self.finish(process, 300).splitlines()[-1]
        except RuntimeError as error:
            said = f"{error}; see failed.log"
        yield Line("G7", "fast suite", "", said, None)

    # --- all --------------------------------------------------------------------------------------

    def guarded(self, name: str, what: str, lines: Callable[[], Any]) -> Iterator[Line]:
        """The lines of a stage, and one that says why where it fails."""
        try:
            yield from lines()
        except Exception as error:  # anything: the other lines still count
            yield Line(name, what, "", f"failed: {type(error).__name__}: {error}", False)

    def lines(self) -> Iterator[Line]:
        stages: dict[str, Callable[[], Iterator[Line]]] = {
            "data": self.make_shards,
            "G1": self.netflix_step,
            "G4": self.start_up,
            "G5": self.closed_form,
            "G6": self.evaluation,
            "G3": self.small_model,
            "G2": self.other_precisions,
        }
        if self.options.suite:
            stages["G7"] = self.suite
        wanted = set(self.options.only.split(",")) if self.options.only else set(stages)
        for name, stage in stages.items():
            if name in wanted | {"data"}:
                yield from self.guarded(name, "", stage)


def at_most(name: str, what: str, bar: float, found: float) -> Line:
    return Line(name, what, f"at most {bar:g}", f"{found:.4g}", found <= bar)


def at_least(name: str, what: str, bar: float, found: float) -> Line:
    return Line(name, what, f"at least {bar:,g}", f"{found:,.4g}", found >= bar)


def told(line: Line, small: bool) -> str:
    """A row of the table."""
    met = "-" if line.met is None or (small and "failed" not in line.found) else (
        "yes" if line.met else "NO"
    )  # fmt: skip
    return f"| {line.name} | {line.what} | {line.bar} | {line.found} | {met} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--small", action="store_true", help="tiny sizes on a CPU: a rehearsal")
    add("--netflix", type=Path, help="shards of Netflix's shape; default: made here")
    add("--ml1m", type=Path, help="shards of MovieLens 1M (configs/ml-1m.yaml)")
    add("--gowalla", type=Path, help="shards of Gowalla (configs/ease-gowalla.yaml)")
    add("--only", default="", help="lines to measure, such as G1,G5; default: all but G7")
    add("--suite", action="store_true", help="G7, the fast suite, at the end")
    add("--seconds", type=float, default=LIMIT, help="for everything")
    add("--json", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    if not options.small and not torch.cuda.is_available():
        parser.error("there is no GPU here; --small rehearses on a CPU")
    card = "a CPU" if options.small else torch.cuda.get_device_name()
    machine = f"{card}, torch {torch.__version__}, Python {sys.version.split()[0]}"
    found: list[Line] = []
    start = time.monotonic()
    print(f"{machine}\n\n| | | bar | found | met |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        for line in bench.lines():
            found.append(line)
            print(told(line, options.small), flush=True)
            result = {
                "machine": machine,
                "small": options.small,
                "seconds": time.monotonic() - start,
                "lines": [asdict(line) for line in found],
            }
            options.json.write_text(json.dumps(result, indent=1) + "\n")
        log = Path(folder) / "failed.log"
        if log.exists():
            options.json.with_suffix(".log").write_text(log.read_text())
    print(f"\n{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()

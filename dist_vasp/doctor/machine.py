"""The machine before a job: versions, devices, compiler, cores, memory.

Limits of a control group count, as batch systems set them.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from dist_vasp.doctor.findings import Finding, error, ok, warning
from dist_vasp.training.environment import processor
from dist_vasp.versions import version

_INSTALL = "pip install dist-vasp (in a checkout: pip install -c constraints.txt -e .)"
_CGROUP = Path("/sys/fs/cgroup")
_SMALL_SHARED_MEMORY = 128 << 20  # containers start with 64 MB


def check_machine(device: str, compile_always: bool = False) -> Iterator[Finding]:
    """Yield findings that depend neither on data nor on the model.

    `device` and `compile_always` are what the configuration asks for.
    """
    yield from _versions()
    yield _devices(device)
    yield _compiler(compile_always)
    yield _cores()
    yield _memory()
    yield from _shared_memory()
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        yield warning(
            "open files", f"a process may open {soft} files", "raise the limit: ulimit -n 4096"
        )


def _versions() -> Iterator[Finding]:
    deepspeed = version("deepspeed")
    found = (
        f"dist_vasp {version('dist_vasp')}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, "
        f"{f'DeepSpeed {deepspeed}' if deepspeed else 'no DeepSpeed, so one rank trains'}"
    )
    try:
        wanted = [Requirement(text) for text in metadata.requires("dist_vasp") or []]
    except metadata.PackageNotFoundError:
        yield warning(
            "versions",
            f"{found}; dist_vasp itself is not installed here",
            _INSTALL,
        )
        return
    missing, others = [], []
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = version(requirement.name)
        if installed is None:
            missing.append(requirement.name)
        elif not requirement.specifier.contains(installed.split("+")[0], prereleases=True):
            others.append(f"{requirement.name} {installed} (wanted {requirement.specifier})")
    if missing:
        yield error(
            "versions",
            f"{found}; missing: {', '.join(missing)}",
            _INSTALL,
        )
    elif others:
        yield warning(
            "versions",
            f"{found}; others than tested: {', '.join(others)}",
            _INSTALL,
        )
    else:
        yield ok("versions", found)


def _devices(device: str) -> Finding:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        each = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        if device == "cpu":
            return warning(
                "devices", f"{each}, but device is cpu", "leave device at auto to use them"
            )
        return ok("devices", f"{each}, CUDA {torch.version.cuda}")
    if device == "cuda":
        build = "is a build without CUDA" if torch.version.cuda is None else "finds no CUDA device"
        return error(
            "devices",
            f"device is cuda but torch {torch.__version__} {build}",
            "install torch for your driver, or use --device cpu",
        )
    if Path("/proc/driver/nvidia/version").exists():
        return warning(
            "devices",
            "there is an NVIDIA driver, but torch does not see a device",
            "install a CUDA build of torch",
        )
    return ok("devices", f"no GPU; the CPU is used ({processor()})")


def _compiler(needed: bool) -> Finding:
    bad = error if needed else warning
    name = os.environ.get("CXX") or next(
        (found for c in ("c++", "g++", "clang++") if (found := shutil.which(c))), ""
    )
    do = (
        "install one (Debian: apt-get install g++), or name it in CXX; without it parallel.compile "
        "and DeepSpeed's own operators have nothing to build with"
    )
    if not name:
        return bad("compiler", "no C++ compiler", do)
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [*name.split(), "-x", "c++", "-std=c++17", "-", "-o", str(Path(folder) / "out")],
                input="#include <vector>\nint main() { return std::vector<int>{0}[0]; }\n",
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            said = (
                ""
                if done.returncode == 0
                else (done.stderr.strip().splitlines() or ["it failed"])[-1]
            )
        except (OSError, subprocess.TimeoutExpired) as raised:
            said = str(raised)
    return (
        bad("compiler", f"{name} does not compile a small program ({said})", do)
        if said
        else ok("compiler", f"{name} works")
    )


def _cores() -> Finding:
    cores, quota = len(os.sched_getaffinity(0)), cpu_quota()
    if quota and quota < cores * 0.99:
        return warning(
            "cores",
            f"{cores} cores are visible but the control group grants {quota:g}",
            "bind the job to whole cores, or set OMP_NUM_THREADS; threads that wait for each "
            "other's turn are slow",
        )
    return ok("cores", f"{cores}")


def _memory() -> Finding:
    free, limited = available_memory()
    total = psutil.virtual_memory().total
    text = f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB" + (
        ", by the control group's limit" if limited else ""
    )
    if free < 1e9:
        return error(
            "memory",
            text,
            "end what else runs here, or ask the batch system for more: a rank takes 0.6 GB before "
            "it has a model",
        )
    return ok("memory", text)


def _shared_memory() -> Iterator[Finding]:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        return
    if size <= _SMALL_SHARED_MEMORY:
        yield warning(
            "/dev/shm",
            f"{size / 1e6:.0f} MB",
            "start the container with --shm-size 2g: NCCL hands data over there",
        )


# --- limits ---------------------------------------------------------------------------------------


def available_memory() -> tuple[int, bool]:
    """Return the bytes that new processes can take, and whether a control group limits them."""
    free, limited = psutil.virtual_memory().available, False
    for folder in _groups():
        limit = _number(folder / "memory.max")
        if limit is None:
            continue
        used = (_number(folder / "memory.current") or 0) - _reclaimable(folder)
        if limit - used < free:
            free, limited = max(0, limit - used), True
    return free, limited


def cpu_quota() -> float | None:
    """Return the cores that the control group grants, None where it sets no limit."""
    found = []
    for folder in _groups():
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                found.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return min(found, default=None)


def _groups() -> list[Path]:
    """Return this process's control group (version 2) and those above it, which limit it too."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line[3:] for line in lines if line.startswith("0::")), "/")
    own = _CGROUP / name.strip("/")
    return [
        folder for folder in (own, *own.parents) if folder == _CGROUP or _CGROUP in folder.parents
    ]


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _reclaimable(folder: Path) -> int:
    """Return the bytes of cached files that the kernel gives back when memory is short."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except (OSError, ValueError, IndexError):
        return 0

"""What ``scpl-ds doctor`` looks at on one machine, without its other ranks."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from scpl_ds.distributed.world import RankEnv
from scpl_ds.doctor_findings import Finding, ok, problem, warning

GIB = 2**30
_STALE_S = 900
"""A build of a DeepSpeed op takes one or two minutes."""


def check_accelerator(env: RankEnv) -> Iterator[Finding]:
    """Whether this rank's GPU computes; without GPUs, why, and which cores there are."""
    built = torch.version.cuda
    if not torch.cuda.is_available():
        yield _no_gpu(built)
        return
    count = torch.cuda.device_count()
    device = torch.device("cuda", env.local_rank % count)
    facts = torch.cuda.get_device_properties(device)
    driver = _driver()
    name = (
        f"{facts.name}, {facts.total_memory / GIB:.0f} GiB, driver {driver}, torch for CUDA {built}"
    )
    try:
        free, _ = torch.cuda.mem_get_info(device)
        box = torch.ones(256, 256, device=device)
        computed = float((box @ box).sum())
        if computed != 256.0**3:
            raise RuntimeError(f"a product of ones gives {computed}, not {256.0**3}")
    except RuntimeError as error:
        yield problem(
            "accelerator", f"{name}: does not compute ({_line(error)})",
            "see `nvidia-smi`: another process may hold all memory, or the driver is older than "
            f"CUDA {built}",
        )  # fmt: skip
        return
    yield ok("accelerator", f"{count} x {name}" if count > 1 else name)
    if free < facts.total_memory / 2:
        yield warning(
            "accelerator", f"{free / GIB:.1f} of {facts.total_memory / GIB:.0f} GiB are free",
            "end what else runs on it (`nvidia-smi`), or ask `scpl-ds plan --memory` what fits",
        )  # fmt: skip
    if env.local_world_size > count:
        yield warning(
            "accelerator", f"{env.local_world_size} ranks share {count} GPUs: no NCCL, but gloo",
            f"launch {count} ranks on this machine",
        )  # fmt: skip


def _no_gpu(built: str | None) -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if Path("/dev/nvidia0").exists() and hidden not in ("", "-1"):
        if built is None:
            return warning(
                "accelerator", "there is an NVIDIA GPU, but torch was built without CUDA",
                "install torch for CUDA: https://pytorch.org/get-started",
            )  # fmt: skip
        return problem(
            "accelerator", f"there is an NVIDIA GPU (driver {_driver()}), but torch, built for "
            f"CUDA {built}, cannot use it",
            "update the driver, or install torch for the CUDA version that `nvidia-smi` shows",
        )  # fmt: skip
    return ok("accelerator", f"no GPU: ranks train on {cores} CPU cores of this machine")


def _driver() -> str:
    with contextlib.suppress(OSError):
        for word in Path("/sys/module/nvidia/version").read_text().split():
            return word
    return "unknown"


def check_compiler(extensions: Path | None = None) -> Iterator[Finding]:
    """What DeepSpeed's own operators and ``torch.compile`` need: a C++ compiler, ninja, headers;
    and locks that a killed build left, which the next build would wait for without end."""
    wanted = "only needed for offloading under DeepSpeed and for train.torch_compile"
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    trouble = "there is none" if compiler is None else _why_not_compile(compiler)
    if trouble is not None:
        yield warning(
            "compiler", f"no C++ program can be compiled: {trouble}; {wanted}",
            "install one (`apt-get install build-essential`), or set CXX",
        )  # fmt: skip
    missing = [] if _has_ninja() else ["ninja (pip install ninja)"]
    header = Path(sysconfig.get_path("include")) / "Python.h"
    missing += [] if header.is_file() else [f"{header} (apt-get install python3-dev)"]
    if missing:
        yield warning("compiler", f"missing: {', '.join(missing)}; {wanted}", "install them")
    if trouble is None and not missing:
        yield ok("compiler", f"{compiler} compiles, ninja and Python.h are there")
    if torch.version.cuda is not None and shutil.which("nvcc") is None:
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        if not (Path(home) / "bin" / "nvcc").is_file():
            yield warning(
                "compiler", f"no nvcc, neither on PATH nor in {home}/bin; {wanted}",
                f"install the CUDA toolkit {torch.version.cuda}, and set CUDA_HOME",
            )  # fmt: skip
    yield from _locks(extensions or _extensions())


def _why_not_compile(compiler: str) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "a.cpp"
        source.write_text(
            "#include <vector>\nint main() { return std::vector<int>(3).size() - 3; }\n"
        )
        command = [compiler, "-std=c++17", "-o", f"{folder}/a", str(source)]
        try:
            subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
            subprocess.run([f"{folder}/a"], timeout=20, check=True)
        except subprocess.CalledProcessError as error:
            return f"{compiler}: {(error.stderr or 'it fails').strip().splitlines()[0]}"
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{compiler}: {_line(error)}"
    return None


def _has_ninja() -> bool:
    from torch.utils.cpp_extension import is_ninja_available

    return is_ninja_available()


def _extensions() -> Path:
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(own) if own else Path.home() / ".cache" / "torch_extensions"


def _locks(folder: Path) -> Iterator[Finding]:
    for lock in sorted({*folder.glob("*/lock"), *folder.glob("*/*/lock")}):
        with contextlib.suppress(OSError):  # it is gone: the build is done
            age = time.time() - lock.stat().st_mtime
            if age > _STALE_S:
                yield problem(
                    "compiler", f"{lock} is {age / 60:.0f} minutes old: a build was killed, and "
                    "every later one waits for it without end",
                    f"if nothing is being built there: rm {lock}",
                )  # fmt: skip
            else:
                yield warning(
                    "compiler", f"{lock}: {lock.parent.name} is being built, or its build was "
                    "killed",
                    "wait for it; `scpl-ds doctor` says so when it is too old",
                )  # fmt: skip


def check_folder(check: str, folder: Path, *, needs_gib: float, key: str) -> Iterator[Finding]:
    """Whether a folder, or the one it will be made in, can be written and has room."""
    place = nearest(folder)
    name = str(folder) if place == folder else f"{folder} (to be made in {place})"
    try:
        if not place.is_dir():
            raise NotADirectoryError(f"{place} is a file")
        with tempfile.NamedTemporaryFile(dir=place, prefix=".scpl-ds-doctor-") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(place).free / GIB
    except OSError as error:
        yield problem(check, f"{name} cannot be written: {_line(error)}", f"set {key} to another")
        return
    if free < needs_gib / 10:
        yield problem(
            check, f"{name}: {free:.2f} GiB free", f"free some, or set {key} to another disk"
        )
    elif free < needs_gib:
        yield warning(
            check, f"{name}: {free:.1f} GiB free",
            f"a checkpoint has 12 bytes for every parameter (Adam, fp32); free some, or set {key}",
        )  # fmt: skip
    else:
        yield ok(check, f"{name}: writable, {free:.0f} GiB free")
    if place == folder and folder.stat().st_mode & 0o002:
        yield warning(
            check, f"everybody on this machine may write to {folder}, and change a checkpoint",
            f"chmod o-w {folder}",
        )  # fmt: skip


def nearest(folder: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))


def check_limits(env: RankEnv, shared: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Shared memory, open files and memory."""
    if shared.is_dir():
        usage = shutil.disk_usage(shared)
        text = f"{shared}: {usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB free"
        if usage.free < GIB:
            yield warning(
                "shared memory", f"{text}; NCCL and data loader workers use it",
                "in a container: docker run --shm-size=8g (or --ipc=host); else empty it",
            )  # fmt: skip
        else:
            yield ok("shared memory", text)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Every rank has connections to the others, once for each of about eight groups.
    wanted = max(1024, 256 + 8 * env.world_size)
    if soft < wanted:
        level = problem if soft < wanted / 4 else warning
        yield level("open files", f"limit {soft}, {wanted} wanted", f"ulimit -n {min(hard, 65536)}")
    else:
        yield ok("open files", f"limit {soft}")
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        free, total = sizes["MemAvailable"] / GIB, sizes["MemTotal"] / GIB
        text = f"{free:.1f} of {total:.1f} GiB free"
        if free < 2 * env.local_world_size:
            yield warning("memory", text, "end other processes, or launch fewer ranks")
        else:
            yield ok("memory", text)


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]

"""Where and how precisely to compute: device, dtype by probe, free memory, out-of-memory."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import first_line
from .settings import DTYPES

# Its name before torch 2.5, and still an alias of the new one.
OUT_OF_MEMORY = torch.cuda.OutOfMemoryError
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# A half-size dtype must be at least this much faster than float32 to be worth its rounding.
WORTH = 1.2
# Times that a probe is repeated; the best counts.
ROUNDS = 8
# A dtype that a small try finds this much slower than float32 (a quarter of its speed) cannot be
# worth it: overheads that count in a small try are nearly the same in both.
HOPELESS = 0.25
# Largest relative error of the probe that still means "computed in this dtype", 2^-8 for bf16.
TOLERANCE = 0.03


@dataclass(frozen=True)
class Precision:
    """Dtypes of the UNet and of the autoencoder, the name a person gave or got, and why."""

    name: str
    unet: torch.dtype
    vae: torch.dtype
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The named device, or the best one there is. ValueError when it isn't there."""
    if str(name) != "auto":
        try:
            device = torch.device(name)
            if device.type == "meta":
                raise RuntimeError("it holds sizes without numbers")
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"device {str(name)!r} can't be used here: choose auto or cpu ({first_line(error)})"
            ) from error
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return torch.device("xpu")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def choose_precision(
    device: torch.device,
    requested: str = "auto",
    *,
    model: str | None = None,
    usual: str = DTYPES[0],
) -> Precision:
    """Dtypes for a device. `auto` takes bf16, then fp16, where a probe shows that they pay.

    The autoencoder never runs in fp16: its activations leave that range.
    model: the one half-size dtype whose rounding a model bears, by its file; `auto` then takes that or
    fp32, and the autoencoder stays in fp32 as well. usual: what `auto` means to a host that knows the
    device.
    """
    if requested not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {requested!r}")
    if requested == "auto" and model is not None:
        return _precision_of_model(device, model, usual)
    if requested == "auto":
        requested = usual
    if requested == "auto":
        candidates = ("bf16",) if device.type == "cpu" else ("bf16", "fp16")
        tried = []
        for name in candidates:
            works, gain = probe(str(device), name)
            if works and gain >= WORTH:
                return _precision(device, name, f"{gain:.1f}x fp32 on this {device.type}")
            tried.append(f"{name} {gain:.1f}x" if works else f"{name} fails")
        return _precision(device, "fp32", f"nothing faster on this {device.type}: {tried[0]}")
    if requested != "fp32" and not probe(str(device), requested)[0]:
        raise ValueError(f"{requested} doesn't work on this {device.type}: choose auto or fp32")
    return _precision(device, requested, "as asked")


def _precision_of_model(device: torch.device, model: str, usual: str) -> Precision:
    """The model's own dtype where this device is faster in it and the host allows less than fp32."""
    half = model if model != "fp32" and usual != "fp32" else None
    if half == "fp16" and device.type == "cpu":
        half = None  # no CPU has been found right in it
    if half is not None:
        works, gain = probe(str(device), half)
        if works and gain >= WORTH:
            reason = f"the model's, {gain:.1f}x fp32 on this {device.type}, autoencoder in fp32"
            return Precision(half, TORCH_DTYPES[half], torch.float32, reason)
    return _precision(device, "fp32", f"the model is not for less than {model}")


def _precision(device: torch.device, name: str, reason: str) -> Precision:
    vae = TORCH_DTYPES[name]
    if name == "fp16":
        vae = torch.bfloat16 if probe(str(device), "bf16")[0] else torch.float32
        reason += f", autoencoder in {'bf16' if vae == torch.bfloat16 else 'fp32'}"
    return Precision(name, TORCH_DTYPES[name], vae, reason)


@functools.lru_cache
def probe(device: str, name: str) -> tuple[bool, float]:
    """Whether a convolution in this dtype is right on the device, and how many times faster.

    A processor without instructions for the dtype can be a hundred times slower in it than in
    float32: a small try finds that out, and the full one is left.
    """
    works, gain = _probe(device, name, size=8, rounds=2)
    if not works or gain < HOPELESS:
        return works, gain
    return _probe(device, name, size=64 if device.startswith("cpu") else 256, rounds=ROUNDS)


def _probe(device: str, name: str, size: int, rounds: int) -> tuple[bool, float]:
    """`probe` on a map of size x size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, size, size, generator=generator).to(device)
    weight = (torch.randn(64, 64, 3, 3, generator=generator) / 24).to(device)
    dtypes = (torch.float32, TORCH_DTYPES[name])
    best, results = [float("inf")] * 2, [x, x]
    threads = torch.get_num_threads()
    try:
        if device.startswith("cpu"):
            # Threads that wait for each other on a busy machine would be counted as work.
            torch.set_num_threads(1)
        # In turn, so that whatever else the machine does meets both alike.
        for _ in range(rounds):
            for n, dtype in enumerate(dtypes):
                results[n], seconds = _timed(x.to(dtype), weight.to(dtype))
                best[n] = min(best[n], seconds)
        error = float((results[1].float() - results[0]).norm() / results[0].norm())
    except (RuntimeError, TypeError):
        return False, 0.0
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
    return error <= TOLERANCE, best[0] / best[1]


def _timed(x: Tensor, weight: Tensor) -> tuple[Tensor, float]:
    # Time that this thread spent, on a CPU: waiting for a busy machine must not decide.
    clock = time.thread_time if x.device.type == "cpu" else time.perf_counter
    with torch.inference_mode():
        F.conv2d(x, weight, padding=1)
        synchronize(x.device)
        start = clock()
        for _ in range(4):
            y = F.conv2d(x, weight, padding=1)
        synchronize(x.device)
        return y, max(clock() - start, 1e-9)


def synchronize(device: torch.device) -> None:
    """Wait for the device, where it works on its own."""
    if device.type in ("cuda", "xpu", "mps"):
        getattr(torch, device.type).synchronize()


def exact(device: torch.device) -> torch.device:
    """The device with its index, as tensors on it name it."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def free_bytes(device: torch.device) -> int:
    """Memory that a new allocation on this device can count on."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    if device.type == "xpu":
        total = torch.xpu.get_device_properties(device).total_memory
        return total - torch.xpu.memory_allocated(device)
    if device.type == "mps":
        limit = torch.mps.recommended_max_memory()
        return min(limit - torch.mps.current_allocated_memory(), _free_host_bytes())
    return _free_host_bytes()


def _free_host_bytes() -> int:
    if sys.platform.startswith("linux"):
        return min(_free_in_system(), _free_in_container())
    if sys.platform == "win32":
        return _free_windows_bytes()
    # macOS keeps little memory strictly free; half of the whole is what its own tools go by.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _free_in_system() -> int:
    try:
        with open("/proc/meminfo", "rb") as file:
            fields = dict(line.split(b":", 1) for line in file)
        return int(fields[b"MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # a sandbox without /proc, or another kernel's
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _free_in_container() -> int:
    """What the memory limits of this process's control groups leave; huge where there is none."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8") as file:
            groups = file.read()
        with open("/proc/self/mountinfo", encoding="utf-8") as file:
            mounts = file.read()
    except OSError:
        return sys.maxsize
    return free_in_groups(groups, mounts)


# Names of the files of control groups, version 2 and version 1: limit, use, and what of it is a
# cache that is given back when somebody needs the memory.
GROUP_FILES = {
    "cgroup2": ("memory.max", "memory.current", "inactive_file"),
    "cgroup": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_in_groups(groups: str, mounts: str) -> int:
    """As /proc/self/cgroup and /proc/self/mountinfo tell it: the least that any group on the way
    from this process's own to the root leaves."""
    own = {}
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            own["cgroup2"] = path
        elif "memory" in controllers.split(","):
            own["cgroup"] = path
    least = sys.maxsize
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        kind, options = after.partition(" ")[0], after.rpartition(" ")[2]
        if kind not in own or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        root, point = before.split(" ")[3:5]
        # Inside a container the mount may begin at the container's own group.
        path = os.path.relpath(own[kind], root) if root != "/" else own[kind].lstrip("/")
        parts = [] if path.startswith("..") else [part for part in path.split("/") if part != "."]
        for depth in range(len(parts) + 1):
            folder = os.path.join(point, *parts[:depth])
            least = min(least, _left_in_group(folder, *GROUP_FILES[kind]))
    return least


def _left_in_group(folder: str, limit: str, use: str, cache: str) -> int:
    try:
        with open(os.path.join(folder, limit), encoding="ascii") as file:
            most = int(file.read())  # "max" is no number, and no limit
        with open(os.path.join(folder, use), encoding="ascii") as file:
            used = int(file.read())
    except (OSError, ValueError):
        return sys.maxsize
    try:
        with open(os.path.join(folder, "memory.stat"), encoding="ascii") as file:
            used -= next(int(line.split()[1]) for line in file if line.split()[0] == cache)
    except (OSError, ValueError, IndexError, StopIteration):
        pass
    return max(0, most - used)


def _free_windows_bytes() -> int:
    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong)
            for name in ("total", "free", "page", "freepage", "virtual", "freevirtual", "extended")
        ]

    status = Status()
    status.length = ctypes.sizeof(Status)
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return int(status.free)


def is_oom(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on any device."""
    if isinstance(error, (OUT_OF_MEMORY, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
    )


def release(device: torch.device) -> None:
    """Give cached blocks back after an out-of-memory error."""
    if device.type in ("cuda", "xpu", "mps"):
        getattr(torch, device.type).empty_cache()


def give_back() -> None:
    """Return freed main memory to the system.

    Pictures of ever new sizes leave gaps in glibc's heap that fit none of the later ones: without
    this it grows with every size.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@functools.lru_cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def reset_peak(device: torch.device) -> None:
    """Begin to measure the device's peak memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Peak of allocated device memory since `reset_peak`; None where the device doesn't tell."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

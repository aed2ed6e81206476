"""Peak memory: of a process, of a device, and of tensors counted one by one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

INTERVAL = 0.002


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes of all tensors that were made inside the block and live at once.

    A storage counts from the operation that made it until nothing refers to it any more. Works on
    the meta device too, where sizes of any scale cost nothing. What a kernel allocates for itself
    and frees before it returns is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # Storages of the arguments were there before; views and in-place results are no news.
        tree_map_only(Tensor, self._before, (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._made, result)
        return result

    def _before(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            weakref.finalize(storage, self._known.discard, storage._cdata)

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage._cdata)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, storage._cdata, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class FusedAttention(TorchFunctionMode):
    """Attention on the meta device as the fused kernels of CPUs and CUDA do it: one output.

    Without this the meta device takes the plain way, which holds all weights at once.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention or args[0].device.type != "meta":
            return func(*args, **(kwargs or {}))
        q, _, v = args
        b, heads, n, _ = q.shape
        # Their result lies in memory as b n heads c.
        return q.new_empty(b, n, heads, v.shape[-1]).transpose(1, 2)


class Watch:
    """Peak memory while the block runs: of the device where it tells, else of this process.

    bytes: the peak. before: what was there at the start, weights included. On a CPU the resident
    set is read every 2 ms by a thread, so that peaks shorter than that can be missed.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.before = self.bytes = 0

    def __enter__(self) -> Watch:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return self
        give_back()
        self.before = self.bytes = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device)
            return
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.bytes = max(self.bytes, resident_bytes())
            if self._stop.wait(INTERVAL):
                return


def give_back() -> None:
    """Return to the system what this process has freed; glibc keeps it otherwise."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident_bytes() -> int:
    """Resident set of this process; 0 where the system doesn't tell."""
    if sys.platform.startswith("linux"):
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0

"""CUDA graphs: the launches of a pass, recorded once and replayed. Never a stale one.

A graph is kept by what was baked into it: stage, shape, dtypes, settings. It reads the weights where
they lay when it was recorded, so a stamp over every weight's place and version is compared before
each replay: weights that moved, were patched or swapped mean that everything is recorded anew.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import first_line

Fn = Callable[[Tensor], Tensor]
Tell = Callable[[str], None]

# Share of the card's memory that recordings may hold.
SHARE = 0.4
# Recordings kept at most: besides the pool, each takes some memory of the driver.
KEEP = 16
# A shape is recorded when it comes up again: recording costs as much as it saves in a few passes,
# and the first pass loads and chooses kernels, which a recording can't.
SIGHTS = 1


class Recording(Protocol):
    """A recorded function. `bytes`: what it added to the memory held."""

    bytes: int

    def replay(self, x: Tensor) -> Tensor:
        """What the function gives for x, in memory of its own."""


class Recorder(Protocol):
    """What can record; one pool of memory serves all its recordings."""

    def record(self, fn: Fn, x: Tensor) -> Recording:
        """Record fn on inputs like x. May raise anything, out-of-memory included."""

    def held(self) -> int:
        """Bytes of the pool."""

    def forget(self) -> None:
        """Let go of the pool. Recordings made before must have been dropped."""


class Stamp:
    """Place and version of every weight of a network, and which modules it consists of.

    Parameters are looked up in their modules each time: a host may have put others in their place.
    """

    def __init__(self, network: nn.Module):
        self.places = [
            (m._parameters, name) for m in network.modules() for name in m._parameters
        ] + [(m._buffers, name) for m in network.modules() for name in m._buffers]
        self.children = [
            (m._modules, name, child)
            for m in network.modules()
            for name, child in m._modules.items()
        ]

    def tensors(self) -> list[Tensor]:
        """The weights that are there now."""
        found = (place.get(name) for place, name in self.places)
        return [tensor for tensor in found if tensor is not None]

    def now(self) -> tuple[Hashable, ...]:
        """Differs from an earlier one if anything moved, changed or was exchanged."""
        same = all(place.get(name) is child for place, name, child in self.children)
        return (
            same,
            tuple(
                # Inference tensors have no version; in place they change where a graph reads them.
                (t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device)
                for t in self.tensors()
            ),
        )

    def elsewhere(self, device: torch.device) -> bool:
        """Whether a weight lies on another device than this one, or a module was exchanged."""
        exchanged = any(place.get(name) is not child for place, name, child in self.children)
        return exchanged or any(t.device != device for t in self.tensors())


class Graphs:
    """Recordings by key, the least recently used freed first.

    budget: bytes that all may hold. is_oom: tells exhausted memory from other errors.
    """

    def __init__(
        self,
        recorder: Recorder,
        stamp: Stamp,
        *,
        budget: int,
        is_oom: Callable[[BaseException], bool],
    ):
        self.recorder, self.stamp, self.budget, self.is_oom = recorder, stamp, budget, is_oom
        # All of what is kept reads the weights as they lay at `current`.
        self.kept: OrderedDict[Hashable, Recording] = OrderedDict()
        self.current = stamp.now()
        self.seen: dict[Hashable, int] = {}
        self.refused: dict[Hashable, str] = {}
        self.off = ""
        self.recorded = self.replayed = self.eager = 0
        self.lock = threading.Lock()

    def run(self, key: Hashable, fn: Fn, x: Tensor, tell: Tell) -> Tensor:
        """fn(x), replayed where there is a recording of this key. tell: hears why not."""
        # A recording has one input and one output: threads take turns.
        with self.lock:
            return self._run(key, fn, x, tell)

    def _run(self, key: Hashable, fn: Fn, x: Tensor, tell: Tell) -> Tensor:
        key = (key, tuple(x.shape), x.stride(), x.dtype, x.device)
        if (now := self.stamp.now()) != self.current:
            if self.kept:
                tell("the weights have moved or changed: graphs are recorded anew")
            self.forget()
            self.refused.clear()
            self.current = now
        kept = self.kept.get(key)
        if kept is None:
            kept = self._recorded(key, fn, x, tell)
        if kept is not None:
            self.kept.move_to_end(key)
            try:
                y = kept.replay(x)
            except Exception as error:
                if not self.is_oom(error):
                    raise
                tell("out of memory: freed all recorded CUDA graphs, running this pass eagerly")
                del kept
                self.forget()
            else:
                self.replayed += 1
                return y
        self.eager += 1
        return fn(x)

    def _recorded(self, key: Hashable, fn: Fn, x: Tensor, tell: Tell) -> Recording | None:
        """A new recording; None where it isn't time yet, or can't be."""
        if self.off:
            tell(self.off)
            return None
        if key in self.refused:
            tell(self.refused[key])
            return None
        self.seen[key] = self.seen.get(key, 0) + 1
        if self.seen[key] <= SIGHTS:
            return None
        if self.stamp.elsewhere(x.device):
            tell(f"graph: not all weights lie on {x.device}, so nothing was recorded")
            return None
        while len(self.kept) >= KEEP:
            self._drop_oldest()
        for fresh in (False, True):
            if fresh:
                # The pool of several grew beyond the budget: one of its own for this one.
                self.forget()
            if (made := self._record(key, fn, x, tell)) is None:
                return None
            self.kept[key] = made
            while len(self.kept) > 1 and self.recorder.held() > self.budget:
                self._drop_oldest()
            if self.recorder.held() <= self.budget:
                return self.kept[key]
            del made
        self.refused[key] = (
            f"graph: this size needs {self.recorder.held() / 2**30:.1f} GiB, more than the "
            f"{self.budget / 2**30:.1f} GiB that graphs may hold, and ran eagerly"
        )
        self.forget()
        tell(self.refused[key])
        return None

    def _record(self, key: Hashable, fn: Fn, x: Tensor, tell: Tell) -> Recording | None:
        reason = ""
        try:
            made = self.recorder.record(fn, x)
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            # Ending a recording that ran out of memory may raise something else on top of it.
            if any(self.is_oom(one) for one in behind(error)):
                self.refused[key] = "graph: not enough memory to record this size, it ran eagerly"
                reason = ""
            else:
                self.off = f"graph: recording failed, everything runs eagerly ({reason})"
        else:
            self.recorded += 1
            return made
        # Not in the handler: there the error's frames hold what the recording had allocated.
        self.forget()
        tell(self.off if reason else self.refused[key])
        return None

    def _drop_oldest(self) -> None:
        self.kept.popitem(last=False)
        if not self.kept:
            self.recorder.forget()

    def forget(self) -> None:
        """Let go of every recording and of the pool."""
        self.kept.clear()
        self.recorder.forget()


def behind(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that were being handled when it was raised."""
    while error is not None:
        yield error
        error = error.__context__


@contextmanager
def recording(device: torch.device, pool: Any = None) -> Iterator[Any]:
    """Record what runs inside into a new CUDA graph. If that fails the card is as usable as before.

    Other threads of a host may go on allocating meanwhile.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    before, graph = torch.cuda.current_stream(index), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield graph
    except BaseException:
        # torch leaves its own stream in force then, and random numbers that believe in the recording.
        torch.cuda.set_stream(before)
        generator = torch.cuda.default_generators[index]
        if hasattr(generator, "graphsafe_set_state"):
            generator.graphsafe_set_state(generator.clone_state())
        raise


class CudaRecorder:
    """Records on an NVIDIA (or AMD) card. The pool grows to what the largest recording needs."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pool: Any = None
        self.bytes = 0

    def record(self, fn: Fn, x: Tensor) -> CudaRecording:
        with torch.cuda.device(self.device):
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            torch.cuda.synchronize(self.device)
            # What lies unused in the cache would not be counted, and not be there for the pool.
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(self.device)
            static = torch.empty_like(x).copy_(x)
            with recording(self.device, self.pool) as graph:
                out = fn(static)
            grown = max(0, torch.cuda.memory_reserved(self.device) - before)
        self.bytes += grown
        return CudaRecording(graph, static, out, grown)

    def held(self) -> int:
        return self.bytes

    def forget(self) -> None:
        self.pool, self.bytes = None, 0
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(eq=False)
class CudaRecording:
    """A graph with its input and its output."""

    graph: Any
    static: Tensor
    out: Tensor
    bytes: int

    def replay(self, x: Tensor) -> Tensor:
        self.static.copy_(x)
        self.graph.replay()
        # The next replay, of this graph or of another in the pool, writes over the output.
        return self.out.clone()

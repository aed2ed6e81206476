"""How passes are run: eagerly, as CUDA graphs, or compiled; eagerly where another way is not available."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import devices
from ..errors import first_line
from ..networks import fused
from ..networks.blocks import ResnetBlock
from ..networks.onestep import OneStep, Step
from ..settings import SPEEDS
from .graphs import SHARE, CudaRecorder, Fn, Graphs, Recorder, Stamp, Tell

# What `auto` takes on each kind of device: only what has been measured there, and found right, by
# benchmarks/gpu.sh. On an H100 graphs are right and three times quicker, but their first picture comes
# 2.5 s later, which only many pictures of one size make up for.
AUTO = {"cuda": "eager"}
# The compiler makes a program per size, which takes minutes for a full-size model; more sizes than
# this run eagerly. Also torch's own limit, beyond which it stops compiling without a word.
COMPILED_SIZES = 8


@dataclass(frozen=True)
class Speed:
    """The way in use, and where a person asked for another, why."""

    name: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def choose(wanted: str, device: torch.device, network: Step, *, casts: bool = False) -> Speed:
    """The way that is possible here. ValueError for a name that isn't one.

    casts: the layers are a host's, which moves and casts weights as it likes.
    """
    if wanted not in SPEEDS:
        raise ValueError(f"speed must be one of {', '.join(SPEEDS)}, got {wanted!r}")
    if wanted == "auto":
        usual = AUTO.get(device.type, "eager")
        return Speed(choose(usual, device, network, casts=casts).name)
    if wanted == "eager":
        return Speed("eager")
    why = ""
    if casts:
        why = "the host moves this model's weights itself"
    elif not isinstance(network, OneStep):
        why = "the model is not folded"
    elif wanted == "graph" and device.type != "cuda":
        why = f"graphs need an NVIDIA card, this is {device.type}"
    return (
        Speed("eager", f"speed {wanted!r} is not available here: {why}; running eagerly")
        if why
        else Speed(wanted)
    )


def prepare(network: nn.Module, *, kernels: bool) -> None:
    """Set a network up for few launches: fused passes, joined projections. The same map.

    kernels: whether Triton's work here; without them residual blocks are better left as they are.
    """
    for module in network.modules():
        if all(hasattr(module, name) for name in ("fast", "to_q", "to_k")):
            fused.join(module.to_q, module.to_k, module.to_v)
        if hasattr(module, "fast") and (kernels or not isinstance(module, ResnetBlock)):
            module.fast = True


class Eager:
    """Every operation as it comes."""

    # How many tiles may be under way while the one before is blended.
    ahead = 0
    # Whether the picture itself lies on the device where it fits.
    on_device = False

    def run(self, key: Hashable, fn: Fn, x: Tensor, tell: Tell) -> Tensor:
        """fn(x). key: names everything that fn bakes in, besides what can be seen of x."""
        return fn(x)

    def forget(self) -> None:
        """Let go of what was kept from earlier passes."""

    def told(self) -> str:
        """What the passes so far were, for a report; empty where there is nothing to tell."""
        return ""


class Graphed(Eager):
    """Few launches, and those recorded. recorder: of another device, or of a test."""

    ahead, on_device = 1, True

    def __init__(
        self,
        network: OneStep,
        device: torch.device,
        *,
        recorder: Recorder | None = None,
        budget: int | None = None,
    ):
        cuda, device = device.type == "cuda", devices.exact(device)
        self.note = fused.trouble(str(device)) if cuda else ""
        prepare(network, kernels=not self.note)
        if budget is None:
            total = torch.cuda.get_device_properties(device).total_memory if cuda else 2**32
            budget = int(SHARE * total)
        self.graphs = Graphs(
            recorder or CudaRecorder(device),
            Stamp(network),
            budget=budget,
            is_oom=devices.is_oom,
        )

    def run(self, key: Hashable, fn: Fn, x: Tensor, tell: Tell) -> Tensor:
        if self.note:
            tell(f"graph: without fused kernels ({self.note})")
        with tuned():
            return self.graphs.run(key, fn, x, tell)

    def forget(self) -> None:
        self.graphs.forget()

    def told(self) -> str:
        g = self.graphs
        return f"{g.recorded} recorded, {g.replayed} replayed, {g.eager} eager so far"


class Compiled(Eager):
    """The three networks through torch.compile, one program per size."""

    def __init__(self, network: OneStep, device: torch.device):
        cuda = device.type == "cuda"
        self.ahead, self.on_device = (1, True) if cuda else (0, False)
        self.parts = (network.encoder, network.unet, network.decoder)
        self.forwards = [torch.compile(part.forward, dynamic=False) for part in self.parts]
        self.sizes: set[Hashable] = set()
        self.off = ""
        self.lock = threading.Lock()

    def run(self, key: Hashable, fn: Fn, x: Tensor, tell: Tell) -> Tensor:
        if self.off:
            tell(self.off)
            return fn(x)
        size = (key, tuple(x.shape))
        if size not in self.sizes and len(self.sizes) >= COMPILED_SIZES:
            tell(f"compile: more than {COMPILED_SIZES} sizes, the others ran eagerly")
            return fn(x)
        try:
            with self.lock, self.in_place():
                y = fn(x)
            self.sizes.add(size)
            return y
        except Exception as error:
            # Out of memory is for the tiles to mend. All else may be the compiler's; if it is not,
            # it comes again without it.
            if devices.is_oom(error):
                raise
            self.off = (
                "compile: the compiler failed, everything runs eagerly "
                f"({type(error).__name__}: {first_line(error)})"
            )
        tell(self.off)
        return fn(x)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The compiled functions stand in for the networks' own while the block runs."""
        for part, forward in zip(self.parts, self.forwards, strict=True):
            part.forward = forward
        try:
            yield
        finally:
            for part in self.parts:
                del part.forward

    def told(self) -> str:
        return f"{len(self.sizes)} sizes compiled so far"


@contextlib.contextmanager
def tuned() -> Iterator[None]:
    """cuDNN tries its algorithms on a size that it meets for the first time, and keeps the best."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def runner(speed: Speed, network: Step, device: torch.device) -> Eager:
    """What runs the passes of a network in this way."""
    makers: dict[str, Callable[[], Eager]] = {
        "eager": Eager,
        "graph": lambda: Graphed(network, device),
        "compile": lambda: Compiled(network, device),
    }
    return makers[speed.name]()

"""A step's forward and backward pass as a CUDA graph: the launches once, then one.

A small network on a large card spends more time launching kernels than running them (a step with
64 crops of 192 px takes 123 ms on an H100 whose kernels run for 73). What is recorded reads its
batch where it lay when it was recorded, and leaves loss, terms and gradients where it left them
then.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gendr.errors import first_line
from gendr.speed.graphs import recording
from train.tiny.step import Phase, Taken

Take = Callable[[dict[str, Tensor], Phase], Taken]
# Steps of a phase that are taken one launch at a time first: kernels load, optimizers make their state.
SIGHTS = 3
# The recorded step against the same one launched: bf16 sums in another order.
LOSS, COSINE = 0.02, 0.95


@dataclass(eq=False)
class Recording:
    """A graph with its batch, its result and its gradients."""

    graph: Any
    batch: dict[str, Tensor]
    taken: Taken
    gradients: list[Tensor | None]


class Recorded:
    """Takes steps, recorded from the fourth of each phase on where that is possible.

    Where it is not, it warns once and goes on launch by launch.
    """

    def __init__(
        self,
        take: Take,
        parameters: list[nn.Parameter],
        changed: Callable[[], list[Tensor]] = list,
    ):
        """changed: what a step itself changes, the discriminators' weights and optimizers."""
        self.take_, self.parameters, self.changed = take, parameters, changed
        self.kept: dict[Phase, Recording] = {}
        self.sights: dict[Phase, int] = {}
        self.off = not parameters[0].is_cuda

    def take(self, batch: dict[str, Tensor], phase: Phase) -> Taken:
        """As the step itself: loss and terms, gradients in the parameters."""
        if phase in self.kept:
            return self.replayed(self.kept[phase], batch)
        self.sights[phase] = self.sights.get(phase, 0) + 1
        if self.off or self.sights[phase] <= SIGHTS:
            return self.launched(batch, phase)
        earlier = [t.detach().clone() for t in self.changed()]
        taken = self.launched(batch, phase)
        try:
            self.kept[phase] = made = self.record(batch, phase)
            with torch.no_grad():
                for tensor, value in zip(self.changed(), earlier, strict=True):
                    tensor.copy_(value)
            return self.checked(made, batch, taken)
        except RuntimeError as error:
            reason = first_line(error)
        self.off = True
        self.kept.clear()
        warnings.warn(f"steps are not recorded, and slower: {reason}", stacklevel=2)
        return self.launched(batch, phase)

    def launched(self, batch: dict[str, Tensor], phase: Phase) -> Taken:
        for parameter in self.parameters:
            parameter.grad = None
        return self.take_(batch, phase)

    def record(self, batch: dict[str, Tensor], phase: Phase) -> Recording:
        """Record a step. The gradients of the one before stay with the caller."""
        torch.cuda.synchronize()
        self.before = [p.grad for p in self.parameters]
        static = {name: value.clone() for name, value in batch.items()}
        for parameter in self.parameters:
            parameter.grad = None
        with recording(batch["hr"].device) as graph:
            taken = self.take_(static, phase)
        return Recording(graph, static, taken, [p.grad for p in self.parameters])

    def replayed(self, made: Recording, batch: dict[str, Tensor]) -> Taken:
        for name, value in made.batch.items():
            value.copy_(batch[name], non_blocking=True)
        made.graph.replay()
        for parameter, gradient in zip(self.parameters, made.gradients, strict=True):
            parameter.grad = gradient
        return made.taken

    def checked(self, made: Recording, batch: dict[str, Tensor], launched: Taken) -> Taken:
        """The first replay, held against the same step launched. RuntimeError if they differ."""
        wanted = float(launched.loss)
        taken = self.replayed(made, batch)
        found, alike = float(taken.loss), cosine(self.before, made.gradients)
        self.before = []
        if not (abs(found - wanted) <= LOSS * abs(wanted) and alike >= COSINE):
            raise RuntimeError(
                f"the recorded step gave a loss of {found:.5g} for {wanted:.5g}, and gradients at a "
                f"cosine of {alike:.4f}"
            )
        return taken


def cosine(a: list[Tensor | None], b: list[Tensor | None]) -> float:
    """Between two lists of gradients; those that both lack are left out."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None or y is not None]
    a = [torch.zeros_like(y) if x is None else x for x, y in pairs]
    b = [torch.zeros_like(x) if y is None else y for x, y in pairs]
    ab, aa, bb = (
        sum(float((x.double() * y.double()).sum()) for x, y in zip(one, other, strict=True))
        for one, other in ((a, b), (a, a), (b, b))
    )
    return ab / max((aa * bb) ** 0.5, 1e-30)

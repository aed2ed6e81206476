"""A recorder for devices without graphs: a replay runs the function again, on memory of its own.

With it all that surrounds graphs runs on a CPU, in tests and in the dry run of benchmarks.gpu.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gendr.speed.graphs import Fn


class Rerun:
    """Records by keeping the function. cost: bytes that a recording of x counts as."""

    def __init__(self) -> None:
        self.bytes = 0

    def cost(self, x: Tensor) -> int:
        """Of one recording."""
        return 2 * x.numel() * x.element_size()

    def record(self, fn: Fn, x: Tensor) -> Rerunning:
        self.bytes += self.cost(x)
        return Rerunning(fn, x.clone(), fn(x), self.cost(x))

    def held(self) -> int:
        return self.bytes

    def forget(self) -> None:
        self.bytes = 0


@dataclass(eq=False)
class Rerunning:
    """A kept function with an input and an output in fixed places, as a graph has them."""

    fn: Fn
    static: Tensor
    out: Tensor
    bytes: int

    def replay(self, x: Tensor) -> Tensor:
        self.static.copy_(x)
        self.out.copy_(self.fn(self.static))
        return self.out.clone()

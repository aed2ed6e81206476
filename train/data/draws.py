"""The random choices that make one degraded sample, in one order, from one generator."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Draws:
    """What the steps of one sample share: the generator and, where wanted, a trace."""

    rng: np.random.Generator
    trace: list[str] | None = field(default=None)

    def uniform(self, bounds: tuple[float, float]) -> float:
        return float(self.rng.uniform(*bounds))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, weighted):
        """A name from ((name, weight), ...); the weights need not sum to 1."""
        names, weights = zip(*weighted, strict=True)
        at = self.rng.random() * sum(weights)
        return names[min(int(np.searchsorted(np.cumsum(weights), at, "right")), len(names) - 1)]

    def note(self, text: str) -> None:
        if self.trace is not None:
            self.trace.append(text)

"""Pairs made while training goes on: any scale, clean to heavily damaged, nothing stored.

A pair costs a few milliseconds of one core, a training step on the same core hundreds: there shards
(`train.pairs`) save nothing, and a picture is never seen twice with the same damage. Pair i depends
on the options, the pictures and i alone, so a run resumes exactly.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gendr.resizing import resize
from train import degrade, pairs, peers
from train.run import step_generator

# Below this scale a picture holds more than a teacher made for x4 would leave in it.
TAUGHT = 2.5
# The scale of the pairs whose teacher's results are made later: their pictures have one size.
DEFERRED = 4


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Scales with the chance of each: ranges (low, high, weight), low = high for a single one."""

    ranges: tuple[tuple[float, float, float], ...]

    @classmethod
    def parse(cls, text: str) -> Scales:
        """From `4=.5,2=.2,1-4=.3`. ValueError says what is wrong."""
        ranges = []
        for part in text.split(","):
            try:
                place, weight = part.split("=")
                low, high = (place.split("-") * 2)[:2]
                ranges.append((float(low), float(high), float(weight)))
            except ValueError as error:
                raise ValueError(f"{part!r}: write scale=weight or low-high=weight") from error
            low, high, weight = ranges[-1]
            if not 1 <= low <= high or weight < 0:
                raise ValueError(f"{part!r}: scales are at least 1, weights at least 0")
        if not any(weight for *_, weight in ranges):
            raise ValueError(f"{text!r}: one weight must be above 0")
        return cls(ranges=tuple(ranges))

    def draw(self, rng: np.random.Generator) -> float:
        weights = np.array([weight for *_, weight in self.ranges])
        low, high, _ = self.ranges[int(rng.choice(len(weights), p=weights / weights.sum()))]
        return low if low == high else float(rng.uniform(low, high))


class Fresh(Dataset):
    """Item i: `hr` 3 c c and `input` 3 c c, the low-resolution picture as the network gets it
    (enlarged by `gendr.resize`), both in [-1, 1], the `scale`, and whether it is `clean`.

    clean: share of pairs that are only reduced; the others follow `options.mix`.
    teacher: a frozen restorer; `teacher` 3 c c is then what it makes of a damaged picture at scales
    from TAUGHT up, and the clean crop for every other pair.
    deferred: instead of `teacher` the items hold what `taught` needs to make it on another device,
    a batch at a time, for damaged pictures at x4 alone: `low` 3 c/4 c/4 in [0, 1] and `is_taught`.
    """

    def __init__(
        self,
        folder: Path | str,
        options: pairs.Options,
        scales: Scales,
        clean: float,
        *,
        teacher: peers.Teacher | None = None,
        deferred: bool = False,
    ):
        self.teacher, self.deferred = teacher, deferred
        self.source = pairs.Source(Path(folder), dict(options.weights))
        self.options, self.scales, self.clean = options, scales, clean

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray, float, str]:
        """Crop `c c 3`, its low-resolution picture `h w 3`, both uint8, the scale, the kind."""
        rng = np.random.default_rng([self.options.seed, index])
        hr = pairs.crop(self.source, self.options, rng)
        scale = self.scales.draw(rng)
        if float(scale).is_integer() and self.options.crop % scale:
            scale += 1e-6  # sides are then rounded
        kind = "clean" if rng.random() < self.clean else "mixed"
        seed = int(rng.integers(2**63))
        lr = degrade.degrade(hr, kind=kind, mix=self.options.mix, seed=seed, scale=scale)
        return hr, lr, scale, kind

    def __getitem__(self, index: int) -> dict[str, Tensor | float]:
        hr, lr, scale, kind = self.pair(index)
        side = self.options.crop
        wide = torch.from_numpy(lr.copy()).permute(2, 0, 1)[None].float() / 255
        item = {"hr": hr, "input": 2 * resize(wide, (side, side))[0] - 1, "scale": scale}
        item["clean"] = kind == "clean"
        if self.teacher is not None:
            taught = kind != "clean" and scale >= TAUGHT
            item["teacher"] = self.teacher.restore(lr[None], side)[0] if taught else hr
        if self.deferred:
            low = side // DEFERRED
            item["is_taught"] = kind != "clean" and lr.shape[:2] == (low, low)
            item["low"] = wide[0] if item["is_taught"] else torch.zeros(3, low, low)
        for name in ("hr", "teacher"):
            if name in item:
                item[name] = torch.from_numpy(item[name].copy()).permute(2, 0, 1) / 127.5 - 1
        return item

    def batches(self, first: int, size: int, *, workers: int = 0) -> Iterator[dict[str, Tensor]]:
        """Batches from pair `first` on, without end; processes that prepare them ahead."""
        loader = DataLoader(
            self,
            batch_size=size,
            sampler=range(first, 2**40),
            num_workers=workers,
            worker_init_fn=_quiet,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
        return iter(loader)


def taught(batch: dict[str, Tensor], teacher: peers.Teacher) -> dict[str, Tensor]:
    """A batch of deferred pairs with its `teacher`, on the teacher's device."""
    # Chosen where the batch lies: a card would be waited for.
    rows = batch["is_taught"].nonzero().flatten()
    low = batch["low"][rows]
    rest = {k: v for k, v in batch.items() if k not in ("is_taught", "low")}
    batch = moved(rest, teacher.device)
    result = batch["hr"].clone()
    if len(rows):
        result[rows.to(result.device)] = 2 * teacher(low, result.shape[-1]) - 1
    return {**batch, "teacher": result}


def moved(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch on a device, which is not waited for; what lies there already stays as it is."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


class Pool:
    """The last batches of pairs, from which steps draw theirs.

    A pair is seen more than once, each time among others, turned and mirrored anew: damage that
    knows directions (blocks, blur) stays damage.
    """

    def __init__(self, held: int):
        """held: batches."""
        self.held, self.added = held, 0
        self.rows: dict[str, Tensor] = {}

    def add(self, batch: dict[str, Tensor]) -> None:
        """In the oldest one's place."""
        size = len(batch["hr"])
        if not self.rows:
            self.rows = {k: v.new_empty(self.held * size, *v.shape[1:]) for k, v in batch.items()}
        at = self.added % self.held * size
        for name, value in batch.items():
            self.rows[name][at : at + size] = value
        self.added += 1

    def draw(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Rows at random, all turned and mirrored alike."""
        held = len(self.rows["hr"]) // self.held * min(self.added, self.held)
        rows = torch.randint(held, (size,), generator=generator).to(self.rows["hr"].device)
        turns, mirrored = divmod(int(torch.randint(8, (1,), generator=generator)), 2)
        batch = {}
        for name, value in self.rows.items():
            value = value.index_select(0, rows)
            if value.ndim == 4:
                value = torch.rot90(value.flip(-1) if mirrored else value, turns, (-2, -1))
            batch[name] = value.contiguous()
        return batch


def reused(
    batches: Iterator[dict[str, Tensor]], *, reuse: int, held: int, seed: int, first: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of the steps after `first`: a new one joins the pool every `reuse` steps.

    A run that goes on begins with an empty pool, so it sees other pairs than one without a break.
    """
    pool = Pool(held)
    for step in itertools.count(first + 1):
        if not pool.added or step % reuse == 0:
            pool.add(next(batches))
        size = len(pool.rows["hr"]) // held
        yield pool.draw(size, step_generator(seed, step))


def _quiet(_: int) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "codecs not available")  # the parent has said so

"""What a step sees: sample number k of a run and its randomness, the same however the run got there.

Every sample of a run has a number, its `key`. Batch b of B samples holds the keys bB ... bB + B - 1, of
which process r of n takes every n-th, cut into micro-batches. Pictures, crop, damage and noise
depend on the seed and the key alone, so that accumulation, several processes and a resumed run see
what one process sees in one go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gendr import schedule
from train.data.pictures import DataError, Degradation, Order, Pictures
from train.data.shards import Pairs

# First key, and epoch, of samples that are only looked at: no run gets there.
FIXED = 2**40


class Purpose(IntEnum):
    """What a sample's randomness is for: the same numbers must not be drawn for two things of a run.

    A purpose's number decides what a seed yields, so it stays.
    """

    CROP = 0
    FAKE = 1
    REAL = 2
    JUDGE = 3
    PULL = 4
    POSTERIOR = 5
    ROLE = 6
    WORDS = 7
    DROP = 8
    PREVIEW = 105
    # Stage 1 has no scores.
    NOISE = 1


class Batch(NamedTuple):
    """Pictures in [-1, 1]: hr b 3 s s, lr b 3 s/scale s/scale (None without), captions, keys.

    damage: steps that made each lr; empty for those without a damaged copy, and of ready pairs.
    """

    hr: Tensor
    lr: Tensor | None
    captions: list[str]
    keys: list[int]
    damage: list[str] | None = None


class Draw(NamedTuple):
    """Noise of a batch: t (b), eps (b c h w), and who sees the empty prompt (b 1 1, bool)."""

    t: Tensor
    eps: Tensor
    drop: Tensor


def sample_generator(seed: int, key: int, purpose: Purpose) -> torch.Generator:
    """Randomness of one sample for one purpose."""
    # Large odd factors: near keys and purposes land far apart.
    mixed = (
        seed * 0x9E3779B97F4A7C15 + key * 0xC2B2AE3D27D4EB4F + purpose * 0x165667B19E3779F9
    ) % (2**63)
    return torch.Generator().manual_seed(mixed)


def draw(
    keys: list[int],
    shape: tuple[int, ...],
    *,
    seed: int,
    purpose: Purpose,
    first: int = 0,
    last: int = schedule.STEPS - 1,
    drop: float = 0.0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Draw:
    """Noise for samples of latents `shape` (c h w): t in first..last, drop = chance of no prompt."""
    t, eps, dropped = [], [], []
    for key in keys:
        g = sample_generator(seed, key, purpose)
        t.append(torch.randint(first, last + 1, (1,), generator=g))
        eps.append(torch.randn(shape, generator=g, dtype=dtype))
        dropped.append(torch.rand(1, generator=g) < drop)
    return Draw(
        torch.cat(t).to(device),
        torch.stack(eps).to(device),
        torch.cat(dropped)[:, None, None].to(device),
    )


def accumulation(batch: int, micro: int, world: int) -> int:
    """Micro-batches of a batch in each process; ValueError where they don't divide."""
    if batch % (micro * world):
        raise ValueError(
            f"a batch of {batch} is not a multiple of {world} processes x {micro} pictures: change "
            "batch or micro_batch"
        )
    return batch // (micro * world)


class Stream:
    """Micro-batches of a folder of pictures or tar shards, or of ready pairs (`train.pairs`).

    batch: of all processes together; micro: of one process at a time. With a degradation a folder
    of pictures yields `lr` as well; ready pairs always do. ValueError where sizes don't fit.
    """

    def __init__(
        self,
        source: str | Path | tuple[str, ...],
        *,
        batch: int,
        micro: int,
        crop: int,
        degradation: Degradation | None = None,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        self.accumulation = accumulation(batch, micro, world)
        self.batch, self.micro, self.crop, self.seed = batch, micro, crop, seed
        self.rank, self.world, self.workers = rank, world, workers
        sources = (source,) if isinstance(source, str | Path) else tuple(source)
        self.pairs: Pairs | None = None
        self.pictures: Pictures | None = None
        if len(sources) == 1 and any(Path(sources[0]).glob("*.hr.npy")):
            self.pairs = Pairs(sources[0], ("hr", "lr"))
        elif sources:
            self.pictures = Pictures(sources, crop=crop, degradation=degradation, seed=seed)
        else:
            raise DataError("no pictures: name folders, tar shards or ready pairs as data")

    def __len__(self) -> int:
        return len(self.pairs if self.pairs is not None else self.pictures)

    def batches(self, start: int = 0) -> Iterator[list[Batch]]:
        """This process's micro-batches of batch start, start + 1, ..., without an end."""
        if self.pairs is not None:
            found = self._from_pairs(self._keys(start))
        else:
            found = self._from_pictures(start)
        while True:
            yield [next(found) for _ in range(self.accumulation)]

    def fixed(self, count: int) -> Batch:
        """Samples to look at while a run goes on, the same every time: crops that no step draws."""
        keys = list(range(FIXED, FIXED + count))
        if self.pairs is not None:
            return next(self._from_pairs([keys]))
        places = [n * len(self.pictures) // count for n in range(count)]
        items = [self.pictures[FIXED, place] for place in places]
        parts = {k: torch.stack([item[k] for item in items]) for k in ("hr", "lr") if k in items[0]}
        captions = [item["caption"] for item in items]
        damage = [item.get("damage", "") for item in items]
        return Batch(scaled(parts["hr"]), scaled(parts.get("lr")), captions, keys, damage)

    def _keys(self, start: int) -> Iterator[list[int]]:
        at = start * self.batch + self.rank
        while True:
            yield [at + n * self.world for n in range(self.micro)]
            at += self.micro * self.world

    def _from_pairs(self, keys_of_batches: Iterable[list[int]]) -> Iterator[Batch]:
        for keys in keys_of_batches:
            items = [
                self.pairs.batch(sample_generator(self.seed, key, Purpose.CROP), 1, self.crop)
                for key in keys
            ]
            hr, lr = (torch.cat([item[part] for item in items]) for part in ("hr", "lr"))
            yield Batch(hr, lr, [""] * len(keys), keys)

    def _from_pictures(self, start: int) -> Iterator[Batch]:
        order = Order(
            len(self.pictures),
            seed=self.seed,
            start=start * self.batch,
            rank=self.rank,
            world=self.world,
        )
        loader = DataLoader(self.pictures, self.micro, sampler=order, num_workers=self.workers)
        for keys, item in zip(self._keys(start), self.pictures.watch(loader), strict=False):
            hr, lr = (scaled(item.get(part)) for part in ("hr", "lr"))
            damage = list(item.get("damage", [""] * len(keys)))
            yield Batch(hr, lr, list(item["caption"]), keys, damage)


def scaled(pixels: Tensor | None) -> Tensor | None:
    """0..255 -> [-1, 1]."""
    return None if pixels is None else pixels.float().div(127.5).sub(1)

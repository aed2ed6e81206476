"""What a step sees: sample number k of a run and its randomness, the same however the run got there.

Every sample of a run has a number, its `key`. Batch b of B samples holds the keys bB ... bB + B - 1, of
which process r of n takes every n-th, cut into micro-batches. Pictures, crop, damage and noise
depend on the seed and the key alone, so that accumulation, several processes and a resumed run see
what one process sees in one go.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gendr import schedule
from train.data import degradations
from train.data.index import cache_folder, find
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

    All tensors are on the device that the stream was given.

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


def ready_pairs(sources: Sequence[str | Path]) -> bool:
    """Whether the data are one folder that train.pairs made."""
    return len(sources) == 1 and any(Path(sources[0]).glob("*.hr.npy"))


def look_once(sources: Sequence[str | Path]) -> None:
    """Make the indexes of large sources, where they aren't kept already."""
    if not ready_pairs(sources):
        for source in sources:
            find(source, cache_folder())


def codec_shares(
    sources: Sequence[str | Path], mix: str, codecs: Literal["all", "present"]
) -> dict[str, dict[str, float]]:
    """Probabilities of the codecs that will damage these pictures, for the run's record; none for
    ready pairs, which have been damaged.

    DataError where one of the mix is missing here and `codecs` is "all".
    """
    if not sources or ready_pairs(sources):
        return {}
    missing = degradations.missing(mix)
    if missing and codecs == "all":
        raise DataError(
            f"the degradations {mix} need {', '.join(missing)}, which don't work here: install PyAV "
            "(pip install av) and a Pillow with them, or give --codecs present, which gives their "
            "shares to the others"
        )
    return degradations.codec_shares(mix)


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
        span: float | None = None,
        weights: Sequence[float] = (),
        device: torch.device | str = "cpu",
        cache: Path | None = None,
    ):
        """span, cache: of `Pictures`; weights: chance of each source, by their sizes if empty."""
        self.accumulation = accumulation(batch, micro, world)
        self.batch, self.micro, self.crop, self.seed = batch, micro, crop, seed
        self.rank, self.world, self.workers = rank, world, workers
        self.weights, self.device = weights, torch.device(device)
        # Seconds that somebody waited for a batch here, so far.
        self.waited = 0.0
        sources = (source,) if isinstance(source, str | Path) else tuple(source)
        self.pairs: Pairs | None = None
        self.pictures: Pictures | None = None
        if not sources:
            raise DataError("no pictures: name folders, tar shards or ready pairs as data")
        if ready_pairs(sources):
            self.pairs = Pairs(sources[0], ("hr", "lr"))
        else:
            self.pictures = Pictures(
                sources, crop=crop, degradation=degradation, seed=seed, span=span, cache=cache
            )

    def __len__(self) -> int:
        return len(self.pairs if self.pairs is not None else self.pictures)

    def batches(self, start: int = 0) -> Iterator[list[Batch]]:
        """This process's micro-batches of batch start, start + 1, ..., without an end."""
        if self.pairs is not None:
            found = self._from_pairs(self._keys(start))
        else:
            found = self._from_pictures(start)
        while True:
            began = time.perf_counter()
            batch = [next(found) for _ in range(self.accumulation)]
            self.waited += time.perf_counter() - began
            yield batch

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
        return Batch(self.scaled(parts["hr"]), self.scaled(parts.get("lr")), captions, keys, damage)

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
            yield Batch(hr.to(self.device), lr.to(self.device), [""] * len(keys), keys)

    def _from_pictures(self, start: int) -> Iterator[Batch]:
        order = Order(
            len(self.pictures),
            seed=self.seed,
            start=start * self.batch,
            rank=self.rank,
            world=self.world,
            sizes=self.pictures.entries.sizes,
            weights=self.weights,
        )
        loader = DataLoader(
            self.pictures,
            self.micro,
            sampler=order,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        for keys, item in zip(self._keys(start), self.pictures.watch(loader), strict=False):
            hr, lr = (self.scaled(item.get(part)) for part in ("hr", "lr"))
            damage = list(item.get("damage", [""] * len(keys)))
            yield Batch(hr, lr, list(item["caption"]), keys, damage)

    def scaled(self, pixels: Tensor | None) -> Tensor | None:
        """0..255 -> [-1, 1], on the device: a quarter of the bytes travel."""
        if pixels is None:
            return None
        return pixels.to(self.device, non_blocking=True).float().div(127.5).sub(1)

"""Pictures for training: folders and tar shards, captions, crops, and degraded copies.

A sample is decided by (seed, epoch, index) and the files, whichever worker makes it. Files that
cannot be used (cut, too small, of a mode that loses something in 8-bit RGB) are replaced by others,
named once and counted; they never end a run.

    dataset = Pictures("photos", crop=512, degradation=Degradation("mixed", mix="paper"))
    loader = DataLoader(dataset, batch_size=8, sampler=Order(len(dataset), seed=0), num_workers=4)
    for batch in dataset.watch(loader):   # endless
        batch["hr"], batch["lr"], batch["caption"], batch["name"]
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from train.data import degradations
from train.data.index import DataError, Entry, Sources, find

MODES = {"1", "L", "P", "RGB", "RGBA", "LA", "PA", "RGBX", "YCbCr"}
SMALLEST = 64  # pixels of the short side; below that enlarging makes no training picture
# Sets the draws of sources apart from those of a picture's crop.
WEIGHTED = 7
TRIES = 50  # replacements for one sample before the data are called unusable


class BadPicture(ValueError):
    """One picture cannot be used; the message says why."""


def decode(data: bytes, smallest: int = SMALLEST, least: int | None = None) -> np.ndarray:
    """A picture file's bytes as `h w 3` uint8. BadPicture when it is cut, too small, or has a mode
    that 8-bit RGB cannot hold: more than 8 bits, CMYK (its profile decides the colours), or real
    transparency.

    least: what the short side must keep where the picture is to be reduced anyway; JPEGs are then
    decoded at a half, a quarter or an eighth, which takes a fraction of the time.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if min(image.size) < smallest:
                raise BadPicture(f"{image.width}x{image.height} is below {smallest} pixels")
            if image.mode not in MODES:
                raise BadPicture(f"mode {image.mode}")
            if least is not None:
                image.draft(None, (least, least))
            image.load()
            alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
            if alpha and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
                raise BadPicture("transparency")
            return np.asarray(image.convert("RGB"))
    except BadPicture:
        raise
    except Image.DecompressionBombError as error:
        raise BadPicture("too many pixels") from error
    except (OSError, ValueError, SyntaxError, EOFError, KeyError) as error:
        raise BadPicture(f"cannot be decoded: {str(error) or type(error).__name__}") from error


def random_crop(
    pixels: np.ndarray, side: int, rng: np.random.Generator, flip: bool, span: float | None = None
) -> np.ndarray:
    """`side side 3` uint8 from anywhere in `h w 3`; a shorter short side is enlarged first.

    span: reduce a longer one to between 1 and this many crops, so that a crop shows most of the
    picture; None = crops of the picture as it is.
    """
    h, w = pixels.shape[:2]
    short = side if min(h, w) < side else min(h, w)
    if span is not None:
        short = min(short, round(side * rng.uniform(1, span)))
    if short != min(h, w):
        factor = short / min(h, w)
        h, w = max(side, round(h * factor)), max(side, round(w * factor))
        pixels = np.asarray(Image.fromarray(pixels).resize((w, h), Image.Resampling.LANCZOS))
    top, left = int(rng.integers(h - side + 1)), int(rng.integers(w - side + 1))
    pixels = pixels[top : top + side, left : left + side]
    if flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


@dataclass(frozen=True)
class Degradation:
    """How the low-resolution copies are made; see train.data.degradations.

    share: of the pictures that get one; the others' is black, with an empty `damage`.
    """

    kind: str = "mixed"
    mix: str = "paper"
    scale: int = 4
    share: float = 1.0


class Pictures(Dataset):
    """Crops of pictures. An item's key is its index, or (epoch, index) as `Order` gives them.

    An item: `hr` 3 side side uint8; with a degradation `lr` 3 side/scale side/scale uint8 and
    `damage`, its steps with "; " between them; `caption` and `name`, both strings. DataError when there are no pictures, or when hardly any of
    them can be used.
    """

    def __init__(
        self,
        source: str | Path | Iterable[str | Path],
        *,
        crop: int = 512,
        degradation: Degradation | None = None,
        flip: bool = True,
        seed: int = 0,
        smallest: int = SMALLEST,
        span: float | None = None,
        cache: Path | None = None,
    ):
        """span: see `random_crop`; cache: see `find`."""
        if crop < 1 or (degradation and crop % degradation.scale):
            raise DataError(
                f"a crop of {crop} does not divide by the scale: choose a multiple of it"
            )
        sources = [source] if isinstance(source, str | Path) else list(source)
        self.entries = Sources([find(one, cache) for one in sources])
        self.crop, self.degradation, self.flip, self.span = crop, degradation, flip, span
        self.seed, self.smallest = seed, smallest
        # one byte for each picture, seen by all workers: the process that reads the loader names
        # them
        self._bad = torch.zeros(len(self.entries), dtype=torch.uint8).share_memory_()
        self._named: set[int] = set()

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self.entries):
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, epoch, index])
        pixels, entry = self._usable(index, rng)
        hr = random_crop(pixels, self.crop, rng, self.flip, self.span)
        item = {"hr": _tensor(hr)}
        if self.degradation:
            how = self.degradation
            seed, trace = int(rng.integers(2**63)), []
            low = np.zeros((self.crop // how.scale, self.crop // how.scale, 3), np.uint8)
            if rng.random() < how.share:
                low = degradations.degrade(
                    hr, kind=how.kind, mix=how.mix, scale=how.scale, seed=seed, trace=trace
                )
            item |= {"lr": _tensor(low), "damage": "; ".join(trace)}
        return item | {"caption": entry.words(), "name": entry.name}

    def _usable(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, Entry]:
        # Whether a file was found bad before must not change what is drawn: the flags only save the
        # reading.
        least = None if self.span is None else round(self.crop * self.span)
        for _ in range(TRIES):
            if not self._bad[index]:
                try:
                    entry = self.entries[index]
                    return decode(entry.read(), self.smallest, least), entry
                except (BadPicture, OSError):
                    self._bad[index] = 1
            index = int(rng.integers(len(self.entries)))
        raise DataError(
            f"{TRIES} pictures in a row could not be used, for example {self.entries[index].name}: "
            f"check the folder ({self.bad_count()} of {len(self)} bad so far)"
        )

    def bad_count(self) -> int:
        """How many pictures were found unusable so far, by any worker."""
        return int(self._bad.sum())

    def name_bad(self) -> list[str]:
        """Warn about every bad picture not named before, with the reason; returns those lines."""
        lines = []
        for index in self._bad.nonzero().flatten().tolist():
            if index in self._named:
                continue
            self._named.add(index)
            entry, reason = self.entries[index], "could not be read"
            try:
                decode(entry.read(), self.smallest)
            except (BadPicture, OSError) as error:
                reason = str(error)
            lines.append(f"{entry.name}: {reason}")
            warnings.warn(f"skipped {lines[-1]}", stacklevel=3)
        return lines

    def watch(self, loader: Iterable) -> Iterator:
        """The loader's batches; bad pictures are named, once, as they turn up."""
        for batch in loader:
            self.name_bad()
            yield batch
        self.name_bad()


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


class Order(Sampler):
    """Endless keys (epoch, index): each epoch a permutation of `count` by the seed.

    `start` is how many keys all ranks together have used, so that a resumed run goes on where it
    stopped; rank r of `world` takes every world-th key. With `weights`, one for each of `sizes`,
    every key draws a source by its weight and one of its pictures, and is an epoch of its own.
    """

    def __init__(
        self,
        count: int,
        *,
        seed: int = 0,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        sizes: Sequence[int] = (),
        weights: Sequence[float] = (),
    ):
        if count < 1 or start < 0 or not 0 <= rank < world:
            raise DataError(f"cannot order {count} pictures from {start} as rank {rank} of {world}")
        if weights and (len(weights) != len(sizes) or min(weights) < 0 or not sum(weights)):
            raise DataError(
                f"weights needs a number of at least 0 for each of the {len(sizes)} sources of data, "
                f"one of them above 0, not {', '.join(f'{w:g}' for w in weights)}"
            )
        self.count, self.seed, self.start, self.rank, self.world = count, seed, start, rank, world
        self.sizes, self.weights = list(sizes), list(weights)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if self.weights:
            yield from self._weighted()
        at, epoch, order = self.start + self.rank, -1, None
        while True:
            if at // self.count != epoch:
                epoch = at // self.count
                order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            yield epoch, int(order[at % self.count])
            at += self.world

    def _weighted(self) -> Iterator[tuple[int, int]]:
        edges = np.cumsum(self.weights) / np.sum(self.weights)
        starts = np.cumsum(self.sizes) - self.sizes
        at = self.start + self.rank
        while True:
            rng = np.random.default_rng([self.seed, at, WEIGHTED])
            source = int(np.searchsorted(edges, rng.random(), side="right"))
            yield at, int(starts[source] + rng.integers(self.sizes[source]))
            at += self.world

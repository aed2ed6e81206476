"""Reads the shards that `train.pairs` makes: damaged crops with their clean and pseudo targets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Pairs:
    """All shards of a folder, memory-mapped.

    A shard is one `.npy` per part, uint8 n h w 3: `hr` clean, `lr` damaged and `scale` times
    smaller, `teacher` what a frozen restorer makes of `lr` (where one was used).
    """

    def __init__(self, folder: Path | str, parts: tuple[str, ...] = ("hr",)):
        paths = sorted(Path(folder).glob("*.hr.npy"))
        if not paths:
            raise FileNotFoundError(f"no shards (*.hr.npy) in {folder}: make some with train.pairs")
        self.arrays = [
            {part: np.load(str(p).replace(".hr.", f".{part}."), mmap_mode="r") for part in parts}
            for p in paths
        ]
        self.ends = np.cumsum([len(a["hr"]) for a in self.arrays])
        self.size = self.arrays[0]["hr"].shape[1]
        self.scale = self.size // self.arrays[0]["lr"].shape[1] if "lr" in parts else 1

    def __len__(self) -> int:
        return int(self.ends[-1])

    def batch(self, generator: torch.Generator, count: int, crop: int) -> dict[str, Tensor]:
        """Random crops of random pairs, in [-1, 1], b 3 crop crop (`lr`: crop / scale)."""
        if crop > self.size or crop % self.scale:
            raise ValueError(f"crop must be a multiple of {self.scale} up to {self.size}")
        places = (self.size - crop) // self.scale + 1
        found: dict[str, list[np.ndarray]] = {part: [] for part in self.arrays[0]}
        for _ in range(count):
            index, top, left, flip = (
                int(torch.randint(n, (1,), generator=generator))
                for n in (len(self), places, places, 2)
            )
            shard = int(np.searchsorted(self.ends, index, side="right"))
            row = index - (int(self.ends[shard - 1]) if shard else 0)
            for part, array in self.arrays[shard].items():
                k = 1 if part == "lr" else self.scale
                n = crop // self.scale if part == "lr" else crop
                window = array[row, top * k : top * k + n, left * k : left * k + n]
                found[part].append(window[:, ::-1] if flip else window)
        return {
            part: torch.from_numpy(np.stack(items)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
            for part, items in found.items()
        }

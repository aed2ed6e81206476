"""A fixed set of damaged pictures, restored while a run goes on: scores and a sheet to look at."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from gendr.model import GenDR
from train.evaluation import metrics, testset
from train.evaluation.methods import read_rgb, rgb8
from train.evaluation.niqe import BLOCK, Niqe, fits
from train.evaluation.testset import InputError
from train.sheets import eight_bit, write_sheet

# Pictures on a sheet, and what is shown of each, pixels.
SHOWN, SIDE = 6, 320
NAMES = ("psnr", "ssim", "sharp", "lr_psnr", "niqe")


class Validation:
    """Damaged pictures with their clean originals, or None where there is none: uint8 h w 3.

    niqe: measures results without an original too.
    """

    def __init__(
        self,
        damaged: Sequence[np.ndarray],
        clean: Sequence[np.ndarray | None],
        niqe: Niqe | None = None,
    ):
        self.damaged, self.clean, self.niqe = damaged, clean, niqe

    @classmethod
    def from_folders(
        cls, data: str | Path, reference: str | Path | None = None, niqe: Niqe | None = None
    ) -> Validation:
        """Pictures by name, with originals of the same names. InputError where none fit."""
        items, _ = testset.pair(Path(data), Path(reference) if reference else None, None)
        return cls(
            [read_rgb(item.source) for item in items],
            [read_rgb(item.reference) if item.reference else None for item in items],
            niqe,
        )

    @classmethod
    def from_batch(cls, lr: Tensor, hr: Tensor, niqe: Niqe | None = None) -> Validation:
        """Of training pictures, b 3 h w in [-1, 1]."""
        return cls(eight_bit(lr), eight_bit(hr), niqe)

    def check(self, scale: float) -> None:
        """InputError where NIQE is wanted and no result is large enough for it; a warning where some
        aren't. scale: of pictures without an original.
        """
        if self.niqe is None:
            return
        sizes = [
            tuple(round(side * scale) for side in damaged.shape[:2])
            if clean is None
            else clean.shape[:2]
            for damaged, clean in zip(self.damaged, self.clean, strict=True)
        ]
        small = [size for size in sizes if not fits(*size)]
        if len(small) == len(sizes):
            height, width = max(sizes, key=lambda size: size[0] * size[1])
            raise InputError(
                f"NIQE needs results that hold two blocks of {BLOCK} px, and the largest to validate "
                f"on has {width}x{height}: give larger pictures (--validate, --originals) or leave "
                "--niqe out"
            )
        if small:
            warnings.warn(
                f"NIQE is measured on {len(sizes) - len(small)} of {len(sizes)} pictures: the others "
                f"don't hold two blocks of {BLOCK} px",
                stacklevel=2,
            )

    def scores(self, model: GenDR, sheet: Path | None = None) -> dict[str, float]:
        """Means over the pictures of psnr, ssim, sharp (against the original), lr_psnr and niqe.

        sheet: a PNG of the first pictures, one column each: enlarged input, result, original.
        """
        found: dict[str, list[float]] = {}
        columns: list[list[np.ndarray]] = []
        for damaged, clean in zip(self.damaged, self.clean, strict=True):
            scale = model.scale if clean is None else clean.shape[1] / damaged.shape[1]
            image = metrics.as_tensor(damaged)
            result = rgb8(model.restore(image, scale, color_fix="none", fidelity=0.0))
            values = metrics.against_input(result, damaged)[0]
            if clean is not None:
                values |= metrics.against_reference(result, clean)[0]
            if self.niqe is not None:
                values["niqe"] = self.niqe(result)
            for name in NAMES:
                if values.get(name) is not None:
                    found.setdefault(name, []).append(values[name])
            if len(columns) < SHOWN:
                size = result.shape[1], result.shape[0]
                enlarged = Image.fromarray(damaged).resize(size, Image.Resampling.BICUBIC)
                columns.append([np.asarray(enlarged), result, clean])
        if sheet:
            write_sheet(sheet, list(zip(*columns, strict=True)), side=SIDE)
        return {name: float(np.mean(values)) for name, values in found.items()}

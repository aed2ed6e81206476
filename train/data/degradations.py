"""Degradations: a high-resolution crop becomes the low-resolution picture a restorer is trained on.

Four kinds. `realesrgan` is the second-order pipeline of Real-ESRGAN (arXiv 2107.10833, the
published x4 options), `apisr` the compression-heavy one of APISR (arXiv 2403.01598), `mild` a
single light pass for small models, `clean` plain antialiased bicubic. `mixed` draws one of them by
a mix's weights. Every range stands in the tables below, what is the same for all pipelines with its
step: `blur.py`, `noise.py`, `codecs.py`.

A sample depends on its pixels and its seed alone, never on the process that makes it.

Differences from the published code: JPEG is libjpeg's (real chroma subsampling) where Real-ESRGAN
uses a differentiable copy, video codecs run in memory through PyAV where APISR starts ffmpeg on
files, and Poisson counts above 4 come from the Cornish-Fisher expansion of the normal quantile.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from train.data.blur import Kernels, blur, draw_kernel, draw_side, gaussian_kernel, sinc_kernel
from train.data.codecs import Codec, available, compressed, shares, to_bytes, to_float
from train.data.draws import Draws
from train.data.noise import Noise, gaussian_noise, noised


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Random resize: probabilities of up, down, keep; factors; its possible places."""

    up: float
    down: float
    keep: float
    factor: tuple[float, float]
    places: tuple[str, ...] = ("after blur",)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One order of degradation: blur, resize, noise and, given codecs, compression."""

    blur: float
    kernels: Kernels
    resize: Resize
    noise: Noise
    codecs: tuple[Codec, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Stages and the last step. `sinc` None: resize, then compress. Otherwise the pair [resize,
    sinc filter with this probability] stands before or after the compression, half the time
    each."""

    stages: tuple[Stage, ...]
    sinc: float | None
    codecs: tuple[Codec, ...]
    sides: tuple[int, int] = (7, 21)


@dataclass(frozen=True, kw_only=True)
class Mild:
    """One light pass; blur sigma is in pixels of the high-resolution crop, noise sigma in 1/255."""

    blur: tuple[float, float] = (0.0, 2.5)
    noise: float = 0.7
    sigma: tuple[float, float] = (0.0, 12.0)
    codecs: tuple[Codec, ...] = (Codec(name="jpeg", weight=1.0, quality=(40, 95)),)
    compress: float = 0.8


MODES = ("area", "bilinear", "bicubic")
_JPEG = (Codec(name="jpeg", weight=1.0, quality=(30, 95)),)
_ANYWHERE = ("before blur", "after blur", "after noise")

REALESRGAN = Pipeline(
    stages=(
        Stage(
            blur=1.0,
            kernels=Kernels(sigma=(0.2, 3.0)),
            resize=Resize(up=0.2, down=0.7, keep=0.1, factor=(0.15, 1.5)),
            noise=Noise(sigma=(1, 30), poisson=(0.05, 3.0)),
            codecs=_JPEG,
        ),
        Stage(
            blur=0.8,
            kernels=Kernels(sigma=(0.2, 1.5)),
            resize=Resize(up=0.3, down=0.4, keep=0.3, factor=(0.3, 1.2)),
            noise=Noise(sigma=(1, 25), poisson=(0.05, 2.5)),
        ),
    ),
    sinc=0.8,
    codecs=_JPEG,
)

APISR = Pipeline(
    stages=(
        Stage(
            blur=1.0,
            kernels=Kernels(sigma=(0.2, 3.0)),
            resize=Resize(up=0.2, down=0.7, keep=0.1, factor=(0.1, 1.2), places=_ANYWHERE),
            noise=Noise(sigma=(1, 30), poisson=(0.05, 3.0)),
            codecs=(
                Codec(name="jpeg", weight=0.4, quality=(20, 95)),
                Codec(name="webp", weight=0.6, quality=(20, 95)),
            ),
        ),
        Stage(
            blur=0.8,
            kernels=Kernels(sigma=(0.2, 1.5)),
            resize=Resize(up=0.2, down=0.7, keep=0.1, factor=(0.15, 1.2), places=_ANYWHERE),
            noise=Noise(sigma=(1, 25), poisson=(0.05, 2.5)),
        ),
    ),
    sinc=None,
    codecs=(
        Codec(name="jpeg", weight=0.06, quality=(20, 95)),
        Codec(name="webp", weight=0.10, quality=(20, 95)),
        Codec(name="avif", weight=0.10, quality=(20, 95)),
        Codec(name="mpeg2", weight=0.12, quality=(8, 31)),
        Codec(name="mpeg4", weight=0.12, quality=(8, 31)),
        Codec(name="h264", weight=0.30, quality=(23, 38)),
        Codec(name="h265", weight=0.20, quality=(28, 42)),
    ),
)

MILD = Mild()

MIXES: dict[str, dict[str, float]] = {
    "paper": {"realesrgan": 0.5, "apisr": 0.5},
    "tiny": {"clean": 0.12, "mild": 0.48, "realesrgan": 0.25, "apisr": 0.15},
    # For fresh pairs, whose clean share is a setting of its own.
    "light": {"mild": 0.7, "realesrgan": 0.18, "apisr": 0.12},
}
KINDS = ("realesrgan", "apisr", "mild", "clean", "mixed")


def resize(
    x: torch.Tensor, size: tuple[int, int], mode: str, antialias: bool = False
) -> torch.Tensor:
    """`c h w` to `c *size`; without antialias by default, as both references do it."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    if mode == "area":
        return F.interpolate(x[None], size=size, mode="area")[0]
    return F.interpolate(x[None], size=size, mode=mode, align_corners=False, antialias=antialias)[0]


# Where each kind compresses, by the name of its record.
TABLES: dict[str, dict[str, tuple[Codec, ...]]] = {
    "realesrgan": {"realesrgan_last": REALESRGAN.codecs},
    "apisr": {"apisr_first": APISR.stages[0].codecs, "apisr_last": APISR.codecs},
    "mild": {"mild": MILD.codecs},
    "clean": {},
}


def report() -> dict:
    """Codecs found and the probabilities in force."""
    return {
        "codecs": available(),
        "realesrgan_last": shares(REALESRGAN.codecs),
        "apisr_first": shares(APISR.stages[0].codecs),
        "apisr_last": shares(APISR.codecs),
    }


def codec_shares(mix: str) -> dict[str, dict[str, float]]:
    """Probabilities of the codecs of a mix as they are here, by where they compress."""
    return {name: shares(table) for name, table in _tables(mix).items()}


def missing(mix: str) -> list[str]:
    """Codecs that a mix names and that don't work here."""
    works = available()
    named = {codec.name for table in _tables(mix).values() for codec in table}
    return sorted(name for name in named if not works[name])


def _tables(mix: str) -> dict[str, tuple[Codec, ...]]:
    if mix not in MIXES:
        raise ValueError(f"unknown mix {mix!r}: use one of {', '.join(MIXES)}")
    return {k: v for kind in MIXES[mix] for k, v in TABLES[kind].items()}


def _randomly_resized(
    x: torch.Tensor, table: Resize, base: tuple[int, int], draws: Draws
) -> torch.Tensor:
    way = draws.pick((("up", table.up), ("down", table.down), ("keep", table.keep)))
    low, high = table.factor
    factor = {"up": (1.0, high), "down": (low, 1.0), "keep": (1.0, 1.0)}[way]
    factor = draws.uniform(factor)
    mode = MODES[int(draws.rng.integers(len(MODES)))]
    draws.note(f"resize {factor:.2f} {mode}")
    return resize(x, (max(1, int(base[0] * factor)), max(1, int(base[1] * factor))), mode)


def _run(x: torch.Tensor, table: Pipeline, size: tuple[int, int], draws: Draws) -> torch.Tensor:
    """`c h w` in [0,1] through the stages and the last step, to `c *size`."""
    base = tuple(x.shape[-2:])
    for stage in table.stages:
        place = stage.resize.places[int(draws.rng.integers(len(stage.resize.places)))]
        if place == "before blur":
            x = _randomly_resized(x, stage.resize, base, draws)
        if draws.chance(stage.blur):
            x = blur(x, draw_kernel(draws, stage.kernels))
        if place == "after blur":
            x = _randomly_resized(x, stage.resize, base, draws)
        x = noised(x, stage.noise, draws)
        if place == "after noise":
            x = _randomly_resized(x, stage.resize, base, draws)
        if stage.codecs:
            x = compressed(x, stage.codecs, draws)
        base = size  # the second stage counts from the low-resolution size

    mode = MODES[int(draws.rng.integers(len(MODES)))]
    if table.sinc is None:
        return compressed(resize(x, size, mode), table.codecs, draws)
    first = draws.chance(0.5)
    if not first:
        x = compressed(x, table.codecs, draws)
    x = resize(x, size, mode)
    if draws.chance(table.sinc):
        omega = draws.uniform((math.pi / 3, math.pi))
        draws.note(f"final sinc {omega:.2f}")
        x = blur(x, sinc_kernel(draw_side(draws, table.sides), omega))
    return compressed(x, table.codecs, draws) if first else x


def _run_mild(x: torch.Tensor, table: Mild, size: tuple[int, int], draws: Draws) -> torch.Tensor:
    sigma = draws.uniform(table.blur)
    if sigma > 0.2:  # below that the kernel is a single pixel
        x = blur(x, gaussian_kernel(2 * math.ceil(3 * sigma) + 1, sigma))
    mode = MODES[int(draws.rng.integers(len(MODES)))]
    x = resize(x, size, mode, antialias=mode != "area")
    draws.note(f"blur {sigma:.2f}, {mode}")
    if draws.chance(table.noise):
        sigma = draws.uniform(table.sigma)
        draws.note(f"gauss {sigma:.1f}")
        x = gaussian_noise(x, sigma, False, draws.rng)
    if draws.chance(table.compress):
        x = compressed(x, table.codecs, draws)
    return x


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread. Sums are split differently among threads, and the last bit of a float
    decides now and then how a pixel is rounded: a loader's worker would not repeat its parent."""
    threads = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


def degrade(
    hr: np.ndarray,
    *,
    kind: str,
    seed: int,
    scale: float = 4,
    mix: str = "paper",
    trace: list[str] | None = None,
) -> np.ndarray:
    """The low-resolution picture of a crop.

    hr: `h w 3` uint8, h and w multiples of `scale` where that is a whole number; the result's sides
    are rounded where it is not. Returns `h/scale w/scale 3` uint8. `kind` is one of KINDS; `mixed`
    draws it from MIXES[mix]. The same pixels and seed give the same result anywhere. `trace`, if
    given, is filled with the steps in words. ValueError for a wrong shape, kind or mix.
    """
    if hr.ndim != 3 or hr.shape[2] != 3 or hr.dtype != np.uint8:
        raise ValueError(
            f"a crop must be h w 3 in uint8, not {hr.shape} in {hr.dtype}: convert it to RGB"
        )
    h, w = hr.shape[:2]
    if scale < 1 or not h or not w:
        raise ValueError(
            f"a crop of {h}x{w} cannot be reduced by {scale}: use a scale of at least 1"
        )
    if float(scale).is_integer() and (h % scale or w % scale):
        raise ValueError(f"a crop of {h}x{w} does not divide by {scale}: use sides that do")
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: use one of {', '.join(KINDS)}")
    draws = Draws(np.random.default_rng(seed), trace)
    if kind == "mixed":
        if mix not in MIXES:
            raise ValueError(f"unknown mix {mix!r}: use one of {', '.join(MIXES)}")
        kind = draws.pick(tuple(MIXES[mix].items()))
    draws.note(kind)
    size = (max(1, round(h / scale)), max(1, round(w / scale)))
    if kind == "clean":
        return np.asarray(Image.fromarray(hr).resize(size[::-1], Image.Resampling.BICUBIC))
    with _one_thread():
        x = to_float(hr)
        if kind == "mild":
            return to_bytes(_run_mild(x, MILD, size, draws))
        return to_bytes(_run(x, REALESRGAN if kind == "realesrgan" else APISR, size, draws))

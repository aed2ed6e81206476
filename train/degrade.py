"""Degradations: a high-resolution crop becomes the low-resolution picture a restorer is trained on.

Four kinds. `realesrgan` is the second-order pipeline of Real-ESRGAN (arXiv 2107.10833, the
published x4 options), `apisr` the compression-heavy one of APISR (arXiv 2403.01598), `mild` a
single light pass for small models, `clean` plain antialiased bicubic. `mixed` draws one of them by
a mix's weights. Every range stands in the tables below and nowhere else.

A sample depends on its pixels and its seed alone, never on the process that makes it.

    python -m train.degrade sheet --data DIR --out sheet.png [--kind KIND] [--mix MIX] [--seed N]

Differences from the published code: JPEG is libjpeg's (real chroma subsampling) where Real-ESRGAN
uses a differentiable copy, video codecs run in memory through PyAV where APISR starts ffmpeg on
files, and Poisson counts above 4 come from the Cornish-Fisher expansion of the normal quantile.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, features


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Blur kernels: odd side, share of sinc filters, kinds of the others, and their parameters."""

    sides: tuple[int, int] = (7, 21)
    sinc: float = 0.1
    kinds: tuple[tuple[str, float], ...] = (
        ("iso", 0.45),
        ("aniso", 0.25),
        ("generalised_iso", 0.12),
        ("generalised_aniso", 0.03),
        ("plateau_iso", 0.12),
        ("plateau_aniso", 0.03),
    )
    sigma: tuple[float, float]
    beta_generalised: tuple[float, float] = (0.5, 4.0)
    beta_plateau: tuple[float, float] = (1.0, 2.0)


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Random resize: probabilities of up, down, keep; factors; its possible places."""

    up: float
    down: float
    keep: float
    factor: tuple[float, float]
    places: tuple[str, ...] = ("after blur",)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Gaussian (sigma in 1/255) or Poisson noise; either may be the same in the three channels."""

    gaussian: float = 0.5
    sigma: tuple[float, float]
    poisson: tuple[float, float]
    grey: float = 0.4


@dataclass(frozen=True, kw_only=True)
class Codec:
    """A lossy codec, its weight, and the range of its quality, qscale or crf."""

    name: str
    weight: float
    quality: tuple[int, int]


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

WEBP_METHODS = (0, 6)
AVIF_SPEED = 8
VIDEO_PRESETS = (
    ("slow", 0.05),
    ("medium", 0.35),
    ("fast", 0.30),
    ("faster", 0.20),
    ("superfast", 0.10),
)
VIDEO_SMALLEST = 32  # x265 refuses smaller frames
# PyAV's names of the encoders
VIDEO_ENCODERS = {"mpeg2": "mpeg2video", "mpeg4": "mpeg4", "h264": "libx264", "h265": "libx265"}

MIXES: dict[str, dict[str, float]] = {
    "paper": {"realesrgan": 0.5, "apisr": 0.5},
    "tiny": {"clean": 0.12, "mild": 0.48, "realesrgan": 0.25, "apisr": 0.15},
}
KINDS = ("realesrgan", "apisr", "mild", "clean", "mixed")


@dataclass
class _Sample:
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


def gaussian_kernel(
    side: int,
    sigma_x: float,
    sigma_y: float | None = None,
    angle: float = 0.0,
    kind: str = "gaussian",
    beta: float = 1.0,
) -> np.ndarray:
    """`side side` float64 kernel that sums to 1, from q = x' S^-1 x with S the rotated covariance.

    gaussian exp(-q/2), generalised exp(-q^beta / 2), plateau 1 / (1 + q^beta). Real-ESRGAN, section
    3.2.
    """
    sigma_y = sigma_x if sigma_y is None else sigma_y
    at = np.arange(side, dtype=np.float64) - side // 2
    x, y = at[None, :], at[:, None]
    cos, sin = math.cos(angle), math.sin(angle)
    q = ((cos * x + sin * y) / sigma_x) ** 2 + ((cos * y - sin * x) / sigma_y) ** 2
    if kind == "gaussian":
        kernel = np.exp(-q / 2)
    elif kind == "generalised":
        kernel = np.exp(-(q**beta) / 2)
    elif kind == "plateau":
        kernel = 1 / (1 + q**beta)
    else:
        raise ValueError(f"unknown kernel {kind!r}: use gaussian, generalised or plateau")
    return kernel / kernel.sum()


def sinc_kernel(side: int, omega: float) -> np.ndarray:
    """`side side` float64 kernel, sum 1: circular low pass to `omega` radians per pixel."""
    at = np.arange(side, dtype=np.float64) - side // 2
    r = np.hypot(at[None, :], at[:, None])
    r[side // 2, side // 2] = 1.0
    kernel = (
        omega / (2 * math.pi * r) * torch.special.bessel_j1(torch.from_numpy(omega * r)).numpy()
    )
    kernel[side // 2, side // 2] = omega**2 / (4 * math.pi)
    return kernel / kernel.sum()


def _side(sample: _Sample, sides: tuple[int, int]) -> int:
    return 2 * int(sample.rng.integers(sides[0] // 2, sides[1] // 2 + 1)) + 1


def _beta(sample: _Sample, bounds: tuple[float, float]) -> float:
    # half of the draws below 1 (heavier tails), half above; a range that starts at 1 gives 1 for
    # them
    low, high = bounds
    return sample.uniform((low, 1.0) if sample.chance(0.5) else (1.0, high))


def draw_kernel(sample: _Sample, table: Kernels) -> np.ndarray:
    """One blur kernel of a stage."""
    side = _side(sample, table.sides)
    if sample.chance(table.sinc):
        omega = sample.uniform((math.pi / 3 if side < 13 else math.pi / 5, math.pi))
        sample.note(f"sinc {side} {omega:.2f}")
        return sinc_kernel(side, omega)
    kind = sample.pick(table.kinds)
    sigma_x = sample.uniform(table.sigma)
    sigma_y, angle = sigma_x, 0.0
    if kind.endswith("aniso"):
        sigma_y, angle = sample.uniform(table.sigma), sample.uniform((-math.pi, math.pi))
    sample.note(f"{kind} {side} {sigma_x:.2f}" + (f"/{sigma_y:.2f}" if angle else ""))
    if kind.startswith("generalised"):
        beta = _beta(sample, table.beta_generalised)
        return gaussian_kernel(side, sigma_x, sigma_y, angle, "generalised", beta)
    if kind.startswith("plateau"):
        beta = _beta(sample, table.beta_plateau)
        return gaussian_kernel(side, sigma_x, sigma_y, angle, "plateau", beta)
    return gaussian_kernel(side, sigma_x, sigma_y, angle)


@functools.cache
def _fast_length(n: int) -> int:
    """The next even length with no prime factor above 5: the transform is quick there."""
    while True:
        n += n % 2
        rest = n
        for p in (2, 3, 5):
            while rest % p == 0:
                rest //= p
        if rest == 1:
            return n
        n += 2


def blur(x: torch.Tensor, kernel: np.ndarray) -> torch.Tensor:
    """Filter `c h w` float32 with a point-symmetric kernel; mirrored borders, same size out."""
    h, w = x.shape[-2:]
    reach = kernel.shape[0] // 2
    padded = x[None]
    for axis in (3, 2):  # mirrored by at most size - 1 pixels at a time: pictures may be tiny here
        need = reach
        while need:
            step = min(need, padded.shape[axis] - 1)
            if step == 0:
                step, mode = need, "replicate"
            else:
                mode = "reflect"
            pad = (step, step, 0, 0) if axis == 3 else (0, 0, step, step)
            padded = F.pad(padded, pad, mode=mode)
            need -= step
    size = [_fast_length(n) for n in padded.shape[-2:]]
    spectrum = torch.fft.rfft2(padded[0], s=size)
    spectrum *= torch.fft.rfft2(torch.from_numpy(kernel.astype(np.float32)), s=size)
    top = 2 * reach
    return torch.fft.irfft2(spectrum, s=size)[:, top : top + h, top : top + w]


def resize(
    x: torch.Tensor, size: tuple[int, int], mode: str, antialias: bool = False
) -> torch.Tensor:
    """`c h w` to `c *size`; without antialias by default, as both references do it."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    if mode == "area":
        return F.interpolate(x[None], size=size, mode="area")[0]
    return F.interpolate(x[None], size=size, mode=mode, align_corners=False, antialias=antialias)[0]


def _poisson(rng: np.random.Generator, mean: np.ndarray) -> np.ndarray:
    """Poisson counts, float32. Below 4 exact; above, the second-order Cornish-Fisher expansion,
    which has the right mean, variance and skewness and costs a normal draw (the exact one: ten
    times that)."""
    z = rng.standard_normal(mean.shape, dtype=np.float32)
    counts = np.rint(mean + np.sqrt(mean) * z + (z * z - 1) / 6)
    low = mean < 4
    if low.any():
        counts[low] = rng.poisson(mean[low])
    return np.maximum(counts, 0, out=counts)


def gaussian_noise(
    x: torch.Tensor, sigma: float, grey: bool, rng: np.random.Generator
) -> torch.Tensor:
    """Add normal noise of `sigma`/255 to `c h w`; not clamped."""
    shape = (1, *x.shape[1:]) if grey else tuple(x.shape)
    return x + torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) * (sigma / 255)


def poisson_noise(
    x: torch.Tensor, strength: float, grey: bool, rng: np.random.Generator
) -> torch.Tensor:
    """Add shot noise to `c h w` in [0,1]; the light level is the power of two that holds the
    picture's distinct values, as in Real-ESRGAN; not clamped."""
    clean = (x * 255).round().clamp(0, 255).to(torch.uint8)
    if grey:
        weights = torch.tensor([0.2989, 0.5870, 0.1140])[:, None, None]
        clean = (clean.float() * weights).sum(0, keepdim=True).round().to(torch.uint8)
    levels = int(np.count_nonzero(np.bincount(clean.numpy().ravel(), minlength=256)))
    light = float(2 ** math.ceil(math.log2(max(levels, 2))))
    base = clean.numpy().astype(np.float32) / 255
    return x + torch.from_numpy((_poisson(rng, base * light) / light - base) * np.float32(strength))


def _to_bytes(x: torch.Tensor) -> np.ndarray:
    """`c h w` float to `h w c` uint8."""
    y = (x * 255).round_().clamp_(0, 255).to(torch.uint8)
    return np.ascontiguousarray(y.permute(1, 2, 0).numpy())


def _to_float(pixels: np.ndarray) -> torch.Tensor:
    """`h w c` uint8 to `c h w` float32 in [0,1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().div_(255)


@functools.lru_cache(maxsize=1)
def codecs() -> dict[str, bool]:
    """Every codec the tables name and whether it works here (each one is tried once)."""
    names = {c.name for p in (REALESRGAN, APISR) for c in p.codecs}
    names |= {c.name for p in (REALESRGAN, APISR) for s in p.stages for c in s.codecs}
    found, missing = {}, {}
    flat = np.full((32, 32, 3), 128, np.uint8)
    for name in sorted(names):
        try:
            if name in ("webp", "avif") and not features.check(name):
                raise OSError("not built into Pillow")
            compress(flat, name, 30)
        except Exception as error:  # libraries fail in ways of their own
            missing.setdefault(str(error), []).append(name)
        found[name] = not any(name in group for group in missing.values())
    if missing:
        reasons = "; ".join(f"{', '.join(group)} ({why})" for why, group in missing.items())
        warnings.warn(
            f"codecs not available: {reasons}; their shares go to the others "
            "(the video codecs need PyAV)",
            stacklevel=3,
        )
    return found


def shares(table: tuple[Codec, ...]) -> dict[str, float]:
    """The probabilities a codec table really has on this machine; missing codecs are left out."""
    works = codecs()
    usable = {c.name: c.weight for c in table if works[c.name]}
    total = sum(usable.values())
    if not total:
        raise RuntimeError(
            f"none of the codecs {[c.name for c in table]} works: install Pillow with JPEG"
        )
    return {name: weight / total for name, weight in usable.items()}


def report() -> dict:
    """What a run's configuration should record: codecs found and the probabilities in force."""
    return {
        "codecs": codecs(),
        "realesrgan_last": shares(REALESRGAN.codecs),
        "apisr_first": shares(APISR.stages[0].codecs),
        "apisr_last": shares(APISR.codecs),
    }


def compress(
    pixels: np.ndarray, name: str, quality: int, method: int = 4, preset: str = "medium"
) -> np.ndarray:
    """`h w 3` uint8 through a codec and back. `quality` is the codec's own scale: 1-100 for JPEG,
    WebP and AVIF, qscale for MPEG-2 and MPEG-4, crf for H.264 and H.265."""
    if name in VIDEO_ENCODERS:
        return _compress_video(pixels, name, quality, preset)
    options = {
        "jpeg": {},
        "webp": {"method": method},
        "avif": {"speed": AVIF_SPEED, "max_threads": 1},
    }
    if name not in options:
        raise ValueError(f"unknown codec {name!r}: use {', '.join([*options, *VIDEO_ENCODERS])}")
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, name.upper(), quality=quality, **options[name])
    held.seek(0)
    with Image.open(held) as image:
        return np.asarray(image.convert("RGB"))


def _compress_video(pixels: np.ndarray, name: str, quality: int, preset: str) -> np.ndarray:
    """One intra frame in yuv420p; odd and very small sizes are padded and cut again."""
    import av

    h, w = pixels.shape[:2]
    below, right = max(h % 2, VIDEO_SMALLEST - h), max(w % 2, VIDEO_SMALLEST - w)
    padded = np.pad(pixels, ((0, below), (0, right), (0, 0)), mode="edge")
    encoder = av.CodecContext.create(VIDEO_ENCODERS[name], "w")
    encoder.width, encoder.height, encoder.pix_fmt = padded.shape[1], padded.shape[0], "yuv420p"
    encoder.time_base = Fraction(1, 25)
    encoder.thread_count = 1
    if name in ("h264", "h265"):
        encoder.options = {"crf": str(quality), "preset": preset}
        if name == "h265":
            encoder.options |= {"x265-params": "log-level=none:pools=none:frame-threads=1"}
    else:
        # the ffmpeg program sets -qscale on every frame, which PyAV cannot: leave no other choice
        # instead
        encoder.options = {"qmin": str(quality), "qmax": str(quality)}
    frame = av.VideoFrame.from_ndarray(padded, format="rgb24").reformat(format="yuv420p")
    frame.pts = 0
    packets = [*encoder.encode(frame), *encoder.encode(None)]
    decoder = av.CodecContext.create({"h265": "hevc", "mpeg2": "mpeg2video"}.get(name, name), "r")
    decoder.thread_count = 1
    frames = [f for packet in packets for f in decoder.decode(packet)]
    frames += decoder.decode(None)
    return frames[0].to_ndarray(format="rgb24")[:h, :w]


def _compressed(x: torch.Tensor, table: tuple[Codec, ...], sample: _Sample) -> torch.Tensor:
    name = sample.pick(tuple(shares(table).items()))
    codec = next(c for c in table if c.name == name)
    quality = int(sample.rng.integers(codec.quality[0], codec.quality[1] + 1))
    method, preset = 4, "medium"
    if name == "webp":
        method = int(sample.rng.integers(WEBP_METHODS[0], WEBP_METHODS[1] + 1))
    elif name in ("h264", "h265"):
        preset = sample.pick(VIDEO_PRESETS)
    sample.note(f"{name} {quality}")
    return _to_float(compress(_to_bytes(x), name, quality, method, preset))


def _randomly_resized(
    x: torch.Tensor, table: Resize, base: tuple[int, int], sample: _Sample
) -> torch.Tensor:
    way = sample.pick((("up", table.up), ("down", table.down), ("keep", table.keep)))
    low, high = table.factor
    factor = {"up": (1.0, high), "down": (low, 1.0), "keep": (1.0, 1.0)}[way]
    factor = sample.uniform(factor)
    mode = MODES[int(sample.rng.integers(len(MODES)))]
    sample.note(f"resize {factor:.2f} {mode}")
    return resize(x, (max(1, int(base[0] * factor)), max(1, int(base[1] * factor))), mode)


def _noised(x: torch.Tensor, table: Noise, sample: _Sample) -> torch.Tensor:
    if sample.chance(table.gaussian):
        sigma, grey = sample.uniform(table.sigma), sample.chance(table.grey)
        sample.note(f"gauss {sigma:.1f}{' grey' if grey else ''}")
        x = gaussian_noise(x, sigma, grey, sample.rng)
    else:
        strength, grey = sample.uniform(table.poisson), sample.chance(table.grey)
        sample.note(f"poisson {strength:.2f}{' grey' if grey else ''}")
        x = poisson_noise(x.clamp(0, 1), strength, grey, sample.rng)
    return x.clamp_(0, 1)


def _run(x: torch.Tensor, table: Pipeline, size: tuple[int, int], sample: _Sample) -> torch.Tensor:
    """`c h w` in [0,1] through the stages and the last step, to `c *size`."""
    base = tuple(x.shape[-2:])
    for stage in table.stages:
        place = stage.resize.places[int(sample.rng.integers(len(stage.resize.places)))]
        if place == "before blur":
            x = _randomly_resized(x, stage.resize, base, sample)
        if sample.chance(stage.blur):
            x = blur(x, draw_kernel(sample, stage.kernels))
        if place == "after blur":
            x = _randomly_resized(x, stage.resize, base, sample)
        x = _noised(x, stage.noise, sample)
        if place == "after noise":
            x = _randomly_resized(x, stage.resize, base, sample)
        if stage.codecs:
            x = _compressed(x, stage.codecs, sample)
        base = size  # the second stage counts from the low-resolution size

    mode = MODES[int(sample.rng.integers(len(MODES)))]
    if table.sinc is None:
        return _compressed(resize(x, size, mode), table.codecs, sample)
    first = sample.chance(0.5)
    if not first:
        x = _compressed(x, table.codecs, sample)
    x = resize(x, size, mode)
    if sample.chance(table.sinc):
        omega = sample.uniform((math.pi / 3, math.pi))
        sample.note(f"final sinc {omega:.2f}")
        x = blur(x, sinc_kernel(_side(sample, table.sides), omega))
    return _compressed(x, table.codecs, sample) if first else x


def _run_mild(x: torch.Tensor, table: Mild, size: tuple[int, int], sample: _Sample) -> torch.Tensor:
    sigma = sample.uniform(table.blur)
    if sigma > 0.2:  # below that the kernel is a single pixel
        x = blur(x, gaussian_kernel(2 * math.ceil(3 * sigma) + 1, sigma))
    mode = MODES[int(sample.rng.integers(len(MODES)))]
    x = resize(x, size, mode, antialias=mode != "area")
    sample.note(f"blur {sigma:.2f}, {mode}")
    if sample.chance(table.noise):
        sigma = sample.uniform(table.sigma)
        sample.note(f"gauss {sigma:.1f}")
        x = gaussian_noise(x, sigma, False, sample.rng)
    if sample.chance(table.compress):
        x = _compressed(x, table.codecs, sample)
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
    scale: int = 4,
    mix: str = "paper",
    trace: list[str] | None = None,
) -> np.ndarray:
    """The low-resolution picture of a crop.

    hr: `h w 3` uint8, h and w multiples of `scale`. Returns `h/scale w/scale 3` uint8. `kind` is
    one of KINDS; `mixed` draws it from MIXES[mix]. The same pixels and seed give the same result
    anywhere. `trace`, if given, is filled with the steps in words. ValueError for a wrong shape,
    kind or mix.
    """
    if hr.ndim != 3 or hr.shape[2] != 3 or hr.dtype != np.uint8:
        raise ValueError(
            f"a crop must be h w 3 in uint8, not {hr.shape} in {hr.dtype}: convert it to RGB"
        )
    h, w = hr.shape[:2]
    if h % scale or w % scale or not h or not w:
        raise ValueError(f"a crop of {h}x{w} does not divide by {scale}: use sides that do")
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: use one of {', '.join(KINDS)}")
    sample = _Sample(np.random.default_rng(seed), trace)
    if kind == "mixed":
        if mix not in MIXES:
            raise ValueError(f"unknown mix {mix!r}: use one of {', '.join(MIXES)}")
        kind = sample.pick(tuple(MIXES[mix].items()))
    sample.note(kind)
    size = (h // scale, w // scale)
    if kind == "clean":
        return np.asarray(Image.fromarray(hr).resize(size[::-1], Image.Resampling.BICUBIC))
    with _one_thread():
        x = _to_float(hr)
        if kind == "mild":
            return _to_bytes(_run_mild(x, MILD, size, sample))
        return _to_bytes(_run(x, REALESRGAN if kind == "realesrgan" else APISR, size, sample))


def sheet(
    crops: list[np.ndarray],
    *,
    kind: str = "mixed",
    mix: str = "paper",
    seed: int = 0,
    columns: int = 4,
) -> Image.Image:
    """Pairs of equal square crops, `side side 3` uint8, and their enlarged degraded copies, with
    the steps in words below; crop i has seed + i."""
    side = crops[0].shape[0]
    wide, high = 2 * side, side + 34
    columns = min(columns, len(crops))
    whole = Image.new("RGB", (columns * wide, -(-len(crops) // columns) * high), "white")
    pen = ImageDraw.Draw(whole)
    for i, hr in enumerate(crops):
        trace: list[str] = []
        low = Image.fromarray(degrade(hr, kind=kind, mix=mix, seed=seed + i, trace=trace))
        x, y, half = i % columns * wide, i // columns * high, (len(trace) + 1) // 2
        whole.paste(Image.fromarray(hr), (x, y))
        whole.paste(low.resize((side, side), Image.Resampling.NEAREST), (x + side, y))
        for line, words in enumerate((trace[:half], trace[half:])):
            text = ", ".join(words)[: wide // 6]
            pen.text((x + 2, y + side + 2 + 15 * line), text, fill="black")
    return whole


def main(argv: list[str] | None = None) -> int:
    from train import (
        data,
    )  # which imports this module: pictures are found and decoded as in training

    parser = argparse.ArgumentParser(
        prog="python -m train.degrade", description="Look at degradations."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("sheet", help="a contact sheet of crops and their degraded copies")
    p.add_argument("--data", type=Path, required=True, help="folder of pictures")
    p.add_argument("--out", type=Path, required=True, help="PNG to write")
    p.add_argument("--kind", choices=KINDS, default="mixed")
    p.add_argument("--mix", choices=tuple(MIXES), default="paper")
    p.add_argument("--count", type=int, default=16)
    p.add_argument("--crop", type=int, default=256)
    p.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.count < 1 or args.crop < 4 or args.crop % 4:
        parser.error("--count must be at least 1 and --crop a multiple of 4")
    try:
        pictures = data.Pictures(args.data, crop=args.crop, seed=args.seed)
        keys = data.Order(len(pictures), seed=args.seed)
        items = [pictures[key] for key, _ in zip(keys, range(args.count), strict=False)]
        pictures.name_bad()
        crops = [np.ascontiguousarray(item["hr"].permute(1, 2, 0).numpy()) for item in items]
        whole = sheet(crops, kind=args.kind, mix=args.mix, seed=args.seed)
        part = args.out.with_name(f".{args.out.name}.part")
        whole.save(part, "PNG")
        part.replace(args.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(crops)} pairs, {args.kind}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

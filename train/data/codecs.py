"""Lossy codecs of the degradations: still pictures through Pillow, video codecs through PyAV.

Codecs that don't work on a machine are named once and their shares go to the others.
"""

from __future__ import annotations

import functools
import io
import warnings
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from PIL import Image, features

from train.data.draws import Draws


@dataclass(frozen=True, kw_only=True)
class Codec:
    """A lossy codec, its weight, and the range of its quality, qscale or crf."""

    name: str
    weight: float
    quality: tuple[int, int]


PICTURE_CODECS = ("jpeg", "webp", "avif")
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


def to_bytes(x: torch.Tensor) -> np.ndarray:
    """`c h w` float to `h w c` uint8."""
    y = (x * 255).round_().clamp_(0, 255).to(torch.uint8)
    return np.ascontiguousarray(y.permute(1, 2, 0).numpy())


def to_float(pixels: np.ndarray) -> torch.Tensor:
    """`h w c` uint8 to `c h w` float32 in [0,1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().div_(255)


@functools.lru_cache(maxsize=1)
def available() -> dict[str, bool]:
    """Every codec there is and whether it works on this machine (each one is tried once)."""
    found, missing = {}, {}
    flat = np.full((32, 32, 3), 128, np.uint8)
    for name in sorted((*PICTURE_CODECS, *VIDEO_ENCODERS)):
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
    works = available()
    usable = {c.name: c.weight for c in table if works[c.name]}
    total = sum(usable.values())
    if not total:
        raise RuntimeError(
            f"none of the codecs {[c.name for c in table]} works: install Pillow with JPEG"
        )
    return {name: weight / total for name, weight in usable.items()}


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
        raise ValueError(
            f"unknown codec {name!r}: use {', '.join([*PICTURE_CODECS, *VIDEO_ENCODERS])}"
        )
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


def compressed(x: torch.Tensor, table: tuple[Codec, ...], draws: Draws) -> torch.Tensor:
    """`c h w` float in [0,1] through one codec of a table."""
    name = draws.pick(tuple(shares(table).items()))
    codec = next(c for c in table if c.name == name)
    quality = int(draws.rng.integers(codec.quality[0], codec.quality[1] + 1))
    method, preset = 4, "medium"
    if name == "webp":
        method = int(draws.rng.integers(WEBP_METHODS[0], WEBP_METHODS[1] + 1))
    elif name in ("h264", "h265"):
        preset = draws.pick(VIDEO_PRESETS)
    draws.note(f"{name} {quality}")
    return to_float(compress(to_bytes(x), name, quality, method, preset))

"""A frozen teacher: the "compact" SRVGG network of Real-ESRGAN, read from ncnn .param/.bin files.

Layout: convolution 3x3 and PReLU in turn, a last convolution to 3 s^2 channels, pixel shuffle by s,
and the input enlarged by nearest neighbour added (Real-ESRGAN, SRVGGNetCompact).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

_MAGIC = "7767517"
_HALF = 0x01306B47  # tag of float16 weights; 0 stands for float32


class TeacherError(ValueError):
    """The teacher's files cannot be used."""


class Teacher(nn.Module):
    """`b 3 h w` in [0,1] to `b 3 sh sw` in about [0,1] (not clamped), s = `scale`."""

    def __init__(self, convolutions: list[nn.Conv2d], slopes: list[torch.Tensor], scale: int):
        super().__init__()
        self.convolutions = nn.ModuleList(convolutions)
        self.slopes = nn.ParameterList(nn.Parameter(s) for s in slopes)
        self.scale = scale
        self.digest = ""  # of the weights' file, for records
        self.requires_grad_(False)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for convolution, slope in zip(self.convolutions, self.slopes, strict=False):
            y = F.prelu(convolution(y), slope)
        y = F.pixel_shuffle(self.convolutions[-1](y), self.scale)
        return y + F.interpolate(x, scale_factor=float(self.scale), mode="nearest")

    @torch.inference_mode()
    def restore(self, pixels: np.ndarray) -> np.ndarray:
        """`b h w 3` uint8 to `b sh sw 3` uint8, in the dtype and on the device of the weights."""
        weight = self.convolutions[0].weight
        x = torch.tensor(pixels).to(weight.device).permute(0, 3, 1, 2)
        x = (x.float() / 255).to(weight.dtype, memory_format=torch.channels_last)
        y = self(x).float().mul_(255).round_().clamp_(0, 255).to(torch.uint8)
        return np.ascontiguousarray(y.permute(0, 2, 3, 1).cpu().numpy())


class _Reader:
    """Takes arrays off an ncnn .bin file in order; each starts at a multiple of 4 bytes."""

    def __init__(self, path: Path):
        self.path, self.data, self.at = path, path.read_bytes(), 0

    def array(self, dtype: str, count: int) -> torch.Tensor:
        size = np.dtype(dtype).itemsize * count
        if self.at + size > len(self.data):
            raise TeacherError(
                f"{self.path.name} ends too early: it does not belong to the .param file"
            )
        values = np.frombuffer(self.data, dtype, count, self.at).astype(np.float32)
        self.at += -(-size // 4) * 4
        return torch.from_numpy(values)

    def weights(self, count: int) -> torch.Tensor:
        tag = int.from_bytes(self.data[self.at : self.at + 4], "little")
        if tag not in (0, _HALF):
            raise TeacherError(
                f"{self.path.name} stores weights as {tag:#x}: only float32 and float16 can be read"
            )
        self.at += 4
        return self.array("<f2" if tag else "<f4", count)


def load(param: str | Path, weights: str | Path) -> Teacher:
    """Read a compact network. TeacherError for another graph or files that do not match."""
    param, weights = Path(param), Path(weights)
    try:
        lines = [line.split() for line in param.read_text().splitlines() if line.strip()]
        reader = _Reader(weights)
    except (OSError, UnicodeDecodeError) as error:
        raise TeacherError(f"cannot read the teacher: {error}") from error
    if not lines or lines[0] != [_MAGIC]:
        raise TeacherError(f"{param.name} is not an ncnn text graph: give the .param file first")
    convolutions: list[nn.Conv2d] = []
    slopes: list[torch.Tensor] = []
    tail: list[str] = []
    scale = 0
    for words in lines[2:]:
        layer, names = words[0], int(words[2]) + int(words[3])
        option = {k: float(v) for k, v in (w.split("=", 1) for w in words[4 + names :])}
        if layer == "Convolution" and not tail and len(convolutions) == len(slopes):
            width, side, total = int(option["0"]), int(option["1"]), int(option["6"])
            plain = side == 3 and option.get("4") == 1 and option.get("5") == 1
            plain &= option.get("3", 1) == 1 and option.get("2", 1) == 1
            if not plain or option.get("8") or option.get("9") or option.get("11", side) != side:
                raise TeacherError(f"{words[1]} is not a plain 3x3 convolution with bias")
            convolution = nn.Conv2d(total // (9 * width), width, 3, padding=1)
            convolution.weight.data = reader.weights(total).reshape(width, -1, 3, 3)
            convolution.bias.data = reader.array("<f4", width)
            convolutions.append(convolution)
        elif layer == "PReLU" and not tail and len(convolutions) == len(slopes) + 1:
            slopes.append(reader.array("<f4", int(option["0"])))
        elif layer == "PixelShuffle":
            scale = int(option["0"])
            tail.append(layer)
        elif layer == "Interp" and option.get("0") == 1 and option["1"] == option["2"] == scale:
            tail.append(layer)  # nearest neighbour
        elif layer == "BinaryOp" and not option.get("0"):
            tail.append(layer)  # addition
        elif layer not in ("Input", "Split"):
            raise TeacherError(f"layer {words[1]} ({layer}) is not part of a compact SRVGG network")
    whole = tail == ["PixelShuffle", "Interp", "BinaryOp"] and len(convolutions) == len(slopes) + 1
    if not whole or convolutions[-1].out_channels != 3 * scale**2:
        raise TeacherError(
            f"{param.name} is not a compact SRVGG network: its end was not understood"
        )
    if reader.at != len(reader.data):
        raise TeacherError(f"{weights.name} has {len(reader.data) - reader.at} bytes too many")
    teacher = Teacher(convolutions, slopes, scale)
    teacher.digest = hashlib.sha256(reader.data).hexdigest()
    return teacher

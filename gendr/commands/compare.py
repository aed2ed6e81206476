"""`gendr compare`: one picture that shows input and result side by side, with the same detail enlarged.

Upper row: both as a whole. Lower row: the square of each that the frame above marks. Both are
resized by the same bicubic interpolation, so that the input is shown at its best.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .. import devices, pictures
from ..plan import NotEnoughMemory, gib

PAPER, INK, FRAME = (24, 24, 27), (235, 235, 235), (255, 196, 0)
WHOLE, SMALLEST = 640, 320  # pixels: the longest side of a whole, the smallest detail
MARGIN, LABEL = 16, 28
METHOD = Image.Resampling.BICUBIC
# Bytes per pixel of a picture while it is searched for detail, or made ready to be drawn.
EACH = 48


def run(
    source: Path,
    result: Path,
    output: Path,
    crop: tuple[int, int, int] | None = None,
    overwrite: bool = False,
    **reading: Any,
) -> dict:
    """Write the comparison of `source` and `result` to `output`; `crop` is (x, y, side) in the source.

    reading: options of `pictures.read`.

    Raises PictureError for what cannot be read or written, ValueError for a crop outside the picture
    or an output that would replace one of the two.
    """
    if output.exists() and any(output.samefile(p) for p in (source, result) if p.exists()):
        raise ValueError(f"the comparison would replace {output}; choose another --output")
    expect_memory(source, result)
    before, after = (on_paper(pictures.read(path, **reading).pixels) for path in (source, result))
    height, width = before.shape[-2:]
    # A detail of half a panel is shown twice as large as it is in the result.
    wide = after.shape[-1]
    x, y, side = crop or busiest(before, min(wide, WHOLE) // 2 * width // wide)
    if side < 1 or x < 0 or y < 0 or x + side > width or y + side > height:
        raise ValueError(
            f"the crop {x},{y},{side} (x, y, side) is not inside the input of {width}x{height} pixels"
        )
    sheet = draw(before, after, (x, y, side))
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(1, sheet.height, sheet.width, 3).movedim(-1, 1).float() / 255
    output.parent.mkdir(parents=True, exist_ok=True)
    pictures.write(output, pixels, None, overwrite=overwrite)
    return {"output": str(output), "crop": [x, y, side], "size": [sheet.height, sheet.width]}


def expect_memory(*paths: Path) -> None:
    """`NotEnoughMemory` where these pictures, as their headers measure them, cannot be held."""
    needed = EACH * sum(height * width for height, width in map(pictures.measure, paths))
    if needed > (free := devices.free_bytes(torch.device("cpu"))):
        names = " and ".join(path.name for path in paths)
        raise NotEnoughMemory(
            f"{names} take about {gib(needed)} GiB of main memory, and {gib(free)} GiB are free: "
            "compare smaller pictures, or close other programs"
        )


def on_paper(pixels: Tensor) -> Tensor:
    """1 c h w with c from 1 to 4 -> 1 3 h w: grey as colour, transparency over mid grey."""
    if pixels.shape[1] in (2, 4):
        colour, alpha = pixels[:, :-1], pixels[:, -1:]
        pixels = colour * alpha + 0.5 * (1 - alpha)
    return pixels.expand(-1, 3, -1, -1)


def busiest(pixels: Tensor, side: int) -> tuple[int, int, int]:
    """The square of about this side with the strongest edges: (x, y, side)."""
    side = min(max(side, 16), *pixels.shape[-2:])
    grey = F.pad(pixels.mean(1, keepdim=True), (0, 1, 0, 1), mode="replicate")
    edges = (grey[..., :-1, 1:] - grey[..., :-1, :-1]).abs()
    edges = edges + (grey[..., 1:, :-1] - grey[..., :-1, :-1]).abs()
    # The square root keeps one hard edge from outweighing a field of texture.
    score = F.avg_pool2d(edges.sqrt(), side, stride=max(side // 8, 1))
    best = int(score.argmax())
    stride, columns = max(side // 8, 1), score.shape[-1]
    return best % columns * stride, best // columns * stride, side


def draw(before: Tensor, after: Tensor, crop: tuple[int, int, int]) -> Image.Image:
    """The sheet of four panels and their labels."""
    first, second = image(before), image(after)
    x, y, side = crop
    fx, fy = second.width / first.width, second.height / first.height
    shrink = min(1.0, WHOLE / max(second.size))
    whole = tuple(max(1, round(length * shrink)) for length in second.size)
    panel = max(whole[0], SMALLEST)
    lower = MARGIN + LABEL + whole[1] + MARGIN
    sheet = Image.new("RGB", (2 * panel + 3 * MARGIN, lower + LABEL + panel + MARGIN), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    panels = (
        ("input", first, (x, y, x + side, y + side)),
        ("result", second, (x * fx, y * fy, (x + side) * fx, (y + side) * fy)),
    )
    for column, (name, picture, box) in enumerate(panels):
        left = MARGIN + column * (panel + MARGIN)
        pen.text((left, MARGIN), f"{name}  {picture.width} x {picture.height}", INK, font)
        top, inset = MARGIN + LABEL, left + (panel - whole[0]) // 2
        sheet.paste(picture.resize(whole, METHOD), (inset, top))
        kx, ky = whole[0] / picture.width, whole[1] / picture.height
        corner = inset + box[0] * kx, top + box[1] * ky
        across, down = max((box[2] - box[0]) * kx, 3), max((box[3] - box[1]) * ky, 3)
        frame(pen, (*corner, corner[0] + across - 1, corner[1] + down - 1), 2)
        pen.text((left, lower), f"{name}, the marked part", INK, font)
        top = lower + LABEL
        sheet.paste(picture.resize((panel, panel), METHOD, box=box), (left, top))
        frame(pen, (left - 1, top - 1, left + panel, top + panel), 1)
    return sheet


def frame(pen: ImageDraw.ImageDraw, box: tuple[float, ...], width: int) -> None:
    pen.rectangle([round(edge) for edge in box], outline=FRAME, width=width)


def image(pixels: Tensor) -> Image.Image:
    array = (pixels[0].clamp(0, 1) * 255 + 0.5).to(torch.uint8).movedim(0, -1)
    return Image.fromarray(array.contiguous().numpy(), "RGB")

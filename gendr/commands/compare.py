"""`gendr compare`: one picture that shows input and result side by side, with the same detail enlarged.

Upper row: both as a whole. Lower row: the square of each that the frame above marks. The input is
enlarged by bicubic interpolation in the whole, and left in its own pixels in the detail.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .. import pictures

PAPER, INK, FRAME = (24, 24, 27), (235, 235, 235), (255, 196, 0)
WHOLE, MARGIN = 640, 16  # pixels: the longest side of a panel, the space around it


def run(
    source: Path,
    result: Path,
    output: Path,
    crop: tuple[int, int, int] | None = None,
    overwrite: bool = False,
) -> dict:
    """Write the comparison of `source` and `result` to `output`; `crop` is (x, y, side) in the source.

    Raises PictureError for what cannot be read or written, ValueError for a crop outside the picture
    or an output that would replace one of the two.
    """
    if output.exists() and any(output.samefile(p) for p in (source, result) if p.exists()):
        raise ValueError(f"the comparison would replace {output}; choose another --output")
    before, after = on_paper(pictures.read(source).pixels), on_paper(pictures.read(result).pixels)
    height, width = before.shape[-2:]
    x, y, side = crop or busiest(before)
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


def on_paper(pixels: Tensor) -> Tensor:
    """1 c h w with c from 1 to 4 -> 1 3 h w: grey as colour, transparency over mid grey."""
    if pixels.shape[1] in (2, 4):
        colour, alpha = pixels[:, :-1], pixels[:, -1:]
        pixels = colour * alpha + 0.5 * (1 - alpha)
    return pixels.expand(-1, 3, -1, -1)


def busiest(pixels: Tensor) -> tuple[int, int, int]:
    """The square of a third of the short side with the strongest edges: (x, y, side)."""
    height, width = pixels.shape[-2:]
    side = max(min(height, width) // 3, min(height, width, 24))
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
    (height, width), (tall, wide) = before.shape[-2:], after.shape[-2:]
    x, y, side = crop
    shrink = min(1.0, WHOLE / max(tall, wide))
    whole = max(1, round(wide * shrink)), max(1, round(tall * shrink))
    panel = max(whole[0], 320)
    first, second = image(before), image(after)
    factors = wide / width, tall / height
    there = (
        *(round(x * factors[0]), round(y * factors[1])),
        *(round((x + side) * factors[0]), round((y + side) * factors[1])),
    )
    there = there[0], there[1], max(there[2], there[0] + 1), max(there[3], there[1] + 1)
    # Whole pixels stay whole where the detail is enlarged, and both details have the same size.
    detail = panel, panel
    font = ImageFont.load_default(16)
    label = 30
    sheet = Image.new(
        "RGB",
        (2 * panel + 3 * MARGIN, whole[1] + detail[1] + 2 * label + 3 * MARGIN),
        PAPER,
    )
    pen = ImageDraw.Draw(sheet)
    lower = MARGIN + label + whole[1] + MARGIN
    panels = (
        (first, (x, y, x + side, y + side), Image.Resampling.NEAREST, f"input  {width} x {height}"),
        (second, there, Image.Resampling.LANCZOS, f"GenDR  {wide} x {tall}"),
    )
    for column, (picture, box, method, text) in enumerate(panels):
        left = MARGIN + column * (panel + MARGIN)
        inset = left + (panel - whole[0]) // 2
        top = MARGIN + label
        pen.text((left, MARGIN + 4), text, INK, font)
        shape = picture.resize(whole, Image.Resampling.BICUBIC)
        sheet.paste(shape, (inset, top))
        kx, ky = whole[0] / picture.width, whole[1] / picture.height
        corners = [box[0] * kx, box[1] * ky, box[2] * kx - 1, box[3] * ky - 1]
        corners[2:] = max(corners[2], corners[0] + 2), max(corners[3], corners[1] + 2)
        marks = [c + (inset, top)[i % 2] for i, c in enumerate(corners)]
        pen.rectangle(marks, outline=FRAME, width=2)
        pen.text((left, lower + 4), f"{text.split()[0]}, detail", INK, font)
        sheet.paste(picture.resize(detail, method, box=box), (left, lower + label))
        pen.rectangle(
            (left - 1, lower + label - 1, left + panel, lower + label + panel), outline=FRAME
        )
    return sheet


def image(pixels: Tensor) -> Image.Image:
    array = (pixels[0].clamp(0, 1) * 255 + 0.5).to(torch.uint8).movedim(0, -1)
    return Image.fromarray(array.contiguous().numpy(), "RGB")

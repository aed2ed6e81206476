"""Makes the pictures that show results anew, from the sample by the embedded model: after its weights change.

    python assets/illustrations.py

README's demonstration (`assets/demo.jpg`, the sheet that `gendr compare` makes) and the thumbnails of
the templates in `workflows/`, 400 px a side. Look at them before they are committed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import gendr  # noqa: E402
from gendr import cli  # noqa: E402

SAMPLE, SIDE, QUALITY = ROOT / "assets" / "sample.png", 400, 88
GROUND, LINE, DARK = (22, 48, 76), (255, 181, 64), (10, 18, 28)
BICUBIC, NEAREST, LANCZOS = (
    getattr(Image.Resampling, name) for name in ("BICUBIC", "NEAREST", "LANCZOS")
)
Box = tuple[float, float, float, float]


class Sample:
    """The sample four times larger in three ways. Boxes are in shares of the picture's width."""

    def __init__(self) -> None:
        self.input = Image.open(SAMPLE).convert("RGB")
        pixels = torch.from_numpy(np.asarray(self.input).copy()).movedim(-1, 0)[None] / 255
        result = gendr.load(device="cpu", dtype="fp32").restore(pixels, 4)
        eight_bit = (result[0].clamp(0, 1) * 255).round().byte().movedim(0, -1)
        self.result = Image.fromarray(eight_bit.numpy())
        self.pixels = self.input.resize(self.result.size, NEAREST)
        self.smooth = self.input.resize(self.result.size, BICUBIC)

    def box(self, shares: Box) -> tuple[int, ...]:
        return tuple(round(share * self.result.width) for share in shares)

    def part(self, image: Image.Image, shares: Box, side: int = SIDE) -> Image.Image:
        return image.crop(self.box(shares)).resize((side, side), LANCZOS)

    def split(self, shares: Box, side: int = SIDE) -> Image.Image:
        """Input left, result right, a white line between."""
        sheet, half = self.part(self.pixels, shares, side), side // 2
        sheet.paste(self.part(self.result, shares, side).crop((half, 0, side, side)), (half, 0))
        ImageDraw.Draw(sheet).rectangle((half - 1, 0, half + 1, side), fill="white")
        return sheet


def dashes(pen: ImageDraw.ImageDraw, start: tuple[int, int], end: tuple[int, int]) -> None:
    """A dashed line, upright or level."""
    length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
    step = [(b > a) for a, b in zip(start, end, strict=True)]
    for at in range(0, length, 12):
        a = tuple(s + at * d for s, d in zip(start, step, strict=True))
        b = tuple(s + min(at + 7, length) * d for s, d in zip(start, step, strict=True))
        pen.line((*a, *b), fill="white", width=2)


def tiles(sample: Sample) -> Image.Image:
    """The result, its tiles, and the map of what was invented."""
    whole = (0, 0, 0.75, 0.75)
    sheet = sample.part(sample.result, whole)
    pen = ImageDraw.Draw(sheet)
    for at in (134, 268):
        dashes(pen, (at, 0), (at, SIDE))
        dashes(pen, (0, at), (SIDE, at))
    apart = np.abs(
        np.asarray(sample.result, np.float32) - np.asarray(sample.smooth, np.float32)
    ).mean(-1)
    difference = Image.fromarray((apart * 4).clip(0, 255).astype(np.uint8)).convert("RGB")
    sheet.paste(sample.part(difference, whole, 122), (270, 270))
    pen.rectangle((268, 268, 394, 394), outline="white", width=3)
    return sheet


def words(sample: Sample) -> Image.Image:
    """A prompt, a picture, the larger picture."""
    sheet = Image.new("RGB", (SIDE, SIDE), GROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(22)
    pen.rounded_rectangle((17, 17, 384, 92), 12, fill=DARK, outline=LINE, width=2)
    pen.multiline_text((32, 26), "rocky mountains above\na lake, morning light", "white", font)
    whole = (0, 0, 0.75, 0.75)
    sheet.paste(sample.part(sample.pixels, whole, 96), (16, 220))
    sheet.paste(sample.part(sample.result, whole, 216), (168, 160))
    for line, head in (
        ((65, 98, 65, 204), [(65, 217), (55, 200), (75, 200)]),
        ((118, 269, 150, 269), [(163, 269), (146, 259), (146, 279)]),
    ):
        pen.line(line, fill=LINE, width=4)
        pen.polygon(head, fill=LINE)
    return sheet


def several(sample: Sample) -> Image.Image:
    sheet = Image.new("RGB", (SIDE, SIDE), GROUND)
    places = ((0.06, 0.08), (0.84, 0.1), (0.02, 0.5), (0.62, 0.56))
    for n, (x, y) in enumerate(places):
        shares = (x, y, x + 0.15, y + 0.15)
        sheet.paste(sample.split(shares, 191), (6 + n % 2 * 197, 6 + n // 2 * 197))
    return sheet


def masked(sample: Sample) -> Image.Image:
    """Restored inside an ellipse alone."""
    ellipse, shown = (0.6, 0.1, 0.875, 0.325), (0.4875, 0.0, 0.9875, 0.5)
    mask = Image.new("L", sample.result.size, 0)
    ImageDraw.Draw(mask).ellipse(sample.box(ellipse), fill=255)
    sheet = sample.part(Image.composite(sample.result, sample.pixels, mask), shown)
    scale = SIDE / (shown[2] - shown[0])
    outline = [(v - shown[n % 2]) * scale for n, v in enumerate(ellipse)]
    for angle in range(0, 360, 12):
        ImageDraw.Draw(sheet).arc(outline, angle, angle + 7, fill="white", width=3)
    return sheet


def compared(sample: Sample) -> Image.Image:
    """A slider between input and result."""
    sheet = sample.split((0.6, 0.05, 0.9, 0.35))
    pen = ImageDraw.Draw(sheet)
    pen.ellipse((182, 182, 218, 218), fill="white")
    for side in (-1, 1):
        tip, back = 200 + 12 * side, 200 + 3 * side
        pen.polygon([(tip, 200), (back, 193), (back, 207)], fill=GROUND)
    return sheet


def film(sample: Sample) -> Image.Image:
    sheet = Image.new("RGB", (SIDE, SIDE), GROUND)
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((0, 70, SIDE, 330), fill=DARK)
    for x in range(8, SIDE, 31):
        for y in (80, 306):
            pen.rounded_rectangle((x, y, x + 16, y + 14), 3, fill=GROUND)
    for n in range(2):
        left = 0.075 + 0.035 * n
        sheet.paste(sample.split((left, 0.425, left + 0.3, 0.725), 190), (7 + 196 * n, 105))
    return sheet


def demonstration() -> None:
    """The sheet that README shows."""
    with tempfile.TemporaryDirectory() as folder:
        result, sheet = (str(Path(folder) / name) for name in ("result.png", "sheet.png"))
        for words_ in (
            ["upscale", str(SAMPLE), "-o", result, "--scale", "4"],
            ["compare", str(SAMPLE), result, "-o", sheet],
        ):
            if cli.main(words_):
                sys.exit(f"gendr {' '.join(words_)} failed")
        Image.open(sheet).convert("RGB").save(ROOT / "assets" / "demo.jpg", quality=QUALITY)


def main() -> None:
    sample = Sample()
    made = {
        "1 Upscale a picture": sample.split((0.06, 0.12, 0.36, 0.42)),
        "2 Large picture in tiles": tiles(sample),
        "3 Text to image then GenDR": words(sample),
        "4 Several pictures": several(sample),
        "5 Only a part of a picture": masked(sample),
        "6 Before and after": compared(sample),
        "7 Video": film(sample),
    }
    for name, image in made.items():
        image.save(ROOT / "workflows" / f"{name}.jpg", quality=QUALITY)
    demonstration()


if __name__ == "__main__":
    main()

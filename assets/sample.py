"""Renders the sample picture, so that it belongs to the project: hills over a lake, then damaged.

    python assets/sample.py assets/sample.png

A height field of fractal noise is seen from above its shore, column by column, with sun, haze,
trees and water; the result is reduced, blurred a little, gets noise and JPEG, as pictures from the
net have. numpy and Pillow only; the same picture every time.
"""

from __future__ import annotations

import io
import sys

import numpy as np
from PIL import Image, ImageFilter

WIDTH, HEIGHT = 1280, 960
SMALL = (256, 192)


def noise(rng: np.random.Generator, size: int, octaves: int, roughness: float) -> np.ndarray:
    """Fractal noise that repeats, size x size, about 0..1."""
    total, amplitude = np.zeros((size, size)), 1.0
    for octave in range(octaves):
        n = 2 ** (octave + 2)
        grid = Image.fromarray(rng.random((n, n)).astype(np.float32))
        tiled = Image.fromarray(np.tile(np.asarray(grid), (3, 3)))
        part = np.asarray(tiled.resize((3 * size, 3 * size), Image.Resampling.BICUBIC))
        total += amplitude * part[size : 2 * size, size : 2 * size]
        amplitude *= roughness
    total -= total.min()
    return total / total.max()


def landscape(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Heights and colours of the ground, 1024 x 1024."""
    size = 1024
    height = noise(rng, size, 8, 0.5)
    ridge = 1 - np.abs(2 * noise(rng, size, 7, 0.55) - 1)
    height = 0.55 * height + 0.45 * ridge**2 * height * 1.6
    away = np.linspace(0, 1, size)[:, None]
    height = height * (0.25 + 1.1 * away)
    dy, dx = np.gradient(height * 260)
    light = np.clip((1 + 0.9 * dx - 0.5 * dy) / np.sqrt(1 + dx**2 + dy**2) / 1.25, 0.08, 1.2)
    slope = np.sqrt(dx**2 + dy**2)
    fine = noise(rng, size, 8, 0.8)
    grass = np.array([0.36, 0.42, 0.16]) * (0.6 + 0.8 * fine[..., None])
    rock = np.array([0.50, 0.44, 0.39]) * (0.5 + fine[..., None])
    snow = np.array([0.95, 0.97, 1.0]) * (0.85 + 0.2 * fine[..., None])
    to_rock = np.clip((slope - 0.55) * 2.5 + (fine - 0.5), 0, 1)[..., None]
    to_snow = np.clip((height - 0.62 + 0.25 * (fine - 0.5)) * 9 - 0.6 * slope, 0, 1)[..., None]
    colour = grass * (1 - to_rock) + rock * to_rock
    colour = colour * (1 - to_snow) + snow * to_snow
    warm = np.array([1.12, 0.98, 0.82])
    return height, np.clip(colour * light[..., None] * warm, 0, 1)


def trees(rng: np.random.Generator, height: np.ndarray, colour: np.ndarray) -> None:
    """Conifers: dots of dark green that stand above the low ground."""
    size = height.shape[0]
    where = noise(rng, size, 6, 0.7)
    for _ in range(16000):
        y, x = rng.integers(0, size, 2)
        if where[y, x] < 0.52 or not 0.2 < height[y, x] < 0.5:
            continue
        tall = rng.uniform(0.008, 0.02)
        height[y, x] += tall
        colour[y, x] = np.array([0.10, 0.20, 0.09]) * rng.uniform(0.6, 1.5)
        if x + 1 < size:
            height[y, x + 1] += 0.6 * tall
            colour[y, x + 1] = colour[y, x] * 0.6


def sky(rng: np.random.Generator) -> np.ndarray:
    """Evening sky with clouds."""
    rows = np.linspace(0, 1, HEIGHT)[:, None, None] * 1.9
    top, bottom = np.array([0.20, 0.36, 0.66]), np.array([0.98, 0.76, 0.52])
    blend = np.clip(rows, 0, 1) ** 1.3
    picture = np.broadcast_to(top * (1 - blend) + bottom * blend, (HEIGHT, WIDTH, 3)).copy()
    cloud = Image.fromarray(noise(rng, 1024, 8, 0.55).astype(np.float32))
    cloud = np.asarray(cloud.resize((WIDTH * 2, HEIGHT), Image.Resampling.BICUBIC))[:, :WIDTH]
    cover = np.clip((cloud - 0.52) * 4, 0, 1)[..., None] * np.clip(1.2 - rows, 0, 1)
    return picture * (1 - cover) + np.array([1.0, 0.93, 0.87]) * cover


def render(seed: int) -> np.ndarray:
    """The clean picture, HEIGHT x WIDTH x 3 in 0..1."""
    rng = np.random.default_rng(seed)
    height, colour = landscape(rng)
    trees(rng, height, colour)
    picture = sky(rng)
    horizon, eye, water = HEIGHT * 0.40, 0.50, 0.20
    ripple = noise(rng, 1024, 9, 0.75)
    lowest = np.full(WIDTH, HEIGHT)
    columns = np.arange(WIDTH)
    size = height.shape[0]
    for distance in np.geomspace(0.06, 1.9, 2200):
        angle = (columns / WIDTH - 0.5) * 1.05
        x = ((0.42 + distance * angle) * size).astype(int) % size
        y = np.clip(((distance / 1.9) * size).astype(int), 0, size - 1) * np.ones(WIDTH, int)
        ground = height[y, x]
        wet = ground < water
        level = np.maximum(ground, water)
        rows = np.clip(horizon + (eye - level) / distance * 420, 0, HEIGHT).astype(int)
        haze = 1 - np.exp(-((distance / 1.5) ** 2) * 1.1)
        shade = colour[y, x].copy()
        glint = (ripple[(y * 3) % size, (x // 2) % size] - 0.5)[:, None]
        lake = np.array([0.30, 0.42, 0.52]) + 0.5 * glint * np.array([1.0, 0.85, 0.6])
        shade[wet] = lake[wet]
        shade = shade * (1 - haze) + np.array([0.80, 0.72, 0.68]) * haze
        for column in np.nonzero(rows < lowest)[0]:
            picture[rows[column] : lowest[column], column] = shade[column]
        lowest = np.minimum(lowest, rows)
    grain = np.asarray(
        Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8)).filter(
            ImageFilter.UnsharpMask(1.2, 60, 0)
        )
    )
    return grain / 255.0


def damage(picture: np.ndarray, seed: int) -> Image.Image:
    """What a small picture from the net looks like."""
    image = Image.fromarray((picture * 255 + 0.5).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(2.2)).resize(SMALL, Image.Resampling.BICUBIC)
    rng = np.random.default_rng(seed)
    values = np.asarray(image).astype(float) + rng.normal(0, 2.5, (*SMALL[::-1], 3))
    image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=62)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


if __name__ == "__main__":
    clean = render(11)
    if len(sys.argv) > 2:
        Image.fromarray((clean * 255).astype(np.uint8)).save(sys.argv[2])
    damage(clean, 5).save(sys.argv[1], optimize=True)

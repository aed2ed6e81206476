"""How damaged a picture is, measured on the picture itself: noise, compression blocks, blur.

Pure functions in float32. A picture is 1 c h w in [0, 1], from 1x1 up, grey or RGB, without its
alpha; noise and block steps are in 8-bit levels, blur in pixels of the picture. Every measure reads
the least damaged places that it finds, so that texture is not taken for noise, nor a blurred
background for a blurred picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 255.0
# ITU-R BT.601.
LUMA = (0.299, 0.587, 0.114)

# Noise is read in windows of this many pixels, this far apart.
WINDOW, STEP = 8, 4
# The mean absolute response of Immerkaer's mask to white noise of deviation 1.
IMMERKAER = 6 * math.sqrt(2 / math.pi)
# Share of quieter windows below the one that tells a picture's noise, and how much lower than the
# true deviation that one reads, in white noise.
QUIET, QUIET_READS = 0.1, 0.86
# Windows around each, per side, among which the quietest bounds the noise there; what it reads.
AROUND, AROUND_READS = 7, 0.75
# Windows around each over which the map of noise is averaged, per side.
SMOOTH = 5

# JPEG's blocks; steps higher than this many levels are drawn, not left by compression.
BLOCK, HIGHEST_STEP = 8, 12.0
# Deviations by which the grid must stand out from the other seven phases.
CERTAIN = 2.0

# Deviation of the Gaussian that a picture is blurred by once more, in pixels.
REBLUR = 1.0
# The share of pixels looked for edges, the gradient in levels that one has, how many are needed,
# and the share of sharper ones below the one that tells a picture's blur.
EDGES, EDGE_GRADIENT, FEWEST_EDGES, SHARP = 0.1, 4.0, 20, 0.25

# Larger pictures are read in this many crops of this many pixels, evenly spread.
CROPS, CROP = 4, 512

# Below these, nothing is said of noise (levels), steps (levels) and blur (pixels).
NOTED_NOISE, NOTED_STEP, NOTED_BLUR = 1.5, 0.25, 0.7


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What was found in a picture.

    noise: standard deviation of white noise, in levels of 255, mean over channels.
    blocks: height of the steps along an 8x8 grid, in levels; 0 without a grid.
    blur: deviation of a Gaussian that would make a sharp picture's edges like these, in pixels.
    """

    noise: float = 0.0
    blocks: float = 0.0
    blur: float = 0.0

    def __str__(self) -> str:
        found = []
        if self.noise >= NOTED_NOISE:
            found.append(f"noise of about {self.noise:.0f} levels")
        if self.blocks >= NOTED_STEP:
            found.append(f"compression blocks ({self.blocks:.1f} levels)")
        if self.blur >= NOTED_BLUR:
            found.append(f"blur of about {self.blur:.1f} px")
        return ", ".join(found) or "clean"


def measure(image: Tensor) -> tuple[Damage, Tensor]:
    """What was found in 1 c h w, and the map of its noise, 1 1 h w in levels."""
    part = samples(luma(image))
    noise = noise_map(image)
    found = Damage(
        noise=float(noise.square().mean().sqrt()), blocks=block_steps(part), blur=edge_blur(part)
    )
    return found, noise


def luma(image: Tensor) -> Tensor:
    """1 c h w -> 1 1 h w, BT.601; grey as it is."""
    if image.shape[1] == 1:
        return image.float()
    return (image.float() * image.new_tensor(LUMA, dtype=torch.float32)[:, None, None]).sum(
        1, keepdim=True
    )


def samples(image: Tensor) -> Tensor:
    """The whole of a small picture, or evenly spread crops of a large one: 1 c h w -> n c h' w'.

    Crops start at multiples of 8, where the grid of a compressed picture keeps its phase.
    """
    cuts = [image]
    for dim in (-2, -1):
        length = image.shape[dim]
        if length <= CROPS * CROP:
            continue
        last = (length - CROP) // BLOCK
        starts = [BLOCK * (last * n // (CROPS - 1)) for n in range(CROPS)]
        cuts = [cut.narrow(dim, start, CROP) for cut in cuts for start in starts]
    return torch.cat(cuts)


# ---- noise ----


def noise_map(image: Tensor) -> Tensor:
    """Deviation of white noise around every pixel, in levels: 1 c h w -> 1 1 h w.

    Immerkaer's mask (Fast Noise Variance Estimation, 1996), the second difference along both
    sides, gives 0 on ramps and 6 deviations on white noise. Its mean is taken in small windows. One
    of the quietest tells the noise of the picture; where quieter ones lie around, that is the
    noise there. Windows that are wholly white or black may be overexposed and don't count for the
    picture; they do count around them.
    """
    h, w = image.shape[-2:]
    if min(h, w) < 3:
        return image.new_zeros(1, 1, h, w, dtype=torch.float32)
    local, clipped = noise_windows(image)
    open_windows = local[~clipped]
    if open_windows.numel() == 0:
        return image.new_zeros(1, 1, h, w, dtype=torch.float32)
    overall = quantile(open_windows, QUIET) / QUIET_READS
    around = -_pooled(-local, AROUND, F.max_pool2d) / AROUND_READS
    noise = _pooled(around.clamp(max=overall), SMOOTH, F.avg_pool2d)
    return F.interpolate(noise, size=(h, w), mode="bilinear")


def noise_windows(image: Tensor) -> tuple[Tensor, Tensor]:
    """Deviation in windows of `WINDOW` pixels, in levels, and which are all white or all black.

    1 c h w, at least 3x3 -> 1 1 a b each.
    """
    side_h, side_w = (min(WINDOW, side - 2) for side in image.shape[-2:])
    total = clip = 0.0
    for channel in image.float().split(1, dim=1):
        response = channel.diff(n=2, dim=-1).diff(n=2, dim=-2).abs_()
        mean = F.avg_pool2d(response, (side_h, side_w), stride=STEP)
        total = total + (mean * (LEVELS / IMMERKAER)) ** 2
        inner = channel[..., 1:-1, 1:-1]
        clip = clip + F.avg_pool2d(inner, (side_h, side_w), stride=STEP)
    local = (total / image.shape[1]).sqrt()
    brightness = clip / image.shape[1]
    limit = 0.5 / LEVELS
    clipped = (local < 0.01) & ((brightness > 1 - limit) | (brightness < limit))
    return local, clipped


# ---- compression blocks ----


def block_steps(image: Tensor) -> float:
    """Mean height of the steps along an 8x8 grid at any offset, in levels: n 1 h w -> a number.

    A step is a difference that exceeds the mean of its two neighbours along the same line, and is
    not so high that it must have been drawn. 0 where no phase of the eight stands out in both
    directions: a repeating pattern seldom has the period in both.
    """
    heights = []
    for dim in (-1, -2):
        if image.shape[dim] < 3 * BLOCK:
            return 0.0
        d = image.float().diff(dim=dim).abs_() * LEVELS
        n = d.shape[dim] - 2
        middle = d.narrow(dim, 1, n)
        excess = middle - (d.narrow(dim, 0, n) + d.narrow(dim, 2, n)) / 2
        counts = (middle <= HIGHEST_STEP).float()
        other = -1 if dim == -2 else -2
        excess = (excess * counts).sum((0, 1, other))
        counts = counts.sum((0, 1, other))
        phases = torch.arange(n, device=image.device) % BLOCK
        sums = excess.new_zeros(2, BLOCK).index_add_(1, phases, torch.stack((excess, counts)))
        mean = sums[0] / sums[1].clamp(min=1)
        best = int(mean.argmax())
        rest = mean[torch.arange(BLOCK, device=mean.device) != best]
        height = float(mean[best] - rest.mean() - CERTAIN * rest.std())
        heights.append(max(0.0, height))
    return min(heights)


# ---- blur ----


def edge_blur(image: Tensor) -> float:
    """Deviation of the Gaussian that blurs the sharper edges, in pixels: n 1 h w -> a number.

    An edge blurred by s and then by r has a gradient lower by R = sqrt(1 + r^2 / s^2), so that
    s = r / sqrt(R^2 - 1) (Zhuo and Sim, Defocus map estimation from a single image, 2011). 0 where
    a picture has too few edges to tell.
    """
    if min(image.shape[-2:]) < 5:
        return 0.0
    radius = math.ceil(3 * REBLUR)
    x = torch.arange(-radius, radius + 1, device=image.device, dtype=torch.float32)
    kernel = torch.exp(-(x**2) / (2 * REBLUR**2))
    kernel = kernel / kernel.sum()
    blurred = F.pad(image.float(), (radius,) * 4, mode="replicate")
    blurred = F.conv2d(blurred, kernel[None, None, None])
    blurred = F.conv2d(blurred, kernel[None, None, :, None])
    before, after = gradient(image.float()), gradient(blurred)
    least = max(EDGE_GRADIENT, quantile(before, 1 - EDGES))
    edges = (before == F.max_pool2d(before, 3, 1, 1)) & (before > least)
    if int(edges.sum()) < FEWEST_EDGES:
        return 0.0
    ratio = before[edges] / after[edges].clamp(min=1e-3)
    sigma = REBLUR / (ratio.square() - 1).clamp(min=1e-4).sqrt()
    return quantile(sigma, SHARP)


def gradient(image: Tensor) -> Tensor:
    """Magnitude by central differences, in levels: n 1 h w -> n 1 h-2 w-2."""
    across = image[..., 1:-1, 2:] - image[..., 1:-1, :-2]
    down = image[..., 2:, 1:-1] - image[..., :-2, 1:-1]
    return torch.hypot(across, down) * (LEVELS / 2)


# ---- small parts ----


def quantile(values: Tensor, share: float) -> float:
    """The value below which this share lies; of any number of values from one up."""
    flat = values.flatten()
    return float(flat.kthvalue(1 + int(share * (len(flat) - 1))).values)


def _pooled(windows: Tensor, side: int, pool) -> Tensor:
    """Pooled over side x side windows around each, edges replicated."""
    edge = side // 2
    return pool(F.pad(windows, (edge,) * 4, mode="replicate"), side, stride=1)

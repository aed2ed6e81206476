"""How damaged a picture is, measured on the picture itself: noise, compression blocks, blur.

Pure functions in float32. A picture is 1 c h w in [0, 1], from 1x1 up, grey or RGB, without its
alpha; noise is in levels of 8 bits, blur in pixels of the picture. Every measure reads
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
QUIET, QUIET_READS = 0.1, 0.88
# The rounding of floats responds by less than this many levels.
NO_RESPONSE = 0.01
# Windows around each, per side, among which the quietest bounds the noise there; what it reads.
AROUND, AROUND_READS = 9, 0.79
# Windows around each over which the map of noise is averaged, per side.
SMOOTH = 5

# A side of JPEG's blocks. Smaller coefficients than this, in levels, vanish but for rounding.
BLOCK, VANISHING = 8, 0.6
# How far the share of vanishing coefficients must stand out where the grid is: above the median of
# all offsets and above the next best.
GRID, GRID_BEYOND_NEXT = 0.05, 0.02
# Steps of JPEG's table for luma at quality 50, row by row.
TABLE = (
    *(16, 11, 10, 16, 24, 40, 51, 61),
    *(12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56),
    *(14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77),
    *(24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101),
    *(72, 92, 95, 98, 112, 100, 103, 99),
)
# The places in it whose steps are read, and how low a frequency's coefficients are mostly kept.
STEPS_READ, LOW_FREQUENCY = (1, 2, 8, 9, 10, 16, 17, 18), 2.3
# The largest step looked for, how many values must exceed half of it, and the mean cosine
# (1 for exact multiples, 0 for any values) from which on they are multiples.
LARGEST_STEP, FEWEST_MULTIPLES, MULTIPLES_FIT = 160, 16, 0.6

# Deviation of the Gaussian that a picture is blurred by once more, in pixels.
REBLUR = 1.0
# The share of pixels looked for edges, the gradient in levels that one has, how many are needed,
# and the share of sharper ones below the one that tells a picture's blur.
EDGES, EDGE_GRADIENT, FEWEST_EDGES, SHARP = 0.1, 4.0, 20, 0.25

# Larger pictures are read in this many crops of this many pixels, evenly spread.
CROPS, CROP = 3, 256

# Below these, nothing is said of noise (levels) and blur (pixels).
NOTED_NOISE, NOTED_BLUR = 1.5, 0.7


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What was found in a picture.

    noise: standard deviation of white noise, in levels of 255, mean over channels.
    quantisation: how coarsely JPEG rounded it: 0 without JPEG, 1 at quality 50.
    compression: standard deviation of what JPEG has changed, in levels.
    blur: deviation of a Gaussian that would make a sharp picture's edges like these, in pixels.
    """

    noise: float = 0.0
    quantisation: float = 0.0
    compression: float = 0.0
    blur: float = 0.0

    def __str__(self) -> str:
        found = []
        if self.noise >= NOTED_NOISE:
            found.append(f"noise of about {self.noise:.0f} levels")
        if self.quantisation > 0:
            found.append(f"JPEG compression (quality of about {quality(self.quantisation):.0f})")
        if self.blur >= NOTED_BLUR:
            found.append(f"blur of about {self.blur:.1f} px")
        return ", ".join(found) or "clean"


def measure(image: Tensor) -> tuple[Damage, Tensor]:
    """What was found in 1 c h w, and the map of its noise, 1 1 h w in levels."""
    part = samples(luma(image))
    noise = noise_map(image)
    coarseness, error = compression(part)
    found = Damage(
        noise=float(noise.square().mean().sqrt()),
        quantisation=coarseness,
        compression=error,
        blur=edge_blur(part),
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
    noise there. Windows without any response may be overexposed, or paper beside a photograph: they
    don't count for the picture, only around them.
    """
    h, w = image.shape[-2:]
    if min(h, w) < 3:
        return image.new_zeros(1, 1, h, w, dtype=torch.float32)
    local = noise_windows(image)
    telling = local[local > NO_RESPONSE]
    if telling.numel() == 0:
        return image.new_zeros(1, 1, h, w, dtype=torch.float32)
    overall = quantile(telling, QUIET) / QUIET_READS
    around = -_pooled(-local, AROUND, F.max_pool2d) / AROUND_READS
    noise = _pooled(around.clamp(max=overall), SMOOTH, F.avg_pool2d)
    return F.interpolate(noise, size=(h, w), mode="bilinear")


def noise_windows(image: Tensor) -> Tensor:
    """Deviation in windows of `WINDOW` pixels, in levels: 1 c h w, at least 3x3 -> 1 1 a b."""
    sides = [min(WINDOW, side - 2) for side in image.shape[-2:]]
    total = 0.0
    for channel in image.float().split(1, dim=1):
        response = channel.diff(n=2, dim=-1).diff(n=2, dim=-2).abs_()
        total = total + (F.avg_pool2d(response, sides, stride=STEP) * (LEVELS / IMMERKAER)) ** 2
    return (total / image.shape[1]).sqrt()


# ---- compression ----


def compression(image: Tensor) -> tuple[float, float]:
    """How coarsely JPEG has rounded a picture, and what it has changed: n 1 h w -> two numbers.

    The first is 0 without JPEG, 1 at quality 50: the steps of the lower frequencies as multiples of
    those in JPEG's own table (ITU-T T.81, Annex K). The second is the standard deviation of the error
    in levels.

    Blocks that were cut where JPEG cut them have far more vanishing DCT coefficients than blocks cut
    elsewhere, whatever the picture shows: the grid is where that is so, at any of the 64 offsets.
    There the coefficients are multiples of the steps.
    """
    if min(image.shape[-2:]) < 2 * BLOCK:
        return 0.0, 0.0
    pixels = image.float() * LEVELS
    offsets = [(top, left) for top in range(BLOCK) for left in range(BLOCK)]
    vanishing = torch.tensor([float(_vanishing(_dct(pixels, *offset))) for offset in offsets])
    best = int(vanishing.argmax())
    ordered = vanishing.sort().values
    if ordered[-1] - ordered[-2] < GRID_BEYOND_NEXT or ordered[-1] - ordered.median() < GRID:
        return 0.0, 0.0
    found = _dct(pixels, *offsets[best])
    # Too few values of a frequency show no step: the larger ratios are the ones to go by.
    ratios = sorted(_step(found[:, place]) / TABLE[place] for place in STEPS_READ)
    coarseness = ratios[3 * len(ratios) // 4]
    return coarseness, rounding_error(found, coarseness)


def rounding_error(coefficients: Tensor, coarseness: float) -> float:
    """Standard deviation of what rounding to steps has changed: blocks, 64 -> levels.

    Coefficients of pictures follow Laplace's distribution. Its scale b tells how many exceed half a
    step q: exp(-q / 2b). Those have an error of q^2 / 12, the others have lost what they were. Where
    hardly any exceeds it, b is at most what lower frequencies predict, as 1 / frequency.
    """
    steps = coefficients.new_tensor(TABLE) * coarseness
    steps = steps.clamp(min=1)
    place = torch.arange(BLOCK, device=steps.device, dtype=torch.float32)
    frequency = torch.hypot(place[:, None], place).flatten()
    low = (frequency > 0) & (frequency <= LOW_FREQUENCY)
    known = (coefficients[:, low].abs().mean(0) * frequency[low]).mean()
    kept = (coefficients.abs() > steps / 2).float().mean(0).clamp(1e-4, 0.98)
    b = torch.minimum(steps / (-2 * kept.log()), known / frequency.clamp(min=1)).clamp(min=1e-3)
    kept = torch.exp(-steps / (2 * b))
    lost = 2 * b**2 - kept * ((steps / 2) ** 2 + steps * b + 2 * b**2)
    variance = lost.clamp(min=0) + kept * steps**2 / 12
    return float(variance[1:].sum() / BLOCK**2) ** 0.5


def quality(quantisation: float) -> float:
    """JPEG's quality for such steps, 1 to 100, as libjpeg counts it."""
    return max(1.0, 100 - 50 * quantisation if quantisation < 1 else 50 / quantisation)


def _dct(pixels: Tensor, top: int, left: int) -> Tensor:
    """DCT of the 8x8 blocks that start at an offset: n 1 h w -> blocks, 64."""
    k = torch.arange(BLOCK, device=pixels.device, dtype=torch.float32)
    basis = torch.cos((2 * k + 1) * k[:, None] * (math.pi / (2 * BLOCK))) * math.sqrt(2 / BLOCK)
    basis[0] /= math.sqrt(2)
    rows, columns = (
        (side - at) // BLOCK for side, at in zip(pixels.shape[-2:], (top, left), strict=True)
    )
    cut = pixels[..., top : top + BLOCK * rows, left : left + BLOCK * columns]
    blocks = cut.unflatten(-1, (columns, BLOCK)).unflatten(-3, (rows, BLOCK)).transpose(-2, -3)
    return (basis @ blocks @ basis.T).flatten(0, -3).flatten(1)


def _vanishing(coefficients: Tensor) -> Tensor:
    """The share of a picture's coefficients that are 0 but for the rounding of its pixels."""
    return (coefficients[:, 1:].abs() < VANISHING).float().mean()


def _step(values: Tensor) -> float:
    """The largest step of which the values are multiples, 1 where there is none: n -> a number."""
    steps = torch.arange(2, LARGEST_STEP + 1, device=values.device, dtype=torch.float32)[:, None]
    counted = (values.abs() > steps / 2).float()
    fits = (torch.cos(values * (2 * math.pi / steps)) * counted).sum(1)
    counts = counted.sum(1)
    good = (counts >= FEWEST_MULTIPLES) & (fits >= MULTIPLES_FIT * counts)
    return float(steps[good].max()) if bool(good.any()) else 1.0


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

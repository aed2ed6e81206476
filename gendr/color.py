"""Colour fixes: the colours of the input for the detail of the output. Pure functions in float32.

Pictures are b c h w in sRGB, [0, 1]; values outside are taken as they come and, but for `lab`, go
out as they come. Every statistic is one over the whole picture, so no fix can draw the edges of
tiles. Work goes in strips of rows: beside the result, memory does not grow with the height.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Values of one strip: little beside the picture, and enough for one kernel of a graphics card.
STRIP = 2**20
DILATIONS = (1, 2, 4, 8, 16)
# Rows at the edge of a strip that its own edge may have spoilt after all levels.
REACH = sum(DILATIONS)
ADAIN_EPS = 1e-5
# A third of a unit of Lab, squared: less than an eye can tell, so that the noise of a flat
# picture is not blown up into colours.
LAB_EPS = 0.1

# sRGB primaries to XYZ, every row divided by the white of D65: greys have equal rows, a = b = 0.
_XYZ = torch.tensor(
    (
        (0.4124564, 0.3575761, 0.1804375),
        (0.2126729, 0.7151522, 0.0721750),
        (0.0193339, 0.1191920, 0.9503041),
    ),
    dtype=torch.float64,
    device="cpu",
)
_XYZ /= _XYZ.sum(1, keepdim=True)
TO_XYZ: list[list[float]] = _XYZ.tolist()
FROM_XYZ: list[list[float]] = torch.linalg.inv(_XYZ).tolist()
KNEE = 6 / 29


def wavelet(y: Tensor, x: Tensor) -> Tensor:
    """High frequencies of y on the low ones of x, b c h w: follows colours locally, and seamlessly.

    Five levels of the kernel outer([1 2 1], [1 2 1]) / 16 at dilations 1 to 16, edges replicated
    (section 1.3 of the method). The filter is linear: y - low(y) + low(x) = y + low(x - y), one
    filter instead of two, and exactly y where x = y.
    """
    _alike(y, x)
    out = torch.empty(y.shape, device=y.device)
    for top, bottom in _strips(y, least=4 * REACH):
        above, below = max(0, top - REACH), min(y.shape[-2], bottom + REACH)
        low = x[..., above:below, :].float() - y[..., above:below, :]
        for dilation in DILATIONS:
            low = _blur(_blur(low, dilation, -2), dilation, -1)
        out[..., top:bottom, :] = low[..., top - above : bottom - above, :] + y[..., top:bottom, :]
    return out


def adain(y: Tensor, x: Tensor) -> Tensor:
    """Mean and deviation of every channel of y moved to those of x, b c h w (section 1.3)."""
    _alike(y, x)
    # A single pixel has no unbiased variance.
    correction = min(1, y.shape[-2] * y.shape[-1] - 1)
    y = y.float()
    y_var, y_mean = torch.var_mean(y, dim=(-2, -1), correction=correction, keepdim=True)
    x_var, x_mean = torch.var_mean(x.float(), dim=(-2, -1), correction=correction, keepdim=True)
    return _match(y, y_mean, y_var, x_mean, x_var, ADAIN_EPS)


def lab(y: Tensor, x: Tensor) -> Tensor:
    """Mean and deviation of L, a and b of y moved to those of x: b 3 h w, or b 1 h w for grey.

    The result is in [0, 1]: what leaves the gamut goes back towards the grey of its own luminance
    in linear light. That keeps the ratios between the channels, where clipping, or less chroma in
    Lab, would turn a saturated blue purple.
    """
    _alike(y, x)
    _three(y)
    y_mean, y_var = _lab_moments(y)
    x_mean, x_var = _lab_moments(x)
    out = torch.empty(y.shape, device=y.device)
    for top, bottom in _strips(y):
        part = to_lab(_coloured(y[..., top:bottom, :]))
        part = _match(part, y_mean, y_var, x_mean, x_var, LAB_EPS)
        part = encode(into_gamut(_linear_from_lab(part)))
        out[..., top:bottom, :] = part[:, : y.shape[1]]
    return out


def _none(y: Tensor, x: Tensor) -> Tensor:
    return y


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": _none,
    "wavelet": wavelet,
    "adain": adain,
    "lab": lab,
}


def apply(name: str, y: Tensor, x: Tensor) -> Tensor:
    """The fix called `name`: y is the output, x the input at the output's size, both b c h w."""
    if name not in METHODS:
        raise ValueError(f"color_fix must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name](y, x)


def delta_e(a: Tensor, b: Tensor) -> Tensor:
    """Mean CIE76 difference of every picture: two of b c h w, c 1 or 3 -> b, on the CPU.

    About 1 is just visible side by side, 2.3 without looking for it.
    """
    _alike(a, b)
    _three(a)
    total = torch.zeros(a.shape[0], dtype=torch.float64)
    for top, bottom in _strips(a):
        first, second = (to_lab(_coloured(t[..., top:bottom, :])) for t in (a, b))
        distance = torch.linalg.vector_norm(first - second, dim=1)
        total += distance.sum(dim=(-2, -1)).cpu()
    return (total / (a.shape[-2] * a.shape[-1])).float()


def decode(image: Tensor) -> Tensor:
    """sRGB values to linear light; the straight part goes on below 0."""
    curve = ((image.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4
    return torch.where(image > 0.04045, curve, image / 12.92)


def encode(linear: Tensor) -> Tensor:
    """Linear light to sRGB values, the inverse of `decode`."""
    curve = 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, curve, linear * 12.92)


def to_lab(image: Tensor) -> Tensor:
    """sRGB, b 3 h w in [0, 1] -> CIE L a b under D65, L in 0..100."""
    xyz = _mix(decode(image), TO_XYZ)
    root = xyz.clamp(min=KNEE**3) ** (1 / 3)
    x, y, z = torch.where(xyz > KNEE**3, root, xyz / (3 * KNEE**2) + 4 / 29).unbind(1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), 1)


def _linear_from_lab(image: Tensor) -> Tensor:
    lightness, a, b = image.unbind(1)
    y = (lightness + 16) / 116
    root = torch.stack((y + a / 500, y, y - b / 200), 1)
    return _mix(torch.where(root > KNEE, root**3, 3 * KNEE**2 * (root - 4 / 29)), FROM_XYZ)


def into_gamut(linear: Tensor) -> Tensor:
    """Linear light, b 3 h w -> the same in [0, 1]: as far towards the grey of equal luminance as it takes."""
    grey = _mix(linear, TO_XYZ[1:2]).clamp(0, 1)
    colour = linear - grey
    room = torch.where(colour > 0, 1 - grey, grey)
    share = (room / colour.abs().clamp(min=1e-12)).amin(dim=1, keepdim=True).clamp(max=1)
    return (grey + share * colour).clamp(0, 1)


def _mix(image: Tensor, matrix: list[list[float]]) -> Tensor:
    """Channels times a matrix, as plain sums: a matrix product may be rounded to 10 bits on a GPU."""
    channels = image.unbind(1)
    rows = (sum(w * c for w, c in zip(row, channels, strict=True)) for row in matrix)
    return torch.stack(tuple(rows), 1)


def _blur(image: Tensor, dilation: int, dim: int) -> Tensor:
    """[1 2 1] / 4 at a dilation along one dimension, edges replicated; any length from 1 up."""
    n = image.shape[dim]
    d = min(dilation, n)
    out = image * 0.5
    for source, target, edge in ((0, d, 0), (d, 0, n - 1)):
        out.narrow(dim, target, n - d).add_(image.narrow(dim, source, n - d), alpha=0.25)
        beyond = 0 if target else n - d
        out.narrow(dim, beyond, d).add_(image.narrow(dim, edge, 1), alpha=0.25)
    return out


def _match(
    y: Tensor, y_mean: Tensor, y_var: Tensor, x_mean: Tensor, x_var: Tensor, eps: float
) -> Tensor:
    return (y - y_mean).mul_(((x_var + eps) / (y_var + eps)).sqrt()).add_(x_mean)


def _lab_moments(image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of L, a, b over each picture, b 3 1 1, summed in float64.

    In float32 the rounding of a sum depends on where strips end and on the number of threads, and
    the steep start of the sRGB curve shows it in dark pixels.
    """
    count, mean, squares = 0, 0.0, 0.0
    for top, bottom in _strips(image):
        part = to_lab(_coloured(image[..., top:bottom, :]))
        # Apple's devices have no float64.
        part = (part.cpu() if part.device.type == "mps" else part).double()
        n = part.shape[-2] * part.shape[-1]
        part_var, part_mean = torch.var_mean(part, dim=(-2, -1), correction=0, keepdim=True)
        step = part_mean - mean
        count += n
        mean = mean + step * (n / count)
        squares = squares + part_var * n + step**2 * (n * (count - n) / count)
    return tuple(value.float().to(image.device) for value in (mean, squares / count))


def _strips(image: Tensor, least: int = 1) -> Iterator[tuple[int, int]]:
    """Row ranges (top, bottom), bottom exclusive, of strips of about `STRIP` values and at least `least` rows."""
    b, c, height, width = image.shape
    rows = max(least, STRIP // (b * c * width))
    for top in range(0, height, rows):
        yield top, min(height, top + rows)


def _coloured(image: Tensor) -> Tensor:
    return image.float().expand(-1, 3, -1, -1)


def _three(image: Tensor) -> None:
    if image.shape[1] not in (1, 3):
        raise ValueError(
            f"Lab colours need a grey or RGB picture, got {image.shape[1]} channels; "
            "split off the alpha channel first"
        )


def _alike(y: Tensor, x: Tensor) -> None:
    if y.ndim != 4 or y.shape != x.shape:
        raise ValueError(
            f"two pictures of one shape b c h w are needed, got {tuple(y.shape)} and "
            f"{tuple(x.shape)}; resize the input to the output's size first"
        )

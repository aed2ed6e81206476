"""NIQE (Mittal et al. 2013): how far a picture's statistics lie from those of pristine ones.

The pristine model is a parameter file in BasicSR's layout (`mu_pris_param`, `cov_pris_param`,
`gaussian_window`; its `niqe_pris_params.npz` is Apache-2.0); it is named on the command line and
not part of this repository. Lower is better. Two scales, blocks of 96, rounded BT.601 luma.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np

from train.evaluation.metrics import ALONE, Metric, luma

BLOCK = 96
NAMES = ("mu_pris_param", "cov_pris_param", "gaussian_window")
FEATURES = 36
_gamma = np.vectorize(math.gamma, otypes=[float])


def fits(height: int, width: int) -> bool:
    """Whether a picture holds the two blocks that a covariance needs."""
    return (height // BLOCK) * (width // BLOCK) >= 2


class Niqe:
    """Callable: uint8 h w 3 -> score, or None where two blocks of 96 don't fit."""

    def __init__(self, path: Path):
        """Raises ValueError when the file is not a NIQE parameter file."""
        path = Path(path)
        try:
            data = path.read_bytes()
            with np.load(path, allow_pickle=False) as stored:
                mean, covariance, window = (np.asarray(stored[n], np.float64) for n in NAMES)
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path.name} is not a NIQE parameter file ({error}); expected an .npz with "
                f"{', '.join(NAMES)}, such as BasicSR's niqe_pris_params.npz"
            ) from error
        if mean.size != FEATURES or covariance.shape != (FEATURES, FEATURES) or window.ndim != 2:
            raise ValueError(
                f"{path.name} holds arrays of other shapes than NIQE's {FEATURES} features"
            )
        self.mean, self.covariance, self.window = mean.reshape(-1), covariance, window
        self.sha256 = hashlib.sha256(data).hexdigest()
        # E|x|^2 / E x^2 of a generalised Gaussian rises with its shape: inverted by look-up.
        self.shapes = np.arange(0.2, 10.001, 0.001)
        inverse = 1.0 / self.shapes
        self.ratios = _gamma(2 * inverse) ** 2 / (_gamma(inverse) * _gamma(3 * inverse))
        self.metric = Metric(
            "niqe", "NIQE", "lower", ALONE, 4,
            "distance to pristine statistics; 96x96 blocks at two scales, rounded BT.601 luma, "
            f"computed here with {path.name}",
            f"1/{self.sha256[:8]}",
        )  # fmt: skip

    def __call__(self, rgb: np.ndarray) -> float | None:
        if not fits(*rgb.shape[:2]):
            return None
        y = np.round(luma(rgb))
        rows, columns = y.shape[0] // BLOCK, y.shape[1] // BLOCK
        y = y[: rows * BLOCK, : columns * BLOCK]
        features = np.concatenate(
            (self._features(y, BLOCK), self._features(_half(y), BLOCK // 2)), axis=1
        )
        whole = features[~np.isnan(features).any(axis=1)]
        if len(whole) < 2:
            return None
        difference = self.mean - np.nanmean(features, axis=0)
        inverse = np.linalg.pinv((self.covariance + np.cov(whole, rowvar=False)) / 2)
        return float(np.sqrt(max(difference @ inverse @ difference, 0.0)))

    def _features(self, y: np.ndarray, block: int) -> np.ndarray:
        """18 statistics of each block: the normalised picture's fit, and its four products' fits."""
        mean, square = self._smooth(y), self._smooth(y * y)
        normal = (y - mean) / (np.sqrt(np.abs(square - mean**2)) + 1.0)
        h, w = normal.shape
        blocks = normal.reshape(h // block, block, w // block, block).swapaxes(1, 2)
        blocks = blocks.reshape(-1, block, block)
        shape, left, right = self._fit(blocks)
        columns = [shape, (left + right) / 2]
        for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
            shape, left, right = self._fit(blocks * np.roll(blocks, shift, axis=(1, 2)))
            offset = (right - left) * _gamma(2 / shape) / _gamma(1 / shape)
            columns += [shape, offset, left, right]
        return np.stack(columns, axis=1)

    def _smooth(self, y: np.ndarray) -> np.ndarray:
        """Correlation with the parameter file's window, edges repeated."""
        rows, columns = self.window.shape
        padded = np.pad(y, ((rows // 2,) * 2, (columns // 2,) * 2), mode="edge")
        out = np.zeros_like(y)
        for i in range(rows):
            for j in range(columns):
                out += self.window[i, j] * padded[i : i + y.shape[0], j : j + y.shape[1]]
        return out

    def _fit(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Asymmetric generalised Gaussian of each block: shape, left and right scale.

        A flat block has no fit: its scales are NaN, and its shape the table's first.
        """
        x = blocks.reshape(len(blocks), -1)
        square, negative, positive = x * x, x < 0, x > 0
        with np.errstate(invalid="ignore", divide="ignore"):
            left = np.sqrt((square * negative).sum(1) / negative.sum(1))
            right = np.sqrt((square * positive).sum(1) / positive.sum(1))
            g = left / right
            ratio = np.abs(x).mean(1) ** 2 / square.mean(1)
            target = ratio * (g**3 + 1) * (g + 1) / (g**2 + 1) ** 2
        at = np.clip(np.searchsorted(self.ratios, target), 1, len(self.ratios) - 1)
        at -= target - self.ratios[at - 1] < self.ratios[at] - target
        shape = self.shapes[np.where(np.isnan(target), 0, at)]
        scale = np.sqrt(_gamma(1 / shape) / _gamma(3 / shape))
        return shape, left * scale, right * scale


def _half(y: np.ndarray) -> np.ndarray:
    """Antialiased bicubic (a = -0.5) reduction by two, mirrored edges."""
    d = np.abs(np.arange(-3.5, 4.0)) / 2
    taps = np.where(
        d <= 1, 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    )  # fmt: skip
    taps /= taps.sum()
    for axis in (0, 1):
        rows = np.moveaxis(y, axis, 0)
        padded = np.pad(rows, ((3, 3), (0, 0)), mode="symmetric")
        n = len(rows)
        rows = sum(tap * padded[k : k + n : 2][: n // 2] for k, tap in enumerate(taps))
        y = np.moveaxis(rows, 0, axis)
    return y

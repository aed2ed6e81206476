"""The user's choices: names, defaults and limits, the same in Python, the command line and the nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from numbers import Real
from typing import Any, NamedTuple

# auto takes the one that the model's file names, or else the usual one.
COLOR_FIXES = ("auto", "none", "wavelet", "adain", "lab")
USUAL_COLOR_FIX = "wavelet"
DTYPES = ("auto", "bf16", "fp16", "fp32")
# How passes are run; the first is the default, as of DTYPES.
SPEEDS = ("auto", "eager", "graph", "compile")
# Settings that give a size instead of a factor.
TARGETS = ("long_side", "short_side", "megapixels")
# Fidelity that follows how damaged the input is.
AUTO = "auto"
# What goes together for a kind of picture: it takes the place of what is left at its default. The
# first is the default, and leaves everything to the picture itself.
PRESETS: dict[str, dict[str, Any]] = {
    "auto": {},
    # Drawn, rendered or generated: every pixel is meant.
    "generated": {"fidelity": 1.0},
    # From a camera: the grain belongs to it, mostly.
    "photo": {"fidelity": 0.75},
    # Worse than can be measured: only what the model makes of it.
    "damaged": {"fidelity": 0.0},
}
# Beyond this factor one step has nothing left of the picture to build on.
MAX_FACTOR = 8.0

HALF = Fraction(1, 2)


class Bound(NamedTuple):
    """Smallest and largest value a person may choose, and the step of a widget."""

    minimum: float
    maximum: float
    step: float


BOUNDS: dict[str, Bound] = {
    "scale": Bound(1.0, MAX_FACTOR, 0.05),
    "long_side": Bound(1, 65536, 1),
    "short_side": Bound(1, 65536, 1),
    "megapixels": Bound(0.001, 1024.0, 0.1),
    "tile": Bound(0, 8192, 64),
    "overlap": Bound(0, 1024, 8),
    "tile_batch": Bound(0, 64, 1),
    "detail": Bound(0.0, 1.5, 0.05),
    "fidelity": Bound(0.0, 1.0, 0.05),
    "guidance": Bound(1.0, 15.0, 0.1),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a picture is restored. The defaults here are the only ones in the project.

    scale: output side / input side, 1 to 8, fractions too. Ignored where a target size is given.
    long_side, short_side, megapixels: a target size instead of a factor; at most one of them.
    tile, overlap, tile_batch: pixels of the output and tiles per pass; 0 = chosen by the plan.
    color_fix: where the low frequencies or colour statistics come from; one of `COLOR_FIXES`.
    detail: 0 = the encoded and decoded input, 1 = the model; linear in the latent.
    fidelity: share of back-projection; at 1 the result, reduced to the input's size, is the input.
    `AUTO` measures how damaged the input is, and trusts it accordingly, everywhere on its own.
    guidance: strength of classifier-free guidance, None = the checkpoint's; above 1 runs two passes.
    seamless: treat the picture as a torus, for textures that repeat.
    preset: one of `PRESETS`, for what is left at its default.
    steady: the pictures are frames of one clip, in order: what does not move is kept from flickering,
    so that a frame's result depends on the frames before it.
    """

    scale: float = 4.0
    long_side: int | None = None
    short_side: int | None = None
    megapixels: float | None = None
    tile: int = 0
    overlap: int = 0
    tile_batch: int = 0
    color_fix: str = COLOR_FIXES[0]
    detail: float = 1.0
    fidelity: float | str = AUTO
    guidance: float | None = None
    seamless: bool = False
    preset: str = next(iter(PRESETS))
    steady: bool = False

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) == getattr(type(self), name):
                object.__setattr__(self, name, value)
        for name, bound in BOUNDS.items():
            value = getattr(self, name)
            optional = getattr(type(self), name) is None
            if (value is None and optional) or (name == "fidelity" and value == AUTO):
                continue
            object.__setattr__(self, name, _number(name, value, bound))
        for name in ("seamless", "steady"):
            value = getattr(self, name)
            if not isinstance(value, (bool, int)) and type(value).__name__ not in ("bool_", "bool"):
                raise ValueError(f"{name} must be True or False, got {value!r}")
            object.__setattr__(self, name, bool(value))
        if self.color_fix not in COLOR_FIXES:
            raise ValueError(
                f"color_fix must be one of {', '.join(COLOR_FIXES)}, got {self.color_fix!r}"
            )
        targets = [name for name in TARGETS if getattr(self, name)]
        if len(targets) > 1:
            raise ValueError(f"give only one target size, got {' and '.join(targets)}")

    @property
    def has_target(self) -> bool:
        """Whether a target size stands in for the factor."""
        return any(getattr(self, name) for name in TARGETS)

    def factor(self, height: int, width: int) -> Fraction:
        """Output side / input side, exactly as a person wrote it: 1.15 is 23/20.

        Raises ValueError when a target size asks for more than `MAX_FACTOR` times the input.
        """
        if self.long_side:
            factor = Fraction(int(self.long_side), max(height, width))
        elif self.short_side:
            factor = Fraction(int(self.short_side), min(height, width))
        elif self.megapixels:
            factor = Fraction(math.sqrt(self.megapixels * 1e6 / (height * width)))
        else:
            # Widgets that add up steps give 1.1500000000000001.
            factor = Fraction(f"{self.scale:.10g}")
        if factor > MAX_FACTOR:
            raise ValueError(
                f"that size is {float(factor):.1f} times the input ({width}x{height}); at most "
                f"{MAX_FACTOR:g} times is possible: ask for a smaller one, or run twice"
            )
        return factor

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """Output size (H, W) for an input of h x w: side * factor, halves rounded up, at least 1.

        In decimals, not in binary fractions: 50 * 1.15 is 57.5 and so 58. Errors as of `factor`.
        """
        factor = self.factor(height, width)
        return tuple(max(1, math.floor(side * factor + HALF)) for side in (height, width))

    def __str__(self) -> str:
        """The choices in words, for a report: the usual ones always, others where they were made."""
        size = next((name for name in TARGETS if getattr(self, name)), "scale")
        usual = (size, "color_fix", "detail", "fidelity")
        made = [
            field.name
            for field in fields(self)
            if field.name not in (*usual, "scale") and getattr(self, field.name) != field.default
        ]
        return ", ".join(
            f"{name.replace('_', ' ')} {_told(getattr(self, name))}" for name in (*usual, *made)
        )


def _number(name: str, value: object, bound: Bound) -> float:
    """A number within its bounds, whole where its steps are; of numpy too. ValueError for another."""
    if isinstance(value, bool) or not isinstance(value, Real):
        kind = f"a number or {AUTO!r}" if name == "fidelity" else "a number"
        raise ValueError(f"{name} must be {kind}, got {value!r}")
    if not bound.minimum <= value <= bound.maximum:
        shown = f"{value:g}" if isinstance(value, float) else str(value)[:24]
        raise ValueError(
            f"{name} must be between {bound.minimum:g} and {bound.maximum:g}, got {shown}"
        )
    if isinstance(bound.step, int) and value != int(value):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if isinstance(value, (int, float)):
        return value
    return int(value) if isinstance(bound.step, int) else float(value)


def for_model(settings: Settings, color_fix: str | None) -> Settings:
    """Settings whose colour fix is no longer automatic. color_fix: what the model's file names."""
    if settings.color_fix != COLOR_FIXES[0]:
        return settings
    return replace(settings, color_fix=color_fix or USUAL_COLOR_FIX)


def _told(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def fidelity_from(text: str) -> float | str:
    """A fidelity as it is typed: a number, or `AUTO`. ValueError for another word."""
    return text if text == AUTO else float(text)


NAMES = tuple(field.name for field in fields(Settings))

"""Frames of one clip: where nothing moves, a frame is the mean of those before it.

What makes restored video flicker is mostly what differs from frame to frame in the input and means
nothing: noise, and compression that falls out otherwise each time. Pulling a result towards its input
(`fidelity`) hands it on. So a frame is cleaned before it is restored. That costs next to nothing and
keeps no more than two frames of the input, and still parts gain detail, as every mean of several
exposures does.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .damage import LEVELS, Damage, measure
from .fidelity import box

# A mean follows its last frame by 1 / FRAMES: the deviation of noise falls to 1 / sqrt(2 FRAMES - 1).
FRAMES = 8
# Pixels: the window in which the energy of a difference is read, and the one whose mean counts as light
# that changes, which the mean takes from the present frame.
WINDOW, LIGHT = 7, 15
# Deviation in levels that frames may have besides their measured damage: rounding, and compression that a
# single frame doesn't tell.
LEAST = 1.0
# Energy over what the damage explains: up to the first all is still, from the second on it moves.
STILL, MOVES = 2.0, 4.0
# The same of changes of light, in levels from the mean.
STEADY_LIGHT, OTHER_LIGHT = 8.0, 16.0
# How far what moves reaches, in pixels.
REACH = 3
# A cut: thumbnails of this side differ by so many levels on the average.
THUMBNAIL, CUT = 16, 12.0
# So many frames tell the damage of a clip; then it follows slowly.
TELLING = 16

MEASURES = tuple(f.name for f in fields(Damage))
MAPS = ("image", "count", "left")


@dataclass
class Mean:
    """What is known after a frame.

    image: the cleaned frame, 1 c h w in [0, 1]. count: frames in its pixels' mean, 1 1 h w. left: what
    the mean has left of a frame's variance, 1 1 h w. damage: of the clip. seen: frames since the cut.
    """

    image: Tensor
    count: Tensor
    left: Tensor
    damage: Damage
    seen: int = 1

    def on(self, device: torch.device) -> Mean:
        """The same there."""
        return replace(self, **{name: getattr(self, name).to(device) for name in MAPS})


class Steady:
    """What the frames of a clip so far say of the next one. One for each clip; frames in order."""

    def __init__(self) -> None:
        self.mean: Mean | None = None

    def __call__(self, image: Tensor) -> tuple[Tensor, tuple[Damage, Tensor]]:
        """A frame 1 c h w in [0, 1] -> the frame cleaned where it is still, and its damage in the form of
        `damage.measure`: that of the clip, with the noise that is left.

        A frame of another size, or after a cut, begins anew.
        """
        damage, noise = measure(image)
        before = None if self.mean is None else self.mean.on(image.device)
        if before is None or before.image.shape != image.shape or is_cut(image, before.image):
            one = torch.ones_like(noise)
            self.mean = Mean(image, one, one, damage)
        else:
            self.mean = after(image, noise, damage, before)
        return self.mean.image, (self.mean.damage, noise * self.mean.left.sqrt())

    def state(self) -> dict[str, Tensor]:
        """What `resume` goes on from: empty before the first frame."""
        if self.mean is None:
            return {}
        return {name: getattr(self.mean, name) for name in MAPS} | {
            "damage": torch.tensor(astuple(self.mean.damage), dtype=torch.float64),
            "seen": torch.tensor(self.mean.seen),
        }

    def resume(self, state: dict[str, Tensor]) -> None:
        """Go on after the frame whose `state` this was."""
        self.mean = None
        if state:
            maps = {name: state[name] for name in MAPS}
            damage = Damage(**dict(zip(MEASURES, state["damage"].tolist(), strict=True)))
            self.mean = Mean(**maps, damage=damage, seen=int(state["seen"]))


def after(image: Tensor, noise: Tensor, damage: Damage, before: Mean) -> Mean:
    """What is known after one more frame, whose noise and damage are these."""
    damage = between(damage, before.damage, before.seen / (before.seen + 1))
    difference = (image - before.image) * LEVELS
    light = box(difference, LIGHT)
    variance = noise.square() + damage.compression**2 + LEAST**2
    kept = still(difference - light, light, variance * (1 + before.left))
    weight = kept * before.count / (before.count + 1)
    return Mean(
        torch.lerp(image, before.image + light / LEVELS, weight).clamp(0, 1),
        (kept * before.count + 1).clamp(max=FRAMES),
        (1 - weight).square() + weight.square() * before.left,
        damage,
        min(before.seen + 1, TELLING),
    )


def still(difference: Tensor, light: Tensor, expected: Tensor) -> Tensor:
    """Where two pictures show the same: 1 1 h w in [0, 1].

    difference: of the two, without that of their light, 1 c h w in levels. expected: its variance where
    only their damage differs, 1 1 h w.
    """
    energy = box(difference.square().mean(1, keepdim=True), WINDOW) / expected
    change = light.abs().amax(1, keepdim=True)
    kept = torch.minimum(
        (MOVES - energy) / (MOVES - STILL),
        (OTHER_LIGHT - change) / (OTHER_LIGHT - STEADY_LIGHT),
    )
    return -F.max_pool2d(-kept.clamp(0, 1), 2 * REACH + 1, stride=1, padding=REACH)


def is_cut(image: Tensor, before: Tensor) -> bool:
    """Whether a frame shows something else altogether."""
    small, smaller = (F.adaptive_avg_pool2d(x, THUMBNAIL) for x in (image, before))
    return float((small - smaller).abs().mean()) * LEVELS > CUT


def between(a: Damage, b: Damage, share: float) -> Damage:
    """Every measure of a, moved by this share of the way to b's."""
    pairs = {name: (getattr(a, name), getattr(b, name)) for name in MEASURES}
    return replace(a, **{name: x + share * (y - x) for name, (x, y) in pairs.items()})

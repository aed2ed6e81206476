"""What a run did: progress while it goes, a report at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor

from .fidelity import Found
from .plan import Plan
from .settings import Settings

# So many pictures' inputs are told one by one.
TOLD = 8

# What a report passes on from its plan, as attributes and in `as_dict`.
PLANNED = (
    "images",
    "mode",
    "tiles",
    "tile",
    "overlap",
    "device",
    "speed",
)


class Cancelled(Exception):
    """The person stopped the run between two tiles."""


@dataclass(frozen=True)
class Progress:
    """Work done so far, over all pictures of a run.

    done, total: passes (tiles, and encode and decode where they run on their own).
    share: of the work, 0 to 1; passes weigh as much as they compute, and grow strip by strip.
    preview: makes a small picture 3 h w in [0, 1] of the present one so far. Only pay for it when
    it will be shown.
    """

    done: int
    total: int
    image_index: int
    share: float
    preview: Callable[[], Tensor] | None = None


OnProgress = Callable[[Progress], None]


@dataclass(kw_only=True)
class Report:
    """What was done to a batch. Sizes are (height, width).

    settings: the person's choices.
    plan: of what was computed, as it was at the end; what `PLANNED` names of it can be asked for
    here too.
    input_size, output_size: of the pictures, whatever part of them a mask chose.
    licence: of the model.
    mask: what it chose, in words; empty without one.
    dtype: name of the precision.
    delta_e, lr_psnr: colour difference (CIE76) and dB between the result, reduced to the input's
    size, and the input; means over the pictures.
    seam_score: gradient at tile borders / beside them where the input has no edge there, mean over
    the pictures; 1 = nothing to see. None without tiles, and for seamless pictures, whose grid lies
    elsewhere.
    speed, passes: how passes were run, and what the model has kept of them for later ones.
    events: what had to be changed on the way, such as smaller tiles after running out of memory.
    found: what every picture's input was found to be, and the fidelity chosen for it (the mean over
    the picture); empty where a number was asked for.
    """

    model: str
    settings: Settings
    plan: Plan
    dtype: str
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    licence: str = ""
    mask: str = ""
    passes: str = ""
    seconds: float = 0.0
    peak_bytes: int | None = None
    delta_e: float = 0.0
    lr_psnr: float = 0.0
    seam_score: float | None = None
    events: list[str] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        if name in PLANNED:
            return getattr(self.plan, name)
        raise AttributeError(f"a Report has no {name!r}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values on one level, for JSON: what the plan says included."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        del values["plan"]
        values["found"] = [{**asdict(one.damage), "fidelity": one.fidelity} for one in self.found]
        values["settings"] = asdict(self.settings)
        return values | {name: getattr(self.plan, name) for name in PLANNED}

    def __str__(self) -> str:
        (h, w), (oh, ow) = self.input_size, self.output_size
        several = f"{self.images} pictures, each " if self.images > 1 else ""
        if not self.tiles:
            return self.mask
        lines = [
            *([self.mask] if self.mask else []),
            f"{self.model}: {several}{w}x{h} -> {ow}x{oh} in {self.seconds:.1f} s"
            f"{self.plan.worked()}",
            f"{self.device}, {self.dtype}"
            + (f", {self.speed} ({self.passes})" if self.passes else "")
            + (f", peak {self.peak_bytes / 2**30:.2f} GiB" if self.peak_bytes else ""),
        ]
        if self.mode != "whole":
            lines[-1] += (
                f", {self.tiles} tiles of {self.tile[1]}x{self.tile[0]}, overlap {self.overlap}"
            )
            if self.seam_score is not None:
                lines[-1] += f", seam score {self.seam_score:.2f}"
        lines.append(str(self.settings))
        lines.append(
            f"reduced to the input's size: {self.lr_psnr:.1f} dB, mean colour difference "
            f"{self.delta_e:.2f} dE"
        )
        if self.licence:
            lines.append(f"licence of the model: {self.licence}")
        return "\n".join(lines + self.told_inputs() + self.events)

    def told_inputs(self) -> list[str]:
        """What was found in the inputs, in words: a line each, as long as they are few."""
        told = [str(one) for one in self.found]
        if len(set(told)) <= 1:
            return [f"input: {line}" for line in told[:1]]
        lines = [f"input {n}: {line}" for n, line in enumerate(told[:TOLD], 1)]
        if len(told) > TOLD:
            shares = [one.fidelity for one in self.found]
            lines.append(
                f"and {len(told) - TOLD} more inputs; fidelity {min(shares):.2f} to {max(shares):.2f}"
            )
        return lines

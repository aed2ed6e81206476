"""GenDR Upscale and Tiled GenDR: widgets become settings, b h w c becomes b c h w, and back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..gendr.fidelity import difference
from ..gendr.plan import Plan
from ..gendr.settings import BOUNDS, COLOR_FIXES, Settings
from . import host

DEFAULT = Settings()
# Invented detail is seldom more than a few hundredths; as it is, the map would look black.
DIFFERENCE_GAIN = 4

TOOLTIPS = {
    "image": "The picture or pictures to restore. Batches and video frames are taken one at a "
    "time. Any size; transparency is kept.",
    "model": "Comes from Load GenDR.",
    "scale": "How many times larger the result is, fractions too. 4 is what the model is made "
    "for; with 1 the size stays and the picture is only restored.",
    "color_fix": "Where colors come from. wavelet keeps the input's colors even in small areas. "
    "adain and lab match them over the whole picture: try one if wavelet leaves halos. none "
    "takes the model's own.",
    "detail": "How much the model adds. 1 is its own measure. Lower it if skin or foliage looks "
    "overdone; above 1 exaggerates; 0 adds nothing.",
    "fidelity": "How strictly the result, made small again, must equal the input. Raise it if "
    "small text or faces change their shape. On noisy or blurred pictures leave it at 0, or the "
    "damage comes back.",
    "mask": "Only white areas are restored, with a soft edge; the rest is enlarged in the plain "
    "way. Must have the picture's size.",
    "tile_size": "Side of a tile in pixels of the result. 0 plans it from free memory. Choose "
    "512 or 1024 if other nodes need the memory, or to compare machines.",
    "overlap": "How far tiles reach into each other, in pixels of the result. 0 plans it. Raise "
    "it if you can see where tiles meet.",
    "tile_batch": "Tiles computed at once. 0 plans it. Higher may be faster on a large card and "
    "always needs more memory.",
    "seamless": "For textures that repeat and for 360 degree panoramas: opposite edges will fit "
    "together. Leave it off for ordinary pictures.",
}


def _number(name: str, setting: str, default: float) -> tuple[str, dict[str, Any]]:
    """A number widget with the bounds that `gendr` enforces."""
    bound = BOUNDS[setting]
    kind = "INT" if isinstance(default, int) else "FLOAT"
    cast = int if kind == "INT" else float
    options = {
        "default": default,
        "min": cast(bound.minimum),
        "max": cast(bound.maximum),
        "step": cast(bound.step),
        "tooltip": TOOLTIPS[name],
    }
    return kind, options


def _common() -> dict[str, Any]:
    """What both nodes ask for, in the order of their widgets."""
    return {
        "image": ("IMAGE", {"tooltip": TOOLTIPS["image"]}),
        "model": ("GENDR_MODEL", {"tooltip": TOOLTIPS["model"]}),
        "scale": _number("scale", "scale", DEFAULT.scale),
        "color_fix": (
            list(COLOR_FIXES),
            {"default": DEFAULT.color_fix, "tooltip": TOOLTIPS["color_fix"]},
        ),
        "detail": _number("detail", "detail", DEFAULT.detail),
        "fidelity": _number("fidelity", "fidelity", DEFAULT.fidelity),
    }


class GenDRUpscale:
    """Restore and enlarge. What does not fit into memory is tiled by plan, without asking."""

    CATEGORY = "GenDR"
    FUNCTION = "upscale"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("image", "report")
    OUTPUT_TOOLTIPS = (
        "The restored picture.",
        "What was done: sizes, tiles, number format, time, memory, and how far the result, made "
        "small again, is from the input. Connect it to a Preview as Text node (older name: Preview "
        "Any) to read it.",
    )
    DESCRIPTION = (
        "Restores and enlarges pictures in one step. A picture that does not fit into memory is "
        "cut into tiles by itself."
    )
    SEARCH_ALIASES = ("super resolution", "upscale", "enlarge", "restore", "enhance", "gendr")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The order of the widgets is an API: append only."""
        return {
            "required": _common(),
            "optional": {"mask": ("MASK", {"tooltip": TOOLTIPS["mask"]})},
        }

    def upscale(
        self,
        image: Tensor,
        model: host.Model,
        scale: float,
        color_fix: str,
        detail: float,
        fidelity: float,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, str]:
        """Picture b h w c, widgets -> restored picture and report."""
        settings = Settings(scale=scale, color_fix=color_fix, detail=detail, fidelity=fidelity)
        result, report = restore(model, image.movedim(-1, 1), mask, settings)
        return host.output(result.movedim(1, -1)), report


class TiledGenDR:
    """The same with the tiles in one's own hand, and a map of what was invented."""

    CATEGORY = "GenDR"
    FUNCTION = "upscale"
    RETURN_TYPES = ("IMAGE", "STRING", "IMAGE")
    RETURN_NAMES = ("image", "report", "difference")
    OUTPUT_TOOLTIPS = (
        *GenDRUpscale.OUTPUT_TOOLTIPS,
        "Where detail was invented: bright where the result departs from the plainly enlarged "
        "input.",
    )
    DESCRIPTION = (
        "Restores and enlarges large pictures tile by tile, in bounded memory and without seams. "
        "Everything left at 0 is planned from the memory that is free."
    )
    SEARCH_ALIASES = ("tiled upscale", "4k upscale", "seamless texture", "low vram", "gendr")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The order of the widgets is an API: append only."""
        return {
            "required": {
                **_common(),
                "tile_size": _number("tile_size", "tile", DEFAULT.tile),
                "overlap": _number("overlap", "overlap", DEFAULT.overlap),
                "tile_batch": _number("tile_batch", "tile_batch", DEFAULT.tile_batch),
                "seamless": (
                    "BOOLEAN",
                    {"default": DEFAULT.seamless, "tooltip": TOOLTIPS["seamless"]},
                ),
            },
            "optional": {"mask": ("MASK", {"tooltip": TOOLTIPS["mask"]})},
        }

    def upscale(
        self,
        image: Tensor,
        model: host.Model,
        scale: float,
        color_fix: str,
        detail: float,
        fidelity: float,
        tile_size: int,
        overlap: int,
        tile_batch: int,
        seamless: bool,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, str, Tensor]:
        """Picture b h w c, widgets -> restored picture, report, difference map b h w 3."""
        settings = Settings(
            scale=scale,
            color_fix=color_fix,
            detail=detail,
            fidelity=fidelity,
            tile=tile_size,
            overlap=overlap,
            tile_batch=tile_batch,
            seamless=seamless,
        )
        pixels = image.movedim(-1, 1)
        result, report = restore(model, pixels, mask, settings)
        departed = torch.empty(len(result), *result.shape[-2:], 3)
        for n in range(len(result)):
            one = slice(n, n + 1)
            amount = difference(result[one], pixels[one]) * DIFFERENCE_GAIN
            departed[one] = amount.clamp(0, 1).movedim(1, -1)
        return host.output(result.movedim(1, -1)), report, host.output(departed)


def restore(
    model: host.Model, pixels: Tensor, mask: Tensor | None, settings: Settings
) -> tuple[Tensor, str]:
    """Pictures b c h w in [0, 1], any float type -> restored b c H W float32, and a report.

    Raises ValueError for what is no picture; the host's own exception when cancelled.
    """
    if pixels.ndim != 4 or 0 in pixels.shape:
        raise ValueError(
            "There is no picture to restore: the image input is an empty batch. Check that the "
            "node before this one finds its files."
        )

    height, width = pixels.shape[-2:]
    if mask is not None and tuple(mask.shape[-2:]) == (64, 64) != (height, width):
        raise ValueError(
            f"The mask is 64x64, the picture {width}x{height}: use a mask made for it; Load Image "
            "sends 64x64 for a picture without transparency: paint a mask in its mask editor, or "
            "unplug it."
        )

    def make_room(plan: Plan) -> int | None:
        host.bring_in(model, plan.bytes_needed)
        return host.free_bytes(model, loaded=True)

    with host.plain_errors():
        result, report = model.gendr.restore_with_report(
            pixels,
            mask=mask,
            progress=host.Progress(),
            cancelled=host.cancelled,
            device=host.run_device(model),
            free_bytes=host.free_bytes(model, loaded=False),
            make_room=make_room,
            is_oom=host.is_oom,
            **asdict(settings),
        )
    return result, str(report)

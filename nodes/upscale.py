"""GenDR Upscale and Tiled GenDR: widgets become settings, b h w c becomes b c h w, and back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..gendr.fidelity import difference
from ..gendr.plan import Plan
from ..gendr.settings import AUTO, BOUNDS, COLOR_FIXES, PRESETS, Settings
from . import host
from .size import SIZES, target
from .wires import checked_mask, checked_picture, checked_prompt

DEFAULT = Settings()
# `AUTO` as a number: the widget was a number before it had this default, and graphs hold numbers.
BY_PICTURE = -1.0
# Of the widgets that only count where `size_by` says so: what the number fields begin with.
SIDE, MEGAPIXELS, FRAME = 2048, 4.0, (1920, 1080)
# Place of the difference map among Tiled GenDR's outputs.
DIFFERENCE = 2
# What a person may look for, as of ComfyUI's own upscaling nodes and then what GenDR does besides.
SEARCH = (
    *("upscale", "upscaler", "upsc", "upscale image", "image upscale", "enlarge", "enlarge image"),
    *("super resolution", "superres", "hires", "increase resolution", "resize", "4k"),
    *("restore", "enhance", "denoise", "deblur", "sharpen", "remove jpeg artifacts"),
    *("video upscale", "upscale video", "face restore", "gendr"),
)
# Invented detail is seldom more than a few hundredths; as it is, the map would look black.
DIFFERENCE_GAIN = 4

TOOLTIPS = {
    "image": "The picture or pictures to restore. Batches and video frames are taken one at a "
    "time. Any size; transparency is kept.",
    "model": "From Load GenDR. With nothing connected GenDR-Tiny is used, which comes with the pack.",
    "scale": "How many times larger the result is, fractions too. 4 is what the model is made "
    "for; with 1 the size stays and the picture is only restored.",
    "color_fix": "Where colors come from. auto takes what the model is made for. wavelet keeps the "
    "input's colors even in small areas. adain and lab match them over the whole picture: try one if "
    "wavelet leaves halos. none takes the model's own.",
    "detail": "How much the model adds. 1 is its own measure. Lower it if skin or foliage looks "
    "overdone; above 1 exaggerates; 0 adds nothing.",
    "fidelity": "How strictly the result, made small again, must equal the input. -1 looks at each "
    "picture: clean ones are kept, noise, blur and compression are not. 1 if small text or faces "
    "change their shape; 0 takes all from the model.",
    "mask": "Only white areas are restored, gray ones in part; the rest is enlarged in the plain "
    "way. Any size with the picture's shape.",
    "size_by": "What sets the size of the result. scale: the scale above. long side, short side: "
    "side. megapixels: megapixels. width and height: as large as fits inside, shape kept.",
    "side": "Pixels of the result's long or short side. Counts where size by says so.",
    "megapixels": "Millions of pixels of the result. Counts where size by says megapixels.",
    "width": "Largest width of the result. Counts where size by says width and height.",
    "height": "Largest height of the result. Counts where size by says width and height.",
    "preset": "The kind of picture, for what is left at its default. auto looks at each one. "
    "generated keeps every pixel of drawings and rendered pictures, photo most of the grain, damaged "
    "nothing.",
    "positive": "A prompt, for models that read one: connect CLIP Text Encode with SD2.1's text "
    "encoder. With nothing connected the model's own prompt is used. GenDR-Tiny reads none.",
    "steady": "For frames of one clip, in order: what does not move is kept from flickering, and noise "
    "in it fades. Leave it off for a batch of unrelated pictures.",
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


def _required() -> dict[str, Any]:
    """What both nodes ask for, in the order of their widgets."""
    return {
        "image": ("IMAGE", {"tooltip": TOOLTIPS["image"]}),
        "scale": _number("scale", "scale", DEFAULT.scale),
        "color_fix": (
            list(COLOR_FIXES),
            {"default": DEFAULT.color_fix, "tooltip": TOOLTIPS["color_fix"]},
        ),
        "detail": _number("detail", "detail", DEFAULT.detail),
        "fidelity": _fidelity(),
    }


def _fidelity() -> tuple[str, dict[str, Any]]:
    """The number widget of `fidelity`, with one value more, below its bounds, which is the default."""
    kind, options = _number("fidelity", "fidelity", BY_PICTURE)
    return kind, options | {"min": BY_PICTURE}


def _optional() -> dict[str, Any]:
    """What both nodes can do without: the widgets among them came later than those above."""
    return {
        "model": ("GENDR_MODEL", {"tooltip": TOOLTIPS["model"]}),
        "mask": ("MASK", {"tooltip": TOOLTIPS["mask"]}),
        "size_by": (list(SIZES), {"default": SIZES[0], "tooltip": TOOLTIPS["size_by"]}),
        "side": _number("side", "long_side", SIDE),
        "megapixels": _number("megapixels", "megapixels", MEGAPIXELS),
        "width": _number("width", "long_side", FRAME[0]),
        "height": _number("height", "long_side", FRAME[1]),
        "preset": (list(PRESETS), {"default": DEFAULT.preset, "tooltip": TOOLTIPS["preset"]}),
        "positive": ("CONDITIONING", {"tooltip": TOOLTIPS["positive"]}),
        "steady": ("BOOLEAN", {"default": DEFAULT.steady, "tooltip": TOOLTIPS["steady"]}),
    }


class GenDRUpscale:
    """Restore and enlarge. What does not fit into memory is tiled by plan, without asking."""

    CATEGORY = "image/upscaling"
    FUNCTION = "upscale"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("image", "report")
    OUTPUT_TOOLTIPS = (
        "The restored picture.",
        "What was done: sizes, settings, tiles, number format, time, memory, and how far the "
        "result, made small again, is from the input. Connect it to a Preview as Text node (older "
        "name: Preview Any) to read it.",
    )
    DESCRIPTION = (
        "Restores and enlarges pictures in one step. A picture that does not fit into memory is "
        "cut into tiles by itself."
    )
    SEARCH_ALIASES = SEARCH

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The order of the widgets is an API: append only."""
        return {"required": _required(), "optional": _optional()}

    def upscale(
        self,
        image: Tensor,
        scale: float,
        color_fix: str,
        detail: float,
        fidelity: float,
        model: host.Model | None = None,
        mask: Tensor | None = None,
        preset: str = DEFAULT.preset,
        positive: Any = None,
        steady: bool = DEFAULT.steady,
        **size: Any,
    ) -> tuple[Tensor, str]:
        """Picture b h w c, widgets -> restored picture and report."""
        options = {
            "color_fix": color_fix,
            "detail": detail,
            "fidelity": fidelity,
            "preset": preset,
            "steady": steady,
        }
        pixels, settings = _read(image, options, scale=scale, **size)
        result, report = restore(model, pixels, mask, settings, positive)
        return host.output(result.movedim(1, -1)), report


class TiledGenDR:
    """The same with the tiles in one's own hand, and a map of what was invented."""

    CATEGORY = "image/upscaling"
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
    SEARCH_ALIASES = (
        *("tiled upscale", "upscale tiles", "large image upscale", "seamless texture", "low vram"),
        *SEARCH,
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The order of the widgets is an API: append only."""
        return {
            "required": {
                **_required(),
                "tile_size": _number("tile_size", "tile", DEFAULT.tile),
                "overlap": _number("overlap", "overlap", DEFAULT.overlap),
                "tile_batch": _number("tile_batch", "tile_batch", DEFAULT.tile_batch),
                "seamless": (
                    "BOOLEAN",
                    {"default": DEFAULT.seamless, "tooltip": TOOLTIPS["seamless"]},
                ),
            },
            "optional": _optional(),
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, unique_id: str | None = None, **inputs: Any) -> bool:
        """A result without the map is of no use once somebody takes the map."""
        return host.taken(unique_id, DIFFERENCE)

    def upscale(
        self,
        image: Tensor,
        scale: float,
        color_fix: str,
        detail: float,
        fidelity: float,
        tile_size: int,
        overlap: int,
        tile_batch: int,
        seamless: bool,
        model: host.Model | None = None,
        mask: Tensor | None = None,
        positive: Any = None,
        unique_id: str | None = None,
        preset: str = DEFAULT.preset,
        steady: bool = DEFAULT.steady,
        **size: Any,
    ) -> tuple[Tensor, str, Tensor | None]:
        """Picture b h w c, widgets -> restored picture, report, difference map b h w 3.

        The map is made only where it is taken, and holds one plane that stands for all three.
        """
        options = {
            "color_fix": color_fix,
            "detail": detail,
            "fidelity": fidelity,
            "preset": preset,
            "steady": steady,
            "tile": tile_size,
            "overlap": overlap,
            "tile_batch": tile_batch,
            "seamless": seamless,
        }
        pixels, settings = _read(image, options, scale=scale, **size)
        result, report = restore(model, pixels, mask, settings, positive)
        departed = None
        if host.taken(unique_id, DIFFERENCE):
            departed = torch.empty(len(result), *result.shape[-2:], 1)
            for n in range(len(result)):
                one = slice(n, n + 1)
                amount = difference(result[one], pixels[one]) * DIFFERENCE_GAIN
                departed[one] = amount.clamp(0, 1).movedim(1, -1)
            departed = host.output(departed).expand(-1, -1, -1, 3)
        return host.output(result.movedim(1, -1)), report, departed


def _read(
    image: Tensor,
    options: dict[str, Any],
    *,
    scale: float,
    size_by: str = SIZES[0],
    side: int = SIDE,
    megapixels: float = MEGAPIXELS,
    width: int = FRAME[0],
    height: int = FRAME[1],
) -> tuple[Tensor, Settings]:
    """The picture as b c h w, and the widgets as settings for it."""
    pixels = checked_picture(image)
    size = target(
        size_by,
        picture=tuple(pixels.shape[-2:]),
        scale=scale,
        side=side,
        megapixels=megapixels,
        width=width,
        height=height,
    )
    if options["fidelity"] < 0:
        options = options | {"fidelity": AUTO}
    return pixels, Settings(**size, **options)


def restore(
    model: host.Model | None,
    pixels: Tensor,
    mask: Tensor | None,
    settings: Settings,
    positive: Any = None,
) -> tuple[Tensor, str]:
    """Pictures b c h w in [0, 1], any float type -> restored b c H W float32, and a report.

    model: None = the embedded one. positive: a CONDITIONING, None = the model's own prompt. Raises ValueError for a mask that does not fit; the host's own
    exception when cancelled.
    """
    mask, prompt = checked_mask(mask, pixels), checked_prompt(positive)
    model = host.embedded() if model is None else model

    def make_room(plan: Plan) -> int | None:
        host.bring_in(model, plan.bytes_needed)
        return host.free_bytes(model, loaded=True)

    with host.plain_errors():
        result, report = model.gendr.restore_with_report(
            pixels,
            mask=mask,
            prompt=prompt,
            progress=host.Progress(),
            cancelled=host.cancelled,
            device=host.run_device(model),
            free_bytes=host.free_bytes(model, loaded=False),
            make_room=make_room,
            is_oom=host.is_oom,
            **asdict(settings),
        )
    return result, str(report)

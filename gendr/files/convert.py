"""A public one-step restorer and its base become one GenDR file, merged tensor by tensor.

Neither the base nor the result is ever whole in memory: a full-size conversion needs well below 4 GB.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..devices import TORCH_DTYPES
from ..networks.onestep import StepConfig
from . import base as bases
from . import prompts, sources, stored
from .header import Header
from .reading import naming
from .shapes import CheckpointError
from .sources import Source

# (what is done now, bytes written, bytes in all)
OnProgress = Callable[[str, int, int], None]


def convert(
    path: Path,
    base: Path,
    output: Path,
    *,
    prompt: str = "",
    embeds: Path | None = None,
    semantic: bool = True,
    coeff_t: int | None = None,
    dtype: str = "fp16",
    accepted: Callable[[str, str], bool],
    progress: OnProgress = lambda *_: None,
) -> Header:
    """Write a GenDR checkpoint made of an adapter and its base; returns its header.

    prompt: the fixed prompt, encoded by the base's text encoder, or found in the file `embeds`.
    semantic, coeff_t: see `sources.read`. dtype: of the written tensors; sums are in float32.
    accepted: asked with a model's name and its terms where it has any.

    CheckpointError with a sentence for what can't be converted; then, and when interrupted, nothing
    is left behind.
    """
    progress("reading", 0, 1)
    with naming(path):
        source = sources.read(path, semantic=semantic, coeff_t=coeff_t)
    restorer = source.restorer
    if restorer.terms and not accepted(restorer.name, restorer.terms):
        raise CheckpointError(
            f"{restorer.name}'s terms were not accepted: read them, then add --accept-licence"
        )
    with naming(base):
        ground = bases.read(base)
    try:
        for part, change in (("unet", source.unet), ("vae", source.vae)):
            shapes = inside(ground.shapes, part)
            change.check(shapes)
            if source.whole and (lacking := shapes.keys() - change.replaced.keys()):
                raise ValueError(f"{sorted(lacking)[0]} of the {part} is missing in it")
    except ValueError as error:
        raise CheckpointError(
            f"{path.name} and {base.name} don't belong together: {error}"
        ) from None
    progress("encoding the prompt", 0, 1)
    positive = prompts.from_file(embeds, prompt) if embeds else prompts.encode(base, prompt)
    if positive.shape[-1] != ground.unet.cross_attention_dim:
        raise CheckpointError(
            f"the embedding of the prompt is {positive.shape[-1]} wide, {base.name} reads "
            f"{ground.unet.cross_attention_dim}: encode it with the base's own text encoder"
        )
    progress("hashing", 0, 1)
    config = StepConfig(unet=ground.unet, vae=ground.vae, **restorer.constants())
    header = Header(
        config=config,
        name=restorer.name,
        licence=f"{restorer.licence} ({restorer.name}) + {bases.LICENCE}",
        bases=ground.facts(),
        prompts={"positive": prompt},
        tile=restorer.tile,
        color_fix=restorer.color_fix,
        precision=restorer.precision,
        min_side=restorer.min_side,
        source={
            "file": path.resolve().name,
            "sha256": sources.digest(path),
            "home": restorer.home,
            **source.notes,
        },
        dtype=dtype,
    )
    shapes = {**ground.shapes, "embeds.positive": tuple(positive.shape)}
    kind = TORCH_DTYPES[dtype]
    total = sum(math.prod(shape) for shape in shapes.values()) * kind.itemsize
    stored.write(
        output,
        shapes,
        lambda name: positive if name == "embeds.positive" else merged(source, ground, name),
        kind,
        header,
        done=lambda written: progress("merging", written, total),
    )
    return header


def merged(source: Source, ground: bases.Base, name: str) -> Tensor:
    """One tensor of the result."""
    part, inner = name.split(".", 1)
    change = source.unet if part == "unet" else source.vae
    return change.apply(inner, ground.read(name))


def inside(shapes: dict[str, tuple[int, ...]], part: str) -> dict[str, tuple[int, ...]]:
    """The shapes of one network, under its own names."""
    prefix = f"{part}."
    return {k.removeprefix(prefix): v for k, v in shapes.items() if k.startswith(prefix)}

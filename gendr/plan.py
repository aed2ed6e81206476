"""What a run will do and what it will need, before it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from .networks.blocks import PHASE_POSITIONS
from .networks.onestep import StepConfig
from .resize import up_to_multiple
from .settings import Settings
from .tiles import WHOLE, Grid, fit_grid, one_tile

# A strip of one pixel by a thousand would otherwise be enlarged to half a million pixels' width.
LONGEST = 4
# Share of the free memory that a plan may fill: estimates miss, and others allocate too.
BUDGET = 0.8
# Default share of a tile that its neighbour sees as well, and its largest value in pixels.
OVERLAP_SHARE, OVERLAP_LIMIT = 0.25, 128
# The autoencoder's attention grows with the square of the picture; above 2048 px it costs more
# than everything else, and the whole step is tiled instead.
ATTENTION_POSITIONS = 65536
# Tensors of one resolution that live at once in a residual block: eager, and by strips.
EAGER_TENSORS, STRIP_TENSORS = 3.25, 2.05
# Strips are of bounded size; so is what one of them allocates.
STRIP_EXTRA = 400 * 2**20
# Bytes per pair of channels while the parity kernels of an enlargement are made.
PHASE_BYTES = 200
# float32 planes of the picture that lie around a run: input, enlarged, result, blend, colour fix.
PLANES = 6
# Tiles in one pass, where memory allows and the device gains from it; more of them where the number
# of launches doesn't count any more.
BATCH, FEW_LAUNCHES_BATCH = 4, 8
# float32 pictures of a pass that wait beside it: what a graph reads and writes, and what is on its
# way to and from the one under way.
STAGED = 6


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run as it will go. Sizes are (height, width) in pixels of the output.

    work_size: what the network restores; larger than the output where the model wants that, and
    then reduced to it. padded_size and grid belong to it.
    mode: "whole" (one pass), "latent_tiles" (the autoencoder over the whole picture, the UNet in
    tiles of the latent) or "tiles" (encode, step and decode in tiles).
    grid: the tiles, in pixels of the padded output in every mode; one tile where all goes whole.
    strips: the autoencoder goes over what it is given in strips of rows.
    on_device: the whole picture lies on the device, and not in the host's memory.
    margin: how far a repeating picture is continued past its edges.
    """

    input_size: tuple[int, int]
    output_size: tuple[int, int]
    work_size: tuple[int, int]
    padded_size: tuple[int, int]
    images: int
    mode: str
    grid: Grid
    tile_batch: int
    strips: bool
    margin: int
    bytes_needed: int
    free_bytes: int
    dtype: str
    device: str
    speed: str = "eager"
    on_device: bool = False

    @property
    def tiles(self) -> int:
        """How many there are."""
        return len(self.grid)

    @property
    def tile(self) -> tuple[int, int]:
        """Their size."""
        return self.grid.tile_height, self.grid.tile_width

    @property
    def overlap(self) -> int:
        """What neighbours share at least, in pixels."""
        return self.grid.overlap

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        del values["grid"]
        return {**values, "tiles": self.tiles, "tile": self.tile, "overlap": self.overlap}

    def worked(self) -> str:
        """The size that the network works at, where it is not the result's."""
        (h, w), work = self.output_size, self.work_size
        return "" if work == (h, w) else f", computed at {work[1]}x{work[0]}"

    def __str__(self) -> str:
        (h, w), (oh, ow) = self.input_size, self.output_size
        how = {
            "whole": "in one pass",
            "latent_tiles": f"autoencoder whole, UNet in {self.tiles} tiles",
            "tiles": f"in {self.tiles} tiles",
        }[self.mode]
        if self.mode != "whole":
            how += f" of {self.tile[1]}x{self.tile[0]}, overlap {self.overlap}"
        several = f"{self.images} pictures, each " if self.images > 1 else ""
        return (
            f"{several}{w}x{h} -> {ow}x{oh} ({oh * ow / 1e6:.1f} MP), {how}{self.worked()}; about "
            f"{self.bytes_needed / 2**30:.1f} of {self.free_bytes / 2**30:.1f} GiB free on "
            f"{self.device}, {self.dtype}" + ("" if self.speed == "eager" else f", {self.speed}")
        )


def autoencoder_bytes(
    config: StepConfig, height: int, width: int, *, bytes_each: int, strips: bool
) -> int:
    """Peak of encode and decode: the widest level times the tensors of it that live at once."""
    widths, patch = config.vae.block_out_channels, config.vae.patch_size
    widest = max(
        wide / (patch * 2**level) ** 2 for level, wide in enumerate((*widths[1:], widths[-1]))
    )
    tensors = STRIP_TENSORS if strips else EAGER_TENSORS
    peak = widest * tensors * height * width * bytes_each
    return int(peak + (STRIP_EXTRA if strips else 0))


def unet_bytes(config: StepConfig, height: int, width: int, bytes_each: int) -> int:
    """Peak of the UNet on the latent of height x width pixels: skips and the widest feed-forward."""
    c = config.unet
    last = len(c.block_out_channels) - 1
    skips = working = 0.0
    for level, wide in enumerate(c.block_out_channels):
        share = 1 / 4**level
        below = c.block_out_channels[min(level + 1, last)]
        skips += wide * (c.layers_per_block + 1) * share
        # A transformer's feed-forward holds 20 widths; the first block of an up level works on a
        # concatenation while the level's input stays alive.
        block = 3 * (wide + below) + below
        working = max(working, max(20 * wide if c.attention[level] else 0, block) * share)
    positions = height * width / config.vae.factor**2
    at = positions * bytes_each
    # Parity kernels of the widest enlargement, made per call and let go of.
    kernels = max(
        PHASE_BYTES * wide**2 if level and positions / 4**level >= PHASE_POSITIONS else 0
        for level, wide in enumerate(c.block_out_channels)
    )
    return int(max((skips + working) * at, kernels + skips * at))


def make(
    config: StepConfig,
    settings: Settings,
    height: int,
    width: int,
    *,
    images: int,
    train_tile: int,
    free: int,
    bytes_each: int,
    dtype: str,
    device: str,
    batched: bool,
    guidance: float,
    min_side: int = 0,
    speed: str = "eager",
    on_device: bool = False,
) -> Plan:
    """The plan for pictures of height x width.

    on_device: whether the picture should lie on the device; it goes back to the host where
    that leaves too little for the tiles.
    train_tile: edge in pixels that the model was trained on. bytes_each: of one activation.
    batched: whether the device gains from several tiles in one pass.
    min_side: the shorter side that the model wants at least.
    """
    output = settings.target_size(height, width)
    work = at_least(output, min_side)
    m = config.multiple
    target = up_to_multiple(settings.tile or train_tile, m)
    overlap = settings.overlap or min(OVERLAP_LIMIT, int(target * OVERLAP_SHARE))
    overlap = up_to_multiple(overlap, config.vae.factor)
    # A picture that repeats is continued past its edges, and its end fades into its start.
    margin = overlap if settings.seamless else 0
    padded = tuple(up_to_multiple(side + 2 * margin, m) for side in work)
    planes = PLANES * 3 * 4 * padded[0] * padded[1]
    if on_device and not fits_beside(config, planes, free, target, bytes_each):
        # Then it takes nothing of the device's memory.
        on_device, planes = False, 0
    budget = max(0, int(free * BUDGET) - planes)
    passes = 2 if guidance > 1 else 1
    fast = speed != "eager"

    def needed(h: int, w: int, batch: int, strips: bool) -> int:
        autoencoder = autoencoder_bytes(config, h, w, bytes_each=bytes_each, strips=strips)
        staged = STAGED * 3 * 4 * h * w * batch if fast else 0
        unet = unet_bytes(config, h, w, bytes_each) * passes
        return max(autoencoder, unet) * batch + staged

    common = Plan(
        input_size=(height, width),
        output_size=output,
        work_size=work,
        padded_size=padded,
        images=images,
        mode="whole",
        grid=one_tile(*padded),
        tile_batch=1,
        strips=False,
        margin=margin,
        bytes_needed=0,
        free_bytes=free,
        dtype=dtype,
        device=device,
        speed=speed,
        on_device=on_device,
    )
    limit = WHOLE * target
    if max(padded) <= limit or (not settings.tile and padded[0] * padded[1] <= limit * limit):
        for strips in (False, True):
            if (need := needed(*padded, 1, strips)) <= budget:
                return replace(common, strips=strips, bytes_needed=need + planes)
    f = config.vae.factor
    attention = config.vae.mid_attention
    if not settings.tile and (
        not attention or padded[0] * padded[1] // f**2 <= ATTENTION_POSITIONS
    ):
        grid = fit_grid(*padded, target, overlap, m)
        tile = grid.tile_height, grid.tile_width
        most = settings.tile_batch or (FEW_LAUNCHES_BATCH if fast else 1)

        def both(batch: int, strips: bool) -> int:
            autoencoder = autoencoder_bytes(config, *padded, bytes_each=bytes_each, strips=strips)
            staged = STAGED * 3 * 4 * padded[0] * padded[1] if fast else 0
            return max(autoencoder, unet_bytes(config, *tile, bytes_each) * passes * batch) + staged

        batch = even(len(grid), most) if fast else 1
        while batch > 1 and both(batch, True) > budget:
            batch -= 1
        # Strips are many small launches: where those are what counts, only if memory asks for them.
        strips = not fast or both(batch, False) > budget
        need = both(batch, strips)
        if need <= budget and len(grid) > 1:
            return replace(
                common,
                mode="latent_tiles",
                grid=grid,
                tile_batch=batch,
                strips=strips,
                bytes_needed=need + planes,
            )
    while True:
        overlap = min(overlap, max(0, target - m))
        grid = fit_grid(*padded, target, overlap, m)
        tile = grid.tile_height, grid.tile_width
        need = needed(*tile, 1, False)
        if need <= budget or settings.tile or target <= m:
            break
        target = up_to_multiple(target // 2, m)
        overlap = min(overlap, up_to_multiple(target * OVERLAP_SHARE, f))
    if fast and not settings.tile_batch:
        batch = even(len(grid), FEW_LAUNCHES_BATCH if batched else 1)
    else:
        batch = settings.tile_batch or (BATCH if batched else 1)
    while batch > 1 and (batch > len(grid) or needed(*tile, batch, False) > budget):
        batch -= 1
    return replace(
        common,
        mode="tiles" if len(grid) > 1 else "whole",
        grid=grid if len(grid) > 1 else one_tile(*padded),
        tile_batch=batch,
        bytes_needed=needed(*tile, batch, False) + planes,
    )


def at_least(size: tuple[int, int], side: int) -> tuple[int, int]:
    """A size of the same aspect whose shorter side is at least `side`.

    Of a very long picture it is less, so that the longer side is at most `LONGEST` times that.
    """
    factor = min(side / min(size), LONGEST * side / max(size))
    return tuple(round(length * factor) for length in size) if factor > 1 else size


def even(tiles: int, most: int) -> int:
    """Tiles per pass, at most so many, that leave no rest, or as small a one as can be.

    A rest is a shape of its own, recorded or compiled for a single pass.
    """
    most = min(tiles, most)
    whole = max(n for n in range(1, most + 1) if tiles % n == 0)
    return whole if 3 * whole >= most else math.ceil(tiles / math.ceil(tiles / most))


def fits_beside(config: StepConfig, planes: int, free: int, target: int, bytes_each: int) -> bool:
    """Whether the planes of a whole picture leave room for one tile of the wanted size."""
    tile = max(
        autoencoder_bytes(config, target, target, bytes_each=bytes_each, strips=False),
        unet_bytes(config, target, target, bytes_each),
    )
    return planes + tile <= int(free * BUDGET)

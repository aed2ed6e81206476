"""What a run will do and what it will need, before it runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from .networks.blocks import PHASE_POSITIONS
from .networks.onestep import StepConfig
from .resizing import up_to_multiple
from .settings import BOUNDS, TARGETS, Settings
from .tiles import WHOLE, Grid, fit_grid, one_tile

Size = tuple[int, int]

# A strip of one pixel by a thousand would otherwise be enlarged to half a million pixels' width.
LONGEST = 4
# Share of the memory beside whole pictures that tiles may fill: estimates miss, and others allocate.
BUDGET = 0.8
# Default share of a tile that its neighbour sees as well, and its largest value in pixels.
OVERLAP_SHARE, OVERLAP_LIMIT = 0.25, 128
# The autoencoder's attention grows with the square of the picture; above 2048 px it costs more
# than everything else, and the whole step is tiled instead.
ATTENTION_POSITIONS = 65536
# Memory never makes tiles smaller than this many pixels: below it they cost more than they save, and
# the network sees too little.
LEAST_TILE = 128
# Tensors of one resolution that live at once in a residual block: eager, and by strips.
EAGER_TENSORS, STRIP_TENSORS = 3.25, 2.05
# Strips are of bounded size; so is what one of them allocates.
STRIP_EXTRA = 400 * 2**20
# Bytes per pair of channels while the parity kernels of an enlargement are made.
PHASE_BYTES = 200
# float32 pictures of the result's size that lie around the tiles: enlarged, result, blend, colour
# fix; more with back-projection. And of the input's size, where both are compared.
PLANES, FIDELITY_PLANES, INPUT_PLANES = 5.5, 6.2, 4
# Of the result's size where a mask chooses a part: enlarged, result and the mask's weight. The part
# has a plan of its own.
MASK_PLANES = 2.4
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
    bytes_needed: on the device. host_bytes: in main memory beside it, for whole pictures.
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
    host_bytes: int
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
        h, w = self.work_size
        return "" if self.work_size == self.output_size else f", computed at {w}x{h}"

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
    # Parity kernels of the widest enlargement, made and freed per call.
    kernels = max(
        PHASE_BYTES * wide**2 if level and positions / 4**level >= PHASE_POSITIONS else 0
        for level, wide in enumerate(c.block_out_channels)
    )
    return int(max((skips + working) * at, kernels + skips * at))


class NotEnoughMemory(ValueError):
    """Pictures that don't fit into main memory, whatever the tiles; the message says what would."""


def make(config: StepConfig, settings: Settings, height: int, width: int, **facts: Any) -> Plan:
    """The plan for pictures of height x width. facts: the other fields of `Case`."""
    return Case(config=config, settings=settings, height=height, width=width, **facts).made()


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a plan goes by. Each mode is a method that gives a plan where that mode is possible.

    train_tile: edge in pixels that the model was trained on. free: bytes on the device.
    bytes_each: of one activation. batched: whether the device gains from several tiles in one pass.
    on_device: whether the picture should lie on the device; it goes back to the host where that
    leaves too little for the tiles. min_side: the shorter side that the model wants at least.
    main_memory: bytes free there, where the device has memory of its own; None = unknown.
    masked: whether a mask chooses a part; then this is about what lies around that part.
    """

    config: StepConfig
    settings: Settings
    height: int
    width: int
    images: int
    train_tile: int
    free: int
    bytes_each: int
    dtype: str
    device: str
    batched: bool
    guidance: float
    min_side: int = 0
    speed: str = "eager"
    on_device: bool = False
    main_memory: int | None = None
    masked: bool = False

    @property
    def multiple(self) -> int:
        """Edges of tiles and of the padded picture are multiples of this many pixels."""
        return self.config.multiple

    @property
    def fast(self) -> bool:
        """Whether launches cost next to nothing, and tiles wait beside a pass."""
        return self.speed != "eager"

    @cached_property
    def output(self) -> tuple[int, int]:
        """Size of the result."""
        return self.settings.target_size(self.height, self.width)

    @cached_property
    def work(self) -> tuple[int, int]:
        """Size that the network restores."""
        return at_least(self.output, self.min_side)

    @cached_property
    def target(self) -> int:
        """Edge of a tile, as asked for or as the model knows it."""
        return up_to_multiple(self.settings.tile or self.train_tile, self.multiple)

    @cached_property
    def overlap(self) -> int:
        """What neighbours share."""
        asked = self.settings.overlap or min(OVERLAP_LIMIT, int(self.target * OVERLAP_SHARE))
        return up_to_multiple(asked, self.config.vae.factor)

    @property
    def margin(self) -> int:
        """A picture that repeats is continued past its edges, and its end fades into its start."""
        return self.overlap if self.settings.seamless else 0

    @cached_property
    def padded(self) -> tuple[int, int]:
        """Size of what the network sees."""
        return tuple(up_to_multiple(n + 2 * self.margin, self.multiple) for n in self.work)

    @property
    def shared(self) -> bool:
        """Whether the device computes in main memory."""
        return self.device.partition(":")[0] in ("cpu", "mps")

    @cached_property
    def result_bytes(self) -> int:
        """Of one result."""
        return 3 * 4 * self.output[0] * self.output[1]

    @cached_property
    def picture_bytes(self) -> int:
        """Of whole pictures while one is restored: what no tile makes smaller."""
        inputs = INPUT_PLANES * self.height * self.width
        if self.masked:
            return int(3 * 4 * (MASK_PLANES * self.output[0] * self.output[1] + inputs))
        planes = FIDELITY_PLANES if self.settings.fidelity else PLANES
        return int(3 * 4 * (planes * self.padded[0] * self.padded[1] + inputs))

    @cached_property
    def beside(self) -> bool:
        """Whether whole pictures lie on a device of its own memory, beside its tiles."""
        square = (self.target, self.target)
        return (
            self.on_device
            and not self.shared
            and self.cost(square, square) <= (self.free - self.picture_bytes) * BUDGET
        )

    @property
    def on_device_bytes(self) -> int:
        """Of whole pictures in the memory in which tiles are computed."""
        others = (self.images - 1) * self.result_bytes if self.shared else 0
        return self.picture_bytes + others if self.shared or self.beside else 0

    @property
    def host_bytes(self) -> int:
        """Of whole pictures in main memory, where tiles are computed elsewhere."""
        if self.shared:
            return 0
        results = self.images * self.result_bytes
        return results if self.beside else self.picture_bytes + results - self.result_bytes

    @property
    def budget(self) -> int:
        """Bytes for tiles."""
        return max(0, int((self.free - self.on_device_bytes) * BUDGET))

    @cached_property
    def least(self) -> int:
        """Edge of the smallest tiles that a lack of memory leads to."""
        return min(self.target, up_to_multiple(LEAST_TILE, self.multiple))

    @property
    def main_memory_needed(self) -> int:
        """At least so much of it is needed, whatever the tiles."""
        if not self.shared:
            return self.host_bytes
        tile = tuple(min(self.least, side) for side in self.padded)
        return self.on_device_bytes + self.cost(tile, tile)

    @property
    def main_memory_free(self) -> int | None:
        return self.free if self.shared else self.main_memory

    @property
    def fits(self) -> bool:
        """Whether there is main memory for it. A card's own is a matter of the tiles."""
        free = self.main_memory_free
        return free is None or self.main_memory_needed <= free

    def shortage(self) -> str:
        """What is needed, what is free, and what would fit."""
        (height, width), free = self.output, self.main_memory_free or 0
        several = f"{self.images} pictures of " if self.images > 1 else ""
        text = (
            f"{several}{self.width}x{self.height} enlarged to {width}x{height} "
            f"({height * width / 1e6:.1f} MP) take about {gib(self.main_memory_needed)} GiB of main "
            f"memory, and {gib(free)} GiB are free: "
        )
        fewer = "fewer pictures at once, " if self.images > 1 else ""
        for scale in self.smaller_scales():
            settings = replace(self.settings, scale=scale, **dict.fromkeys(TARGETS))
            if (case := replace(self, settings=settings)).fits:
                h, w = case.output
                return text + (
                    f"choose {fewer}scale {scale:g} ({w}x{h}) or less, or close other programs"
                )
        return text + (
            f"{fewer}even scale 1 does not fit; use a smaller picture, or close other programs"
        )

    def smaller_scales(self) -> Iterator[float]:
        """Factors below the one asked for, largest first, in a widget's steps."""
        step = BOUNDS["scale"].step
        factor = max(self.output) / max(self.height, self.width)
        for n in range(math.ceil((factor - 1) / step) - 1, -1, -1):
            yield round(1 + n * step, 2)

    def cost(self, seen: Size, tile: Size, batch: int = 1, strips: bool = False) -> int:
        """Peak bytes of the autoencoder over `seen` and the UNet over `batch` tiles of it.

        Where both see the same, the autoencoder gets as many of it.
        """
        config, each = self.config, self.bytes_each
        pictures = batch if seen == tile else 1
        autoencoder = autoencoder_bytes(config, *seen, bytes_each=each, strips=strips) * pictures
        unet = unet_bytes(config, *tile, each) * batch * (2 if self.guidance > 1 else 1)
        # A device of its own memory holds what it is given, too.
        staged = (STAGED if self.fast else 0) + (0 if self.shared else 1)
        return max(autoencoder, unet) + staged * 3 * 4 * seen[0] * seen[1] * pictures

    def expect_memory(self) -> None:
        """Raises `NotEnoughMemory` where not even the smallest tiles fit."""
        if not self.fits:
            raise NotEnoughMemory(self.shortage())

    def made(self) -> Plan:
        """The plan. Raises `NotEnoughMemory`."""
        self.expect_memory()
        return self.whole() or self.latent_tiles() or self.in_tiles()

    def plan(self, mode: str, grid: Grid, *, batch: int, strips: bool, cost: int) -> Plan:
        return Plan(
            input_size=(self.height, self.width),
            output_size=self.output,
            work_size=self.work,
            padded_size=self.padded,
            images=self.images,
            mode=mode,
            grid=grid,
            tile_batch=batch,
            strips=strips,
            margin=self.margin,
            bytes_needed=cost + self.on_device_bytes,
            host_bytes=self.host_bytes,
            free_bytes=self.free,
            dtype=self.dtype,
            device=self.device,
            speed=self.speed,
            on_device=self.beside,
        )

    def whole(self) -> Plan | None:
        """One pass over everything, for what is not much larger than a tile."""
        limit, area = WHOLE * self.target, self.padded[0] * self.padded[1]
        if max(self.padded) > limit and (self.settings.tile or area > limit * limit):
            return None
        for strips in (False, True):
            cost = self.cost(self.padded, self.padded, strips=strips)
            if cost <= self.budget:
                grid = one_tile(*self.padded)
                return self.plan("whole", grid, batch=1, strips=strips, cost=cost)
        return None

    def latent_tiles(self) -> Plan | None:
        """The autoencoder over everything: no seams from it, where it can see so much at once."""
        positions = self.padded[0] * self.padded[1] // self.config.vae.factor**2
        attention = self.config.vae.mid_attention and positions > ATTENTION_POSITIONS
        if self.settings.tile or attention:
            return None
        grid = fit_grid(*self.padded, self.target, self.overlap, self.multiple)
        tile = grid.tile_height, grid.tile_width
        most = self.settings.tile_batch or FEW_LAUNCHES_BATCH
        batch = even(len(grid), most) if self.fast else 1
        while batch > 1 and self.cost(self.padded, tile, batch, True) > self.budget:
            batch -= 1
        # Strips are many small launches: where those are what counts, only if memory asks for them.
        strips = not self.fast or self.cost(self.padded, tile, batch) > self.budget
        cost = self.cost(self.padded, tile, batch, strips)
        if cost > self.budget or len(grid) == 1:
            return None
        return self.plan("latent_tiles", grid, batch=batch, strips=strips, cost=cost)

    def in_tiles(self) -> Plan:
        """Everything in tiles, of half the edge while that is too much, down to the least."""
        m, target, overlap = self.multiple, self.target, self.overlap
        while True:
            overlap = min(overlap, max(0, target - m))
            grid = fit_grid(*self.padded, target, overlap, m)
            tile = grid.tile_height, grid.tile_width
            if self.cost(tile, tile) <= self.budget or self.settings.tile or target <= self.least:
                break
            target = max(self.least, up_to_multiple(target // 2, m))
            overlap = min(overlap, up_to_multiple(target * OVERLAP_SHARE, self.config.vae.factor))
        if self.fast and not self.settings.tile_batch:
            batch = even(len(grid), FEW_LAUNCHES_BATCH if self.batched else 1)
        else:
            batch = self.settings.tile_batch or (BATCH if self.batched else 1)
        while batch > 1 and (batch > len(grid) or self.cost(tile, tile, batch) > self.budget):
            batch -= 1
        cost = self.cost(tile, tile, batch)
        if len(grid) == 1:
            return self.plan("whole", one_tile(*self.padded), batch=1, strips=False, cost=cost)
        return self.plan("tiles", grid, batch=batch, strips=False, cost=cost)


def at_least(size: Size, side: int) -> Size:
    """A size of the same aspect whose shorter side is at least `side`.

    Of a very long picture it is less, so that the longer side is at most `LONGEST` times that.
    """
    factor = min(side / min(size), LONGEST * side / max(size))
    return tuple(round(length * factor) for length in size) if factor > 1 else size


def even(tiles: int, most: int) -> int:
    """Batch size up to `most` that divides the tile count, or else batches as equal as possible.

    A smaller last batch is a shape of its own, recorded or compiled for a single pass.
    """
    most = min(tiles, most)
    whole = max(n for n in range(1, most + 1) if tiles % n == 0)
    return whole if 3 * whole >= most else math.ceil(tiles / math.ceil(tiles / most))


def gib(count: int) -> str:
    return f"{count / 2**30:.1f}"

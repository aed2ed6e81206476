"""Tiles that fit the picture, and their seamless blend. Knows no model: a tile is a picture too."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .resizing import up_to_multiple

# A tile function gives its result, or, where a device still works on it, what waits for it.
Fn = Callable[[Tensor], Tensor | Callable[[], Tensor]]

# A picture this much larger than the tile asked for still goes whole: two tiles would cost more.
WHOLE = 1.25
# Tiles may be this much smaller than asked for, where that leaves less to compute.
SMALLEST = 0.75
# The outer 1/MARGIN of an overlap has weight 0: only the neighbour counts there.
MARGIN = 8
# Share of their edge, one in so many, that the parts of a tile too large for the memory share.
RECOVERY_OVERLAP = 6
# How far from a seam the ordinary gradients are taken: beyond what a decoder smears, still in the
# same place of the picture.
SEAM_NEAR, SEAM_FAR = 4, 16
# Half a step of 8 bits: a gradient below it is invisible, so a flat picture has no seams.
SEAM_FLOOR = (0.5 / 255) ** 2
# The input has an edge of its own at a border where it changes so many times as much as beside it.
SEAM_EDGE = 4.0


class Box(NamedTuple):
    """A part of a picture. A tile's bottom and right may run past the edge of a torus, and start over."""

    top: int
    left: int
    bottom: int
    right: int

    def cut(self, picture: Tensor) -> Tensor:
        """The part of ... h w inside, as a view."""
        return picture[..., self.top : self.bottom, self.left : self.right]


@dataclass(frozen=True)
class Grid:
    """Equal tiles that cover height x width; neighbours share at least `overlap` pixels."""

    height: int
    width: int
    tile_height: int
    tile_width: int
    overlap: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    wrap: bool

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def boxes(self) -> Iterator[Box]:
        """The tiles in the order in which they run: row by row."""
        for top in self.tops:
            for left in self.lefts:
                yield Box(top, left, top + self.tile_height, left + self.tile_width)

    def reduced(self, factor: int) -> Grid:
        """The same grid over a picture reduced `factor` times, such as its latent."""
        sides = self.height, self.width, self.tile_height, self.tile_width, self.overlap
        if any(n % factor for n in (*sides, *self.tops, *self.lefts)):
            raise ValueError(f"the grid does not lie on multiples of {factor}: {self}")
        tops, lefts = (tuple(n // factor for n in starts) for starts in (self.tops, self.lefts))
        return Grid(*(n // factor for n in sides), tops, lefts, self.wrap)


NO_TILES = Grid(0, 0, 0, 0, 0, (), (), False)


def fit_grid(
    height: int, width: int, tile: int, overlap: int, multiple: int, wrap: bool = False
) -> Grid:
    """The grid near the target edge `tile` that computes the fewest pixels.

    height, width: the padded picture's, multiples of `multiple`, as the tiles' edges will be.
    Edges are at most `tile`, or the side itself up to 1.25 times as long, and seldom below
    0.75 times. Tiles are spread evenly and the last one ends flush with the edge: no slivers. They
    start at multiples of `multiple` where the overlap allows it, else at halves of it, and so on.
    wrap: the picture is a torus; even a single tile then overlaps itself across the edges.
    """
    if tile < 1 or overlap < 0 or multiple < 1:
        raise ValueError(
            f"tile and multiple must be at least 1 and overlap at least 0, got {tile}, {multiple} "
            f"and {overlap}"
        )
    tile_height, tops = _axis(height, tile, overlap, multiple, wrap, whole=WHOLE)
    tile_width, lefts = _axis(width, tile, overlap, multiple, wrap, whole=WHOLE)
    return Grid(height, width, tile_height, tile_width, overlap, tops, lefts, wrap)


def _axis(
    length: int, tile: int, overlap: int, multiple: int, wrap: bool, *, whole: float
) -> tuple[int, tuple[int, ...]]:
    """Edge and starts of the tiles along one side; a single tile may be `whole` times the target."""
    if length < 1 or length % multiple:
        raise ValueError(f"sides must be padded to multiples of {multiple}, got {length}")

    def edge_of(count: int) -> int:
        shared = overlap * (count if wrap else count - 1)
        return up_to_multiple(math.ceil((length + shared) / count), multiple)

    count, edge = 1, edge_of(1)
    if edge > whole * tile:
        if up_to_multiple(overlap + 1, multiple) > tile:
            raise ValueError(
                f"an overlap of {overlap} leaves nothing of a tile of {tile} (both in pixels of "
                f"the output, tiles in steps of {multiple}); choose a smaller overlap or a larger tile"
            )
        while edge > tile:
            count += 1
            edge = edge_of(count)
        # Rounding can make a few more, smaller tiles cheaper than the largest that fit.
        more = count + 1
        while (smaller := edge_of(more)) >= SMALLEST * tile and more < 2 * count + 2:
            if more * smaller < count * edge:
                count, edge = more, smaller
            more += 1

    span, gaps = (length, count) if wrap else (length - edge, count - 1)
    unit = multiple
    while True:
        starts = [i * span // (gaps or 1) // unit * unit for i in range(count)]
        ends = [*starts[1:], starts[0] + length] if wrap else starts[1:]
        if all(b - a <= edge - overlap for a, b in zip(starts, ends, strict=False)):
            return edge, tuple(starts)
        unit = unit // 2 if unit % 2 == 0 else 1


def one_tile(height: int, width: int) -> Grid:
    """The grid of a picture that goes whole."""
    return Grid(height, width, height, width, 0, (0,), (0,), False)


def tiled(
    fn: Fn,
    x: Tensor,
    grid: Grid,
    *,
    batch: int = 1,
    ahead: int = 0,
    before: Callable[[int, int], None] | None = None,
    after: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Apply `fn` (b c h w -> b c h w) tile by tile and blend: b c h w float32 on x's device.

    Neighbours fade into each other over what they share, along a raised cosine, with weights that
    sum to 1 everywhere. Weights are products of one row and one column vector, so memory is the
    result and one tile. A single tile that is the whole picture is returned as `fn` gave it.

    batch: this many tiles are stacked along b for one call. ahead: so many calls are made before
    the result of an earlier one is asked for; the order of the blend stays.
    before(i, n), after(i, n, tile_out): called around tile i of n; what they raise passes through.
    """
    if x.shape[-2:] != (grid.height, grid.width):
        raise ValueError(
            f"the grid is for {grid.height}x{grid.width}, the picture has {tuple(x.shape[-2:])}"
        )
    n = len(grid)
    whole = n == 1 and not grid.wrap
    # On x's device once: copies from the host, tile by tile, would wait for it each time.
    rows, columns = (
        [weight.to(x.device) for weight in weights]
        for weights in (
            _weights(grid.tops, grid.tile_height, grid.height, grid.wrap),
            _weights(grid.lefts, grid.tile_width, grid.width, grid.wrap),
        )
    )
    boxes = list(grid.boxes())
    result = None
    under_way: deque[tuple[range, Tensor | Callable[[], Tensor]]] = deque()

    def blend(group: range, outputs: Tensor) -> None:
        nonlocal result
        if outputs.shape[-2:] != (grid.tile_height, grid.tile_width):
            raise ValueError(
                f"a tile function must keep height and width: {grid.tile_height}x{grid.tile_width} "
                f"became {tuple(outputs.shape[-2:])}"
            )
        for i, out in zip(group, outputs.chunk(len(group)), strict=True):
            if whole:
                result = out.to(x.device, torch.float32)
            else:
                if result is None:
                    shape = (*out.shape[:-2], grid.height, grid.width)
                    result = torch.zeros(shape, device=x.device)
                row, column = divmod(i, len(grid.lefts))
                weight = rows[row][:, None] * columns[column]
                _add(result, out.to(x.device, torch.float32) * weight, boxes[i])
            if after is not None:
                after(i, n, out)

    for first in range(0, n, max(1, batch)):
        group = range(first, min(n, first + max(1, batch)))
        if before is not None:
            for i in group:
                before(i, n)
        windows = [_window(x, boxes[i]) for i in group]
        outputs = fn(windows[0] if len(windows) == 1 else torch.cat(windows))
        del windows
        under_way.append((group, outputs))
        del outputs
        while len(under_way) > ahead:
            group, outputs = under_way.popleft()
            blend(group, finished(outputs))
            del outputs
    for group, outputs in under_way:
        blend(group, finished(outputs))
    return result


def finished(outputs: Tensor | Callable[[], Tensor]) -> Tensor:
    """What a tile function gave, waited for where it is under way."""
    return outputs() if callable(outputs) else outputs


def recovering(
    fn: Fn,
    *,
    minimum: int,
    multiple: int,
    is_oom: Callable[[BaseException], bool],
    on_event: Callable[[str], None],
) -> Fn:
    """A tile function that goes on with smaller windows when `fn` runs out of memory.

    Stacked tiles first go one by one. A tile that still fails is split into overlapping windows of
    about half its edges (multiples of `multiple`, not below `minimum`), blended as tiles are; the
    limit holds for every later call, and what was finished is kept. Where nothing is left to
    split, the error is raised again, of the same type where that type allows, with a readable text.

    on_event(text): called when the memory of the failed pass is free; may empty caches. What it
    raises, and errors that are not `is_oom`, pass through.
    """
    minimum = up_to_multiple(max(minimum, 1), multiple)
    single = False
    limit: tuple[int, int] | None = None

    def halved(side: int) -> int:
        # Two windows of this edge cover the side and share a sixth of themselves.
        half = up_to_multiple(
            math.ceil(side * RECOVERY_OVERLAP / (2 * RECOVERY_OVERLAP - 1)), multiple
        )
        if half >= side:
            half = up_to_multiple(math.ceil(side / 2), multiple)
        return min(side, max(half, minimum))

    def split(x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        overlap = min(limit) // RECOVERY_OVERLAP
        rows = _axis(height, limit[0], limit[0] // RECOVERY_OVERLAP, multiple, False, whole=1)
        columns = _axis(width, limit[1], limit[1] // RECOVERY_OVERLAP, multiple, False, whole=1)
        grid = Grid(height, width, rows[0], columns[0], overlap, rows[1], columns[1], False)
        return tiled(run, x, grid)

    def run(x: Tensor) -> Tensor | Callable[[], Tensor]:
        b, _, height, width = x.shape
        if single and b > 1:
            return torch.cat([finished(run(one)) for one in x.split(1)])
        if limit is not None and (height > limit[0] or width > limit[1]):
            return split(x)
        try:
            y = fn(x)
        except Exception as error:
            event = learn(error, b, height, width)
        else:
            return (lambda: settled(y, x)) if callable(y) else y
        # Not in the handler: there the error's frames still hold the failed pass's tensors.
        on_event(event)
        return run(x)

    def settled(y: Callable[[], Tensor], x: Tensor) -> Tensor:
        """What was under way; memory may run out while it is waited for, too."""
        try:
            return y()
        except Exception as error:
            event = learn(error, len(x), *x.shape[-2:])
        on_event(event)
        return finished(run(x))

    def learn(error: Exception, b: int, height: int, width: int) -> str:
        """Set the limits for what comes, and say so; or raise what can't be mended."""
        nonlocal single, limit
        if not is_oom(error):
            raise error
        smaller = halved(height), halved(width)
        if b > 1:
            single = True
            return f"out of memory with {b} tiles at once: going on one by one"
        if smaller == (height, width):
            raise _out_of_memory(error, height, width) from error
        limit = smaller
        return (
            f"out of memory with a tile of {width}x{height}: going on with at most "
            f"{smaller[1]}x{smaller[0]}"
        )

    return run


def seam_score(image: Tensor, grid: Grid, plain: Tensor | None = None) -> float:
    """Gradient energy across the tiles' borders / that of lines near them; 1.0 = no seam visible.

    image: b c h w in [0, 1], at least what is left of the grid's picture after cropping.
    plain: the enlarged input, of the same size. Where it has an edge, what is seen there belongs to
    the picture and is left out; so a border that runs along an edge of the picture is not judged.
    """
    seams, others = [], []
    for dim, starts, edge, length in (
        (-2, grid.tops, grid.tile_height, grid.height),
        (-1, grid.lefts, grid.tile_width, grid.width),
    ):
        size = image.shape[dim]
        closed = grid.wrap and size == length
        borders = {p % length if grid.wrap else p for s in starts for p in (s, s + edge)}
        # Line p is the step from row p - 1 to row p; row 0 has one on a torus only.
        lines = [p for p in sorted(borders) if (0 if closed else 1) <= p < size]
        near_a_border = {p + d for p in borders for d in range(1 - SEAM_NEAR, SEAM_NEAR)}
        for line in lines:
            distances = [s * d for d in range(SEAM_NEAR, SEAM_FAR + 1) for s in (-1, 1)]
            far = sorted({line + d for d in distances} - near_a_border)
            far = [p for p in far if 1 <= p < size]
            if not far:
                continue
            seam, other = _steps(image, dim, [line])[0], _steps(image, dim, far)
            if plain is not None:
                here = [p for p in range(line + 1 - SEAM_NEAR, line + SEAM_NEAR) if 1 <= p < size]
                at, beside = _steps(plain, dim, here).amax(0), _steps(plain, dim, far)
                limit = SEAM_EDGE * (beside.median(0).values + SEAM_FLOOR)
                flat = at <= limit
                seam, other = seam[flat], other[(beside <= limit) & flat]
            seams.append(seam.double())
            others.append(other.double().flatten())
    seam, other = (torch.cat(part) if part else torch.zeros(0) for part in (seams, others))
    if not len(seam) or not len(other):
        return 1.0
    return ((seam.mean() + SEAM_FLOOR) / (other.mean() + SEAM_FLOOR)).item()


def _steps(image: Tensor, dim: int, lines: list[int]) -> Tensor:
    """Squared steps across each line: lines x positions, means over colours and pictures."""
    here = torch.tensor(lines, dtype=torch.long, device=image.device)
    there = (here - 1) % image.shape[dim]
    step = image.index_select(dim, here).float() - image.index_select(dim, there).float()
    # b c lines positions, whichever way the lines run.
    return step.square_().movedim(dim, 2).mean((0, 1))


def _weights(starts: tuple[int, ...], edge: int, length: int, wrap: bool) -> list[Tensor]:
    """One weight vector per tile along one side; at every position they sum to 1."""
    before = [starts[-1] - length if wrap else None, *starts[:-1]]
    after = [*starts[1:], starts[0] + length if wrap else None]
    weights = []
    for start, previous, following in zip(starts, before, after, strict=True):
        weight = torch.ones(edge, dtype=torch.float64, device="cpu")
        if previous is not None:
            weight *= _rise(previous + edge - start, edge)
        if following is not None:
            weight *= _rise(start + edge - following, edge).flip(0)
        weights.append(weight)
    total = torch.zeros(length, dtype=torch.float64, device="cpu")
    for start, weight in zip(starts, weights, strict=True):
        for source, target in _spans(start, start + edge, length):
            total[target] += weight[source]
    for start, weight in zip(starts, weights, strict=True):
        for source, target in _spans(start, start + edge, length):
            weight[source] /= total[target]
    return [weight.float() for weight in weights]


def _rise(shared: int, edge: int) -> Tensor:
    """From 0 to 1 over the first `shared` of `edge` positions, along a raised cosine.

    It stays at 0 and at 1 for an eighth of the way on both sides: a network knows least about the
    outermost pixels of a tile, which never saw what lies beyond.
    """
    margin = shared // MARGIN
    position = torch.arange(edge, dtype=torch.float64, device="cpu") + 0.5 - margin
    position = position / max(shared - 2 * margin, 1)
    return 0.5 - 0.5 * torch.cos(math.pi * position.clamp(0, 1))


def _spans(start: int, end: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Pieces of start..end that lie together on a ring of `length`: (in the tile, in the picture)."""
    done = 0
    while done < end - start:
        position = (start + done) % length
        n = min(end - start - done, length - position)
        yield slice(done, done + n), slice(position, position + n)
        done += n


def _window(x: Tensor, box: Box) -> Tensor:
    """The tile's pixels, b c h w, its own memory: a tile function may work in place."""
    rows = [target for _, target in _spans(box.top, box.bottom, x.shape[-2])]
    columns = [target for _, target in _spans(box.left, box.right, x.shape[-1])]
    bands = [torch.cat([x[..., row, column] for column in columns], -1) for row in rows]
    return torch.cat(bands, -2)


def _add(result: Tensor, part: Tensor, box: Box) -> None:
    for source_row, row in _spans(box.top, box.bottom, result.shape[-2]):
        for source_column, column in _spans(box.left, box.right, result.shape[-1]):
            result[..., row, column] += part[..., source_row, source_column]


def _out_of_memory(error: BaseException, height: int, width: int) -> BaseException:
    text = (
        f"out of memory even with a tile of {width}x{height}, the smallest: close other programs "
        f"that use the device, choose fp16 or bf16, or run on the CPU ({error})"
    )
    try:
        return type(error)(text)
    except TypeError:
        return MemoryError(text)

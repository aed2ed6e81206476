"""The same picture restored with three tile sizes: does the choice show?

One-step models change their mind with the tile: a wall is smooth in one and textured in the next.
The differences are measured between whole results, the largest tile being the one compared with.
"""

from __future__ import annotations

import math
from typing import Any

from gendr import color
from gendr.tiles import Grid, seam_score
from train.evaluation import judges, methods, metrics, testset
from train.evaluation.measure import Run, bar

# The networks need multiples of it, so that a tile is not padded.
MULTIPLE = 64


def tile_sizes(height: int, width: int) -> tuple[int, ...]:
    """The whole picture, about a half and about a quarter of it; the sizes are edges in pixels."""
    whole = math.ceil(max(height, width) / MULTIPLE) * MULTIPLE
    sizes = [whole]
    for share in (2, 4):
        smaller = max(2 * MULTIPLE, round(whole / share / MULTIPLE) * MULTIPLE)
        if smaller < sizes[-1]:
            sizes.append(smaller)
    return tuple(sizes)


def compare_tiles(
    run: Run, method: methods.Checkpoint, count: int, sizes: tuple[int, ...]
) -> list[dict[str, Any]]:
    """One row per picture and tile size, for the `count` largest results of this method."""
    records = run.records[method.name]
    done = [item for item in run.items if records.measured(item.stem)]
    area = {item.stem: int(records.sizes[records.index[item.stem]].prod()) for item in done}
    chosen = sorted(done, key=lambda item: (-area[item.stem], item.stem))[:count]
    rows = []
    progress = bar(f"{method.name}, tile sizes", len(chosen))
    for item in chosen:
        width, height = records.sizes[records.index[item.stem]].tolist()
        try:
            rows += compare_one(run, method, item, sizes or tile_sizes(height, width))
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            run.problems.append(
                f"{method.name}: tile sizes of {item.stem}: {judges.reason_of(error)}"
            )
        progress.update()
    method.close()
    progress.close()
    return rows


def compare_one(
    run: Run, method: methods.Checkpoint, item: testset.Item, sizes: tuple[int, ...]
) -> list[dict[str, Any]]:
    """The rows of one picture, largest tile first."""
    source = methods.read_rgb(item.source)
    reference = methods.read_rgb(item.reference) if item.reference else None
    first, rows = None, []
    for tile in sorted(sizes, reverse=True):
        path = run.stored(method, f"tiles/{item.stem}-{tile}")
        signature = methods.identity(method.identity, testset.stamp(item.source), tile)
        result = methods.Result.saved(path, signature)
        if result is None:
            result = method.make(item.stem, item.source, source, tile=tile)
            result.save(path, signature)
        first = first or result
        row: dict[str, Any] = {
            "method": method.name,
            "stem": item.stem,
            "tile": tile,
            "tiles": result.tiles,
            "seconds": result.seconds,
            "seam": result.seam,
            "file": path.relative_to(run.out).as_posix(),
        }
        row |= metrics.against_input(result.pixels, source)[0]
        if reference is not None:
            row |= metrics.against_reference(result.pixels, reference)[0]
        if result is not first:
            a, b = (metrics.as_tensor(r.pixels) for r in (result, first))
            row["psnr_to_first"] = metrics.psnr(result.pixels, first.pixels)
            row["delta_e_to_first"] = float(color.delta_e(a, b).mean())
            if result.grid:
                # The largest tile's result has no border there: what it scores is in the picture.
                row["seam_of_first"] = seam_score(b, Grid(**result.grid))
        rows.append(row)
    return rows

"""The paper's protocol as one command: restores, measures and writes an honest report.

    python -m train.evaluate --data lr --ref hr --model embedded --out out
    python -m train.evaluate --protocol realsr --data RealSR --ref RealSR --model NAME=FILE --out out
    python -m train.evaluate --data lr --model embedded --model "faithful=embedded?fidelity=1" --out out
    python -m train.evaluate --data lr --ref hr --results InvSR=DIR --spandrel x4.pth --out out

OUT/report.html holds the tables, the values of every picture, a comparison slider and crops, in one
file; OUT/results.json means, intervals, settings, versions and hashes; OUT/pictures.csv one row per
picture and method. Bicubic and Lanczos enlargements stand beside every method.

The same command again goes on where it stopped; methods and metrics that are new are added to what
is there. A broken or mismatching file is named and the rest is done. Exit status: 0 all well,
1 some pictures failed, 2 wrong input.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch

import gendr
from gendr.devices import choose_device
from train.atomic import program
from train.evaluation import judges, measure, methods, options, report, testset
from train.evaluation.metrics import COST, NATIVE, REFERENCE
from train.evaluation.niqe import Niqe
from train.evaluation.records import Records
from train.evaluation.testset import InputError
from train.evaluation.tilecheck import compare_tiles


def chosen_settings(args: argparse.Namespace, recipe: testset.Recipe | None) -> dict[str, Any]:
    """What the command line and the protocol ask for; the rest is left to `gendr.Settings`."""
    settings: dict[str, Any] = {}
    if recipe:
        settings |= {"scale": float(recipe.scale), "color_fix": recipe.color_fix}
    names = (
        "scale",
        "color_fix",
        "tile",
        "overlap",
        "tile_batch",
        "detail",
        "fidelity",
        "guidance",
    )
    return settings | {n: getattr(args, n) for n in names if getattr(args, n) is not None}


def prepare_methods(
    args: argparse.Namespace, recipe: testset.Recipe | None, stems: list[str]
) -> list[methods.Method]:
    """All methods, checked as far as possible before any work. Raises ValueError."""
    common = chosen_settings(args, recipe)
    plain = gendr.Settings(**common)
    found: list[methods.Method] = []
    for name in filter(None, args.baselines.split(",")):
        if name not in (*options.BASELINES, "none"):
            raise InputError(f"--baselines {name!r}: one of {', '.join(options.BASELINES)}, none")
        if name != "none":
            found.append(methods.Resize(name, plain))
    for text in args.results:
        name, path, _ = methods.named(text)
        files, remark = testset.match_results(Path(path), stems)
        if not files:
            raise InputError(
                f"no file of {path} has the name of an input; {remark or 'it is empty'}"
            )
        facts = {"files": len(files)} | ({"remark": remark} if remark else {})
        found.append(methods.Folder(name, Path(path), files, facts))
    for text in args.spandrel:
        name, path, _ = methods.named(text)
        found.append(methods.Spandrel(name, Path(path), plain, device=args.device))
    for text in args.model:
        name, path, changes = methods.named(text, default=methods.model_name(text))
        settings = gendr.Settings(**(common | changes))
        where = None if path == methods.EMBEDDED else Path(path)
        found.append(
            methods.Checkpoint(name, where, settings, device=args.device, dtype=args.dtype)
        )
    names = [method.name.casefold() for method in found]
    if double := {name for name in names if names.count(name) > 1}:
        raise InputError(f"two methods are called {double.pop()!r}: name them, NAME=FILE")
    if not found:
        raise InputError("nothing to measure: give --model, --results, --spandrel or --baselines")
    return found


def prepare_judges(
    args: argparse.Namespace, recipe: testset.Recipe | None
) -> list[tuple[judges.Judge, str | None, bool]]:
    """(metric, pyiqa model, asked for by name), in the paper's order."""
    paper = {entry.name: entry for entry in judges.PAPER}
    if args.niqe_params:
        del paper["niqe"]
    models = recipe.models if recipe else {}
    if args.metrics in ("all", "native"):
        entries, forced = (list(paper.values()) if args.metrics == "all" else []), False
    else:
        names = [name for name in args.metrics.split(",") if name]
        entries, forced = [paper.get(n) or judges.custom(n) for n in names], True
    return [(entry, models.get(entry.name, entry.model), forced) for entry in entries]


def prepare(args: argparse.Namespace) -> measure.Run:
    """Everything that can be wrong with the command, found before the first picture."""
    recipe = testset.read_recipe(args.protocol) if args.protocol else None
    items, problems = testset.pair(args.data, args.ref, recipe)
    for picture in filter(None, args.show.split(",")):
        if picture not in {item.stem for item in items}:
            raise InputError(f"--show {picture!r}: there is no such picture")
    if recipe and len(items) != recipe.pictures:
        problems.append(
            f"{recipe.title} has {recipe.pictures} pictures, here are {len(items)}: "
            "the paper's rows are not of the same pictures"
        )
    if args.limit is not None:
        if args.limit < 1:
            raise InputError("--limit must be at least 1")
        if args.limit < len(items):
            problems.append(f"only the first {args.limit} of {len(items)} pictures were measured")
        items = items[: args.limit]
    if recipe and recipe.paired and not args.ref:
        problems.append("the paper measures this set against references: give --ref")
    niqe = Niqe(args.niqe_params) if args.niqe_params else None
    found = prepare_methods(args, recipe, [item.stem for item in items])
    native = [*NATIVE, *([niqe.metric] if niqe else []), measure.SECONDS, measure.PEAK]
    args.out.mkdir(parents=True, exist_ok=True)
    return measure.Run(
        out=args.out, items=items, methods=found, native=native, niqe=niqe,
        judges=prepare_judges(args, recipe), device=choose_device(args.device), recipe=recipe, baseline=found[0].name, problems=problems,
    )  # fmt: skip


def evaluate(run: measure.Run, tile_pictures: int, tile_sizes: tuple[int, ...]) -> None:
    """All methods, then all learned metrics, then the tile sizes."""
    stems = [item.stem for item in run.items]
    for method in run.methods:
        run.records[method.name] = Records(run.out / "records" / f"{method.name}.jsonl", stems)
    for method in run.methods:
        measure.measure(run, method)
    run.rows += [metric for metric in run.native if metric.group != COST]
    for entry, model, forced in run.judges:
        measure.judge(run, entry, model, forced)
    run.rows += [metric for metric in run.native if metric.group == COST]
    if not run.paired:
        needs = "needs references (--ref)"
        run.missing |= {m.name: needs for m in run.rows if m.group == REFERENCE}
    for method in run.methods:
        if isinstance(method, methods.Checkpoint) and tile_pictures:
            run.tile_rows += compare_tiles(run, method, tile_pictures, tile_sizes)


def publishable(value: Any) -> Any:
    """An option as it may be published: of paths only the last part."""
    if isinstance(value, list):
        return [publishable(v) for v in value]
    if isinstance(value, Path):
        return value.name
    if isinstance(value, str):
        # NAME=PATH?SETTINGS: the folders between "=" and the file are nobody's business.
        return re.sub(r"(^|=)[^=?]*[/\\\\]", r"\1", value)
    return value


def main(argv: list[str] | None = None) -> int:
    args = options.parse(argv, __doc__)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        sizes = tuple(int(s) for s in args.tile_sizes.split(",") if s)
        for size in sizes:
            gendr.Settings(tile=size)
        run = prepare(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        evaluate(run, args.tile_pictures, sizes)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    show = [name for name in args.show.split(",") if name]
    options_used = {name: publishable(value) for name, value in vars(args).items()}
    print(report.write(run, options=options_used, count=args.pictures, show=show, title=args.title))
    print(f"{run.out / 'report.html'}")
    failed = sum(len(records.errors) for records in run.records.values())
    if failed:
        print(f"{failed} result(s) failed; they are named in the report", file=sys.stderr)
    return 1 if failed or run.unusable else 0


if __name__ == "__main__":
    sys.exit(program("train.evaluate", main))

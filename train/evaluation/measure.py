"""One evaluation run: every method over every picture, each result measured and recorded."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from train.evaluation import judges, methods, metrics, testset
from train.evaluation.metrics import COST, REFERENCE, Metric
from train.evaluation.niqe import Niqe
from train.evaluation.records import Records

SECONDS = Metric(
    "seconds", "Seconds per picture", "lower", COST, 3,
    "median; restoring only: loading, decoding and writing are not counted",
)  # fmt: skip
PEAK = Metric("peak", "Peak GPU memory, GiB", "lower", COST, 2, "highest allocation, per picture")


@dataclass
class Run:
    """What is measured, on what, and what could not be.

    judges: (entry, pyiqa model, asked for by name). missing: metric name -> why it is n/a.
    problems: everything the reader of the report has to know, in words. unusable: methods that
    could not be loaded.
    """

    out: Path
    items: list[testset.Item]
    methods: list[methods.Method]
    native: list[Metric]
    niqe: Niqe | None
    judges: list[tuple[judges.Judge, str | None, bool]]
    device: torch.device
    recipe: testset.Recipe | None
    baseline: str
    problems: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    rows: list[Metric] = field(default_factory=list)
    tile_rows: list[dict[str, Any]] = field(default_factory=list)
    records: dict[str, Records] = field(default_factory=dict)

    def stored(self, method: methods.Method, stem: str) -> Path:
        return self.out / "results" / method.name / f"{stem}.png"

    @property
    def paired(self) -> bool:
        return any(item.reference for item in self.items)


def bar(label: str, total: int) -> tqdm:
    """A progress bar of pictures: rewritten on a terminal, a line every ten seconds in a log."""
    return tqdm(
        desc=label,
        total=total,
        unit=" pictures",
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )


def signatures(method: methods.Method, item: testset.Item) -> tuple[str, str]:
    """(how the result is made, the same with what it is compared with)."""
    ready = method.source(item.stem)
    made = methods.identity(method.identity, testset.stamp(item.source), testset.stamp(ready))
    return made, methods.identity(made, testset.stamp(item.reference))


def obtain(run: Run, method: methods.Method, item: testset.Item) -> methods.Result:
    """The stored result where it is still the right one, else a new one, stored if worth it."""
    made, _ = signatures(method, item)
    path = run.stored(method, item.stem)
    if method.kept and (result := methods.Result.saved(path, made)):
        return result
    result = method.make(item.stem, item.source, methods.read_rgb(item.source))
    if method.kept:
        result.save(path, made)
    return result


def measure_one(run: Run, method: methods.Method, item: testset.Item) -> dict[str, Any]:
    """All native metrics of one result, as a line for the records."""
    source = methods.read_rgb(item.source)
    result = obtain(run, method, item)
    found, notes = metrics.against_input(result.pixels, source)
    if item.reference:
        reference = methods.read_rgb(item.reference)
        try:
            compared, more = metrics.against_reference(result.pixels, reference)
        except metrics.Mismatch as error:
            factor = reference.shape[0] / source.shape[0]
            raise metrics.Mismatch(
                f"{error}; the reference is {factor:.3g} times the input"
            ) from None
        found |= compared
        notes += more
    if run.niqe:
        found["niqe"] = run.niqe(result.pixels)
    found |= {"seam": result.seam, "seconds": result.seconds, "peak": result.peak}
    values, why = {}, {}
    for metric in run.native:
        value = values[metric.key] = found.get(metric.name)
        if value is None:
            why[metric.key] = {
                "seam": result.no_seam,
                "seconds": "made elsewhere",
                "peak": "not made on a GPU here",
            }.get(metric.name, "picture too small or flat")
            if metric.group == REFERENCE and not item.reference:
                why[metric.key] = "no reference picture"
    return {
        "stem": item.stem,
        "signature": signatures(method, item)[1],
        "size": [result.pixels.shape[1], result.pixels.shape[0]],
        "sha256": methods.pixels_sha256(result.pixels),
        "values": values,
        "why": why,
        "notes": notes + result.notes,
    }


def without_folders(text: str, item: testset.Item) -> str:
    """A reason as it may be published: files by their names alone."""
    for path in filter(None, (item.source, item.reference)):
        text = text.replace(str(path), path.name)
    return text


def measure(run: Run, method: methods.Method) -> None:
    """One method over all pictures; a picture that fails is recorded and the next one taken."""
    records = run.records[method.name]
    keys = [metric.key for metric in run.native]
    reused = 0
    progress = bar(method.name, len(run.items))
    for item in run.items:
        if records.done(item.stem, signatures(method, item)[1], keys):
            reused += 1
            progress.set_postfix_str(f"{reused} from before", refresh=False)
            progress.update()
            continue
        try:
            line = measure_one(run, method, item)
        except methods.NotLoaded as error:
            run.unusable.append(method.name)
            run.problems.append(f"{method.name} could not be loaded: {error}")
            tqdm.write(f"failed: {run.problems[-1]}", file=sys.stderr)
            break
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            # ValueError: a broken file or another size. RuntimeError: among others, a full GPU.
            line = {"stem": item.stem, "error": without_folders(judges.reason_of(error), item)}
            tqdm.write(f"failed: {method.name}: {item.stem}: {line['error']}", file=sys.stderr)
        records.add(line)
        progress.update()
    records.close()
    method.close()
    progress.close()


def judge(run: Run, entry: judges.Judge, model: str | None, forced: bool) -> None:
    """One pyiqa metric over all methods and pictures: loaded once, given back afterwards."""
    metric = entry.metric(model)
    run.rows.append(metric)
    reason = judges.unavailable(entry, model, run.device, forced)
    if metric.group == REFERENCE and not run.paired:
        reason = "needs references (--ref)"
    if reason:
        run.missing[metric.name] = reason
        return
    todo = [
        (method, item)
        for method in run.methods
        for item in run.items
        if run.records[method.name].measured(item.stem)
        and not run.records[method.name].has(item.stem, metric.key)
        and (item.reference or metric.group != REFERENCE)
    ]
    if not todo:
        return
    try:
        score = judges.open_judge(model, run.device)
    except judges.Unavailable as error:
        run.missing[metric.name] = str(error)
        print(f"n/a: {metric.label}: {error}", file=sys.stderr)
        return
    full = metric.group == REFERENCE
    progress = bar(metric.label, len(todo))
    failures: Counter[str] = Counter()
    for method, item in todo:
        try:
            reference = methods.read_rgb(item.reference) if full else None
            value = score(obtain(run, method, item).pixels, reference)
            run.records[method.name].add({"stem": item.stem, "values": {metric.key: value}})
        except Exception as error:  # pyiqa's networks raise anything; the report counts it
            failures[judges.reason_of(error)] += 1
        progress.update()
    for records in run.records.values():
        records.close()
    for reason, count in failures.items():
        run.problems.append(f"{metric.label}: {count} result(s) not measured: {reason}")
    if failures.total() == len(todo):
        run.missing[metric.name] = next(iter(failures))
    progress.close()

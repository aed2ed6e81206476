"""From records to `results.json`, `pictures.csv` and one self-contained `report.html`."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import time
from dataclasses import asdict
from html import escape as esc
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from train.evaluation import methods, tables, testset
from train.evaluation.measure import Run
from train.evaluation.metrics import COST, GROUPS, Metric
from train.evaluation.records import Summary, summarise, write_csv
from train.evaluation.shown import choose, embedded, link
from train.evaluation.tables import ARROWS

TEMPLATE = Path(__file__).with_name("report_template.html")
FORMAT = 1
# Rows of the interactive table: beyond, the page gets slow and the CSV is the better place.
MOST_ROWS = 5000


def write(
    run: Run, *, options: dict[str, Any], count: int, show: list[str], title: str | None
) -> str:
    """All three files, each atomically; returns the main numbers for a terminal."""
    summaries = summaries_of(run)
    keys = {m.name: m.key for m in run.rows if m.name not in run.missing}
    write_csv(run.out / "pictures.csv", run.records, keys)
    results = as_json(run, summaries, options)
    testset.write_json(run.out / "results.json", results)
    page = TEMPLATE.read_text(encoding="utf-8")
    heading = title or (run.recipe.title if run.recipe else f"Evaluation of {subject(run)}")
    parts = {
        "title": esc(heading),
        "facts": tables.facts_line(run, results),
        "warnings": tables.warnings_block(run, summaries),
        "main": tables.main_table(run, summaries),
        "paper": tables.paper_block(run, summaries),
        "tiles": tables.tiles_block(run),
        "problems": tables.problems_block(run),
        "definitions": tables.definitions(run),
        "provenance": tables.provenance(run, results),
        "data": page_data(run, summaries, choose(run, count, show)),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page)
    temporary = run.out / "report.html.part"
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, run.out / "report.html")
    return tables.text_table(run, summaries)


def subject(run: Run) -> str:
    """What the report is about: the models that were run, else the last method."""
    names = [m.name for m in run.methods if m.kept] or [run.methods[-1].name]
    return testset.some(names, 3)


def summaries_of(run: Run) -> dict[str, dict[str, Summary]]:
    """{metric: {method: means over the common pictures}}; empty for a metric that is n/a.

    A metric that no method has, all for the same reason, is n/a for that reason as a whole.
    """
    order = list(GROUPS)
    run.rows.sort(key=lambda metric: order.index(metric.group))
    found: dict[str, dict[str, Summary]] = {}
    for metric in run.rows:
        found[metric.name] = {}
        if metric.name in run.missing:
            continue
        found[metric.name] = summarise(run.records, metric.key, metric.better, run.baseline)
        reasons = {tables.why(run, method, metric) for method in run.methods}
        if not found[metric.name] and len(reasons) == 1:
            run.missing[metric.name] = reasons.pop()
    return found


def as_json(run: Run, summaries: dict[str, dict[str, Summary]], options: dict) -> dict[str, Any]:
    """Everything a later reader needs to know which numbers these are."""
    failed = {
        name: dict(sorted(records.errors.items()))
        for name, records in run.records.items()
        if records.errors
    }
    return {
        "format": FORMAT,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions(),
        "machine": machine(),
        "options": options,
        "protocol": run.recipe.name if run.recipe else None,
        "pictures": len(run.items),
        "pictures_sha256": methods.identity(
            [[name, records.sha256] for name, records in run.records.items()]
        ),
        "baseline": run.baseline,
        "methods": [
            {"name": m.name, "kind": m.kind, "identity": m.identity, **m.facts} for m in run.methods
        ],
        "metrics": [
            {
                "name": m.name,
                "label": m.label,
                "better": m.better,
                "version": m.version,
                "meaning": m.meaning,
                "missing": run.missing.get(m.name),
                "methods": {k: asdict(v) for k, v in summaries[m.name].items()},
            }
            for m in run.rows
        ],
        "tile_sizes": run.tile_rows,
        "paper": run.recipe.paper if run.recipe else [],
        "problems": run.problems,
        "failed": failed,
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "numpy", "pillow", "pyiqa", "spandrel"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["commit"] = commit()
    return found


def commit() -> str | None:
    """The repository's commit, with a plus where files differ from it; None outside of git."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "gendr", "train")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPU cores"


def page_data(run: Run, summaries: dict[str, dict[str, Summary]], shown: list[str]) -> str:
    """What the page's script needs, as JSON that can't end its script element."""
    rows = [m for m in run.rows if summaries[m.name]]
    stems = [item.stem for item in run.items]
    kept = stems[:MOST_ROWS]
    for stem in shown:
        if stem not in kept:
            kept.append(stem)
    at = {stem: i for i, stem in enumerate(stems)}
    picked = np.array([at[stem] for stem in kept], dtype=int)

    def column(method: str, metric: Metric) -> list[float | None] | None:
        found = run.records[method].columns.get(metric.key)
        if found is None:
            return None
        return [None if math.isnan(v) else float(f"{v:.5g}") for v in found.values[picked]]

    items = {item.stem: item for item in run.items}
    data = {
        "methods": [{"name": m.name, "kind": m.kind} for m in run.methods],
        "baseline": run.baseline,
        "metrics": [
            {
                "name": m.name,
                "label": m.label,
                "better": m.better,
                "digits": m.digits,
                "arrow": ARROWS[m.better],
                "cost": m.group == COST,
                "summary": {k: asdict(v) for k, v in summaries[m.name].items()},
            }
            for m in rows
        ],
        "stems": kept,
        "total": len(stems),
        "values": {m.name: {r.name: column(m.name, r) for r in rows} for m in run.methods},
        "links": [
            [
                link(run, items[stem].source),
                link(run, items[stem].reference),
                *(
                    link(run, run.stored(m, stem) if m.kept else m.source(stem))
                    for m in run.methods
                ),
            ]
            for stem in kept
        ],
        "shown": {stem: embedded(run, items[stem]) for stem in shown},
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")

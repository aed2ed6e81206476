"""The report's tables and texts, from a finished run to HTML fragments."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from html import escape as esc
from typing import Any

from train.evaluation import methods, testset
from train.evaluation.measure import Run
from train.evaluation.metrics import COST, GROUPS, Metric
from train.evaluation.records import Summary, cost
from train.evaluation.shown import tile_figures

ARROWS = {"higher": "↑", "lower": "↓", "one": "→ 1"}


def number(value: float | None, digits: int, sign: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return "n/a"
    value = round(value, digits) + 0.0  # no minus zero
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    # A typographic minus is as wide as the plus, so columns stay straight.
    return text.replace("-", "\N{MINUS SIGN}")


def facts_line(run: Run, results: dict[str, Any]) -> str:
    parts = [f"{len(run.items)} pictures", time.strftime("%d %B %Y").lstrip("0")]
    scales = {m.settings.scale for m in run.methods if hasattr(m, "settings")}
    if len(scales) == 1:
        parts.insert(1, f"x{scales.pop():g}")
    parts.append("with references" if run.paired else "without references")
    fixes = {m.settings.color_fix for m in run.methods if isinstance(m, methods.Checkpoint)}
    if fixes:
        parts.append("colour fix " + ", ".join(sorted(fixes)))
    parts.append(results["machine"])
    return " · ".join(esc(p) for p in parts)


def ordered(run: Run) -> list[tuple[str, list[Metric]]]:
    """The rows by group, in the order in which they were given."""
    return [(g, [m for m in run.rows if m.group == g]) for g in GROUPS]


def centre(s: Summary, metric: Metric) -> float:
    """The mean; of costs the median, which a slow first picture doesn't move."""
    return s.median if metric.group == COST else s.mean


def best(found: dict[str, Summary], metric: Metric) -> set[str]:
    """The methods whose mean, as printed, is the best; none where all print the same."""
    values = {n: round(centre(s, metric), metric.digits) for n, s in found.items()}
    costs = {n: cost(value, metric.better) for n, value in values.items()}
    least = min(costs.values(), default=0)
    winners = {name for name, value in costs.items() if value == least}
    return winners if len(winners) < len(costs) else set()


def difference(s: Summary, metric: Metric) -> str:
    """The paired difference and its interval, coloured where the interval excludes zero."""
    if s.difference is None or metric.group == COST:
        return ""
    kind = "even"
    if s.low is not None and s.low * s.high > 0:
        # A ratio that should be 1 has no better direction: there the pictures are counted.
        upwards = s.better * 2 > s.count if metric.better == "one" else s.difference > 0
        kind = "good" if upwards == (metric.better != "lower") else "bad"
    low, high = number(s.low, metric.digits, True), number(s.high, metric.digits, True)
    interval = f" <i>[{low}, {high}]</i>" if s.low is not None else ""
    return (
        f'<small class="{kind}" title="mean difference to the first method and its 95 % interval; '
        f'better on {s.better} of {s.count} pictures">'
        f"{number(s.difference, metric.digits, True)}{interval}</small>"
    )


def main_table(run: Run, summaries: dict[str, dict[str, Summary]]) -> str:
    """Metrics as rows, methods as columns, the paper's GenDR beside them."""
    paper = run.recipe.paper[-1] if run.recipe and run.recipe.paper else None
    width = len(run.methods)
    head = "".join(
        f'<th scope="col">{esc(m.name)}<small>{esc(m.kind)}{parameters(m)}</small></th>'
        for m in run.methods
    )
    if paper:
        head += (
            f'<th scope="col" class="paper">{esc(paper["method"])}'
            f"<small>the paper, {esc(run.recipe.table)}</small></th>"
        )
    lines = [f'<thead><tr><th scope="col">Metric</th>{head}</tr></thead>']
    for group, rows in ordered(run):
        if not rows:
            continue
        lines.append(
            f'<tbody><tr class="group"><th colspan="{width + 1 + bool(paper)}" scope="colgroup">'
            f"{esc(GROUPS[group])}</th></tr>"
        )
        merged: dict[str, list[Metric]] = {}
        for metric in rows:
            reason = run.missing.get(metric.name)
            known = paper.get(metric.name) if paper else None
            if reason and known is None:
                merged.setdefault(reason, []).append(metric)
                continue
            lines.append(metric_row(run, metric, summaries[metric.name], reason, paper))
        for reason, several in merged.items():
            labels = ", ".join(m.label for m in several)
            extra = '<td class="paper"></td>' if paper else ""
            lines.append(
                f'<tr class="na"><th scope="row">{esc(labels)}</th>'
                f'<td colspan="{width}"><b>n/a</b> {esc(reason)}</td>{extra}</tr>'
            )
        lines.append("</tbody>")
    return f'<table class="main">{"".join(lines)}</table>'


def metric_row(
    run: Run,
    metric: Metric,
    found: dict[str, Summary],
    reason: str | None,
    paper: dict[str, Any] | None,
) -> str:
    count = next(iter(found.values())).count if found else 0
    partial = f"<small>on {count} of {len(run.items)}</small>" if 0 < count < len(run.items) else ""
    head = (
        f'<th scope="row" title="{esc(metric.meaning)}">{esc(metric.label)} '
        f"<span>{ARROWS[metric.better]}</span>{partial}</th>"
    )
    cells = []
    if reason:
        cells.append(f'<td colspan="{len(run.methods)}" class="none"><b>n/a</b> {esc(reason)}</td>')
    winners = best(found, metric)
    for method in [] if reason else run.methods:
        s = found.get(method.name)
        if s is None:
            cells.append(
                f'<td class="none"><b>n/a</b><small>{esc(why(run, method, metric))}</small></td>'
            )
            continue
        mark = ' class="best"' if method.name in winners else ""
        cells.append(
            f"<td{mark}><b>{number(centre(s, metric), metric.digits)}</b>{difference(s, metric)}</td>"
        )
    if paper:
        value = paper.get(metric.name)
        text = "" if value is None else number(float(value), metric.digits)
        cells.append(f'<td class="paper">{text}</td>')
    kind = ' class="na"' if reason else ""
    return f"<tr{kind}>{head}{''.join(cells)}</tr>"


def why(run: Run, method: methods.Method, metric: Metric) -> str:
    """Why a method has no value of a metric that others have."""
    column = run.records[method.name].columns.get(metric.key)
    reasons = column.reasons if column else Counter()
    if not reasons and len(run.records[method.name].errors) == len(run.items):
        return "every picture failed"
    return reasons.most_common(1)[0][0] if reasons else "no common picture"


def parameters(method: methods.Method) -> str:
    count = method.facts.get("parameters")
    if not count:
        return ""
    return f", {count / 1e6:.1f}M" if count >= 1e5 else f", {count / 1e3:.0f}k"


def warnings_block(run: Run, summaries: dict[str, dict[str, Summary]]) -> str:
    """What changes the meaning of the table stands above it."""
    lines = list(run.problems)
    total = len(run.items)
    for name, records in run.records.items():
        have = sum(s is not None for s in records.signatures)
        if have < total:
            lines.append(
                f"{name} has results for {have} of {total} pictures: means are taken over the "
                "pictures that all methods have"
            )
    if not lines:
        return ""
    items = "".join(f"<li>{esc(line)}</li>" for line in lines)
    return f'<aside class="warning"><b>Read this first</b><ul>{items}</ul></aside>'


def paper_block(run: Run, summaries: dict[str, dict[str, Summary]]) -> str:
    """The paper's whole table with ours, or its rows for orientation where it isn't its set."""
    labels = {m.name: m for m in run.rows}
    if run.recipe:
        recipe = run.recipe
        columns = [k for k in labels if any(k in row for row in recipe.paper)]
        ours = "".join(
            f'<tr class="ours"><th scope="row">{esc(m.name)}<small>measured here</small></th>'
            + "".join(
                f"<td>{number(summaries[c][m.name].mean, labels[c].digits)}</td>"
                if m.name in summaries[c]
                else '<td class="none">n/a</td>'
                for c in columns
            )
            + "</tr>"
            for m in run.methods
        )
        body = paper_rows(recipe.paper, columns, labels)
        notes = "".join(f"<li>{esc(n)}</li>" for n in (*recipe.source, *recipe.notes))
        return (
            f"<h2>The paper's {esc(recipe.table)}: {esc(recipe.title)}</h2>"
            f"{paper_table(columns, labels, ours + body)}"
            f'<ul class="notes">{notes}</ul>'
        )
    recipes = [testset.read_recipe(name) for name in testset.recipe_names()]
    columns = [k for k in labels if any(k in r.paper[-1] for r in recipes)]
    if not columns:
        return ""
    rows = "".join(
        paper_rows(
            [{**r.paper[-1], "method": f"{r.paper[-1]['method']} on {r.title}"}], columns, labels
        )
        for r in recipes
    )
    return (
        "<details><summary>The paper's GenDR on its own four sets, for orientation</summary>"
        "<p>Other pictures and another model: these rows can't be compared with the table above. "
        "<code>--protocol</code> measures one of the sets and puts the paper's rows beside ours.</p>"
        f"{paper_table(columns, labels, rows)}</details>"
    )


def paper_rows(rows: list[dict], columns: list[str], labels: dict[str, Metric]) -> str:
    lines = []
    for row in rows:
        kind = ' class="gendr"' if row["method"].startswith("GenDR") else ""
        aside = row.get("base") or row.get("parameters") or row.get("time") or ""
        cells = "".join(
            f"<td>{number(float(row[c]), labels[c].digits)}</td>"
            if c in row
            else "<td>&ndash;</td>"
            for c in columns
        )
        lines.append(
            f'<tr{kind}><th scope="row">{esc(row["method"])}<small>{esc(str(aside))}</small></th>{cells}</tr>'
        )
    return "".join(lines)


def paper_table(columns: list[str], labels: dict[str, Metric], rows: str) -> str:
    head = "".join(
        f'<th scope="col">{esc(labels[c].label)} <span>{ARROWS[labels[c].better]}</span></th>'
        for c in columns
    )
    return (
        '<div class="wide"><table class="paper-table"><thead><tr><th scope="col">Method</th>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def tiles(count: int) -> str:
    return "one piece" if count == 1 else f"{count} tiles"


def tiles_block(run: Run) -> str:
    """Three tile sizes side by side: numbers, crops, and where the results differ."""
    if not run.tile_rows:
        reason = (
            "no GenDR model was run"
            if not any(isinstance(m, methods.Checkpoint) for m in run.methods)
            else "switched off, or no picture could be done"
        )
        return f'<p class="none"><b>n/a</b> {esc(reason)}</p>'
    columns = (
        ("psnr_to_first", "PSNR to the largest", 2),
        ("delta_e_to_first", "ΔE to the largest", 2),
        ("seam", "Seam score", 2),
        ("seam_of_first", "the largest, same lines", 2),
        ("psnr", "PSNR", 2),
        ("lr_psnr", "Reduced PSNR", 2),
        ("seconds", "Seconds", 2),
    )
    columns = tuple(c for c in columns if any(r.get(c[0]) is not None for r in run.tile_rows))
    head = "".join(f'<th scope="col">{label}</th>' for _, label, _ in columns)
    blocks = []
    pairs = dict.fromkeys((r["method"], r["stem"]) for r in run.tile_rows)
    for method, stem in pairs:
        rows = [r for r in run.tile_rows if (r["method"], r["stem"]) == (method, stem)]
        body = "".join(
            f'<tr><th scope="row">{r["tile"]} px<small>{tiles(r["tiles"])}</small></th>'
            + "".join(
                f"<td>{number(r.get(key), digits) if r.get(key) is not None else '&ndash;'}</td>"
                for key, _, digits in columns
            )
            + "</tr>"
            for r in rows
        )
        figures = "".join(
            f'<figure><img alt="{esc(caption)}" src="{src}"><figcaption>{esc(caption)}</figcaption></figure>'
            for caption, src in tile_figures(run, rows)
        )
        blocks.append(
            f"<h3>{esc(method)}: {esc(stem)}</h3>"
            f'<div class="wide"><table class="paper-table"><thead><tr><th scope="col">Tile edge</th>{head}</tr>'
            f"</thead><tbody>{body}</tbody></table></div>"
            f'<div class="figures">{figures}</div>'
        )
    return "".join(blocks)


def problems_block(run: Run) -> str:
    together: dict[tuple[str, str], list[str]] = {}
    for name, records in run.records.items():
        for stem, reason in records.errors.items():
            together.setdefault((stem, reason), []).append(name)
    failed = [
        ("all methods" if len(names) == len(run.methods) > 1 else ", ".join(names), stem, reason)
        for (stem, reason), names in sorted(together.items())
    ]
    notes = Counter(
        note
        for records in run.records.values()
        for lines in records.notes.values()
        for note in lines
    )
    if not failed and not notes:
        return "<p>Every picture was measured, and none needed a remark.</p>"
    text = ""
    if failed:
        shown = "".join(
            f"<tr><td>{esc(stem)}</td><td>{esc(name)}</td><td>{esc(reason)}</td></tr>"
            for name, stem, reason in failed[:200]
        )
        more = f"<p>and {len(failed) - 200} more, in results.json</p>" if len(failed) > 200 else ""
        text += (
            f"<p>{sum(map(len, together.values()))} result(s) could not be measured.</p>"
            '<div class="wide"><table class="plain"><thead><tr><th>Picture</th><th>Method</th>'
            f"<th>Reason</th></tr></thead><tbody>{shown}</tbody></table></div>{more}"
        )
    if notes:
        items = "".join(
            f"<li>{esc(note)}{f' ({n} results)' if n > 1 else ''}</li>"
            for note, n in notes.most_common(30)
        )
        text += f"<p>Remarks on results that were measured; per picture in pictures.csv.</p><ul>{items}</ul>"
    return text


def definitions(run: Run) -> str:
    items = []
    for _, rows in ordered(run):
        for metric in rows:
            reason = run.missing.get(metric.name)
            tail = f' <span class="none">(n/a: {esc(reason)})</span>' if reason else ""
            items.append(
                f"<dt>{esc(metric.label)} <span>{ARROWS[metric.better]}</span></dt>"
                f"<dd>{esc(metric.meaning)}{tail}</dd>"
            )
    return f"<dl>{''.join(items)}</dl>"


def provenance(run: Run, results: dict[str, Any]) -> str:
    rows = [
        ("Versions", ", ".join(f"{k} {v}" for k, v in results["versions"].items() if v)),
        ("Machine", results["machine"]),
        (
            "Options",
            ", ".join(f"{k}={v}" for k, v in results["options"].items() if v not in (None, [], "")),
        ),
        ("Hash of all results", results["pictures_sha256"]),
    ]
    for method in run.methods:
        facts = {k: v for k, v in method.facts.items() if k not in ("what", "header")}
        text = "; ".join(
            f"{k} {json.dumps(v, ensure_ascii=False) if isinstance(v, dict) else v}"
            for k, v in facts.items()
        )
        rows.append(
            (
                method.name,
                f"{method.facts.get('what', '')}. {text}" if text else method.facts["what"],
            )
        )
    body = "".join(f"<dt>{esc(str(k))}</dt><dd>{esc(str(v))}</dd>" for k, v in rows)
    return f'<dl class="facts">{body}</dl>'


def text_table(run: Run, summaries: dict[str, dict[str, Summary]]) -> str:
    """The main numbers for a terminal."""
    width = max(len(m.label) for m in run.rows) + 4
    names = [m.name for m in run.methods]
    wide = max(10, *(len(name) for name in names))
    lines = [" " * width + "  ".join(f"{name:>{wide}}" for name in names)]
    missing: dict[str, list[str]] = {}
    for metric in run.rows:
        if metric.name in run.missing:
            missing.setdefault(run.missing[metric.name], []).append(metric.label)
            continue
        found = summaries[metric.name]
        cells = (
            number(centre(found[n], metric), metric.digits) if n in found else "n/a" for n in names
        )
        head = f"{metric.label} {ARROWS[metric.better]}".ljust(width)
        lines.append(head + "  ".join(f"{cell:>{wide}}" for cell in cells))
    lines += [f"n/a: {', '.join(labels)}: {reason}" for reason, labels in missing.items()]
    return "\n".join(lines)

"""Results as markdown."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from statistics import median
from typing import Any

from .compositions import NAMES
from .macs import RULE

GIB = 2**30
STAGES = ("prompt", "encode", "UNet", "decode")


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A markdown table, the first column to the left."""
    head = list(head)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *[list(map(str, row)) for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def header(result: dict[str, Any]) -> str:
    """What was measured, where, and when."""
    m = result["machine"]
    flags = f" ({' '.join(m['flags'])})" if m.get("flags") else ""
    lines = [
        f"## {result['model']}\n",
        f"{m['date']}; {result['device']}, {result['dtype']}; {m.get('gpu', m['system'])}, "
        f"{m['cores']} cores, {m['threads']} threads, {m['cpu']}{flags}; load {loads([m['load']])}; "
        f"torch {m['torch']}, diffusers {m['diffusers']}, transformers {m['transformers']}.",
        *result["notes"],
    ]
    return "\n".join(lines) + "\n"


def counts(result: dict[str, Any]) -> str:
    """Operations, weights and counted tensors."""
    rows = []
    for size in next(iter(result["counts"].values()))["sizes"]:
        for letter, counted in result["counts"].items():
            macs, live = (counted["sizes"][size][key] for key in ("macs", "live"))
            rows.append(
                [
                    f"{size} {letter}: {NAMES[letter]}",
                    figure(counted["weights"] / GIB),
                    *(f"{macs[s] / 1e9:.1f}" if s in macs else "-" for s in STAGES),
                    f"{sum(macs.values()) / 1e9:.1f}",
                    " / ".join(figure(live[s] / GIB) for s in STAGES[1:]),
                ]
            )
    head = ["output, variant", "weights GiB", *(f"{s} GMAC" for s in STAGES), "sum GMAC"]
    head.append("live tensors GiB (encode / UNet / decode)")
    return f"{RULE}\n\n{table(head, rows)}"


def pipeline(result: dict[str, Any]) -> str:
    """Variants side by side: seconds are medians, minima in brackets."""
    parts, skipped = [], []
    for row in result["pipeline"]:
        if "skipped" in row:
            skipped.append(f"{row['size']} px was left out: {row['skipped']}.")
            continue
        parts += compared(row)
    head = [
        "output, variant",
        *(f"{s} s" for s in STAGES),
        "sum s",
        "CPU s",
        "peak GiB",
        "of it beyond weights",
        "rel-L2",
        "PSNR dB",
        *("/A", "/B"),
    ]
    text = (
        "Median of the repeats, minimum in brackets; /A and /B are medians of the ratios within a "
        "repeat. Parity is against A in the same row's size. Peak is of the process (RSS every 2 ms) "
        "or, on a GPU, of allocated memory, in a pass that is not timed.\n\n" + table(head, parts)
    )
    load = [one for row in result["pipeline"] for one in row.get("load", [])]
    return "\n".join([text, *skipped, f"Load while it ran: {loads(load)}.", ""])


def compared(row: dict[str, Any]) -> list[list[str]]:
    """Lines of one size."""
    lines = []
    variants = row["variants"]
    for letter, v in variants.items():
        repeats = v["repeats"]
        walls = [sum(t[0] for t in stages.values()) for stages in repeats]
        cpus = [sum(t[1] for t in stages.values()) for stages in repeats]
        line = [f"{row['size']} {letter}: {NAMES[letter]}"]
        for stage in STAGES:
            there = [stages[stage][0] for stages in repeats if stage in stages]
            line.append(seconds(there) if there else "-")
        line += [seconds(walls), seconds(cpus)]
        line += [f"{v['peak'] / GIB:.2f}", f"{(v['peak'] - v['before']) / GIB:.2f}"]
        reference = letter == row["reference"]
        line += ["reference", ""] if reference else [f"{v['rel_l2']:.1e}", decibels(v["psnr"])]
        for other in "AB":
            if other not in variants or letter <= other:
                line.append("")
                continue
            ratios = [
                mine / sum(t[0] for t in theirs.values())
                for mine, theirs in zip(walls, variants[other]["repeats"], strict=True)
            ]
            line.append(f"{median(ratios):.2f}")
        lines.append(line)
    return lines


def growth(result: dict[str, Any]) -> str:
    """Seconds per megapixel as pictures grow."""
    rows, base = [], None
    for row in result["growth"]:
        megapixels = row["size"] ** 2 / 1e6
        times = [s / megapixels for s in row["seconds"]]
        base = base or median(times)
        parity = decibels(row["psnr"]) if "psnr" in row else "-"
        seam = "-" if row["seam_score"] is None else f"{row['seam_score']:.2f}"
        mode = row["mode"] + (f", {row['tiles']} tiles" if row["tiles"] > 1 else "")
        if row["tiles"] > 1:
            mode += f" of {row['tile'][1]}, overlap {row['overlap']}"
        rows.append(
            [
                f"{row['size']} ({megapixels:.2f} MP)",
                mode,
                seconds(row["seconds"]),
                seconds(times),
                f"{median(times) / base:.2f}",
                f"{row['peak'] / GIB:.2f}",
                f"{(row['peak'] - row['before']) / GIB:.2f}",
                parity,
                seam,
                f"{row['lr_psnr']:.1f}",
            ]
        )
    head = ["output", "mode", "s", "s/MP", "s/MP over the first", "peak GiB", "beyond weights"]
    head += ["PSNR dB to one fp32 pass", "seam score", "dB to the input, reduced"]
    load = [one for row in result["growth"] for one in row["load"]]
    return (
        f"`GenDR.restore` as a person calls it, {result['dtype']}; median, minimum in brackets.\n\n"
        f"{table(head, rows)}\nLoad while it ran: {loads(load)}.\n"
    )


def strips(result: dict[str, Any]) -> str:
    """The autoencoder whole and by strips."""
    rows = []
    for row in result["strips"]:
        for way, at in row["ways"].items():
            whole = row["ways"][way.split(",")[0] + ", whole"]
            ratios = [a / b for a, b in zip(at["wall"], whole["wall"], strict=True)]
            rows.append(
                [
                    f"{row['size']} {way}",
                    seconds(at["wall"]),
                    f"{median(ratios):.2f}",
                    f"{at['peak'] / GIB:.2f}",
                    f"{at['peak'] / max(1, whole['peak']):.2f}",
                    f"{at['rel_l2']:.1e}",
                    decibels(at["psnr"]),
                ]
            )
    head = ["size, stage", "s", "over whole", "peak beyond weights GiB", "over whole"]
    head += ["rel-L2 to whole in fp32", "PSNR dB"]
    load = [one for row in result["strips"] for one in row["load"]]
    return (
        f"Exact strips of the autoencoder, {result['dtype']}; median, minimum in brackets.\n\n"
        f"{table(head, rows)}\nLoad while it ran: {loads(load)}.\n"
    )


def plan(args: argparse.Namespace, reasons: dict[int, str]) -> str:
    """What a run without --dry-run would do."""
    lines = [f"Would run: {', '.join(args.sections)}; {args.repeats} repeats."]
    for size, why in reasons.items():
        lines.append(f"- {size} px: {why or 'fits'}")
    if "strips" in args.sections:
        lines.append(f"- strips at {', '.join(map(str, args.strips))}")
    if "growth" in args.sections:
        lines.append(f"- growth to {', '.join(map(str, args.growth))}")
    return "\n".join(lines) + "\n"


def seconds(values: list[float]) -> str:
    """Median and, in brackets, minimum."""
    return f"{figure(median(values))} ({figure(min(values))})"


def figure(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def decibels(value: float | None) -> str:
    """PSNR, or that nothing differs."""
    return "equal" if value is None else f"{value:.1f}"


def loads(values: list[list[float] | None]) -> str:
    """Range of the one-minute load."""
    there = [value[0] for value in values if value]
    if not there:
        return "unknown"
    return f"{min(there):.1f} to {max(there):.1f}" if len(there) > 1 else f"{there[0]:.1f}"

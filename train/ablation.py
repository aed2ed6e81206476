"""The paper's Table 4 as one command: every form of the distillation with the same budget.

    python -m train.ablation --out runs/ablation --recipe tiny --base BASE --data DATA \\
        --validate LR --originals HR [any other option of train.cida]

Trains each preset of train/recipes/presets.toml from the same start on the same samples and noise, then
measures all of them, the start included, on the validation pictures with train.evaluate. Writes
ablation.md (the table, and why a run stopped), report/ (pictures side by side) and one run folder for each
preset. The same command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import cida, evaluate, recipe
from train.atomic import write_text
from train.run import TrainingError

METRICS = ("psnr", "ssim", "sharp", "lr_psnr", "niqe")
LABELS = {
    "start": "where all begin",
    "regression": "regression only",
    "vsd": "VSD",
    "sid": "SiD",
    "cid": "CiD",
    "cida": "CiDA",
    "cida_mse_1": "CiDA, lambda1 10, mse 1",
    "cida_mse_01": "CiDA, lambda1 10, mse .1",
    "paper_literal": "Eqs. 8-11 as printed",
}


@dataclass(frozen=True)
class Outcome:
    """What became of one preset."""

    preset: str
    steps: int
    minutes: float
    distance: float | None
    reason: str = ""


def last_values(folder: Path) -> dict[str, Any]:
    """The last logged step of a run."""
    path = folder / "log.jsonl"
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return next((line for line in reversed(lines) if "distance" in line), {})


def run_one(preset: str, words: Sequence[str], out: Path) -> tuple[cida.Settings, Outcome]:
    """Train one preset, or find it done."""
    record = out / preset / "outcome.json"
    chosen = recipe.parse(
        cida.Settings,
        "cida",
        cida.__doc__,
        [*words, "--preset", preset, "--out", str(out / preset)],
        with_presets=True,
    )
    if record.exists():
        return chosen.settings, Outcome(**json.loads(record.read_text(encoding="utf-8")))
    print(f"--- {preset}", file=sys.stderr, flush=True)
    started, reason = time.monotonic(), ""
    try:
        cida.train(chosen.settings, chosen.out, chosen.device)
    except TrainingError as error:
        reason = str(error)
    last = last_values(out / preset)
    outcome = Outcome(
        preset,
        last.get("step", 0),
        (time.monotonic() - started) / 60,
        last.get("distance"),
        reason,
    )
    if reason or outcome.steps >= chosen.settings.steps - chosen.settings.log_every:
        write_text(record, json.dumps(outcome.__dict__))
    return chosen.settings, outcome


def measure(out: Path, settings: cida.Settings, presets: Sequence[str], niqe: str | None) -> dict:
    """train.evaluate on the start and on every preset that yielded a file; its results."""
    models = {"start": Path(settings.generator or settings.base)}
    models |= {name: out / name / "model.safetensors" for name in presets}
    words = ["--data", settings.validate, "--out", str(out / "report"), "--baselines", "bicubic"]
    words += ["--color-fix", "none", "--dtype", "fp32", "--tile-pictures", "0"]
    words += ["--ref", settings.originals] if settings.originals else []
    words += ["--niqe-params", niqe] if niqe else []
    words += ["--title", "Forms of the distillation"]
    for name, path in models.items():
        if path.exists():
            words += ["--model", f"{name}={path}"]
    if evaluate.main(words):
        raise TrainingError("the evaluation failed, see above: mend that and run the command again")
    return json.loads((out / "report" / "results.json").read_text(encoding="utf-8"))


def table(results: dict[str, Any], outcomes: dict[str, Outcome]) -> str:
    """The rows in Markdown."""
    found = {m["name"]: m for m in results["metrics"] if m["name"] in METRICS and m["methods"]}
    heads = [found[name]["label"] for name in METRICS if name in found]
    lines = [
        "| | " + " | ".join(heads) + " | mean abs(z_g - z_h) | steps | minutes |",
        "|---|" + "---|" * (len(heads) + 3),
    ]
    for name in ("bicubic", "start", *outcomes):
        cells = [LABELS.get(name, name)]
        for metric in (found[n] for n in METRICS if n in found):
            value = metric["methods"].get(name, {}).get("mean")
            digits = 2 if metric["name"] in ("psnr", "lr_psnr", "niqe") else 3
            cells.append("-" if value is None else f"{value:.{digits}f}")
        o = outcomes.get(name)
        cells += ["", "", ""] if o is None else [
            "-" if o.distance is None else f"{o.distance:.3f}", str(o.steps), f"{o.minutes:.1f}"
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    notes = [
        f"* {LABELS.get(o.preset, o.preset)}: {o.reason}" for o in outcomes.values() if o.reason
    ]
    return "\n".join([*lines, "", *notes]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    known = tuple(recipe.presets())
    parser = argparse.ArgumentParser(
        prog="python -m train.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, table, report")
    parser.add_argument(
        "--presets", default=",".join(known), help="which, in the table's order (all)"
    )
    parser.add_argument("--niqe-params", metavar="FILE", help="as in train.evaluate")
    args, words = parser.parse_known_args(argv)
    presets = [name for name in args.presets.split(",") if name]
    if unknown := sorted(set(presets) - set(known)):
        parser.error(f"there is no preset {unknown[0]}: {', '.join(known)}")
    outcomes: dict[str, Outcome] = {}
    try:
        for preset in presets:
            settings, outcomes[preset] = run_one(preset, words, args.out)
            if not settings.validate:
                parser.error("name the pictures to compare on: --validate LR --originals HR")
        results = measure(args.out, settings, presets, args.niqe_params)
    except cida.ERRORS as error:
        print(f"train.ablation: {error}", file=sys.stderr)
        return 1
    text = table(results, outcomes)
    write_text(args.out / "ablation.md", text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

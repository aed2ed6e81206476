"""The options of `python -m train.evaluate`."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

from gendr.settings import COLOR_FIXES, DTYPES, fidelity_from
from train.evaluation import testset

BASELINES = ("bicubic", "lanczos")


class Sets(argparse.Action):
    """--sets: what the paper measures on, where it is to be had, and how; then leaves."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for name in testset.recipe_names():
            recipe = testset.read_recipe(name)
            kind = "pairs" if recipe.paired else "pictures without references"
            print(f"{name}: {recipe.title}, {recipe.pictures} {kind}")
            for line in (*recipe.source, *recipe.notes):
                print(textwrap.fill(line, 100, initial_indent="  - ", subsequent_indent="    "))
        parser.exit()


def parse(argv: list[str] | None, doc: str) -> argparse.Namespace:
    """The options; doc is shown by --help."""
    text, _, rest = doc.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description=text,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("what is measured, on what").add_argument
    add("--data", type=Path, required=True, metavar="LR_DIR", help="low-quality pictures")
    add("--ref", type=Path, metavar="HR_DIR", help="references of the same names")
    add("--out", type=Path, required=True, metavar="DIR", help="report, numbers and results")
    add(
        "--model",
        action="append",
        default=[],
        metavar="[NAME=]FILE[?SETTING=VALUE&...]",
        help="a GenDR checkpoint; 'embedded' is the one that comes with the package; repeatable",
    )
    add(
        "--results",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="ready results of any method; repeatable",
    )
    add(
        "--spandrel",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="a model for spandrel (ESRGAN and many others); repeatable",
    )
    add(
        "--baselines",
        default=",".join(BASELINES),
        metavar="LIST",
        help="bicubic,lanczos or none (default: both); the first method is the one compared with",
    )
    add(
        "--protocol",
        metavar="NAME",
        help="one of the paper's sets, or a .toml of the same form: "
        + ", ".join(testset.recipe_names()),
    )
    add("--sets", action=Sets, nargs=0, help="tell about the paper's four sets, and leave")
    add("--limit", type=int, metavar="N", help="only the first N pictures by name")

    add = parser.add_argument_group("metrics").add_argument
    add(
        "--metrics",
        default="all",
        metavar="LIST",
        help="all (default), native, or names of learned metrics (the paper's, or any of pyiqa's)",
    )
    add(
        "--niqe-params",
        type=Path,
        metavar="FILE",
        help="BasicSR's niqe_pris_params.npz: NIQE is then computed here",
    )
    add(
        "--tile-pictures",
        type=int,
        default=2,
        metavar="N",
        help="pictures that every GenDR model restores with three tile sizes (default 2)",
    )
    add(
        "--tile-sizes",
        default="",
        metavar="A,B,C",
        help="their edges in output pixels (default: whole, a half, a quarter)",
    )

    add = parser.add_argument_group("restoration").add_argument
    add("--scale", type=float, help="default 4, or the protocol's")
    add("--color-fix", choices=COLOR_FIXES, help="default: the protocol's, else gendr's own")
    for name in ("tile", "overlap", "tile-batch"):
        add(f"--{name}", type=int)
    for name in ("detail", "guidance"):
        add(f"--{name}", type=float)
    add("--fidelity", type=fidelity_from, help="a number or auto; default: gendr's own")
    add("--dtype", choices=DTYPES, default="auto")
    add("--device", default="auto")
    add("--threads", type=int, metavar="N", help="CPU threads of torch")

    add = parser.add_argument_group("report").add_argument
    add(
        "--pictures",
        type=int,
        default=12,
        metavar="N",
        help="pictures embedded in the report (default 12); all others are linked",
    )
    add("--show", default="", metavar="NAMES", help="pictures to embed, by name, before others")
    add("--title", help="the report's heading")
    return parser.parse_args(argv)

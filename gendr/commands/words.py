"""The words of the command line. Defaults and bounds come from `gendr.settings` alone."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import pictures
from ..files.sources import HYPIR
from ..settings import BOUNDS, COLOR_FIXES, DTYPES, PRESETS, SPEEDS, Settings, fidelity_from
from . import jobs
from .finding import expand
from .trouble import plain

PROG = os.environ.get("GENDR_PROG", "gendr")
EPILOG = """\
exit codes: 0 everything is done, 1 something failed (it is said what), 2 wrong use, 130 stopped
with Ctrl-C (what was finished is kept; --resume goes on)"""


class Parser(argparse.ArgumentParser):
    """Wrong use is answered with what was wrong, not with every option there is.

    typed: the words of the command line, as far as they are known.
    """

    typed: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.typed = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        taken = next((w for w in self.typed if w.startswith("-") and os.path.lexists(w)), None)
        if taken is not None and "--" not in self.typed:
            message += f"; names that begin with -, as {plain(taken)} does, come last, after --"
        self.exit(2, f"{self.prog}: {message}\n`{self.prog} --help` lists what can be given\n")


def parser(runs: dict[str, Callable[..., int]]) -> Parser:
    """All commands; `runs` holds what each of them calls."""
    top = Parser(
        prog=PROG,
        description="GenDR: one-step diffusion super-resolution.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=runs[name], parser=made)
        return made

    add_upscale(command("upscale", "restore and enlarge pictures"))

    info = command("info", "show what a model file is, without loading it")
    info.add_argument(
        "checkpoint", type=expand, nargs="?", help="model file (default: the embedded)"
    )
    info.add_argument("--json", action="store_true", help="print one JSON object")

    check = command("doctor", "check this installation; add its output to bug reports")
    add_model(check)
    add_speed(check)
    check.add_argument("--json", action="store_true", help="print one JSON object")

    fold = command("fold", "write the folded one-step form of a model: smaller, faster")
    fold.add_argument("checkpoint", type=expand, help="model file")
    add_base(fold)
    fold.add_argument("--output", "-o", type=place, required=True, help="file to write")
    fold.add_argument("--dtype", choices=DTYPES[1:], help="number format of the weights")
    fold.add_argument("--overwrite", action="store_true", help="replace an existing file")

    add_convert(command("convert", "make a GenDR file of a public one-step restorer and its base"))

    side = command("compare", "write one PNG: input | result, and a detail enlarged")
    side.add_argument("input", type=expand, help="the picture before")
    side.add_argument("result", type=expand, help="the picture after")
    side.add_argument("--output", "-o", type=place, help="(default: RESULT_compare.png)")
    side.add_argument(
        "--crop",
        type=crop,
        metavar="X,Y,SIDE",
        help="the detail, in pixels of the input (default: where most happens)",
    )
    add_reading(side)
    side.add_argument("--overwrite", action="store_true", help="replace an existing file")
    side.add_argument("--json", action="store_true", help="print one JSON object")
    return top


def add_convert(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "source", type=expand, help="file of PiSA-SR, OSEDiff or HYPIR, or folder of OMGSR-S"
    )
    made.add_argument(
        "--base",
        type=expand,
        required=True,
        help="Stable Diffusion 2.1-base: a diffusers folder, or one file",
    )
    made.add_argument("--output", "-o", type=place, required=True, help="file to write")
    made.add_argument("--prompt", default="", help="the fixed prompt (default: empty)")
    made.add_argument(
        "--embeds",
        type=expand,
        help="file that holds the prompt's embedding, instead of encoding it",
    )
    made.add_argument(
        "--semantic",
        type=int,
        choices=(0, 1),
        default=1,
        help="PiSA-SR: 0 leaves the semantic adapter out (default: %(default)s)",
    )
    made.add_argument(
        "--coeff-t",
        type=timestep,
        metavar="N",
        help=f"HYPIR: noise level, 1 to 999 (default: {HYPIR.coeff_t})",
    )
    made.add_argument(
        "--dtype",
        choices=DTYPES[1:],
        default="fp16",
        help="number format of the weights (default: %(default)s)",
    )
    made.add_argument(
        "--accept-licence", action="store_true", help="accept the terms that the command shows"
    )
    made.add_argument("--overwrite", action="store_true", help="replace an existing file")


def add_upscale(made: argparse.ArgumentParser) -> None:
    defaults = Settings()
    made.add_argument(
        "pictures", nargs="+", help="files, folders or patterns such as 'scans/*.jpg'"
    )
    made.add_argument(
        "--output",
        "-o",
        type=place,
        help="folder for the results, or a file for one picture (default: beside each picture)",
    )

    size = made.add_argument_group("size (one of)").add_mutually_exclusive_group()
    number(size, "--scale", "-s", help="result / input, fractions too")
    number(size, "--long-side", help="longer side of the result in pixels")
    number(size, "--short-side", help="shorter side of the result in pixels")
    number(size, "--megapixels", help="size of the result in millions of pixels")

    look = made.add_argument_group("look")
    look.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default=defaults.preset,
        help="the kind of picture; the options below count where you give them "
        "(default: %(default)s, by looking at each picture)",
    )
    number(look, "--detail", help="0 adds nothing, 1 is the model, above exaggerates")
    bound = BOUNDS["fidelity"]
    look.add_argument(
        "--fidelity",
        type=fidelity_from,
        default=defaults.fidelity,
        metavar="N",
        help="1 = reduced to the input's size, the result is the input "
        f"({bound.minimum:g} to {bound.maximum:g}, default: {defaults.fidelity}, by how damaged the "
        "input is)",
    )
    look.add_argument(
        "--color-fix",
        choices=COLOR_FIXES,
        default=defaults.color_fix,
        help=f"how colours are kept (default: {defaults.color_fix})",
    )
    number(look, "--guidance", help="above 1: two passes, stronger (default: the model's)")
    look.add_argument(
        "--mask",
        type=expand,
        metavar="FILE",
        help="restore where this picture is white, enlarge plainly elsewhere",
    )
    look.add_argument(
        "--no-steady",
        dest="steady",
        action="store_false",
        help="videos: every frame on its own; what does not move is kept from flickering otherwise",
    )
    look.add_argument("--seamless", action="store_true", help="keep a repeating texture repeating")

    work = made.add_argument_group("work")
    add_model(work)
    add_speed(work)
    number(work, "--tile", help="side of a tile in pixels of the result, 0 = by free memory")
    number(work, "--overlap", help="pixels that tiles share, 0 = automatic")
    number(work, "--tile-batch", help="tiles at a time, 0 = automatic")

    files = made.add_argument_group("files")
    quality = inspect.signature(pictures.write).parameters["quality"].default
    files.add_argument(
        "--format", dest="form", choices=(*jobs.FORMATS, "same"), help="(default: png)"
    )
    files.add_argument(
        "--quality", type=percent, help=f"of jpg and webp, 1 to 100 (default: {quality})"
    )
    files.add_argument(
        "--suffix", type=part_of_a_name, help="added to names (default: _x4 and the like)"
    )
    files.add_argument(
        "--recursive", "-r", action="store_true", help="look into folders' folders, not into links"
    )
    add_reading(files)
    files.add_argument(
        "--strip", action="store_true", help="no metadata in results, but what the colours are"
    )
    files.add_argument("--overwrite", action="store_true", help="replace existing results")
    files.add_argument(
        "--resume", action="store_true", help="skip what was done with the same settings before"
    )

    told = made.add_argument_group("what is told")
    told.add_argument("--plan", action="store_true", help="tell what would be done, do nothing")
    told.add_argument("--json", action="store_true", help="one JSON object per picture on stdout")
    told.add_argument("--quiet", "-q", action="store_true", help="only errors")


def add_model(group: Any) -> None:
    group.add_argument("--model", "-m", type=expand, help="model file (default: the embedded one)")
    add_base(group)
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto)")
    group.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="(default: %(default)s)")


def add_speed(group: Any) -> None:
    group.add_argument(
        "--speed",
        choices=SPEEDS,
        default=SPEEDS[0],
        help="graph: record and replay, on an NVIDIA card; compile: by torch.compile "
        "(default: %(default)s)",
    )


def add_reading(group: Any) -> None:
    group.add_argument(
        "--truncated", action="store_true", help="take what is there of files that are cut short"
    )
    group.add_argument(
        "--max-pixels",
        type=positive,
        default=pictures.MAX_PIXELS,
        metavar="N",
        help="refuse inputs of more pixels (default: %(default)s)",
    )


def add_base(group: Any) -> None:
    group.add_argument(
        "--base", type=expand, help="GenDR file that supplies the rest, for a LoRA or a bare UNet"
    )


def number(group: Any, *flags: str, help: str) -> None:
    """A number of `Settings`: bounds and default from there."""
    name = flags[0][2:].replace("-", "_")
    bound, default = BOUNDS[name], getattr(Settings(), name)
    limits = f"{bound.minimum:g} to {bound.maximum:g}"
    if default is not None:
        limits += f", default: {default:g}"
    group.add_argument(
        *flags,
        type=int if isinstance(bound.step, int) else float,
        default=default,
        metavar="N",
        help=f"{help} ({limits})",
    )


def place(text: str) -> Path:
    """Where results go."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty: give a folder or a file")
    if text == "-":
        raise argparse.ArgumentTypeError(
            "results go to files, not to standard output: give a folder or a file (./- is one)"
        )
    return expand(text)


def part_of_a_name(text: str) -> str:
    if wrong := next((c for c in (os.sep, os.altsep, "/", "\0") if c and c in text), None):
        raise argparse.ArgumentTypeError(
            f"{text!r} is to be part of a name, which {wrong!r} is not: --output names folders"
        )
    return text


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def percent(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{value} is not between 1 and 100")
    return value


def timestep(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 999:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 to 999")
    return int(text)


def crop(text: str) -> tuple[int, int, int]:
    parts = [int(part) for part in text.split(",")]
    if len(parts) != 3:
        raise argparse.ArgumentTypeError("give three numbers, X,Y,SIDE")
    return parts[0], parts[1], parts[2]

"""The command line: `gendr upscale`, `info`, `doctor`, `fold`, `compare`.

The same words and the same defaults as in Python and in the nodes' widgets: both come from
`gendr.settings`. Exit codes: 0 = done, 1 = something failed, 2 = wrong use, 130 = Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import checkpoint, pictures
from .commands import compare, doctor, jobs, upscale
from .settings import BOUNDS, COLOR_FIXES, DTYPES, Settings

PROG = os.environ.get("GENDR_PROG", "gendr")
EPILOG = """\
exit codes: 0 everything is done, 1 something failed (it is said what), 2 wrong use, 130 stopped
with Ctrl-C (what was finished is kept; --resume goes on)"""


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else list(words)
    for stream in (sys.stdout, sys.stderr):
        # File names need not fit the terminal's encoding.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")
    args = parser().parse_args(words)
    try:
        return args.run(args, words)
    except (ValueError, OSError) as error:  # CheckpointError and PictureError are ValueErrors
        if isinstance(error, BrokenPipeError):  # the reader, `head` say, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        print(f"gendr: {upscale.reason(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gendr: stopped", file=sys.stderr)
        return upscale.STOPPED


# ---- commands ----


def run_upscale(args: argparse.Namespace, words: list[str]) -> int:
    wrong_use = args.parser.error
    try:
        settings = Settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)})
    except ValueError as error:
        wrong_use(str(error))
    output, form = args.output, args.form
    if output is not None and output.suffix.lower() in jobs.PICTURES and not output.is_dir():
        check_output_file(output, form, args.pictures, wrong_use)
    options = upscale.Options(
        settings=settings,
        output=output,
        model=args.model,
        base=args.base,
        device=args.device,
        dtype=args.dtype,
        form=form,
        quality=args.quality,
        suffix=default_suffix(settings) if args.suffix is None else args.suffix,
        recursive=args.recursive,
        truncated=args.truncated,
        resume=args.resume,
        overwrite=args.overwrite,
        plan=args.plan,
        json=args.json,
        quiet=args.quiet,
        command=words,
    )
    return upscale.run(args.pictures, options)


def check_output_file(output: Path, form: str | None, words: list[str], wrong_use: Any) -> None:
    """`--output` is a file: then there is one input, and the name says the format."""
    if output.suffix.lower() not in jobs.WRITABLE:
        wrong_use(f"results can be written as {', '.join(jobs.WRITABLE)}, not {output.suffix}")
    if not jobs.collect(words).single:
        wrong_use(
            f"--output {output} is one file, and there may be several pictures: give a folder"
        )
    family = next(
        f.suffixes for f in pictures.FORMATS.values() if output.suffix.lower() in f.suffixes
    )
    if form not in (None, "same") and jobs.FORMATS[form] not in family:
        wrong_use(f"--format {form} and --output {output} do not fit together")


def default_suffix(settings: Settings) -> str:
    for name, unit in (("long_side", "px"), ("short_side", "px"), ("megapixels", "mp")):
        if getattr(settings, name) is not None:
            return f"_{getattr(settings, name):g}{unit}"
    return f"_x{settings.scale:g}"


def run_info(args: argparse.Namespace, words: list[str]) -> int:
    facts = checkpoint.describe(args.checkpoint or checkpoint.EMBEDDED)
    if args.json:
        print(json.dumps(facts, default=str))
    else:
        print("\n".join(readable({name: facts[name] for name in sorted(facts, key=importance)})))
    return 0


def run_doctor(args: argparse.Namespace, words: list[str]) -> int:
    return doctor.run(args.model, args.base, args.device, args.dtype, as_json=args.json)


def run_fold(args: argparse.Namespace, words: list[str]) -> int:
    output = args.output
    if output.suffix.lower() not in (".safetensors", ".sft"):
        args.parser.error(f"--output {output} must end in .safetensors")
    if output.exists() and not args.overwrite:
        args.parser.error(f"{output} exists; --overwrite replaces it")
    model = checkpoint.load(args.checkpoint, base=args.base, device="cpu", dtype="fp32")
    dtype = args.dtype or model.header.get("dtype", "fp16")
    output.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(output, model.network, model.header, dtype=dtype)
    size = output.stat().st_size / 1e6
    print(f"{output}: {model.parameters:,} parameters of one step in {dtype}, {size:.1f} MB")
    return 0


def run_compare(args: argparse.Namespace, words: list[str]) -> int:
    output = args.output or args.result.with_name(f"{args.result.stem}_compare.png")
    facts = compare.run(args.input, args.result, output, args.crop, args.overwrite)
    print(json.dumps(facts) if args.json else f"{args.input} | {args.result} -> {output}")
    return 0


def importance(name: str) -> int:
    """What a person asks of a model first; what is not named comes after it, details last."""
    order = ("path", "name", "kind", "format", "licence", "scale", "parameters", "bytes")
    last = ("config", "sha256")
    return order.index(name) if name in order else 100 + (name in last)


def readable(facts: dict[str, Any], inset: str = "") -> list[str]:
    """Facts as aligned lines, nested ones inset."""
    width = max((len(str(name)) for name in facts), default=0)
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            lines += [f"{inset}{name}", *readable(value, inset + "  ")]
        else:
            if value is None or value in ([], {}):
                value = "-"
            elif isinstance(value, (list, tuple)):
                value = " ".join(map(str, value))
            elif isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
                value = f"{value:,}"
            lines.append(f"{inset}{name!s:<{width}}  {value}")
    return lines


# ---- words ----


class Parser(argparse.ArgumentParser):
    """Wrong use is answered with what was wrong, not with every option there is."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n`{self.prog} --help` lists what can be given\n")


def parser() -> Parser:
    top = Parser(
        prog=PROG,
        description="GenDR: one-step diffusion super-resolution.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run, parser=made)
        return made

    add_upscale(command("upscale", run_upscale, "restore and enlarge pictures"))

    info = command("info", run_info, "show what a model file is, without loading it")
    info.add_argument("checkpoint", type=Path, nargs="?", help="model file (default: the embedded)")
    info.add_argument("--json", action="store_true", help="print one JSON object")

    check = command("doctor", run_doctor, "check this installation; add its output to bug reports")
    add_model(check)
    check.add_argument("--json", action="store_true", help="print one JSON object")

    fold = command("fold", run_fold, "write the folded one-step form of a model: smaller, faster")
    fold.add_argument("checkpoint", type=Path, help="model file")
    add_base(fold)
    fold.add_argument("--output", "-o", type=Path, required=True, help="file to write")
    fold.add_argument("--dtype", choices=DTYPES[1:], help="number format of the weights")
    fold.add_argument("--overwrite", action="store_true", help="replace an existing file")

    side = command("compare", run_compare, "write one PNG: input | result, and a detail enlarged")
    side.add_argument("input", type=Path, help="the picture before")
    side.add_argument("result", type=Path, help="the picture after")
    side.add_argument("--output", "-o", type=Path, help="(default: RESULT_compare.png)")
    side.add_argument(
        "--crop",
        type=crop,
        metavar="X,Y,SIDE",
        help="the detail, in pixels of the input (default: where most happens)",
    )
    side.add_argument("--overwrite", action="store_true", help="replace an existing file")
    side.add_argument("--json", action="store_true", help="print one JSON object")
    return top


def add_upscale(made: argparse.ArgumentParser) -> None:
    defaults = Settings()
    made.add_argument(
        "pictures", nargs="+", help="files, folders or patterns such as 'scans/*.jpg'"
    )
    made.add_argument(
        "--output",
        "-o",
        type=Path,
        help="folder for the results, or a file for one picture (default: beside each picture)",
    )

    size = made.add_argument_group("size (one of)").add_mutually_exclusive_group()
    number(size, "--scale", "-s", help="result / input, fractions too")
    number(size, "--long-side", help="longer side of the result in pixels")
    number(size, "--short-side", help="shorter side of the result in pixels")
    number(size, "--megapixels", help="size of the result in millions of pixels")

    look = made.add_argument_group("look")
    number(look, "--detail", help="0 adds nothing, 1 is the model, above exaggerates")
    number(look, "--fidelity", help="1 = reduced to the input's size, the result is the input")
    look.add_argument(
        "--color-fix",
        choices=COLOR_FIXES,
        default=defaults.color_fix,
        help=f"how colours are kept (default: {defaults.color_fix})",
    )
    number(look, "--guidance", help="above 1: two passes, stronger (default: the model's)")
    look.add_argument("--seamless", action="store_true", help="keep a repeating texture repeating")

    work = made.add_argument_group("work")
    add_model(work)
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
    files.add_argument("--suffix", help="added to names (default: _x4 and the like)")
    files.add_argument("--recursive", "-r", action="store_true", help="look into folders' folders")
    files.add_argument(
        "--truncated", action="store_true", help="take what is there of files that are cut short"
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
    group.add_argument("--model", "-m", type=Path, help="model file (default: the embedded one)")
    add_base(group)
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto)")
    group.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="(default: %(default)s)")


def add_base(group: Any) -> None:
    group.add_argument(
        "--base", type=Path, help="GenDR file that supplies the rest, for a LoRA or a bare UNet"
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


def percent(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{value} is not between 1 and 100")
    return value


def crop(text: str) -> tuple[int, int, int]:
    parts = [int(part) for part in text.split(",")]
    if len(parts) != 3:
        raise argparse.ArgumentTypeError("give three numbers, X,Y,SIDE")
    return parts[0], parts[1], parts[2]

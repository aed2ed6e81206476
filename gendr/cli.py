"""The command line: `gendr upscale`, `info`, `doctor`, `fold`, `convert`, `compare`.

The same words and the same defaults as in Python and in the nodes' widgets: both come from
`gendr.settings`. Exit codes: 0 = done, 1 = something failed, 2 = wrong use, 130 = Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import loading, pictures
from .commands import compare, convert, doctor, jobs, trouble, upscale, video, words
from .files import checkpoint
from .settings import Settings


def main(typed: Sequence[str] | None = None) -> int:
    typed = sys.argv[1:] if typed is None else list(typed)
    ensure_streams()
    for stream in (sys.stdout, sys.stderr):
        # File names need not fit the terminal's encoding.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")
    args = parser().parse_args(typed)
    try:
        return args.run(args, typed)
    except (ValueError, OSError) as error:  # CheckpointError and PictureError are ValueErrors
        if isinstance(error, BrokenPipeError):  # the reader, `head` say, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        print(f"gendr: {trouble.plain(trouble.reason(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gendr: stopped", file=sys.stderr)
        return upscale.STOPPED


def ensure_streams() -> None:
    """Where there is no terminal at all (pythonw, a service), words go nowhere and work goes on."""
    # A descriptor that is closed would become that of the next file, which libraries then write to.
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def parser() -> words.Parser:
    return words.parser(
        {
            "upscale": run_upscale,
            "info": run_info,
            "doctor": run_doctor,
            "fold": run_fold,
            "convert": run_convert,
            "compare": run_compare,
        }
    )


def run_upscale(args: argparse.Namespace, typed: list[str]) -> int:
    wrong_use = args.parser.error
    try:
        settings = Settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)})
    except ValueError as error:
        wrong_use(str(error))
    output, form = args.output, args.form
    if jobs.is_file_name(output):
        check_output_file(output, form, args.pictures, wrong_use)
    options = upscale.Options(
        settings=settings,
        output=output,
        model=args.model,
        base=args.base,
        device=args.device,
        dtype=args.dtype,
        speed=args.speed,
        form=form,
        quality=args.quality,
        suffix=default_suffix(settings) if args.suffix is None else args.suffix,
        recursive=args.recursive,
        truncated=args.truncated,
        max_pixels=args.max_pixels,
        mask=args.mask,
        strip=args.strip,
        resume=args.resume,
        overwrite=args.overwrite,
        plan=args.plan,
        json=args.json,
        quiet=args.quiet,
        command=typed,
    )
    return upscale.run(args.pictures, options)


def check_output_file(output: Path, form: str | None, named: list[str], wrong_use: Any) -> None:
    """`--output` is a file: then there is one input, and the name says the format."""
    inputs = jobs.collect(named)
    clip = inputs.single and video.is_clip(inputs.jobs[0].source)
    writable = tuple(video.FORMATS) if clip else jobs.WRITABLE
    if output.suffix.lower() not in writable:
        wrong_use(f"results can be written as {', '.join(writable)}, not {output.suffix}")
    if not inputs.single:
        wrong_use(
            f"--output {output} is one file, and there may be several pictures: give a folder"
        )
    if clip:
        return
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


def run_info(args: argparse.Namespace, typed: list[str]) -> int:
    facts = checkpoint.describe(args.checkpoint or checkpoint.EMBEDDED)
    if args.json:
        print(json.dumps(facts, default=str))
    else:
        print("\n".join(readable({name: facts[name] for name in sorted(facts, key=importance)})))
    return 0


def run_doctor(args: argparse.Namespace, typed: list[str]) -> int:
    return doctor.run(
        args.model, args.base, args.device, args.dtype, as_json=args.json, speed=args.speed
    )


def run_fold(args: argparse.Namespace, typed: list[str]) -> int:
    output = args.output
    if output.suffix.lower() not in (".safetensors", ".sft"):
        args.parser.error(f"--output {output} must end in .safetensors")
    if output.exists() and not args.overwrite:
        args.parser.error(f"{output} exists; --overwrite replaces it")
    model = loading.load(args.checkpoint, base=args.base, device="cpu", dtype="fp32")
    dtype = args.dtype or model.header.dtype
    output.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(output, model.network, model.header, dtype=dtype)
    size = output.stat().st_size / 1e6
    print(f"{output}: {model.parameters:,} parameters of one step in {dtype}, {size:.1f} MB")
    return 0


def run_convert(args: argparse.Namespace, typed: list[str]) -> int:
    return convert.run(args)


def run_compare(args: argparse.Namespace, typed: list[str]) -> int:
    output = args.output or args.result.with_name(f"{args.result.stem}_compare.png")
    reading = {"truncated": args.truncated, "max_pixels": args.max_pixels}
    facts = compare.run(args.input, args.result, output, args.crop, args.overwrite, **reading)
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
            lines += [f"{inset}{trouble.plain(name)}", *readable(value, inset + "  ")]
        else:
            if value is None or value in ([], {}):
                value = "-"
            elif isinstance(value, (list, tuple)):
                value = " ".join(map(str, value))
            elif isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
                value = f"{value:,}"
            lines.append(f"{inset}{trouble.plain(name):<{width}}  {trouble.plain(value)}")
    return lines

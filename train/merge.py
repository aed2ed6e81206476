"""A checkpoint whose weights are a weighted sum of others', from the same beginning.

    python -m train.merge --out merged.safetensors 1=a.safetensors 1=c.safetensors -1=b.safetensors

What one run learnt is the difference of its weights and can be added to another's (task
arithmetic, arXiv 2212.04089): here b to c is a stretch of training whose effect is added to a. The
weights of a mean add up to 1, as they must here too.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from gendr.files import checkpoint


def merged(parts: list[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The sum of weight times tensor, in float32, by name. ValueError for other shapes or weights."""
    total = sum(weight for weight, _ in parts)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"the weights add up to {total:g}: they must add up to 1")
    shapes = [{name: t.shape for name, t in tensors.items()} for _, tensors in parts]
    if any(found != shapes[0] for found in shapes[1:]):
        raise ValueError(
            "the checkpoints have other tensors: only runs of one structure can be merged"
        )
    return {
        name: sum(weight * tensors[name].float() for weight, tensors in parts)
        for name in parts[0][1]
    }


def part(text: str) -> tuple[float, Path]:
    """`weight=file` of the command line."""
    weight, found, path = text.partition("=")
    try:
        return float(weight), Path(path if found else "")
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write weight=file") from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.merge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", type=part, nargs="+", metavar="WEIGHT=FILE")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint to write")
    parser.add_argument("--name", help="of the result (the first file's)")
    # Negative weights look like options to argparse.
    args = parser.parse_args(_shielded(sys.argv[1:] if argv is None else argv))
    try:
        if args.out.exists():
            raise ValueError(f"{args.out} is there already: choose another --out")
        read = [(weight, path, *checkpoint.read(path)) for weight, path in args.parts]
        for _, path, header, _ in read:
            checkpoint.check_full(header, path, "can't be merged")
        header = read[0][2]
        if any(other.config != header.config for *_, other, _ in read):
            raise ValueError("the checkpoints are of different structures: they can't be merged")
        state = merged([(weight, tensors) for weight, _, _, tensors in read])
        network = checkpoint.unfolded(header.config, state)
        header = replace(header, name=args.name or header.name)
        checkpoint.save(args.out, network, header, dtype="fp16")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


def _shielded(words: list[str]) -> list[str]:
    """The words with those that begin like `-1=` behind `--`, where argparse reads no options."""
    sums = [w for w in words if w.partition("=")[0].lstrip("-").replace(".", "", 1).isdigit()]
    return [*(w for w in words if w not in sums), "--", *sums]


if __name__ == "__main__":
    raise SystemExit(main())

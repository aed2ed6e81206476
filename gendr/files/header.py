"""What a GenDR checkpoint says about itself: typed, and checked before anything is built from it."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, get_args

from ..networks.onestep import StepConfig
from ..networks.unet import UNetConfig
from ..networks.vae import VAEConfig
from ..schedule import STEPS, Prediction
from ..settings import BOUNDS, COLOR_FIXES, DTYPES
from .shapes import MOST_TOKENS

FORMAT, FOLDED, VERSION = "gendr", "gendr-folded", 1
# The key of a safetensors file's metadata under which the header lies.
METADATA = "gendr"
# The dtype of weights in files.
STORED = "fp16"
# Sides of pictures are padded to multiples of what both networks reduce them by: 64 px for SD2.1.
LARGEST_MULTIPLE = 1024
# Levels of objects and lists in a header; its own have four.
DEEPEST = 20


class Newer(ValueError):
    """A header that only a newer version of this program can read."""


class Rule(NamedTuple):
    """What a field may hold: in words, and as a test of a value."""

    words: str
    fits: Callable[[Any], bool]


def whole(low: int, high: int) -> Rule:
    """A whole number, both ends included. True and 2.0 are none."""
    fits = lambda v: type(v) is int and low <= v <= high  # noqa: E731
    return Rule(str(low) if low == high else f"a whole number from {low:,} to {high:,}", fits)


def number(low: float, high: float) -> Rule:
    """A finite number, both ends included."""
    fits = lambda v: type(v) in (int, float) and low <= v <= high  # noqa: E731
    return Rule(f"a number from {low:g} to {high:g}", fits)


def one_of(*values: str) -> Rule:
    return Rule(f"one of {', '.join(values)}", lambda v: type(v) is str and v in values)


def several(rule: Rule, most: int) -> Rule:
    """A list of at least one value."""
    fits = lambda v: type(v) in (list, tuple) and 0 < len(v) <= most and all(map(rule.fits, v))  # noqa: E731
    return Rule(f"1 to {most} values, each {rule.words}", fits)


def optional(rule: Rule) -> Rule:
    return Rule(f"{rule.words}, or null", lambda v: v is None or rule.fits(v))


def line(longest: int) -> Rule:
    """Text that a terminal and a widget show as one line, and as nothing else."""

    def fits(value: Any) -> bool:
        return type(value) is str and 0 < len(value) <= longest and value == printable(value)

    return Rule(f"one line of at most {longest} characters", fits)


def printable(text: str) -> str:
    """Text with a ? in place of what is no character: control codes, halves of surrogate pairs."""
    return "".join("?" if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


FLAG = Rule("true or false", lambda v: type(v) is bool)
RECORD = Rule("a JSON object", lambda v: type(v) is dict)
TEXTS = Rule(
    "texts by name", lambda v: RECORD.fits(v) and all(type(text) is str for text in v.values())
)
RECORDS = Rule(
    "a list of JSON objects", lambda v: type(v) in (list, tuple) and all(map(RECORD.fits, v))
)
SHA256 = Rule(
    "64 hexadecimal digits",
    lambda v: type(v) is str and len(v) == 64 and all(c in "0123456789abcdef" for c in v),
)
WIDTH = whole(1, 16384)

UNET: dict[str, Rule] = {
    "latent_channels": whole(1, 256),
    "block_out_channels": several(WIDTH, 8),
    "attention": several(FLAG, 8),
    "layers_per_block": whole(1, 16),
    "head_dim": WIDTH,
    "cross_attention_dim": WIDTH,
    "norm_num_groups": whole(1, 1024),
    "prompts": whole(0, 2),
    "tokens": whole(1, MOST_TOKENS),
    "phases": FLAG,
}
VAE: dict[str, Rule] = {
    "latent_channels": whole(1, 256),
    "block_out_channels": several(WIDTH, 8),
    "layers_per_block": whole(1, 16),
    "norm_num_groups": whole(0, 1024),
    "mid_attention": FLAG,
    "quant_conv": FLAG,
    "patch_size": whole(1, 64),
    "linear_path": FLAG,
    "scaling_factor": number(1e-6, 1e6),
    "shift_factor": optional(number(-1e6, 1e6)),
}
STEP: dict[str, Rule] = {
    "unet": RECORD,
    "vae": RECORD,
    "t_start": whole(0, STEPS - 1),
    # Eq. 2 divides by alpha. Published one-step models have .07 to 1.
    "alpha": number(1e-3, 1e3),
    "beta": number(0, 1e3),
    "prediction_type": one_of(*get_args(Prediction)),
}
KIND: dict[str, Rule] = {"format": one_of(FORMAT, FOLDED), "version": whole(1, VERSION)}
HEADER: dict[str, Rule] = {
    "name": line(200),
    "scale": number(BOUNDS["scale"].minimum, BOUNDS["scale"].maximum),
    "tile": whole(16, BOUNDS["tile"].maximum),
    "guidance": number(BOUNDS["guidance"].minimum, BOUNDS["guidance"].maximum),
    "prompts": TEXTS,
    "licence": optional(line(1000)),
    "bases": RECORDS,
    "training_step": optional(whole(0, 10**12)),
    "dtype": one_of(*DTYPES[1:]),
    "sha256": optional(SHA256),
    "precision": optional(one_of(*DTYPES[1:])),
    "min_side": whole(0, BOUNDS["tile"].maximum),
    "color_fix": optional(one_of(*COLOR_FIXES[1:])),
    "source": optional(RECORD),
}
# Files have these only where they say something; those written before they existed have none.
HINTS = ("precision", "min_side", "color_fix", "source")


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a checkpoint says about itself. The defaults here are the only ones in the project.

    config: both networks and the constants of Eq. 2, as the file holds them.
    name, licence: of the weights, one line each.
    scale: enlargement that the model was trained for. tile: side of its training pictures in pixels.
    guidance: strength of classifier-free guidance that it should run with.
    prompts: the texts behind the fixed prompts. bases: what it was made from, with licences.
    dtype, sha256: of the stored tensors (`checkpoint.digest`).
    precision: the dtype that "auto" must take. min_side: smaller pictures are enlarged to this many
    pixels first. color_fix: what the automatic choice takes. source: the file that it was converted
    from. extra: fields that this program does not know; kept and written again.

    ValueError naming the field for anything out of range.
    """

    config: StepConfig
    name: str
    scale: float = 4
    # SD2.1's own size, for models of unknown origin.
    tile: int = 512
    guidance: float = 1.0
    prompts: dict[str, str] = field(default_factory=dict)
    licence: str | None = None
    bases: list[dict[str, Any]] = field(default_factory=list)
    training_step: int | None = None
    dtype: str = STORED
    sha256: str | None = None
    precision: str | None = None
    min_side: int = 0
    color_fix: str | None = None
    source: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check({name: getattr(self, name) for name in HEADER}, HEADER)
        check_config(self.config.as_dict())

    @property
    def folded(self) -> bool:
        """Whether the networks are the folded one-step form, which holds its prompts."""
        return self.config.unet.prompts > 0

    @property
    def format(self) -> str:
        """The kind of file."""
        return FOLDED if self.folded else FORMAT

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in a file."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        for name in HINTS:
            if not values[name]:
                del values[name]
        kind = {"format": self.format, "version": VERSION}
        return {**self.extra, **kind, **values, "config": self.config.as_dict()}

    @classmethod
    def parse(cls, text: str) -> Header:
        """The inverse of `json.dumps(header.as_dict())`. ValueError says which field is wrong."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError("it is not JSON") from error
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        if not shallow(values, DEEPEST):
            raise ValueError(f"its JSON is nested more than {DEEPEST} levels deep")
        missing = [name for name in ("format", "version", "name", "config") if name not in values]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        kind, version = values.pop("format"), values.pop("version")
        check({"format": kind}, KIND)
        if type(version) is int and version > VERSION:
            raise Newer(
                f"is of version {shown(version)}, this program reads up to {VERSION}: update it"
            )
        check({"version": version}, KIND)
        known = {name: values.pop(name) for name in HEADER if name in values}
        check(known, HEADER)
        header = cls(config=check_config(values.pop("config")), **known, extra=values)
        if kind != header.format:
            raise ValueError(
                f"format is {kind}, but config.unet.prompts is {header.config.unet.prompts}: folded "
                "networks hold their prompts, others do not"
            )
        return header


def shallow(value: Any, levels: int) -> bool:
    """Whether objects and lists hold each other at most so many levels deep."""
    if not isinstance(value, (dict, list)):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(shallow(one, levels - 1) for one in inner)


def check(values: Mapping[str, Any], rules: Mapping[str, Rule], where: str = "") -> None:
    """ValueError for the first value that breaks its rule."""
    for name, value in values.items():
        if not rules[name].fits(value):
            raise ValueError(f"{where}{name} must be {rules[name].words}, got {shown(value)}")


def shown(value: Any) -> str:
    """A value that may be anything, in a few words."""
    try:
        text = printable(json.dumps(value, default=str))
    except (ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 40 else f"{text[:40]}..."


def check_config(values: Any) -> StepConfig:
    """The configuration from plain values; ValueError names the setting that is wrong.

    Nothing is built, so a number that claims a network of any size costs nothing.
    """
    check_settings(values, STEP, "config.")
    check_settings(values["unet"], UNET, "config.unet.")
    check_settings(values["vae"], VAE, "config.vae.")
    unet, vae = UNetConfig(**values["unet"]), VAEConfig(**values["vae"])
    config = StepConfig(**{**values, "unet": unet, "vae": vae})
    widths = unet.block_out_channels
    if len(unet.attention) != len(widths):
        raise ValueError(
            f"config.unet.attention has {len(unet.attention)} values, block_out_channels "
            f"{len(widths)}: each level needs one of both"
        )
    # The middle of the UNet attends as well, at the width of the last level.
    attending = {w for w, attends in zip(widths, unet.attention, strict=True) if attends}
    for width in sorted(attending | {widths[-1]}):
        divides("config.unet.head_dim", unet.head_dim, width)
    for width in widths:
        divides("config.unet.norm_num_groups", unet.norm_num_groups, width)
    if widths[0] % 2:
        raise ValueError(
            f"config.unet.block_out_channels must begin with an even number, got {widths[0]}: half "
            "of it are cosines of the timestep, half sines"
        )
    for width in vae.block_out_channels if vae.norm_num_groups else ():
        divides("config.vae.norm_num_groups", vae.norm_num_groups, width)
    if config.multiple > LARGEST_MULTIPLE:
        raise ValueError(
            f"config reduces pictures {config.multiple:,} times, at most {LARGEST_MULTIPLE:,} times "
            "is possible: block_out_channels or patch_size is wrong"
        )
    return config


def check_settings(values: Any, rules: Mapping[str, Rule], where: str) -> None:
    """All settings and no others, each by its rule.

    An unknown or a missing one is an error, because a guess in its place would change the result.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where.rstrip('.')} must be a JSON object, got {shown(values)}")
    if unknown := sorted(values.keys() - rules.keys()):
        raise ValueError(
            f"{where}{printable(unknown[0])[:40]} is unknown: a newer GenDR may know it, so update"
        )
    if missing := sorted(rules.keys() - values.keys()):
        raise ValueError(f"{where}{missing[0]} is missing")
    check(values, rules, where)


def divides(name: str, part: int, width: int) -> None:
    if width % part:
        raise ValueError(f"{name} must divide the {width} channels of its level, got {part}")

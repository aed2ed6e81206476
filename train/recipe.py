"""Settings of a training script: a dataclass whose fields are the TOML keys and the command's options.

A value comes from, the later the stronger: the dataclass, a recipe (`train/recipes/NAME.toml`, the
table named after the script), a preset (`presets.toml`), the command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent / "recipes"
PRESETS = RECIPES / "presets.toml"

T = TypeVar("T")


class SettingsError(ValueError):
    """Settings that can't be used; the message names the setting and what it takes."""


@dataclass(frozen=True)
class Chosen(Generic[T]):
    """What a person asked for: settings, the run folder, and whether only the plan is wanted.

    state: to go on from, if not the last one; accept: settings that may differ from the run's own.
    """

    settings: T
    out: Path
    dry_run: bool
    device: str
    state: Path | None = None
    accept: tuple[str, ...] = ()


def setting(default: Any, text: str) -> Any:
    """A field with its help."""
    return field(default=default, metadata={"help": text})


def recipe_names() -> list[str]:
    """The recipes that come with the project."""
    return sorted(p.stem for p in RECIPES.glob("*.toml") if p != PRESETS)


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's tables. SettingsError where it is missing or malformed."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(
            f"no recipe {path.stem!r}: choose one of {', '.join(recipe_names())}, or a .toml file"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not TOML: {error}") from error


def read_recipe(name: str, section: str) -> dict[str, Any]:
    """The table `section` of a recipe by its name (`paper`) or path."""
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    tables = read_toml(path)
    if section not in tables:
        raise SettingsError(
            f"{path.name} has no [{section}]: it holds {', '.join(tables) or 'nothing'}"
        )
    return tables[section]


def presets() -> dict[str, dict[str, Any]]:
    """The forms of distillation of the paper's Table 4, by name."""
    return read_toml(PRESETS)


def build(kind: type[T], *layers: dict[str, Any]) -> T:
    """Settings of this kind from dictionaries, later ones on top. SettingsError names what is wrong."""
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            if name not in hints:
                near = difflib.get_close_matches(name, hints, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(hints)}"
                raise SettingsError(f"there is no setting {name!r}: {hint}")
            values[name] = checked(name, value, hints[name])
    try:
        return kind(**values)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def checked(name: str, value: Any, hint: Any) -> Any:
    """A value of the type that a field wants: ints serve as floats, lists as tuples."""
    options = get_args(hint)
    if get_origin(hint) is Literal:
        if value in options:
            return value
        raise SettingsError(f"{name} is one of {', '.join(map(str, options))}, not {value!r}")
    if get_origin(hint) is tuple:
        if isinstance(value, list | tuple):
            return tuple(checked(name, item, options[0]) for item in value)
    elif get_origin(hint) in (types.UnionType, typing.Union):
        return None if value is None else checked(name, value, options[0])
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    wanted = getattr(hint, "__name__", None) or str(hint)
    raise SettingsError(f"{name} takes {wanted}, not {value!r}")


def parse(
    kind: type[T],
    section: str,
    doc: str,
    argv: Sequence[str] | None = None,
    *,
    with_presets: bool = False,
) -> Chosen[T]:
    """Settings from the command line; its help is made of the fields. Ends the program on an error."""
    parser = argparse.ArgumentParser(
        prog=f"python -m train.{section}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(recipe_names())
    parser.add_argument("--out", required=True, type=Path, help="run folder; again = resume")
    parser.add_argument("--recipe", help=f"one of {known}, or a .toml file with [{section}]")
    if with_presets:
        parser.add_argument("--preset", choices=sorted(presets()), help="form of the distillation")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--state", type=Path, metavar="FILE", help="go on from this state of a run")
    parser.add_argument(
        "--accept", default="", metavar="A,B", help="settings that may differ from the run's own"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (auto)")
    hints = get_type_hints(kind)
    for one in dataclasses.fields(kind):
        add_option(parser, one, hints[one.name])
    args = vars(parser.parse_args(argv))
    try:
        layers = []
        if args["recipe"]:
            layers.append(read_recipe(args["recipe"], section))
        if args.get("preset"):
            layers.append(presets()[args["preset"]])
        layers.append({k: v for k, v in args.items() if k in hints and v is not None})
        settings = build(kind, *layers)
    except SettingsError as error:
        parser.error(str(error))
    accept = tuple(name for name in args["accept"].split(",") if name)
    return Chosen(settings, args["out"], args["dry_run"], args["device"], args["state"], accept)


def add_option(parser: argparse.ArgumentParser, one: dataclasses.Field, hint: Any) -> None:
    """`--name` for a field: bools as --name/--no-name, tuples as values with commas."""
    default = one.default
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    text = one.metadata.get("help", "")
    options: dict[str, Any] = {"default": None, "help": f"{text} ({shown})".replace("%", "%%")}
    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif get_origin(hint) is Literal:
        options["choices"] = get_args(hint)
    elif get_origin(hint) is tuple:
        item = get_args(hint)[0]
        options["type"] = lambda words: tuple(item(w) for w in words.split(",") if w)
        options["metavar"] = "A,B"
    else:
        inner = [t for t in get_args(hint) if t is not type(None)]
        options["type"] = inner[0] if inner else hint
        options["metavar"] = options["type"].__name__.upper()
    parser.add_argument(f"--{one.name.replace('_', '-')}", dest=one.name, **options)

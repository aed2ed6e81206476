"""A set of pictures to measure on: which files belong together, and the paper's four sets.

A recipe (`protocol/*.toml`) says where a set comes from, how its files are named, the scale, the
colour fix and the metric variants, and holds the paper's rows.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    try:
        import tomli as tomllib
    except ModuleNotFoundError:
        tomllib = None

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
RECIPES = Path(__file__).parent / "protocol"


class InputError(ValueError):
    """Folders or options that can't be evaluated; told without a traceback."""


@dataclass(frozen=True)
class Item:
    """One picture: the low-quality input and, where there is one, its reference."""

    stem: str
    source: Path
    reference: Path | None


@dataclass(frozen=True)
class Recipe:
    """One of the paper's sets, or a file of the same form.

    data, reference, strip: glob patterns below the given folders, and name endings that are not
    part of a picture's name. models: pyiqa variants by metric. paper: rows {method, metric...}.
    """

    name: str
    title: str
    pictures: int
    scale: float
    color_fix: str
    paired: bool
    table: str
    source: list[str]
    notes: list[str]
    data: str = "*"
    reference: str = "*"
    strip: tuple[str, ...] = ()
    models: dict[str, str] = field(default_factory=dict)
    paper: list[dict[str, Any]] = field(default_factory=list)


def recipe_names() -> list[str]:
    """The protocols that can be read here."""
    if tomllib is None:
        return []
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def read_recipe(name: str) -> Recipe:
    """A recipe by its name (`realsr`) or path. Raises InputError."""
    if tomllib is None:
        raise InputError(
            "protocols are TOML files, which Python 3.10 reads with: pip install tomli"
        )
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        layout = table.pop("layout", {})
        layout["strip"] = tuple(layout.get("strip", ()))
        return Recipe(name=path.stem, **table, **layout)
    except FileNotFoundError:
        known = ", ".join(recipe_names())
        raise InputError(f"no protocol {name!r}: one of {known}, or a .toml file") from None
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise InputError(f"{path} is not a protocol: {error}") from error


def list_pictures(folder: Path, pattern: str = "*", strip: tuple[str, ...] = ()) -> dict[str, Path]:
    """{picture's name: path}, sorted. Raises InputError for no folder or two files of one name."""
    if not folder.is_dir():
        raise InputError(f"not a folder: {folder}")
    found: dict[str, Path] = {}
    paths = [p for p in folder.glob(pattern) if p.suffix.lower() in EXTENSIONS and p.is_file()]
    for path in sorted(paths):
        stem = path.stem
        for ending in strip:
            stem = stem.removesuffix(ending)
        if stem in found:
            raise InputError(
                f"{path.name} and {found[stem].name} in {folder} have the same name: "
                "pictures are paired by name, so give each its own"
            )
        found[stem] = path
    return dict(sorted(found.items()))


def pair(data: Path, reference: Path | None, recipe: Recipe | None) -> tuple[list[Item], list[str]]:
    """Inputs with their references, and what didn't fit together, in words."""
    strip = recipe.strip if recipe else ()
    sources = _below(data, recipe.data if recipe else "*", strip)
    if not sources:
        raise InputError(f"no pictures in {data} (known: {', '.join(sorted(EXTENSIONS))})")
    references: dict[str, Path] = {}
    problems = []
    if reference:
        references = _below(reference, recipe.reference if recipe else "*", strip)
        for missing, what in (
            (sorted(set(sources) - set(references)), "without a reference"),
            (sorted(set(references) - set(sources)), "reference(s) without an input"),
        ):
            if missing:
                problems.append(f"{len(missing)} {what}: {some(missing)}")
        if not set(sources) & set(references):
            raise InputError(
                f"no file of {reference} has the name of a file of {data}: "
                f"{next(iter(sources))!r} against {next(iter(references), None)!r}"
            )
    items = [Item(stem, path, references.get(stem)) for stem, path in sources.items()]
    return items, problems


def _below(folder: Path, pattern: str, strip: tuple[str, ...]) -> dict[str, Path]:
    """The pattern's pictures; where its folders were flattened or the files renamed, those here."""
    for attempt in dict.fromkeys((pattern, pattern.rpartition("/")[2], "*")):
        if found := list_pictures(folder, attempt, strip):
            return found
    return {}


def match_results(folder: Path, stems: list[str]) -> tuple[dict[str, Path], str]:
    """{stem: ready result} and a remark.

    Programs add endings (`name_out.png`); an ending that all unmatched files share is left out.
    """
    found = list_pictures(folder, "*")
    matched = {stem: found[stem] for stem in stems if stem in found}
    rest = {name: path for name, path in found.items() if name not in matched}
    wanted = [stem for stem in stems if stem not in matched]
    endings: dict[str, int] = {}
    for name in rest:
        for stem in wanted:
            if name.startswith(stem) and name != stem:
                endings[name[len(stem) :]] = endings.get(name[len(stem) :], 0) + 1
    if endings and not matched:
        ending = max(endings, key=lambda e: (endings[e], -len(e)))
        matched = {stem: rest[stem + ending] for stem in wanted if stem + ending in rest}
        return matched, f"names end in {ending!r}"
    extra = sorted(set(found) - set(matched))
    return matched, f"{len(extra)} file(s) of other names: {some(extra)}" if extra else ""


def some(names: list[str], most: int = 8) -> str:
    """The first names and how many more."""
    tail = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + tail


def stamp(path: Path | None) -> list[Any] | None:
    """What changes when a file changes: name, size, time of writing."""
    if path is None or not path.exists():
        return None
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    temporary = path.with_name(path.name + ".part")
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)

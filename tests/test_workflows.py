"""The shipped graphs: complete, of this version, and in step with the nodes they name."""

from __future__ import annotations

import json
import re

import pack
import pytest
from PIL import Image

WORKFLOWS = sorted((pack.ROOT / "workflows").glob("*.json"))
API = sorted((pack.ROOT / "tests" / "api").glob("*.json"))
SAVED = sorted((pack.ROOT / "tests" / "saved").glob("*.json"))
NODES = pack.nodes().NODE_CLASS_MAPPINGS
# Core nodes that exist since ComfyUI 0.3.64, the oldest supported version, and their widgets.
CORE = {
    "CLIPTextEncode": ["text"],
    "CheckpointLoaderSimple": ["ckpt_name"],
    "EmptyLatentImage": ["width", "height", "batch_size"],
    "ImageBatch": [],
    "KSampler": [
        *("seed", "control_after_generate", "steps", "cfg", "sampler_name", "scheduler"),
        "denoise",
    ],
    "LoadImage": ["image", "upload"],
    "MarkdownNote": ["text"],
    "PreviewAny": [],
    "PreviewImage": [],
    "SaveImage": ["filename_prefix"],
    "VAEDecode": [],
}
KINDS = {"INT": int, "FLOAT": (int, float), "BOOLEAN": bool, "STRING": str}
# Names that ComfyUI takes for the folder of templates; only one may exist.
TEMPLATE_FOLDERS = ("example_workflows", "example", "examples", "workflow", "workflows")


def inputs_of(node: str) -> dict[str, tuple]:
    """All inputs of one of our nodes, in their order."""
    types = NODES[node].INPUT_TYPES()
    return {**types.get("required", {}), **types.get("optional", {})}


def widgets_of(node: str) -> dict[str, tuple]:
    """The inputs that show as widgets."""
    return {
        name: spec
        for name, spec in inputs_of(node).items()
        if isinstance(spec[0], list) or spec[0] in KINDS
    }


def fits(value: object, spec: tuple) -> bool:
    """Whether the widget could hold this value."""
    kind, options = spec[0], spec[1]
    if isinstance(kind, list):
        return value in kind
    if isinstance(value, bool) != (kind == "BOOLEAN") or not isinstance(value, KINDS[kind]):
        return False
    return not isinstance(value, (int, float)) or (
        options.get("min", value) <= value <= options.get("max", value)
    )


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def name_of(path):
    return path.stem


def test_there_are_four_and_one_folder():
    assert len(WORKFLOWS) == 4
    assert [f for f in TEMPLATE_FOLDERS if (pack.ROOT / f).exists()] == ["workflows"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_only_known_nodes_with_fitting_widgets(path):
    for node in read(path)["nodes"]:
        values = node.get("widgets_values", [])
        if node["type"] in NODES:
            widgets = widgets_of(node["type"])
            assert len(values) == len(widgets), node["type"]
            for value, (name, spec) in zip(values, widgets.items(), strict=True):
                assert fits(value, spec), f"{node['type']}.{name} = {value!r}"
            sockets = {slot["name"] for slot in node["inputs"]}
            assert sockets == set(inputs_of(node["type"]))
            named = [slot["name"] for slot in node["outputs"]]
            assert named == list(NODES[node["type"]].RETURN_NAMES)
        else:
            assert len(values) == len(CORE[node["type"]]), node["type"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_nodes_say_where_they_come_from(path):
    project = (pack.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    name = re.search(r'^name = "(.+)"$', project, re.M)[1]
    version = re.search(r'^version = "(.+)"$', project, re.M)[1]
    for node in read(path)["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        origin = (name, version) if node["type"] in NODES else ("comfy-core", "0.3.64")
        properties = node["properties"]
        assert (properties["cnr_id"], properties["ver"]) == origin
        assert properties["Node name for S&R"] == node["type"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_links_agree_on_both_ends(path):
    graph = read(path)
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {}
    for link, source, out, target, into, kind in graph["links"]:
        assert nodes[source]["outputs"][out]["type"] == kind
        assert link in nodes[source]["outputs"][out]["links"]
        assert nodes[target]["inputs"][into]["link"] == link
        assert nodes[target]["inputs"][into]["type"] in (kind, "*")
        links[link] = True
    for node in graph["nodes"]:
        assert all(s["link"] is None or s["link"] in links for s in node["inputs"])
    assert len(links) == len(graph["links"]) == graph["last_link_id"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_a_note_explains_and_a_picture_shows(path):
    notes = [node for node in read(path)["nodes"] if node["type"] == "MarkdownNote"]
    assert notes[0]["widgets_values"][0].startswith("## ")
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG"
        assert picture.width == picture.height
        assert 350 <= picture.width <= 512
    assert path.with_suffix(".jpg").stat().st_size < 100_000


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_has_an_api_copy_that_asks_for_the_same(path):
    copy = read(next(p for p in API if p.stem[0] == path.stem[0]))
    graph = read(path)
    wanted = sorted(n["type"] for n in graph["nodes"] if n["type"] != "MarkdownNote")
    assert sorted(node["class_type"] for node in copy.values()) == wanted
    for node in copy.values():
        if node["class_type"] not in NODES:
            continue
        values = {k: v for k, v in node["inputs"].items() if not isinstance(v, list)}
        saved = next(n for n in graph["nodes"] if n["type"] == node["class_type"])
        widgets = widgets_of(node["class_type"])
        assert values == dict(zip(widgets, saved["widgets_values"], strict=True))


@pytest.mark.parametrize("path", SAVED, ids=name_of)
def test_graphs_of_earlier_releases_keep_their_meaning(path):
    """Values of saved widgets are positional: inserting or reordering would change them."""
    for node in read(path)["nodes"]:
        widgets = widgets_of(node["type"])
        named = dict(zip(widgets, node["widgets_values"], strict=False))
        assert len(named) == len(node["widgets_values"]), "a widget has been removed"
        assert named == node["meant"]
        assert all(fits(value, widgets[name]) for name, value in named.items())
        # What came later must have a default, or the old graph would not run.
        assert all("default" in spec[1] for name, spec in widgets.items() if name not in named)
        inputs = list(inputs_of(node["type"]))
        assert all(slot["name"] in inputs for slot in node["inputs"])
        for slot, output in zip(node["outputs"], NODES[node["type"]].RETURN_TYPES, strict=False):
            assert slot["type"] == output


def test_there_is_a_saved_graph_of_the_first_release():
    assert "0.1.0" in [path.stem for path in SAVED]
    assert {node["type"] for node in read(SAVED[0])["nodes"]} == set(NODES)

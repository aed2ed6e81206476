"""The shipped graphs: complete, of this version, and in step with the nodes they name."""

from __future__ import annotations

import json
import re

import pack
import pytest
from PIL import Image

WORKFLOWS = sorted((pack.ROOT / "workflows").glob("*.json"))
API = sorted((pack.ROOT / "tests" / "api").glob("*.json"))
NOTES = pack.ROOT / "web" / "notes"
LANGUAGES = sorted(path.name for path in (pack.ROOT / "locales").iterdir())
SAVED = sorted((pack.ROOT / "tests" / "saved").glob("*.json"))
NODES = pack.nodes().NODE_CLASS_MAPPINGS
# Core nodes and their widgets. They exist since ComfyUI 0.3.64, the oldest supported version, but
# for those of `LATER`.
CORE = {
    "CLIPTextEncode": ["text"],
    "CheckpointLoaderSimple": ["ckpt_name"],
    "CreateVideo": ["fps"],
    "EmptyLatentImage": ["width", "height", "batch_size"],
    "GetVideoComponents": [],
    "ImageCompare": [],
    "KSampler": [
        *("seed", "control_after_generate", "steps", "cfg", "sampler_name", "scheduler"),
        "denoise",
    ],
    "LoadImage": ["image", "upload"],
    "LoadVideo": ["file", "upload"],
    "MarkdownNote": ["text"],
    "PreviewAny": [],
    "PreviewImage": [],
    "SaveImage": ["filename_prefix"],
    "SaveVideo": ["filename_prefix", "format", "codec"],
    "VAEDecode": [],
}
LATER = {"ImageCompare": "0.14.0"}
# Height of a title, which stands above a node's position, and by how much the front ends make our nodes
# higher for the preview: 70 to 105, measured in 1.49.6 with both ways of drawing.
TITLE, GROWTH = 30, 110
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


def clear(nodes: dict, source: dict, target: dict) -> bool:
    """Whether no third node lies between two that are joined, in their common rows."""
    right, left = source["pos"][0] + source["size"][0], target["pos"][0]
    top, bottom = sorted((source["pos"][1] + 40, target["pos"][1] + 40))
    return right <= left and not any(
        node not in (source, target)
        and right < node["pos"][0] + node["size"][0] / 2 < left
        and node["pos"][1] < bottom + 1
        and top - 1 < node["pos"][1] + node["size"][1]
        for node in nodes.values()
    )


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def name_of(path):
    return path.stem


def test_they_are_numbered_and_in_one_folder():
    assert [path.name[:2] for path in WORKFLOWS] == [f"{n} " for n in range(1, 8)]
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
        origin = (
            (name, version)
            if node["type"] in NODES
            else (
                "comfy-core",
                LATER.get(node["type"], "0.3.64"),
            )
        )
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
        # A wire that runs behind a node cannot be followed.
        assert clear(nodes, nodes[source], nodes[target]), (source, target)
    for node in graph["nodes"]:
        assert all(s["link"] is None or s["link"] in links for s in node["inputs"])
    assert len(links) == len(graph["links"]) == graph["last_link_id"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_below_our_nodes_is_room_for_the_preview_of_a_run(path):
    nodes = read(path)["nodes"]
    for ours in (node for node in nodes if node["type"] in NODES and node["type"] != "LoadGenDR"):
        (left, top), (width, height) = ours["pos"], ours["size"]
        for node in nodes:
            (x, y), across = node["pos"], node["size"][0]
            beside = x >= left + width or x + across <= left
            assert beside or y <= top or y - TITLE >= top + height + GROWTH, node["type"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_a_note_explains_and_a_picture_shows(path):
    notes = [node for node in read(path)["nodes"] if node["type"] == "MarkdownNote"]
    assert notes[0]["widgets_values"][0].startswith("## ")
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG"
        assert picture.width == picture.height
        assert 350 <= picture.width <= 512
    assert path.with_suffix(".jpg").stat().st_size < 100_000


def note_of(path):
    (note,) = [node for node in read(path)["nodes"] if node["type"] == "MarkdownNote"]
    return note


def test_english_notes_are_the_templates_own():
    notes = read(NOTES / "en.json")
    assert notes.pop("title") == note_of(WORKFLOWS[0])["title"]
    assert notes == {path.stem: note_of(path)["widgets_values"][0] for path in WORKFLOWS}


@pytest.mark.parametrize("language", LANGUAGES)
def test_notes_are_in_every_language_with_its_names_for_widgets(language):
    """A widget that a note speaks of is called as the node calls it in that language."""
    english, notes = read(NOTES / "en.json"), read(NOTES / f"{language}.json")
    ours, theirs = (
        read(pack.ROOT / "locales" / one / "nodeDefs.json")["TiledGenDR"]
        for one in ("en", language)
    )
    names = {
        text["name"]: theirs[group][key]["name"]
        for group in ("inputs", "outputs")
        for key, text in ours[group].items()
    }
    assert list(notes) == list(english)
    for template, text in english.items():
        for label in re.findall(r"\*\*(.+?)\*\*", text):
            if label.lower() in names:
                called = f"**{names[label.lower()]}**".lower()
                assert called in notes[template].lower(), (template, label)
        # Commands, numbers and steps are the same everywhere.
        for exact in re.findall(r"^    .+$|^\d\. |\b[0-9.]+\b", text, re.M):
            assert exact in notes[template] or "2026" in exact, (template, exact)


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_has_an_api_copy_that_asks_for_the_same(path):
    copy = read(next(p for p in API if p.stem[0] == path.stem[0]))
    graph = read(path)
    wanted = sorted(n["type"] for n in graph["nodes"] if n["type"] != "MarkdownNote")
    assert sorted(node["class_type"] for node in copy.values()) == wanted
    for number, node in copy.items():
        if node["class_type"] not in NODES:
            continue
        values = {k: v for k, v in node["inputs"].items() if not isinstance(v, list)}
        saved = next(n for n in graph["nodes"] if str(n["id"]) == number)
        widgets = widgets_of(node["class_type"])
        assert values == dict(zip(widgets, saved["widgets_values"], strict=True))


def test_checkpoints_come_with_a_place_to_get_them():
    nodes = [node for path in WORKFLOWS for node in read(path)["nodes"]]
    loaders = [node for node in nodes if node["type"] == "CheckpointLoaderSimple"]
    assert loaders
    for node in loaders:
        (model,) = node["properties"]["models"]
        assert model["name"] == node["widgets_values"][0]
        assert model["url"].startswith("https://")
        assert model["name"] in model["url"]
        assert model["directory"] == "checkpoints"


def test_the_blueprint_is_one_node_with_the_widgets_that_count():
    (path,) = (pack.ROOT / "subgraphs").glob("*.json")
    graph = read(path)
    (subgraph,) = graph["definitions"]["subgraphs"]
    (instance,) = graph["nodes"]
    assert instance["type"] == subgraph["id"]
    assert instance["title"] == subgraph["name"] == path.stem
    inner = {str(node["id"]): node for node in subgraph["nodes"]}
    for number, widget in instance["properties"]["proxyWidgets"]:
        assert widget in widgets_of(inner[number]["type"])
    for node in inner.values():
        widgets = widgets_of(node["type"])
        assert len(node["widgets_values"]) == len(widgets)
        assert [slot["name"] for slot in node["inputs"] if "widget" in slot] == list(widgets)
    for side in ("inputs", "outputs"):
        assert [s["name"] for s in instance[side]] == [s["name"] for s in subgraph[side]]
    for link in subgraph["links"]:
        if link["target_id"] > 0:
            slot = inner[str(link["target_id"])]["inputs"][link["target_slot"]]
            assert (slot["link"], slot["type"]) == (link["id"], link["type"])


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

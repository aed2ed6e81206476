"""Every template in ComfyUI's real front end: loaded, checked, run, and compared pixel by pixel.

Needs playwright and a Chromium; CHROMIUM names one that is not playwright's own.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import rig
import torch
from PIL import Image

import gendr

playwright = pytest.importorskip(
    "playwright.sync_api", reason="pip install playwright for the browser tests"
)

TEMPLATES = sorted((rig.ROOT / "workflows").glob("*.json"))
# The one with a loader.
TILED = next(path for path in TEMPLATES if "LoadGenDR" in path.read_text(encoding="utf-8"))
CHECKPOINT = os.environ.get("GENDR_TEST_CHECKPOINT")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
# No calls home: without a network they only slow the start.
QUIET = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
READY = "window.app && window.app.graph && window.app.extensionManager"
# Widgets whose value their own options forbid, placeholders, and sockets that no node has.
FAULTS = """() => {
  const faults = [];
  for (const node of window.app.graph.nodes) {
    const facts = node.constructor.nodeData;
    if (!facts && node.type !== 'MarkdownNote') { faults.push(node.type + ': missing'); continue; }
    for (const w of node.widgets || []) {
      const o = w.options || {};
      const values = typeof o.values === 'function' ? o.values(w, node) : o.values;
      let good = true;
      if (w.type === 'combo') good = Array.isArray(values) && values.includes(w.value);
      else if (w.type === 'number') good = typeof w.value === 'number' && !isNaN(w.value)
        && (o.min == null || w.value >= o.min) && (o.max == null || w.value <= o.max);
      else if (w.type === 'toggle') good = typeof w.value === 'boolean';
      if (!good) faults.push(`${node.type}.${w.name} = ${JSON.stringify(w.value)}`);
    }
    if (facts) {
      const known = {...facts.input.required, ...facts.input.optional};
      // A part of an input is named after it: format.codec.
      for (const slot of node.inputs || [])
        if (!(slot.name.split('.')[0] in known)) faults.push(`${node.type}: socket ${slot.name}`);
    }
  }
  return faults;
}"""

# Text to image as quick as it can be: one step, a picture as small as the example.
HURRY = """side => {
  for (const node of window.app.graph.nodes)
    for (const w of node.widgets || []) {
      if (node.type === 'KSampler' && w.name === 'steps') w.value = 1;
      if (node.type === 'EmptyLatentImage' && w.name !== 'batch_size') w.value = side;
    }
}"""

LABELS = """type => Object.fromEntries(
  window.app.graph.nodes.find(n => n.type === type).widgets.map(w => [w.name, w.label]))"""

NOTE = """() => {
  const node = window.app.graph.nodes.find(n => n.type === 'MarkdownNote');
  return [node.title, node.widgets[0].value];
}"""

# Where on the page a widget of a node is drawn.
PLACE = """([type, name]) => {
  const node = window.app.graph.nodes.find(n => n.type === type);
  const widget = node.widgets.find(w => w.name === name);
  const canvas = window.app.canvas;
  const at = [node.pos[0] + 80, node.pos[1] + (widget.last_y ?? widget.y) + 10];
  const [x, y] = canvas.ds.convertOffsetToCanvas(at);
  const frame = canvas.canvas.getBoundingClientRect();
  return [x + frame.left, y + frame.top];
}"""

# Whether new installations have Nodes 2.0; before that it was a trial with another layout.
MODERN = """() => {
  const stores = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s;
  const setting = stores.get('setting').settingsById['Comfy.VueNodes.Enabled'];
  return Boolean(setting && setting.defaultsByInstallVersion);
}"""

# Nodes of the page, where the front end makes them of HTML: their titles and frames.
FRAMES = """() => [...document.querySelectorAll('.lg-node[data-node-id]')].map(e => {
  const r = e.getBoundingClientRect();
  return [e.innerText.split('\\n')[0], r.left, r.top, r.right, r.bottom];
})"""

# What the front end's own search offers for some words, best first: [name, title].
FOUND = """words => {
  const stores = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s;
  const found = stores.get('nodeDef').nodeSearchService.searchNode(words, []);
  return found.map(node => [node.name, node.display_name]);
}"""
# Without scrolling. Nodes that are used much stand before all others that fit as well.
FIRST_LINES = 10


@pytest.fixture(scope="module")
def page(server):
    """The front end, opened once."""
    checkpoint = server.base / "models/checkpoints" / "v1-5-pruned-emaonly-fp16.safetensors"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if CHECKPOINT:
        checkpoint.symlink_to(CHECKPOINT)
    else:
        checkpoint.touch()
    with playwright.sync_playwright() as play:
        try:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        except playwright.Error as error:
            pytest.skip(f"no Chromium here: {str(error).splitlines()[0]}")
        page = browser.new_page(viewport={"width": 1760, "height": 990})
        open_front_end(page, server)
        yield page
        browser.close()


def open_front_end(page, server):
    page.goto(server.url)
    page.wait_for_function(READY, timeout=300_000)
    page.wait_for_timeout(4000)


def look(page, name):
    """Keep a screenshot where GENDR_SCREENSHOTS says so."""
    if folder := os.environ.get("GENDR_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png")


def load(page, path):
    graph = json.loads(path.read_text(encoding="utf-8"))
    open_graph(page, graph, path.stem)


def open_graph(page, graph, name):
    missing = page.evaluate(
        "g => g.nodes.map(n => n.type).filter(t => !LiteGraph.registered_node_types[t])", graph
    )
    if missing == ["ImageCompare"]:
        pytest.skip("this ComfyUI has no ImageCompare")
    assert missing == []
    page.evaluate("([g, n]) => window.app.loadGraphData(g, true, true, n)", [graph, name])
    page.wait_for_timeout(1500)


def tooltip(page, node, widget):
    """What appears where the pointer rests on a widget."""
    x, y = page.evaluate(PLACE, [node, widget])
    shown = page.locator(".node-tooltip")
    page.mouse.move(5, 500)
    shown.wait_for(state="hidden")
    page.mouse.move(x - 4, y)
    page.mouse.move(x, y)
    shown.wait_for(state="visible")
    return shown.inner_text()


def newest(server, known):
    """The history entry that was not there before."""
    end = time.monotonic() + rig.RUN_SECONDS
    while time.monotonic() < end:
        fresh = set(server.get("/history")) - known
        if fresh:
            return server.wait(fresh.pop())
        time.sleep(0.3)
    raise AssertionError(server.log[-3000:])


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_loads_without_a_fault_and_asks_for_what_its_copy_does(page, path):
    load(page, path)
    look(page, f"{path.stem} loaded")
    assert page.evaluate(FAULTS) == []
    asked = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    copy = json.loads((rig.ROOT / "tests/api" / path.name).read_text(encoding="utf-8"))
    for number, node in copy.items():
        assert asked[number]["class_type"] == node["class_type"]
        for name, value in node["inputs"].items():
            assert asked[number]["inputs"][name] == value, (node["class_type"], name)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_runs_and_gives_the_library_s_pixels(server, page, path):
    if "CheckpointLoader" in path.read_text() and not CHECKPOINT:
        pytest.skip("set GENDR_TEST_CHECKPOINT to an SD 1.5 file to run the text-to-image template")
    load(page, path)
    page.evaluate(HURRY, rig.EXAMPLE)
    known = set(server.get("/history"))
    page.evaluate("() => window.app.queuePrompt(0, 1)")
    result = newest(server, known)
    page.wait_for_timeout(2500)
    look(page, f"{path.stem} run")
    assert result.status == "success", result.error
    copy = json.loads((rig.ROOT / "tests/api" / path.name).read_text(encoding="utf-8"))
    savers = [k for k, n in copy.items() if n["class_type"] == "SaveImage"]
    if not savers:
        assert rig.video_facts(server.base / "output" / "GenDR") == (8, 96, 128, True)
        return
    pictures = [picture for saver in savers for picture in result.pictures(saver)]
    if "CheckpointLoader" in path.read_text():
        shapes, wanted = rig.sizes(copy, result)
        assert shapes == {wanted}
        return
    source = np.asarray(Image.open(server.base / "input/example.png").convert("RGB"))
    pixels = torch.from_numpy(source.copy()).movedim(-1, 0)[None] / 255
    scale = next(n["inputs"]["scale"] for n in copy.values() if "scale" in n["inputs"])
    teller = [k for k, n in copy.items() if n["class_type"] == "PreviewAny"]
    told = result.text(teller[0]) if teller else gendr.load(device="cpu").dtype
    used = next(name for name in ("bf16", "fp16", "fp32") if name in told)
    restored = gendr.load(device="cpu", dtype=used).restore(pixels, scale)
    # Save Image cuts off where others round; the networks agree to a thousandth of a level.
    expected = (restored[0].movedim(0, -1) * 255).numpy()
    for picture in pictures:
        assert picture.shape == (int(72 * scale), int(72 * scale), 3)
        assert np.abs(np.floor(expected) - picture).max() <= 1
        assert (np.floor(expected) != picture).mean() < 0.01


@pytest.mark.parametrize("path", rig.OLD_TEMPLATES, ids=rig.release_of)
def test_templates_of_earlier_releases_ask_for_the_same_and_run(server, page, path):
    load(page, path)
    look(page, f"{path.stem} of {path.parents[1].name}")
    assert page.evaluate(FAULTS) == []
    asked = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    copy = json.loads((path.parents[1] / "api" / path.name).read_text(encoding="utf-8"))
    for number, node in copy.items():
        assert node["inputs"].items() <= asked[number]["inputs"].items()
    page.evaluate(HURRY, rig.EXAMPLE)
    asked = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    result = server.run(asked if CHECKPOINT else rig.without_diffusion(asked))
    assert result.status == "success", result.error
    shapes, wanted = rig.sizes(asked, result)
    assert shapes == {wanted}


@pytest.mark.parametrize("path", rig.SAVED, ids=lambda p: p.stem)
def test_graphs_of_earlier_releases_open_with_their_values(server, page, path):
    """The front end gives values to widgets by position, and defaults to those that came later."""
    graph = json.loads(path.read_text(encoding="utf-8")) | {"links": [], "version": 0.4}
    graph["last_node_id"], graph["last_link_id"] = len(graph["nodes"]), 0
    for number, node in enumerate(graph["nodes"]):
        node |= {"pos": [400 * number, 0], "size": [300, 60], "order": number, "mode": 0}
        node["inputs"] = [{**slot, "link": None} for slot in node["inputs"]]
        node["outputs"] = [{**slot, "links": []} for slot in node["outputs"]]
    open_graph(page, graph, path.stem)
    look(page, f"saved by {path.stem}")
    assert page.evaluate(FAULTS) == []
    asked = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    for node in graph["nodes"]:
        facts = server.get(f"/object_info/{node['type']}")[node["type"]]["input"]
        specs = facts["required"] | facts.get("optional", {})
        defaults = {k: spec[1]["default"] for k, spec in specs.items() if "default" in spec[1]}
        assert asked[str(node["id"])]["inputs"] == defaults | node["meant"]


@pytest.mark.parametrize(
    "words",
    [
        *("upscale", "upscale image", "enlarge image", "increase resolution", "hires", "denoise"),
        *("deblur", "sharpen", "video upscale", "face restore"),
    ],
)
def test_the_search_offers_a_node_of_ours_in_its_first_lines(server, page, words):
    if "search_aliases" not in server.get("/object_info/GenDRUpscale")["GenDRUpscale"]:
        pytest.skip("this ComfyUI knows no other words for a node than its names")
    found = page.evaluate(FOUND, words)
    assert "GenDRUpscale" in [name for name, _ in found]
    assert [title for _, title in found[:FIRST_LINES] if "GenDR" in title], found[:FIRST_LINES]


def test_another_language(server, page):
    try:
        for language, title in (("zh", "GenDR 放大"), ("ja", "GenDR アップスケール")):
            server.post("/settings", {"Comfy.Locale": language})
            open_front_end(page, server)
            load(page, TILED)
            look(page, f"language {language}")
            notes = rig.ROOT / "web/notes" / f"{language}.json"
            notes = json.loads(notes.read_text(encoding="utf-8"))
            assert page.evaluate(NOTE) == [notes["title"], notes[TILED.stem]]
            shown = page.evaluate("() => LiteGraph.registered_node_types['GenDRUpscale'].title")
            assert shown == title
            written = rig.ROOT / "locales" / language / "nodeDefs.json"
            inputs = json.loads(written.read_text(encoding="utf-8"))["LoadGenDR"]["inputs"]
            labels = page.evaluate(LABELS, "LoadGenDR")
            assert labels == {name: text["name"] for name, text in inputs.items()}
            for name, text in inputs.items():
                assert tooltip(page, "LoadGenDR", name) == text["tooltip"]
            look(page, f"tooltip {language}")
    finally:
        server.post("/settings", {"Comfy.Locale": "en"})
        open_front_end(page, server)


def test_a_failing_node_says_why(server, page):
    """The message reaches the person with its cause in the first line."""
    load(page, TILED)
    known = set(server.get("/history"))
    page.evaluate(
        """model => {
          const node = window.app.graph.nodes.find(n => n.type === 'LoadGenDR');
          node.widgets[0].value = model;
        }""",
        "cut.safetensors",
    )
    page.evaluate("() => window.app.queuePrompt(0, 1)")
    result = newest(server, known)
    page.wait_for_timeout(2000)
    look(page, "error")
    assert result.status == "error"
    assert "cut" in result.error


@pytest.fixture(scope="module")
def modern(server, page):
    """The same page with Nodes 2.0, the default of new installations: for the last tests here."""
    if not page.evaluate(MODERN):
        pytest.skip("this front end comes without Nodes 2.0")
    server.post("/settings", {"Comfy.VueNodes.Enabled": True})
    open_front_end(page, server)
    yield page
    server.post("/settings", {"Comfy.VueNodes.Enabled": False})


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_with_nodes_of_html_none_covers_another(modern, path):
    load(modern, path)
    look(modern, f"{path.stem} Nodes 2.0")
    frames = modern.evaluate(FRAMES)
    assert len(frames) == len(json.loads(path.read_text(encoding="utf-8"))["nodes"])
    for number, (name, left, top, right, bottom) in enumerate(frames):
        for other, x0, y0, x1, y1 in frames[:number]:
            assert left >= x1 or right <= x0 or top >= y1 or bottom <= y0, (name, other)

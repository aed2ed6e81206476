"""The pack in a real ComfyUI, through its API."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import rig
import torch
from PIL import Image

import gendr

NODES = ("LoadGenDR", "GenDRUpscale", "TiledGenDR")
LANGUAGES = {path.name for path in (rig.ROOT / "locales").iterdir()}


def graph(
    *,
    node: str = "GenDRUpscale",
    model: str = rig.MODEL,
    seed: int = 0,
    batch: int = 1,
    height: int = 40,
    width: int = 56,
    channels: int = 3,
    kind: str = "float32",
    dtype: str = "fp32",
    name: str = "picture",
    **widgets,
) -> dict:
    """Noise -> one of our nodes -> a file with the exact result, in API format."""
    values = {"scale": 2.0, "color_fix": "wavelet", "detail": 1.0, "fidelity": -1.0}
    if node == "TiledGenDR":
        values |= {"tile_size": 0, "overlap": 0, "tile_batch": 0, "seamless": False}
    values |= {"image": ["1", 0], "model": ["2", 0], **widgets}
    size = {"batch": batch, "height": height, "width": width, "channels": channels}
    return {
        "1": {"class_type": "ProbePicture", "inputs": {**size, "seed": seed, "kind": kind}},
        "2": {"class_type": "LoadGenDR", "inputs": {"model": model, "dtype": dtype}},
        "3": {"class_type": node, "inputs": values},
        "4": {
            "class_type": "ProbeKeep",
            "inputs": {"image": ["3", 0], "name": name, "model": ["2", 0]},
        },
        "5": {"class_type": "PreviewAny", "inputs": {"source": ["3", 1]}},
    }


def noise(seed=0, batch=1, height=40, width=56, channels=3):
    """What ProbePicture makes, b c h w."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, height, width, channels, generator=generator).movedim(-1, 1)


def kept(server, name="picture"):
    """What ProbeKeep wrote, b c h w."""
    return torch.load(server.base / "output" / f"{name}.pt").movedim(-1, 1)


@pytest.fixture(scope="module")
def engine(server):
    """The same model without a host."""
    return gendr.load(server.base / "models/gendr" / rig.MODEL, device="cpu", dtype="fp32")


def test_the_pack_loads_without_a_word(server):
    assert "IMPORT FAILED" not in server.greeting
    assert "Traceback" not in server.greeting
    assert set(NODES) <= set(server.get("/object_info"))


@pytest.mark.parametrize("node", NODES)
def test_every_input_and_output_explains_itself(server, node):
    facts = server.get(f"/object_info/{node}")[node]
    assert facts["category"] == "image/upscaling"
    assert facts["description"]
    assert all(facts["output_tooltips"])
    assert len(facts["output_tooltips"]) == len(facts["output"])
    for group in ("required", "optional"):
        for name, spec in facts["input"].get(group, {}).items():
            assert len(spec[1]["tooltip"]) > 20, name


def test_help_texts_languages_and_templates_are_served(server):
    for node in NODES:
        assert b"## Inputs" in server.get(f"/extensions/gendr/docs/{node}.md")
    translations = server.get("/i18n")
    assert set(translations) >= LANGUAGES
    assert all(set(translations[language]["nodeDefs"]) >= set(NODES) for language in LANGUAGES)
    titles = server.get("/workflow_templates")["gendr"]
    assert set(titles) == {path.stem for path in (rig.ROOT / "workflows").glob("*.json")}
    for title in titles:
        place = f"/api/workflow_templates/gendr/{title.replace(' ', '%20')}"
        assert server.get(f"{place}.json")["nodes"]
        assert server.get(f"{place}.jpg")[:2] == b"\xff\xd8"


def test_the_list_holds_the_embedded_model_first_and_no_other_files(server):
    (server.base / "models/gendr/readme.txt").write_text("not a model")
    names = server.get("/object_info/LoadGenDR")["LoadGenDR"]["input"]["required"]["model"][0]
    assert names[0] == "GenDR-Tiny"
    assert rig.MODEL in names
    assert "readme.txt" not in names


def test_same_pixels_as_the_library(server, engine):
    result = server.run(graph())
    assert result.status == "success"
    expected = engine.restore(noise(), 2.0, color_fix="wavelet")
    torch.testing.assert_close(kept(server), expected, atol=1e-4, rtol=0)
    report = result.text("5")
    assert "80" in report
    assert "112" in report
    dtype, _, contiguous, words = result.entry["outputs"]["4"]["text"]
    assert (dtype, contiguous) == ("torch.float32", "True")
    assert words == repr(engine)


def test_computes_in_the_format_that_was_asked_for(server):
    assert server.run(graph(name="exact")).status == "success"
    result = server.run(graph(dtype="bf16", name="rough"))
    assert result.status == "success", result.error
    assert "bf16" in result.text("5")
    distance = (kept(server, "exact") - kept(server, "rough")).abs().mean()
    assert 0 < distance < 0.02


@pytest.mark.parametrize("node", ["GenDRUpscale", "TiledGenDR"])
@pytest.mark.parametrize("path", rig.SAVED, ids=lambda path: path.stem)
def test_graphs_of_earlier_releases_give_the_library_s_pixels(server, path, node):
    saved = {n["type"]: n["meant"] for n in json.loads(path.read_text())["nodes"]}
    prompt = graph(node=node, height=72, width=64, **saved[node])
    prompt["2"]["inputs"] = saved["LoadGenDR"]
    result = server.run(prompt)
    assert result.status == "success", result.error
    library = gendr.load(device="cpu", dtype=saved["LoadGenDR"]["dtype"])
    wanted = dict(saved[node])
    if "tile_size" in wanted:
        wanted["tile"] = wanted.pop("tile_size")
    expected = library.restore(noise(height=72, width=64), **wanted)
    torch.testing.assert_close(kept(server), expected, atol=1e-4, rtol=0)


def test_same_pixels_as_the_command_line(server):
    name = server.put("picture.png", noise(seed=3)[0].movedim(0, -1))
    source, target = server.base / "input" / name, server.base / "by_command.png"
    command = ["upscale", str(source), "-o", str(target), "--scale", "2", "--dtype", "fp32"]
    command += ["--model", str(server.base / "models/gendr" / rig.MODEL), "--device", "cpu"]
    subprocess.run([sys.executable, "-m", "gendr", *command], cwd=rig.ROOT, check=True)
    prompt = graph() | {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "t"}},
    }
    (picture,) = server.run(prompt).pictures("6")
    expected = np.asarray(Image.open(target)).astype(int)
    # Save Image cuts off where the command line rounds.
    assert set(np.unique(expected - picture)) <= {0, 1}


def test_tiles_seams_and_the_map(server, engine):
    prompt = graph(node="TiledGenDR", height=96, width=96, tile_size=128, overlap=32)
    prompt["6"] = {"class_type": "ProbeKeep", "inputs": {"image": ["3", 2], "name": "map"}}
    result = server.run(prompt)
    assert result.status == "success"
    expected = engine.restore(noise(height=96, width=96), 2.0, tile=128, overlap=32)
    torch.testing.assert_close(kept(server), expected, atol=1e-4, rtol=0)
    departed = kept(server, "map")
    assert departed.shape == (1, 3, 192, 192)
    assert 0 <= departed.min() <= departed.max() <= 1
    assert departed.max() > 0


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "float64"])
def test_any_depth_and_type(server, channels, kind):
    result = server.run(graph(channels=channels, kind=kind, height=24, width=17))
    assert result.status == "success", result.error
    picture = kept(server)
    assert picture.shape == (1, channels, 48, 34)
    assert picture.dtype == torch.float32
    assert picture.isfinite().all()


def test_a_batch_is_what_each_picture_is_alone(server, engine):
    assert server.run(graph(batch=3, height=24, width=24)).status == "success"
    pictures = noise(batch=3, height=24, width=24)
    for n, picture in enumerate(kept(server)):
        alone = engine.restore(pictures[n : n + 1], 2.0)[0]
        torch.testing.assert_close(picture, alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 1.37, 2.5, 4.0])
def test_exact_sizes(server, scale):
    assert server.run(graph(scale=scale, height=21, width=33)).status == "success"
    size = tuple(int(side * scale + 0.5) for side in (21, 33))
    assert kept(server).shape[-2:] == size


def test_only_the_masked_part_is_restored(server):
    sizes = {"batch": 1, "height": 200, "width": 240}
    rectangle = {"top": 80, "bottom": 120, "left": 100, "right": 140}
    mask = {"class_type": "ProbeMask", "inputs": sizes | rectangle}
    prompt = graph(height=200, width=240, mask=["6", 0]) | {"6": mask}
    result = server.run(prompt)
    assert result.status == "success", result.error
    plain = gendr.resize(noise(height=200, width=240), (400, 480))
    changed = (kept(server) - plain).abs().amax(1)[0] > 1e-4
    rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
    assert 130 < rows.min() < 175
    assert 225 < rows.max() < 270
    assert 170 < columns.min() < 215
    assert 265 < columns.max() < 310
    assert "mask" in result.text("5")


def refused(server, prompt):
    """The server's words for a graph that it does not start."""
    status, answer = server.post("/prompt", {"prompt": prompt})
    assert status == 400
    return json.dumps(answer)


def failed(server, prompt):
    """First line of the message of a graph that stops."""
    result = server.run(prompt)
    assert result.status == "error"
    # ComfyUI shows the type first; with a path in it nobody would see the cause.
    assert result.messages["execution_error"]["exception_type"].isidentifier()
    return result.error


def test_a_model_that_is_not_there(server):
    assert "not in list" in refused(server, graph(model="gone.safetensors"))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("other.safetensors", "GenDR"),
        ("cut.safetensors", "cut"),
        ("empty.safetensors", "empty.safetensors"),
        ("text.safetensors", "text.safetensors"),
        ("evil.pth", "evil.pth"),
    ],
)
def test_a_file_that_is_no_model(server, model, words):
    message = failed(server, graph(model=model))
    assert words in message
    assert len(message) < 400
    assert not (server.base / "evil").exists()
    assert server.run(graph()).status == "success"


def with_mask(height, width, value=1.0, **size):
    """A picture of 40x56 with a mask of another size."""
    sides = {"batch": 1, "height": height, "width": width}
    white = {"top": 0, "bottom": height // 2 if value else 0, "left": 0, "right": width // 2}
    mask = {"class_type": "ProbeMask", "inputs": sides | white}
    return graph(mask=["6", 0], **size) | {"6": mask}


def test_a_mask_of_another_shape(server):
    message = failed(server, with_mask(64, 64))
    assert message.startswith("The mask is 64x64, the picture 56x40")
    assert server.run(graph()).status == "success"


def test_a_mask_of_the_same_shape_is_scaled(server):
    assert server.run(with_mask(40, 56, name="same")).status == "success"
    assert server.run(with_mask(20, 28, name="half")).status == "success"
    # Beside the softened edge both masks choose the same.
    same, half = kept(server, "same"), kept(server, "half")
    assert torch.equal(same[..., :32, :44], half[..., :32, :44])
    assert torch.equal(same[..., 68:, 84:], half[..., 68:, 84:])


def test_the_black_mask_of_load_image_is_none(server):
    assert server.run(graph(name="without")).status == "success"
    assert server.run(with_mask(64, 64, 0, name="black")).status == "success"
    assert torch.equal(kept(server, "black"), kept(server, "without"))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"size_by": "long side", "side": 84}, (60, 84)),
        ({"size_by": "short side", "side": 60}, (60, 84)),
        ({"size_by": "megapixels", "megapixels": 0.01}, (85, 118)),
        ({"size_by": "width and height", "width": 84, "height": 200}, (60, 84)),
    ],
)
def test_a_size_instead_of_a_scale(server, size, expected):
    prompt = graph()
    prompt["3"]["inputs"].update(size)
    result = server.run(prompt)
    assert result.status == "success", result.error
    assert kept(server).shape[-2:] == expected


def test_without_a_loader_the_embedded_model_is_used(server):
    prompt = without_loader()
    result = server.run(prompt)
    assert result.status == "success", result.error
    assert "GenDR-Tiny" in result.text("5")


def test_the_map_is_made_once_somebody_takes_it(server):
    prompt = graph(node="TiledGenDR", seed=31)
    assert server.run(prompt).status == "success"
    prompt["6"] = {"class_type": "ProbeKeep", "inputs": {"image": ["3", 2], "name": "late"}}
    result = server.run(prompt)
    assert result.status == "success", result.error
    assert kept(server, "late").shape == (1, 3, 80, 112)
    # Nothing has changed since: the map stays in the cache.
    again = server.run(prompt)
    assert "3" in again.messages["execution_cached"]["nodes"]


def test_masks_that_do_not_count_up(server):
    sizes = {"batch": 2, "top": 0, "bottom": 8, "left": 0, "right": 8, "height": 40, "width": 56}
    message = failed(
        server,
        graph(batch=3, mask=["6", 0]) | {"6": {"class_type": "ProbeMask", "inputs": sizes}},
    )
    assert "2 masks for 3 pictures" in message


def test_an_empty_batch(server):
    assert "empty batch" in failed(server, graph(batch=0))
    assert server.run(graph()).status == "success"


def test_a_scale_out_of_range(server):
    assert "bigger than max" in refused(server, graph(scale=99.0))
    wire = {"class_type": "ProbeNumber", "inputs": {"value": 99.0}}
    assert "between 1 and 8" in failed(server, graph(scale=["6", 0]) | {"6": wire})
    assert server.run(graph()).status == "success"


def test_a_color_fix_that_does_not_exist(server):
    assert "not in list" in refused(server, graph(color_fix="magic"))


def test_a_replaced_model_file_is_noticed(server):
    folder = server.base / "models/gendr"
    shutil.copy(folder / rig.MODEL, folder / "changing.safetensors")
    server.run(graph(model="changing.safetensors"))
    before = kept(server)
    server.run(graph(model="changing.safetensors", name="again"))
    assert torch.equal(kept(server, "again"), before)
    time.sleep(0.02)
    shutil.copy(folder / rig.SECOND, folder / "changing.safetensors")
    server.run(graph(model="changing.safetensors"))
    assert not torch.equal(kept(server), before)


def test_two_graphs_queued(server, engine):
    first = server.queue(graph(seed=11, name="first"))
    second = server.queue(graph(seed=12, name="second"))
    assert server.wait(first).status == server.wait(second).status == "success"
    for seed, name in ((11, "first"), (12, "second")):
        expected = engine.restore(noise(seed=seed), 2.0)
        torch.testing.assert_close(kept(server, name), expected, atol=1e-4, rtol=0)


def many_tiles(seed, name="picture"):
    """A graph of some seconds: more than a hundred tiles."""
    return graph(
        node="TiledGenDR",
        seed=seed,
        height=400,
        width=400,
        tile_size=128,
        overlap=32,
        tile_batch=1,
        name=name,
    )


def listen(server, prompt, *, until, on_progress=None):
    """Queue a graph and gather its messages: (progress values, previews, last type).

    A preview is its size and how far the bar was.
    """
    import aiohttp

    async def gather():
        values, previews = [], []
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{server.url}/ws?clientId=watcher", max_msg_size=0) as socket,
        ):
            prompt_id = server.queue(prompt, client="watcher")
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    previews.append((len(message.data), values[-1][0] if values else 0))
                    continue
                facts = json.loads(message.data)
                if facts["type"] == "progress" and facts["data"]["node"] == "3":
                    values.append((facts["data"]["value"], facts["data"]["max"]))
                    if on_progress is not None:
                        on_progress(prompt_id, values)
                if facts["type"] in until:
                    return values, previews, facts["type"]
        raise AssertionError("the connection ended early")

    return asyncio.run(asyncio.wait_for(gather(), rig.RUN_SECONDS))


ENDS = ("execution_success", "execution_error", "execution_interrupted")


def without_loader(**size):
    """The graph with the embedded model: one node, nothing loaded for it."""
    prompt = graph(**size)
    del prompt["2"], prompt["3"]["inputs"]["model"], prompt["4"]["inputs"]["model"]
    return prompt


@pytest.mark.parametrize("path", ["default", "tiles"])
def test_progress_grows_and_shows_small_previews_early(server, path):
    # The default path is that of the model that ships: beside a random one that is hardly a network
    # the colours afterwards, which come in one go, would be a third of the work.
    size = {"seed": 21, "height": 400, "width": 400}
    prompt = many_tiles(21) if path == "tiles" else without_loader(**size)
    values, previews, end = listen(server, prompt, until=ENDS)
    assert end == "execution_success"
    done = [value for value, _ in values]
    assert done == sorted(done)
    assert values[-1][0] == values[-1][1]
    # How many there are is the host's choice: newer ones pass on ten a second.
    assert max(b - a for a, b in zip([0, *done], done, strict=False)) < values[-1][1] / 4
    sizes, when = zip(*previews, strict=True)
    assert max(sizes) < 200_000
    assert when[0] < values[-1][1] / 2


def test_cancel_in_the_middle(server):
    pressed = []

    def press(prompt_id, values):
        if len(values) == 3 and not pressed:
            pressed.append(time.monotonic())
            server.post("/interrupt", {"prompt_id": prompt_id})

    values, _, end = listen(server, many_tiles(22, "never"), until=ENDS, on_progress=press)
    waited = time.monotonic() - pressed[0]
    assert end == "execution_interrupted"
    assert values[-1][0] < values[-1][1]
    assert waited < 3
    assert not (server.base / "output/never.pt").exists()
    assert server.run(graph(seed=23)).status == "success"


def test_twenty_runs_leave_memory_flat(server):
    taken = []
    for n in range(20):
        assert server.run(graph(seed=100 + n, height=128, width=128)).status == "success"
        taken.append(server.resident_bytes() / 2**20)
    # The first runs fill caches of allocator and host.
    early, late = max(taken[5:10]), max(taken[15:])
    assert late - early < 32, [round(t) for t in taken]


def test_loading_again_and_again_leaves_memory_flat(server):
    taken = []
    for n in range(12):
        model = (rig.MODEL, rig.SECOND)[n % 2]
        assert server.run(graph(seed=200 + n, model=model)).status == "success"
        taken.append(server.resident_bytes() / 2**20)
    assert max(taken[8:]) - max(taken[3:6]) < 32, [round(t) for t in taken]


@pytest.mark.parametrize("copy", rig.API_COPIES, ids=lambda path: path.stem)
def test_the_workflows_run(server, copy):
    run_copy(server, copy)


@pytest.mark.parametrize("copy", rig.OLD_API_COPIES, ids=rig.release_of)
def test_the_workflows_of_earlier_releases_run(server, copy):
    run_copy(server, copy)


def run_copy(server, copy):
    """A template in API format gives pictures, or a video, of its scale."""
    prompt = rig.without_diffusion(json.loads(copy.read_text(encoding="utf-8")))
    if missing := {n["class_type"] for n in prompt.values()} - set(server.get("/object_info")):
        pytest.skip(f"this ComfyUI has no {', '.join(missing)}")
    result = server.run(prompt)
    assert result.status == "success", result.error
    if "SaveVideo" in {n["class_type"] for n in prompt.values()}:
        assert rig.video_facts(server.base / "output" / "GenDR") == (8, 96, 128, True)
        return
    shapes, wanted = rig.sizes(prompt, result)
    assert shapes == {wanted}


def test_a_folder_of_any_name_works(tmp_path):
    """Clone, zip and Manager all end in a folder; its name is not ours to choose."""
    base = tmp_path / "My Comfy v1.2"
    names = ("ComfyUI-GenDR", "GenDR_v0.1.0", "gendr main (2)")
    host = rig.ComfyUI(base, packs=names, copy=True)
    shutil.copy(rig.HERE / "probe_nodes.py", base / "custom_nodes")
    rig.write_models(base / "models" / "gendr")
    try:
        host.start()
        assert "IMPORT FAILED" not in host.log
        assert "Cannot import" not in host.log
        assert set(NODES) <= set(host.get("/object_info"))
        assert host.run(graph()).status == "success"
        # Under names with spaces or dots the host itself does not find help pages.
        assert b"## Inputs" in host.get("/extensions/ComfyUI-GenDR/docs/LoadGenDR.md")
    finally:
        host.stop()


def test_extra_model_paths_are_searched(tmp_path):
    elsewhere = tmp_path / "models elsewhere"
    rig.write_models(elsewhere)
    paths = tmp_path / "paths.yaml"
    paths.write_text(f'mine:\n    base_path: "{tmp_path}"\n    gendr: "models elsewhere"\n')
    host = rig.ComfyUI(tmp_path / "base")
    try:
        host.start("--extra-model-paths-config", os.fspath(paths))
        names = host.get("/object_info/LoadGenDR")["LoadGenDR"]["input"]["required"]["model"][0]
        assert rig.MODEL in names
        assert (host.base / "models/gendr").is_dir()
    finally:
        host.stop()

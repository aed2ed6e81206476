"""The nodes without ComfyUI: the library's pixels, masks, texts, and the host's side with a fake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import help_pages
import numpy as np
import pack
import pytest
import torch
from PIL import Image

from gendr import Settings, resize

NODES = pack.nodes().NODE_CLASS_MAPPINGS
TITLES = pack.nodes().NODE_DISPLAY_NAME_MAPPINGS
host = pack.nodes("host")
wires = pack.nodes("wires")
sizes = pack.nodes("size")
# Those that the front ends of ComfyUI offer.
LANGUAGES = ("ar", "en", "es", "fa", "fr", "he", "ja", "ko", "pt-BR", "ru", "tr", "zh", "zh-TW")
WIDGETS = {"scale": 2.0, "color_fix": "wavelet", "detail": 1.0, "fidelity": -1.0}
TILES = {"tile_size": 0, "overlap": 0, "tile_batch": 0, "seamless": False}


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    """A GENDR_MODEL of a tiny network with random weights."""
    return host.load(str(tiny_checkpoint), "fp32")


def picture(height=24, width=20, channels=3, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, height, width, channels, generator=generator)


def upscale(model, image, **widgets):
    return NODES["GenDRUpscale"]().upscale(image=image, model=model, **{**WIDGETS, **widgets})


def upscale_tiled(model, image, **widgets):
    return NODES["TiledGenDR"]().upscale(
        image=image, model=model, **{**WIDGETS, **TILES, **widgets}
    )


def inputs_of(node):
    types = node.INPUT_TYPES()
    return {**types["required"], **types.get("optional", {})}


# ---- pixels ----


def test_same_pixels_as_the_library(model):
    image = picture()
    result, report = upscale(model, image, detail=0.7, color_fix="lab")
    expected = model.gendr.restore(image.movedim(-1, 1), 2.0, detail=0.7, color_fix="lab")
    assert torch.equal(result, expected.movedim(1, -1))
    assert result.is_contiguous()
    assert "20x24" in report
    assert "40x48" in report


def test_same_pixels_as_the_command_line(model, tiny_checkpoint, tmp_path):
    image = picture(seed=1)
    source, target = tmp_path / "in.png", tmp_path / "out.png"
    Image.fromarray((image[0] * 255).round().byte().numpy()).save(source)
    command = ["upscale", source, "-o", target, "--model", tiny_checkpoint, "--scale", "2"]
    command += ["--device", "cpu", "--dtype", "fp32", "--quiet"]
    # By the folder's path and isolated, as the Python of ComfyUI's portable version has to start it.
    start = [sys.executable, "-I", os.fspath(pack.ROOT / "gendr")]
    subprocess.run([*start, *map(str, command)], cwd=tmp_path, check=True, timeout=120)
    read = torch.from_numpy(np.asarray(Image.open(source)).copy())[None] / 255
    result, _ = upscale(model, read)
    expected = torch.from_numpy(np.asarray(Image.open(target)).copy())
    assert torch.equal((result[0] * 255).round().byte(), expected)


def test_tiled_node_passes_every_setting_on(model):
    image = picture(96, 96)
    tiles = {"tile_size": 64, "overlap": 16, "tile_batch": 2, "seamless": True}
    result, report, departed = upscale_tiled(model, image, **tiles)
    pixels = image.movedim(-1, 1)
    expected = model.gendr.restore(pixels, 2.0, tile=64, overlap=16, tile_batch=2, seamless=True)
    assert torch.equal(result, expected.movedim(1, -1))
    assert "tiles" in report
    there = (expected - resize(pixels, (192, 192))).abs().mean(1)
    torch.testing.assert_close(departed, (4 * there).clamp(0, 1)[..., None].expand(-1, -1, -1, 3))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_depths_and_types(model, channels, dtype):
    image = picture(9, 13, channels).to(dtype)
    for run in (upscale, upscale_tiled):
        result = run(model, image)[0]
        assert result.shape == (1, 18, 26, channels)
        assert result.dtype == torch.float32
        assert result.isfinite().all()


def test_a_batch_is_its_pictures(model):
    images = picture(batch=3)
    result, _ = upscale(model, images)
    for n in range(3):
        alone, _ = upscale(model, images[n : n + 1])
        assert torch.equal(result[n : n + 1], alone)


def test_inputs_are_left_alone(model):
    image, mask = picture(), torch.ones(1, 24, 20)
    before = image.clone()
    with torch.inference_mode():
        upscale(model, image, mask=mask)
    assert torch.equal(image, before)
    assert torch.equal(mask, torch.ones(1, 24, 20))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(0, 8, 8, 3), "^There is no picture to restore.*empty batch"),
        (torch.zeros(1, 0, 8, 3), "^There is no picture to restore.*empty batch"),
        (torch.zeros(8, 8, 3), "^What came as image has the shape 8x8x3.*batch x height x width"),
        (torch.zeros(1, 16, 8, 8), "^What came as image has the shape 1x16x8x8.*VAE Decode"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), "^The picture holds whole numbers .uint8"),
        (torch.full((1, 8, 8, 3), torch.nan), "^The picture holds 192 values that are not numbers"),
        ([1, 2], "^What came as image is no picture but list"),
    ],
)
def test_what_is_no_picture_is_told_in_the_host_s_words(model, image, words):
    with pytest.raises(ValueError, match=words) as caught:
        upscale(model, image)
    assert "nan_to_num" not in str(caught.value)
    assert "b c h w" not in str(caught.value)


def test_wrong_numbers_are_named(model):
    with pytest.raises(ValueError, match="scale must be between 1 and 8"):
        upscale(model, picture(), scale=99.0)


@pytest.mark.parametrize("run", [upscale, upscale_tiled])
def test_without_a_loader_the_embedded_model_is_used(run):
    image = picture(32, 24)
    expected = host.embedded().gendr.restore(image.movedim(-1, 1), 2.0)
    assert torch.equal(run(None, image)[0], expected.movedim(1, -1))
    assert "GenDR-Tiny" in run(None, image)[1]


# ---- fidelity and presets ----


@pytest.mark.parametrize("run", [upscale, upscale_tiled])
@pytest.mark.parametrize(
    ("widgets", "meant"),
    [
        ({"fidelity": -1.0}, {"fidelity": "auto"}),
        ({"fidelity": -0.05}, {"fidelity": "auto"}),
        ({"fidelity": 0.0}, {"fidelity": 0.0}),
        ({"fidelity": 0.3, "preset": "generated"}, {"fidelity": 0.3}),
        ({"fidelity": -1.0, "preset": "damaged"}, {"fidelity": 0.0}),
        ({"fidelity": -1.0, "preset": "photo"}, {"preset": "photo"}),
    ],
)
def test_what_the_widgets_mean(model, run, widgets, meant):
    image = picture()
    expected = model.gendr.restore(image.movedim(-1, 1), 2.0, **meant)
    assert torch.equal(run(model, image, **widgets)[0], expected.movedim(1, -1))


# ---- sizes ----


@pytest.mark.parametrize(
    ("widgets", "expected"),
    [
        ({"size_by": "scale", "side": 10, "width": 10, "megapixels": 0.1}, (48, 40)),
        ({"size_by": "long side", "side": 60}, (60, 50)),
        ({"size_by": "long side", "side": 12}, (12, 10)),
        ({"size_by": "short side", "side": 60}, (72, 60)),
        ({"size_by": "megapixels", "megapixels": 0.003}, (60, 50)),
        ({"size_by": "width and height", "width": 60, "height": 60}, (60, 50)),
        ({"size_by": "width and height", "width": 40, "height": 1000}, (48, 40)),
        ({"size_by": "width and height", "width": 50, "height": 60}, (60, 50)),
    ],
)
def test_every_way_to_say_a_size(model, widgets, expected):
    for run in (upscale, upscale_tiled):
        result, report = run(model, picture(), **widgets)[:2]
        assert tuple(result.shape[1:3]) == expected
        assert f"{expected[1]}x{expected[0]}" in report


@pytest.mark.parametrize("picture_size", [(24, 20), (100, 100), (37, 211), (13, 19), (768, 511)])
@pytest.mark.parametrize("frame", [(64, 64), (130, 90), (7, 100), (97, 31)])
def test_a_frame_is_filled_and_never_left(picture_size, frame):
    size = sizes.target(
        "width and height",
        picture=picture_size,
        scale=4.0,
        side=1,
        megapixels=1.0,
        width=frame[0],
        height=frame[1],
    )
    height, width = Settings(**size).target_size(*picture_size)
    assert width <= frame[0]
    assert height <= frame[1]
    assert width == frame[0] or height == frame[1]


def test_a_size_beyond_what_one_step_can_do_is_told(model):
    with pytest.raises(ValueError, match="at most 8 times"):
        upscale(model, picture(), size_by="long side", side=4096)


def test_a_way_that_does_not_exist_is_told(model):
    with pytest.raises(ValueError, match=r"^size by must be one of scale, long side"):
        upscale(model, picture(), size_by="guess")


# ---- masks ----


def test_a_mask_means_what_it_means_in_the_library(model):
    image, mask = picture(120, 140), torch.zeros(1, 120, 140)
    mask[:, 60:70, 60:70] = 1
    result, report = upscale(model, image, mask=mask)
    expected = model.gendr.restore(image.movedim(-1, 1), 2.0, mask=mask)
    assert torch.equal(result, expected.movedim(1, -1))
    assert report.startswith("mask: columns ")


def masked(height, width, box):
    mask = torch.zeros(1, height, width)
    mask[:, box[0] : box[1], box[2] : box[3]] = 1
    return mask


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(1, 64, 64), "^The mask is 64x64, the picture 20x24"),
        (torch.zeros(1, 24, 21), "^The mask is 21x24, the picture 20x24"),
        (torch.ones(3, 8, 8, 3), "^What came as mask has the shape 3x8x8x3.*Convert Image to Mask"),
        (torch.full((1, 24, 20), torch.nan), "^The mask holds 480 values that are not numbers"),
        (torch.ones(5), "^What came as mask has the shape 5"),
        ("mask", "^What came as mask is no mask but str"),
    ],
)
def test_masks_that_do_not_fit_are_told(model, mask, words):
    with pytest.raises(ValueError, match=words):
        upscale(model, picture(), mask=mask)


def test_a_number_of_masks_that_fits_nothing_is_told(model):
    with pytest.raises(ValueError, match="2 masks for 3 pictures"):
        upscale(model, picture(batch=3), mask=torch.zeros(2, 24, 20))


def test_the_black_mask_of_load_image_is_none(model):
    result, report = upscale(model, picture(), mask=torch.zeros(1, 64, 64))
    assert torch.equal(result, upscale(model, picture())[0])
    assert "mask" not in report


@pytest.mark.parametrize("shape", [(24, 20), (1, 24, 20), (1, 1, 24, 20), (1, 24, 20, 1)], ids=str)
def test_a_mask_may_come_in_any_order(model, shape):
    mask = masked(24, 20, (4, 9, 5, 11))
    expected, _ = upscale(model, picture(), mask=mask)
    assert torch.equal(upscale(model, picture(), mask=mask.reshape(shape))[0], expected)


@pytest.mark.parametrize("factor", [0.25, 0.5, 2, 3])
def test_a_mask_of_the_same_shape_is_scaled(factor):
    pixels = torch.zeros(1, 3, 80, 120)
    small = masked(
        int(80 * factor), int(120 * factor), tuple(int(v * factor) for v in (16, 32, 40, 80))
    )
    scaled = wires.checked_mask(small, pixels)
    assert scaled.shape == (1, 80, 120)
    expected = masked(80, 120, (16, 32, 40, 80))
    assert abs(float(scaled.mean() - expected.mean())) < 0.01
    assert (scaled[0, 18:30, 42:78] == 1).all()
    # A pixel of the smaller mask may spread over its neighbours.
    reach = int(max(1, 1 / factor))
    assert not scaled[0, : 16 - reach].any()
    assert not scaled[0, :, : 40 - reach].any()


# ---- texts and defaults ----


@pytest.mark.parametrize("name", NODES)
def test_defaults_are_the_project_s(name):
    settings = Settings()
    renamed = {"tile_size": "tile"}
    for key, spec in inputs_of(NODES[name]).items():
        field = renamed.get(key, key)
        # A target size has no default: it counts only where the person asks for one.
        if getattr(settings, field, None) is not None:
            default = spec[1]["default"]
            assert ("auto" if (key, default) == ("fidelity", -1.0) else default) == getattr(
                settings, field
            ), key


@pytest.mark.parametrize("call", [upscale, upscale_tiled])
def test_frames_of_a_clip_are_the_library_s(model, call):
    frames = torch.cat([picture()] * 2) + torch.tensor([0.0, 0.01])[:, None, None, None]
    frames = frames.clamp(0, 1)
    result, report, *_ = call(model, frames, steady=True)
    expected = model.gendr.restore(frames.movedim(-1, 1), 2.0, color_fix="wavelet", steady=True)
    assert torch.equal(result, expected.movedim(1, -1))
    assert "steady on" in report
    assert not torch.equal(result, call(model, frames)[0])


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_is_translated(language):
    texts = json.loads((pack.ROOT / f"locales/{language}/nodeDefs.json").read_text("utf-8"))
    assert set(texts) == set(NODES)
    for name, node in NODES.items():
        assert texts[name]["display_name"]
        assert texts[name]["description"]
        assert list(texts[name]["inputs"]) == list(inputs_of(node))
        assert list(texts[name]["outputs"]) == [str(n) for n in range(len(node.RETURN_TYPES))]
        for text in (*texts[name]["inputs"].values(), *texts[name]["outputs"].values()):
            assert text["name"]
            assert text["tooltip"]


def test_english_texts_are_the_nodes_own():
    texts = json.loads((pack.ROOT / "locales/en/nodeDefs.json").read_text("utf-8"))
    for name, node in NODES.items():
        assert texts[name]["display_name"] == TITLES[name]
        assert texts[name]["description"] == node.DESCRIPTION
        for key, spec in inputs_of(node).items():
            assert texts[name]["inputs"][key]["tooltip"] == spec[1]["tooltip"]
        told = [output["tooltip"] for output in texts[name]["outputs"].values()]
        assert told == list(node.OUTPUT_TOOLTIPS)


@pytest.mark.parametrize("name", NODES)
def test_the_help_page_names_every_input(name):
    texts = json.loads((pack.ROOT / "locales/en/nodeDefs.json").read_text("utf-8"))
    page = (pack.ROOT / f"web/docs/{name}.md").read_text("utf-8")
    if name == "TiledGenDR":
        page += (pack.ROOT / "web/docs/GenDRUpscale.md").read_text("utf-8")
    assert page.startswith(f"# {TITLES[name]}\n")
    for text in (*texts[name]["inputs"].values(), *texts[name]["outputs"].values()):
        assert f"**{text['name']}**" in page


# ---- prompts ----


def conditioning(tokens=77, width=12):
    """What CLIP Text Encode sends: an embedding and facts beside it."""
    embedding = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(tokens))
    return [[embedding, {"pooled_output": torch.zeros(1, width)}]]


@pytest.mark.parametrize("tokens", [77, 154])
@pytest.mark.parametrize("call", [upscale, upscale_tiled])
def test_a_conditioning_stands_in_for_the_models_prompt(model, tokens, call):
    image, positive = picture(), conditioning(tokens)
    result, report, *_ = call(model, image, positive=positive)
    expected = model.gendr.restore(
        image.movedim(-1, 1), 2.0, color_fix="wavelet", prompt=positive[0][0]
    )
    assert torch.equal(result, expected.movedim(1, -1))
    assert f"prompt: {tokens} tokens instead of the model's own" in report
    plain = call(model, image)[0]
    assert not torch.equal(result, plain)
    assert torch.equal(call(model, image, positive=None)[0], plain)


@pytest.mark.parametrize(
    ("positive", "words"),
    [
        (conditioning() * 2, "several conditionings side by side"),
        (torch.zeros(1, 77, 12), "is no conditioning but Tensor"),
        ({"samples": 1}, "is no conditioning but dict"),
        (conditioning(width=768), r"Random reads \(1, n, 12\)"),
        ([[torch.full((1, 77, 12), torch.nan), {}]], "holds 924 values that are not numbers"),
    ],
)
def test_a_conditioning_that_is_none_is_said_in_comfyuis_words(model, positive, words):
    with pytest.raises(ValueError, match=words):
        upscale(model, picture(), positive=positive)


def test_help_pages_of_other_languages_are_made_of_the_node_texts():
    made = help_pages.pages()
    assert set(help_pages.HEADINGS) | {"en"} == set(LANGUAGES)
    assert set(made) == set((pack.ROOT / "web" / "docs").glob("*/*.md"))
    old = [file for file, text in made.items() if file.read_text("utf-8") != text]
    assert not old, "a text in locales/ has changed: run python tests/help_pages.py"


# ---- the host ----


def test_without_a_host_the_door_is_shut():
    assert not hasattr(pack.load(), "NODE_CLASS_MAPPINGS")


@pytest.mark.parametrize("folder", ["main", "ComfyUI-GenDR main (2)", "v0.1"])
def test_the_door_opens_only_inside_comfyui(folder, tmp_path):
    """Loaded by path, with and without a `folder_paths` that can be found."""
    root = tmp_path / folder
    (root / "nodes").mkdir(parents=True)
    (root / "__init__.py").write_text((pack.ROOT / "__init__.py").read_text())
    (root / "nodes/__init__.py").write_text(
        "NODE_CLASS_MAPPINGS = {}\nNODE_DISPLAY_NAME_MAPPINGS = {}\n"
    )
    script = (
        "import importlib.util, sys\n"
        "path = sys.argv[1]; name = path.replace('.', '_x_')\n"
        "spec = importlib.util.spec_from_file_location(name, path + '/__init__.py')\n"
        "module = importlib.util.module_from_spec(spec); sys.modules[name] = module\n"
        "spec.loader.exec_module(module)\n"
        "assert hasattr(module, 'NODE_CLASS_MAPPINGS') == (sys.argv[2] == 'open')\n"
    )
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "folder_paths.py").touch()
    for place, state in ((tmp_path, "shut"), (inside, "open")):
        command = [sys.executable, "-c", script, str(root), state]
        subprocess.run(command, cwd=place, check=True, timeout=60)


@pytest.fixture
def queue(monkeypatch):
    """What the host runs at the moment: graphs in API format."""
    running = {}
    instance = SimpleNamespace(prompt_queue=SimpleNamespace(currently_running=running))
    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=instance))
    monkeypatch.setattr(host, "server", server, raising=False)
    return running


@pytest.mark.parametrize(
    ("wire", "expected"), [(["4", 2], True), ([4, 2], True), (["4", 0], False), (7, False)]
)
def test_a_map_is_taken_where_a_wire_says_so(queue, monkeypatch, wire, expected):
    monkeypatch.setattr(host, "HOSTED", True)
    queue[0] = (0, "id", {"4": {"inputs": {}}, "9": {"inputs": {"images": wire}}}, {}, [])
    assert host.taken("4", 2) is expected
    assert NODES["TiledGenDR"].IS_CHANGED(unique_id="4", image=None) is expected


def test_a_map_is_made_where_nobody_can_say(queue, monkeypatch):
    assert host.taken("4", 2)
    monkeypatch.setattr(host, "HOSTED", True)
    assert host.taken(None, 2)
    assert host.taken("4", 2)
    queue[0] = (0, "id", {"9": {"inputs": {}}}, {}, [])
    assert host.taken("4", 2)


def test_a_map_that_nobody_takes_is_not_made(model, monkeypatch):
    monkeypatch.setattr(host, "taken", lambda node, output: False)
    assert upscale_tiled(model, picture(), unique_id="4")[2] is None


class FakePatcher:
    def __init__(self, size, loaded, device="cuda", dynamic=False):
        self.load_device = torch.device(device)
        self.size, self.held, self.dynamic = size, loaded, dynamic

    def model_size(self):
        return self.size

    def loaded_size(self):
        return self.held

    def is_dynamic(self):
        return self.dynamic


@pytest.fixture
def management(monkeypatch):
    """A stand-in for comfy.model_management with one card."""
    fake = SimpleNamespace(
        get_free_memory=lambda device: 1000,
        extra_reserved_memory=lambda: 100,
        loaded_models=list,
        OOM_EXCEPTION=torch.cuda.OutOfMemoryError,
        emptied=0,
    )

    def empty():
        fake.emptied += 1

    class ProgressBar:
        """The node's bar: what it was told."""

        def __init__(self, total):
            self.total = total
            fake.bars.append(self)
            self.told = []

        def update_absolute(self, value, total, preview):
            self.told.append((value, total, preview))

    fake.bars = []
    fake.soft_empty_cache = empty
    comfy = SimpleNamespace(utils=SimpleNamespace(ProgressBar=ProgressBar))
    monkeypatch.setattr(host, "comfy", comfy, raising=False)
    monkeypatch.setattr(host, "management", fake, raising=False)
    monkeypatch.setattr(host, "HOSTED", True)
    return fake


def test_the_bar_of_the_node_moves_only_forward_and_shows_a_preview(management, model, monkeypatch):
    monkeypatch.setattr(host, "PREVIEW_SECONDS", 0)
    result = model.gendr.restore(
        picture(32, 32).movedim(-1, 1), 4, tile=64, progress=host.Progress()
    )
    (bar,) = management.bars
    values = [value for value, _, _ in bar.told]
    assert values == sorted(values)
    assert values[-1] == bar.total == host.BAR
    kind, drawn, limit = bar.told[-1][2]
    assert (kind, limit) == ("JPEG", host.PREVIEW_PIXELS)
    shown = np.asarray(drawn).astype(int)
    assert np.abs(shown - (result[0] * 255).round().movedim(0, -1).numpy()).max() <= 1


def test_memory_to_plan_with(management):
    ours = FakePatcher(size=300, loaded=0)
    model = host.Model(None, ours)
    others = [FakePatcher(500, 400), FakePatcher(500, 400, device="cpu"), None, ours]
    management.loaded_models = lambda: others
    # Before: the other model on the card will make room, and ours will take some.
    assert host.free_bytes(model, loaded=False) == 1000 - 100 + 400 - 300
    assert host.free_bytes(model, loaded=True) == 1000 - 100
    others[0].dynamic = True
    assert host.free_bytes(model, loaded=True) == 1000 - 100 + 400
    # In main memory nothing is gained by moving models.
    ours.load_device = torch.device("cpu")
    assert host.free_bytes(model, loaded=False) == 1000


def test_out_of_memory_in_old_and_new_versions(management):
    assert host.is_oom(torch.cuda.OutOfMemoryError())
    assert management.emptied == 1
    assert not host.is_oom(ValueError())
    management.is_oom = lambda error: "CUDA error 2" in str(error)
    assert host.is_oom(RuntimeError("CUDA error 2"))
    assert management.emptied == 2


@pytest.mark.parametrize(
    ("usual", "cast", "expected"),
    [
        (torch.bfloat16, None, "bf16"),
        (torch.float16, None, "fp16"),
        (torch.float32, None, "fp32"),
        (torch.float64, None, "fp32"),
        (torch.float8_e4m3fn, torch.float16, "fp16"),
    ],
)
def test_dtype_follows_the_host(management, usual, cast, expected):
    management.unet_dtype = lambda device, supported_dtypes: usual
    management.unet_manual_cast = lambda dtype, device, supported_dtypes: cast
    assert host._usual_dtype(torch.device("cuda")) == expected


@pytest.mark.parametrize("flag", [None, "force_fp32", "fp32_unet"])
def test_on_a_cpu_the_library_s_probe_decides(management, monkeypatch, flag):
    flags = {"force_fp32": False, "fp32_unet": False} | ({flag: True} if flag else {})
    monkeypatch.setattr(host, "args", SimpleNamespace(**flags), raising=False)
    management.unet_dtype = lambda device, supported_dtypes: torch.float32
    assert host._usual_dtype(torch.device("cpu")) == ("fp32" if flag else "auto")


@pytest.mark.parametrize("base", [Exception, BaseException])
def test_the_host_s_own_interruption_passes_through(management, model, base):
    """It is an Exception in older versions of ComfyUI and a BaseException in newer ones."""

    class InterruptProcessingException(base):
        pass

    def throw():
        raise InterruptProcessingException

    management.throw_exception_if_processing_interrupted = throw
    with pytest.raises(InterruptProcessingException):
        upscale(model, picture())


def test_errors_arrive_under_names_that_need_no_path(tmp_path, monkeypatch):
    file = tmp_path / "cut.safetensors"
    file.write_bytes(b"12345678")
    monkeypatch.setattr(host, "model_path", lambda name: str(file))
    with pytest.raises(ValueError, match=r"^cut\.safetensors") as caught:
        NODES["LoadGenDR"]().load("cut.safetensors", "fp32")
    assert caught.type is ValueError


def test_a_stamp_changes_with_the_file_and_hides_its_path(tmp_path, monkeypatch):
    file = tmp_path / "private folder" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"1")
    monkeypatch.setattr(host, "model_path", lambda name: str(file))
    first = host.file_stamp("model")
    assert first == host.file_stamp("model")
    assert "private" not in first
    file.write_bytes(b"22")
    assert host.file_stamp("model") != first


def test_a_model_shows_what_it_is(model):
    for fact in (model.gendr.name, model.gendr.licence):
        assert fact in repr(model)
    assert hasattr(model, "patcher")


def test_the_embedded_model_comes_first():
    assert host.model_names()[0] == "GenDR-Tiny"
    with pytest.raises(FileNotFoundError, match="GenDR-Tiny, which comes with the pack"):
        host.model_path("gone.safetensors")

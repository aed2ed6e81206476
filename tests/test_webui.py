"""The extension of Forge and AUTOMATIC1111's WebUI, loaded by path as they do it.

With WEBUI_PATH, a checkout of Forge, its own upscaler, model loader, script loader and Extras scripts are
used, and only what surrounds them is put in their place (options, state, Gradio); without it, small
stand-ins with the same interface.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import gendr

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "gendr_upscaler.py"
WEBUI = os.environ.get("WEBUI_PATH")


class Component:
    """A Gradio component: what was said about it, and a context."""

    def __init__(self, *values, **facts):
        self.value = facts.get("value", values[0] if values else None)
        self.facts = facts

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *values, **facts: None


class Upscaler:
    """The stand-in for WebUI's own: asks until the picture is large enough, then resizes."""

    def __init__(self, create_dirs=False):
        self.scale = 1
        self.model_path = os.path.join(sys.modules["modules.shared"].models_path, self.name)
        if create_dirs:
            os.makedirs(self.model_path, exist_ok=True)

    def find_models(self, ext_filter=None):
        files = [os.path.join(self.model_path, name) for name in os.listdir(self.model_path)]
        return [file for file in files if os.path.splitext(file)[1] in ext_filter]

    def upscale(self, image, scale, selected_model=None):
        self.scale = scale
        size = tuple(int(side * scale // 8) * 8 for side in image.size)
        for n in range(3):
            large = all(side >= want for side, want in zip(image.size, size, strict=True))
            if large and (n > 0 or scale != 1):
                break
            before = image.size
            image = self.do_upscale(image, selected_model)
            if image.size == before:
                break
        return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


class UpscalerData:
    """The stand-in for an entry of WebUI's list."""

    def __init__(self, name, path, upscaler=None, scale=4):
        self.name, self.data_path, self.scaler, self.scale = name, path, upscaler, scale


def module(name, **content):
    made = ModuleType(name)
    made.__dict__.update(content)
    return made


def stand_ins(models):
    """What the script imports of WebUI, by name."""
    state = SimpleNamespace(interrupted=False, skipped=False, sampling_step=0, sampling_steps=0)
    options = SimpleNamespace(
        ESRGAN_tile=192,
        ESRGAN_tile_overlap=8,
        upscaling_max_images_in_cache=5,
        postprocessing_operation_order=[],
        postprocessing_disable_in_extras=[],
    )

    def walk(path, allowed_extensions=None):
        for file in sorted(Path(path).rglob("*")):
            if file.suffix in allowed_extensions:
                yield str(file)

    shared = module(
        "modules.shared",
        state=state,
        opts=options,
        cmd_opts=SimpleNamespace(no_half=False),
        device=torch.device("cpu"),
        models_path=str(models),
        script_path=str(models),
        sd_upscalers=[],
        walk_files=walk,
        progress_print_out=sys.stdout,
    )
    devices = module(
        "modules.devices",
        device=torch.device("cpu"),
        without_autocast=contextlib.nullcontext,
        torch_gc=lambda: None,
    )
    callbacks = []
    forge = []
    found = {
        "modules": module("modules", __path__=[], shared=shared, devices=devices),
        "modules.shared": shared,
        "modules.devices": devices,
        "modules.errors": module("modules.errors", report=print, display=print),
        "modules.util": module("modules.util", load_file_from_url=None),
        "modules.ui": module("modules.ui", switch_values_symbol=""),
        "modules.script_callbacks": module(
            "modules.script_callbacks", on_before_ui=callbacks.append, callbacks=callbacks
        ),
        "modules.ui_components": module(
            "modules.ui_components",
            InputAccordion=Component,
            FormRow=Component,
            ToolButton=Component,
        ),
        "modules_forge": module("modules_forge", __path__=[], freed=forge),
        "modules_forge.utils": module(
            "modules_forge.utils", prepare_free_memory=lambda: forge.append(1)
        ),
        "gradio": type("Gradio", (ModuleType,), {"__getattr__": lambda self, name: Component})(
            "gradio"
        ),
    }
    if WEBUI:
        found["modules"].__path__ = [str(Path(WEBUI) / "modules")]
        return found
    post = type("ScriptPostprocessing", (), {})
    found["modules.upscaler"] = module(
        "modules.upscaler", Upscaler=Upscaler, UpscalerData=UpscalerData
    )
    found["modules.scripts_postprocessing"] = module(
        "modules.scripts_postprocessing", ScriptPostprocessing=post
    )
    return found


@pytest.fixture
def webui(tmp_path, monkeypatch, tiny_checkpoint):
    """The script, loaded; its modules by name; one model in models/GenDR."""
    (tmp_path / "GenDR").mkdir()
    shutil.copy(tiny_checkpoint, tmp_path / "GenDR" / "mine.safetensors")
    (tmp_path / "GenDR" / "readme.txt").write_text("not a model")
    (tmp_path / "modules").mkdir()
    for name in [
        name for name in sys.modules if name.split(".")[0] in ("modules", "modules_forge")
    ]:
        monkeypatch.delitem(sys.modules, name)
    for name, made in stand_ins(tmp_path).items():
        monkeypatch.setitem(sys.modules, name, made)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, made)
    for name in (*(["modelloader"] if WEBUI else []), "upscaler", "scripts_postprocessing"):
        made = importlib.import_module(f"modules.{name}")
        monkeypatch.setitem(sys.modules, f"modules.{name}", made)
        setattr(sys.modules["modules"], name, made)
    # As Forge does it: the folder of the extension goes first on the path and stays there.
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    spec = importlib.util.spec_from_file_location(SCRIPT.name, SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    upscaler = script.UpscalerGenDR(None)
    sys.modules["modules.shared"].sd_upscalers = upscaler.scalers
    yield SimpleNamespace(
        script=script, upscaler=upscaler, state=sys.modules["modules.shared"].state
    )
    for name in [
        name for name in sys.modules if name.split(".")[0] in ("modules", "modules_forge")
    ]:
        sys.modules.pop(name, None)


def picture(width=20, height=24, mode="RGB"):
    """Colours that change, transparency where the mode has it."""
    generator = np.random.default_rng(0)
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    array = generator.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(array[..., 0] if channels == 1 else array)


def data_of(webui, name):
    return next(data for data in webui.upscaler.scalers if data.name == name)


def test_every_model_is_an_upscaler(webui):
    assert [data.name for data in webui.upscaler.scalers] == ["GenDR-Tiny", "GenDR mine"]
    assert all(os.path.isfile(data.data_path) for data in webui.upscaler.scalers)


@pytest.mark.parametrize("scale", [1, 1.5, 2, 4])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_sizes_are_those_that_webui_wants(webui, scale, mode):
    image = picture(40, 24, mode)
    data = data_of(webui, "GenDR mine")
    result = data.scaler.upscale(image, scale, data.data_path)
    assert result.size == (int(40 * scale // 8 * 8), int(24 * scale // 8 * 8))
    assert result.mode == mode


def test_a_size_beyond_one_step_takes_two(webui, monkeypatch):
    asked = []
    real = webui.script.restore
    monkeypatch.setattr(
        webui.script, "restore", lambda *a, **o: asked.append(o["scale"]) or real(*a, **o)
    )
    data = data_of(webui, "GenDR mine")
    assert data.scaler.upscale(picture(8, 8), 12, data.data_path).size == (96, 96)
    assert asked == [8.0, 1.5]


def test_same_pixels_as_the_library(webui, tiny_checkpoint):
    image = picture(16, 24)
    data = data_of(webui, "GenDR mine")
    result = data.scaler.upscale(image, 2, data.data_path)
    pixels = torch.from_numpy(np.array(image)).movedim(-1, 0)[None] / 255
    model = gendr.load(tiny_checkpoint, device="cpu")
    expected = (model.restore(pixels, 2)[0].movedim(0, -1) * 255).round()
    assert np.abs(np.asarray(result) - expected.numpy()).max() <= 1


def test_the_embedded_model_needs_no_file(webui):
    assert webui.upscaler.upscale(picture(), 2, None).size == (40, 48)


@pytest.mark.parametrize("button", ["interrupted", "skipped"])
def test_interrupting_gives_the_picture_back(webui, button):
    setattr(webui.state, button, True)
    image = picture()
    data = data_of(webui, "GenDR mine")
    assert webui.script.restore(image, data.data_path, scale=2.0) is image
    setattr(webui.state, button, False)
    assert webui.script.restore(image, data.data_path, scale=2.0).size == (40, 48)


def test_the_bar_moves_and_goes_back(webui, monkeypatch):
    seen = []
    show = webui.script.show
    monkeypatch.setattr(
        webui.script, "show", lambda p: show(p) or seen.append(webui.state.sampling_step)
    )
    webui.script.restore(picture(), data_of(webui, "GenDR mine").data_path, scale=2.0)
    assert seen == sorted(seen)
    assert seen[-1] == webui.state.sampling_steps == webui.script.BAR
    assert webui.state.sampling_step == 0


def test_memory_is_asked_for_and_given_back(webui):
    webui.script.restore(picture(), data_of(webui, "GenDR mine").data_path, scale=2.0)
    assert sys.modules["modules_forge"].freed == [1]


def test_what_memory_cannot_hold_is_refused_before_it_is_a_tensor(webui, monkeypatch):
    monkeypatch.setattr(gendr.devices, "_free_host_bytes", lambda: 2**28)
    monkeypatch.setattr(webui.script, "to_tensor", None)
    with pytest.raises(gendr.NotEnoughMemory, match="GiB are free: even scale 1 does not fit"):
        webui.script.restore(Image.new("1", (4000, 3000)), str(gendr.EMBEDDED), scale=1.0)


def test_a_replaced_file_is_loaded_again(webui, plain_checkpoint):
    path = data_of(webui, "GenDR mine").data_path
    before = webui.script.restore(picture(), path, scale=2.0)
    shutil.copy(plain_checkpoint, path)
    assert webui.script.restore(picture(), path, scale=2.0).tobytes() != before.tobytes()


def test_extras_has_what_an_upscaler_has_no_place_for(webui):
    script = webui.script.ScriptPostprocessingGenDR()
    controls = script.ui()
    assert controls["enabled"].value is False
    assert controls["model"].facts["choices"] == ["GenDR-Tiny", "GenDR mine"]
    for name in ("scale", "detail"):
        assert controls[name].value == getattr(gendr.Settings(), name)
        assert controls[name].facts["maximum"] == gendr.BOUNDS[name].maximum
    shown = SimpleNamespace(image=picture(), info={}, shared=SimpleNamespace())
    script.process(shown, enabled=False)
    assert shown.image.size == (20, 24)
    chosen = {"enabled": True, "model": "GenDR mine", "scale": 1.55, "detail": 0.5, "fidelity": 1.0}
    script.process_firstpass(shown, **chosen)
    script.process(shown, **chosen)
    assert shown.image.size == (31, 37) == (shown.shared.target_width, shown.shared.target_height)
    assert shown.info["GenDR"] == "GenDR mine, scale 1.55, detail 0.5, fidelity 1.0"


@pytest.mark.parametrize(("value", "meant"), [(-1.0, "auto"), (0.0, 0.0), (0.4, 0.4)])
def test_a_fidelity_below_zero_looks_at_each_picture(webui, monkeypatch, value, meant):
    asked = []
    monkeypatch.setattr(webui.script, "restore", lambda *_, **o: asked.append(o) or picture())
    script = webui.script.ScriptPostprocessingGenDR()
    controls = script.ui()
    assert controls["fidelity"].value == controls["fidelity"].facts["minimum"] == -1
    assert controls["preset"].value == "auto"
    shown = SimpleNamespace(image=picture(), info={})
    script.process(shown, enabled=True, scale=2.0, fidelity=value, preset="photo")
    assert asked == [{"scale": 2.0, "fidelity": meant, "preset": "photo"}]


def test_a_model_that_is_not_there_is_named(webui):
    script = webui.script.ScriptPostprocessingGenDR()
    shown = SimpleNamespace(image=picture(), info={})
    with pytest.raises(ValueError, match="no model 'gone'; there are GenDR-Tiny"):
        script.process(shown, enabled=True, model="gone")


def test_the_folder_does_not_stay_on_the_path(webui):
    def there():
        return [path for path in sys.path if os.path.abspath(path or ".") == str(ROOT)]

    assert not there()
    # Forge sets its list again after the script; before the page is built ours goes off it.
    sys.path.insert(0, str(ROOT))
    for callback in sys.modules["modules.script_callbacks"].callbacks:
        callback()
    assert not there()


def test_nothing_installs_anything():
    assert not [name for name in ("install.py", "requirements.txt") if (ROOT / name).exists()]


@pytest.mark.skipif(not WEBUI, reason="set WEBUI_PATH to a checkout of Forge for its own modules")
def test_forge_s_own_modules_run_it(webui, monkeypatch):
    """Its script loader, its list of upscalers, and its Extras scripts in their order."""
    loader = importlib.import_module("modules.script_loading")
    models = importlib.import_module("modules.modelloader")
    post = importlib.import_module("modules.scripts_postprocessing")
    again = loader.load_module(str(SCRIPT))
    models.load_upscalers()
    names = [data.name for data in sys.modules["modules.shared"].sd_upscalers]
    assert names.count("GenDR-Tiny") == 1
    assert {"None", "Lanczos", "Nearest", "GenDR mine"} <= set(names)
    upscale = loader.load_module(str(Path(WEBUI) / "scripts" / "postprocessing_upscale.py"))
    runner = post.ScriptPostprocessingRunner()
    runner.initialize_scripts(
        [
            SimpleNamespace(script_class=kind, path=str(SCRIPT))
            for kind in (upscale.ScriptPostprocessingUpscale, again.ScriptPostprocessingGenDR)
        ]
    )
    on = {
        "upscale_enabled": True,
        "upscale_mode": 0,
        "upscale_by": 2.0,
        "max_side_length": 0,
        "upscale_to_width": 512,
        "upscale_to_height": 512,
        "upscale_crop": False,
        "upscaler_1_name": "GenDR mine",
        "upscaler_2_name": "None",
        "upscaler_2_visibility": 0.0,
    }
    off = {**on, "upscale_enabled": False}
    ours = {"enabled": True, "model": "GenDR mine", "scale": 3.0, "detail": 1.0, "fidelity": 0.0}
    for wanted, size in (({"Upscale": on}, (40, 48)), ({"Upscale": off, "GenDR": ours}, (60, 72))):
        shown = post.PostprocessedImage(picture())
        runner.run(shown, runner.create_args_for_run(wanted))
        assert shown.image.size == size
        assert any("GenDR" in str(value) for value in (*shown.info, *shown.info.values()))

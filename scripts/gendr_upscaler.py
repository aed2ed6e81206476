"""GenDR in Forge and in AUTOMATIC1111's WebUI: an upscaler wherever one can be chosen, and Extras.

The folder is an extension as it is: put it into `extensions`. WebUI executes this file by its path.
Models are GenDR-Tiny, which comes with it, and every file in `models/GenDR`.
"""

import contextlib
import functools
import importlib
import os
import sys

import gradio as gr
import numpy as np
import torch
from modules import devices, script_callbacks, scripts_postprocessing, shared
from modules.ui_components import InputAccordion
from modules.upscaler import Upscaler, UpscalerData
from PIL import Image

try:
    from modules_forge.utils import prepare_free_memory
except ImportError:  # AUTOMATIC1111

    def prepare_free_memory():
        """Nothing to make room with here."""


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def forget_folder(*_):
    """Take this folder off sys.path: its `nodes`, `train`, `tests` and `run` are not for others."""
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or os.curdir) != ROOT]


# Whatever is first on the path, this folder's own package is the one that fits this file.
sys.path.insert(0, ROOT)
try:
    gendr = importlib.import_module("gendr")
    settings = importlib.import_module("gendr.settings")
finally:
    forget_folder()
# Forge puts the folder back when this file is done, and leaves it there.
script_callbacks.on_before_ui(forget_folder)

EMBEDDED = "GenDR-Tiny"
DEFAULT = settings.Settings()
# The slider's value for a fidelity that looks at each picture.
BY_PICTURE = -1.0
# The bar of WebUI counts sampling steps.
BAR = 1000


@functools.lru_cache(maxsize=1)
def loaded(path: str, stamp: tuple) -> "gendr.GenDR":
    """The model of this file, on the CPU; a replaced file has another stamp."""
    return gendr.load(path, device="cpu", runs_on=devices.device)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Any PIL picture -> 1 c h w in [0, 1]: grey, RGB, or RGBA where it has transparency."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode != "L":
        image = image.convert("RGB")
    array = np.array(image)
    array = array[..., None] if array.ndim == 2 else array
    return torch.from_numpy(array).movedim(-1, 0)[None].float() / 255


def to_image(picture: torch.Tensor) -> Image.Image:
    """1 c h w in [0, 1] -> PIL."""
    array = (picture[0].clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, -1).numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else np.ascontiguousarray(array))


def show(progress) -> None:
    """Move WebUI's bar."""
    shared.state.sampling_steps = BAR
    shared.state.sampling_step = round(BAR * progress.share)


def restore(image: Image.Image, path: str, **options) -> Image.Image:
    """The picture restored and enlarged; as it came where the person interrupted."""
    facts = os.stat(path)
    model = loaded(path, (facts.st_mtime_ns, facts.st_size))
    device = torch.device(devices.device)
    # Before anything of the picture's size is made or the model moves.
    asked = settings.Settings(**options)
    model.expect_memory(image.height, image.width, asked, device=device)
    prepare_free_memory()
    model.network.to(device)
    try:
        with devices.without_autocast(), contextlib.suppress(gendr.Cancelled):
            result = model.restore(
                to_tensor(image),
                device=device,
                progress=show,
                cancelled=lambda: shared.state.interrupted or shared.state.skipped,
                **options,
            )
            return to_image(result)
        return image
    finally:
        shared.state.sampling_step = 0
        # WebUI does not know that the model is there, and could not make room for its own.
        model.network.to("cpu")
        devices.torch_gc()


class UpscalerGenDR(Upscaler):
    """Every GenDR model as one of WebUI's upscalers."""

    def __init__(self, dirname=None):
        self.name = "GenDR"
        self.user_path = dirname
        super().__init__(create_dirs=True)
        self.target = None
        self.scalers = [UpscalerData(EMBEDDED, os.fspath(gendr.EMBEDDED), self, 4)]
        for path in sorted(self.find_models(ext_filter=list(gendr.EXTENSIONS))):
            name = os.path.splitext(os.path.basename(path))[0]
            self.scalers.append(UpscalerData(f"GenDR {name}", path, self, 4))

    def upscale(self, img, scale, selected_model=None):
        """As WebUI does it, which asks again until the picture has the size that it wants."""
        self.target = tuple(int(side * scale // 8 * 8) for side in img.size)
        try:
            return super().upscale(img, scale, selected_model)
        finally:
            self.target = None

    def do_upscale(self, img, selected_model):
        """At least the size that is wanted, in one step as far as one step goes."""
        wanted = self.scale
        if self.target is not None:
            wanted = max(want / side for want, side in zip(self.target, img.size))
        factor = min(max(wanted, 1.0), settings.MAX_FACTOR)
        return restore(img, selected_model or os.fspath(gendr.EMBEDDED), scale=factor)

    def load_model(self, path):
        """Loading is part of `restore`: WebUI never calls this itself."""
        return restore


class ScriptPostprocessingGenDR(scripts_postprocessing.ScriptPostprocessing):
    """GenDR in the Extras tab, with what an upscaler of WebUI has no place for."""

    name = "GenDR"
    order = 950

    def ui(self):
        """Off by default: Extras then is as it was."""
        with InputAccordion(False, label="GenDR", elem_id="extras_gendr") as enabled:
            model = gr.Dropdown(
                label="Model",
                choices=list(self.models()),
                value=EMBEDDED,
                elem_id="extras_gendr_model",
            )
            scale = self.slider("scale", "Resize")
            detail = self.slider("detail", "Detail: how much the model adds")
            fidelity = self.slider(
                "fidelity",
                "Fidelity: how strictly the result must be the input (-1 looks at each picture)",
                minimum=BY_PICTURE,
                value=BY_PICTURE,
            )
            preset = gr.Dropdown(
                label="Preset: the kind of picture, for what is left at its default",
                choices=list(settings.PRESETS),
                value=DEFAULT.preset,
                elem_id="extras_gendr_preset",
            )
        return {
            "enabled": enabled,
            "model": model,
            "scale": scale,
            "detail": detail,
            "fidelity": fidelity,
            "preset": preset,
        }

    @staticmethod
    def models():
        """Names to files."""
        scalers = [x for x in shared.sd_upscalers if isinstance(x.scaler, Upscaler)]
        found = {x.name: x.data_path for x in scalers if type(x.scaler).__name__ == "UpscalerGenDR"}
        return {EMBEDDED: os.fspath(gendr.EMBEDDED), **found}

    @staticmethod
    def slider(name, label, **other):
        """With the bounds and the default that the library has, but for `other`."""
        bound = settings.BOUNDS[name]
        facts = {"minimum": bound.minimum, "value": getattr(DEFAULT, name), **other}
        return gr.Slider(
            maximum=bound.maximum,
            step=bound.step,
            label=label,
            elem_id=f"extras_gendr_{name}",
            **facts,
        )

    def process_firstpass(self, pp, enabled=False, model=None, scale=None, **_):
        """Tell the other scripts what size the picture will have."""
        if enabled and scale:
            pp.shared.target_width = round(pp.image.width * scale)
            pp.shared.target_height = round(pp.image.height * scale)

    def process(
        self, pp, enabled=False, model=None, scale=None, detail=None, fidelity=None, preset=None
    ):
        """Restore and enlarge by exactly `scale`."""
        if not enabled:
            return
        if fidelity is not None and fidelity < 0:
            fidelity = settings.AUTO
        given = {"scale": scale, "detail": detail, "fidelity": fidelity, "preset": preset}
        options = {name: value for name, value in given.items() if value is not None}
        name = model or EMBEDDED
        models = self.models()
        if name not in models:
            raise ValueError(f"GenDR: there is no model {name!r}; there are {', '.join(models)}")
        pp.image = restore(pp.image, models[name], **options)
        pp.info["GenDR"] = ", ".join([name, *(f"{k} {v}" for k, v in options.items())])

"""The only file that knows ComfyUI: model folder, patcher, memory, dtype, progress, cancelling.

Without ComfyUI every function has a plain answer, so that the nodes can be called from a script.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..gendr import GenDR, devices, loading
from ..gendr.files import checkpoint
from ..gendr.settings import DTYPES

HOSTED = importlib.util.find_spec("folder_paths") is not None
if HOSTED:
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.ops
    import comfy.utils
    import folder_paths
    import server
    from comfy.cli_args import args

FOLDER = "gendr"
EMBEDDED = "GenDR-Tiny"
# A preview is drawn inside the node: often enough to watch, rarely enough to cost nothing.
PREVIEW_SECONDS = 0.5
PREVIEW_PIXELS = 256
# Steps of the node's bar: messages that would not move it are not worth sending.
BAR = 1000

_PACK = __package__.removesuffix("nodes")
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(eq=False)
class Model:
    """What flows along a GENDR_MODEL wire: a network and the host's hold on its memory.

    ComfyUI finds models among cached results by an attribute of the name `patcher`.
    """

    gendr: GenDR
    patcher: Any = None

    def __repr__(self) -> str:
        return repr(self.gendr)


def register_folder() -> None:
    """Make models/gendr, beside every folder that extra_model_paths.yaml names for it, known."""
    if not HOSTED:
        return
    folder = os.path.join(folder_paths.models_dir, FOLDER)
    folder_paths.add_model_folder_path(FOLDER, folder)
    # A folder type of our own starts without extensions, and would then list every file.
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    known = set(extensions) | set(checkpoint.EXTENSIONS)
    folder_paths.folder_names_and_paths[FOLDER] = (paths, known)
    # A read-only models folder is no reason to miss the embedded model.
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)


def model_names() -> list[str]:
    """The embedded model, then every file of the model folder."""
    return [EMBEDDED, *(folder_paths.get_filename_list(FOLDER) if HOSTED else [])]


def model_path(name: str) -> str:
    """Where the model of this name lies. Raises FileNotFoundError for one that has gone."""
    if name == EMBEDDED:
        return os.fspath(checkpoint.EMBEDDED)
    path = folder_paths.get_full_path(FOLDER, name) if HOSTED else None
    if path is None:
        folders = ", ".join(folder_paths.get_folder_paths(FOLDER)) if HOSTED else "models/gendr"
        raise FileNotFoundError(
            f"The model file {name!r} is not in {folders}: put it there and press R to refresh, "
            f"or choose {EMBEDDED}, which comes with the pack."
        )
    return path


def file_stamp(name: str) -> str:
    """Changes when a model file is replaced; weights of gigabytes are never read for it.

    A digest, because ComfyUI writes it into saved pictures, where a path has no business.
    """
    path = model_path(name)
    facts = os.stat(path)
    return hashlib.sha256(f"{path} {facts.st_mtime_ns} {facts.st_size}".encode()).hexdigest()


def load(path: str, dtype: str) -> Model:
    """Read a model file and hand its network to the host's memory management."""
    if not HOSTED:
        return Model(loading.load(path, device="cpu", dtype=dtype))
    device = management.get_torch_device()
    # Weights stay where ComfyUI keeps what is not in use; layers cast them to what they work on.
    gendr = loading.load(
        path,
        device="cpu",
        runs_on=device,
        dtype=dtype,
        usual=_usual_dtype(device),
        operations=comfy.ops.manual_cast,
    )
    # Looked up now, not at import: ComfyUI rebinds the name while it starts.
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    offload = management.unet_offload_device()
    return Model(gendr, patcher(gendr.network, load_device=device, offload_device=offload))


@functools.lru_cache(maxsize=1)
def embedded() -> Model:
    """GenDR-Tiny, for nodes without a loader. Kept: it is 15 MB, and the host pages it as any other."""
    return load(model_path(EMBEDDED), DTYPES[0])


def _usual_dtype(device: torch.device) -> str:
    """What ComfyUI would compute a diffusion model in: honours its flags and the card's age.

    On a CPU it always says fp32; there our own probe may know better, unless a flag says it too.
    """
    if device.type == "cpu" and not (args.force_fp32 or args.fp32_unet):
        return "auto"
    choices = list(_DTYPES)
    dtype = management.unet_dtype(device, supported_dtypes=choices)
    if dtype not in choices:  # an 8-bit storage flag; weights as small as ours stay in 16 bits
        dtype = management.unet_manual_cast(dtype, device, supported_dtypes=choices)
    return _DTYPES.get(dtype, "fp32")


def run_device(model: Model) -> torch.device:
    """Where tiles of this model are computed."""
    return model.patcher.load_device if model.patcher is not None else model.gendr.device


def free_bytes(model: Model, *, loaded: bool) -> int | None:
    """Bytes for activations; None = unknown. Before the model is loaded, what could be had."""
    if model.patcher is None:
        return None
    device, ours = model.patcher.load_device, model.patcher
    free = management.get_free_memory(device)
    if device.type in ("cpu", "mps"):
        return int(free)  # unloading moves weights within the same memory: nothing to gain
    free -= management.extra_reserved_memory()
    for other in management.loaded_models():
        if other is None or other is ours or other.load_device != device:
            continue
        # Others leave when our model is loaded, or, under dynamic VRAM, at any time.
        if not loaded or getattr(other, "is_dynamic", bool)():
            free += other.loaded_size()
    if not loaded:
        free -= max(0, ours.model_size() - ours.loaded_size())
    return max(0, int(free))


def bring_in(model: Model, activations: int) -> None:
    """Have the host put the model on the card, with this many bytes left for activations."""
    if model.patcher is not None:
        management.load_models_gpu([model.patcher], memory_required=activations)


def is_oom(error: BaseException) -> bool:
    """Whether the error is an exhausted memory; if so the host's caches are emptied too."""
    if not HOSTED:
        return devices.is_oom(error)
    known = getattr(management, "is_oom", lambda e: isinstance(e, management.OOM_EXCEPTION))
    if not known(error):
        return False
    management.soft_empty_cache()
    return True


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn the library's own error types into Python's.

    ComfyUI shows a type with its module before the message, and the module of a pack is the whole
    path of its folder: the cause would be out of sight.
    """
    try:
        yield
    except Exception as error:
        kinds = type(error).__mro__
        if not kinds[0].__module__.startswith(_PACK):
            raise
        plain = next(kind for kind in kinds if kind.__module__ == "builtins")
        raise plain(str(error)) from error


def cancelled() -> bool:
    """Raises the host's own exception where the person pressed Cancel."""
    if HOSTED:
        management.throw_exception_if_processing_interrupted()
    return False


def taken(node_id: str | None, output: int) -> bool:
    """Whether a node of the running graph takes this output; True where that can't be known."""
    if not HOSTED or node_id is None:
        return True
    for running in list(server.PromptServer.instance.prompt_queue.currently_running.values()):
        graph = running[2]
        if str(node_id) in graph:
            wires = (wire for node in graph.values() for wire in node["inputs"].values())
            return any(
                isinstance(wire, list) and [str(wire[0]), *wire[1:]] == [str(node_id), output]
                for wire in wires
                if wire
            )
    return True


class Progress:
    """The work on all pictures on the node's bar, with a small preview now and then."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.shown = 0
        self.drawn = time.monotonic()

    def __call__(self, progress: Any) -> None:
        """progress: a `gendr` Progress, after each tile and strip."""
        if not HOSTED:
            return
        if self.bar is None:
            self.bar = comfy.utils.ProgressBar(BAR)
        preview = None
        now = time.monotonic()
        if progress.preview is not None and now - self.drawn > PREVIEW_SECONDS:
            preview = ("JPEG", _to_pil(progress.preview()), PREVIEW_PIXELS)
            self.drawn = now
        done = round(BAR * progress.share)
        if preview is not None or done > self.shown:
            self.bar.update_absolute(done, BAR, preview)
            self.shown = done


def _to_pil(picture: Tensor) -> Image.Image:
    """c h w in [0, 1] -> PIL, grey or RGB."""
    picture = picture[:3] if picture.shape[0] >= 3 else picture[:1].expand(3, -1, -1)
    array = (picture.clamp(0, 1) * 255).round().to("cpu", torch.uint8).movedim(0, -1).numpy()
    return Image.fromarray(np.ascontiguousarray(array))


def output(image: Tensor) -> Tensor:
    """A result b h w c in [0, 1] -> where and in what type the host wants pictures."""
    if not HOSTED:
        return image
    dtype = getattr(management, "intermediate_dtype", lambda: torch.float32)()
    return image.to(management.intermediate_device(), dtype)

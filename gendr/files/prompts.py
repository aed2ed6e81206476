"""Prompts to embeddings, by the text encoder of a Stable Diffusion 2.1 or from a file made before.

transformers is needed to encode, and is imported here alone and only then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .reading import is_safetensors, read_pickle
from .shapes import CheckpointError

# SD2.1 was trained with prompts padded by token 0, "!", not by the end token as other models of its
# family. A tokenizer that pads otherwise, as some versions of transformers load it, changes every
# embedding without an error.
PAD = 0
LENGTH = 77
# The last two of CLIP's vocabulary.
START, END = -2, -1
# open_clip's activation, the exact one.
GELU = "gelu"
# Channels of a head in CLIP's text models.
HEAD = 64
OPEN_CLIP = "cond_stage_model.model."
MAKE = "python -m train.embeddings makes such a file"


def encode(base: Path, text: str) -> Tensor:
    """The embedding of a prompt, 1 77 d in float32, by the text encoder of a base.

    base: a folder with `text_encoder` and, unless the prompt is empty, `tokenizer`; or one file with
    the weights under LDM's names, for the empty prompt alone. CheckpointError where that is missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            "encoding a prompt needs transformers, which is not installed: pip install transformers, "
            f"or give --embeds FILE ({MAKE})"
        ) from error
    model = _from_folder(base, transformers) if base.is_dir() else _from_file(base, transformers)
    model = model.float().eval()
    size = model.config.vocab_size
    ids = [size + START, size + END]
    if text:
        ids = _tokenizer(base, transformers)(text, truncation=False)["input_ids"]
        if len(ids) > LENGTH:
            raise CheckpointError(
                f"the prompt has {len(ids)} tokens, {LENGTH} fit: shorten it by about "
                f"{1 - LENGTH / len(ids):.0%}"
            )
    padded = torch.tensor([ids + [PAD] * (LENGTH - len(ids))])
    with torch.no_grad():
        # No attention mask: SD2.1 attends to the padding.
        return model(padded).last_hidden_state.float()


def from_file(path: Path, text: str) -> Tensor:
    """The embedding of this prompt out of a file of embeddings, 1 n d.

    A file that says the texts of its embeddings must have this one; in one that doesn't, `null` is the
    empty prompt, and a single embedding is taken as it is.
    """
    if not path.exists():
        raise CheckpointError(f"there is no file of embeddings at {path}: check the name; {MAKE}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            texts = json.loads((file.metadata() or {}).get("texts", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no file of embeddings: {MAKE} ({error})") from error
    name = next((name for name in tensors if texts.get(name) == text), None)
    if name is None and not texts:
        name = "null" if not text and "null" in tensors else None
        if len(tensors) == 1:
            name = next(iter(tensors))
    if name is None:
        known = ", ".join(f"{name} {texts.get(name, '?')[:40]!r}" for name in tensors)
        raise CheckpointError(
            f"{path.name} holds no embedding of the prompt {text[:40]!r}, only {known}: {MAKE}"
        )
    embedding = tensors[name]
    if embedding.dim() != 3 or embedding.shape[0] != 1 or not bool(embedding.isfinite().all()):
        raise CheckpointError(
            f"{name} in {path.name} is no embedding of one prompt (1 n d): {MAKE}"
        )
    return embedding.float()


def _from_folder(folder: Path, transformers: Any) -> Any:
    try:
        inner = folder / "text_encoder"
        if not (inner / "config.json").exists():
            raise OSError("text_encoder/config.json is missing")
        whole = any((inner / name).exists() for name in ("model.safetensors", "pytorch_model.bin"))
        # One more bar, beside that of the command, would say nothing.
        transformers.utils.logging.disable_progress_bar()
        return transformers.CLIPTextModel.from_pretrained(
            folder,
            subfolder="text_encoder",
            local_files_only=True,
            variant=None if whole else "fp16",
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(_no_encoder(folder, error)) from error


def _tokenizer(base: Path, transformers: Any) -> Any:
    if not base.is_dir():
        raise CheckpointError(
            f"{base.name} holds no tokenizer, so only the empty prompt can be encoded: give a folder "
            f"as base, or --embeds FILE ({MAKE})"
        )
    try:
        if not (base / "tokenizer").is_dir():
            raise OSError("tokenizer/ is missing")
        return transformers.CLIPTokenizer.from_pretrained(
            base, subfolder="tokenizer", local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(_no_encoder(base, error)) from error


def _no_encoder(base: Path, error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"{base.name} has no text encoder that can be read ({first[:120]}): fetch its text_encoder "
        f"and tokenizer too, or give --embeds FILE ({MAKE})"
    )


# ---- LDM's file: the text model under open_clip's names ----


def _from_file(path: Path, transformers: Any) -> Any:
    tensors = _safetensors(path) if is_safetensors(path) else read_pickle(path)
    state = {k.removeprefix(OPEN_CLIP): v for k, v in tensors.items() if k.startswith(OPEN_CLIP)}
    try:
        width = state["positional_embedding"].shape[1]
        renamed = open_clip_text(state)
        layers = 1 + max(int(n.split(".")[2]) for n in renamed if n.startswith("encoder.layers."))
        config = transformers.CLIPTextConfig(
            vocab_size=state["token_embedding.weight"].shape[0],
            hidden_size=width,
            intermediate_size=renamed["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // HEAD),
            max_position_embeddings=LENGTH,
            hidden_act=GELU,
        )
        model = transformers.CLIPTextModel(config)
        # Some versions of transformers have one more level of names.
        outer = "text_model." if hasattr(model, "text_model") else ""
        missing, unexpected = model.load_state_dict(
            {outer + k: v for k, v in renamed.items()}, strict=False
        )
        wrong = [k for k in missing if "position_ids" not in k] + unexpected
        if wrong:
            raise KeyError(wrong[0])
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(_no_encoder(path, error)) from error
    return model


def open_clip_text(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's text model under transformers' names, without its last layer, as SD2 uses it."""
    table = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    block = "transformer.resblocks."
    last = max(int(name.split(".")[2]) for name in state if name.startswith(block))
    renamed = {
        "embeddings.token_embedding.weight": state["token_embedding.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
        "final_layer_norm.weight": state["ln_final.weight"],
        "final_layer_norm.bias": state["ln_final.bias"],
    }
    for name, tensor in state.items():
        if not name.startswith(block):
            continue
        number, inner = name.removeprefix(block).split(".", 1)
        if int(number) == last:
            continue
        layer = f"encoder.layers.{number}"
        if inner.startswith("attn.in_proj_"):
            what = inner.removeprefix("attn.in_proj_")
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{layer}.self_attn.{part}_proj.{what}"] = rows
        else:
            module, _, what = inner.rpartition(".")
            renamed[f"{layer}.{table[module]}.{what}"] = tensor
    return renamed


def _safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(OPEN_CLIP)]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}

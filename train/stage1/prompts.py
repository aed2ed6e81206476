"""What a base is told about a picture: its caption, quality terms, the damage, or nothing.

Three sources: captions through the base's own text encoder; a file of fixed embeddings
(train.embeddings); for a network from scratch, fixed random vectors, which mean nothing until it has
been trained with them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from train import embeddings
from train.data.stream import Purpose, sample_generator
from train.embeddings import NAMES, NEGATIVE, POSITIVE, TextEncoder

Role = Literal["positive", "negative", "null"]
# Quality terms behind a caption; all of them would leave it no room in 77 tokens.
TERMS = 4
# Share of refinement samples that see the fixed prompt as it is exported instead of a caption or of
# the damage in words: what inference uses must have been seen.
FIXED = 0.5
# What the degradations note, and how people call it.
DAMAGE = (
    (r"iso |^blur ", "blurred"),
    (r"sinc ", "ringing"),
    (r"^(gauss|poisson) ", "noise, grain"),
    (r"^jpeg ", "JPEG artifacts"),
    (r"^(webp|avif|mpeg|h26)", "compression artifacts"),
)


class Fixed(NamedTuple):
    """Embeddings 1 m d by name, float32 on the CPU; their texts; where they came from."""

    embeds: dict[str, Tensor]
    texts: dict[str, str]
    facts: dict[str, Any]


def random_prompts(tokens: int, width: int, seed: int) -> Fixed:
    """Three fixed random prompts, 1 m d of unit variance, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    embeds = {name: torch.randn(1, tokens, width, generator=generator) for name in NAMES}
    texts = {name: f"{name}: a fixed random vector, not made from words" for name in NAMES}
    return Fixed(embeds, texts, {"part": "prompts", "id": f"random, seed {seed}"})


def from_file(path: str) -> Fixed:
    """Of a file that train.embeddings made."""
    embeds, texts = embeddings.read(path)
    facts = {"part": "prompts", "id": Path(path).name}
    return Fixed({k: v.float() for k, v in embeds.items()}, texts, facts)


def from_encoder(encoder: TextEncoder) -> Fixed:
    """The project's prompts through a text encoder."""
    found = {
        name: embeddings.encode(encoder, text)
        for name, text in (("positive", POSITIVE), ("negative", NEGATIVE), ("null", ""))
    }
    source = Path(encoder.source)
    name = source.resolve().name if source.exists() else encoder.source
    facts = {"part": "text_encoder", "id": name, "revision": encoder.revision}
    return Fixed({k: v[0] for k, v in found.items()}, {k: v[1] for k, v in found.items()}, facts)


def damage_in_words(trace: Sequence[str]) -> str:
    """The steps that the degradations noted, as negative terms: "low resolution, blurred, ..."."""
    words = [word for pattern, word in DAMAGE if any(re.search(pattern, step) for step in trace)]
    return ", ".join(["low quality", "low resolution", *words])


def with_terms(caption: str, generator: torch.Generator) -> str:
    """A caption with some of the quality terms behind it, or those alone."""
    terms = list(dict.fromkeys(POSITIVE.split(", ")))
    chosen = torch.randperm(len(terms), generator=generator)[:TERMS].tolist()
    return ", ".join([*([caption] if caption else []), *(terms[n] for n in sorted(chosen))])


class Prompts:
    """Conditions of a batch: b m d on the training device.

    encoder: where captions are used. Everything drawn depends on the seed and the sample's key.
    """

    def __init__(
        self,
        fixed: Fixed,
        *,
        encoder: TextEncoder | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ):
        """dtype: of the text encoder while training."""
        self.fixed, self.encoder, self.seed = fixed, encoder, seed
        self.device = torch.device(device)
        self.embeds = {k: v.to(self.device) for k, v in fixed.embeds.items()}
        if encoder is not None:
            encoder.model.to(self.device, dtype)

    def plain(self, captions: Sequence[str], drop: Tensor, keys: Sequence[int]) -> Tensor:
        """Captions, or the positive prompt without an encoder; the empty one where `drop` (b 1 1).

        A picture without a caption has some of the quality terms: the empty prompt, which guidance
        goes away from, must not come to mean "a good picture that nobody has described".
        """
        if self.encoder is None:
            found = self.embeds["positive"].expand(len(captions), -1, -1)
        else:
            found = self.encode([
                caption or with_terms("", sample_generator(self.seed, key, Purpose.WORDS))
                for caption, key in zip(captions, keys, strict=True)
            ])  # fmt: skip
        return torch.where(drop.to(self.device), self.embeds["null"], found)

    def refined(
        self,
        captions: Sequence[str],
        damage: Sequence[str],
        roles: Sequence[Role],
        keys: Sequence[int],
    ) -> Tensor:
        """By role: caption and quality terms, words for the damage, or nothing."""
        found = torch.cat([self.embeds[role] for role in roles])
        if self.encoder is None:
            return found
        rows, texts = [], []
        for n, (role, key) in enumerate(zip(roles, keys, strict=True)):
            g = sample_generator(self.seed, key, Purpose.WORDS)
            if role == "null" or float(torch.rand(1, generator=g)) < FIXED:
                continue
            text = damage[n] if role == "negative" else with_terms(captions[n], g)
            # A damaged picture whose damage has no words, as ready pairs have none.
            if text:
                rows.append(n)
                texts.append(text)
        if rows:
            found[rows] = self.encode(texts)
        return found

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Texts through the encoder, too long ones cut: b m d in float32."""
        return embeddings.encode_all(self.encoder, texts)

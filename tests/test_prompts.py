"""What a base is told about pictures, through a tiny random text encoder."""

from __future__ import annotations

import pytest
import torch
from test_embeddings import LENGTH, WIDTH, save_encoder

from train import embeddings
from train.data.pictures import Degradation, Pictures
from train.data.stream import Purpose, sample_generator
from train.embeddings import NEGATIVE, POSITIVE
from train.stage1 import prompts
from train.stage1.prompts import Prompts, damage_in_words, from_encoder, random_prompts, with_terms


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return embeddings.load_encoder(str(save_encoder(tmp_path_factory.mktemp("encoder"))))


@pytest.fixture(scope="module")
def fixed(encoder):
    return from_encoder(encoder)


def test_captions_go_through_the_encoder(encoder, fixed, capsys):
    said = Prompts(fixed, encoder=encoder)
    captions = ["a red house", "two dogs", "x " * 200]
    drop = torch.tensor([False, True, False])[:, None, None]
    found = said.plain(captions, drop, [0, 1, 2])
    assert found.shape == (3, LENGTH, WIDTH)
    assert torch.allclose(found[0], embeddings.encode(encoder, "a red house")[0][0], atol=1e-6)
    assert torch.equal(found[1], fixed.embeds["null"][0])
    capsys.readouterr()
    said.plain(captions, drop, [0, 1, 2])
    assert not capsys.readouterr().err, "a long caption is cut without a word about each"


def test_a_picture_without_a_caption_is_told_quality_terms(encoder, fixed, monkeypatch):
    said, real = [], embeddings.encode_all
    monkeypatch.setattr(
        embeddings, "encode_all", lambda e, texts: said.extend(texts) or real(e, texts)
    )
    keep = torch.zeros(3, 1, 1, dtype=torch.bool)
    found = Prompts(fixed, encoder=encoder).plain(["a red house", "", ""], keep, [0, 1, 2])
    assert said[0] == "a red house"
    assert all(text.count(", ") >= prompts.TERMS - 1 for text in said[1:])
    assert said[1] != said[2]
    assert not torch.allclose(found[1], fixed.embeds["null"][0])
    # By the sample alone, whatever its batch.
    said.clear()
    Prompts(fixed, encoder=encoder).plain([""], keep[:1], [2])
    assert len(said) == 1


def test_without_an_encoder_the_positive_prompt_stands_for_all(fixed):
    found = Prompts(fixed).plain(["a", "b"], torch.tensor([False, True])[:, None, None], [0, 1])
    assert torch.equal(found[0], fixed.embeds["positive"][0])
    assert torch.equal(found[1], fixed.embeds["null"][0])
    roles = ["negative", "positive", "null"]
    found = Prompts(fixed).refined(["a"] * 3, ["", "", ""], roles, [1, 2, 3])
    assert torch.equal(found, torch.cat([fixed.embeds[r] for r in roles]))


def test_refinement_says_terms_or_the_exported_prompt(encoder, fixed):
    """Half of the captions come with terms, half give way to the fixed prompt; null is always null."""
    said, texts = Prompts(fixed, encoder=encoder, seed=3), []
    plain = said.encode
    said.encode = lambda words: texts.extend(words) or plain(words)
    count = 300
    roles = ["positive", "negative", "null"] * (count // 3)
    keys = list(range(count))
    found = said.refined(["a dog"] * count, ["low quality, blurred"] * count, roles, keys)
    fixed_rows = {
        name: int((found[n::3] == fixed.embeds[name]).flatten(1).all(1).sum())
        for n, name in enumerate(("positive", "negative", "null"))
    }
    assert fixed_rows["null"] == 100
    assert 30 < fixed_rows["positive"] < 70
    assert 30 < fixed_rows["negative"] < 70
    captions = [t for t in texts if t.startswith("a dog, ")]
    assert len(captions) == 100 - fixed_rows["positive"]
    assert texts.count("low quality, blurred") == 100 - fixed_rows["negative"]
    assert len(captions) + texts.count("low quality, blurred") == len(texts)
    terms = captions[0].removeprefix("a dog, ").split(", ")
    assert len(terms) == prompts.TERMS
    assert set(terms) <= set(POSITIVE.split(", "))
    # By the key alone, whatever else is in the batch.
    some = said.refined(["a dog"] * 3, ["low quality, blurred"] * 3, roles[30:33], keys[30:33])
    assert torch.allclose(some, found[30:33], atol=1e-6)
    assert with_terms("", sample_generator(0, 0, Purpose.WORDS)).count(", ") >= prompts.TERMS - 1


def test_damage_is_named_by_what_was_done():
    trace = ["realesrgan", "aniso 9 1.20/0.80", "resize 0.50 area", "gauss 12.0", "jpeg 40"]
    assert damage_in_words(trace) == (
        "low quality, low resolution, blurred, noise, grain, JPEG artifacts"
    )
    assert damage_in_words(["apisr", "poisson 1.00 grey", "webp 30", "final sinc 2.10"]) == (
        "low quality, low resolution, ringing, noise, grain, compression artifacts"
    )
    assert damage_in_words(["clean"]) == "low quality, low resolution"
    for trace in (["jpeg 3"], ["gauss 1"], ["blur 2"], ["h264 30"]):
        assert damage_in_words(trace) != damage_in_words([])
    assert NEGATIVE.startswith("low quality, low resolution, blurred")


def test_a_share_of_the_pictures_is_damaged_and_says_how(tmp_path):
    from PIL import Image

    for n in range(4):
        Image.effect_noise((72, 72), 80).convert("RGB").save(tmp_path / f"{n}.png")
    some = Pictures(tmp_path, crop=32, degradation=Degradation("mild", share=0.5), seed=1)
    every = Pictures(tmp_path, crop=32, degradation=Degradation("mild"), seed=1)
    damaged = 0
    for epoch in range(30):
        for index in range(4):
            item, whole = some[epoch, index], every[epoch, index]
            assert torch.equal(item["hr"], whole["hr"])
            assert whole["damage"].startswith("mild; ")
            if item["damage"]:
                damaged += 1
                assert torch.equal(item["lr"], whole["lr"])
            else:
                assert not item["lr"].any()
    assert 40 < damaged < 80


def test_random_prompts_are_the_same_for_a_seed():
    one, two, other = (random_prompts(4, 64, seed) for seed in (1, 1, 2))
    assert one.embeds["positive"].shape == (1, 4, 64)
    assert all(torch.equal(one.embeds[k], two.embeds[k]) for k in one.embeds)
    assert not torch.equal(one.embeds["null"], other.embeds["null"])
    assert not torch.equal(one.embeds["null"], one.embeds["negative"])
    assert "not made from words" in one.texts["negative"]


def test_a_file_of_embeddings_is_read(encoder, fixed, tmp_path):
    path = tmp_path / "embeddings.safetensors"
    embeddings.write(path, fixed.embeds, fixed.texts, source="somewhere", revision="1")
    read = prompts.from_file(str(path))
    assert all(torch.equal(read.embeds[k], v) for k, v in fixed.embeds.items())
    assert read.facts == {"part": "prompts", "id": "embeddings.safetensors"}
    with pytest.raises(embeddings.EmbeddingsError, match="does not exist"):
        prompts.from_file(str(tmp_path / "none.safetensors"))

"""Prompts to tensors, with a tiny random text encoder instead of SD2.1's."""

import hashlib
import json
import re
import string

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from train import embeddings
from train.embeddings import EmbeddingsError

LENGTH, WIDTH = 77, 8
TEXTS = ("--positive", "clean photo", "--negative", "blurred")


def save_encoder(folder, *, pad="!", width=WIDTH, length=LENGTH):
    """A folder in diffusers' layout: one token for each letter, a text model of one layer."""
    characters = ["!", *string.ascii_lowercase, *string.digits, ",", "-"]
    words = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: n for n, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad, model_max_length=length)
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(9)
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=len(vocab) - 2,
        eos_token_id=len(vocab) - 1,
        pad_token_id=vocab["<|endoftext|>"],
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def wrong_pad(tmp_path_factory):
    """The same whose tokenizer pads with the end token, as others of its family do."""
    return save_encoder(tmp_path_factory.mktemp("encoder"), pad="<|endoftext|>")


@pytest.fixture(scope="module")
def encoder(folder):
    return embeddings.load_encoder(str(folder))


def test_a_file_holds_three_prompts_texts_and_hashes(folder, tmp_path, capsys):
    out = tmp_path / "new" / "embeddings.safetensors"
    assert embeddings.main(["--model", str(folder), "--out", str(out), "--check", *TEXTS]) == 0
    embeds, texts = embeddings.read(out)
    assert {k: tuple(v.shape) for k, v in embeds.items()} == dict.fromkeys(
        embeddings.NAMES, (1, LENGTH, WIDTH)
    )
    assert texts == {"positive": "clean photo", "negative": "blurred", "null": ""}
    with safe_open(out, "pt") as file:
        facts = file.metadata()
    raw = hashlib.sha256(embeds["positive"].numpy().tobytes()).hexdigest()
    assert json.loads(facts["sha256"])["positive"] == raw
    assert facts["encoder"] == str(folder)
    assert (facts["revision"], facts["pad"]) == ("local", "0")
    said = capsys.readouterr()
    assert raw[:16] in said.out
    assert "diffusers     the same" in said.out
    assert not list(out.parent.glob("*.part"))


def test_embeddings_are_those_of_diffusers(encoder):
    texts = {"positive": "clean photo, 8k", "negative": "noise", "null": ""}
    embeds = {k: embeddings.encode(encoder, v)[0] for k, v in texts.items()}
    assert embeddings.check(encoder, texts, embeds) < 1e-6
    assert (embeds["positive"] - embeds["null"]).abs().max() > 1e-3
    with pytest.raises(EmbeddingsError, match="differs from diffusers"):
        embeddings.check(encoder, texts, {**embeds, "negative": embeds["positive"]})


def test_padding_is_zero_and_not_the_end_token(encoder, folder):
    ids, _ = embeddings.tokenize(encoder, "ab")
    vocab = encoder.tokenizer.get_vocab()
    start, end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    assert ids[0, :5].tolist() == [start, vocab["a"], vocab["b</w>"], end, 0]
    assert (ids[0, 4:] == 0).all()
    assert vocab["!"] == embeddings.PAD == 0
    assert ids.shape == (1, LENGTH)


def test_another_pad_token_is_put_right_and_said(wrong_pad, encoder, capsys):
    other = embeddings.load_encoder(str(wrong_pad))
    assert "the tokenizer pads with" in capsys.readouterr().err
    found, expected = (embeddings.encode(e, "ab")[0] for e in (other, encoder))
    assert torch.equal(found, expected)
    assert embeddings.check(other, {"positive": "ab"}, {"positive": found}) < 1e-6


def test_the_wrong_pad_would_change_the_embedding(encoder):
    """Guards the test above: the trap is real with this encoder too."""
    ids, _ = embeddings.tokenize(encoder, "ab")
    ends = torch.where(ids == 0, encoder.tokenizer.eos_token_id, ids)
    found, expected = (encoder.model(x).last_hidden_state for x in (ends, ids))
    assert (found - expected)[0, 4:].abs().max() > 1e-2


def test_a_text_that_is_too_long_is_cut_and_said(encoder, capsys):
    text = "ab " * 100
    embeds, kept = embeddings.encode(encoder, text)
    assert embeds.shape == (1, LENGTH, WIDTH)
    # 75 letters between start and end.
    assert kept == "ab " * 37 + "a"
    assert "202 tokens are more than 77" in capsys.readouterr().err
    # diffusers cuts at the same place.
    assert embeddings.check(encoder, {"positive": text}, {"positive": embeds}) < 1e-6


def test_half_precision_files(folder, tmp_path):
    out = tmp_path / "half.safetensors"
    arguments = ["--model", str(folder), "--out", str(out), "--dtype", "fp16", *TEXTS]
    assert embeddings.main(arguments) == 0
    embeds, _ = embeddings.read(out)
    assert embeds["null"].dtype == torch.float16


def test_without_network_or_weights_there_is_a_sentence(tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    missing = ["--model", "nobody/nothing", "--offline", "--out", str(out)]
    assert embeddings.main(missing) == 1
    said = capsys.readouterr().err
    assert said.startswith("train.embeddings: no text encoder in nobody/nothing: without a network")
    assert "give its folder as --model" in said
    assert "Traceback" not in said
    assert not out.exists()
    (tmp_path / "empty").mkdir()
    assert embeddings.main(["--model", str(tmp_path / "empty"), "--out", str(out)]) == 1


def test_an_existing_file_is_kept(folder, tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    out.write_bytes(b"mine")
    arguments = ["--model", str(folder), "--out", str(out), *TEXTS]
    assert embeddings.main(arguments) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"
    assert embeddings.main([*arguments, "--overwrite"]) == 0
    assert embeddings.read(out)[1]["positive"] == "clean photo"


def test_files_that_are_no_embeddings_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(EmbeddingsError, match=r"does not exist: make it with"):
        embeddings.read(path)
    path.write_bytes(b"something")
    with pytest.raises(EmbeddingsError, match=r"no safetensors file"):
        embeddings.read(path)
    save_file({"positive": torch.zeros(1)}, path)
    with pytest.raises(EmbeddingsError, match=r"holds no embeddings"):
        embeddings.read(path)
    embeds = {n: torch.ones(1, 3, 4) for n in embeddings.NAMES}
    texts = dict.fromkeys(embeddings.NAMES, "")
    embeddings.write(path, embeds, texts, source="x", revision="y")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(EmbeddingsError, match=r"is damaged: .* another SHA-256"):
        embeddings.read(path)


def test_dry_run_says_the_texts_and_loads_nothing(tmp_path, capsys):
    arguments = ["--model", "nobody/nothing", "--out", str(tmp_path / "x"), "--dry-run"]
    assert embeddings.main(arguments) == 0
    said = capsys.readouterr().out
    assert "perfect without deformations, photo taken in the style of Canon EOS" in said
    assert "JPEG artifacts" in said
    assert not (tmp_path / "x").exists()


def test_the_shipped_texts_fit_in_one_prompt():
    for text in (embeddings.POSITIVE, embeddings.NEGATIVE):
        # What CLIP's tokenizer starts from; rare words become two tokens, and 75 fit.
        assert len(re.findall(r"[^\W\d_]+|\d|[^\w\s]+", text)) <= 70
    assert embeddings.POSITIVE.startswith("realism photo, best quality, realistic detailed, clean")

"""Stage 1 as a script. Numbers in the names are those of the method's list of tests."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stage1 import DINO, UNET, log, save_latent, save_pairs, states, words
from test_embeddings import save_encoder
from test_pretrained import tiny_unet, tiny_vae
from transformers import Dinov2Model

import gendr
from gendr import schedule
from gendr.files import checkpoint
from gendr.networks.unet import UNet
from train import cida, recipe, repa
from train.features import Projector
from train.processes import Processes
from train.run import Run, TrainingError
from train.stage1.networks import vae_source
from train.stage1.pretrained import VAE16
from train.stage1.prompts import Prompts, random_prompts
from train.stage1.step import Objective

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def short_previews(monkeypatch):
    monkeypatch.setattr("train.stage1.previews.STEPS", 2)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return save_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    return save_latent(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(3)
    Dinov2Model(DINO).save_pretrained(folder)
    return folder


def run(latent, data, out, **more):
    assert repa.main(words(latent, data, out, **more)) == 0
    return out


def test_a_run_with_everything(latent, pairs, dino, tmp_path, capsys):
    """Phases in turn, resolutions that change, alignment, previews, and files that others read."""
    seen, sample = [], Objective.sample

    def watched(objective, batch, *, refine):
        seen.append((tuple(batch.hr.shape), refine, batch.keys[0]))
        return sample(objective, batch, refine=refine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "sample", watched)
        out = run(
            latent, pairs, tmp_path / "run", phases="adapt,full,refine", sizes="32,48,32",
            steps="1,2,2", micro_batch="4,2,4", lr="1e-2,1e-3,1e-3", lambda_repa=0.5, encoder=dino,
        )  # fmt: skip
    large, little = (2, 3, 48, 48), (4, 3, 32, 32)
    assert seen == [
        (little, False, 0), *((large, False, key) for key in (4, 6, 8, 10)),
        (little, True, 12), (little, True, 16),
    ]  # fmt: skip
    lines = [line for line in log(out) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(-1 <= line["repa_cosine"] <= 1 for line in lines)
    assert lines[0]["lr"] == pytest.approx(5e-3)
    assert lines[2]["lr"] == pytest.approx(1e-3)
    looks = [line for line in log(out) if "val_noise" in line]
    assert [line["step"] for line in looks] == [1, 3, 5]
    assert {"val_noise_t100", "val_repa_cosine", "val_terms_clean", "val_terms_damaged"} <= set(
        looks[0]
    )
    names = {p.name for p in out.iterdir()}
    assert {
        "model.safetensors", "projector.safetensors", "config.json", "log.jsonl", "tensorboard",
        "samples.png", "step.png", "model-1-adapt-32.safetensors", "model-2-full-48.safetensors",
        "model-3-refine-32.safetensors",
    } <= names  # fmt: skip
    assert not [n for n in names if n.endswith(".part")]
    with Image.open(out / "step.png") as sheet:
        assert sheet.size == (64, 96)

    model = gendr.load(out / "model.safetensors", device="cpu", dtype="fp32")
    assert model.restore(torch.rand(1, 3, 10, 12), 4).shape == (1, 3, 40, 48)
    assert model.header.training_step == 5
    assert model.header.licence == "Apache-2.0"
    assert {f["part"] for f in model.header.bases} == {"unet", "vae", "prompts", "encoder"}
    assert not any("/" in str(fact.get("id")) for fact in model.header.bases)
    _, tensors = checkpoint.read(out / "model.safetensors")
    embeds = checkpoint.split(tensors)["embeds"]
    assert set(embeds) == {"positive", "negative", "null"}
    assert torch.equal(
        embeds["null"].float(), random_prompts(3, 6, 0).embeds["null"].half().float()
    )
    own, start = checkpoint.split(tensors)["vae"], checkpoint.read(latent)[1]
    assert all(torch.equal(v, start[f"vae.{k}"].half()) for k, v in own.items())
    Projector(8, 16).load_state_dict(
        gendr.files.checkpoint.read_file(out / "projector.safetensors").tensors
    )
    assert capsys.readouterr().out.strip().endswith("model.safetensors")


LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 8, 16),
}


def published(folder):
    """Text encoder and UNet in diffusers' layout."""
    save_encoder(folder)
    tiny_unet(cross_attention_dim=8).save_pretrained(folder / "unet")
    return folder


def photos(folder, captioned=3):
    """Three pictures, some with a caption."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(3):
        Image.fromarray(rng.integers(0, 256, (70, 70, 3), np.uint8)).save(folder / f"{n}.png")
        if n < captioned:
            (folder / f"{n}.txt").write_text(f"picture number {n}")
    return folder


def test_pictures_without_captions_are_refused_or_told_terms(tmp_path, capsys):
    sd, data = published(tmp_path / "sd"), photos(tmp_path / "data", captioned=1)
    tiny_vae(**LEVELS).save_pretrained(tmp_path / "vae")
    more = {"vae": tmp_path / "vae", "prompts": "captions", "steps": 1}
    assert repa.main(words(sd, data, tmp_path / "run", **more)) == 1
    assert "1 of 3 pictures have a caption (33 %)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    run(sd, data, tmp_path / "run", **more, captioned=0.3)
    assert "2 of 3 pictures have no caption: they are told quality terms" in capsys.readouterr().err


def test_four_channels_from_public_weights_to_one_step(tmp_path, pairs):
    """Table 4's other latent: SD2.1's own autoencoder, whose config.json names no scale."""
    sd = published(tmp_path / "sd")
    tiny_vae(
        **LEVELS, latent_channels=4, scaling_factor=0.18215, shift_factor=None
    ).save_pretrained(sd / "vae")
    path = sd / "vae" / "config.json"
    values = json.loads(path.read_text())
    del values["scaling_factor"]
    path.write_text(json.dumps(values))
    options = words(
        sd, pairs, tmp_path / "base", channels=4, prompts="captions", steps=1, micro_batch=2
    )
    del options[options.index("--vae") : options.index("--vae") + 2]
    assert repa.main(options) == 0
    base = tmp_path / "base" / "model.safetensors"
    assert checkpoint.read_header(base).config.vae.scaling_factor == 0.18215
    found = [
        "--base", base, "--data", pairs, "--out", tmp_path / "run", "--device", "cpu", "--steps", 1,
        "--batch", 2, "--micro-batch", 2, "--crop", 32, "--lora-rank", 2, "--head-width", 8,
        "--lambda3", 0, "--precision", "fp32", "--workers", 0,
    ]  # fmt: skip
    assert cida.main([str(w) for w in found]) == 0
    model = gendr.load(tmp_path / "run" / "model.safetensors", device="cpu")
    assert model.network.config.unet.latent_channels == 4
    assert model.restore(torch.rand(1, 3, 8, 8)).shape == (1, 3, 32, 32)


def test_from_public_weights_with_captions(dino, tmp_path):
    """As the paper's recipe goes: a folder of diffusers, its text encoder, captioned pictures."""
    sd, data = published(tmp_path / "sd"), photos(tmp_path / "data")
    tiny_vae(**LEVELS).save_pretrained(tmp_path / "vae")
    said, plain = [], Prompts.encode

    def encode(prompts, texts):
        said.extend(texts)
        return plain(prompts, texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prompts, "encode", encode)
        out = run(
            sd, data, tmp_path / "run", vae=tmp_path / "vae", prompts="captions",
            phases="full,refine", steps="2,2", lambda_repa=0.5, encoder=dino, batch=4,
        )  # fmt: skip
    assert {t for t in said if ", " not in t} == {f"picture number {n}" for n in range(3)}
    assert any(t.startswith("picture number") and t.count(", ") >= 4 for t in said)
    first = log(out)[0]
    # 16 new channels behind a silent convolution: each of them starts at E|eps|^2.
    assert first["diffusion"] == pytest.approx(1, abs=0.2)
    model = gendr.load(out / "model.safetensors", device="cpu", dtype="fp32")
    assert model.restore(torch.rand(1, 3, 8, 8), 4).shape == (1, 3, 32, 32)
    assert (model.network.config.vae.scaling_factor, model.network.config.vae.shift_factor) == (
        0.3, 0.1,
    )  # fmt: skip
    assert model.header.prompts["positive"].startswith("realism photo")
    assert [f["id"] for f in model.header.bases] == ["vae", "sd", "sd", "dino0"]


def test_what_is_exported_is_the_average(latent, pairs, tmp_path):
    """After two steps at decay .9 the average is neither the start nor the last weights."""
    out = run(latent, pairs, tmp_path / "run", steps=3)
    state = torch.load(out / "state.pt", weights_only=True)
    names = list(state["network"])
    shadow = dict(zip(names, state["average"]["shadow_params"], strict=True))
    exported = checkpoint.split(checkpoint.read(out / "model.safetensors")[1])["unet"]
    trained = state["network"]["network.unet.conv_in.weight"]
    average = shadow["network.unet.conv_in.weight"]
    start = checkpoint.read(latent)[1]["unet.conv_in.weight"]
    assert torch.equal(exported["conv_in.weight"], average.half())
    for other in (trained, start):
        assert float((average - other).abs().max()) > 1e-5


def test_adapting_leaves_the_rest_alone(latent, pairs, tmp_path):
    out = run(latent, pairs, tmp_path / "run", phases="adapt", steps=2)
    state = torch.load(out / "state.pt", weights_only=True)["network"]
    start = checkpoint.read(latent)[1]
    unet = UNet(UNET)
    norms = {n for n, m in unet.named_modules() if isinstance(m, torch.nn.GroupNorm)}
    for name, tensor in state.items():
        name = name.removeprefix("network.unet.")
        moved = not torch.equal(tensor, start[f"unet.{name}"])
        assert moved == (name.rsplit(".", 1)[0] in norms | {"conv_in", "conv_out"}), name


def test_resume_equals_uninterrupted(latent, pairs, tmp_path, monkeypatch):
    more = {"phases": "full,refine", "steps": "2,3", "sizes": "32,48"}
    run(latent, pairs, tmp_path / "whole", **more)
    real = Run.steps
    for stop in (1, 4):
        with monkeypatch.context() as patch:
            patch.setattr(
                Run, "steps", lambda r, a, b, images, stop=stop: real(r, a, stop, images=images)
            )
            run(latent, pairs, tmp_path / "parts", **more)
        # What a kill in the middle of writing leaves behind must not matter.
        (tmp_path / "parts" / "state.pt.part").write_bytes(b"cut")
        (tmp_path / "parts" / "model.safetensors.part").write_bytes(b"cut")
    run(latent, pairs, tmp_path / "parts", **more)
    whole, parts = states(tmp_path / "whole"), states(tmp_path / "parts")
    assert int(whole["step"]) == 5
    assert set(whole) == set(parts)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    a, b = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert checkpoint.describe(a)["sha256"] == checkpoint.describe(b)["sha256"]


def test_another_configuration_is_refused(latent, pairs, tmp_path, capsys):
    run(latent, pairs, tmp_path / "run", steps=1)
    assert repa.main(words(latent, pairs, tmp_path / "run", steps=1, drop=0.5)) == 1
    assert "another drop" in capsys.readouterr().err
    run(latent, pairs, tmp_path / "run", steps=1, micro_batch=4)


def test_a_signal_ends_a_run_between_two_steps(latent, pairs, tmp_path, monkeypatch):
    plain = repa.Training.step

    def step(training, number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(training, number)

    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(repa.Training, "step", step)
    try:
        run(latent, pairs, tmp_path / "run", steps=50, save_every=50)
    finally:
        for name, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(name, handler)
    assert int(states(tmp_path / "run")["step"]) == 2


def test_divergence_stops_the_run_with_its_reason(latent, pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train.run.DIVERGED_STEPS", 3)
    real = Objective.loss

    def broken(self, denoiser, sample):
        loss, values = real(self, denoiser, sample)
        loss = loss * float("nan")
        return loss, {**values, "loss": loss.detach()}

    run(latent, pairs, tmp_path / "run", steps="2", phases="full")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["steps"] = [50]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    before = states(tmp_path / "run")
    monkeypatch.setattr(Objective, "loss", broken)
    assert repa.main(words(latent, pairs, tmp_path / "run", steps=50)) == 1
    assert "diverged: the loss was nan" in capsys.readouterr().err
    # Not one of the broken steps was taken, and they were counted.
    after = states(tmp_path / "run")
    assert all(torch.equal(before[k], after[k]) for k in before if k != "step")
    assert log(tmp_path / "run")[-1]["skipped"] == 2


def test_bad_pictures_are_named_and_passed_over(latent, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for n in range(3):
        Image.fromarray(rng.integers(0, 256, (70, 70, 3), np.uint8)).save(data / f"{n}.png")
    (data / "cut.png").write_bytes((data / "0.png").read_bytes()[:200])
    with pytest.warns(UserWarning, match=r"skipped cut\.png: cannot be decoded"):
        run(latent, data, tmp_path / "run", phases="full,refine", steps="2,1", batch=8)
    assert int(states(tmp_path / "run")["step"]) == 3


def test_processes_that_cannot_talk_are_refused(monkeypatch):
    """Two runs in one folder, each believing that it is alone, would be worse than none."""
    assert Processes("cpu").count == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="started as one of 2 processes"):
        Processes("cpu")


# ---- the plan ----


def test_the_plan_of_the_full_size(capsys):
    assert repa.main(["--recipe", "paper", "--out", "nowhere", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "865,979,856" in text
    assert "6,427,392" in text
    assert "13.00 GiB" in text
    assert "143,360,000" in text
    assert "64  of 32 in each of 1 process" in text
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("name", ["paper", "single_gpu", "tiny"])
def test_recipes_are_whole(name):
    settings = recipe.build(repa.Settings, recipe.read_recipe(name, "repa"))
    phases = settings.plan()
    assert phases[-1].refine
    assert all(p.last > p.first == q.last for p, q in zip(phases[1:], phases, strict=False))
    assert settings.lambda_repa == (0 if name == "tiny" else 0.5)
    if name == "paper":
        # The defaults are this recipe, but for what the recipe leaves to them.
        assert settings == repa.Settings()
        assert sum(p.last - p.first for p in phases if not p.refine) == 100_000
    if name != "tiny":
        # Named by the channels alone, so that --channels 4 is all that Table 4's rows need.
        own = dataclasses.replace(settings, channels=4, base="sd")
        assert (vae_source(settings), vae_source(own)) == (VAE16, "sd")
    if name == "tiny":
        skip = (1 - settings.constant * float(schedule.beta_bar(500))) / settings.constant
        assert skip == pytest.approx(1)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"phases": "fulll"}, "phases are one or more of adapt, full, refine, not fulll"),
        ({"phases": "full,refine", "steps": "1,2,3"}, "steps needs one value for all or one"),
        ({"lambda_repa": 0.5, "encoder": ""}, "name an encoder"),
        ({"base": ""}, None),
        ({"base": "", "prompts": "captions"}, "a network from nothing has no text encoder"),
        ({"alpha": 0.0}, "set it to 0.5 for epsilon"),
        ({"sizes": 20}, "sizes must be multiples of 16 pixels"),
        ({"channels": 4}, "has 16 latent channels, the run 4"),
        ({"prediction": "v_prediction"}, "was trained to predict epsilon"),
        ({"prompts": "captions"}, "one file without a text encoder"),
        ({"prompts": "none.safetensors"}, "does not exist"),
        ({"data": "missing"}, "no such folder or tar"),
        ({"batch": 5}, "not a multiple of 1 processes x 2"),
    ],
)
def test_settings_that_do_not_fit_are_a_sentence(latent, pairs, tmp_path, capsys, more, sentence):
    if sentence is None:
        # From nothing, GenDR-Tiny's own UNet; its latent has 16 channels as well.
        run(latent, pairs, tmp_path / "run", steps=1, **more)
        config = checkpoint.describe(tmp_path / "run" / "model.safetensors")["config"]
        assert config["unet"]["block_out_channels"] == [80, 128]
        return
    more = dict(more)
    try:
        data = more.pop("data", pairs)
        code = repa.main(words(latent, data, tmp_path / "run", **more))
    except SystemExit as stopped:
        code = stopped.code
    assert code
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run" / "state.pt").exists()


def test_a_posterior_that_is_mostly_noise_is_named(latent, pairs, tmp_path, capsys):
    """GenDR-Tiny's autoencoder says variance 1 beside a mean of .6: never trained."""
    tiny = ROOT / "gendr" / "weights" / "gendr-tiny.safetensors"
    more = {"base": "", "vae": tiny, "prediction": "v_prediction", "alpha": 0.0, "steps": 1}
    run(latent, pairs, tmp_path / "sample", **more)
    assert "start again with posterior = mode" in capsys.readouterr().err
    run(latent, pairs, tmp_path / "mode", **more, posterior="mode")
    assert "posterior = mode" not in capsys.readouterr().err


def test_errors_of_the_run_end_it_politely(latent, pairs, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise TrainingError("the disk is full")

    monkeypatch.setattr(repa.Training, "step", fail)
    assert repa.main(words(latent, pairs, tmp_path / "run")) == 1
    assert capsys.readouterr().err.endswith("train.repa: the disk is full\n")

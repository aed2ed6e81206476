"""`gendr convert` against diffusers and peft: narrow random SD2.1s, each project's own layout."""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
from dataclasses import replace

import pytest
import restorers
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

import gendr
from gendr import CheckpointError, cli
from gendr.files import base as bases
from gendr.files import checkpoint, convert, layouts, prompts, sources, stored
from gendr.files.lora import Lora
from train import embeddings

# float32 in another order of operations, through 26 residual blocks and Eq. 2's factors of up to 15.
SAME = 2e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return restorers.save_base(tmp_path_factory.mktemp("sd21"))


@pytest.fixture(scope="module")
def empty_prompt(base):
    """CLIP("") by transformers alone: start, end, then "!" up to 77 tokens."""
    model = CLIPTextModel.from_pretrained(base / "text_encoder")
    size = model.config.vocab_size
    with torch.no_grad():
        return model(torch.tensor([[size - 2, size - 1] + [0] * 75])).last_hidden_state


@pytest.fixture(scope="module")
def picture():
    return torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(3)) * 2 - 1


MAKERS = {
    "pisa": restorers.pisa,
    "osediff": restorers.osediff,
    "hypir": restorers.hypir,
    "omgsr": restorers.omgsr,
}
# OSEDiff's file once more, with its adapters merged.
MERGED = "merged osediff"


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """Each project's file, made once."""
    files = {}

    def make(name):
        if name not in files:
            folder = tmp_path_factory.mktemp("made")
            if name == MERGED:
                files[name] = restorers.merged_osediff(folder, make("osediff"))
            else:
                files[name] = MAKERS[name](folder, base)
        return files[name]

    return make


@pytest.fixture(scope="module")
def expected(made, picture, empty_prompt):
    """What each project's own program makes of the picture, computed once."""
    latents = {}

    def latent(name):
        if name not in latents:
            latents[name] = made(name).latent(picture, empty_prompt)
        return latents[name]

    return latent


def run(source, base, output, *options):
    return cli.main(
        [
            "convert",
            str(source),
            "--base",
            str(base),
            "-o",
            str(output),
            "--dtype",
            "fp32",
            *options,
        ]
    )


@torch.no_grad()
def latent_of(path, picture, *, fold):
    """z_g of a file in the units of SD's latents."""
    network = gendr.load(path, device="cpu", dtype="fp32", fold=fold).network
    z = network.step(network.encode(picture))
    return z * network.config.vae.scaling_factor if fold else z


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", [*MAKERS, MERGED])
def test_the_latent_is_that_of_diffusers_and_peft(name, made, base, expected, picture, tmp_path):
    out = tmp_path / "out.safetensors"
    assert run(made(name).path, base, out, "--accept-licence") == 0
    assert distance(latent_of(out, picture, fold=True), expected(name)) <= SAME
    assert distance(latent_of(out, picture, fold=False), expected(name)) <= SAME


def without_conv_in(source):
    return replace(source, unet=Lora(source.unet.pairs))


def without_vae(source):
    return replace(source, vae=Lora())


def with_scaling_one(source):
    pairs = {
        module: {name: replace(pair, scaling=1.0) for name, pair in adapters.items()}
        for module, adapters in source.unet.pairs.items()
    }
    return replace(source, unet=Lora(pairs, source.unet.replaced))


def with_one_adapter(source):
    pairs = {m: dict([list(adapters.items())[-1]]) for m, adapters in source.unet.pairs.items()}
    return replace(source, unet=Lora(pairs, source.unet.replaced))


def with_constants(**changes):
    def change(source):
        return replace(source, restorer=replace(source.restorer, **changes))

    return change


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("pisa", with_scaling_one),
        ("pisa", with_one_adapter),
        ("pisa", with_constants(coeff_t=1)),
        ("osediff", with_scaling_one),
        ("osediff", without_conv_in),
        ("osediff", without_vae),
        ("osediff", with_constants(t_start=1)),
        ("hypir", with_constants(coeff_t=120)),
    ],
)
def test_a_wrong_reading_is_far_off(
    name, wrong, made, base, expected, picture, tmp_path, monkeypatch
):
    out, read = tmp_path / "out.safetensors", sources.read
    monkeypatch.setattr(sources, "read", lambda *args, **options: wrong(read(*args, **options)))
    assert run(made(name).path, base, out, "--accept-licence") == 0
    far = distance(latent_of(out, picture, fold=True), expected(name))
    assert far > 100 * SAME


def test_semantic_0_leaves_the_second_adapter_out(made, base, empty_prompt, picture, tmp_path):
    source, out = made("pisa"), tmp_path / "out.safetensors"
    assert run(source.path, base, out, "--semantic", "0") == 0
    expected = source.latent(picture, empty_prompt, which=("pix",))
    assert distance(latent_of(out, picture, fold=True), expected) <= SAME
    assert gendr.describe(out)["source"]["semantic"] == 0


def test_coeff_t_is_the_noise_level_and_not_the_timestep(
    made, base, empty_prompt, picture, tmp_path
):
    source, out = made("hypir"), tmp_path / "out.safetensors"
    assert run(source.path, base, out, "--coeff-t", "120", "--accept-licence") == 0
    expected = source.latent(picture, empty_prompt, coeff_t=120)
    assert distance(latent_of(out, picture, fold=True), expected) <= SAME
    facts = gendr.describe(out)
    assert facts["config"]["t_start"] == 200
    assert facts["source"]["coeff_t"] == 120


def test_the_header_says_what_the_file_is_made_of(made, base, tmp_path, capsys):
    source, out = made("osediff"), tmp_path / "out.safetensors"
    assert cli.main(["convert", str(source.path), "--base", str(base), "-o", str(out)]) == 0
    assert "OSEDiff, fp16" in capsys.readouterr().out
    facts = gendr.describe(out)
    assert facts["name"] == "OSEDiff"
    assert facts["licence"] == "Apache-2.0 (OSEDiff) + OpenRAIL++-M (SD2.1-base)"
    assert facts["source"] == {
        "file": "two.pkl",
        "sha256": hashlib.sha256(source.path.read_bytes()).hexdigest(),
        "home": "github.com/cswry/OSEDiff",
    }
    assert [part["id"] for part in facts["bases"]] == [base.name] * 2
    assert facts["prompts"] == {"positive": ""}
    assert (facts["tile"], facts["color_fix"], facts["precision"], facts["min_side"]) == (
        *(768, "adain", "fp16"),
        512,
    )
    assert facts["config"]["alpha"] == pytest.approx(0.068265, abs=1e-6)
    assert facts["config"]["beta"] == pytest.approx(0.997667, abs=1e-6)
    assert facts["stored_dtypes"] == ["F16"]
    # The digest of the file is that of its tensors.
    assert facts["sha256"] == checkpoint.digest(load_file(out))
    assert not list(tmp_path.glob("*.part"))


# ---- prompts ----


def test_a_prompt_is_encoded_by_the_bases_text_encoder(made, base, tmp_path):
    out, text = tmp_path / "out.safetensors", "clean photo, 8k"
    assert run(made("pisa").path, base, out, "--prompt", text) == 0
    expected, _ = embeddings.encode(embeddings.load_encoder(str(base)), text)
    assert torch.allclose(load_file(out)["embeds.positive"], expected, atol=1e-6)
    assert gendr.describe(out)["prompts"] == {"positive": text}


def test_embeds_stand_in_for_the_text_encoder(made, base, tmp_path, capsys):
    file, out = tmp_path / "embeds.safetensors", tmp_path / "out.safetensors"
    texts = {"positive": "clean", "negative": "blurred", "null": ""}
    tensors = {name: torch.randn(1, 77, restorers.WIDTH) for name in texts}
    embeddings.write(file, tensors, texts, source="here", revision="1")
    bare = tmp_path / "bare"
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("text_encoder", "tokenizer"))
    source = made("pisa").path
    assert run(source, bare, out, "--embeds", str(file)) == 0
    assert torch.equal(load_file(out)["embeds.positive"], tensors["null"])
    assert run(source, bare, out, "--embeds", str(file), "--prompt", "clean", "--overwrite") == 0
    assert torch.equal(load_file(out)["embeds.positive"], tensors["positive"])
    other = tmp_path / "other.safetensors"
    assert run(source, bare, other, "--embeds", str(file), "--prompt", "sharp") == 1
    assert "holds no embedding of the prompt 'sharp'" in capsys.readouterr().err
    assert run(source, bare, other) == 1
    assert re.search(r"bare has no text encoder .*--embeds", capsys.readouterr().err)
    assert not other.exists()


# ---- the base, in every form ----


def ldm_file(base, path):
    """The base as one file under LDM's names, its text encoder under open_clip's."""
    ground = bases.read(base)

    def under_ldm(names, table):
        olds = {new: old for old, new in table.items()}
        return layouts.rename({name: name for name in names}, olds)

    tensors = {}
    inner = convert.inside(ground.shapes, "unet")
    for old, new in under_ldm(inner, layouts.ldm_unet_table(ground.unet)).items():
        tensor = ground.read(f"unet.{new}")
        tensors[layouts.LDM_UNET + old] = tensor.clone()
    olds = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
    inner = convert.inside(ground.shapes, "vae")
    for old, new in under_ldm(inner, layouts.ldm_vae_table(ground.vae)).items():
        tensor, name = ground.read(f"vae.{new}"), old.replace(".conv_shortcut.", ".nin_shortcut.")
        if ".mid.attn_1." in name:
            module, what = name.split(".mid.attn_1.")[1].rsplit(".", 1)
            name = f"{name.split('.mid.')[0]}.mid.attn_1.{olds[module]}.{what}"
            tensor = tensor[..., None, None] if tensor.dim() == 2 else tensor
        tensors[layouts.LDM_VAE + name] = tensor.clone()
    return {**tensors, **open_clip(base)}, path


def open_clip(base):
    """The text encoder under open_clip's names, with the last layer that SD2 doesn't use."""
    state = CLIPTextModel.from_pretrained(base / "text_encoder").state_dict()
    state = {k.removeprefix("text_model."): v for k, v in state.items()}
    block = "transformer.resblocks."
    out = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
    }
    for what in ("weight", "bias"):
        layer = "encoder.layers.0."
        parts = [state[f"{layer}self_attn.{p}_proj.{what}"] for p in "qkv"]
        out[f"{block}0.attn.in_proj_{what}"] = torch.cat(parts)
        for old, new in (
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        ):
            out[f"{block}0.{old}.{what}"] = state[f"{layer}{new}.{what}"]
    last = {k.replace(f"{block}0.", f"{block}1."): torch.randn_like(v) for k, v in out.items()}
    return {
        f"cond_stage_model.model.{k}": v.contiguous().clone() for k, v in {**last, **out}.items()
    }


def resaved(base, folder, form):
    """The base in another form of diffusers' folders, or as one file."""
    if form.startswith("LDM"):
        tensors, path = ldm_file(base, folder / "sd.safetensors")
        if form == "LDM safetensors":
            save_file(tensors, path)
            return path
        torch.save({"state_dict": tensors, "global_step": 1}, folder / "sd.ckpt")
        return folder / "sd.ckpt"
    shutil.copytree(base, folder / "base")
    for part, network in (("unet", restorers.unet_of(base)), ("vae", restorers.vae_of(base))):
        place = folder / "base" / part
        weights = place / "diffusion_pytorch_model.safetensors"
        if form == "shards":
            weights.unlink()
            network.save_pretrained(place, max_shard_size="4MB")
            assert len(list(place.glob("*-of-*.safetensors"))) > 1
        elif form == "bin":
            weights.unlink()
            network.save_pretrained(place, safe_serialization=False)
        elif form == "fp16":
            weights.rename(place / "diffusion_pytorch_model.fp16.safetensors")
        elif form == "old names" and part == "vae":
            olds = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
            renamed = {}
            for name, tensor in load_file(weights).items():
                for new, old in olds.items():
                    name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
                renamed[name] = tensor
            save_file(renamed, weights)
    return folder / "base"


@pytest.mark.parametrize(
    "form", ["shards", "bin", "fp16", "old names", "LDM safetensors", "LDM ckpt"]
)
def test_a_base_is_the_same_in_every_form(form, base, tmp_path):
    ground, other = bases.read(base), bases.read(resaved(base, tmp_path, form))
    assert other.shapes == ground.shapes
    assert all(torch.equal(other.read(name), ground.read(name)) for name in ground.shapes)


def test_the_empty_prompt_needs_no_tokenizer_of_one_file(base, empty_prompt, tmp_path):
    path = resaved(base, tmp_path, "LDM safetensors")
    # The text model is 8 wide with two heads; the real one is 1024 wide, with a head per 64.
    encoder = prompts.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "HEAD", 4)
        patch.setattr(prompts, "GELU", "quick_gelu")
        assert torch.allclose(encoder(path, ""), empty_prompt, atol=1e-6)
    with pytest.raises(CheckpointError, match="holds no tokenizer, so only the empty prompt"):
        prompts.encode(path, "a photo")


# ---- what can't be used: one sentence, and nothing left behind ----


def refused(capsys, tmp_path, source, base, *options):
    """What the command says, where it must fail without leaving anything."""
    before = sorted(tmp_path.rglob("*"))
    code = cli.main(
        [
            "convert",
            str(source),
            "--base",
            str(base),
            "-o",
            str(tmp_path / "o.safetensors"),
            *options,
        ]
    )
    assert code == 1
    assert sorted(tmp_path.rglob("*")) == before
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("gendr: ")]
    assert len(lines) == 1
    return lines[0]


def changed(path, out, change):
    contents = torch.load(path, weights_only=True)
    contents = change(contents) or contents
    torch.save(contents, out)
    return out


def drop_first(contents):
    del contents["state_dict_unet"][next(iter(contents["state_dict_unet"]))]


def drop_module(contents):
    for side in "AB":
        key = f"mid_block.attentions.0.proj_in.lora_{side}.default_others_sem.weight"
        del contents["state_dict_unet"][key]


def add_tensor(contents):
    contents["state_dict_unet"]["conv_in.alpha"] = torch.ones(1)


def add_key(contents):
    contents["ema"] = {"x": torch.ones(1)}


def change_rank(contents):
    contents["lora_rank_unet_pix"] = 8


def prefixed(contents):
    state = contents["state_dict_unet"]
    contents["state_dict_unet"] = {f"module.{k}": v for k, v in state.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_first, "counterpart is missing"),
        (drop_module, "adapter sem changes 257 modules of the UNet, the published one 258"),
        (add_tensor, r"conv_in\.alpha (is neither|belongs to neither)"),
        (add_key, "ema is not part of the published file"),
        (change_rank, "a module has rank 4, the file says 8"),
        (prefixed, r"changes module\.\S+, which the base does not have"),
        (lambda c: {"state_dict_vae_de_mlp": {}, **c}, "is S3Diff, whose weights depend on each"),
        (lambda c: {"params": {"body.0.weight": torch.ones(1)}}, "is none of the models that can"),
        (lambda c: [1, 2], "is none of the models that can be converted"),
    ],
)
def test_a_source_that_is_not_the_published_one_is_refused(
    change, words, made, base, tmp_path, capsys
):
    source = changed(made("pisa").path, tmp_path / "bad.pkl", change)
    assert re.search(words, refused(capsys, tmp_path, source, base))


def test_half_a_pickle_is_refused(made, base, tmp_path, capsys):
    half = tmp_path / "half.pkl"
    half.write_bytes(made("pisa").path.read_bytes()[:100_000])
    assert "can't be read as plain tensors" in refused(capsys, tmp_path, half, base)


def test_a_program_in_a_pickle_is_not_executed(base, tmp_path, capsys):
    class Program:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"unet": Program()}, tmp_path / "bad.pkl")
    assert "is not executed" in refused(capsys, tmp_path, tmp_path / "bad.pkl", base)


def test_options_of_another_model_are_refused(made, base, tmp_path, capsys):
    said = refused(capsys, tmp_path, made("pisa").path, base, "--coeff-t", "100")
    assert "PiSA-SR has one noise level" in said
    said = refused(capsys, tmp_path, made("osediff").path, base, "--semantic", "0")
    assert "OSEDiff has no semantic adapter" in said


def test_terms_are_shown_and_must_be_accepted(made, base, tmp_path, capsys):
    code = run(made("hypir").path, base, tmp_path / "o.safetensors")
    said = capsys.readouterr().err
    assert code == 1
    assert "Terms of HYPIR" in said
    assert "non-commercial" in said
    assert "add --accept-licence" in said
    assert not list(tmp_path.iterdir())


NARROWER = {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": (1, 2, 2, 2)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cross_attention_dim": 768}, r"SD1\.5 UNet"),
        ({"use_linear_projection": False}, r"not (built|in the shape)"),
        ({"schedule": {"prediction_type": "v_prediction"}}, "predicts v_prediction"),
        ({"schedule": {"clip_sample": True}}, "clips its latents"),
        ({"schedule": {"beta_schedule": "linear"}}, "another noise schedule"),
        ({"in_channels": 9}, "9 latent channels"),
        (NARROWER, "don't belong together: the LoRA was made for"),
    ],
)
def test_a_base_of_another_kind_is_refused(options, words, made, tmp_path, capsys):
    other = restorers.save_base(tmp_path / "other", **options)
    assert re.search(words, refused(capsys, tmp_path, made("pisa").path, other))


def test_v_prediction_is_told_by_the_weights_of_one_file(base, made, tmp_path, capsys):
    tensors, path = ldm_file(base, tmp_path / "v.safetensors")
    name = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    save_file({**tensors, name: torch.randn_like(tensors[name])}, path)
    said = refused(capsys, tmp_path, made("pisa").path, path)
    assert "seems to predict v" in said


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_base_that_lacks_something_is_refused(part, base, made, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "b")
    weights = tmp_path / "b" / part / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    del state[sorted(state)[-1]]
    save_file(state, weights)
    said = refused(capsys, tmp_path, made("pisa").path, tmp_path / "b")
    assert re.search(r"incomplete or not in the shape of SD2\.1 \(\S+ is missing\)", said)
    shutil.rmtree(tmp_path / "b" / part)
    said = refused(capsys, tmp_path, made("pisa").path, tmp_path / "b")
    assert f"it has no {part}/" in said
    assert "there is no base at" in refused(capsys, tmp_path, made("pisa").path, tmp_path / "no")


def test_a_disk_without_room_is_noticed_before(made, base, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(stored.shutil, "disk_usage", lambda path: usage)
    said = refused(capsys, tmp_path, made("pisa").path, base)
    assert re.search(r"needs 0\.\d+ GB, .* has 0\.00 GB free", said)


def test_a_disk_that_fills_up_leaves_nothing(made, base, tmp_path, capsys, monkeypatch):
    calls = iter(range(100))

    def opened(*args):
        if next(calls) == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return open(*args)

    monkeypatch.setattr(stored, "open", opened, raising=False)
    said = refused(capsys, tmp_path, made("pisa").path, base)
    assert "full" in said or "No space left" in said


def test_an_interrupted_conversion_leaves_nothing(made, base, tmp_path, monkeypatch):
    calls, merged = iter(range(1000)), convert.merged

    def interrupted(*args):
        if next(calls) == 20:
            raise KeyboardInterrupt
        return merged(*args)

    monkeypatch.setattr(convert, "merged", interrupted)
    assert run(made("pisa").path, base, tmp_path / "o.safetensors") == 130
    assert not list(tmp_path.iterdir())


def test_weights_that_fp16_cannot_hold_are_refused(made, base, tmp_path, capsys):
    def loud(contents):
        for tensor in contents["state_dict_unet"].values():
            tensor *= 1e4

    source = changed(made("pisa").path, tmp_path / "loud.pkl", loud)
    assert "choose fp32 or bf16" in refused(capsys, tmp_path, source, base)


def test_an_existing_file_is_kept(made, base, tmp_path):
    (tmp_path / "o.safetensors").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        run(made("pisa").path, base, tmp_path / "o.safetensors")
    assert stopped.value.code == 2
    assert (tmp_path / "o.safetensors").read_text() == "mine"

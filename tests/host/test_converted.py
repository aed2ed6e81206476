"""A converted public restorer in a real ComfyUI, with and without a prompt over the wire.

Everything here is made without diffusers and peft, which a ComfyUI doesn't bring; that the layouts are
theirs is what tests/test_convert.py shows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_server import graph, kept, noise

import gendr
from benchmarks import conversion
from gendr import cli
from gendr.files import prompts

NAME, CLIP = "pisa-sr.safetensors", "sd2-clip.pt"
WIDTHS = (16, 32, 48, 48)
# SD2's text encoder: width of an embedding, tokens of a piece of text, layers with the one it drops.
WIDTH, TOKENS, LAYERS = 1024, 77, 24


def narrow():
    """SD2.1 with few channels, reading prompts as wide as SD2's."""
    full, few = conversion.SD21_BASE, {"block_out_channels": WIDTHS, "norm_num_groups": WIDTHS[0]}
    unet, vae = replace(full.unet, head_dim=WIDTHS[0], **few), replace(full.vae, **few)
    return replace(full, unet=unet, vae=vae)


def text_encoder() -> dict[str, torch.Tensor]:
    """SD2's text encoder under open_clip's names, random. Its layers share their numbers and the rows of its
    vocabulary overlap, so that 340 M parameters are a file of 25 MB."""
    generator = torch.Generator().manual_seed(5)

    def random(*sides: int) -> torch.Tensor:
        return (0.03 * torch.randn(sides, generator=generator)).half()

    vocabulary = 49408
    layer = {
        "attn.in_proj_weight": random(3 * WIDTH, WIDTH),
        "attn.in_proj_bias": random(3 * WIDTH),
        "attn.out_proj.weight": random(WIDTH, WIDTH),
        "attn.out_proj.bias": random(WIDTH),
        "mlp.c_fc.weight": random(4 * WIDTH, WIDTH),
        "mlp.c_fc.bias": random(4 * WIDTH),
        "mlp.c_proj.weight": random(WIDTH, 4 * WIDTH),
        "mlp.c_proj.bias": random(WIDTH),
    }
    for norm in ("ln_1", "ln_2"):
        layer |= {f"{norm}.weight": 1 + random(WIDTH), f"{norm}.bias": random(WIDTH)}
    state = {
        "token_embedding.weight": random(vocabulary + WIDTH).as_strided(
            (vocabulary, WIDTH), (1, 1)
        ),
        "positional_embedding": random(TOKENS, WIDTH),
        "ln_final.weight": 1 + random(WIDTH),
        "ln_final.bias": random(WIDTH),
        "text_projection": random(WIDTH, 1).expand(WIDTH, WIDTH),
    }
    for number in range(LAYERS):
        state |= {f"transformer.resblocks.{number}.{k}": v for k, v in layer.items()}
    return state


def empty_prompt(folder: Path) -> Path:
    """CLIP("") of that encoder by transformers, as a file for `gendr convert --embeds`."""
    file = folder / "open_clip.ckpt"
    torch.save({prompts.OPEN_CLIP + k: v for k, v in text_encoder().items()}, file)
    save_file({"null": prompts.encode(file, "")}, folder / "embeds.safetensors")
    return folder / "embeds.safetensors"


@pytest.fixture(scope="module")
def converted(server, tmp_path_factory):
    """The file of a narrow PiSA-SR in models/gendr, put there while the server runs."""
    folder = tmp_path_factory.mktemp("pisa")
    config = narrow()
    base = conversion.write_base(folder / "sd21", config)
    source = conversion.write_pisa(folder / "one.pth", conversion.unet_shapes(config))
    out = server.base / "models" / "gendr" / NAME
    command = ["convert", source, "--base", base, "--embeds", empty_prompt(folder)]
    command += ["-o", out, "--dtype", "fp32"]
    assert cli.main([str(word) for word in command]) == 0
    (server.base / "models" / "gendr" / source.name).write_bytes(source.read_bytes())
    return gendr.load(out, device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def unprompted(converted):
    """The picture by the model's own prompt, in plain Python, and its report."""
    return converted.restore_with_report(noise(), 2.0, fidelity=0.0)


@pytest.fixture(scope="module")
def clip(server):
    """A text encoder for the core's CLIPLoader."""
    folder = server.base / "models" / "text_encoders"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(text_encoder(), folder / CLIP)
    return CLIP


def own(**options) -> dict:
    """A graph without a prompt."""
    return graph(model=NAME, color_fix="auto", fidelity=0.0, **options)


def prompted(tokens: int, width: int = WIDTH, **options) -> dict:
    """The graph with noise in place of a text encoder's CONDITIONING."""
    size = {"tokens": tokens, "width": width, "seed": 7}
    return {
        **own(positive=["6", 0], **options),
        "6": {"class_type": "ProbePrompt", "inputs": size},
    }


def written(text: str, clip: str, **options) -> dict:
    """The graph with a text through the core's own nodes."""
    loader = {"clip_name": clip, "type": "stable_diffusion"}
    return {
        **own(positive=["6", 0], **options),
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": text, "clip": ["7", 0]}},
        "7": {"class_type": "CLIPLoader", "inputs": loader},
        "8": {"class_type": "ProbeKeepPrompt", "inputs": {"prompt": ["6", 0], "name": "prompt"}},
    }


def embedding(tokens: int) -> torch.Tensor:
    """What ProbePrompt makes."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(1, tokens, WIDTH, generator=generator)


def succeed(server, prompt):
    result = server.run(prompt)
    assert result.status == "success", result.error
    return result


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def test_a_converted_file_appears_loads_and_runs(server, unprompted):
    names = server.get("/object_info/LoadGenDR")["LoadGenDR"]["input"]["required"]["model"][0]
    assert NAME in names
    result = succeed(server, own())
    expected, report = unprompted
    assert report.plan.work_size == (512, 717)
    torch.testing.assert_close(kept(server), expected, atol=1e-4, rtol=0)
    assert "Apache-2.0 (PiSA-SR) + OpenRAIL++-M (SD2.1-base)" in result.text("5")
    assert "computed at 717x512" in result.text("5")


@pytest.mark.parametrize(("tokens", "node"), [(TOKENS, "GenDRUpscale"), (2 * TOKENS, "TiledGenDR")])
def test_a_conditioning_replaces_the_models_prompt(server, converted, unprompted, tokens, node):
    result = succeed(server, prompted(tokens, node=node))
    expected = converted.restore(noise(), 2.0, fidelity=0.0, prompt=embedding(tokens))
    torch.testing.assert_close(kept(server), expected, atol=1e-4, rtol=0)
    assert f"prompt: {tokens} tokens instead of the model's own" in result.text("5")
    assert apart(expected, unprompted[0]) > 1e-2


def test_a_prompt_leaves_no_trace_in_the_runs_after_it(server, converted):
    pictures = []
    for name in ("before", "after"):
        result = succeed(server, own(name=name))
        assert "3" not in result.messages["execution_cached"]["nodes"]
        assert "prompt:" not in result.text("5")
        pictures.append(kept(server, name))
        succeed(server, prompted(TOKENS))
    assert torch.equal(*pictures)


def test_a_text_through_the_cores_own_nodes(server, converted, unprompted, clip):
    result = succeed(server, written("a red fox in the snow", clip))
    assert f"prompt: {TOKENS} tokens" in result.text("5")
    told = torch.load(server.base / "output" / "prompt.pt")
    assert told.shape == (1, TOKENS, WIDTH)
    # The same embedding in plain Python gives the same picture, and another one than the model's own.
    expected = converted.restore(noise(), 2.0, fidelity=0.0, prompt=told)
    torch.testing.assert_close(kept(server), expected, atol=1e-4, rtol=0)
    assert apart(kept(server), unprompted[0]) > 1e-2


def test_the_cores_empty_text_is_the_prompt_that_conversion_wrote(server, unprompted, clip):
    """ComfyUI's text encoder and transformers', through two readers of the same weights."""
    succeed(server, written("", clip))
    torch.testing.assert_close(kept(server), unprompted[0], atol=1e-3, rtol=0)


def test_a_conditioning_of_another_text_encoder_is_said(server, converted):
    result = server.run(prompted(TOKENS, width=768))
    assert result.status == "error"
    assert f"PiSA-SR reads (1, n, {WIDTH})" in result.error


def test_an_adapter_that_was_not_converted_says_what_to_do(server, converted):
    result = server.run(graph(model="one.pth"))
    assert result.status == "error"
    assert "this is a PiSA-SR adapter, not yet a model: gendr convert one.pth" in result.error

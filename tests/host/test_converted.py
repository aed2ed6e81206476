"""A converted public restorer in a real ComfyUI, with and without a prompt over the wire."""

from __future__ import annotations

import pytest
import restorers
import torch
from test_server import graph, kept, noise

import gendr
from gendr import cli

NAME = "pisa-sr.safetensors"


@pytest.fixture(scope="module")
def converted(server, tmp_path_factory):
    """The file of a narrow PiSA-SR in models/gendr, put there while the server runs."""
    folder = tmp_path_factory.mktemp("pisa")
    base = restorers.save_base(folder / "sd21")
    made = restorers.pisa(folder, base)
    out = server.base / "models" / "gendr" / NAME
    command = ["convert", made.path, "--base", base, "-o", out, "--dtype", "fp32"]
    assert cli.main([str(word) for word in command]) == 0
    (server.base / "models" / "gendr" / "one.pth").write_bytes(made.path.read_bytes())
    return gendr.load(out, device="cpu", dtype="fp32")


def prompted(tokens: int, width: int = restorers.WIDTH, **widgets) -> dict:
    """The graph with noise in place of a text encoder's CONDITIONING."""
    nodes = graph(model=NAME, positive=["6", 0], **widgets)
    size = {"tokens": tokens, "width": width, "seed": 7}
    return {**nodes, "6": {"class_type": "ProbePrompt", "inputs": size}}


def embedding(tokens: int) -> torch.Tensor:
    """What ProbePrompt makes."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(1, tokens, restorers.WIDTH, generator=generator)


def test_a_converted_file_appears_loads_and_runs(server, converted):
    names = server.get("/object_info/LoadGenDR")["LoadGenDR"]["input"]["required"]["model"][0]
    assert NAME in names
    result = server.run(graph(model=NAME, color_fix="auto"))
    assert result.status == "success", result.error
    expected, report = converted.restore_with_report(noise(), 2.0, fidelity=0.0)
    assert report.plan.work_size == (512, 717)
    torch.testing.assert_close(kept(server), expected, atol=1e-4, rtol=0)
    assert "Apache-2.0 (PiSA-SR) + OpenRAIL++-M (SD2.1-base)" in result.text("5")
    assert "computed at 717x512" in result.text("5")


@pytest.mark.parametrize("tokens", [77, 154])
def test_a_conditioning_replaces_the_models_prompt(server, converted, tokens):
    result = server.run(prompted(tokens, color_fix="auto"))
    assert result.status == "success", result.error
    expected = converted.restore(noise(), 2.0, fidelity=0.0, prompt=embedding(tokens))
    torch.testing.assert_close(kept(server), expected, atol=1e-4, rtol=0)
    assert f"prompt: {tokens} tokens instead of the model's own" in result.text("5")
    # Without the wire it is the model's own again.
    assert server.run(graph(model=NAME, color_fix="auto", name="own")).status == "success"
    assert float((kept(server, "own") - expected).abs().max()) > 1e-3


def test_a_conditioning_of_another_text_encoder_is_said(server, converted):
    result = server.run(prompted(77, width=768))
    assert result.status == "error"
    assert "PiSA-SR reads (1, n, 8)" in result.error


def test_an_adapter_that_was_not_converted_says_what_to_do(server, converted):
    result = server.run(graph(model="one.pth"))
    assert result.status == "error"
    assert "this is a PiSA-SR adapter, not yet a model: gendr convert one.pth" in result.error

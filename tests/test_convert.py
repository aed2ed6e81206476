"""`gendr convert` against diffusers and peft: narrow random SD2.1s, each project's own layout."""

from __future__ import annotations

import pytest
import restorers
import torch
from transformers import CLIPTextModel

import gendr
from gendr import cli

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
    "merged osediff": restorers.merged_osediff,
    "hypir": restorers.hypir,
    "omgsr": restorers.omgsr,
}


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """Each project's file, made once."""
    files = {}

    def make(name):
        if name not in files:
            files[name] = MAKERS[name](tmp_path_factory.mktemp("made"), base)
        return files[name]

    return make


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


@pytest.mark.parametrize("name", MAKERS)
def test_the_latent_is_that_of_diffusers_and_peft(
    name, made, base, empty_prompt, picture, tmp_path
):
    source, out = made(name), tmp_path / "out.safetensors"
    assert run(source.path, base, out, "--accept-licence") == 0
    expected = source.latent(picture, empty_prompt)
    assert distance(latent_of(out, picture, fold=True), expected) <= SAME
    assert distance(latent_of(out, picture, fold=False), expected) <= SAME

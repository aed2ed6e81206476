"""Fused operations: the plain way bit for bit, the kernels up to rounding, weights joined in place."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import VAE_, random_network
from torch import nn

from gendr.files import checkpoint
from gendr.networks import fused
from gendr.networks.onestep import fold
from gendr.speed.runners import prepare

ROOT = Path(__file__).resolve().parents[1]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    layer = nn.GroupNorm(groups, channels, eps=1e-6).requires_grad_(False)
    layer.weight.copy_(1 + 0.3 * rand(channels, seed=1))
    layer.bias.copy_(0.3 * rand(channels, seed=2))
    return layer


def test_the_plain_way_is_the_composition():
    x, layer, shift = rand(2, 12, 5, 7), group_norm(3, 12), rand(12, seed=3)
    assert torch.equal(fused.norm(x, layer), F.silu(layer(x)))
    assert torch.equal(fused.norm(x, layer, silu=False), layer(x))
    assert torch.equal(fused.norm(x, nn.Identity()), F.silu(x))
    shifted = F.silu(layer(x + shift[:, None, None]))
    assert torch.equal(fused.norm(x, layer, shift), shifted)
    other = rand(2, 12, 5, 7, seed=4)
    assert torch.equal(fused.add(x, other, shift, None), x + shift[:, None, None] + other)


def test_a_convolution_and_its_bias_apart():
    layer, x = nn.Conv2d(4, 6, 3, stride=2, padding=1).requires_grad_(False), rand(1, 4, 9, 9)
    whole = fused.convolve(layer, x) + layer.bias[:, None, None]
    torch.testing.assert_close(whole, layer(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("vae", [VAE_, None])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_prepared_network_computes_the_same(vae, guidance, plain):
    network = plain.network if vae is None else fold(random_network(prompts=("positive", "null")))
    if vae is None and guidance > 1:
        pytest.skip("the model without norms has one prompt")
    x = rand(2, 3, 96, 96).clamp(-1, 1)
    before = network(x, detail=0.8, guidance=guidance)
    names = list(network.state_dict())
    # Residual blocks too, which a network without kernels leaves alone.
    prepare(network, kernels=True)
    after = network(x, detail=0.8, guidance=guidance)
    assert float((after - before).norm() / before.norm()) <= 1e-5
    assert list(network.state_dict()) == names


def test_projections_are_joined_in_place():
    layers = [nn.Linear(6, 4).requires_grad_(False) for _ in range(3)]
    x = rand(5, 6)
    apart = torch.cat([layer(x) for layer in layers], -1)
    assert fused.joined(*layers) is None
    assert fused.join(*layers)
    weight, bias = fused.joined(*layers)
    assert float((F.linear(x, weight, bias) - apart).abs().max()) <= 1e-6
    # One storage, the layers' own parameters in it: nothing is there twice.
    storages = {layer.weight.untyped_storage().data_ptr() for layer in layers}
    assert storages == {weight.untyped_storage().data_ptr()}
    assert weight.untyped_storage().nbytes() == sum(4 * layer.weight.numel() for layer in layers)
    layers[1].weight[0] = 7.0
    assert bool((fused.joined(*layers)[0][4] == 7).all())


@pytest.mark.parametrize("move", ["one", "all", "cast"])
def test_what_moved_is_not_joined_any_more(move):
    layers = nn.ModuleList(nn.Linear(6, 4, bias=False) for _ in range(3)).requires_grad_(False)
    assert fused.join(*layers)
    if move == "one":
        layers[1].weight = nn.Parameter(layers[1].weight.clone(), requires_grad=False)
    elif move == "all":
        for layer in layers:
            layer.weight.data = layer.weight.clone()
    else:
        layers.to(torch.bfloat16)
    assert fused.joined(*layers) is None


def test_layers_of_a_host_stay_as_they_are():
    class Cast(nn.Linear):
        pass

    assert not fused.join(nn.Linear(2, 2), Cast(2, 2), nn.Linear(2, 2))


def test_a_prepared_model_is_saved_like_another(tiny, tmp_path):
    checkpoint.save(tmp_path / "a.safetensors", tiny.network, tiny.header, dtype="fp32")
    prepare(tiny.network, kernels=True)
    checkpoint.save(tmp_path / "b.safetensors", tiny.network, tiny.header, dtype="fp32")
    (first, tensors), (second, others) = (
        checkpoint.read(tmp_path / f"{name}.safetensors") for name in "ab"
    )
    assert first == second
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def test_trouble_is_named_and_not_raised(monkeypatch):
    reason = fused.trouble.__wrapped__("cpu")
    assert "Triton" in reason
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "gendr.networks.triton_kernels", raising=False)
    assert fused.trouble.__wrapped__("cpu") == "Triton is not installed"
    # A CPU never asks.
    assert not fused.by_kernel(rand(1, 2, 3, 3))


def test_kernels_in_triton_s_interpreter():
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: `pip install triton` to test the kernels")
    command = [sys.executable, str(ROOT / "tests" / "interpreted.py")]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases agree" in done.stdout

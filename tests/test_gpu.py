"""The fast path on a real card, against eager float32. benchmarks/gpu.sh runs this before it measures.

GENDR_GPU_TESTS=cpu runs the same tests on the CPU with a recorder that re-executes (its dry run).
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import UNET, VAE_, header, random_network
from torch import nn

import gendr
from benchmarks.rerun import Rerun
from gendr.files import checkpoint
from gendr.networks import fused
from gendr.speed import runners as speed
from gendr.speed.graphs import CudaRecorder, Graphs, Stamp
from train.tiny.adversary import Adversary, Discriminator, FeatureDiscriminator
from train.tiny.perceptual import Perceptual
from train.tiny.recorded import SIGHTS, Recorded
from train.tiny.settings import Settings
from train.tiny.step import Objective

REHEARSAL = os.environ.get("GENDR_GPU_TESTS") == "cpu"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (REHEARSAL or torch.cuda.is_available()),
        reason="no CUDA card: benchmarks/gpu.sh runs these on one, GENDR_GPU_TESTS=cpu rehearses",
    ),
]


@pytest.fixture(autouse=True)
def poison():
    """Memory that nobody wrote is NaN, so that a result which reads it can't pass."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A checkpoint with every kind of layer: norms, attention in both networks, two prompts."""
    vae = replace(VAE_, patch_size=1, block_out_channels=(32, 32, 64), shift_factor=0.1)
    unet = replace(UNET, block_out_channels=(64, 96), head_dim=32)
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    network = random_network(vae, unet, prompts=("positive", "negative"))
    checkpoint.save(path, network, header(network), dtype="fp32")
    return path


def load(file, dtype: str = "fp32", speed_: str = "eager") -> gendr.GenDR:
    model = gendr.load(file, device=DEVICE, dtype=dtype, speed=speed_)
    if REHEARSAL and speed_ == "graph":
        model.runner = speed.Graphed(model.network, DEVICE, recorder=Rerun())
        model.speed = speed.Speed("graph")
    assert model.speed.name == speed_
    return model


def fresh(*shape: int) -> torch.Tensor:
    """Another input each time."""
    return torch.rand(shape)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    assert bool(torch.isfinite(a).all())
    return float((a.double().cpu() - b.double().cpu()).norm() / b.double().cpu().norm())


def test_the_kernels_are_there_and_right():
    if REHEARSAL:
        pytest.skip("kernels need a card; tests/test_fused.py interprets them")
    assert fused.trouble("cuda:0") == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("channels", "groups", "side"),
    [(320, 32, 64), (1920, 32, 16), (1280, 32, 8), (128, 32, 256), (512, 32, 63), (96, 8, 1)],
)
def test_norms_and_sums_of_real_shapes(dtype, order, channels, groups, side):
    if REHEARSAL and (side > 64 or dtype != torch.float32):
        pytest.skip("too slow for a rehearsal")
    # Every kind of argument is compiled anew, which takes a second each.
    if not REHEARSAL and dtype != torch.bfloat16 and side not in (16, 63):
        pytest.skip("this shape is tried in bf16")
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    layer = nn.GroupNorm(groups, channels, eps=1e-6, device=DEVICE).requires_grad_(False)
    layer.weight.uniform_(0.5, 1.5)
    layer.bias.normal_()
    x = (torch.randn(2, channels, side, side, device=DEVICE) + 3).to(dtype)
    x = x.contiguous(memory_format=order)
    shift = torch.randn(channels, device=DEVICE).to(dtype)
    with torch.inference_mode():
        exact = x.double() + shift.double()[:, None, None]
        weight, bias = (p.to(dtype).double() for p in (layer.weight, layer.bias))
        exact = F.silu(F.group_norm(exact, groups, weight, bias, layer.eps))
        found = fused.norm(x, layer.to(dtype), shift)
        assert apart(found, exact) <= limit
        assert found.is_contiguous(memory_format=order)
        other = torch.randn_like(x)
        wanted = x.double() + other.double() + shift.double()[:, None, None]
        assert apart(fused.add(x, other, shift), wanted) <= limit


@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 1e-4), ("bf16", 4e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("way", ["eager", "graph", "compile"])
def test_every_way_against_eager_float32(file, dtype, limit, way):
    if REHEARSAL and (way == "compile" or dtype == "bf16"):
        pytest.skip("the rehearsal is about graphs in float32")
    if way == "compile" and dtype == "fp32":
        pytest.skip("a compilation takes a minute: it is tried in bf16")
    exact, model = load(file), load(file, dtype, way)
    for _ in range(4):
        x = fresh(1, 3, 32, 48)
        y, report = model.restore_with_report(x, 4)
        assert apart(y, exact.restore(x, 4)) <= limit
    if way == "graph":
        assert model.runner.graphs.replayed >= 2, report.events
        assert not [event for event in report.events if "graph:" in event]
    if way == "compile":
        assert not [event for event in report.events if "compile:" in event]


def test_a_replay_is_what_eager_gives(file):
    """The same kernels in the same order: bit for bit."""
    model = load(file, "fp32", "graph")
    x = fresh(1, 3, 32, 32)
    first, second, third = (model.restore(x, 4) for _ in range(3))
    assert apart(second, first) <= 1e-6
    assert torch.equal(second, third)


def test_two_shapes_in_turn(file):
    exact, model = load(file), load(file, "fp32", "graph")
    for _ in range(4):
        for size in ((24, 24), (32, 16)):
            x = fresh(1, 3, *size)
            assert apart(model.restore(x, 4), exact.restore(x, 4)) <= 1e-4
    assert len(model.runner.graphs.kept) >= 2


@pytest.mark.parametrize("change", ["moved", "exchanged", "in place", "away and back"])
def test_weights_that_moved_are_never_stale(file, change):
    exact, model = load(file), load(file, "fp32", "graph")
    x = fresh(1, 3, 32, 32)
    for _ in range(3):
        model.restore(x, 4)
    for one in (exact, model):
        conv = one.network.unet.conv_out
        if change == "in place":
            conv.weight.mul_(1.5)
        elif change == "exchanged":
            conv.weight = nn.Parameter(conv.weight * 1.5, requires_grad=False)
        elif change == "moved":
            conv.weight.data = conv.weight * 1.5
        else:
            one.network.to("cpu")
            one.network.to(DEVICE)
            conv.weight.mul_(1.5)
    # What the old weights lay in is overwritten.
    junk = [torch.full((256, 1024), float("nan"), device=DEVICE) for _ in range(64)]
    del junk
    y, report = model.restore_with_report(x, 4)
    assert apart(y, exact.restore(x, 4)) <= 1e-4
    assert any("recorded anew" in event for event in report.events)
    for _ in range(3):
        assert apart(model.restore(x, 4), exact.restore(x, 4)) <= 1e-4


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("settings", [{"tile": 64, "overlap": 16}, {"tile": 64, "tile_batch": 3}])
def test_tiles_under_way_on_the_card_and_through_the_host(file, on_device, settings):
    exact, model = load(file), load(file, "fp32", "graph")
    model.runner.on_device = on_device
    for _ in range(3):
        x = fresh(1, 3, 56, 72)
        y, report = model.restore_with_report(x, 4, **settings)
        assert apart(y, exact.restore(x, 4, **settings)) <= 1e-4
        assert report.tiles > 4


def test_a_tile_that_is_not_finite_is_computed_again(file, monkeypatch):
    exact, model = load(file), load(file, "bf16", "graph")
    real, calls = model.runner.run, []

    def spoilt(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(model.runner, "run", spoilt)
    x = fresh(1, 3, 48, 48)
    # A card takes all tiles at once if it may.
    settings = {"tile": 64, "overlap": 16, "tile_batch": 1}
    y, report = model.restore_with_report(x, 4, **settings)
    assert any("again in fp32" in event for event in report.events)
    assert apart(y, exact.restore(x, 4, **settings)) <= 4e-2


def test_out_of_memory_goes_on(file):
    if REHEARSAL:
        pytest.skip("needs a card's own out-of-memory")
    exact, model = load(file), load(file, "fp32", "graph")
    x = fresh(1, 3, 256, 256)
    small = fresh(1, 3, 32, 32)
    for _ in range(3):
        model.restore(small, 4)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_reserved() + 300 * 2**20
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        y, report = model.restore_with_report(x, 4, tile=1024)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("out of memory" in event for event in report.events)
    assert y.shape == (1, 3, 1024, 1024)
    assert bool(torch.isfinite(y).all())
    for _ in range(3):
        assert apart(model.restore(small, 4), exact.restore(small, 4)) <= 1e-4


def test_what_can_not_be_recorded_runs_eagerly_and_is_named():
    """A wait for the device inside a recording is what breaks it."""
    if REHEARSAL:
        pytest.skip("a CPU records everything")
    network = nn.Linear(4, 4, device=DEVICE).requires_grad_(False)
    told: list[str] = []
    made = Graphs(CudaRecorder(DEVICE), Stamp(network), budget=2**30, is_oom=gendr.devices.is_oom)

    def waits(t):
        return network(t) * float(t.sum().item() > -1e9)

    x = torch.rand(2, 4, device=DEVICE)
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(made.run("k", waits, x, told.append), waits(x))
    assert any("recording failed" in text for text in told)
    # And the card is as usable as before.
    assert bool(torch.isfinite(torch.rand(8, device=DEVICE)).all())


def test_graphs_stay_within_their_budget(file):
    model = load(file, "fp32", "graph")
    graphs = model.runner.graphs
    graphs.budget = 200 * 2**20
    for size in (16, 24, 32, 40, 48, 56):
        for _ in range(3):
            model.restore(fresh(1, 3, size, size), 4)
            assert graphs.recorder.held() <= graphs.budget


def test_a_recorded_step_of_training_is_the_launched_one():
    """Gradients of a small restorer; discriminators are put back to where they were in between."""
    if REHEARSAL:
        pytest.skip("a CPU launches every step")
    torch.manual_seed(0)
    settings = Settings(
        pictures="x", init="x", batch=2, teacher="x", perceptual=1.0, adversarial=0.5, judge="both",
        alone=0, precision="fp32",
    )  # fmt: skip
    stages = Perceptual([nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)]).to(DEVICE)
    network = random_network(VAE_, UNET).requires_grad_(True).to(DEVICE)
    judges = {"features": FeatureDiscriminator([6, 8], width=4), "patch": Discriminator(4)}
    adversaries = {kind: Adversary(judge.to(DEVICE)) for kind, judge in judges.items()}
    objective = Objective(settings, network, stages, adversaries)
    parameters = [p for p in network.parameters() if p.requires_grad]

    def changed() -> list[torch.Tensor]:
        return [t for adversary in adversaries.values() for t in adversary.tensors()]

    recorded = Recorded(objective.take, parameters, changed)
    for number in range(SIGHTS + 4):
        parts = {name: torch.rand(2, 3, 64, 64) * 2 - 1 for name in ("hr", "input", "teacher")}
        batch = objective.prepared({k: v.to(DEVICE) for k, v in parts.items()}, number)
        earlier = [t.detach().clone() for t in changed()]
        found = float(recorded.take(batch, "pulling").loss)
        gradients = [p.grad.clone() for p in parameters]
        if number:  # before the first step the optimizers have no state
            with torch.no_grad():
                for tensor, value in zip(changed(), earlier, strict=True):
                    tensor.copy_(value)
            wanted = recorded.launched(batch, "pulling")
        else:
            continue
        assert found == pytest.approx(float(wanted.loss), rel=1e-4)
        for p, gradient in zip(parameters, gradients, strict=True):
            assert apart(gradient, p.grad) <= 1e-2 or float(p.grad.norm()) < 1e-6
    assert not recorded.off
    assert "pulling" in recorded.kept

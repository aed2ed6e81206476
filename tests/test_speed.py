"""Graphs by key and stamp, ways that are not available, transfers, and the plan that belongs to them."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import random_network
from torch import nn

import gendr
from benchmarks.rerun import Rerun
from gendr import plan
from gendr.networks.onestep import StepConfig, fold
from gendr.settings import SPEEDS, Settings
from gendr.speed import graphs
from gendr.speed import runners as speed
from gendr.speed.graphs import Graphs, Stamp
from gendr.speed.transfer import Transfer
from gendr.tiles import fit_grid, recovering, tiled

CPU = torch.device("cpu")
GIB = 2**30


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


class Card:
    """Graphs over a small network with a recorder that re-executes; counts what it is asked."""

    def __init__(self, budget: int = 10**9, recorder: Rerun | None = None):
        self.network = nn.Linear(4, 4).requires_grad_(False)
        self.recorder = recorder or Rerun()
        self.graphs = Graphs(
            self.recorder,
            Stamp(self.network),
            budget=budget,
            is_oom=lambda e: isinstance(e, MemoryError),
        )
        self.told: list[str] = []

    def run(self, x: torch.Tensor, key: str = "pass") -> torch.Tensor:
        return self.graphs.run(key, lambda t: self.network(t), x, self.told.append)

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.graphs.eager, self.graphs.recorded, self.graphs.replayed


# ---- graphs ----


def test_a_shape_is_recorded_when_it_comes_again():
    card = Card()
    for n in range(4):
        x = rand(2, 4, seed=n)
        assert torch.equal(card.run(x), card.network(x))
    assert card.counts == (1, 1, 3)
    assert not card.told


def test_results_outlive_the_next_replay():
    card = Card()
    inputs = [rand(2, 4, seed=n) for n in range(5)]
    results = [card.run(x) for x in inputs]
    for x, y in zip(inputs, results, strict=True):
        assert torch.equal(y, card.network(x))


def test_two_shapes_and_two_settings_are_apart():
    card = Card()
    for n in range(6):
        for x in (rand(2, 4, seed=n), rand(3, 4, seed=n)):
            assert torch.equal(card.run(x), card.network(x))
    assert len(card.graphs.kept) == 2
    card.run(rand(2, 4), key="another")
    card.run(rand(2, 4), key="another")
    assert len(card.graphs.kept) == 3
    # A dtype and an order in memory are parts of the key, too.
    card.network.double()
    for _ in range(2):
        card.run(rand(2, 4).double())
    assert len(card.graphs.kept) == 1


def _in_place(network):
    network.weight.mul_(2)


def _moved(network):
    network.weight.data = network.weight.clone() + 1


def _exchanged(network):
    network.weight = nn.Parameter(network.weight + 1, requires_grad=False)


@pytest.mark.parametrize("change", [_in_place, _moved, _exchanged])
def test_weights_that_changed_are_never_replayed(change):
    card = Card()
    x = rand(2, 4)
    for _ in range(3):
        card.run(x)
    before = card.graphs.recorded
    change(card.network)
    assert torch.equal(card.run(x), card.network(x))
    assert card.graphs.recorded == before + 1
    assert card.told == ["the weights have moved or changed: graphs are recorded anew"]


def test_an_exchanged_module_is_noticed():
    network = nn.Sequential(nn.Linear(2, 2), nn.SiLU()).requires_grad_(False)
    stamp = Stamp(network)
    before = stamp.now()
    assert stamp.now() == before
    network[1] = nn.ReLU()
    assert stamp.now() != before
    assert stamp.elsewhere(CPU)


def test_weights_elsewhere_are_not_recorded():
    card = Card()
    card.network.to("meta")
    x = rand(2, 4)
    for _ in range(3):
        card.graphs.run("k", lambda t: t + 1, x, card.told.append)
    assert card.counts == (3, 0, 0)
    assert "not all weights lie on cpu" in card.told[0]


def test_the_least_recently_used_goes_first(monkeypatch):
    monkeypatch.setattr(graphs, "KEEP", 2)
    card = Card()
    for key in ("a", "a", "b", "b", "a", "c", "c"):
        card.run(rand(2, 4), key)
    assert [key[0] for key in card.graphs.kept] == ["a", "c"]


def test_the_pool_stays_within_its_budget():
    """A pool gives nothing back before its last recording is gone: the newest gets one of its own."""
    x = rand(2, 4)
    card = Card(budget=Rerun().cost(x) * 2)
    for key in ("a", "a", "b", "b"):
        card.run(x, key)
    assert card.recorder.held() == card.graphs.budget
    for _ in range(3):
        assert torch.equal(card.run(x, "c"), card.network(x))
    assert card.recorder.held() <= card.graphs.budget
    assert [key[0] for key in card.graphs.kept] == ["c"]
    assert not card.told


def test_a_size_beyond_the_budget_is_refused_once():
    card = Card(budget=10)
    for _ in range(4):
        card.run(rand(2, 4))
    assert card.counts[0] == 4
    assert card.recorder.held() == 0
    assert "more than the" in card.told[0]
    recorded = card.graphs.recorded
    card.run(rand(2, 4))
    assert card.graphs.recorded == recorded


@pytest.mark.parametrize(
    ("error", "words", "tries"),
    [(MemoryError("full"), "not enough memory", 2), (ValueError("no such op"), "no such op", 1)],
)
def test_what_can_not_be_recorded_runs_eagerly(error, words, tries):
    class Broken(Rerun):
        asked = 0

        def record(self, fn, x):
            self.asked += 1
            raise error

    card = Card(recorder=Broken())
    for size in (2, 2, 2, 3, 3, 3):
        x = rand(size, 4)
        assert torch.equal(card.run(x), card.network(x))
    assert words in card.told[0]
    # Memory may do for another size; what torch can't record, it can't record in any.
    assert card.recorder.asked == tries


def test_out_of_memory_under_another_error_is_out_of_memory():
    class Broken(Rerun):
        def record(self, fn, x):
            try:
                raise MemoryError
            finally:
                raise RuntimeError("capture was invalidated")

    card = Card(recorder=Broken())
    for _ in range(2):
        card.run(rand(2, 4))
    assert not card.graphs.off
    assert "not enough memory" in card.told[0]


def test_out_of_memory_in_a_replay_lets_go_of_everything():
    card = Card()
    x = rand(2, 4)
    for _ in range(2):
        card.run(x)
    kept = next(iter(card.graphs.kept.values()))

    def full(x):
        raise MemoryError

    kept.replay = full
    assert torch.equal(card.run(x), card.network(x))
    assert not card.graphs.kept
    assert "freed all recorded CUDA graphs" in card.told[0]


# ---- ways to run ----


def graphed(model: gendr.GenDR) -> Rerun:
    """Give a CPU's model the fast path of a card."""
    recorder = Rerun()
    model.runner = speed.Graphed(model.network, CPU, recorder=recorder)
    model.speed = speed.Speed("graph")
    return recorder


@pytest.mark.parametrize(
    "settings", [{}, {"tile": 64, "overlap": 16}, {"tile": 512}, {"tile": 64, "tile_batch": 3}]
)
def test_the_fast_path_restores_the_same(tiny_checkpoint, settings):
    eager, fast = (gendr.load(tiny_checkpoint, device="cpu", dtype="fp32") for _ in range(2))
    graphed(fast)
    for seed in range(3):
        x = rand(2, 3, 40, 52, seed=seed)
        y, report = fast.restore_with_report(x, 3, **settings)
        assert float((y - eager.restore(x, 3, **settings)).abs().max()) <= 1e-4
    assert report.speed == "graph"
    assert fast.runner.graphs.replayed > 0
    assert "replayed" in str(report)


def test_detail_and_guidance_are_baked_apart(tiny_checkpoint):
    eager, fast = (gendr.load(tiny_checkpoint, device="cpu", dtype="fp32") for _ in range(2))
    graphed(fast)
    x = rand(1, 3, 16, 16)
    for _ in range(3):
        for settings in ({"detail": 0.5}, {"detail": 1.2}, {"guidance": 3.0}):
            wanted = eager.restore(x, 2, **settings)
            assert float((fast.restore(x, 2, **settings) - wanted).abs().max()) <= 1e-4


def test_patched_weights_show_in_the_next_picture(tiny_checkpoint):
    eager, fast = (gendr.load(tiny_checkpoint, device="cpu", dtype="fp32") for _ in range(2))
    graphed(fast)
    x = rand(1, 3, 16, 16)
    for _ in range(3):
        fast.restore(x, 2)
    for model in (eager, fast):
        model.network.unet.conv_out.weight.mul_(1.5)
    y, report = fast.restore_with_report(x, 2)
    assert float((y - eager.restore(x, 2)).abs().max()) <= 1e-4
    assert any("recorded anew" in event for event in report.events)


def test_nan_of_a_replay_is_computed_again(tiny):
    x = rand(1, 3, 40, 40)
    wanted = tiny.restore(x, 3, tile=64, overlap=16)
    graphed(tiny)
    real, calls = tiny.runner.graphs.run, []

    def spoilt(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 2 else 1)

    tiny.runner.graphs.run = spoilt
    tiny.precision = replace(tiny.precision, name="bf16")
    y, report = tiny.restore_with_report(x, 3, tile=64, overlap=16)
    assert any("again in fp32" in event for event in report.events)
    assert float((y - wanted).abs().max()) <= 1e-4


def test_running_out_of_memory_lets_go_of_the_graphs(tiny, monkeypatch):
    recorder = graphed(tiny)
    forgotten = []
    monkeypatch.setattr(recorder, "forget", lambda: forgotten.append(1))
    real = tiny.network.decode

    def small_card(z):
        if z.shape[-1] > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(z)

    monkeypatch.setattr(tiny.network, "decode", small_card)
    y, report = tiny.restore_with_report(rand(1, 3, 32, 48), 4, tile=128, overlap=32)
    assert y.shape == (1, 3, 128, 192)
    assert forgotten
    assert any("going on with at most" in event for event in report.events)


@pytest.mark.parametrize("wanted", SPEEDS)
def test_what_can_not_be_had_is_named(tiny_checkpoint, wanted):
    model = gendr.load(tiny_checkpoint, device="cpu", dtype="fp32", speed=wanted)
    plain = gendr.load(tiny_checkpoint, device="cpu", dtype="fp32")
    if wanted == "compile":
        assert model.speed.name == "compile"
        return
    y, report = model.restore_with_report(rand(1, 3, 9, 9), 2)
    assert torch.equal(y, plain.restore(rand(1, 3, 9, 9), 2))
    assert report.speed == "eager"
    said = [event for event in report.events if "graphs need an NVIDIA card" in event]
    assert bool(said) == (wanted == "graph")


def test_auto_is_what_was_measured_and_a_host_comes_first(monkeypatch):
    network, cuda = fold(random_network()), torch.device("cuda")
    assert set(speed.AUTO.values()) == {"eager"}
    assert str(speed.choose("auto", cuda, network)) == "eager"
    assert speed.choose("graph", cuda, network).name == "graph"
    for wanted in ("graph", "compile"):
        chosen = speed.choose(wanted, cuda, network, casts=True)
        assert chosen.name == "eager"
        assert "moves this model's weights itself" in chosen.reason
        assert "not folded" in speed.choose(wanted, cuda, random_network()).reason
    monkeypatch.setitem(speed.AUTO, "cuda", "graph")
    assert speed.choose("auto", cuda, network).name == "graph"
    # Nobody asked, so nothing is to be explained.
    assert str(speed.choose("auto", cuda, network, casts=True)) == "eager"
    with pytest.raises(ValueError, match="speed must be one of auto, eager, graph, compile"):
        speed.choose("warp", CPU, network)


def test_a_host_s_layers_are_left_alone(tiny_checkpoint):
    model = gendr.load(tiny_checkpoint, device="cpu", dtype="fp32", operations=nn, speed="graph")
    assert type(model.runner) is speed.Eager
    assert not any(getattr(m, "fast", False) for m in model.network.modules())
    _, report = model.restore_with_report(rand(1, 3, 9, 9), 2)
    assert any("the host moves" in event for event in report.events)


# ---- the compiler ----


def test_a_compiler_that_fails_is_named(tiny_checkpoint, monkeypatch):
    def broken(fn, **_):
        def call(*_):
            raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    model = gendr.load(tiny_checkpoint, device="cpu", dtype="fp32", speed="compile")
    x = rand(1, 3, 9, 9)
    y, report = model.restore_with_report(x, 2)
    assert torch.equal(y, gendr.load(tiny_checkpoint, device="cpu", dtype="fp32").restore(x, 2))
    assert any("no working C++ compiler" in event for event in report.events)
    assert "forward" not in vars(model.network.unet)


def test_the_compiled_functions_are_used_and_taken_away(tiny_checkpoint, monkeypatch):
    calls = []

    def counting(fn, **options):
        assert options == {"dynamic": False}
        return lambda *args: calls.append(1) or fn(*args)

    monkeypatch.setattr(torch, "compile", counting)
    monkeypatch.setattr(speed, "COMPILED_SIZES", 1)
    model = gendr.load(tiny_checkpoint, device="cpu", dtype="fp32", speed="compile")
    model.restore(rand(1, 3, 16, 16), 2)
    assert len(calls) == 3
    copied = copy.deepcopy(model.network)
    assert "forward" not in vars(copied.unet)
    _, report = model.restore_with_report(rand(1, 3, 40, 16), 2)
    assert len(calls) == 3
    assert any("more than 1 sizes" in event for event in report.events)


@pytest.mark.slow
def test_compiled_for_real(tiny_checkpoint):
    """Skipped, too, where there is no C++ compiler to call."""
    model = gendr.load(tiny_checkpoint, device="cpu", dtype="fp32", speed="compile")
    x = rand(1, 3, 16, 16)
    y, report = model.restore_with_report(x, 2)
    if any("the compiler failed" in event for event in report.events):
        pytest.skip(report.events[0])
    wanted = gendr.load(tiny_checkpoint, device="cpu", dtype="fp32").restore(x, 2)
    assert float((y - wanted).abs().max()) <= 1e-4


# ---- transfers ----


@pytest.mark.parametrize("ahead", [0, 1, 2, 9])
@pytest.mark.parametrize("batch", [1, 3])
def test_tiles_under_way_keep_order_and_values(ahead, batch):
    """The same path as on a card, through rooms that are used again and again."""
    x = rand(1, 3, 96, 128)
    grid = fit_grid(96, 128, 32, 8, 8)
    order: list[int] = []

    def plain(tile):
        return tile.sin()

    wanted = tiled(plain, x, grid, batch=batch)
    carrier = Transfer(CPU, ahead=ahead, staged=True)
    most = [0, 0]

    def staged(tile):
        here = carrier.bring(tile)
        tile.fill_(float("nan"))
        y = here.sin()
        wait = carrier.take(y, torch.isfinite(y).all(), CPU)
        y.fill_(float("nan"))
        most[0] += 1
        most[1] = max(most)

        def finish():
            most[0] -= 1
            result, fine = wait()
            assert fine
            return result

        return finish

    found = tiled(
        staged, x, grid, batch=batch, ahead=ahead, after=lambda i, n, out: order.append(i)
    )
    assert torch.equal(found, wanted)
    assert order == list(range(len(grid)))
    assert most[1] == min(ahead + 1, -(-len(grid) // batch))


def test_what_is_not_finite_is_noticed_late_but_noticed():
    carrier = Transfer(CPU, ahead=1, staged=True)
    y = torch.tensor([1.0, float("inf")])
    assert carrier.take(y, torch.isfinite(y).all(), CPU)()[1] is False


def test_memory_that_runs_out_under_way_is_mended():
    x, events = rand(1, 1, 64, 64), []

    def late(tile):
        def finish():
            if tile.shape[-1] > 40:
                raise MemoryError
            return tile * 2

        return finish

    run = recovering(
        late,
        minimum=8,
        multiple=8,
        is_oom=lambda e: isinstance(e, MemoryError),
        on_event=events.append,
    )
    grid = fit_grid(64, 64, 64, 0, 8)
    assert torch.allclose(tiled(run, x, grid, ahead=1), x * 2)
    assert len(events) == 1


# ---- the plan ----


def planned(size: int, free: float, **options) -> plan.Plan:
    facts = {"speed": "graph", "on_device": True, **options.pop("facts", {})}
    return plan.make(
        StepConfig(),
        Settings(scale=1, **options),
        size,
        size,
        images=1,
        train_tile=512,
        free=int(free * GIB),
        bytes_each=2,
        dtype="bf16",
        device="cuda",
        batched=True,
        guidance=1.0,
        **facts,
    )


def test_a_fast_plan_for_a_large_card():
    one = planned(1024, 70)
    assert (one.mode, one.strips, one.on_device) == ("latent_tiles", False, True)
    assert one.tiles % one.tile_batch == 0
    four = planned(4096, 8, tile=768)
    assert (four.mode, four.tiles, four.tile_batch, four.on_device) == ("tiles", 49, 7, True)
    assert four.bytes_needed <= four.free_bytes
    eager = planned(1024, 70, facts={"speed": "eager", "on_device": False})
    assert (eager.mode, eager.strips, eager.tile_batch) == ("latent_tiles", True, 1)


def test_what_waits_beside_a_pass_is_counted():
    def needs(speed):
        return planned(512, 70, facts={"speed": speed}).bytes_needed

    assert needs("graph") - needs("eager") == plan.STAGED * 3 * 4 * 512 * 512


def test_a_large_picture_stays_on_the_host_of_a_small_card():
    planes = 3 * 4 * (plan.PLANES + plan.INPUT_PLANES) * 8192 * 8192
    small, large = planned(8192, 4), planned(8192, 12)
    assert not small.on_device
    assert large.on_device
    assert small.bytes_needed < planes < large.bytes_needed <= 12 * GIB
    assert all(p.bytes_needed <= p.free_bytes for p in (small, large))


@pytest.mark.parametrize(
    ("tiles", "most", "batch"), [(49, 8, 7), (9, 8, 3), (121, 8, 8), (4, 8, 4), (7, 8, 7), (1, 8, 1), (64, 8, 8), (13, 8, 7)]
)  # fmt: skip
def test_tiles_are_shared_out_evenly(tiles, most, batch):
    assert plan.even(tiles, most) == batch


def test_less_memory_means_fewer_tiles_at_a_time():
    batches = [planned(4096, free, tile=768).tile_batch for free in (70, 4.5, 3.9)]
    assert batches == sorted(batches, reverse=True)
    assert batches[0] > batches[-1]


def test_a_report_names_the_speed_only_where_there_is_something_to_tell(tiny):
    _, report = tiny.restore_with_report(rand(1, 3, 9, 9), 2)
    assert "eager" not in str(report)
    assert report.as_dict()["speed"] == "eager"
    assert SimpleNamespace(**report.as_dict()).passes == ""

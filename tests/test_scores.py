"""Two adapters on one base, and the heads. Numbers in the names are those of the method's tests."""

import hashlib
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import NARROW
from peft import PeftModel
from stage2 import distillation
from torch.utils.checkpoint import checkpoint

from gendr import schedule
from gendr.files import lora
from gendr.networks.unet import SD21_16, UNet
from train import checkpointing, losses
from train.checkpointing import recompute_blocks
from train.stage2 import discriminator
from train.stage2.discriminator import Discriminator
from train.stage2.scores import ADAPTERS, Scores, frozen

TINY = replace(NARROW, latent_channels=4)
RANK = 4


def base(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return UNet(TINY).to(dtype).requires_grad_(False)


def make(*, awake=True, recompute=False, dtype=torch.float64, prediction="epsilon"):
    """Scores with random adapters (awake), or as they are before the first step (B = 0)."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        found = Scores(
            base(dtype).requires_grad_(),
            lora_rank=RANK,
            lora_alpha=2 * RANK,
            recompute=recompute,
            prediction=prediction,
        )
        if awake:
            for name in ADAPTERS:
                for p in found.parameters_of(name):
                    torch.nn.init.normal_(p, std=0.3)
    return found


@pytest.fixture(scope="module")
def shared():
    """One for all tests that only look."""
    return make()


@pytest.fixture(scope="module")
def asleep():
    return make(awake=False)


def inputs(count=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(8)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "z_g": draw(count, 4, 4, 4),
        "z_h": draw(count, 4, 4, 4),
        "eps": draw(count, 4, 4, 4),
        "t": torch.tensor([300, 500, 40, 900])[:count],
        "prompt": draw(1, 3, 6),
        "null": draw(1, 3, 6),
    }


def joint(found, x, config, *, kappa_real=2.0, kappa_fake=2.0, w=None):
    """Loss and gradient at z_g through both networks at once, without the vector-Jacobian form."""
    z_g = x["z_g"].clone().requires_grad_()
    a, b = schedule.levels(x["t"], z_g)
    z_t = schedule.add_noise(z_g, x["eps"], a, b)
    with frozen(found):
        f_real, f_fake = (
            found.guided(z_t, x["t"], x["prompt"], name, null=x["null"], kappa=kappa)
            for name, kappa in (("real", kappa_real), ("fake", kappa_fake))
        )
        loss = losses.distillation(f_real, f_fake, z_g, x["z_h"], config, w)
        return loss.detach(), torch.autograd.grad(loss, z_g)[0]


def digest(parameters):
    data = b"".join(p.detach().cpu().numpy().tobytes() for p in parameters)
    return hashlib.sha256(data).hexdigest()


def base_of(found):
    return [p for n, p in found.named_parameters() if ".lora_" not in n]


def relative(x, y):
    return ((x - y).norm() / y.norm()).item()


def test_adapters_of_the_full_network_have_the_published_size():
    with torch.device("meta"):
        found = Scores(UNet(SD21_16), lora_rank=64, lora_alpha=128, prediction="epsilon")
    for name in ADAPTERS:
        assert len(found.parameters_of(name)) == 2 * 258
        assert sum(p.numel() for p in found.parameters_of(name)) == 64_899_072
    assert sum(p.numel() for p in base_of(found)) == 865_979_856
    assert {layer.scaling["fake"] for layer in found.layers} == {2.0}
    heads = {n: sum(p.numel() for p in h.parameters()) for n, h in all_heads(SD21_16).items()}
    assert heads["mid"] == 919_297
    assert sum(heads.values()) == 4_186_885


def all_heads(config):
    return Discriminator(config, at=tuple(discriminator.places(config)), width=256).heads


def test_only_adapters_learn(shared):
    trained = {n for n, p in shared.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in shared.named_parameters() if ".lora_" in n}
    with shared.use("fake"):
        assert shared.selected == "fake"
        with shared.use("real"), pytest.raises(ZeroDivisionError), shared.use(None):
            _ = 1 / 0
        assert shared.selected == "fake"
        assert trained == {n for n, p in shared.named_parameters() if p.requires_grad}
    assert shared.selected is None


def test_07_guidance(shared, asleep):
    x = inputs()
    z, t, prompt, null = x["z_g"], x["t"], x["prompt"], x["null"]
    plain = shared.guided(z, t, prompt, "real")
    assert torch.equal(shared.guided(z, t, prompt, "real", null=null, kappa=1.0), plain)
    empty = shared.guided(z, t, null, "real")
    for kappa in (0.0, 2.0, 7.5):
        expected = empty + kappa * (plain - empty)
        found = shared.guided(z, t, prompt, "real", null=null, kappa=kappa)
        assert relative(found, expected) < 1e-12
        same = shared.guided(z, t, prompt, "real", null=prompt, kappa=kappa)
        assert relative(same, plain) < 1e-12
    # Prompts of the samples' own: the batch of two keeps them in order.
    own = torch.cat([prompt, null])
    found = shared.guided(z, t, own, "real", null=null, kappa=3.0)
    assert relative(found[1:], empty[1:]) < 1e-12
    with pytest.raises(ValueError, match="empty prompt"):
        asleep.guided(z, t, prompt, "real", kappa=2.0)


def test_velocity_and_noise_bases_agree():
    """A base read as v is the noise estimate a v + b z_t, in Eq. 2 a z_t - b v."""
    x, found = inputs(), make(awake=False, prediction="v_prediction")
    raw = found.unet(x["z_g"], x["t"], x["prompt"].expand(2, -1, -1))
    a, b = schedule.levels(x["t"], raw)
    clean = found.guided(x["z_g"], x["t"], x["prompt"], "real")
    assert relative(clean, a * x["z_g"] - b * raw) < 1e-12


@pytest.mark.parametrize("kappa", [1.0, 2.0])
@pytest.mark.parametrize("target", ["vsd", "sr", "hr", "hr_st"])
def test_15_equal_scores_give_no_gradient(asleep, target, kappa):
    config = distillation(target=target)
    _, grad = joint(asleep, inputs(), config, kappa_real=kappa, kappa_fake=kappa)
    assert grad.abs().max() < 1e-11


@pytest.mark.parametrize("target", ["vsd", "sr", "hr", "hr_st"])
def test_15_guiding_the_real_score_alone_does(asleep, target):
    _, grad = joint(asleep, inputs(), distillation(target=target), kappa_real=2, kappa_fake=1)
    assert grad.norm() > 1e-3


@pytest.mark.parametrize("target", ["sr", "hr", "hr_st"])
def test_16_finite_differences(shared, target):
    x, config, h = inputs(), distillation(target=target), 1e-5
    a, b = schedule.levels(x["t"], x["z_g"])
    z_t = schedule.add_noise(x["z_g"], x["eps"], a, b)
    f_real = shared.guided(z_t, x["t"], x["prompt"], "real", null=x["null"], kappa=2.0)
    w = losses.omega(x["z_h"], f_real)
    loss, grad = joint(shared, x, config, w=w)
    direction = torch.randn(x["z_g"].shape, generator=torch.Generator().manual_seed(1)).double()
    values = []
    for sign in (1, -1):
        moved = {**x, "z_g": x["z_g"] + sign * h * direction}
        if target == "hr_st":
            # Its gradient is that of a function whose value it does not have: z_h moves along.
            moved["z_h"] = x["z_h"] + sign * h * direction
        values.append(joint(shared, moved, config, w=w)[0].item())
    numeric = (values[0] - values[1]) / (2 * h)
    assert numeric == pytest.approx((grad * direction).sum().item(), rel=1e-5)
    assert loss.isfinite()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kappas", [(2.0, 2.0), (7.5, 1.0)])
@pytest.mark.parametrize(
    ("target", "score_grad"),
    [
        ("vsd", "both"),
        ("sr", "both"),
        ("sr", "real_only"),
        ("sr", "none"),
        ("hr", "both"),
        ("hr_st", "both"),
    ],
)
def test_17_products_equal_joint_autograd(shared, target, score_grad, kappas, recompute):
    x, config = inputs(), distillation(target=target, score_grad=score_grad, xi=1.2)
    kappa = dict(zip(("kappa_real", "kappa_fake"), kappas, strict=True))
    loss, expected = joint(shared, x, config, **kappa)
    found = (recomputing() if recompute else shared).pull(**x, config=config, **kappa)
    assert relative(found.gradient, expected) < 1e-12
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert not found.gradient.requires_grad


_kept = []


def recomputing():
    """As `shared`, with gradient checkpointing; made once."""
    if not _kept:
        _kept.append(make(recompute=True))
    return _kept[0]


def test_17_the_pull_works_without_gradients_around_it(shared):
    x = inputs()
    expected = shared.pull(**x, config=distillation()).gradient
    with torch.no_grad():
        assert torch.equal(shared.pull(**x, config=distillation()).gradient, expected)
    assert all(p.grad is None for p in shared.parameters())


def networks(seed=0):
    """Generator with projector, scores, heads, and one optimiser for each trained part."""
    torch.manual_seed(seed)
    generator, projector = base().requires_grad_(), torch.nn.Linear(8, 5).double()
    found = make()
    heads = Discriminator(TINY, at=("mid",), width=8, groups=2).double()
    for p in heads.parameters():
        torch.nn.init.normal_(p, std=0.3)
    parts = {
        "generator": [*generator.parameters(), *projector.parameters()],
        "real": found.parameters_of("real"),
        "fake": found.parameters_of("fake"),
        "heads": list(heads.parameters()),
        "base": base_of(found),
    }
    return generator, projector, found, heads, parts


def test_21_every_loss_changes_only_its_own():
    generator, projector, found, heads, parts = networks()
    optimizers = {
        n: torch.optim.AdamW(parts[n], lr=1e-3) for n in ("generator", "real", "fake", "heads")
    }
    x = inputs()
    a, b = schedule.levels(x["t"], x["z_h"])
    prompt, t = x["prompt"].expand(2, -1, -1), x["t"]
    taps = []
    generator.down_blocks[0].register_forward_hook(lambda *args: taps.append(args[2][0]))

    def generate():
        return 2 * x["z_g"] - generator(x["z_g"], 500, prompt)

    def noised(z):
        return schedule.add_noise(z, x["eps"], a, b)

    def score(name):
        with torch.no_grad():
            z = generate() if name == "fake" else x["z_h"]
        losses.score_matching(found(noised(z), t, prompt, name), x["eps"], a, b).backward()

    def judge():
        with torch.no_grad():
            z_g = generate()
        logits = [
            heads(discriminator.features(found, noised(z), t, prompt)) for z in (x["z_h"], z_g)
        ]
        losses.discriminator(*logits).backward()

    def restore():
        z_g = generate()
        pulled = found.pull(z_g, x["z_h"], x["eps"], t, distillation(), prompt, null=x["null"])
        with frozen(found, heads):
            seen = discriminator.features(found, noised(z_g), t, prompt)
            adv = losses.adversarial(heads(seen))
            tokens = projector(taps[-1].flatten(2).mT)
            rest = adv + losses.alignment(tokens, torch.ones_like(tokens))
            torch.autograd.backward([z_g, rest], [pulled.gradient, None])

    turns = {
        "fake": lambda: score("fake"),
        "real": lambda: score("real"),
        "heads": judge,
        "generator": restore,
    }
    start = digest(parts["base"])
    for _ in range(5):
        for name, turn in turns.items():
            before = {n: digest(p) for n, p in parts.items()}
            turn()
            touched = {n for n, ps in parts.items() if any(p.grad is not None for p in ps)}
            assert touched == {name}
            # A tap before the end leaves no parameter of its own network without a gradient.
            assert all(p.grad is not None for p in parts[name])
            optimizers[name].step()
            optimizers[name].zero_grad()
            changed = {n for n, p in parts.items() if digest(p) != before[n]}
            assert changed == {name}
    assert digest(parts["base"]) == start


def two_turns(found, x, *, naive=False):
    """Gradient at z of a loss over both adapters, whose backward runs after both forwards."""
    z = x["z_g"].clone().requires_grad_()
    total = 0
    for name in ADAPTERS:
        total = total + found(z, x["t"], x["prompt"], name).square().sum() * (1 + (name == "fake"))
    if naive:
        # What is chosen at the time of the backward pass, as without the right contexts.
        with found.use("fake"):
            return torch.autograd.grad(total, z)[0]
    total.backward()
    return z.grad


def test_22_recomputed_blocks_keep_their_adapter(shared):
    x, found = inputs(), make(recompute=True)
    for p in shared.parameters():
        p.grad = None
    expected = two_turns(shared, x)
    assert relative(two_turns(found, x), expected) < 1e-12
    for name in ADAPTERS:
        for p, q in zip(found.parameters_of(name), shared.parameters_of(name), strict=True):
            assert q.grad.abs().max() > 0
            assert (p.grad - q.grad).abs().max() <= 1e-12 * q.grad.abs().max().clamp_min(1)
            q.grad = None
    # Whatever is chosen at backward time must not matter either.
    assert relative(two_turns(found, x, naive=True), expected) < 1e-12


def test_22_the_naive_form_is_wrong(shared):
    """Guards the test above: without the contexts the error is large, and nothing warns."""
    x, found = inputs(), make()
    recompute_blocks(found.unet, lambda: (nullcontext(), nullcontext()))
    error = relative(two_turns(found, x, naive=True), two_turns(make(), x))
    assert error > 1e-2


def test_22_blocks_really_are_recomputed(monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(args[0])
        return checkpoint(*args, **options)

    monkeypatch.setattr(checkpointing, "checkpoint", counted)
    found, x = make(recompute=True), inputs()
    with torch.no_grad():
        found(x["z_g"], x["t"], x["prompt"], "real")
    assert calls == []
    found(x["z_g"], x["t"], x["prompt"], "real")
    # Two levels down of one block, two up of two, and the middle.
    assert len(calls) == 2 + 4 + 1


def test_22_peft_itself_would_lose_gradients():
    """Guards the reason for `use`: peft's own switch takes the gradient from the other adapter."""
    found = make()
    for layer in found.layers:
        layer.set_adapter("fake")
    assert not any(p.requires_grad for p in found.parameters_of("real"))


def test_23_without_an_adapter_it_is_the_base(shared, asleep):
    x, plain = inputs(), base()
    expected = plain(x["z_g"], x["t"], x["prompt"].expand(2, -1, -1))
    for found in (shared, asleep):
        assert torch.equal(found(x["z_g"], x["t"], x["prompt"], None), expected)
    for name in ADAPTERS:
        assert torch.equal(asleep(x["z_g"], x["t"], x["prompt"], name), expected)
        assert relative(shared(x["z_g"], x["t"], x["prompt"], name), expected) > 1e-2


def test_23_saved_and_loaded(shared, tmp_path):
    shared.save(tmp_path)
    found, x = make(awake=False), inputs()
    found.load(tmp_path)
    for name in ADAPTERS:
        expected = shared(x["z_g"], x["t"], x["prompt"], name)
        assert torch.equal(found(x["z_g"], x["t"], x["prompt"], name), expected)
        # A folder of peft's own, one for each adapter.
        theirs = PeftModel.from_pretrained(base(), str(tmp_path / name))
        out = theirs(x["z_g"], x["t"], x["prompt"].expand(2, -1, -1))
        assert relative(out, expected) < 1e-6
    assert not list(tmp_path.rglob("*.part"))


def test_23_an_adapter_of_another_network_is_named(shared, tmp_path):
    shared.save(tmp_path)
    other = Scores(base(), lora_rank=2, lora_alpha=2 * RANK, prediction="epsilon")
    with pytest.raises(ValueError, match=r"rank 4 and alpha 8, expected 2 and 8"):
        other.load(tmp_path)
    state = shared.adapter_state("real")
    with pytest.raises(ValueError, match=r"another network or rank"):
        other.load_adapter_state("real", state)
    state.pop(next(iter(state)))
    with pytest.raises(ValueError, match=r"is only in the network"):
        shared.load_adapter_state("real", state)


def test_23_merged_equals_unmerged(tmp_path):
    found, x = make(dtype=torch.float32), inputs(dtype=torch.float32)
    found.save(tmp_path)
    plain = base(torch.float32)
    for name in ADAPTERS:
        state, merged = found.adapter_state(name), UNet(TINY)
        merged.load_state_dict(
            lora.merge(plain.state_dict(), lora.read(state, lambda rank: 2 * RANK / rank))
        )
        out = merged(x["z_g"], x["t"], x["prompt"].expand(2, -1, -1))
        assert relative(out, found(x["z_g"], x["t"], x["prompt"], name)) < 1e-5
    assert {layer.scaling["real"] for layer in found.layers} == {2.0}


def test_low_precision_base_ends_in_float32(shared):
    """The last layers of a bf16 base are computed in full, under autocast as well."""
    x, found = inputs(), make(dtype=torch.bfloat16)
    low = {k: v.float() if v.is_floating_point() else v for k, v in x.items()}
    exact = shared(x["z_g"], x["t"], x["prompt"], None)
    assert found.unet.mid_block.resnets[0].conv1.base_layer.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in found.parameters_of("real"))
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            out = found(low["z_g"], low["t"], low["prompt"], None)
            f = found.guided(low["z_g"], low["t"], low["prompt"], "fake")
        assert out.dtype == f.dtype == torch.float32
        assert relative(out.double(), exact) < 0.05
        # Not rounded to eight bits on the way out.
        assert not torch.equal(out, out.bfloat16().float())


def test_features_are_those_of_the_base(shared):
    x, plain = inputs(), base()
    expected = []
    for block in plain.down_blocks:
        block.register_forward_hook(lambda *args: expected.append(args[2][0]))
    plain.mid_block.register_forward_hook(lambda *args: expected.append(args[2]))
    plain(x["z_g"], x["t"], x["prompt"].expand(2, -1, -1))
    with shared.use("fake"):
        found = discriminator.features(shared, x["z_g"], x["t"], x["prompt"])
        assert shared.selected == "fake"
    assert list(found) == list(discriminator.places(TINY)) == ["down0", "down1", "mid"]
    for got, value in zip(found.values(), expected, strict=True):
        assert torch.equal(got, value)
    for name, channels in discriminator.places(TINY).items():
        assert found[name].shape[1] == channels


def test_24_heads_start_silent():
    heads = Discriminator(TINY, at=("down0", "mid"), width=8, groups=2)
    found = {"down0": torch.randn(2, 8, 4, 4), "mid": torch.randn(2, 16, 2, 2)}
    logits = heads(found)
    assert [x.shape for x in logits] == [(2, 1, 4, 4), (2, 1, 2, 2)]
    assert not any(x.any() for x in logits)
    with pytest.raises(ValueError, match=r"down0, down1, mid, not at down3"):
        Discriminator(TINY, at=("down3",), width=8)


def test_25_heads_tell_separable_latents_apart(shared):
    torch.manual_seed(2)
    heads = Discriminator(TINY, at=("mid",), width=8, groups=2).double()
    optimizer = torch.optim.AdamW(heads.parameters(), lr=3e-3)
    direction = torch.zeros(1, 4, 1, 1, dtype=torch.float64)
    direction[:, 0] = 1
    prompt = inputs()["prompt"]

    def latents(count):
        """First real, then fake: their means in one channel are four standard deviations apart."""
        z = torch.randn(2 * count, 4, 4, 4, dtype=torch.float64)
        return torch.cat([z[:count] + 2 * direction, z[count:] - 2 * direction])

    def judge(z):
        t = torch.zeros(len(z), dtype=torch.int64)
        return heads(discriminator.features(shared, z, t, prompt))

    for _ in range(200):
        (logits,) = judge(latents(4))
        loss = losses.discriminator([logits[:4]], [logits[4:]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        real, fake = judge(latents(200))[0].mean((1, 2, 3)).chunk(2)
    assert torch.cat([real > 0, fake < 0]).double().mean() > 0.95
    fakes = latents(100)[100:].requires_grad_()
    with frozen(heads):
        losses.adversarial(judge(fakes)).backward()
    assert (-fakes.grad * direction).sum() > 0


def test_26_the_adversarial_term_reaches_z_g_alone(shared):
    heads = Discriminator(TINY, at=("mid",), width=8, groups=2).double()
    torch.nn.init.normal_(heads.heads["mid"][-1].weight)
    x = inputs()
    z_g = x["z_g"].clone().requires_grad_()
    with frozen(heads, shared):
        found = discriminator.features(shared, z_g, x["t"], x["prompt"])
        losses.adversarial(heads(found)).backward()
    assert z_g.grad.abs().max() > 0
    assert all(p.grad is None for p in (*heads.parameters(), *shared.parameters()))
    assert all(p.requires_grad for p in heads.parameters())


@pytest.mark.parametrize(("recompute", "times"), [(True, 2), (False, 3)])
def test_with_small_graphs_each_score_is_evaluated_once(monkeypatch, recompute, times):
    found, x = make(recompute=recompute), inputs()
    calls, plain = [], Scores.forward
    monkeypatch.setattr(Scores, "forward", lambda *args: calls.append(args[4]) or plain(*args))
    found.pull(**x, config=distillation())
    assert sorted(calls) == sorted(["fake", "real", "fake"][:times])


def test_adapters_under_autocast_need_no_casts_of_their_own():
    """peft's way through float32 and back gives the very same bits, for twice the memory traffic."""
    found, x = make(dtype=torch.bfloat16), inputs(dtype=torch.float32)
    outs = []
    for layer in found.layers:
        layer.cast_input_dtype_enabled = True
    for casts in (True, False):
        found.casts = not casts if casts else True
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            if casts:
                found.casts = False  # as if it had been switched off: the layers still cast
            outs.append(found(x["z_g"], x["t"], x["prompt"], "fake"))
        assert all(layer.cast_input_dtype_enabled == casts for layer in found.layers)
    assert torch.equal(*outs)

"""Two processes take the step that one would: both stages, in one team, since starting one is slow."""

from __future__ import annotations

import json
import shutil

import pytest
import stage1
import stage2
import torch
from two import run_two

from train import cida, repa

IMPORTS = """
import contextlib, io, json, os, sys, torch
sys.path[:0] = ["tests", "."]
import stage1, stage2
from train import cida, repa
from train.processes import Processes, TrainingError
"""
WORKER = """
folder, (phases, split, again, iterations) = sys.argv[1], json.loads(sys.argv[2])
p = Processes("cpu")

# What stops the first process stops all.
assert p.alone(lambda: 7) == (7 if p.first else None)
def fail():
    raise OSError("the disk is full")
try:
    p.alone(fail)
except OSError as error:
    assert p.first
except TrainingError as error:
    assert not p.first and "the disk is full" in str(error)
else:
    sys.exit("went on")
assert p.any(p.first) and not p.any(False)

denoiser, objective = stage1.small()
mine = stage1.cut(stage1.pictures(4, damaged=True), 1)[p.index :: p.count]
stage1.gradients(denoiser, objective, mine)
p.average(denoiser.parameters())
found = stage2.both_phases(stage2.make_iteration(), stage2.samples(4, 1)[p.index :: 2])[1]
if p.first:
    torch.save([x.grad for x in denoiser.parameters()], f"{folder}/stage1.pt")
    torch.save(found, f"{folder}/stage2.pt")
assert repa.main(phases) == 0
assert cida.main(iterations) == 0

# The same, as `accelerate launch --config_file train/recipes/fsdp2.yaml` would start it.
os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
assert repa.main(split) == 0
assert repa.main(again) == 0
with contextlib.redirect_stderr(io.StringIO()) as said:
    assert cida.main(iterations) == 1
assert "stage 2 can't be split by FSDP" in said.getvalue()
"""
# A clip that every gradient is longer than.
STAGE1 = {"phases": "adapt,refine", "steps": "1,1", "clip": 0.05}
STAGE2 = {"steps": 2, "batch": 4, "micro_batch": 2, "validate_every": 9}


def numbers(folder, name):
    lines = (json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if name in line]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Folder of what two processes made, and the words for one to make the same."""
    folder = tmp_path_factory.mktemp("team")
    latent, base = stage1.save_latent(folder), stage2.save_base(folder)
    data = [folder / "pairs1", folder / "pairs2"]
    for path, save in zip(data, (stage1.save_pairs, stage2.save_pairs), strict=True):
        path.mkdir()
        save(path)

    def stage1_words(name):
        return stage1.words(latent, data[0], folder / f"stage1-{name}", **STAGE1)

    def stage2_words(name):
        return stage2.words(base, data[1], folder / f"stage2-{name}", **STAGE2)

    runs = [stage1_words("two"), stage1_words("split"), stage1_words("again"), stage2_words("two")]
    # Split where two whole networks had stopped.
    runs[2] += ["--state", str(folder / "stage1-two" / "state-previous.pt")]
    run_two(IMPORTS, WORKER, [folder, json.dumps(runs)])
    return folder, stage1_words, stage2_words


def test_29_gradients_of_stage_1_are_those_of_one(found):
    folder, *_ = found
    denoiser, objective = stage1.small()
    stage1.gradients(denoiser, objective, [stage1.pictures(4, damaged=True)])
    for mine, p in zip(torch.load(folder / "stage1.pt"), denoiser.parameters(), strict=True):
        assert float((mine - p.grad).abs().max()) <= 1e-10 * float(p.grad.abs().max() + 1e-3)


def weights(folder):
    """All weights of a state as one vector."""
    found = stage1.states(folder)
    return torch.cat([v.flatten().double() for k, v in found.items() if k.startswith("network.")])


@pytest.fixture(scope="module")
def one(found):
    """Folder of what one process makes of stage 1."""
    folder, words, _ = found
    assert repa.main(words("one")) == 0
    return folder / "stage1-one"


@pytest.mark.parametrize("name", ["two", "split", "again"])
def test_29_a_run_of_stage_1_is_that_of_one(found, one, name):
    """The same log, and the same weights but for what Adam makes of rounding: of two whole networks,
    of one that FSDP splits, and of one that it splits from the second step on."""
    other = found[0] / f"stage1-{name}"
    logs = stage1.log(one), stage1.log(other)
    for a, b in zip(logs[0][-len(logs[1]) :], logs[1], strict=True):
        assert a["step"] == b["step"]
        for key in {"loss", "diffusion", "gradient", "val_noise"} & set(a):
            assert b[key] == pytest.approx(a[key], rel=1e-4), key
    mine, whole = weights(other), weights(one)
    assert float((mine - whole).norm() / whole.norm()) < 1e-5
    files = stage1.exported(one), stage1.exported(other)
    assert files[0].keys() == files[1].keys()
    for key, value in files[0].items():
        # In half precision.
        assert torch.allclose(files[1][key].float(), value.float(), atol=2e-3), key


def test_29_one_process_goes_on_where_a_split_run_has_stopped(found, one):
    folder, words, _ = found
    state = folder / "stage1-split" / "state-previous.pt"
    assert torch.load(state, weights_only=True)["step"] == 1
    assert repa.main([*words("on"), "--state", str(state)]) == 0
    mine, whole = weights(folder / "stage1-on"), weights(one)
    assert float((mine - whole).norm() / whole.norm()) < 1e-5


def test_29_gradients_of_stage_2_are_those_of_one(found):
    """Of both phases, in float64."""
    folder, *_ = found
    _, whole = stage2.both_phases(stage2.make_iteration(), stage2.samples())
    assert stage2.largest_difference(torch.load(folder / "stage2.pt"), whole) < 1e-10


def compare_states(one, two):
    """Adam divides rounding by itself where a gradient is nearly zero: weights are compared as a whole."""
    assert set(one) == set(two)
    for part in ("generator", "real", "fake", "heads"):
        a, b = (
            torch.cat([v.flatten().double() for k, v in s.items() if k.startswith(f"{part}.")])
            for s in (one, two)
        )
        assert float((a - b).norm() / a.norm()) < 1e-4


@pytest.mark.threads
def test_29_a_run_of_stage_2_is_that_of_one_which_goes_on_with_it(found):
    folder, _, words = found
    assert cida.main(words("one")) == 0
    one, two, on = (folder / f"stage2-{name}" for name in ("one", "two", "on"))
    compare_states(stage2.state(one), stage2.state(two))
    # One process goes on where two have stopped.
    shutil.copytree(two, on)
    previous = on / "state-previous.pt"
    assert torch.load(previous, weights_only=True)["step"] == 1
    assert cida.main([*words("on"), "--state", str(previous)]) == 0
    compare_states(stage2.state(one), stage2.state(on))
    values, expected = numbers(two, "cid"), numbers(one, "cid")
    assert len(values) == 2
    for name in ("adv", "mse", "score_fake", "score_real", "discriminator"):
        assert values[1][name] == pytest.approx(expected[1][name], rel=1e-3)
    # `cid` is the mean of terms of size `d` and of both signs, which nearly cancel: its rounding
    # is relative to `d`.
    assert values[1]["cid"] == pytest.approx(expected[1]["cid"], abs=1e-3 * expected[1]["d"])

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

WORKER = """
import json, sys, torch
sys.path[:0] = ["tests", "."]
import stage1, stage2
from train import cida, repa
from train.processes import Processes, TrainingError

folder, phases, iterations = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
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
"""
STAGE1 = {"phases": "full,refine", "steps": "1,1"}
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

    run_two(WORKER, [folder, json.dumps(stage1_words("two")), json.dumps(stage2_words("two"))])
    return folder, stage1_words, stage2_words


def test_29_gradients_of_stage_1_are_those_of_one(found):
    folder, *_ = found
    denoiser, objective = stage1.small()
    stage1.gradients(denoiser, objective, [stage1.pictures(4, damaged=True)])
    for mine, p in zip(torch.load(folder / "stage1.pt"), denoiser.parameters(), strict=True):
        assert float((mine - p.grad).abs().max()) <= 1e-10 * float(p.grad.abs().max() + 1e-3)


def test_29_a_run_of_stage_1_is_that_of_one(found):
    """The same log, and the same weights but for what Adam makes of rounding."""
    folder, words, _ = found
    assert repa.main(words("one")) == 0
    one, two = folder / "stage1-one", folder / "stage1-two"
    for a, b in zip(stage1.log(one), stage1.log(two), strict=True):
        for name in {"loss", "diffusion", "gradient", "val_noise"} & set(a):
            assert b[name] == pytest.approx(a[name], rel=1e-4), name
    flat = [
        torch.cat([v.flatten().double() for k, v in s.items() if k.startswith("network.")])
        for s in (stage1.states(one), stage1.states(two))
    ]
    assert float((flat[0] - flat[1]).norm() / flat[0].norm()) < 1e-5


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

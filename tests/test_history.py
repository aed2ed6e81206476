"""What a run keeps: states, settings that may change, averages every few steps, files with usual modes."""

from __future__ import annotations

import errno
import json
import os
import stat
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from train.atomic import NotWritten, program, replacing, writing
from train.run import Average, Run, TrainingError, rate


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_files_get_the_usual_mode_whoever_writes_them(tmp_path):
    (tmp_path / "plain").write_text("")
    with replacing(tmp_path / "private") as part:
        os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))
    assert mode(tmp_path / "private") == mode(tmp_path / "plain")


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with replacing(path) as part:
            part.write_text("new")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def state(run, name="state.pt"):
    return torch.load(run.folder / name, weights_only=True)["step"]


def test_the_state_before_the_last_one_stays_and_can_be_resumed(tmp_path):
    run, module = Run(tmp_path, {}), nn.Linear(1, 1)
    for step in (1, 2, 3):
        nn.init.constant_(module.weight, step)
        run.save_parts(step, module=module)
    assert (state(run), state(run, "state-previous.pt")) == (3, 2)
    assert run.load_parts(tmp_path / "state-previous.pt", module=module) == 2
    assert float(module.weight) == 2
    with pytest.raises(TrainingError, match="there is no state"):
        run.load_parts(tmp_path / "none.pt", module=module)


def test_a_state_of_other_networks_is_a_sentence(tmp_path):
    Run(tmp_path, {}).save_parts(1, module=nn.Linear(1, 1))
    run = Run(tmp_path, {})
    with pytest.raises(
        TrainingError, match=r"the module of .*state\.pt is of another version or of"
    ):
        run.load_parts(module=nn.Linear(2, 1))
    with pytest.raises(TrainingError, match="holds no other"):
        run.load_parts(other=nn.Linear(1, 1))


def test_a_state_of_a_bad_stretch_does_not_replace_the_good_one(tmp_path):
    run, module = Run(tmp_path, {}), nn.Linear(1, 1)
    run.accept(1.0)
    run.save_parts(1, module=module)
    for step in (2, 3, 4):
        run.accept(100.0)
        run.save_parts(step, module=module)
    assert (state(run), state(run, "state-previous.pt")) == (4, 1)
    # And a run that was resumed in it remembers.
    again = Run(tmp_path, {})
    again.load_parts(module=module)
    again.accept(100.0)
    again.save_parts(5, module=module)
    assert (state(again), state(again, "state-previous.pt")) == (5, 1)


def test_divergence_names_the_command_that_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("train.run.DIVERGED_STEPS", 2)
    run = Run(tmp_path, {"lr": 1.0})
    run.accept(1.0)
    run.accept(100.0)
    with pytest.raises(TrainingError, match=r"--state .*state-previous\.pt --accept lr --lr"):
        run.accept(100.0)
    with pytest.raises(TrainingError, match="another lr"):
        Run(tmp_path, {"lr": 0.5})
    Run(tmp_path, {"lr": 0.5}, accept=("lr",))
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.5


def test_a_state_is_due_by_steps_or_by_minutes(tmp_path):
    run = Run(tmp_path, {})
    assert [run.due(step, 3, 0.0) for step in (1, 2, 3)] == [False, False, True]
    assert not run.due(1, 1000, 5.0)
    run.saved_at = time.monotonic() - 301
    assert run.due(1, 1000, 5.0)
    run.save_parts(1)
    assert not run.due(2, 1000, 5.0)


def test_an_average_every_few_steps_takes_their_decay(monkeypatch):
    """Where the weights stand still between updates, once with decay^k is k times with decay."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    each, seldom = Average(module, 0.9), Average(module, 0.9, every=4)
    for kept in (each, seldom):
        # Behind the warm-up, where the decay is the one asked for.
        kept.steps = 10_000
    nn.init.ones_(module.weight)
    for _ in range(8):
        each.update()
        seldom.update()
    a, b = (float(k.shadow[0]) for k in (each, seldom))
    assert a == pytest.approx(1 - 0.9**8, rel=1e-5)
    assert b == pytest.approx(a, rel=1e-5)


def test_an_average_begins_as_the_weights_and_forgets_more_slowly_with_every_step():
    """The decay of step n is 1 - n^-.75, until that is more than the one asked for."""
    module = nn.Linear(1, 1, bias=False)
    kept, expected = Average(module, 0.6), 0.0
    for n in range(1, 7):
        nn.init.constant_(module.weight, n * n)
        kept.update()
        decay = min(0.6, 1 - n**-0.75)
        expected = decay * expected + (1 - decay) * n * n
        assert float(kept.shadow[0]) == pytest.approx(expected, rel=1e-6)


def test_an_average_resumes_in_the_middle_of_its_steps():
    module = nn.Linear(1, 1)
    whole, part = Average(module, 0.9, every=3), Average(module, 0.9, every=3)
    for n in range(7):
        nn.init.constant_(module.weight, n)
        whole.update()
        part.update()
        if n == 3:
            again = Average(module, 0.9, every=3)
            again.load_state_dict(part.state_dict())
            part = again
    assert torch.equal(whole.shadow[0], part.shadow[0])


@pytest.mark.parametrize("kind", ["constant_with_warmup", "cosine"])
def test_no_step_is_taken_at_a_rate_of_zero(kind):
    rates = [rate(2.0, n, kind=kind, warmup=4, steps=20) for n in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert min(rates) > 0
    assert rates[4] == 2.0
    assert (rates[-1] == 2.0) == (kind == "constant_with_warmup")
    assert rate(1.0, 0, kind=kind, warmup=0, steps=5) == 1.0


@pytest.fixture
def small_disk():
    """No file grows beyond 20 kB, as on a disk that is full then."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS = {
    "text": lambda part: part.write_text("x" * 50_000),
    "torch": lambda part: torch.save({"x": torch.zeros(50_000)}, part),
    "safetensors": lambda part: save_file({"x": torch.zeros(50_000)}, part),
    "numpy": lambda part: np.save(part.open("wb"), np.zeros(50_000)),
    "picture": lambda part: Image.effect_noise((300, 300), 99).save(part, "PNG"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_one_sentence_and_keeps_what_was_saved(tmp_path, small_disk, kind):
    path = tmp_path / "state"
    path.write_bytes(b"before")
    told = r"state can't be written \(.+\): make room or choose another folder; what was saved"
    with pytest.raises(NotWritten, match=told), replacing(path) as part:
        WRITERS[kind](part)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"state": b"before"}


def test_a_program_ends_with_that_sentence(tmp_path, capsys):
    def main():
        with writing(tmp_path / "log"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert program("train.x", main) == 1
    assert capsys.readouterr().err.startswith(f"train.x: {tmp_path / 'log'} can't be written (No")


def test_a_bug_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), replacing(tmp_path / "x"):
        raise RuntimeError("shapes differ")


def test_half_a_state_is_named(tmp_path):
    run = Run(tmp_path / "run", {})
    run.save({"step": 1, "x": torch.zeros(1000)})
    run.state_path.write_bytes(run.state_path.read_bytes()[:2000])
    with pytest.raises(TrainingError, match=r"state\.pt is no whole state of a run"):
        run.load()


def test_a_rate_by_time_follows_the_part_that_is_over_and_not_the_steps():
    rates = [rate(2.0, 500, kind="cosine", warmup=4, steps=10, done=d) for d in (0.0, 0.5, 1.0)]
    assert rates == pytest.approx([2.0, 1.0, 0.0])
    # The first steps are warm-up all the same.
    assert rate(2.0, 1, kind="cosine", warmup=4, steps=10, done=0.0) == 1.0


def test_a_run_knows_how_much_of_its_hours_is_over(tmp_path, monkeypatch):
    run = Run(tmp_path, {})
    assert run.spent() == 0  # no end
    now = time.monotonic()
    run.began, run.until = now, now + 100
    for seconds, part in ((25, 0.25), (100, 1.0), (140, 1.0)):
        monkeypatch.setattr(time, "monotonic", lambda at=now + seconds: at)
        assert run.spent() == pytest.approx(part)

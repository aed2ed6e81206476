"""Device, precision and memory: chosen by what is there."""

from __future__ import annotations

import pytest
import torch

from gendr import devices
from gendr.devices import choose_device, choose_precision, free_bytes, is_oom

CPU = torch.device("cpu")


def probes(monkeypatch, **answers):
    monkeypatch.setattr(devices, "probe", lambda device, name: answers[name])


def test_auto_takes_what_the_probe_shows(monkeypatch):
    probes(monkeypatch, bf16=(True, 2.0))
    assert choose_precision(CPU).name == "bf16"
    probes(monkeypatch, bf16=(True, 0.4))
    assert choose_precision(CPU).name == "fp32"
    assert "0.4x" in choose_precision(CPU).reason
    probes(monkeypatch, bf16=(False, 9.0), fp16=(True, 2.0))
    chosen = choose_precision(torch.device("cuda"))
    assert (chosen.name, chosen.unet, chosen.vae) == ("fp16", torch.float16, torch.float32)


def test_the_autoencoder_never_runs_in_fp16(monkeypatch):
    probes(monkeypatch, bf16=(True, 1.0), fp16=(True, 2.0))
    chosen = choose_precision(CPU, "fp16")
    assert chosen.vae == torch.bfloat16
    assert "autoencoder in bf16" in str(chosen)


def test_what_does_not_work_is_refused(monkeypatch):
    probes(monkeypatch, bf16=(False, 0.0))
    with pytest.raises(ValueError, match="choose auto or fp32"):
        choose_precision(CPU, "bf16")
    with pytest.raises(ValueError, match="dtype must be one of"):
        choose_precision(CPU, "int8")


def test_the_real_probe_answers():
    works, gain = devices.probe("cpu", "bf16")
    assert isinstance(works, bool)
    assert gain > 0


def test_a_wrong_result_is_no_working_dtype(monkeypatch):
    real = devices._timed
    monkeypatch.setattr(
        devices, "_timed", lambda x, w: (real(x, w)[0] * (1 if x.dtype == torch.float32 else 2), 1)
    )
    assert devices.probe.__wrapped__("cpu", "bf16")[0] is False


def test_a_hopeless_dtype_is_left_after_a_small_try(monkeypatch):
    sizes = []

    def timed(x, weight):
        sizes.append(x.shape[-1])
        return torch.nn.functional.conv2d(x.float(), weight.float(), padding=1), (
            1.0 if x.dtype == torch.float32 else 100.0
        )

    monkeypatch.setattr(devices, "_timed", timed)
    works, gain = devices.probe.__wrapped__("cpu", "bf16")
    assert works
    assert gain == 0.01
    assert max(sizes) == 8


def test_devices():
    assert choose_device("cpu") == CPU
    assert choose_device().type in ("cpu", "cuda", "mps", "xpu")
    with pytest.raises(ValueError, match="can't be used here"):
        choose_device("cuda:99")
    with pytest.raises(ValueError, match="can't be used here"):
        choose_device("toaster")
    assert free_bytes(CPU) > 2**20


def test_out_of_memory_is_recognised_on_every_device():
    for error in (
        torch.cuda.OutOfMemoryError("x"),
        MemoryError(),
        RuntimeError("MPS backend out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    ):
        assert is_oom(error)
    assert not is_oom(RuntimeError("shape mismatch"))
    assert not is_oom(ValueError("out of memory"))

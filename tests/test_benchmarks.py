"""The measurements measure what they say: counts, parity, order, ratios."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import UNET, VAE_, header, random_network
from torch import nn

from benchmarks import compositions, conversion, gpu, macs, memory, pipeline, worker
from benchmarks.weights import full_config
from gendr.files import base as bases
from gendr.files import checkpoint, sources
from gendr.networks.onestep import StepConfig

FLOAT = (torch.float32, torch.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint that diffusers can express whole."""
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    network = random_network(replace(VAE_, patch_size=1, shift_factor=0.1), UNET)
    checkpoint.save(path, network, header(network), dtype="fp32")
    return path


class Here:
    """A worker in this process; remembers what it was asked."""

    asked: list[tuple[str, str]] = []  # noqa: RUF012 - shared on purpose

    def __init__(self, spec):
        self.spec, self.requests = spec, []
        self.answers = worker.serve(spec, iter(lambda: self.requests.pop(), None))

    def ask(self, do, **request):
        self.asked.append((self.spec["letter"], do))
        self.requests.append(json.dumps({"do": do, **request}))
        answer = next(self.answers)
        if "error" in answer:
            raise pipeline.Failed(answer["error"])
        return answer

    def close(self):
        self.requests.append(None)


@pytest.fixture
def run(monkeypatch, capsys):
    """The program with workers in this process: (printed tables, numbers)."""
    monkeypatch.setattr(pipeline, "Worker", Here)
    Here.asked.clear()

    def call(*words):
        result = pipeline.main([*map(str, words), "--device", "cpu", "--dtype", "fp32"])
        return capsys.readouterr().out, result

    return call


def test_everything_in_one_run(run, model, tmp_path):
    file = tmp_path / "result.json"
    text, result = run(
        *("--model", model, "--sizes", "32", "--variants", "ABCE", "--repeats", 2),
        *("--strips", "32", "--growth", "32,64", "--json", file),
    )
    (row,) = result["pipeline"]
    assert row["reference"] == "A"
    for letter in "BCE":
        assert row["variants"][letter]["rel_l2"] <= 1e-5
    assert all(len(v["repeats"]) == 2 for v in row["variants"].values())
    assert len(row["load"]) == 2
    ways = result["strips"][0]["ways"]
    assert {w.split(", ")[1] for w in ways} == {"whole", "strips"}
    assert all(at["rel_l2"] <= 1e-4 for at in ways.values())
    assert [r["size"] for r in result["growth"]] == [32, 64]
    assert result["growth"][0]["psnr"] is None or result["growth"][0]["psnr"] > 60
    assert json.loads(file.read_text())["pipeline"]
    assert macs.RULE in text
    assert "Exact strips" in text
    assert "s/MP" in text


def test_variants_take_turns(run, model):
    run("--model", model, "--sizes", "16", "--repeats", 2, "--sections", "pipeline")
    runs = "".join(letter for letter, do in Here.asked if do == "run")
    # One pass to warm up, one for memory and the result, then forth and back.
    assert runs == "ABC" + "ABC" + "ABC" + "CBA"


def test_what_diffusers_can_not_express_is_said(run, plain_checkpoint):
    text, result = run("--model", plain_checkpoint, "--sizes", "64", "--dry-run")
    assert "A and B run our unfolded autoencoder plainly" in text
    assert "64 px: fits" in text
    assert "pipeline" not in result
    assert not Here.asked


def test_sizes_that_no_network_takes_are_refused(run, plain_checkpoint):
    with pytest.raises(SystemExit, match="multiples of 16"):
        run("--model", plain_checkpoint, "--sizes", "40", "--dry-run")


def test_sizes_that_do_not_fit_are_left_out(run, model, monkeypatch):
    monkeypatch.setattr(pipeline.devices, "free_bytes", lambda device: 10)
    text, result = run("--model", model, "--sizes", "16", "--sections", "pipeline")
    assert "16 px was left out: needs about" in text
    assert "GiB are free" in result["pipeline"][0]["skipped"]


def test_a_rehearsal_of_the_card_s_run(monkeypatch, tmp_path, capsys):
    """All sections but the tests, which tests/test_gpu.py rehearses, and processes of their own."""
    monkeypatch.setattr(gpu, "Worker", Here)
    monkeypatch.setattr(gpu.Run, "tests", lambda self: 0)
    monkeypatch.setattr(gpu.Run, "start", lambda self, model: None)
    # A compiler takes a minute for what this test says nothing about.
    monkeypatch.setattr(gpu, "EXTRAS", gpu.EXTRAS[1:])
    monkeypatch.setattr(gpu, "DRY_RESTORED", [(64, 0, None), (96, 64, 0.5)])
    monkeypatch.setattr(gpu, "ROUNDS", 1)
    monkeypatch.setattr(gpu, "SIZES", (64,))
    words = ["--dry-run", "--sizes", "64", "--out", str(tmp_path)]
    assert gpu.main(words) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    (row,) = result["stages"]
    assert set(row["variants"]) == {"B", "C", "D"}
    assert not row["failed"]
    for at in row["variants"].values():
        assert at["rel_l2"] <= 1e-5
        assert len(at["ms"]["pass"]) == len(at["ms"]["UNet"]) == gpu.ROUNDS * 3
    assert [(r["size"], r["variant"]) for r in result["restored"]] == [
        *((64, "C"), (64, "D"), (96, "C"), (96, "D"))
    ]
    assert result["restored"][1]["speed"] == "graph"
    assert [r["name"] for r in result["extras"]] == ["contiguous"]
    assert all(len(r["seconds"]) == 1 for r in result["restored"])
    assert "not measured" in (tmp_path / "gpu.md").read_text()
    assert result["goals"]["512 px, ms"] == {"goal": 7, "found": None}


def test_a_failing_gpu_test_ends_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu.Run, "tests", lambda self: 1)
    monkeypatch.setattr(gpu.Run, "start", lambda self, model: pytest.fail("went on"))
    monkeypatch.setattr(gpu, "SIZES", (64,))
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 1
    assert "nothing was measured" in capsys.readouterr().out
    assert "stages" not in json.loads((tmp_path / "gpu.json").read_text())


def test_without_diffusers_plain_is_left_out(monkeypatch, tmp_path, capsys):
    real = gpu.importlib.util.find_spec
    monkeypatch.setattr(
        gpu.importlib.util, "find_spec", lambda name: None if name == "diffusers" else real(name)
    )
    made = gpu.Run(gpu.parse(["--dry-run", "--out", str(tmp_path)]))
    assert made.variants == "CD"
    assert "diffusers is not installed" in capsys.readouterr().out


def test_without_a_card_the_run_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "new")]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_error_in_a_worker_has_its_reason(tmp_path):
    spec = {"kind": "model", "letter": "C", "file": str(tmp_path / "no.safetensors")}
    spec |= {"device": "cpu", "dtype": "fp32"}
    (answer,) = worker.serve(spec, [json.dumps({"do": "load"})])
    assert "no model file" in answer["error"]


def test_a_worker_tells_what_loading_took():
    spec = {"kind": "model", "letter": "C", "file": str(checkpoint.EMBEDDED)}
    spec |= {"device": "cpu", "dtype": "fp32"}
    (answer,) = worker.serve(spec, [json.dumps({"do": "loading"})])
    assert min(answer["wall"], answer["cpu"], answer["peak"]) > 0


def test_the_files_of_a_conversion_are_those_that_are_published(tmp_path):
    few = {"block_out_channels": (16, 32, 48, 48), "norm_num_groups": 16}
    full = conversion.SD21_BASE
    config = StepConfig(unet=replace(full.unet, head_dim=16, **few), vae=replace(full.vae, **few))
    base = bases.read(conversion.write_base(tmp_path / "base", config))
    assert (base.unet, base.vae) == (config.unet, config.vae)
    shapes = conversion.unet_shapes(config)
    source = sources.read(conversion.write_pisa(tmp_path / "one.pkl", shapes))
    assert source.restorer is sources.PISA
    source.unet.check(shapes)


def test_macs_of_known_layers():
    x = torch.empty(1, 3, 8, 6, device="meta")
    stages = [("conv", nn.Conv2d(3, 5, 3, padding=1, device="meta"))]
    counted, live = macs.count_stages(stages, x)
    assert counted == {"conv": 8 * 6 * 5 * 3 * 9}
    assert live == {"conv": 8 * 6 * 5 * 4}


def test_attention_is_counted_and_not_unrolled():
    x = torch.empty(1, 2, 64, 16, device="meta")

    def attend(q):
        return nn.functional.scaled_dot_product_attention(q, q, q)

    counted, live = macs.count_stages([("attention", attend)], x)
    assert counted == {"attention": 2 * 2 * 64 * 64 * 16}
    assert live == {"attention": 2 * 64 * 16 * 4}


def test_full_size_count_of_plain_diffusers():
    config = full_config()
    with torch.device("meta"):
        vae = compositions.plain_vae(config.vae)
        unet = compositions.plain_unet(config.unet)
        context = torch.empty(1, 77, 1024)
    made = compositions.Plain(config, unet, vae, context, dtypes=FLOAT)
    x = torch.empty(1, 3, 512, 512, device="meta")
    counted, _ = macs.count_stages(made.stages(), x)
    assert {k: round(v / 1e9, 1) for k, v in counted.items()} == {
        "encode": 338.1,
        "UNet": 402.4,
        "decode": 606.8,
    }


def test_scheduler_and_formula_are_one_step():
    def unet(z, t, encoder_hidden_states):
        return SimpleNamespace(sample=z.sin() + 0.1 * encoder_hidden_states.mean())

    config, z = full_config(), torch.randn(1, 16, 4, 4)
    steps = [
        compositions.Plain(
            config, unet, nn.Identity(), torch.ones(1), dtypes=FLOAT, by_scheduler=by_scheduler
        )
        for by_scheduler in (False, True)
    ]
    assert steps[1].scheduler is not None
    assert torch.allclose(steps[0].step(z), steps[1].step(z), atol=1e-5)
    assert compositions.scheduler(StepConfig()) is None


def test_text_encoder_makes_the_prompt():
    def text(ids):
        assert ids.shape == (1, 77)
        return SimpleNamespace(last_hidden_state=torch.full((1, 77, 4), 2.0))

    x, nothing = torch.zeros(1), nn.Identity()
    for own, expected in ((True, 2.0), (False, 0.0)):
        made = compositions.Plain(
            full_config(), nothing, nothing, x, dtypes=FLOAT, text=text, own_prompt=own
        )
        assert made.stages()[0][0] == "prompt"
        assert made.prompt(x) is x
        assert float(made.context.mean()) == expected


def test_memory_of_the_process_is_seen():
    # Above 32 MB an allocator asks the system anew; below it may hand out what it has kept.
    with memory.Watch(torch.device("cpu")) as watch:
        kept = torch.ones(32 * 2**20)
    if watch.before:
        assert watch.bytes - watch.before >= 0.9 * kept.numel() * 4

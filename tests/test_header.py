"""The header of a checkpoint: every field is checked, by name, before anything is built."""

from __future__ import annotations

import copy
import json
from dataclasses import fields, replace

import pytest
import torch
from conftest import UNET, VAE_, header, random_network
from safetensors import safe_open

from gendr.files import checkpoint
from gendr.files import header as rules
from gendr.files.header import Header
from gendr.networks.onestep import StepConfig
from gendr.networks.unet import UNetConfig
from gendr.networks.vae import VAEConfig

GOOD = Header(config=StepConfig(unet=UNET, vae=VAE_), name="Random", tile=64)


def changed(name: str, value: object) -> str:
    """The JSON of a good header with one field changed; a value of `...` leaves the field out."""
    values = json.loads(json.dumps(GOOD.as_dict()))
    place = values
    *way, last = name.split(".")
    for step in way:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = copy.deepcopy(value)
    return json.dumps(values)


def test_every_field_has_a_rule():
    assert set(rules.UNET) == {f.name for f in fields(UNetConfig)}
    assert set(rules.VAE) == {f.name for f in fields(VAEConfig)}
    assert set(rules.STEP) == {f.name for f in fields(StepConfig)}
    assert set(rules.HEADER) | {"config", "extra"} == {f.name for f in fields(Header)}


def test_what_was_written_is_read():
    full = replace(
        GOOD,
        licence="Apache-2.0",
        training_step=7,
        prompts={"positive": "two\nlines"},
        bases=[{"part": "unet", "id": "sd"}],
        precision="fp16",
        min_side=512,
        color_fix="adain",
        source={"file": "x.pkl"},
    )
    for one in (GOOD, full):
        assert Header.parse(json.dumps(one.as_dict())) == one


def test_the_format_on_disk_stays():
    with safe_open(checkpoint.EMBEDDED, framework="pt") as file:
        text = file.metadata()["gendr"]
    assert json.dumps(Header.parse(text).as_dict(), sort_keys=True) == text


def test_hints_stand_only_where_they_say_something():
    assert not set(rules.HINTS) & set(GOOD.as_dict())


def test_unknown_fields_are_kept():
    values = {**GOOD.as_dict(), "later": [1, {"a": 2}]}
    assert Header.parse(json.dumps(values)).as_dict() == values


def test_saving_keeps_what_a_header_says(tmp_path):
    network = random_network()
    said = header(network, min_side=512, extra={"later": 1})
    checkpoint.save(tmp_path / "a.safetensors", network, said)
    facts = checkpoint.describe(tmp_path / "a.safetensors")
    assert (facts["min_side"], facts["later"], facts["name"]) == (512, 1, "Random")


HUGE = 10**400
WRONG = [
    *[("format", v) for v in ("gendr2", "", None, 5, [], "gendr-folded", ...)],
    *[("version", v) for v in ("1", None, 0, -1, True, 1.5, float("nan"), ...)],
    *[("config", v) for v in (None, [], "x", 5, {}, ...)],
    *[("config.alpha", v) for v in (0, -1, float("nan"), float("inf"), "x", None, 1e-300, True)],
    *[("config.beta", v) for v in (-1, float("inf"), "x", [])],
    *[("config.t_start", v) for v in (-1, 1000, "500", None, 1.5, HUGE)],
    *[("config.prediction_type", v) for v in ("sample", None, [], 5)],
    *[("config.evil", v) for v in (1,)],
    *[("config.unet", v) for v in (..., [], "x")],
    *[("config.unet.evil", v) for v in (1,)],
    *[("config.unet.tokens", v) for v in (..., -1, 10**9, "x")],
    *[
        ("config.unet.block_out_channels", v)
        for v in ([], [0], ["a"], [16] * 4000, 5, [16.0, 32.0])
    ],
    *[("config.unet.attention", v) for v in ([], [True], [True] * 3, ["x", "y"], None)],
    *[("config.unet.layers_per_block", v) for v in (10**7, 0, "x", 1.5)],
    *[("config.unet.head_dim", v) for v in (0, -1, 7, 10**8, "x", None, 1.5)],
    *[("config.unet.norm_num_groups", v) for v in (0, 7)],
    *[("config.unet.prompts", v) for v in (5, -1, "x", 1)],
    *[("config.unet.phases", v) for v in ("x", 1)],
    *[("config.vae.scaling_factor", v) for v in (0, -1, float("nan"), "x", None, 1e40)],
    *[("config.vae.shift_factor", v) for v in ("x", float("inf"), [])],
    *[("config.vae.patch_size", v) for v in (0, -1, "4", 2**20)],
    *[("config.vae.norm_num_groups", v) for v in (7, -1, 10**9)],
    *[("config.vae.latent_channels", v) for v in (0, "x", 10**9)],
    *[("name", v) for v in ("", None, 5, "n" * 1000, "a\nb", "\x1b[31m", "\ud800", ...)],
    *[("licence", v) for v in ([1], 5, "x\n")],
    *[("scale", v) for v in (0, -1, float("nan"), "x", None)],
    *[("tile", v) for v in (0, -512, "512", 10**9, float("inf"), 1.5, None)],
    *[("guidance", v) for v in (0, -1, float("nan"), 100, "a")],
    *[("prompts", v) for v in (5, {"positive": 5})],
    *[("bases", v) for v in ({}, [1])],
    *[("training_step", v) for v in (-1, "x")],
    *[("dtype", v) for v in ("fp7", None)],
    *[("sha256", v) for v in (5, "0" * 63)],
    *[("precision", v) for v in ("fp7",)],
    *[("min_side", v) for v in (-1, "512")],
    *[("color_fix", v) for v in ("pink",)],
    *[("source", v) for v in ("x",)],
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{n}={str(v)[:12]!r}" for n, v in WRONG])
def test_a_wrong_field_is_named(name, value):
    with pytest.raises(ValueError, match=name.split(".")[-1]) as error:
        Header.parse(changed(name, value))
    assert len(str(error.value)) < 300
    assert str(error.value).isprintable()


def test_networks_that_do_not_belong_together_are_named():
    with pytest.raises(ValueError, match="15 latent channels"):
        Header.parse(changed("config.unet.latent_channels", 15))


DEEP = '{"a":' * 300 + "1" + "}" * 300


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "5", '"x"', "[" * 100000, '{"a":' * 100000, DEEP]
)
def test_what_is_not_a_json_object(text):
    with pytest.raises(ValueError, match="JSON"):
        Header.parse(text)


def test_a_header_of_a_later_version_says_so():
    with pytest.raises(rules.Newer, match="update"):
        Header.parse(changed("version", 2))


def test_no_network_is_built_for_a_wrong_header(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a module was made")

    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    for name, value in (("layers_per_block", 10**7), ("head_dim", 10**8)):
        with pytest.raises(ValueError, match=name):
            Header.parse(changed(f"config.unet.{name}", value))


def test_a_header_is_checked_where_it_is_made():
    with pytest.raises(ValueError, match="tile"):
        replace(GOOD, tile=0)
    with pytest.raises(ValueError, match=r"config\.alpha"):
        replace(GOOD, config=replace(GOOD.config, alpha=-1.0))

"""Broken and hostile model files: one sentence that names the file, or a right result."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import UNET, header, random_network
from safetensors.torch import load_file, save_file

import gendr
from gendr import CheckpointError
from gendr.cli import main
from gendr.commands import doctor
from gendr.commands.trouble import reason
from gendr.files import checkpoint, reading, stored
from gendr.files.shapes import unet_config, vae_config
from gendr.networks.unet import UNetConfig
from gendr.networks.vae import VAEConfig

QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
# In the shape that SD2.1's own heads and groups have, else it could not be told from the tensors.
WIDE = UNetConfig(
    block_out_channels=(32, 64), attention=(False, True), layers_per_block=1, cross_attention_dim=12
)
WIDE_VAE = VAEConfig(block_out_channels=(32, 64), layers_per_block=1)
Tensors = dict[str, torch.Tensor]
Make = Callable[[Path, Path], Path]


def load(path, **options):
    return gendr.load(path, device="cpu", dtype="fp32", **options)


def facts(good: Path) -> dict:
    """The header of a file, as plain values."""
    return json.loads(json.dumps(checkpoint.read_header(good).as_dict()))


# ---- ways to break a file: each takes a folder and a good checkpoint, and gives the broken one ----


def cut(size: Callable[[int], int]) -> Make:
    def make(folder: Path, good: Path) -> Path:
        data = good.read_bytes()
        path = folder / "cut.safetensors"
        path.write_bytes(data[: size(len(data))])
        return path

    return make


def starting(start: bytes, name: str) -> Make:
    def make(folder: Path, good: Path) -> Path:
        path = folder / name
        path.write_bytes(start.ljust(4096, b" "))
        return path

    return make


def flipped(folder: Path, good: Path) -> Path:
    """The lowest bit of one weight, which no other check can see."""
    data = bytearray(good.read_bytes())
    data[-400] ^= 1
    path = folder / "flipped.safetensors"
    path.write_bytes(data)
    return path


def said(**changes: object) -> Make:
    """Another header over the same tensors; ... takes a field out."""

    def make(folder: Path, good: Path) -> Path:
        values = {**facts(good), **changes}
        values = {k: v for k, v in values.items() if v is not ...}
        path = folder / "said.safetensors"
        save_file(load_file(good), path, metadata={"gendr": json.dumps(values)})
        return path

    return make


def configured(part: str, **changes: object) -> Make:
    def make(folder: Path, good: Path) -> Path:
        config = facts(good)["config"]
        (config[part] if part else config).update(changes)
        return said(config=config)(folder, good)

    return make


def holding(change: Callable[[Tensors], Tensors | None], text: str | None = None) -> Make:
    """Other tensors under the same header, whose SHA-256 is left out."""

    def make(folder: Path, good: Path) -> Path:
        tensors = load_file(good)
        tensors = change(tensors) or tensors
        path = folder / "holding.safetensors"
        said = json.dumps({**facts(good), "sha256": None}) if text is None else text
        tensors = {k: v.contiguous() for k, v in tensors.items()}
        save_file(tensors, path, metadata={"gendr": said} if said else None)
        return path

    return make


def without(*starts: str) -> Make:
    return holding(lambda t: {k: v for k, v in t.items() if not k.startswith(starts)})


def put(**tensors: torch.Tensor) -> Make:
    return holding(lambda t: {**t, **{k.replace("__", "."): v for k, v in tensors.items()}})


def cast(dtype: torch.dtype) -> Make:
    return holding(lambda t: {k: v.to(dtype) for k, v in t.items()})


def foreign(tensors: Tensors) -> Make:
    def make(folder: Path, good: Path) -> Path:
        path = folder / "foreign.safetensors"
        save_file(tensors, path)
        return path

    return make


def pickled(thing: object, name: str = "pickled.pt", **options: object) -> Make:
    def make(folder: Path, good: Path) -> Path:
        torch.save(thing, folder / name, **options)
        return folder / name

    return make


def written(name: str, data: bytes) -> Make:
    def make(folder: Path, good: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def bomb(inner: str) -> Make:
    """A zip whose one large member would unpack to a thousand times its size."""

    def make(folder: Path, good: Path) -> Path:
        path = folder / "bomb.pt"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/version", "3\n")
            archive.writestr(inner, bytes(32 * 2**20))
        return path

    return make


def too_many(folder: Path, good: Path) -> Path:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({f"t{n}": entry for n in range(reading.MOST_TENSORS + 1)}).encode()
    path = folder / "many.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return path


def pipe(name: str) -> Make:
    def make(folder: Path, good: Path) -> Path:
        os.mkfifo(folder / name)
        return folder / name

    return make


def link(target: str) -> Make:
    def make(folder: Path, good: Path) -> Path:
        path = folder / "link.safetensors"
        path.symlink_to(path if target == "itself" else target)
        return path

    return make


def diffusers(change: Callable[[Path], object]) -> Make:
    def make(folder: Path, good: Path) -> Path:
        root, parts = folder / "folder", checkpoint.split(load_file(good))
        for name in ("unet", "vae"):
            (root / name).mkdir(parents=True)
            save_file(parts[name], root / name / "diffusion_pytorch_model.safetensors")
        save_file(parts["embeds"], root / "embeds.safetensors")
        (root / "vae" / "config.json").write_text('{"scaling_factor": 0.5}')
        (root / "gendr.json").write_text(json.dumps(facts(good)))
        change(root)
        return root

    return make


def config_alone(text: str) -> Make:
    def change(root: Path) -> None:
        (root / "gendr.json").unlink()
        (root / "vae" / "config.json").write_text(text)

    return diffusers(change)


def lora(change: Callable[[Tensors], Tensors], alpha: str | None = "4") -> Make:
    def make(folder: Path, good: Path) -> Path:
        path = folder / "lora.safetensors"
        tensors = {f"base_model.model.{k}": v for k, v in change(adapter()).items()}
        save_file(tensors, path, metadata=None if alpha is None else {"lora_alpha": alpha})
        return path

    return make


def adapter() -> Tensors:
    width = UNET.block_out_channels[-1]
    return {
        f"{QUERY}.lora_A.weight": torch.ones(4, width) / 100,
        f"{QUERY}.lora_B.weight": torch.ones(width, 4) / 100,
    }


class Code:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


POSIX = pytest.mark.skipif(os.name != "posix", reason="no pipes and no links here")
SELF: dict = {}
SELF["state_dict"] = SELF
NUMBERED = {1: torch.ones(2), 2: torch.ones(3)}
LDM = "model.diffusion_model.input_blocks"

BROKEN: dict[str, tuple[Make, str]] = {
    # The file as a whole
    "empty": (cut(lambda n: 0), "empty"),
    "cut in the header": (cut(lambda n: 100), "not a whole"),
    "cut in the weights": (cut(lambda n: n - 1000), "not a whole"),
    "a web page": (written("page.safetensors", b"<html>not found</html>" * 9), "web page"),
    "a flipped bit": (flipped, "SHA-256"),
    "too many tensors": (too_many, "tensors"),
    # The header
    "no version": (said(version=...), "version is missing"),
    "version as text": (said(version="1"), "version"),
    "another format": (said(format="gendr2"), "format"),
    "a nested header": (holding(lambda t: None, "[" * 100000), "JSON"),
    "header of a list": (holding(lambda t: None, "[]"), "JSON"),
    "claims to be folded": (said(format="gendr-folded"), "format"),
    "alpha 0": (configured("", alpha=0), "alpha"),
    "alpha infinite": (configured("", alpha=float("inf")), "alpha"),
    "unknown setting": (configured("unet", evil=1), "evil is unknown"),
    "ten million layers": (configured("unet", layers_per_block=10**7), "layers_per_block"),
    "scaling factor 0": (configured("vae", scaling_factor=0), "scaling_factor"),
    "tile as text": (said(tile="512"), "tile"),
    "another SHA-256": (said(sha256="0" * 64), "SHA-256"),
    "lines in the name": (said(name="a\nb\x1b[31m"), "name"),
    # The tensors
    "no prompt": (without("embeds."), r"embeds\.positive"),
    "no timestep": (without("unet.time_embedding."), "time_embedding"),
    "no autoencoder": (without("vae."), r"vae\."),
    "a tensor too many": (put(unet__evil=torch.ones(3)), r"unet\.evil"),
    "transposed": (holding(lambda t: {k: v.T if v.dim() == 2 else v for k, v in t.items()}), "shape"),
    "scalars": (holding(lambda t: {k: v.flatten()[0].clone() for k, v in t.items()}), "shape"),
    "a prompt of no tokens": (put(embeds__positive=torch.ones(1, 0, 12)), "prompt"),
    "a prompt of another width": (put(embeds__positive=torch.ones(1, 5, 13)), "prompt"),
    "a prompt of a book": (put(embeds__positive=torch.ones(1, 5000, 12)), "prompt"),
    "a name of a book": (put(**{"unet__" + "x" * 9999: torch.ones(3)}), r"unet\.xxx"),
    "a name of control codes": (put(**{"unet__\x1b[31m\n": torch.ones(3)}), r"unet\.\?"),
    "prompts of two lengths": (put(embeds__positive=torch.ones(1, 3, 12)), "prompt"),
    "8-bit floats": (cast(torch.float8_e4m3fn), "8-bit floats: GenDR takes fp16"),
    "whole numbers": (cast(torch.int64), "int64"),
    "NaN": (holding(lambda t: {k: v * float("nan") for k, v in t.items()}), "NaN"),
    # A lost header, other files
    "a lost header": (holding(lambda t: None, ""), "lost its header"),
    "an upscaler": (foreign({"conv_first.weight": torch.ones(1), "body.0.w": torch.ones(1)}), "ESRGAN"),
    "names without sense": (foreign({"zzz": torch.ones(3)}), "unknown kind"),
    "a scalar for a layer": (
        foreign({"unet.conv_in.weight": torch.tensor(1.0), "vae.a": torch.tensor(1.0)}),
        "lost its header",
    ),
    "a block of a hundred billion": (
        foreign({f"{LDM}.99999999999.0.op.weight": torch.ones(3)}),
        "not a UNet in the shape",
    ),
    "a level of a billion": (
        foreign({k: torch.ones(1) for k in ("unet.conv_in.weight", "vae.encoder.down_blocks.999999999.x")}),
        "lost its header",
    ),
    # Pickles
    "code": (pickled({"state_dict": Code()}), "not executed"),
    "code in the old format": (
        pickled(Code(), "old.pth", _use_new_zipfile_serialization=False),
        "not executed",
    ),
    "text as a pickle": (written("text.ckpt", b"hello"), "not executed"),
    "zeros as a pickle": (written("zeros.bin", bytes(1000)), "not executed"),
    "a list": (pickled([torch.ones(2)]), "no named tensors"),
    "numbers for names": (pickled(NUMBERED), "without tensors"),
    "a pickle in itself": (pickled(SELF), "without tensors"),
    "weights without numbers": (
        pickled({"unet.conv_in.weight": torch.empty(10, device="meta"), "vae.x": torch.ones(1)}),
        "lost its header",
    ),
    "terabytes by strides": (
        pickled({"unet.conv_in.weight": torch.ones(1).expand(10**5, 10**6), "vae.x": torch.ones(1)}),
        "lost its header",
    ),
    "a zip bomb of a pickle": (bomb("archive/data.pkl"), "unpack"),
    "a zip bomb of weights": (bomb("archive/data/0"), "unpack"),
    # Other kinds of files under a model's name
    **{
        f"{kind} as {name}": (starting(start, name), words)
        for start, name, words, kind in (
            (b"GGUF\3\0\0\0", "model.gguf", "quantised", "GGUF"),
            (b"GGUF\3\0\0\0", "model.safetensors", "quantised", "GGUF"),
            (b'{"weight_map": {}}', "model.safetensors.index.json", "the folder", "an index"),
            (b"<!DOCTYPE html>", "model.safetensors", "web page", "a page"),
            (b"version https://git-lfs.github.com/spec/v1", "model.pth", "git lfs pull", "a pointer"),
            (b"\x89PNG\r\n", "model.ckpt", "picture", "a picture"),
        )
    },
    # Folders
    "an empty folder": (lambda f, g: f, "not a diffusers folder"),
    "a folder with half a gendr.json": (
        diffusers(lambda f: (f / "gendr.json").write_text("{")),
        r"gendr\.json",
    ),
    "a folder with a list for settings": (config_alone("[]"), r"config\.json"),
    "a folder with text for numbers": (config_alone('{"scaling_factor": "x"}'), "scaling_factor"),
    "a folder with endless settings": (
        config_alone("[" * 10_000_001),
        "too much",
    ),
    "a folder in a folder": (
        diffusers(lambda f: ((f / "embeds.safetensors").unlink(), (f / "embeds.safetensors").mkdir())),
        "folder",
    ),
    # LoRA
    **{f"lora_alpha {a}": (lora(dict, a), "lora_alpha") for a in ("0", "-1", "inf", "nan", "x", "")},
    "no lora_alpha": (lora(dict, None), "lora_alpha"),
    "rank 0": (
        lora(lambda t: {k: v[:0] if "_A" in k else v[:, :0].contiguous() for k, v in t.items()}),
        "LoRA",
    ),
    "two ranks": (lora(lambda t: {k: v[:3] if "_A" in k else v for k, v in t.items()}), "LoRA"),
    "half a LoRA": (lora(lambda t: {k: v for k, v in t.items() if "_A" in k}), "LoRA"),
    "a LoRA of no numbers": (lora(lambda t: {k: v * float("nan") for k, v in t.items()}), "NaN"),
    "a LoRA of whole numbers": (lora(lambda t: {k: v.to(torch.int8) for k, v in t.items()}), "int8"),
}  # fmt: skip
SPECIAL: dict[str, tuple[Make, str]] = {
    "a pipe": (pipe("pipe.safetensors"), "pipe"),
    "a pipe as a pickle": (pipe("pipe.pt"), "pipe"),
    "a device": (link("/dev/zero"), "device"),
    "a pipe for settings": (
        diffusers(lambda f: ((f / "gendr.json").unlink(), os.mkfifo(f / "gendr.json"))),
        r"gendr\.json",
    ),
    "a link to nothing": (link("/nonexistent"), "no model file"),
    "a link to itself": (link("itself"), "can't be read"),
}


@pytest.fixture
def broken(request, tmp_path, tiny_checkpoint):
    """(path, base, words) of one broken file."""
    make, words = {**BROKEN, **SPECIAL}[request.param]
    path = make(tmp_path, tiny_checkpoint)
    return path, tiny_checkpoint if path.name.startswith("lora") else None, words


ALL = [*BROKEN, *(pytest.param(name, marks=POSIX) for name in SPECIAL)]


@pytest.mark.parametrize("broken", ALL, indirect=True)
def test_python_raises_one_sentence_that_names_the_file(broken, monkeypatch, tmp_path):
    path, base, words = broken
    monkeypatch.chdir(tmp_path)
    with pytest.raises((CheckpointError, FileNotFoundError), match=words) as error:
        load(path, base=base)
    told = str(error.value)
    assert path.name in told
    assert told.isprintable()
    assert len(told) < 1000
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "broken", ["version as text", "no prompt", "code", "8-bit floats"], indirect=True
)
def test_the_command_line_says_it_in_one_line(broken, tmp_path, capsys):
    path, _, _ = broken
    output = tmp_path / "out" / "folded.safetensors"
    assert main(["fold", str(path), "--output", str(output)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("gendr: ")
    assert path.name in err
    assert not output.parent.exists()


@pytest.mark.parametrize(
    "broken",
    ["alpha 0", "ten million layers", "too many tensors", "no prompt", "transposed", "code"],
    indirect=True,
)
def test_info_says_what_is_wrong_without_reading_the_weights(broken, capsys):
    path, _, _ = broken
    assert main(["info", str(path)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert path.name in err


@pytest.mark.parametrize("broken", ["code", pytest.param("a pipe", marks=POSIX)], indirect=True)
def test_doctor_fails_the_model_and_goes_on(broken):
    path, _, _ = broken
    (check,) = doctor.model_checks(path, None, "cpu", "fp32", "eager")
    assert check.ok is False
    assert path.name in check.told


# ---- what is right must stay right ----


def test_the_old_format_of_pickles_is_read(tmp_path):
    paths = tmp_path / "old.pth", tmp_path / "new.pth"
    network = random_network(unet=WIDE, vae=WIDE_VAE, prompts=("positive",))
    base = tmp_path / "base.safetensors"
    checkpoint.save(base, network, header(network), dtype="fp32")
    unet = network.unet.state_dict()
    for path, new in zip(paths, (False, True), strict=True):
        torch.save({"params_ema": unet}, path, _use_new_zipfile_serialization=new)
    expected = load(base).network.state_dict()
    for path in paths:
        found = load(path, base=base).network.state_dict()
        assert all(torch.equal(v, found[k]) for k, v in expected.items())


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model"])
def test_a_safetensors_file_of_any_name_is_one(tmp_path, tiny_checkpoint, name):
    path = tmp_path / name
    path.write_bytes(tiny_checkpoint.read_bytes())
    found, expected = (checkpoint.describe(p) for p in (path, tiny_checkpoint))
    assert {**found, "path": None} == {**expected, "path": None}
    assert checkpoint.read(path)[0] == checkpoint.read(tiny_checkpoint)[0]


@pytest.mark.parametrize("new", [False, True])
def test_a_pickle_named_as_a_safetensors_file_is_read_as_a_pickle(tmp_path, new):
    path = tmp_path / "model.safetensors"
    torch.save({"x": torch.arange(9.0)}, path, _use_new_zipfile_serialization=new)
    assert torch.equal(reading.read_file(path).tensors["x"], torch.arange(9.0))


def test_a_packed_pickle_is_read(tmp_path):
    """Other programs pack what torch leaves unpacked; its numbers then don't lie in the file."""
    path, packed = tmp_path / "plain.pt", tmp_path / "packed.pt"
    tensors = {"x": torch.randn(64, 64), "y": torch.arange(4096.0)}
    torch.save(tensors, path)
    with (
        zipfile.ZipFile(path) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    found = reading.read_file(packed).tensors
    assert all(torch.equal(v, found[k]) for k, v in tensors.items())


def test_a_lost_header_of_an_ordinary_shape_is_made_up_for(tmp_path):
    network = random_network(unet=WIDE, vae=WIDE_VAE)
    state = network.state_dict()
    save_file(state, tmp_path / "lost.safetensors")
    parts = checkpoint.split(state)
    assert (unet_config(parts["unet"]), vae_config(parts["vae"])) == (WIDE, WIDE_VAE)
    found = load(tmp_path / "lost.safetensors", fold=False)
    assert all(torch.equal(v, found.network.state_dict()[k]) for k, v in state.items())
    assert found.name == "lost"


def test_a_merged_lora_does_not_carry_the_base_s_digest(tmp_path, tiny_checkpoint):
    path = lora(dict)(tmp_path, tiny_checkpoint)
    model = load(path, base=tiny_checkpoint, fold=False)
    assert model.header.sha256 is None
    checkpoint.save(tmp_path / "merged.safetensors", model.network, model.header, dtype="fp32")
    assert load(tmp_path / "merged.safetensors").name == "lora"


def test_weights_in_another_precision_are_named(tmp_path, tiny_checkpoint):
    path = tmp_path / "half.safetensors"
    text = json.dumps(facts(tiny_checkpoint))
    save_file({k: v.half() for k, v in load_file(tiny_checkpoint).items()}, path, {"gendr": text})
    with pytest.raises(CheckpointError, match="weights are float16, it was saved in fp32"):
        load(path)


def test_facts_about_the_file_are_not_the_header_s_to_give(tmp_path, tiny_checkpoint):
    path = said(path="/etc/passwd", bytes=1, tensors=-1)(tmp_path, tiny_checkpoint)
    found = gendr.describe(path)
    assert found["path"] == str(path)
    assert found["bytes"] == path.stat().st_size
    assert found["tensors"] == len(load_file(path))


def test_info_shows_what_would_steer_a_terminal_as_escapes(tmp_path, tiny_checkpoint, capsys):
    path = said(prompts={"positive": "\x1b[31mred"}, other={"\x07": ["\x9b"]})(
        tmp_path, tiny_checkpoint
    )
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "\\x1b[31mred" in out
    assert out.replace("\n", "").isprintable()


def test_names_with_control_characters_become_printable_names(tmp_path):
    network = random_network(unet=WIDE, vae=WIDE_VAE)
    path = tmp_path / "a\x1b[31mb.safetensors"
    try:
        save_file(network.state_dict(), path)
    except OSError:
        pytest.skip("this system has no such names")
    assert load(path).name == "a?[31mb"


# ---- writing ----


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, small_disk, capsys):
    network = random_network()
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"mine")
    with small_disk(), pytest.raises(CheckpointError, match=r"model\.safetensors.*make room"):
        checkpoint.save(path, network, header(network), dtype="fp32")
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert path.read_bytes() == b"mine"


def test_fold_on_a_full_disk_is_one_line(tmp_path, tiny_checkpoint, small_disk, capsys):
    path = tmp_path / "folded.safetensors"
    with small_disk():
        code = main(["fold", str(tiny_checkpoint), "--output", str(path)])
    err = capsys.readouterr().err
    assert code == 1
    assert err.count("\n") == 1
    assert path.name in err
    assert "resume" not in err  # which `fold` does not have
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_in_the_words_of_the_file_that_was_written():
    error = CheckpointError("can't write a.safetensors: make room")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert reason(error) == str(error)


@pytest.fixture
def small_disk():
    """A context in which no file can grow beyond 100 kB: the same failed writes as on a full disk."""
    resource = pytest.importorskip("resource")

    @contextlib.contextmanager
    def limited():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


def test_weights_beyond_the_dtype_are_not_written(tmp_path):
    network = random_network()
    network.unet.conv_in.weight.fill_(1e6)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors.*unet\.conv_in\.weight.*float16"
    ):
        checkpoint.save(tmp_path / "model.safetensors", network, header(network), dtype="fp16")
    assert not list(tmp_path.iterdir())


def test_writing_copies_one_tensor_at_a_time(tmp_path, monkeypatch):
    network, seen = random_network(), []
    clean = stored.finite

    def look(tensor):
        seen.append(weakref.ref(tensor))
        assert sum(one() is not None for one in seen) <= 2  # this one and the one before it
        return clean(tensor)

    monkeypatch.setattr(stored, "finite", look)
    checkpoint.save(tmp_path / "model.safetensors", network, header(network), dtype="fp16")
    assert len(seen) == len(network.state_dict())


def test_a_download_beside_the_file_is_left_alone(tmp_path):
    """Browsers keep what they are fetching under NAME.part."""
    network = random_network()
    other = tmp_path / "model.safetensors.part"
    other.write_bytes(b"half a download")
    checkpoint.save(tmp_path / "model.safetensors", network, header(network))
    assert other.read_bytes() == b"half a download"

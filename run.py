"""Sets GenDR up in this folder and runs it. Needs Python 3.10 or newer and nothing else.

  python3 run.py demo                restore the sample picture, write result and comparison to output/
  python3 run.py upscale photo.jpg   restore your own; `python3 run.py upscale --help` lists the choices
  python3 run.py test                check the code: ruff and pytest (further words go to pytest)
  python3 run.py setup               only set up: --fresh starts over, --torch chooses the build
  python3 run.py info|doctor|fold|compare|convert ...   the rest of the gendr command line

The first run makes the folder .venv and installs pinned packages into it; later runs start at once.
PyTorch is the CPU build where no NVIDIA or AMD card is found. Another build: setup --torch NAME, with
cpu, default (the package index's own) or the name of one of PyTorch's indexes, such as cu126 or rocm7.2.
GENDR_VENV names another folder than .venv.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

OLDEST_PYTHON = (3, 10)
# Before anything below is compiled to what an old Python cannot run.
if sys.version_info < OLDEST_PYTHON:
    sys.exit(
        "run.py: this is Python {}.{}; GenDR needs {}.{} or newer. Start run.py with a newer one, for "
        "example `python3.12 run.py` (on Windows `py -3.12 run.py`).".format(
            *sys.version_info[:2], *OLDEST_PYTHON
        )
    )

ROOT = Path(__file__).resolve().parent
VENV = Path(os.environ.get("GENDR_VENV") or ROOT / ".venv")
LOCK = ROOT / "requirements.lock"
WINDOWS = os.name == "nt"
PYTHON = VENV / ("Scripts/python.exe" if WINDOWS else "bin/python")
ME = "python run.py" if WINDOWS else "python3 run.py"

PACKAGES = {
    "gendr": ("torch", "einops", "safetensors", "numpy", "pillow"),
    # Encodes the prompt.
    "convert": ("transformers",),
    "test": (
        "pytest",
        "pytest-xdist",
        "ruff",
        "accelerate",
        "av",
        "diffusers",
        "peft",
        "tensorboardX",
        "transformers",
    ),
}
# Packages whose module has another name.
MODULES = {"pillow": "PIL", "pytest-xdist": "xdist"}
# Processes of the test run; each takes about 2 GB at its largest.
MOST_WORKERS = 4
COMMANDS = ("upscale", "info", "doctor", "fold", "compare", "convert")
TORCH_INDEXES = "https://download.pytorch.org/whl/"


def main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(__doc__.replace("python3 run.py", ME))
        return 0 if words else 2
    command, rest = words[0], words[1:]
    own = {"demo": demo, "test": test, "setup": setup}
    if command not in own and command not in COMMANDS:
        return fail(f"there is no command {command!r}; there are {', '.join([*own, *COMMANDS])}", 2)
    try:
        if command in own:
            return own[command](rest)
        prepare("gendr", *([command] if command in PACKAGES else []))
        return gendr(command, *rest, replace=True)
    except SetupError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return fail("stopped; run the same command again to go on", 130)


class SetupError(Exception):
    """The environment cannot be made; the message says why and what to do."""


def fail(message: str, code: int = 1) -> int:
    print(f"run.py: {message}", file=sys.stderr)
    return code


def tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# ---- the commands ----


def gendr(*words: str, replace: bool = False) -> int:
    """Run the gendr command line in the environment; with `replace`, in place of this process."""
    environment = clean_environment()
    environment["PYTHONPATH"] = str(ROOT)
    environment["PYTHONSAFEPATH"] = "1"  # a torch.py beside the pictures must not be imported
    environment["GENDR_PROG"] = ME
    command = [str(PYTHON), "-m", "gendr", *words]
    if replace and not WINDOWS:  # signals and the exit code then need no passing on
        os.execve(command[0], command, environment)
    return call(command, env=environment)


def demo(words: list[str]) -> int:
    """Restore the sample picture x4 and put it beside its input."""
    sample, output = ROOT / "assets" / "sample.png", ROOT / "output"
    result, comparison = output / "sample_x4.png", output / "sample_compare.png"
    if not sample.is_file():
        return fail(f"the sample picture {sample} is missing: is the checkout complete?")
    record = output / ".demo.json"
    earlier = read_json(record)
    for path in (result, comparison):
        if path.exists() and earlier.get(path.name) != digest(path.read_bytes()):
            return fail(f"{path} was not made by the demo: move it away, it is not replaced")
    prepare("gendr")
    started = time.monotonic()
    output.mkdir(exist_ok=True)
    steps = [
        ["upscale", str(sample), "--output", str(result), "--overwrite", *words],
        ["compare", str(sample), str(result), "--output", str(comparison), "--overwrite"],
    ]
    for step in steps:
        code = gendr(*step)
        if code:
            return code
        made = {p.name: digest(p.read_bytes()) for p in (result, comparison) if p.exists()}
        record.write_text(json.dumps(made), encoding="utf-8")
    tell(f"demo: {time.monotonic() - started:.1f} s. Look at")
    print(result, comparison, sep="\n", flush=True)
    return 0


def test(words: list[str]) -> int:
    """Ruff, then pytest: what rounds by the number of threads with two of them, all with one.

    All of them run, the first failure is the exit code. Words for pytest: that run alone.
    """
    prepare("gendr", "test")
    environment = clean_environment()
    # A process per core, each with a core of its own: the tests are many and small. Threads that
    # spin would take the other processes' cores.
    workers = max(1, min(MOST_WORKERS, os.cpu_count() or 1))
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    environment.setdefault("OMP_NUM_THREADS", "1")
    steps = [
        ("ruff check", ["ruff", "check", "."], {}),
        ("ruff format", ["ruff", "format", "--check", "."], {}),
    ]
    if not words:
        # Their files alone: collecting all of them takes as long as these tests do.
        files = [p for p in (ROOT / "tests").glob("test_*.py") if b"mark.threads" in p.read_bytes()]
        marked = ["pytest", "-m", "threads", "-n", str(workers), "--dist", "loadfile"]
        marked += sorted(str(p.relative_to(ROOT)) for p in files)
        steps.append(("pytest, two threads", marked, {"OMP_NUM_THREADS": "2"}))
    # Last, so that its summary is what the run ends with.
    steps.append(("pytest", ["pytest", "-n", str(workers), "--dist", "loadfile", *words], {}))
    failed, times = 0, []
    for name, command, more in steps:
        started = time.monotonic()
        tell(f"--- {name}")
        code = call([str(PYTHON), "-m", *command], cwd=str(ROOT), env={**environment, **more})
        times.append(
            f"{name} {time.monotonic() - started:.1f} s" + (f" (exit {code})" if code else "")
        )
        failed = failed or code
        if code == 130:
            break
    tell(f"--- {', '.join(times)}")
    return failed


def setup(words: list[str]) -> int:
    torch = None
    while words:
        word, *words = words
        if word == "--fresh":
            remove_environment()
        elif word == "--torch" and words:
            torch, *words = words
        else:
            return fail(f"setup does not know {word!r}; it takes --fresh and --torch NAME", 2)
    prepare("gendr", torch=torch)
    tell(f"ready: {VENV}")
    return 0


# ---- the environment ----


def prepare(*groups: str, torch: str | None = None) -> None:
    """Make `.venv` hold the pinned packages of `groups`; a few milliseconds where it already does.

    The marker file in it tells what was installed. It is written before anything else, so that a
    half-made environment is known as ours and made again.
    """
    if ready(groups, torch):
        return
    with one_at_a_time():
        if ready(groups, torch):
            return
        started = time.monotonic()
        marker = read_marker() or adopt()
        # A torch build of another kind cannot be installed over the old one.
        changed = torch is not None and "torch" in marker and marker["torch"] != torch
        if VENV.exists() and (changed or not usable(marker)):
            tell(f"{VENV} is {'of another kind' if changed else 'not complete'}: making it again")
            remove_environment()
            marker = {}
        if not marker:
            marker = make_environment(torch or torch_build())
        for group in groups:
            if marker["installed"].get(group) == pins(group):
                continue
            install(group, marker["torch"])
            marker["installed"][group] = pins(group)
            write_marker(marker)
        tell(f"set up in {time.monotonic() - started:.0f} s")


def ready(groups: tuple[str, ...], torch: str | None) -> bool:
    marker = read_marker()
    wanted = all(marker.get("installed", {}).get(group) == pins(group) for group in groups)
    return wanted and torch in (None, marker.get("torch")) and usable(marker)


def usable(marker: dict) -> bool:
    """Does the environment's Python start, and does it still find what the marker promises?"""
    if not marker.get("made") or not PYTHON.exists():
        return False
    names = [name for group in marker["installed"] for name in PACKAGES.get(group, ())]
    modules = ["pip", *(MODULES.get(name, name) for name in names)]
    check = (
        f"import importlib.util as u; raise SystemExit(any(not u.find_spec(n) for n in {modules}))"
    )
    try:
        done = subprocess.run(
            [str(PYTHON), "-I", "-c", check],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return False
    return done.returncode == 0


def make_environment(torch: str) -> dict:
    """An empty environment with pip, and its marker."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise SetupError(
            "this Python cannot make virtual environments. On Debian and Ubuntu: "
            f"`sudo apt install python{version}-venv`, then run the same command again. Elsewhere "
            "install Python from python.org."
        ) from None
    tell(f"setting up {VENV} (once)")
    try:
        VENV.mkdir(parents=True)
        write_marker({"made": False})
    except OSError as error:
        raise SetupError(
            f"{VENV} cannot be made: {error.strerror}. Make the folder writable, or name another "
            "one: set GENDR_VENV to it."
        ) from error
    # The base interpreter: this one may itself live in an environment that goes away.
    interpreter = getattr(sys, "_base_executable", None) or sys.executable
    if call([interpreter, "-m", "venv", str(VENV)], env=clean_environment()):
        raise SetupError(f"`{interpreter} -m venv {VENV}` failed, see above")
    marker = {"made": True, "torch": torch, "installed": {}}
    write_marker(marker)
    return marker


def adopt() -> dict:
    """A marker for a working environment that somebody else made in the place of ours."""
    marker = {"made": True, "torch": torch_build(), "installed": {}}
    return marker if (VENV / "pyvenv.cfg").exists() and usable(marker) else {}


def remove_environment() -> None:
    """Delete the environment, if it is one: ours, empty, or with a pyvenv.cfg."""
    if not VENV.exists():
        return
    if not VENV.is_dir() or not (
        marker_path().exists() or (VENV / "pyvenv.cfg").exists() or not any(VENV.iterdir())
    ):
        raise SetupError(f"{VENV} exists and is no virtual environment: move it away")
    try:
        shutil.rmtree(VENV)
    except OSError as error:
        raise SetupError(
            f"{VENV} cannot be removed ({error.strerror}): close what runs from it"
        ) from error


def install(group: str, torch: str) -> None:
    """Install one group of packages, every version as in requirements.lock."""
    if group == "gendr" and torch != "default":
        install_torch(torch)
    tell(f"installing {', '.join(PACKAGES[group])}")
    log = VENV / "pip.log"
    if pip("--constraint", str(LOCK), *PACKAGES[group], log=log):
        raise SetupError(reason(log))
    log.unlink(missing_ok=True)


def install_torch(index: str) -> None:
    """Torch alone from PyTorch's own index; where that fails, the next step takes the usual one.

    Without its dependencies: that index has few versions of them.
    """
    version = re.search(r"^torch==(\S+)", LOCK.read_text(encoding="utf-8"), re.M)[1]
    url = TORCH_INDEXES + index
    try:
        with urllib.request.urlopen(url + "/torch/", timeout=6):
            pass
    except (OSError, ValueError) as error:
        tell(f"PyTorch's index {index} cannot be reached ({getattr(error, 'reason', error)})")
    else:
        tell(f"installing torch {version} ({index})")
        if not pip("--no-deps", "--index-url", url, f"torch=={version}", log=VENV / "pip.log"):
            return
    tell(f"taking torch {version} from the usual index; on Linux that can be a download of some GB")


def pip(*words: str, log: Path) -> int:
    """`pip install`: its own progress on a terminal, only errors elsewhere."""
    log.unlink(missing_ok=True)
    quiet = [] if sys.stderr.isatty() else ["--quiet", "--progress-bar", "off"]
    base = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    code = call(
        [*base, "install", *quiet, "--retries", "2", "--log", str(log), *words],
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
    )
    if code == 130:
        raise KeyboardInterrupt
    return code


def reason(log: Path) -> str:
    """Why pip failed and what to do, from its log."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    network = (
        "name resolution|getaddrinfo|NameResolutionError|establish a new connection|timed out"
        "|Connection refused|ConnectTimeout|ProxyError|SSLError|Network is unreachable"
    )
    if "No space left on device" in text or "Errno 28" in text:
        what = "the disk is full: a CPU setup needs about 1.5 GB, one for a GPU about 8 GB"
    elif re.search(network, text):
        what = (
            "the package index cannot be reached. Is this computer online? Behind a proxy set "
            "HTTPS_PROXY; with a mirror of your own set PIP_INDEX_URL. What was fetched is kept"
        )
    elif "No matching distribution" in text:
        version = ".".join(map(str, sys.version_info[:2]))
        missing = re.search(r"No matching distribution found for (\S+)", text)
        what = (
            f"there is no build of {missing[1] if missing else 'a package'} for Python {version} "
            f"on {platform.platform(terse=True)}. 64-bit Python 3.10 to 3.14 is needed, on a Mac "
            "also Apple silicon and macOS 14"
        )
    else:
        what = "pip failed, see above"
    return f"{what}. Run the same command again when that is mended (details: {log})"


def torch_build() -> str:
    """Which torch this machine needs: an index name of PyTorch's, or "default"."""
    if sys.platform == "darwin":
        return "default"
    if has_nvidia():
        return "cu130" if WINDOWS else "default"  # the usual index has CUDA builds for Linux alone
    if has_amd():
        return "rocm7.2"
    return "default" if WINDOWS else "cpu"


def has_nvidia() -> bool:
    if WINDOWS:
        return shutil.which("nvidia-smi") is not None
    wsl = Path("/usr/lib/wsl/lib/nvidia-smi")
    return any(
        p.exists() for p in (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"), wsl)
    )


def has_amd() -> bool:
    """A card with at least 4 GB of its own on Linux: ROCm does not run on most built-in ones."""
    if not Path("/dev/kfd").exists():
        return False
    for size in Path("/sys/class/drm").glob("card*/device/mem_info_vram_total"):
        with contextlib.suppress(OSError, ValueError):
            if int(size.read_text()) >= 4 << 30:
                return True
    return False


# ---- small parts ----


def pins(group: str) -> str:
    """What `group` means now: changes with the lock and the names."""
    facts = [LOCK.read_text(encoding="utf-8"), PACKAGES[group]]
    return digest(json.dumps(facts).encode())


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def marker_path() -> Path:
    return VENV / "gendr-setup.json"


def read_marker() -> dict:
    return read_json(marker_path())


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_marker(marker: dict) -> None:
    part = marker_path().with_suffix(".part")
    part.write_text(json.dumps(marker, indent=1), encoding="utf-8")
    os.replace(part, marker_path())


def clean_environment() -> dict:
    """The environment without what would lead the new Python or pip elsewhere."""
    drop = {"PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "VIRTUAL_ENV"}
    return {name: value for name, value in os.environ.items() if name not in drop}


def call(command: list[str], **options) -> int:
    """Run a program; 130 where Ctrl-C ended it. The program gets Ctrl-C too and ends its own way."""
    stopped = False
    with subprocess.Popen(command, **options) as process:
        while True:
            try:
                code = process.wait()
                return 130 if stopped and code else code
            except KeyboardInterrupt:
                stopped = True


@contextlib.contextmanager
def one_at_a_time():
    """Two first runs at once: the second waits for the first."""
    name = f"gendr-{digest(str(VENV).encode())[:12]}.lock"
    with open(Path(tempfile.gettempdir()) / name, "a+b") as handle:
        if WINDOWS:
            import msvcrt

            handle.seek(0)
            while True:
                try:
                    msvcrt.locking(handle.fileno(), msvcrt.LK_LOCK, 1)
                    break
                except OSError:  # it gives up after ten seconds
                    tell("waiting for another run.py that is setting up")
        else:
            import fcntl

            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                tell("waiting for another run.py that is setting up")
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Set up and start Prefuse with nothing but Python: ``python run.py demo | serve | test | bench``.

The first start makes `.venv` beside this file and installs the pinned requirements; later starts find a stamp and go on
at once. Standard library only.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST, NEWEST = (3, 10), (3, 12)
OLDEST_TORCH = (2, 1, 2)
RUN_FILES = ("requirements.txt", "requirements-data.txt")
COMMANDS = {
    "demo": (("-m", "lib_lora", "demo"), RUN_FILES),
    "serve": (("-m", "lib_lora", "serve"), RUN_FILES),
    "bench": (("-m", "lib_lora", "bench"), RUN_FILES),
    "test": (
        ("-m", "pytest", "-n", "auto", "--dist", "worksteal", "-m", "not slow"),
        (*RUN_FILES, "requirements-dev.txt"),
    ),
}
PINS_OPTION, PINS_FILES, PINS_VENV = "--webui-pins", ("requirements-webui.txt",), ".venv-webui"
PINS_TESTS = ("tests/webui", "tests/unit", "tests/property", "tests/faults", "tests/ui", "-m", "not newest")
USAGE = """usage: python run.py COMMAND [options]

  demo    pictures of the embedded model, with and without LoRAs, and a table of timings
  serve   the page, in a browser of this computer: --model, --lora-dir, --port and more
  test    the tests of less than ten seconds each; options go to pytest (-m "": all of them;
          --webui-pins: those of the core and the extension, with the WebUI's versions)
  bench   the benchmarks: --suite steps | switch | schedules | families | merge | resize | extract |
          files | compile | compile_controlnet | train | train_demo | train_memory | page;
          on a GPU also gpu | gpu_switch | gpu_compile"""


def unsupported(version: tuple[int, ...]) -> str | None:
    """One sentence for a Python that the pinned packages do not support, None for one they do."""
    if OLDEST <= version[:2] <= NEWEST:
        return None
    found = ".".join(map(str, version[:2]))
    return f"Prefuse needs Python 3.10, 3.11 or 3.12; this is Python {found}. Start run.py with one of those."


def venv_python(folder: Path, windows: bool = os.name == "nt") -> Path:
    """The interpreter of the virtual environment in `folder`."""
    return folder / ("Scripts/python.exe" if windows else "bin/python")


def site_packages(folder: Path) -> Path | None:
    """Where the virtual environment keeps its packages, None if it has no such place yet."""
    return next(iter([*folder.glob("lib/python3*/site-packages"), *folder.glob("Lib/site-packages")]), None)


def stamp_key(folder: Path, files: tuple[str, ...], root: Path = ROOT) -> str:
    """Hash of all that decides what is installed: the requirement files and the environment's Python."""
    digest = hashlib.sha256((folder / "pyvenv.cfg").read_bytes())
    for name in files:
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def is_whole(info: Path) -> bool:
    """Whether every file that a package's RECORD names is there; an interrupted install leaves none or half."""
    record = info / "RECORD"
    if not record.is_file():
        return False
    with record.open(newline="", encoding="utf-8") as lines:
        names = [row[0] for row in csv.reader(lines) if row and not row[0].endswith(".pyc")]
    return all((info.parent / name).exists() for name in names)


def forget_broken_packages(site: Path) -> list[str]:
    """Remove the records of half-installed packages, so that pip installs them again; returns their names."""
    broken = [info for info in sorted(site.glob("*.dist-info")) if not is_whole(info)]
    for info in broken:
        shutil.rmtree(info)
    return [info.name.split("-")[0] for info in broken]


def installed_torch(site: Path | None) -> str | None:
    """Version of the torch in the environment, None if there is none or it is older than Prefuse works with."""
    found = next(iter(site.glob("torch-*.dist-info")), None) if site else None
    if found is None:
        return None
    version = found.name[len("torch-") : -len(".dist-info")]
    numbers = tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])
    return version if numbers >= OLDEST_TORCH else None


def without_torch(text: str) -> tuple[str, str]:
    """A requirements file's text split into torch's own line and the rest."""
    lines = text.splitlines(keepends=True)
    torch_lines = [line for line in lines if re.match(r"torch\b(?![-_.])", line)]
    return "".join(torch_lines).strip(), "".join(line for line in lines if line not in torch_lines)


def pip_install(folder: Path, *arguments: str) -> None:
    """Run the environment's pip; its failure is ours."""
    subprocess.run([str(venv_python(folder)), "-m", "pip", "install", *arguments], check=True)


def succeeds(*command: str) -> bool:
    """Whether a quiet command exits with 0."""
    return subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def make_venv(folder: Path) -> None:
    """Make the environment, or make it anew if its interpreter is gone; one without pip gets pip."""
    python = str(venv_python(folder))
    if Path(python).exists() and (succeeds(python, "-m", "pip", "--version") or succeeds(python, "-m", "ensurepip")):
        return
    if importlib.util.find_spec("ensurepip") is None:
        raise OSError("this Python can not make environments; on Debian and Ubuntu install the package python3-venv")
    print(f"Making {folder}", flush=True)
    venv.create(folder, with_pip=True, clear=True)


def install(folder: Path, files: tuple[str, ...]) -> None:
    """Install torch first and alone, unless a usable one is there, then the rest without letting pip touch it."""
    site = site_packages(folder)
    broken = forget_broken_packages(site) if site else []
    if broken:
        print(f"Repairing an interrupted installation: {', '.join(broken)}", flush=True)
    torch_pin, rest = without_torch((ROOT / files[0]).read_text(encoding="utf-8"))
    if installed_torch(site) is None:
        pip_install(folder, torch_pin)
    with tempfile.TemporaryDirectory() as scratch:
        constraints, requirements = Path(scratch, "constraints.txt"), Path(scratch, "requirements.txt")
        constraints.write_text(f"torch=={installed_torch(site_packages(folder))}\n", encoding="utf-8")
        requirements.write_text(rest, encoding="utf-8")
        others = [option for name in files if name.endswith("-dev.txt") for option in ("-r", str(ROOT / name))]
        pip_install(folder, "-r", str(requirements), *others, "-c", str(constraints))
    if "requirements-data.txt" in files:
        pip_install(folder, "--no-deps", "-r", str(ROOT / "requirements-data.txt"))


def prepare(folder: Path, files: tuple[str, ...]) -> None:
    """Bring the environment to what `files` ask for; nothing to do if the stamp says so."""
    stamp = folder / f"prefuse-{len(files)}.stamp"
    if venv_python(folder).exists() and stamp.is_file() and stamp.read_text() == stamp_key(folder, files):
        return
    stamp.unlink(missing_ok=True)
    make_venv(folder)
    print("Installing the requirements; the first time takes some minutes.", flush=True)
    install(folder, files)
    stamp.write_text(stamp_key(folder, files))


def plan(arguments: list[str]) -> tuple[tuple[str, ...], tuple[str, ...], Path, list[str]]:
    """What to run, which requirements it needs, in which environment, and the options that go to it."""
    (command, files), rest = COMMANDS[arguments[0]], arguments[1:]
    if arguments[0] == "test" and PINS_OPTION in rest:
        rest = [option for option in rest if option != PINS_OPTION]
        tests = () if any((ROOT / option.split("::")[0]).exists() for option in rest) else PINS_TESTS
        return (*command, *tests), PINS_FILES, ROOT / PINS_VENV, rest
    return command, files, ROOT / ".venv", rest


def main(arguments: list[str]) -> int:
    """Prepare the environment and hand over to the command; returns the command's exit code."""
    refusal = unsupported(sys.version_info[:3])
    if refusal or not arguments or arguments[0] not in COMMANDS:
        print(refusal or USAGE, file=sys.stderr)
        return 1 if refusal else 2
    command, files, folder, rest = plan(arguments)
    try:
        prepare(folder, files)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"The installation into {folder} failed: {error}. Start run.py again to go on.", file=sys.stderr)
        return 1
    environment = {**os.environ, "PYTHONUTF8": "1"}
    child = [str(venv_python(folder)), *command, *rest]
    return subprocess.run(child, check=False, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)

"""Run by the WebUI at start: adds what is missing and changes nothing that is there; works offline if all is there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

NEEDED = ("torch", "safetensors", "gradio", "tqdm", "numpy")


def missing() -> list[str]:
    """What can not be imported of what is needed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def installed() -> dict[str, str]:
    """Name → version of every package that is there."""
    found = ((one.metadata["Name"], one.version) for one in importlib.metadata.distributions())
    return {name: version for name, version in found if name and version}


def pip_command(names: list[str], constraints: str) -> list[str]:
    """Install `names`, with every package that is there held at its version."""
    quiet = ["--quiet", "--disable-pip-version-check"]
    return [sys.executable, "-m", "pip", "install", *quiet, "--constraint", constraints, *names]


def install(names: list[str]) -> str:
    """Install what is missing; the line that says how it went."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(f"{name}=={version}" for name, version in installed().items()))
        done = subprocess.run(pip_command(names, str(constraints)), capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "pip failed").splitlines()[-1]
        return f"Prefuse: {', '.join(names)} could not be installed ({reason}); install by hand"
    return f"Prefuse: installed {', '.join(names)}; nothing else was changed"


def main() -> None:
    """One line about what was done."""
    names = missing()
    sys.stdout.write((install(names) if names else "Prefuse: everything it needs is there; nothing was changed") + "\n")


if __name__ == "__main__":
    main()

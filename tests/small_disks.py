"""Disks of a process of its own: small ones, and such that can only be read."""

from __future__ import annotations

import shutil
import subprocess

NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
"""What starts a command that may mount them."""


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    probe = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0  # noqa: S603

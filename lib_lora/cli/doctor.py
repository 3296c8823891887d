"""``doctor``: what works here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib_lora.cli.output import tell

if TYPE_CHECKING:
    import argparse


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--json", action="store_true")


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Tell versions, devices and what works here, and what to do about the rest."""
    from lib_lora.hosts.standalone.doctor import examine

    findings = examine()
    lines = [f"{found.topic:18} {found.value}{f' → {found.advice}' if found.advice else ''}" for found in findings]
    tell({"findings": [found._asdict() for found in findings]}, "\n".join(lines), as_json=arguments.json)

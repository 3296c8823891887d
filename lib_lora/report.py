"""What a change of LoRAs did, as data and as lines to read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class AppliedLora:
    """One LoRA that is in the model now.

    Attributes:
        name: As the request wrote it.
        path: Its file.
        te: Strength of the text encoders.
        unet: Strength of the UNet; of one that changes in time, that of step 0.
        layers: Layers of the model it changes.
        unmatched: Layers of the file that the model has not.
        rank: Largest rank of a layer.
        algorithm: Of most layers, such as ``LoRA``.
        algorithms: Algorithm → number of layers.
        ranks: The ranks that occur, ascending.
        base_model: The family it was made for.
        base_model_from: What tells it.
        missing: Component → how many of its layers the model has not, and the first three.
        embeddings: Names of textual inversions that come with it.
        dyn: How many ranks of each layer are used, or None for all.
        weights: Block weights as arguments of a tag, presets and drawn numbers written out; ``""`` for none.
        resolved: The tag with these in it, if they say more than its own; else ``""``.
        schedule: How the strengths change in time, as arguments of a tag; ``""`` if they do not.
        moving: How that is done in the pass that runs: one clause, ``""`` before the first move.
        control_layers: How many layers of ControlNets it changes.
    """

    name: str
    path: Path
    te: float
    unet: float
    layers: int
    unmatched: int
    rank: int
    algorithm: str
    algorithms: Mapping[str, int] = field(default_factory=dict[str, int])
    ranks: tuple[int, ...] = ()
    base_model: str = ""
    base_model_from: str = ""
    missing: Mapping[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict[str, "tuple[int, tuple[str, ...]]"])
    embeddings: tuple[str, ...] = ()
    dyn: int | None = None
    weights: str = ""
    resolved: str = ""
    schedule: str = ""
    moving: str = ""
    control_layers: int = 0

    def __str__(self) -> str:
        """One line."""
        total = self.layers + self.unmatched
        strength = f"{self.unet:g}" if self.te == self.unet else f"te {self.te:g}, unet {self.unet:g}"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.algorithms.items())
        mixed = f" ({kinds})" if len(self.algorithms) > 1 else ""
        schedule = f"{self.schedule} ({self.moving})" if self.moving else self.schedule
        more = "".join(f", {text}" for text in (schedule, self.weights) if text)
        control = f" ({self.control_layers} in the ControlNet)" if self.control_layers else ""
        layers = f"{self.layers} of {total} layers{control}"
        return f"{self.name} at {strength}{more}: {self.algorithm} rank {self.rank}{mixed}, {layers}"


@dataclass(frozen=True)
class RefusedLora:
    """One LoRA that was asked for and is not applied.

    Attributes:
        name: As the request wrote it.
        reason: One sentence.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class SessionReport:
    """Result of `LoraSession.set`.

    Attributes:
        text: The prompt without its tags.
        applied: What is in the model now, in the order of the request.
        refused: What is not, and why.
        notes: Other things to know.
        milliseconds: Wall time of all of it: files, plan and weights.
        layers_written: Layers that were fused or hooked.
        layers_restored: Layers that got their base back.
        layers_kept: Layers that were so already.
        store: Where the base weights are.
        store_bytes: Memory that takes, in bytes.
        mode: ``prefuse`` or ``hook``.
        moves: How often scheduled strengths moved since.
        moving_milliseconds: Wall time of that.
        held_bytes: Memory that took, of the held sums of LoRAs that stay; it is free again after the last move.
    """

    text: str = ""
    applied: tuple[AppliedLora, ...] = ()
    refused: tuple[RefusedLora, ...] = ()
    notes: tuple[str, ...] = ()
    milliseconds: float = 0.0
    layers_written: int = 0
    layers_restored: int = 0
    layers_kept: int = 0
    store: str = ""
    store_bytes: int = 0
    mode: str = "prefuse"
    moves: int = 0
    moving_milliseconds: float = 0.0
    held_bytes: int = 0

    def moved(self, milliseconds: float, refused: Sequence[RefusedLora], notes: Sequence[str]) -> SessionReport:
        """The same after scheduled strengths moved, which took `milliseconds` and may have refused a LoRA more."""
        gone = {one.name for one in refused[len(self.refused) :]}
        return replace(
            self,
            applied=tuple(lora for lora in self.applied if lora.name not in gone),
            refused=tuple(refused),
            notes=tuple(dict.fromkeys((*self.notes, *notes))),
            moves=self.moves + 1,
            moving_milliseconds=self.moving_milliseconds + milliseconds,
        )

    def __str__(self) -> str:
        """Lines for a console or a page."""
        lines = [f"+ {lora}" for lora in self.applied] or ["no LoRA"]
        lines += [f"- {refused.reason}" for refused in self.refused]
        lines += [f"! {note}" for note in self.notes]
        verb = "fused" if self.mode == "prefuse" else "hooked"
        lines.append(
            f"{self.layers_written} layers {verb}, {self.layers_restored} restored, {self.layers_kept} unchanged in "
            f"{self.milliseconds:.0f} ms; base weights: {self.store}, {self.store_bytes / 1e6:.0f} MB"
        )
        if self.moves:
            held = f", {self.held_bytes / 1e6:.0f} MB held for it" if self.held_bytes >= 1e6 else ""
            lines.append(f"scheduled strengths moved {self.moves} times in {self.moving_milliseconds:.0f} ms{held}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = asdict(self)
        for lora in data["applied"]:
            lora["path"] = str(lora["path"])
        return data

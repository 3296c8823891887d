"""Texts of the plots, for pages in other languages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """What stands in the plots; those in braces are filled in.

    Attributes:
        weights: What `weights` shows, for those who can not see it.
        weight: Its left axis.
        share: Its right axis.
        heat: Title of `heat`.
        tags: Title of the bars of tags.
        file: What the plot of a file shows, for those who can not see it.
        norms: Title of its upper half.
        ranks: Title of its lower half.
        layers: How many there are.
        unknown_model: In place of a family.
        need_model: In place of a norm.
        without: What a norm leaves out.
    """

    weights: str = "weight per block, over the LoRA's share per block"
    weight: str = "weight"
    share: str = "share of ‖ΔW‖²"
    heat: str = "Share of ‖ΔW‖² by block and element; full colour is {most}"
    tags: str = "Tags of the training pictures ({shown} of {all})"
    file: str = "norms and ranks of the blocks of {name}"
    norms: str = "‖ΔW‖ of each block at strength 1, and its share of ‖ΔW‖²"
    ranks: str = "Ranks; a dot's area is the number of layers, at most {most}"
    layers: str = "{count} layers"
    unknown_model: str = "unknown model"
    need_model: str = "norms need the model"
    without: str = "without {count} layers that need the model"


ENGLISH = Words()

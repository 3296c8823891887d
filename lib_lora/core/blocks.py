"""Block of a layer, in the names of block weights: BASE, IN00 to IN11, M00, OUT00 to OUT11.

Source: https://github.com/hako-mikan/sd-webui-lora-block-weight. SDXL has no IN09 to IN11 and OUT09 to OUT11.
"""

from __future__ import annotations

TEXT_ENCODER = "BASE"
MIDDLE = "M00"

_NUMBERED = {"input_blocks": "IN", "output_blocks": "OUT"}


def block_of(component: str, ldm_path: str) -> str:
    """Block of a layer.

    Args:
        component: ``unet``, ``te1``, ``te2``; every layer of a text encoder is in BASE.
        ldm_path: Dotted path in LDM's spelling; only the UNet's is looked at.

    Returns:
        The block, or ``""`` for a layer outside of all blocks: time and label embedding, output head.
    """
    if component.startswith("te"):
        return TEXT_ENCODER
    kind, _, rest = ldm_path.partition(".")
    number = rest.partition(".")[0]
    if kind in _NUMBERED and number.isdecimal():
        return f"{_NUMBERED[kind]}{int(number):02d}"
    return MIDDLE if kind == "middle_block" else ""

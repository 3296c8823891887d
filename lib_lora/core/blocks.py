"""Block of a layer, in the names of block weights: BASE, IN00 to IN11, M00, OUT00 to OUT11.

SDXL has no IN09 to IN11 and OUT09 to OUT11. Flux has BASE, IN, D00 to D18, S00 to S37 and OUT; the blocks of SD 3 have
no names. Source: https://github.com/hako-mikan/sd-webui-lora-block-weight.
"""

from __future__ import annotations

TEXT_ENCODER = "BASE"
MIDDLE = "M00"
OUTSIDE = "other"
"""What lies in no block is shown as."""

_NUMBERED = {"input_blocks": "IN", "output_blocks": "OUT", "double_blocks": "D", "single_blocks": "S"}
_FLUX_ENDS = {
    "img_in": "IN",
    "txt_in": "IN",
    "time_in": "IN",
    "vector_in": "IN",
    "guidance_in": "IN",
    "final_layer": "OUT",
}


def block_of(component: str, ldm_path: str) -> str:
    """Block of a layer.

    Args:
        component: ``unet``, ``transformer``, ``te1``, …; every layer of a text encoder is in BASE.
        ldm_path: Dotted path in the original library's spelling; only the UNet's and Flux's are looked at.

    Returns:
        The block, or ``""`` for a layer outside of all blocks: time and label embedding, output head.
    """
    if component.startswith("te"):
        return TEXT_ENCODER
    kind, _, rest = ldm_path.partition(".")
    number = rest.partition(".")[0]
    if kind in _NUMBERED and number.isdecimal():
        return f"{_NUMBERED[kind]}{int(number):02d}"
    return MIDDLE if kind == "middle_block" else _FLUX_ENDS.get(kind, "")

"""Names of a text encoder's layers in open_clip and in transformers.

Source: https://github.com/mlfoundations/open_clip (src/open_clip/transformer.py) and CLIPTextModel of transformers.
"""

from __future__ import annotations

OPEN_CLIP_BLOCKS = "transformer.resblocks."
CLIP_BLOCKS = "encoder.layers."

OPEN_CLIP = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)
"""Inside of a block: open_clip's path, transformers' path."""
OPEN_CLIP_OUTSIDE = (("ln_final", "final_layer_norm"), ("token_embedding", "embeddings.token_embedding"))
OPEN_CLIP_QKV = "attn.in_proj"
"""Three layers of transformers, stacked: ``self_attn.q_proj``, ``k_proj`` and ``v_proj``."""

"""Key layouts of LoRA files, as data: which layer a key means and which part of the adapter it holds.

A layer's name is ``component:path`` with the dots of the path as underscores, because kohya's flat names can not be
turned back: ``unet:down_blocks_0_attentions_0_proj_in``, ``te1:encoder_layers_0_mlp_fc1``. A KeyMap knows all
spellings of the path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

GROUP_SHOWN = 3
CONTROLNETS = ("controlnet", *(f"controlnet_{number}" for number in range(2, 10)))
"""The ControlNets of a pipeline, in its order: components of their own, and how keys of LoRAs for them begin."""


class KeyParts(NamedTuple):
    """What one key of a LoRA file says.

    Attributes:
        layer: Layer name, ``component:path``, with ``.bias`` behind it for what changes the layer's bias.
        role: Which tensor of the adapter, in kohya's terms (``lora_up``, ``lora_down``, ``lora_mid``, ``alpha``,
            ``dora_scale``, ``scale``), or another family's own suffix such as ``hada_w1_a``; PEFT's
            ``lora_magnitude_vector`` and ``lora_bias`` keep their names, for they are shaped and scaled otherwise.
        layout: Whose way of writing layer names it is; within a layer a file keeps to one.
    """

    layer: str
    role: str
    layout: str


class _Prefix(NamedTuple):
    """How keys of a component begin; `kept` if that is a part of the layer's path."""

    text: str
    component: str
    layout: str
    kept: bool = False


_PREFIXES = (
    *(_Prefix(f"lora_{name}_", name, "kohya") for name in reversed(CONTROLNETS)),
    *(_Prefix(f"{name}.", name, "diffusers") for name in CONTROLNETS),
    _Prefix("lora_unet_", "unet", "kohya"),
    _Prefix("lora_te1_", "te1", "kohya"),
    _Prefix("lora_te2_", "te2", "kohya"),
    _Prefix("lora_te3_", "te3", "kohya"),
    _Prefix("lora_te_", "te1", "kohya"),
    _Prefix("lora_transformer_", "transformer", "kohya"),
    _Prefix("oft_unet_", "unet", "kohya"),
    _Prefix("lycoris_unet_", "unet", "lycoris"),
    _Prefix("lycoris_text_model_", "te1", "lycoris"),
    _Prefix("lycoris_", "unet", "lycoris"),
    _Prefix("unet.", "unet", "diffusers"),
    _Prefix("text_encoder_3.", "te3", "diffusers"),
    _Prefix("text_encoder_2.", "te2", "diffusers"),
    _Prefix("text_encoder.", "te1", "diffusers"),
    _Prefix("transformer.resblocks.", "te1", "bare", kept=True),
    _Prefix("transformer.", "transformer", "diffusers"),
    _Prefix("model.diffusion_model.", "unet", "ldm"),
    _Prefix("diffusion_model.", "unet", "ldm"),
    _Prefix("cond_stage_model.transformer.", "te1", "ldm"),
    _Prefix("cond_stage_model.model.", "te1", "ldm"),
    _Prefix("conditioner.embedders.0.transformer.", "te1", "ldm"),
    _Prefix("conditioner.embedders.1.model.", "te2", "ldm"),
    _Prefix("text_encoders.clip_l.transformer.", "te1", "ldm"),
    _Prefix("text_encoders.clip_g.transformer.", "te2", "ldm"),
    _Prefix("text_encoders.t5xxl.transformer.", "te3", "ldm"),
    _Prefix("text_model.", "te1", "bare"),
    _Prefix("encoder.layers.", "te1", "bare", kept=True),
    _Prefix("", "unet", "bare"),
)
"""The first that a key starts with counts."""

_PEFT = "base_model.model."

_KOHYA_ROLES = {
    "lora_up.weight": "lora_up",  # kohya
    "lora_down.weight": "lora_down",
    "lora_mid.weight": "lora_mid",
    "lora_B.weight": "lora_up",  # PEFT
    "lora_A.weight": "lora_down",
    "lora_B.bias": "lora_bias",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "lora.up.weight": "lora_up",  # diffusers
    "lora.down.weight": "lora_down",
    "lora_linear_layer.up.weight": "lora_up",
    "lora_linear_layer.down.weight": "lora_down",
}

_OWN_ROLES = (
    ("alpha", "dora_scale", "scale"),
    ("lora_embedding_A", "lora_embedding_B"),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t1", "lokr_t2"),
    ("oft_blocks", "oft_diag", "rescale", "constraint", "oft_R.weight", "boft_R", "boft_s"),
    ("diff", "diff_b", "set_weight", "reshape_weight", "bias_indices", "bias_values", "bias_size"),
    ("w_norm", "b_norm", "on_input", "ia3_l"),
    ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
)

BIAS = ".bias"
_BIAS_ROLES = ("diff_b", "b_norm", "lora_bias")

_EMBEDDING = "bundle_emb."

_IA3 = "weight"
"""IA3's vector; only behind flat names, because a dotted ``.weight`` is a model's own."""

_ROLES = _KOHYA_ROLES | {role: role for family in _OWN_ROLES for role in family} | {_IA3: _IA3}

_ADAPTER_NAMED = ("lora_A", "lora_B", "lora_magnitude_vector")
"""PEFT writes the adapter's name behind these, such as ``lora_A.default.weight``."""

_OLD_PROCESSOR = (
    (".processor.qkv_lora1.", ".img_attn.qkv.lora."),
    (".processor.qkv_lora2.", ".txt_attn.qkv.lora."),
    (".processor.proj_lora1.", ".img_attn.proj.lora."),
    (".processor.proj_lora2.", ".txt_attn.proj.lora."),
    (".processor.qkv_lora.", ".qkv.lora."),
    (".processor.proj_lora.", ".linear2.lora."),
    (".processor.", "."),
    (".to_q_lora.", ".to_q.lora."),
    (".to_k_lora.", ".to_k.lora."),
    (".to_v_lora.", ".to_v.lora."),
    (".to_out_lora.", ".to_out.0.lora."),
)
"""diffusers before 0.22 kept LoRAs in the attention processor; x-flux does, with the first six names."""

PIPELINE_PARTS = {
    "unet": "unet",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "te3": "text_encoder_3",
    "transformer": "transformer",
    **{name: name for name in CONTROLNETS},
}
"""Component → its name in a pipeline of diffusers, in its folders and its files."""

WRAPPERS = ("_orig_mod", "base_layer")
"""Parts that torch.compile and PEFT put into module paths."""


def split_key(key: str) -> KeyParts | None:
    """Tell layer and role of a key, or None if it is no tensor of an adapter. Takes any text, in linear time."""
    layout = ""
    if key.startswith(_PEFT):
        key, layout = key[len(_PEFT) :], "peft"
    for old, new in _OLD_PROCESSOR:
        key = key.replace(old, new)
    prefix = next(prefix for prefix in _PREFIXES if key.startswith(prefix.text))
    path, role = _split_role(key if prefix.kept else key[len(prefix.text) :])
    if not path or not role or (role == _IA3 and prefix.layout not in ("kohya", "lycoris")):
        return None
    layer = layer_name(prefix.component, path) + (BIAS if role in _BIAS_ROLES else "")
    return KeyParts(layer, role, layout or prefix.layout)


def split_embedding(key: str) -> tuple[str, str] | None:
    """Name of an embedding that is bundled with a LoRA, and of its tensor, or None if the key is none's.

    Source: the WebUI's ``bundle_emb.NAME.string_to_param.*``, and kohya's ``bundle_emb.NAME.clip_l``.
    """
    if not key.startswith(_EMBEDDING):
        return None
    name, _, tensor = key[len(_EMBEDDING) :].partition(".")
    return (name, tensor) if name and tensor else None


def layer_name(component: str, path: str) -> str:
    """Layer name of a dotted or flat path in a component."""
    flat = path.replace(".", "_")
    for wrapper in WRAPPERS:
        flat = flat.replace(f"{wrapper}_", "").removesuffix(f"_{wrapper}")
    return f"{component}:{flat.removeprefix('text_model_') if component.startswith('te') else flat}"


def _split_role(key: str) -> tuple[str, str]:
    """Path and role; the longest known suffix counts."""
    for count in (3, 2, 1):
        path, *tail = key.rsplit(".", count)
        if len(tail) == count and (role := _role(tail)):
            return path, role
    return "", ""


def _role(tail: list[str]) -> str:
    if len(tail) > 1 and tail[0] in _ADAPTER_NAMED and tail[1] not in ("weight", "bias"):
        tail = [tail[0], *tail[2:]]
    return _ROLES.get(".".join(tail), "")


def group_names(layers: Iterable[str]) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Layer names by component: how many, and the first three without the component."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        component, _, path = layer.partition(":")
        groups.setdefault(component, []).append(path)
    return {component: (len(paths), tuple(paths[:GROUP_SHOWN])) for component, paths in groups.items()}

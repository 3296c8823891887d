"""Captions → what the UNet reads: tokens in pieces of 77, and the text encoders' answer to them.

As kohya's sd-scripts (library/train_util.py): a caption of up to 225 tokens is encoded in pieces of 75, which are
joined between the first piece's start and the last one's end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

PIECE = 75
WINDOW = PIECE + 2
"""A piece with start and end: what CLIP reads at once."""
_SDXL_LAYER = -2
"""SDXL reads both text encoders' last layer but one, not normalised."""


class Encoded(NamedTuple):
    """Captions as the UNet reads them.

    Attributes:
        states: (N, tokens, width): 77, 152 or 227 tokens.
        pooled: SDXL's whole caption, (N, 1280); None for SD1 and SD2.
    """

    states: Tensor
    pooled: Tensor | None = None


def captions_to_tokens(tokenizers: Sequence[Any], captions: Sequence[str], max_token_length: int) -> dict[str, Tensor]:
    """Token ids for each text encoder, as `tokenize` makes them, by the encoder's number."""
    return {str(number): tokenize(one, captions, max_token_length) for number, one in enumerate(tokenizers, 1)}


def tokens_to_states(
    text_encoders: Sequence[Any], tokens: Mapping[str, Tensor], clip_skip: int | None
) -> dict[str, Tensor]:
    """What the UNet reads, as `encode` makes it: ``states`` and, of SDXL, ``pooled``."""
    ids = [tokens[str(number)] for number in range(1, len(text_encoders) + 1)]
    return {name: value for name, value in encode(text_encoders, ids, clip_skip)._asdict().items() if value is not None}


def tokenize(tokenizer: Any, captions: Sequence[str], max_token_length: int = PIECE) -> Tensor:
    """Token ids, (N, pieces, 77) int64.

    Args:
        tokenizer: A CLIPTokenizer.
        captions: N texts; what is longer is cut.
        max_token_length: 75, 150 or 225.
    """
    given = tokenizer(
        list(captions), padding="max_length", truncation=True, max_length=max_token_length + 2, return_tensors="pt"
    ).input_ids
    first, last = given[:, :1], given[:, -1:]
    pieces = [torch.cat([first, part, last], 1) for part in given[:, 1:-1].split(PIECE, dim=1)]
    if max_token_length > PIECE and tokenizer.pad_token_id != tokenizer.eos_token_id:
        for piece in pieces:
            _end_piece(piece, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return torch.stack(pieces, 1)


def _end_piece(piece: Tensor, end: int, pad: int) -> None:
    """Where another token fills up: a full piece ends with the end, an empty one begins with it. In place, (N, 77)."""
    full = (piece[:, -2] != end) & (piece[:, -2] != pad)
    piece[full, -1] = end
    piece[piece[:, 1] == pad, 1] = end


def encode(text_encoders: Sequence[Any], tokens: Sequence[Tensor], clip_skip: int | None = None) -> Encoded:
    """What the UNet reads.

    Args:
        text_encoders: One (SD1, SD2), or SDXL's two.
        tokens: For each, (N, pieces, 77).
        clip_skip: The layer of SD1's or SD2's text encoder to read, counted from the last, which is 1.
    """
    if len(text_encoders) == 1:
        return Encoded(_joined(_layer(text_encoders[0], tokens[0].flatten(0, 1), clip_skip or 1), tokens[0]))
    answers = [
        encoder(ids.flatten(0, 1), output_hidden_states=True)
        for encoder, ids in zip(text_encoders, tokens, strict=True)
    ]
    states = [_joined(answer.hidden_states[_SDXL_LAYER], ids) for answer, ids in zip(answers, tokens, strict=True)]
    pooled = answers[-1].text_embeds.unflatten(0, tokens[-1].shape[:2])[:, 0]
    return Encoded(torch.cat(states, -1), pooled)


def _layer(text_encoder: Any, ids: Tensor, layer: int) -> Tensor:
    """A layer's answer, normalised as the last one's is; (N, 77, width)."""
    if layer == 1:
        return text_encoder(ids).last_hidden_state
    hidden = text_encoder(ids, output_hidden_states=True).hidden_states
    inner = getattr(text_encoder, "text_model", text_encoder)  # transformers 5 has no model around the text model
    return inner.final_layer_norm(hidden[-layer])


def _joined(states: Tensor, tokens: Tensor) -> Tensor:
    """The pieces of each caption in a row: one start, all that is between, one end; (N, tokens, width)."""
    states = states.unflatten(0, tokens.shape[:2])  # (N, pieces, 77, width)
    return torch.cat([states[:, 0, :1], states[:, :, 1:-1].flatten(1, 2), states[:, -1, -1:]], 1)

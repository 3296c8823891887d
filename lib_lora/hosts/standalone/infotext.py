"""How a picture was made, as the WebUI writes it into PNG files and reads it back.

Format: prompt, a line ``Negative prompt: …``, a line ``Key: value, Key: value``; values with a comma, colon or line
break are JSON strings (the WebUI's modules/infotext_utils.py).
"""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lib_lora.errors import RequestError
from lib_lora.prompt.edit import with_block_weights
from lib_lora.prompt.tags import TAG_PATTERN

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from PIL.Image import Image

PNG_KEY = "parameters"
NEGATIVE = "Negative prompt:"
FEWEST_PARAMETERS = 3
AUTOMATIC = "Automatic"
"""Schedule type of a sampler's own kind."""
_PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


@dataclass(frozen=True)
class Infotext:
    """Prompt, negative prompt and parameters; `str` gives the WebUI's text.

    Attributes:
        prompt: With its tags.
        negative: May be empty.
        parameters: Such as ``Steps``, ``Sampler``, ``Lora hashes``, in the order of the text.
    """

    prompt: str
    negative: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """The text, as in the PNG."""
        negative = f"\n{NEGATIVE} {self.negative}" if self.negative else ""
        line = ", ".join(f"{key}: {quote(value)}" for key, value in self.parameters.items())
        return f"{self.prompt}{negative}\n{line}".strip()


def quote(value: str) -> str:
    """A JSON string if the value could be taken for the end of a parameter, else the value itself."""
    return json.dumps(value, ensure_ascii=False) if any(sign in value for sign in ",\n:") else value


def unquote(value: str) -> str:
    """The reverse of `quote`; what is no JSON string stays as it is."""
    if len(value) < len('""') or not (value.startswith('"') and value.endswith('"')):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def parse_infotext(text: str) -> Infotext:
    """Read back what `Infotext` or the WebUI wrote; text without parameters is all prompt."""
    *lines, last = text.strip().split("\n")
    found = _PARAMETER.findall(last)
    if len(found) < FEWEST_PARAMETERS:
        lines, found = [*lines, last], []
    start = next((number for number, line in enumerate(lines) if line.strip().startswith(NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).strip().removeprefix(NEGATIVE)
    parameters = {key: unquote(value.strip()) for key, value in found}
    return Infotext("\n".join(lines[:start]).strip(), negative.strip(), parameters)


def settings_of(infotext: Infotext) -> dict[str, Any]:
    """How to draw the picture again, by the names of `GenerateRequest`; what the text does not say is left out.

    Raises:
        RequestError: If it says nothing but a prompt.
    """
    said = infotext.parameters
    if not said:
        raise RequestError("There is no infotext: its last line must be as 'Steps: 20, Sampler: Euler a, Seed: 1'.")
    numbers = {
        "steps": _number(said.get("Steps")),
        "seed": _number(said.get("Seed")),
        "cfg": _number(said.get("CFG scale")),
    }
    width, _, height = said.get("Size", "").partition("x")
    numbers |= {"width": _number(width), "height": _number(height)}
    schedule = said.get("Schedule type", AUTOMATIC)
    sampler = " ".join((said.get("Sampler", ""), "" if schedule == AUTOMATIC else schedule)).strip()
    texts = {"prompt": _resolved(infotext.prompt, said.get("Lora resolved", "")), "negative": infotext.negative}
    return {**texts, "sampler": sampler, **{name: number for name, number in numbers.items() if number is not None}}


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _resolved(prompt: str, resolved: str) -> str:
    """The prompt with the block weights that were looked up or drawn for the picture in place of their names."""
    tags = [match.group() for match in TAG_PATTERN.finditer(resolved)]
    known = {with_block_weights(tag, ""): tag for tag in tags}
    return TAG_PATTERN.sub(lambda match: known.get(with_block_weights(match.group(), ""), match.group()), prompt)


def png_infotext(path: Path) -> str:
    """The infotext in a picture's file.

    Raises:
        RequestError: If it has none, or is no picture.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            text = image.info.get(PNG_KEY)
    except (OSError, ValueError, SyntaxError) as error:
        raise RequestError(f"{path.name} can not be read as a picture: {error}.") from error
    if not isinstance(text, str) or not text:
        raise RequestError(f"{path.name} does not say how it was made.")
    return text


def png_bytes(image: Image, infotext: Infotext | None = None) -> bytes:
    """A PNG file; the infotext is its text chunk ``parameters``."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    if infotext is not None:
        chunks.add_text(PNG_KEY, str(infotext))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()

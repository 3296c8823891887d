"""How a picture was made, as the WebUI writes it into PNG files and reads it back.

Format: prompt, a line ``Negative prompt: …``, a line ``Key: value, Key: value``; values with a comma, colon or line
break are JSON strings (the WebUI's modules/infotext_utils.py).
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image

PNG_KEY = "parameters"
NEGATIVE = "Negative prompt:"
FEWEST_PARAMETERS = 3
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


def png_bytes(image: Image, infotext: Infotext | None = None) -> bytes:
    """A PNG file; the infotext is its text chunk ``parameters``."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    if infotext is not None:
        chunks.add_text(PNG_KEY, str(infotext))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()

"""The embedded demo model: where it lies and what it understands."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
LORA_DIR = Path(__file__).parent / "loras"
CONFIG_DIR = Path(__file__).parent / "configs"
PROMPTS = (
    "a red circle on a blue background",
    "a yellow star on a purple background",
    "a green square on an orange background",
    "a pink heart on a white background",
    "a blue triangle on a yellow background",
    "a white circle on a red background",
    "an orange heart on a green background",
    "a purple star on a pink background",
)

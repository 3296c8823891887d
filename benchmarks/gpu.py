"""All that is promised of a GPU: switches and compiled steps of SD1.5 and SDXL."""

from __future__ import annotations

import sys

from benchmarks import gpu_compile, gpu_switch
from benchmarks.gpu_machine import on_cuda

MODELS = ("sd15", "sdxl")


def main(argv: list[str] | None = None) -> int:
    given = on_cuda(argv)
    models = [[]] if "--model" in given or "--tiny" in given else [["--model", model] for model in MODELS]
    for suite in (gpu_switch, gpu_compile):
        for model in models:
            if code := suite.main([*given, *model]):
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())

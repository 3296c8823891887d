"""Autocast is on around each activation."""

import contextlib

import torch

dtype = torch.float32
fp8 = False


def autocast(disable=False):
    return contextlib.nullcontext()


def without_autocast(disable=False):
    return torch.autocast("cuda", enabled=False) if torch.is_autocast_enabled() and not disable else contextlib.nullcontext()  # fmt: skip

"""A training's step with tensors that have sizes and no content: how much memory a GPU would need for it.

Every operation of the forward, the backward and the optimizer's step is done with torch's fake tensors, and each
storage is counted from its making to its end, as the allocator for GPUs does it. Not counted are the scratch memory of
the libraries' kernels, fragmentation, and what CUDA takes for itself.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks import synthetic
from benchmarks.common import DTYPES
from lib_lora.train.create_network import create_network
from lib_lora.train.engine import keep_fewer_activations
from lib_lora.train.network_options import NetworkOptions
from lib_lora.train.noise import NoiseSchedule
from lib_lora.train.objective import Objective
from lib_lora.train.optimizers import make_optimizer
from lib_lora.train.settings import OptimizerOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from lib_lora.train.network import TrainNetwork

BLOCK = 512
"""Bytes; the allocator gives multiples of it."""
LATENT_CHANNELS, LATENT_STEP = 4, 8
TOKENS, POOLED, SIZES = 77, 1280, 6
TIMES = 1000
RATE = 1e-4
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


@dataclass(frozen=True)
class Job:
    """A training, of a network on the UNet alone, with latents and text that were encoded before.

    Attributes:
        model: Name in `synthetic.MODELS`.
        side: Of the pictures, in pixels.
        kind: Name in `synthetic.KINDS`.
        rank: Of the network.
        batch: Pictures of a step.
        checkpointing: Whether activations are computed again.
        dtype: Name in `DTYPES`: of the frozen weights, and of the products.
    """

    model: str
    side: int
    kind: str = "LierLa"
    rank: int = 16
    batch: int = 1
    checkpointing: bool = True
    dtype: str = "bf16"


@dataclass(frozen=True)
class Counted:
    """Bytes.

    Attributes:
        weights: Of the frozen model.
        trained: The network and what the optimizer remembers.
        kept: What the forward leaves for the backward.
        step: The most that a step adds to weights and network: activations, gradients and temporary results.
    """

    weights: int
    trained: int
    kept: int
    step: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.weights + self.trained + self.step


class Allocations(TorchDispatchMode):
    """Counts the storages that operations make.

    Attributes:
        now: Bytes that are there.
        peak: The most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.count, made)
        return made

    def count(self, tensor: Tensor) -> None:
        """Take it in, if its storage was not counted yet, until that ends."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._known[storage] = size
        weakref.finalize(storage, self._free, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _free(self, size: int) -> None:
        self.now -= size


def in_float32(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same, as autocast does it on a GPU: fake tensors live on the CPU, where norms keep their type."""

    def computed(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        return compute(*args, **kwargs)

    return computed


@contextmanager
def gpu_rules() -> Generator[None]:
    """Norms are computed in float32 under autocast."""
    names = ("group_norm", "layer_norm")
    with patch.multiple(functional, **{name: in_float32(getattr(functional, name)) for name in names}):
        yield


def count_step(job: Job) -> Counted:
    """The memory of any step but the first, in which the optimizer has no memory yet."""
    with FakeTensorMode(allow_non_fake_inputs=True), gpu_rules():
        parts, inputs = Parts.of(job), make_inputs(job)
        parts.first_step()
        with Allocations() as memory:
            tree_map_only(torch.Tensor, memory.count, [*parts.objective.parameters(), parts.optimizer.state, inputs])
            memory.peak = begin = memory.now
            with products(job):
                loss = parts.objective(**inputs)
            kept = memory.now - begin
            loss.backward()
            parts.optimizer.step()
    weights, trained = (
        sum(parameter.nbytes for parameter in part.parameters()) for part in (parts.unet, parts.network)
    )
    return Counted(weights, 3 * trained, kept, memory.peak - begin)


def count_encoding(side: int) -> Counted:
    """The memory of encoding one picture before the training, with the autoencoder of SD1 and SDXL in float32."""
    with FakeTensorMode(), torch.no_grad():
        vae, pixels = AutoencoderKL(**VAE), torch.randn(1, 3, side, side)
        with Allocations() as memory:
            tree_map_only(torch.Tensor, memory.count, [*vae.parameters(), pixels])
            memory.peak = begin = memory.now
            vae.encode(pixels)
    return Counted(_size(vae), 0, 0, memory.peak - begin)


def _size(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


@dataclass(frozen=True)
class Parts:
    """What a step works on; fake where fake tensors are made.

    Attributes:
        unet: The frozen model.
        network: On it.
        objective: Of both.
        optimizer: Of the network.
    """

    unet: Any
    network: TrainNetwork
    objective: Objective
    optimizer: Optimizer

    @classmethod
    def of(cls, job: Job) -> Parts:
        """New ones."""
        unet = make_unet(job)
        wide = {"conv_dim": job.rank, "conv_alpha": job.rank} if job.kind == "C3Lier" else {}
        options = NetworkOptions(network_dim=job.rank, network_alpha=job.rank, network_train_unet_only=True, **wide)
        network = create_network(unet, (), options)
        network.attach()
        if job.checkpointing:
            keep_fewer_activations(unet, ())
        schedule = NoiseSchedule(torch.linspace(0.99, 0.01, TIMES), "epsilon")
        optimizer = make_optimizer(network.groups(None, None, RATE), OptimizerOptions())
        return cls(unet, network, Objective(unet, (), network, schedule).train(), optimizer)

    def first_step(self) -> None:
        """After it the optimizer has its memory, and the parameters no gradients."""
        for parameter in self.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()


def make_unet(job: Job) -> Any:
    """Frozen, in the job's type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[job.dtype])  # fake parameters can not be cast
    try:
        return UNet2DConditionModel(**synthetic.MODELS[job.model]).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def make_inputs(job: Job) -> dict[str, Any]:
    """Arguments of the objective."""
    latents = torch.randn(job.batch, LATENT_CHANNELS, job.side // LATENT_STEP, job.side // LATENT_STEP)
    texts = {"states": torch.randn(job.batch, TOKENS, synthetic.MODELS[job.model]["cross_attention_dim"])}
    inputs = {"latents": latents, "noise": torch.randn_like(latents), "texts": texts, "weights": torch.ones(job.batch)}
    if "addition_embed_type" in synthetic.MODELS[job.model]:
        texts["pooled"] = torch.randn(job.batch, POOLED)
        inputs["sizes"] = torch.full((job.batch, SIZES), float(job.side))
    return inputs | {"times": torch.full((job.batch,), TIMES // 2)}


@contextmanager
def products(job: Job, device: str = "cpu") -> Generator[None]:
    """Inside of it, they are computed in the job's type, as Accelerate lets a training do it."""
    dtype = DTYPES[job.dtype]
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        yield

"""Pictures and captions as the UNet learns them: encoded once before the training, or in each step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lib_lora.core.memory import OUT_OF_MEMORY
from lib_lora.errors import JobError, TrainError
from lib_lora.train.data.latents import cache_latents
from lib_lora.train.data.loader import Loader
from lib_lora.train.data.order import Shard
from lib_lora.train.data.tensor_cache import weights_fingerprint
from lib_lora.train.data.texts import cache_texts
from lib_lora.train.text import captions_to_tokens, tokens_to_states

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lib_lora.core.saving import Progress
    from lib_lora.train.data.batch import Batch
    from lib_lora.train.data.dataset import Dataset
    from lib_lora.train.data.loader import Latents, Texts
    from lib_lora.train.model import TrainModel
    from lib_lora.train.options import TrainOptions

_AS_SDXL = (None, 1, 2)
"""What is given for SDXL without meaning another layer than the one it reads: nothing is skipped, or that one is."""


class Encoders:
    """The parts of a model that pictures and captions go through before the UNet."""

    def __init__(self, model: TrainModel, options: TrainOptions, device: torch.device, *, trains_text: bool) -> None:
        """Put them where they are needed.

        Raises:
            JobError: If captions are to be encoded once by text encoders that change, or clip_skip is given for SDXL.
        """
        if trains_text and options.data.caches_texts:
            raise JobError(
                "captions can not be encoded once by text encoders that are trained; "
                "leave cache_text_encoder_outputs out, or set network_train_unet_only"
            )
        if model.is_sdxl and options.model.clip_skip not in _AS_SDXL:
            raise JobError(f"clip_skip {options.model.clip_skip} is for SD1 and SD2; SDXL reads the last layer but one")
        self._model, self._options, self._device = model, options, device
        self._scale = model.vae.config.scaling_factor
        if model.vae.dtype != torch.float32:  # in fp16 the autoencoder of SDXL makes NaN
            model.vae.float()
        for part in (model.vae, *model.text_encoders):
            part.to(device)
            part.eval()

    def loader(self, dataset: Dataset, accelerator: Any, bars: Callable[[str], Progress]) -> Loader:
        """What gives this process its batches; all that is encoded once is encoded then.

        Raises:
            FileError: If a picture can not be read any more.
            JobError: If an answer is not finite.
            OutputError: If a file of the cache can not be written.
            TrainError: If memory runs out.
        """
        options = self._options.data
        # Where the cache is on the disk, the others read what the first process wrote.
        with accelerator.main_process_first():
            try:
                texts, latents = self._encoded(dataset, bars)
            except OUT_OF_MEMORY as error:
                raise TrainError(
                    "memory ran out before the first step, while captions or pictures were encoded; "
                    "what takes less: a vae_batch_size of 1, a smaller resolution"
                ) from error
        self._put_away(texts=options.caches_texts, latents=options.caches_latents)
        return Loader(dataset, texts, latents, Shard(accelerator.process_index, accelerator.num_processes))

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Token ids, on the CPU."""
        return captions_to_tokens(self._model.tokenizers, captions, self._options.data.max_token_length)

    @torch.no_grad()
    def states(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the UNet reads."""
        tokens = {name: ids.to(self._device) for name, ids in self.tokens(captions).items()}
        return tokens_to_states(self._model.text_encoders, tokens, self._options.model.clip_skip)

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Mean and standard deviation of the latents, one after the other: (N, 2 · C, h, w) float32."""
        found = self._model.vae.encode(pixels.to(self._device)).latent_dist
        return torch.cat([found.mean, found.std], 1)

    def moments_of(self, batch: Batch) -> Tensor:
        """As `moments`, on the device: those that were cached, or new ones."""
        if batch.pixels is not None:
            return self.moments(batch.pixels)
        if batch.latents is None:
            raise ValueError("a batch has pixels or latents")
        return batch.latents.to(self._device)

    def sample(self, moments: Tensor, drawn: Tensor) -> Tensor:
        """A sample of the autoencoder's distribution, scaled; (N, C, h, w) float32.

        Args:
            moments: As of `moments`.
            drawn: Normal, as the result.
        """
        mean, deviation = moments.chunk(2, dim=1)
        return (mean + deviation * drawn) * self._scale

    def _encoded(self, dataset: Dataset, bars: Callable[[str], Progress]) -> tuple[Texts, Latents | None]:
        """Captions and pictures, as the options say: encoded once, or to be encoded in each step."""
        options, texts, latents = self._options.data, self.tokens, None
        if options.caches_texts:
            texts = cache_texts(dataset, self.states, self._text_fingerprint(), bars("encoding captions"))
        if options.caches_latents:
            fingerprint = weights_fingerprint(self._model.vae.parameters())
            latents = cache_latents(dataset, self.moments, fingerprint, bars("encoding pictures"))
        return texts, latents

    def _text_fingerprint(self) -> str:
        weights = [weight for encoder in self._model.text_encoders for weight in encoder.parameters()]
        options = self._options
        return f"{weights_fingerprint(weights)} {options.data.max_token_length} {options.model.clip_skip}"

    def _put_away(self, *, texts: bool, latents: bool) -> None:
        """Off the device, what is not needed any more."""
        for part in [*(self._model.text_encoders if texts else ()), *([self._model.vae] if latents else [])]:
            part.to("cpu")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

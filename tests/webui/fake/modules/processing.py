"""A generation: prompts, activation, conds through their cache, sampling, hires pass. A picture is a tensor."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from modules import devices, extra_networks, script_callbacks, sd_models, shared
from modules.sd_hijack import model_hijack
from modules.shared import opts


def get_learned_conditioning(model, prompts, steps, hires_steps=None, use_old_scheduling=False):
    return model.get_learned_conditioning(prompts)


@dataclass(repr=False)
class StableDiffusionProcessing:
    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 1
    batch_size: int = 1
    n_iter: int = 1
    steps: int = 2
    width: int = 64
    height: int = 64
    override_settings: dict = None
    extra_generation_params: dict = None
    disable_extra_networks: bool = False
    refiner_checkpoint: str = None

    cached_uc = [None, None]  # noqa: RUF012 -- shared by all, as there
    cached_c = [None, None]  # noqa: RUF012

    scripts = None
    is_hr_pass: bool = field(default=False, init=False)
    iteration: int = field(default=0, init=False)
    all_prompts: list = field(default=None, init=False)
    prompts: list = field(default=None, init=False)
    seeds: list = field(default=None, init=False)
    extra_network_data: dict = field(default=None, init=False)

    def __post_init__(self):
        self.comments = {}
        self.override_settings = self.override_settings or {}
        self.extra_generation_params = self.extra_generation_params or {}
        self.cached_uc = StableDiffusionProcessing.cached_uc
        self.cached_c = StableDiffusionProcessing.cached_c

    def comment(self, text):
        self.comments[text] = 1

    def cached_params(self, required_prompts, steps, extra_network_data, hires_steps=None, use_old_scheduling=False):
        info = shared.sd_model.sd_checkpoint_info.filename
        return (required_prompts, steps, hires_steps, use_old_scheduling, info, extra_network_data, self.width)

    def get_conds_with_caching(self, function, required_prompts, steps, caches, extra_network_data, hires_steps=None):
        cached_params = self.cached_params(required_prompts, steps, extra_network_data, hires_steps, False)
        for cache in caches:
            if cache[0] is not None and cached_params == cache[0]:
                return cache[1]
        caches[0][1] = function(shared.sd_model, required_prompts, steps, hires_steps, False)
        caches[0][0] = cached_params
        return caches[0][1]

    def setup_conds(self):
        negative = [self.negative_prompt] * len(self.prompts)
        data = self.extra_network_data
        self.uc = self.get_conds_with_caching(get_learned_conditioning, negative, self.steps, [self.cached_uc], data)
        self.c = self.get_conds_with_caching(get_learned_conditioning, self.prompts, self.steps, [self.cached_c], data)

    def parse_extra_network_prompts(self):
        self.prompts, self.extra_network_data = extra_networks.parse_prompts(self.prompts)

    def init(self):
        self.all_prompts = self.batch_size * self.n_iter * [self.prompt]

    def sample(self):
        image = denoise(self, self.c, self.uc)
        if self.refiner_checkpoint is not None:
            sd_models.reload_model_weights(info=sd_models.checkpoints[self.refiner_checkpoint][0])
            self.setup_conds()  # no activation before it
            image = image + denoise(self, self.c, self.uc)
        return image


@dataclass(repr=False)
class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    enable_hr: bool = False
    hr_prompt: str = ""

    cached_hr_uc = [None, None]  # noqa: RUF012
    cached_hr_c = [None, None]  # noqa: RUF012

    hr_extra_network_data: dict = field(default=None, init=False)

    def __post_init__(self):
        super().__post_init__()
        self.cached_hr_uc = StableDiffusionProcessingTxt2Img.cached_hr_uc
        self.cached_hr_c = StableDiffusionProcessingTxt2Img.cached_hr_c

    def calculate_hr_conds(self):
        if self.hr_c is None:
            caches, data = [self.cached_hr_c, self.cached_c], self.hr_extra_network_data
            self.hr_c = self.get_conds_with_caching(
                get_learned_conditioning, self.hr_prompts, self.steps, caches, data, self.steps
            )

    def setup_conds(self):
        if self.is_hr_pass:  # by a refiner
            self.hr_c = None
            self.calculate_hr_conds()
            return
        super().setup_conds()
        self.hr_c = None
        if self.enable_hr and shared.sd_model.lowvram:  # while the text encoder is there
            with devices.autocast():
                extra_networks.activate(self, self.hr_extra_network_data)
            self.calculate_hr_conds()
            with devices.autocast():
                extra_networks.activate(self, self.extra_network_data)

    def parse_extra_network_prompts(self):
        super().parse_extra_network_prompts()
        if self.enable_hr:
            hr_prompts = [self.hr_prompt or self.prompt] * self.batch_size
            self.hr_prompts, self.hr_extra_network_data = extra_networks.parse_prompts(hr_prompts)

    def sample(self):
        image = super().sample()
        if not self.enable_hr:
            return image
        sd_models.reload_model_weights()
        self.is_hr_pass = True
        with devices.autocast():
            extra_networks.activate(self, self.hr_extra_network_data)
        self.calculate_hr_conds()
        image = image + denoise(self, self.hr_c, self.hr_c)
        self.is_hr_pass = False
        return image


def denoise(p, c, uc):
    """What the model makes of both conds in the last step; `p.steps_seen` has it of each."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(p.seed))
    p.steps_seen = [predict(p, step, noise, (c, uc)) for step in range(p.steps)]
    return p.steps_seen[-1]


def predict(p, step, noise, conds):
    # The state's step is set after each, so it is one behind in all but the first.
    denoiser = SimpleNamespace(p=p, step=step, steps=p.steps, total_steps=p.steps)
    behind = {"sampling_step": max(step - 1, 0), "total_sampling_steps": p.steps}
    script_callbacks.run("cfg_denoiser", SimpleNamespace(denoiser=denoiser, **behind))
    unet = shared.sd_model.model.diffusion_model
    return sum(unet(noise, torch.tensor([10]), cond[:1]).sample for cond in conds)


def create_infotext(p, index=0):
    """The parameters' line: of a list the picture's own item, and nothing that is None."""
    params = dict(p.extra_generation_params)
    values = {key: value[index] if isinstance(value, list) else value for key, value in params.items()}
    return ", ".join(f"{key}: {value}" for key, value in values.items() if value is not None)


class Processed:
    def __init__(self, p, images, infotexts):
        self.images, self.infotexts = images, infotexts
        self.comments = "\n".join(p.comments)
        self.extra_generation_params = p.extra_generation_params


def process_images(p):
    stored = {key: opts.data[key] for key in p.override_settings if key in opts.data}
    try:
        shared.sd_model  # noqa: B018 -- loads it
        for key, value in p.override_settings.items():
            opts.set(key, value, is_api=True, run_callbacks=False)
        sd_models.reload_model_weights()
        return process_images_inner(p)
    finally:
        opts.data.update(stored)


def process_images_inner(p):
    model_hijack.clear_comments()
    images, infotexts = [], []
    with torch.no_grad():
        p.init()
        for n in range(p.n_iter):
            p.iteration = n
            sd_models.reload_model_weights()
            p.prompts = p.all_prompts[n * p.batch_size : (n + 1) * p.batch_size]
            p.seeds = [p.seed + n * p.batch_size + index for index in range(len(p.prompts))]
            p.parse_extra_network_prompts()
            if not p.disable_extra_networks:
                with devices.autocast():
                    extra_networks.activate(p, p.extra_network_data)
            p.setup_conds()
            for comment in model_hijack.comments:
                p.comment(comment)
            images.append(p.sample())
            infotexts.append(create_infotext(p))
    if not p.disable_extra_networks and p.extra_network_data:
        extra_networks.deactivate(p, p.extra_network_data)
    return Processed(p, images, infotexts)

"""Pictures from prompts by any text-to-image pipeline of diffusers (Syn4Seg spec §1.6).

SD 1.5, SDXL, SD3.5, Flux, and whatever else `DiffusionPipeline.from_pretrained` opens: the concrete class comes from
the folder or id, and what its `__call__` does not take is left out. Each picture has its own generator on the CPU, so
that a picture can be made again alone; batches have one size (the last is filled up with repeats, which are dropped),
so that shapes, and with them compiled code and rounding, stay the same.

Legend: B pictures of a batch, H x W pixels. Seeds are 63 bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from models.errors import UsageError

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OFFLOADS = ("none", "model", "group", "sequential")
LEAST_DEVIATION = 2 / 255  # a picture with less is black, or one colour


@dataclass(frozen=True)
class PictureSettings:
    """pipeline: an id or a folder; revision: of an id. dtype: "bfloat16", "float16" or "float32". size: (H, W).

    steps, guidance: of the sampler; lower guidance is more varied. negative: a negative prompt; "" narrows nothing.
    batch: pictures of one call. offload: "none", "model" (16-24 GB), "group" or "sequential" (slow). compile: the
    denoiser, once. options: more arguments of the pipeline's `__call__`, such as max_sequence_length. seed: of the run.
    """

    pipeline: str = "stabilityai/stable-diffusion-3.5-large"
    revision: str | None = None
    dtype: str = "bfloat16"
    size: tuple[int, int] = (1024, 1024)
    steps: int = 28
    guidance: float = 4.5
    negative: str = ""
    batch: int = 8
    offload: str = "none"
    compile: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in TYPES or self.offload not in OFFLOADS:
            raise UsageError(f"dtype is one of {', '.join(TYPES)}, offload one of {', '.join(OFFLOADS)}; choose again.")


@dataclass(frozen=True)
class Drawn:
    """One picture uint8 [H, W, 3], or None, and its status: "ok", "nan" or "black". attempts: 2 after a retry."""

    picture: np.ndarray | None
    status: str
    attempts: int = 1


def picture_seed(run: object, prompt_uid: str, number: int) -> int:
    """63 bits of the run's seed, the prompt and the picture's number among those of the prompt."""
    digest = blake2b(f"{run}|{prompt_uid}|{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**63


class TextToImage:
    """A pipeline that is ready to draw. Raises UsageError when `options` has a name that its `__call__` lacks."""

    def __init__(self, pipeline: Any, settings: PictureSettings) -> None:
        self.pipeline, self.settings = pipeline, settings
        self.known = inspect.signature(pipeline.__call__).parameters
        if unknown := sorted(set(settings.options) - set(self.known)):
            name = type(pipeline).__name__
            raise UsageError(f"{name} takes no {', '.join(unknown)}; its options are {', '.join(sorted(self.known))}.")
        pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def open(cls, settings: PictureSettings, device: str = "cpu", folder: str | None = None) -> TextToImage:
        """The pipeline of an id or folder, placed on a device. Raises UsageError when there is none."""
        more = {"revision": settings.revision} if settings.revision else {}
        pipeline = _open(folder or settings.pipeline, dtype=TYPES[settings.dtype], **more)
        place(pipeline, settings, device)
        return cls(pipeline, settings)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Drawn]:
        """One picture for each prompt and seed. A picture that comes out NaN or black is tried once more with the
        autoencoder in float32."""
        drawn: list[Drawn] = []
        for start in range(0, len(prompts), self.settings.batch):
            part = slice(start, start + self.settings.batch)
            drawn += self._batch(list(prompts[part]), list(seeds[part]))
        return drawn

    def _batch(self, prompts: list[str], seeds: list[int]) -> list[Drawn]:
        found = [judged(image) for image in self._call(prompts, seeds)]
        again = [i for i, one in enumerate(found) if one.status != "ok"]
        if again:
            with exact_autoencoder(self.pipeline):
                images = self._call([prompts[i] for i in again], [seeds[i] for i in again])
            for i, image in zip(again, images, strict=True):
                found[i] = judged(image, attempts=2)
        return found

    def _call(self, prompts: list[str], seeds: list[int]) -> np.ndarray:
        """Float [n, H, W, 3] in 0..1 of up to B prompts."""
        short = self.settings.batch - len(prompts)
        seeds = seeds + seeds[-1:] * short
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        with torch.inference_mode():
            out = self.pipeline(prompt=prompts + prompts[-1:] * short, generator=generators, **self.arguments())
        return out.images[: len(prompts)]

    def arguments(self) -> dict[str, Any]:
        """What the settings mean to this pipeline. Where guidance is distilled into the weights (Flux), a negative
        prompt needs a guidance of its own, `true_cfg_scale`."""
        chosen, (height, width) = self.settings, self.settings.size
        asked = {"height": height, "width": width, "num_inference_steps": chosen.steps, "output_type": "np",
                 "guidance_scale": chosen.guidance}
        if chosen.negative and "negative_prompt" in self.known:
            asked["negative_prompt"] = [chosen.negative] * chosen.batch
        if "true_cfg_scale" in self.known and (chosen.negative or self.known["true_cfg_scale"].default > 1):
            asked["true_cfg_scale"] = chosen.guidance
            if "negative_prompt" in self.known:
                asked["negative_prompt"] = [chosen.negative or " "] * chosen.batch
        return {name: value for name, value in asked.items() if name in self.known} | dict(chosen.options)


def open_encoders(name: str) -> Any:
    """The pipeline of an id or folder without its denoiser and autoencoder: what prompts are embedded by."""
    from diffusers import DiffusionPipeline

    heavy = ("transformer", "unet", "vae", "image_encoder", "safety_checker", "feature_extractor")
    config = _open(name, DiffusionPipeline.load_config)
    return _open(name, **{part: None for part in heavy if part in config})


def _open(name: str, load: Any = None, **more: Any) -> Any:
    from diffusers import DiffusionPipeline

    try:
        return (load or DiffusionPipeline.from_pretrained)(name, **more)
    except (OSError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0]
        reason = f"There is no pipeline at {name!r} ({first}); give a folder or an id that is at hand."
        raise UsageError(reason) from error


def judged(image: np.ndarray, attempts: int = 1) -> Drawn:
    """A picture of floats [H, W, 3] in 0..1 as uint8, unless it is broken."""
    if not np.isfinite(image).all():
        return Drawn(None, "nan", attempts)
    if image.std() < LEAST_DEVIATION:
        return Drawn(None, "black", attempts)
    return Drawn((image.clip(0, 1) * 255).round().astype(np.uint8), "ok", attempts)


def place(pipeline: Any, settings: PictureSettings, device: str) -> None:
    """Onto the device, as a whole or in parts; with `compile`, the denoiser is compiled at its first call."""
    if settings.offload == "none":
        pipeline.to(device)
    elif device == "cpu":
        raise UsageError("Offloading moves weights to an accelerator, and there is none; set offload to none.")
    elif settings.offload == "group":
        pipeline.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level", use_stream=True)
    else:
        getattr(pipeline, f"enable_{settings.offload}_cpu_offload")(device=device)
    if settings.compile:
        denoiser(pipeline).compile(fullgraph=True)


def denoiser(pipeline: Any) -> torch.nn.Module:
    return pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet


@contextmanager
def exact_autoencoder(pipeline: Any) -> Iterator[None]:
    """The autoencoder in float32 for a while: half precision overflows in some (SDXL's), which gives black pictures."""
    vae = pipeline.vae
    before, decode, own = vae.dtype, vae.decode, vars(vae).get("decode")

    def decode_exactly(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return decode(latents.float(), *args, **kwargs)

    vae.to(torch.float32)
    vae.decode = decode_exactly
    try:
        yield
    finally:
        del vae.decode
        if own is not None:
            vae.decode = own
        vae.to(before)

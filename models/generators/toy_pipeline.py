"""A text-to-image pipeline of the toy world: small, fitted from scratch, and a real `StableDiffusionPipeline`.

It stands in for the web-trained generator where none can be fetched: it has seen captioned pictures of all classes and
no mask. Saved by `save_pretrained`, it is opened, prompted and embedded like SD 1.5 (`models.generators.text2image`).

    autoencoder   AutoencoderTiny, pictures at a quarter of the side
    text          CLIPTextModel over a word-level tokenizer, fitted with the denoiser
    denoiser      UNet2DConditionModel, v-prediction, zero terminal SNR (arXiv 2305.08891); the caption reaches every
                  block by the time embedding, too: by cross-attention alone a short training never hears it. Captions
                  are dropped now and then, so that guidance works (arXiv 2207.12598). A recogniser of the same
                  pictures tells it what shapes there are (`models.generators.alignment`)

Legend: B pictures, H x W pixels, h x w = H/4 x W/4 latent cells, c channels, L tokens. Pictures are -1..1 inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, l1_loss, mse_loss

from models.episode import number
from models.fitting import Fitting, Tell, batch_indices, run
from models.generators.alignment import Aligner
from models.generators.words import KNOWN, TINTS, class_words

WORDS = ("a", "an", "and", "on", "of", "dark", "bright", "ground", "nothing", "photo", *TINTS)
SHRINK = 4
SPECIAL = ("<pad>", "<s>", "<unk>", "</s>")  # an end of id 2 means old configs to CLIPTextModel: it pools elsewhere


@dataclass(frozen=True)
class ToyPipelineSettings:
    """size: pictures (H, W), multiples of 16. autoencoder, text: widths. latents: channels of a latent cell, three or
    more: the first three are a small picture. denoiser: widths by level, finest first.

    autoencoder_crop: side of the square that each of its steps sees; smaller ones are cheaper, and it has no memory for
    places. drop: share of captions that training leaves out. align: weight of the pull to a recogniser's features (0:
    none). average: decay of the denoiser's running average.
    """

    size: tuple[int, int] = (96, 128)
    autoencoder: int = 24
    latents: int = 3
    denoiser: tuple[int, ...] = (48, 64, 96)
    text: int = 64
    tokens: int = 24
    autoencoder_steps: int = 3000
    autoencoder_batch: int = 16
    autoencoder_crop: int = 32
    autoencoder_rate: float = 3e-3
    steps: int = 4000
    batch: int = 12
    rate: float = 1e-3
    drop: float = 0.1
    align: float = 0.5
    average: float = 0.995
    seed: int = 0


@dataclass
class ToyPipeline:
    """The parts of the pipeline while it is fitted."""

    vae: Any
    unet: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any

    def pipeline(self) -> Any:
        """The diffusers pipeline of these very parts."""
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=self.vae.eval(), unet=self.unet.eval(), text_encoder=self.text_encoder.eval(), tokenizer=self.tokenizer,
            scheduler=self.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )

    def save(self, folder: Path) -> None:
        self.pipeline().save_pretrained(folder)

    def ids(self, captions: Sequence[str]) -> Tensor:
        """Token ids [B, L] of captions, padded to the full length as the pipeline does."""
        return self.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")["input_ids"]


def build(settings: ToyPipelineSettings, classes: Sequence[str]) -> ToyPipeline:
    """New parts with random weights (from the settings' seed alone) and a tokenizer that knows the classes."""
    from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    width, last = (settings.autoencoder,) * 3, len(settings.denoiser) - 1  # three levels: a quarter of the side
    tokenizer = word_tokenizer(classes, settings.tokens)
    crossing = ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * last, ["CrossAttnUpBlock2D"] * last + ["UpBlock2D"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        vae = AutoencoderTiny(
            encoder_block_out_channels=width, decoder_block_out_channels=width, num_encoder_blocks=(0, 1, 1),
            num_decoder_blocks=(1, 1, 0), latent_channels=settings.latents,
        )
        unet = UNet2DConditionModel(
            sample_size=tuple(side // SHRINK for side in settings.size), in_channels=settings.latents,
            out_channels=settings.latents, layers_per_block=1,
            block_out_channels=settings.denoiser, down_block_types=crossing[0], up_block_types=crossing[1],
            cross_attention_dim=settings.text, attention_head_dim=4, norm_num_groups=8,
            addition_embed_type="text", addition_embed_type_num_heads=4, resnet_time_scale_shift="scale_shift",
        )
        text = CLIPTextModel(CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=settings.text, intermediate_size=2 * settings.text,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=settings.tokens,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ))
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, steps_offset=1,
    )
    return ToyPipeline(vae, unet, text, tokenizer, scheduler)


def word_tokenizer(classes: Sequence[str], length: int) -> Any:
    """One token a word: the words of captions and of everything a class is called."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    said = [part for name in (*classes, *KNOWN) for part in class_words(name).noun.lower().split()]
    words = dict.fromkeys([*SPECIAL, *WORDS, *sorted(said)])
    model = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    model.normalizer, model.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    ends = [(token, SPECIAL.index(token)) for token in ("<s>", "</s>")]
    model.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=length,
    )


# ---- what it learns from


def as_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---- the steps


def autoencoder_losses(vae: Any, pictures: Tensor) -> dict[str, Tensor]:
    """Squared and absolute error of the reconstruction of pictures [B, 3, H, W] (absolute error alone is nearly
    satisfied by a grey picture of coloured ground). The first latents are pulled to the picture made small, twice its
    values: as in pictures, noise then hides what is fine first, and colour and place last."""
    latents = vae.encode(pictures).latents
    restored = vae.decode(latents).sample
    error, small = l1_loss(restored, pictures), 2 * avg_pool2d(pictures, SHRINK)
    pull = mse_loss(latents[:, : small.shape[1]], small)
    return {"loss": 4 * mse_loss(restored, pictures) + error + pull, "error": error, "pull": pull}


def denoiser_losses(parts: ToyPipeline, latents: Tensor, ids: Tensor, draws: torch.Generator) -> dict[str, Tensor]:
    """Squared error of the velocity; latents [B, c, h, w] at unit deviation, ids [B, L]. Where there is more
    signal than noise it counts less, as in min-SNR weighting (arXiv 2303.09556): few steps have to learn structure."""
    noise = torch.randn(latents.shape, generator=draws)
    times = torch.randint(parts.scheduler.config.num_train_timesteps, (len(latents),), generator=draws)
    noisy = parts.scheduler.add_noise(latents, noise, times)
    said = parts.unet(noisy, times, parts.text_encoder(ids).last_hidden_state).sample
    error = (said - parts.scheduler.get_velocity(latents, noise, times)).square().mean((1, 2, 3))
    kept = parts.scheduler.alphas_cumprod[times]  # the share of signal: SNR / (SNR + 1)
    return {"loss": (error * (2 - 2 * kept).clamp(max=1)).mean(), "error": error.detach().mean()}


def autoencoder_fitting(parts: ToyPipeline, settings: ToyPipelineSettings) -> Fitting:
    return Fitting({"vae": parts.vae}, settings.autoencoder_rate, settings.autoencoder_steps)


def denoiser_fitting(parts: ToyPipeline, settings: ToyPipelineSettings, aligner: Aligner | None = None) -> Fitting:
    modules = {"unet": parts.unet, "text": parts.text_encoder} | ({"aligner": aligner} if aligner else {})
    return Fitting(modules, settings.rate, settings.steps, settings.average)


# ---- the loops


def fit_autoencoder(
    parts: ToyPipeline, fitting: Fitting, pictures: np.ndarray, settings: ToyPipelineSettings, tell: Tell | None = None,
) -> None:
    """Fits the autoencoder to pictures uint8 [N, H, W, 3], then notes the scale that gives latents unit deviation."""

    def losses_at(step: int) -> dict[str, Tensor]:
        chosen = batch_indices(len(pictures), settings.autoencoder_batch, settings.seed, "autoencoder", step)
        shown = crops(pictures[chosen], settings.autoencoder_crop, settings.seed, "crop", step)
        return autoencoder_losses(parts.vae, as_tensor(shown))

    run(fitting, losses_at, tell)
    latents = encode_all(parts.vae, pictures[:256], scaled=False)
    parts.vae.register_to_config(scaling_factor=float(1 / latents.std()))


def crops(pictures: np.ndarray, side: int, *key: object) -> np.ndarray:
    """The same square [B, side, side, 3] of all pictures [B, H, W, 3], where `key` decides; as high and wide as they
    are where they are smaller."""
    room = [max(length - side, 0) for length in pictures.shape[1:3]]
    top, left = np.random.default_rng(number(*key)).integers(np.array(room) + 1)
    return pictures[:, top : top + side, left : left + side]


@torch.inference_mode()
def encode_all(vae: Any, pictures: np.ndarray, batch: int = 32, scaled: bool = True) -> Tensor:
    """Latents [N, c, h, w] of pictures uint8 [N, H, W, 3], at unit deviation if `scaled`."""
    starts = range(0, len(pictures), batch)
    latents = torch.cat([vae.encode(as_tensor(pictures[s : s + batch])).latents for s in starts])
    return latents * vae.config.scaling_factor if scaled else latents


def fit_denoiser(
    parts: ToyPipeline, fitting: Fitting, latents: Tensor, captions: Callable[[int, int], str],
    settings: ToyPipelineSettings, tell: Tell | None = None, aligner: Aligner | None = None,
    targets: Tensor | None = None,
) -> None:
    """Fits denoiser and text encoder. captions: (picture, step) -> its caption, in words that may differ by step.
    aligner: pulls the denoiser to targets [N, d, h', w'] of the pictures, by the settings' `align`."""
    latents = latents.clone()  # made in inference mode

    def losses_at(step: int) -> dict[str, Tensor]:
        chosen = batch_indices(len(latents), settings.batch, settings.seed, "denoiser", step)
        draws = torch.Generator().manual_seed(number(settings.seed, "noise", step) % 2**63)
        dropped = (torch.rand(len(chosen), generator=draws) < settings.drop).tolist()
        said = ["" if gone else captions(int(n), step) for n, gone in zip(chosen, dropped, strict=True)]
        losses = denoiser_losses(parts, latents[chosen], parts.ids(said), draws)
        if aligner is None:
            return losses
        apart = aligner.loss(targets[chosen])
        return losses | {"loss": losses["loss"] + settings.align * apart, "apart": apart}

    with aligner.listening(parts.unet) if aligner else nullcontext():
        run(fitting, losses_at, tell)
    fitting.use_average()

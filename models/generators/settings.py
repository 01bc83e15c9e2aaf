"""How pictures are translated: the one settings class of the generators, light to import."""

from __future__ import annotations

from dataclasses import dataclass

SOURCES = {"lightness": "infrared", "rgb": "infrared", "rgb_lightness": "lightness", "thermal": "visible"}
CHANNELS = {"lightness": 1, "rgb": 3, "rgb_lightness": 3, "thermal": 1}


@dataclass(frozen=True)
class TranslateSettings:
    """Unpaired translation of infrared frames. The defaults are SynDiff's (256 x 256 crops, a large GPU).

    generator               name in GENERATORS; "thermal" needs no training and no visible pictures
    directions              translators to fit, out of "lightness" and "rgb" (from infrared, to 1 and 3 channels) and
                            "rgb_lightness" (lightness to RGB; without it, the RGB one is applied to lightness); and
                            "thermal", the way back from the lightness of visible pictures to infrared
    splits                  splits of the frames that `synthesise` translates
    seed                    of training; also of the noise, together with the frame's id

    channels, layers        widths of the diffusive UNet, finest level first, and residual blocks per level
    patch                   side of the pixel blocks folded into channels before the UNet (1: the paper; 4: 30x cheaper)
    attention               self-attention at two levels
    steps                   reverse diffusion steps (T=1000, k=250 in the paper: 4)
    latent                  size of z
    cycle_width, cycle_blocks           the ResNet cycle generators
    identity_start          all generators start from the picture itself; not the paper's, for short budgets
    discriminator_channels  stem and halving blocks of the diffusive discriminator
    patch_width, patch_layers, patch_norm   the PatchGAN of the cycle pair; its instance norms hide brightness and
                            colour, so a short training does without
    both_ways               also train the diffusive pair visible -> infrared, as the paper does; nothing here uses it

    crop, short_side        training crops in pixels, of frames scaled to this short side (None: as they are)
    batch, iterations, checkpoint_every
    rate_generator, rate_discriminator, rate_last       Adam, cosine to the last rate
    cycle_weight            λ of both L1 terms, next to adversarial terms of weight 1
    structure_weight        of the gradient-direction term between a picture and its translation (0: the paper)
    r1_weight, r1_every     lazy R1 on x_t, not multiplied by the interval: the effective γ is weight / every
    average                 decay of the averaged diffusive generator, warmed up over the first steps
    """

    generator: str = "syndiff"
    directions: tuple[str, ...] = ("lightness", "rgb")
    splits: tuple[str, ...] = ("train", "test")
    seed: int = 0
    channels: tuple[int, ...] = (64, 64, 128, 128, 256, 256)
    layers: int = 2
    patch: int = 1
    attention: bool = True
    steps: int = 4
    latent: int = 100
    cycle_width: int = 64
    cycle_blocks: int = 6
    identity_start: bool = False
    discriminator_channels: tuple[int, ...] = (128, 256, 512, 512, 512, 512, 512)
    patch_width: int = 64
    patch_layers: int = 3
    patch_norm: bool = True
    both_ways: bool = True
    crop: int = 256
    short_side: int | None = 288
    batch: int = 4
    iterations: int = 50_000
    checkpoint_every: int = 1000
    rate_generator: float = 1.6e-4
    rate_discriminator: float = 1e-4
    rate_last: float = 1e-5
    cycle_weight: float = 0.5
    structure_weight: float = 0.0
    r1_weight: float = 1.0
    r1_every: int = 10
    average: float = 0.999

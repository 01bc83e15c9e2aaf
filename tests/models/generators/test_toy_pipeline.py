"""The toy world's generator: real diffusers parts, losses that fall, and a folder that opens like any other."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.datasets.toy import Toy
from models.fitting import average_of
from models.generators.alignment import Aligner, targets_of
from models.generators.captions import caption_of, look_of
from models.generators.embedding import text_embedder
from models.generators.recognition import RecogniserSettings, build_recogniser
from models.generators.text2image import PictureSettings, TextToImage
from models.generators.toy_pipeline import (
    ToyPipelineSettings,
    as_tensor,
    autoencoder_fitting,
    build,
    crops,
    denoiser_fitting,
    denoiser_losses,
    encode_all,
    fit_autoencoder,
    fit_denoiser,
)

TINY = ToyPipelineSettings(
    size=(32, 48), autoencoder=12, denoiser=(16, 32), text=32, autoencoder_steps=50, steps=50, batch=8,
)


@pytest.fixture(scope="module")
def scenes():
    """Pictures uint8 [12, 32, 48, 3] and the names that each shows."""
    toy = Toy(size=TINY.size, train=12, test=0)
    read = [toy.read(item) for item in toy.items()]
    names = [[toy.classes[k - 1] for k in np.unique(picture.label) if k] for picture in read]
    return np.stack([picture.visible for picture in read]), names


@pytest.fixture(scope="module")
def fitted(scenes):
    """Parts after 50 steps of each loop, and what the loops told."""
    pictures, names = scenes
    parts, told = build(TINY, Toy.classes), {"autoencoder": [], "denoiser": []}
    fit_autoencoder(parts, autoencoder_fitting(parts, TINY), pictures, TINY,
                    lambda step, numbers: told["autoencoder"].append(numbers))
    latents = encode_all(parts.vae, pictures)

    def captions(n, step):
        return caption_of(names[n], look_of(pictures[n]), step)

    fit_denoiser(parts, denoiser_fitting(parts, TINY), latents, captions, TINY,
                 lambda step, numbers: told["denoiser"].append(numbers))
    return parts, told, latents


def test_both_losses_fall_within_fifty_steps(fitted):
    _, told, _ = fitted
    assert average_of(told["autoencoder"][-5:], "error") < 0.6 * average_of(told["autoencoder"][:5], "error")
    assert average_of(told["denoiser"][-10:]) < 0.9 * average_of(told["denoiser"][:10])


def test_latents_have_unit_deviation_and_a_quarter_of_the_side(fitted, scenes):
    parts, _, latents = fitted
    assert latents.shape == (12, 3, 8, 12) and latents.std() == pytest.approx(1, abs=0.05)
    with torch.no_grad():
        restored = parts.vae.decode(latents / parts.vae.config.scaling_factor).sample
    assert (restored - as_tensor(scenes[0])).abs().mean() < 0.3


def test_a_crop_is_one_square_of_all_pictures_that_the_key_decides(scenes):
    pictures, _ = scenes
    one, same, other = (crops(pictures, 16, *key) for key in ((0, 1), (0, 1), (0, 2)))
    assert one.shape == (12, 16, 16, 3) and np.array_equal(one, same) and not np.array_equal(one, other)
    places = [(y, x) for y in range(17) for x in range(33) if np.array_equal(pictures[:, y : y + 16, x : x + 16], one)]
    assert len(places) == 1
    assert crops(pictures, 40, 0).shape == (12, 32, 40, 3) and np.array_equal(crops(pictures, 99, 0), pictures)


def test_a_recogniser_tells_the_denoiser_what_it_sees(scenes):
    """With the pull the denoiser's features come to agree with the recogniser's, on the same batches; without, not."""
    pictures, names = scenes
    judge = build_recogniser(3, RecogniserSettings(widths=(8, 16))).eval()
    targets, apart = targets_of(judge, as_tensor(pictures)), {}
    for pull in (0.0, 1.0):
        settings, told = replace(TINY, align=pull), []
        parts = build(settings, Toy.classes)
        aligner, latents = Aligner(parts.unet, judge.described), encode_all(parts.vae, pictures)
        fitting = denoiser_fitting(parts, settings, aligner)
        fit_denoiser(parts, fitting, latents, lambda n, step: " and ".join(names[n]), settings,
                     lambda step, numbers, told=told: told.append(numbers), aligner, targets)
        apart[pull] = [average_of(part, "apart") for part in (told[:5], told[-5:])]
        assert not parts.unet.mid_block._forward_hooks and not any("project" in key for key in parts.unet.state_dict())
    assert apart[0.0][1] > 0.95 * apart[0.0][0] and apart[1.0][1] < 0.85 * apart[1.0][0], apart


def test_every_word_of_a_caption_is_known(fitted):
    parts, _, _ = fitted
    text = "an arch and a dumbbell on bright ground"
    ids = parts.ids([text, "an unheard thing"])
    unknown = parts.tokenizer.unk_token_id
    assert (ids[0] != unknown).all() and (ids[1] == unknown).sum() == 2
    assert ids.shape == (2, TINY.tokens) and ids[0, 0] == parts.tokenizer.bos_token_id
    assert (ids[0] == parts.tokenizer.eos_token_id).sum() == 1


def test_the_saved_folder_is_opened_prompted_and_embedded_like_any_pipeline(fitted, tmp_path):
    parts, _, _ = fitted
    parts.save(tmp_path / "toy")
    settings = PictureSettings(str(tmp_path / "toy"), dtype="float32", size=TINY.size, steps=3, guidance=2.0, batch=2)
    opened = TextToImage.open(settings)
    assert type(opened.pipeline).__name__ == "StableDiffusionPipeline"
    drawn = opened.draw(["a disc on dark ground", "a star on bright ground", "a ring"], [1, 2, 3])
    assert all(one.picture.shape == (32, 48, 3) for one in drawn)
    again = TextToImage(parts.pipeline(), settings).draw(["a disc on dark ground"], [1])[0].picture
    assert np.abs(again.astype(int) - drawn[0].picture.astype(int)).max() <= 1
    rows = text_embedder(opened.pipeline)(["a disc on dark ground", "a star on dark ground", "a disc on bright ground"])
    assert rows.shape == (3, 32) and (rows @ rows.T)[np.triu_indices(3, 1)].max() < 0.999, "all words count"


def test_the_caption_reaches_the_denoiser(fitted):
    parts, _, latents = fitted
    said = [parts.text_encoder(parts.ids([text])).last_hidden_state for text in ("a disc", "a star and a ring")]
    with torch.no_grad():
        found = [parts.unet(latents[:1], 500, states).sample for states in said]
    assert (found[0] - found[1]).abs().max() > 1e-5


def test_the_caption_reaches_the_blocks_without_cross_attention(fitted):
    """By the time embedding: what a short training listens to."""
    parts, _, latents = fitted
    deaf = deepcopy(parts.unet)
    for name, module in deaf.named_modules():
        if name.endswith("attn2"):
            torch.nn.init.zeros_(module.to_out[0].weight)
            torch.nn.init.zeros_(module.to_out[0].bias)
    said = [parts.text_encoder(parts.ids([text])).last_hidden_state for text in ("a disc", "a star and a ring")]
    with torch.no_grad():
        found = [deaf(latents[:1], 500, states).sample for states in said]
    assert (found[0] - found[1]).abs().max() > 1e-5


def test_the_first_latents_are_a_small_picture(fitted, scenes):
    _, _, latents = fitted
    small = torch.nn.functional.avg_pool2d(as_tensor(scenes[0]), 4)
    assert small.shape == latents[:, :3].shape
    for channel in range(3):
        pair = torch.stack([small[:, channel].flatten(), latents[:, channel].flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.6


def test_where_there_is_more_signal_than_noise_an_error_counts_less(fitted):
    parts, _, latents = fitted
    ids = parts.ids(["a disc"] * 12)
    with torch.no_grad():
        both = [denoiser_losses(parts, latents, ids, torch.Generator().manual_seed(n)) for n in range(4)]
    assert all(0 < one["loss"] < one["error"] for one in both)
    times = torch.tensor([0, 999])
    kept = parts.scheduler.alphas_cumprod[times]
    assert kept[0] > 0.99 and kept[1] < 1e-6, "nothing of the picture is left at the end"


def test_parts_depend_on_the_seed_alone():
    first, again = (build(TINY, Toy.classes).unet.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)

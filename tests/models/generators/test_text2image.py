"""Four families of real (tiny) pipelines behind one call: same picture alone or in company, and guards that guard."""

import numpy as np
import pytest
import torch

from models.errors import UsageError
from models.generators.text2image import (
    PictureSettings,
    TextToImage,
    exact_autoencoder,
    judged,
    picture_seed,
    place,
)
from tests.models.generators.tiny import FAMILIES, pipeline

PROMPTS = ["a photo of a car", "an old car", "a red dog", "night rain"]
SETTINGS = PictureSettings("tiny", dtype="float32", size=(32, 48), steps=2, batch=2)


@pytest.fixture(scope="module")
def pipelines():
    return {family: pipeline(family) for family in FAMILIES}


@pytest.fixture(scope="module")
def sd3(pipelines):
    return pipelines["sd3"]


def generator(pipe, **changes):
    return TextToImage(pipe, PictureSettings(**{**vars(SETTINGS), **changes}))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_draws_pictures_of_the_size_asked_for(pipelines, family):
    drawn = generator(pipelines[family]).draw(PROMPTS[:3], [1, 2, 3])
    assert [one.status for one in drawn] == ["ok"] * 3
    assert all(one.picture.shape == (32, 48, 3) and one.picture.dtype == np.uint8 for one in drawn)
    assert not np.array_equal(drawn[0].picture, drawn[1].picture)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_picture_depends_on_its_prompt_and_seed_alone(pipelines, family):
    """Alone, in company, in another place of another batch: spec §1.6, within one grey level in float32."""
    made = generator(pipelines[family])
    together = [one.picture.astype(int) for one in made.draw(PROMPTS, [5, 6, 7, 8])]
    alone = made.draw([PROMPTS[2]], [7])[0].picture
    turned = made.draw(PROMPTS[::-1], [8, 7, 6, 5])[1].picture
    larger = generator(pipelines[family], batch=3).draw([PROMPTS[2]], [7])[0].picture
    for other in (alone, turned, larger):
        assert np.abs(together[2] - other).max() <= 1
    assert np.array_equal(alone, made.draw([PROMPTS[2]], [7])[0].picture)
    assert np.abs(together[2] - made.draw([PROMPTS[2]], [9])[0].picture).max() > 1


def test_batches_change_less_than_1e_5(sd3):
    one, three = (generator(sd3, batch=n)._call(["a car"] * n, list(range(n))) for n in (1, 3))
    assert np.abs(one[0] - three[0]).max() < 1e-5


def test_a_pipeline_without_its_encoders_draws_the_same_from_embeddings(sd3):
    """What a generator on a small GPU does: encode first, drop the encoders, then draw."""
    from diffusers import StableDiffusion3Pipeline

    with torch.inference_mode():
        rows = sd3.encode_prompt(PROMPTS[0], None, None)
    parts = {name: getattr(sd3, name) for name in ("transformer", "scheduler", "vae")}
    missing = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    bare = StableDiffusion3Pipeline(**parts, **missing)
    bare.set_progress_bar_config(disable=True)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    draws = torch.Generator().manual_seed(4)
    with torch.inference_mode():
        found = bare(**dict(zip(names, rows, strict=True)), generator=draws, height=32, width=48, num_inference_steps=2,
                     guidance_scale=4.5, output_type="np").images
    assert np.array_equal(found, generator(sd3, batch=1)._call([PROMPTS[0]], [4]))


def test_the_last_batch_is_filled_up_and_the_rest_dropped(sd3, monkeypatch):
    made, sizes = generator(sd3, batch=3), []
    call = type(sd3).__call__
    monkeypatch.setattr(type(sd3), "__call__", lambda self, **k: sizes.append(len(k["prompt"])) or call(self, **k))
    assert len(made.draw(PROMPTS, [1, 2, 3, 4])) == 4 and sizes == [3, 3]


def test_a_saved_folder_gives_the_same_pictures(sd3, tmp_path):
    sd3.save_pretrained(tmp_path / "pipe")
    opened = TextToImage.open(PictureSettings(**{**vars(SETTINGS), "pipeline": str(tmp_path / "pipe")}))
    first, again = (made.draw(PROMPTS[:1], [3])[0].picture.astype(int) for made in (generator(sd3), opened))
    assert np.abs(first - again).max() <= 1 and type(opened.pipeline) is type(sd3)


# ---- what a family takes


def test_arguments_are_those_that_the_family_knows(pipelines):
    plain = {family: generator(pipe).arguments() for family, pipe in pipelines.items()}
    assert all(found["guidance_scale"] == 4.5 and "true_cfg_scale" not in found for found in plain.values())
    told = {family: generator(pipe, negative="blurred").arguments() for family, pipe in pipelines.items()}
    assert all(found["negative_prompt"] == ["blurred"] * 2 for found in told.values())
    assert told["flux"]["true_cfg_scale"] == 4.5 and "true_cfg_scale" not in told["sd3"]


def test_guidance_and_the_negative_prompt_reach_the_sampler(pipelines):
    pictures = [generator(pipelines["sd15"], **changes).draw(PROMPTS[:1], [1])[0].picture
                for changes in ({}, {"guidance": 1.0}, {"negative": "night rain"})]
    assert not np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])


def test_options_go_through_and_unknown_ones_are_told(pipelines, sd3):
    assert generator(sd3, options={"max_sequence_length": 64}).arguments()["max_sequence_length"] == 64
    with pytest.raises(UsageError, match="takes no max_sequence_length"):
        generator(pipelines["sd15"], options={"max_sequence_length": 64})


# ---- guards


def test_nan_and_black_pictures_are_told_apart_from_good_ones():
    noise = np.random.default_rng(0).random((8, 8, 3)).astype(np.float32)
    assert judged(noise).status == "ok" and judged(noise).picture.max() <= 255
    assert judged(np.where(noise > 0.9, np.nan, noise)).status == "nan"
    assert judged(np.zeros((8, 8, 3))).status == "black" and judged(np.full((8, 8, 3), 0.4)).picture is None
    assert judged(np.full((2, 2, 3), [0.0, 0.5, 1.0])).picture[0, 0].tolist() == [0, 128, 255]


def test_a_broken_picture_is_tried_again_in_float32(sd3):
    """An autoencoder that overflows in half precision: NaN unless it runs in float32."""
    decoder, kinds = sd3.vae.decoder, []

    def overflowing(module, args, output):
        kinds.append(output.dtype)
        return output if output.dtype == torch.float32 else output * torch.nan

    sd3.to(torch.bfloat16)
    hook = decoder.register_forward_hook(overflowing)
    drawn = generator(sd3).draw(PROMPTS[:1], [1])
    hook.remove()
    sd3.to(torch.float32)
    assert kinds == [torch.bfloat16, torch.float32]
    assert drawn[0].status == "ok" and drawn[0].attempts == 2


def test_what_stays_broken_is_given_up_and_its_neighbours_are_kept(sd3, monkeypatch):
    made = generator(sd3)
    call = made._call

    def first_is_nan(prompts, seeds):
        return np.where(np.array(seeds)[:, None, None, None] == 1, np.nan, call(prompts, seeds))

    monkeypatch.setattr(made, "_call", first_is_nan)
    drawn = made.draw(PROMPTS[:2], [1, 2])
    assert [(one.status, one.attempts) for one in drawn] == [("nan", 2), ("ok", 1)] and drawn[0].picture is None


def test_the_autoencoder_is_given_back_as_it_was(sd3):
    sd3.vae.to(torch.bfloat16)
    with exact_autoencoder(sd3):
        inside = sd3.vae.dtype, sd3.vae.decode(torch.zeros(1, 4, 4, 4).bfloat16(), return_dict=False)[0].dtype
    after = sd3.vae.dtype
    sd3.vae.to(torch.float32)
    assert inside == (torch.float32, torch.float32) and after == torch.bfloat16


# ---- the way in


def test_seeds_depend_on_run_prompt_and_number():
    keys = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    seeds = [picture_seed(*key) for key in keys]
    assert len(set(seeds)) == 4 and all(0 <= seed < 2**63 for seed in seeds)
    assert picture_seed(0, "a", 0) == seeds[0]


def test_what_cannot_be_opened_or_placed_is_told(sd3, tmp_path):
    with pytest.raises(UsageError, match="no pipeline at"):
        TextToImage.open(PictureSettings(str(tmp_path / "nothing")))
    with pytest.raises(UsageError, match="set offload to none"):
        place(sd3, PictureSettings(offload="model"), "cpu")
    with pytest.raises(UsageError, match="bfloat16"):
        PictureSettings(dtype="int8")

"""Pictures that are turned down: copies, collages, and those of another class, by a tiny real CLIP."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from models.errors import UsageError
from models.generators.inspection import (
    ClipJudge,
    QualitySettings,
    hamming,
    is_collage,
    open_judge,
    perceptual_hash,
)
from tests.models.generators.tiny import clip_tokenizer

SETTINGS = QualitySettings()


def scene(seed=0, size=(96, 128)):
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.normal(size=(*size, 3)), (8, 8, 0))
    smooth = (smooth - smooth.min()) / np.ptp(smooth) * 255
    return np.clip(smooth + rng.normal(0, 3, smooth.shape), 0, 255).astype(np.uint8)


def test_a_hash_survives_what_does_not_change_a_picture():
    picture = scene()
    lighter = np.clip(picture.astype(int) + 12, 0, 255).astype(np.uint8)
    noisy = np.clip(picture + np.random.default_rng(1).normal(0, 6, picture.shape), 0, 255).astype(np.uint8)
    half = picture[::2, ::2]
    assert all(hamming(perceptual_hash(picture), perceptual_hash(other)) <= 4 for other in (lighter, noisy, half))
    far = [hamming(perceptual_hash(scene(a)), perceptual_hash(scene(b))) for a in range(5) for b in range(a)]
    assert min(far) > 8 and 0 <= perceptual_hash(picture) < 2**64


def test_a_collage_has_a_seam_from_side_to_side():
    joined = scene()
    joined[:, 64:] = 255 - joined[:, 64:]
    joined[:, 64:] = np.clip(joined[:, 64:].astype(int) // 3 + (joined[:, :64].mean() < 128) * 150, 0, 255)
    framed = np.full((96, 128, 3), 250, np.uint8)
    framed[12:-12, 12:-12] = scene(1, (72, 104))
    assert is_collage(joined, SETTINGS) and is_collage(joined.transpose(1, 0, 2), SETTINGS)
    assert is_collage(framed, SETTINGS)
    assert not any(is_collage(scene(seed), SETTINGS) for seed in range(8))
    square = scene(2)
    square[20:60, 30:80] = 250
    assert not is_collage(square, SETTINGS)


@pytest.fixture(scope="module")
def clip():
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    shared = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config=shared | {"vocab_size": 200, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1},
        vision_config=shared | {"image_size": 32, "patch_size": 8}, projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config).eval()
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return model, CLIPProcessor(images, clip_tokenizer())


def test_margins_are_leads_of_the_asked_class(clip):
    nouns, pictures = ("car", "dog", "tree"), [scene(n) for n in range(3)]
    margins = np.stack([ClipJudge(*clip).margins(pictures, nouns, target)[0] for target in range(3)])
    assert ((margins > 0).sum(0) == 1).all(), "each picture is of one class"
    vectors = ClipJudge(*clip).margins(pictures, nouns, 0)[1]
    assert vectors.shape == (3, 16) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_judge_is_opened_from_a_folder(clip, tmp_path):
    for part in clip:
        part.save_pretrained(tmp_path)
    pictures, nouns = [scene(0)], ("car", "dog")
    one, other = ClipJudge(*clip).margins(pictures, nouns, 0), open_judge(str(tmp_path)).margins(pictures, nouns, 0)
    assert np.allclose(one[0], other[0], atol=1e-5) and np.allclose(one[1], other[1], atol=1e-5)
    with pytest.raises(UsageError, match=r"no CLIP.*imagine\.judge"):
        open_judge(str(tmp_path / "nothing"))

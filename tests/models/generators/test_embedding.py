"""Text vectors from the encoders of real (tiny) pipelines of four families."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from models.errors import UsageError
from models.generators.embedding import centred, embed_texts, encoders_of, text_embedder
from tests.models.generators.tiny import clip_text, clip_tokenizer, pipeline, t5_text, t5_tokenizer

TEXTS = ["a photo of a car", "an old car in the street", "a dog"]


@pytest.fixture(scope="module")
def sd3():
    return pipeline("sd3")


@pytest.mark.parametrize("family, encoders, width", [("sd3", 3, 64), ("sd15", 1, 32), ("sdxl", 2, 64), ("flux", 2, 32)])
def test_every_family_gives_unit_rows(family, encoders, width):
    pairs = encoders_of(pipeline(family))
    rows = embed_texts(pairs, TEXTS)
    assert len(pairs) == encoders and rows.shape == (3, width) and rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert (rows @ rows.T)[0, 1] < 1 - 1e-4


def test_pooled_is_what_the_pipeline_itself_conditions_on(sd3):
    """Against `encode_prompt`: its pooled row is both encoders' side by side; here each is brought to one length."""
    pooled = sd3.encode_prompt(TEXTS, None, None, do_classifier_free_guidance=False)[2]
    parts = [normalize(part, dim=1) for part in pooled.detach().split(32, dim=1)]
    assert np.allclose(text_embedder(sd3)(TEXTS), torch.cat(parts, 1) / 2**0.5, atol=1e-5)


def test_the_mean_over_tokens_passes_padding_over():
    torch.manual_seed(0)
    tokenizer, encoder = t5_tokenizer(), t5_text()
    rows = embed_texts([(tokenizer, encoder)], TEXTS, "tokens")
    for row, text in zip(rows, TEXTS, strict=True):
        alone = encoder(**{k: v for k, v in tokenizer(text, return_tensors="pt").items() if k != "token_type_ids"})
        assert np.allclose(row, normalize(alone.last_hidden_state[0].mean(0), dim=0).detach(), atol=1e-4)


def test_modes_choose_among_the_encoders(sd3):
    widths = {mode: text_embedder(sd3, mode)(TEXTS).shape[1] for mode in ("pooled", "tokens", "concat")}
    assert widths == {"pooled": 64, "tokens": 64, "concat": 128}
    only = [(clip_tokenizer(), clip_text(True))]
    assert np.array_equal(embed_texts(only, TEXTS, "tokens"), embed_texts(only, TEXTS, "pooled"))


def test_batches_change_nothing(sd3):
    whole, parts = text_embedder(sd3)(TEXTS), text_embedder(sd3, batch=1)(TEXTS)
    assert np.allclose(whole, parts, atol=1e-5)


def test_one_encoders_norm_does_not_decide(sd3):
    before = text_embedder(sd3)(TEXTS)
    with torch.no_grad():
        sd3.text_encoder.text_projection.weight.mul_(50)
    assert np.allclose(text_embedder(sd3)(TEXTS), before, atol=1e-5)


def test_centring_takes_off_what_all_prompts_share():
    embed = text_embedder(pipeline("sd15"))
    moved = centred(embed, "a photo of a dog")(TEXTS)
    expected = embed(TEXTS) - embed(["a photo of a dog"])
    assert np.allclose(moved, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)


def test_what_cannot_be_embedded_is_told():
    with pytest.raises(UsageError, match="pooled, tokens, concat"):
        embed_texts([], TEXTS, "t5mean")
    with pytest.raises(UsageError, match="no text encoder"):
        embed_texts([], TEXTS)

"""Unit vectors of prompts from a text-to-image pipeline's own text encoders (Syn4Seg spec §1.3).

Pipelines differ in what `encode_prompt` takes and gives, but all name their parts alike: tokenizer, tokenizer_2 ...
beside text_encoder, text_encoder_2 ... So each encoder is asked directly: CLIP gives a pooled vector, T5 and decoders
give one vector per token, of which the mean is taken over the tokens that are not padding.

Legend: N texts, L tokens, d dimensions of all parts together. Rows have unit length, so a product is a cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from models.errors import UsageError

MODES = ("pooled", "tokens", "concat")
LONGEST = 256  # tokens; T5's tokenizer names no limit of its own
Embed = Callable[[Sequence[str]], np.ndarray]


def encoders_of(pipeline: Any) -> list[tuple[Any, Any]]:
    """The (tokenizer, text encoder) pairs that a pipeline holds, in order."""
    parts = [(getattr(pipeline, f"tokenizer{n}", None), getattr(pipeline, f"text_encoder{n}", None))
             for n in ("", "_2", "_3", "_4")]
    return [(tokenizer, encoder) for tokenizer, encoder in parts if tokenizer is not None and encoder is not None]


@torch.inference_mode()
def encode(tokenizer: Any, encoder: Any, texts: Sequence[str]) -> tuple[Tensor, bool]:
    """Float32 [N, d'] on the CPU of one encoder, and whether it is a pooled vector (else the mean over tokens)."""
    limit = min(int(tokenizer.model_max_length), LONGEST, getattr(encoder.config, "max_position_embeddings", LONGEST))
    batch = tokenizer(list(texts), padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
    device = next(encoder.parameters()).device
    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    clip = "clip" in getattr(encoder.config, "model_type", "")
    out = encoder(ids) if clip else encoder(ids, attention_mask=mask)  # diffusers gives CLIP no mask: causal anyway
    for name in ("text_embeds", "pooler_output"):
        if getattr(out, name, None) is not None:
            return getattr(out, name).float().cpu(), True
    rows, kept = out.last_hidden_state.float(), mask[..., None].float()
    return ((rows * kept).sum(1) / kept.sum(1).clamp(min=1)).cpu(), False


def embed_texts(pairs: Sequence[tuple[Any, Any]], texts: Sequence[str], mode: str = "pooled") -> np.ndarray:
    """Unit float32 [N, d]: each encoder's part at unit length, all with one weight, so that no encoder's norm decides.

    mode: "pooled" (encoders with a pooled vector), "tokens" (the others), "concat" (all). Where a pipeline has no
    encoder of that kind, all are taken.
    """
    if mode not in MODES:
        raise UsageError(f"There is no embedding {mode!r}; choose one of {', '.join(MODES)}.")
    if not pairs:
        raise UsageError("The pipeline has no text encoder; name one that has, or give tokenizer and encoder.")
    found = [encode(tokenizer, encoder, texts) for tokenizer, encoder in pairs]
    wanted = [part for part, pooled in found if mode == "concat" or pooled == (mode == "pooled")]
    parts = wanted or [part for part, _ in found]
    return torch.cat([normalize(part, dim=1) / len(parts) ** 0.5 for part in parts], 1).numpy()


def text_embedder(source: Any, mode: str = "pooled", batch: int = 64) -> Embed:
    """A function from texts to unit rows. source: a diffusers pipeline, or a list of (tokenizer, text encoder)."""
    pairs = source if isinstance(source, list | tuple) else encoders_of(source)

    def embed(texts: Sequence[str]) -> np.ndarray:
        starts = range(0, max(len(texts), 1), batch)
        return np.concatenate([embed_texts(pairs, texts[start : start + batch], mode) for start in starts])

    return embed


def centred(embed: Embed, template: str) -> Embed:
    """Rows less the row of a template, at unit length again: text embeddings sit in a narrow cone, and what all prompts
    of a class share says nothing about how they differ."""
    middle = embed([template])

    def moved(texts: Sequence[str]) -> np.ndarray:
        rows = embed(texts) - middle
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)

    return moved

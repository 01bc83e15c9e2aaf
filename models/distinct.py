"""Which of a list of unit vectors differ enough from all that were chosen before them: exact, in order, in blocks.

Syn4Seg's rule (spec §1.1, §1.4): row i has the similarity s_i = max over the bank of the cosine with it, and joins the
bank when s_i < λ. The result is defined by the order of the rows alone; blocks only make the work matrix products,
N · M · d + N · B · d multiplications in all. Used for prompts (text embeddings) and for pictures (image embeddings).

Legend: N rows, M bank, d dimensions, B rows of a block. Cosines are in [-1, 1]; -1 stands for "the bank is empty".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NEAR = 1e-5  # float32 cosines that near λ are taken again in float64, so that the blocks decide nothing

COPY = 0.9999  # the cosine from which two rows are one, whatever float32 made of their length


@dataclass(frozen=True)
class Chosen:
    """What became of the rows, in order; those after the bank was full are left out.

    accepted bool [n]; similarity float64 [n], the largest cosine with an earlier accepted row; nearest int64 [n], that
    row's place in the bank (given rows first, then accepted ones), -1 where there was none. bank float32 [M', d].
    """

    accepted: np.ndarray
    similarity: np.ndarray
    nearest: np.ndarray
    bank: np.ndarray


def choose_distinct(
    rows: np.ndarray, threshold: float, bank: np.ndarray | None = None, block: int = 1024, most: int | None = None,
) -> Chosen:
    """Walk unit `rows` [N, d] in order; `bank` [M, d] holds what earlier calls accepted.

    Equal to the loop over single rows for any block, and to one call over everything for any split into calls. Stops
    when the bank holds `most`. O(N · M · d) time, O((M + B) · d + B²) memory beside the rows.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    bank = np.empty((0, rows.shape[1]), np.float32) if bank is None else np.asarray(bank, dtype=np.float32)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, len(rows), block):
        if most is not None and len(bank) >= most:
            break
        piece = rows[start : start + block]
        parts.append(_walk(piece, bank, threshold, None if most is None else most - len(bank)))
        bank = np.concatenate([bank, piece[: len(parts[-1][0])][parts[-1][0]]])
    empty = (np.empty(0, bool), np.empty(0), np.empty(0, np.int64))
    return Chosen(*(np.concatenate(column) for column in zip(*(parts or [empty]), strict=True)), bank)


def _walk(piece: np.ndarray, bank: np.ndarray, threshold: float, room: int | None) -> tuple:
    """(accepted, similarity, nearest) of the rows of one block, up to the one that fills the `room` left."""
    similarity, nearest = _against(piece, bank)
    inside, accepted = piece @ piece.T, np.zeros(len(piece), bool)
    found = len(bank)
    for i in range(len(piece)):
        if abs(similarity[i] - threshold) < NEAR:
            similarity[i] = _exact(piece[i], np.concatenate([bank, piece[:i][accepted[:i]]]), threshold)
        if similarity[i] >= threshold:
            continue
        accepted[i] = True
        closer = np.flatnonzero(inside[i, i + 1 :] > similarity[i + 1 :]) + i + 1
        similarity[closer], nearest[closer] = inside[i, closer], found
        found += 1
        if room is not None and found - len(bank) == room:
            return accepted[: i + 1], similarity[: i + 1], nearest[: i + 1]
    return accepted, similarity, nearest


def _against(piece: np.ndarray, bank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if not len(bank):
        return np.full(len(piece), -1.0), np.full(len(piece), -1, np.int64)
    cosines = piece @ bank.T
    nearest = cosines.argmax(1)
    return np.take_along_axis(cosines, nearest[:, None], 1)[:, 0].astype(np.float64), nearest.astype(np.int64)


def _exact(row: np.ndarray, members: np.ndarray, threshold: float) -> float:
    """The largest cosine in float64, over the members that float32 finds near λ or above."""
    near = members[members @ row > threshold - 10 * NEAR].astype(np.float64)
    return float(max(np.dot(member, row.astype(np.float64)) for member in near))


def calibrate_threshold(rows: np.ndarray, acceptance: float = 0.4) -> float:
    """The smallest λ at which a dry run accepts the share `acceptance` of sample rows [N, d] (spec §1.5).

    λ is sought among the quantiles of the pairwise cosines, by bisection. At most COPY.
    """
    if len(rows) < 2:
        return COPY
    cosines = (rows @ rows.T)[np.triu_indices(len(rows), 1)].astype(np.float64)
    low, high = 0.0, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        share = choose_distinct(rows, float(np.quantile(cosines, middle))).accepted.mean()
        low, high = (middle, high) if share < acceptance else (low, middle)
    return float(min(np.quantile(cosines, high), COPY))


def coverage(bank: np.ndarray) -> dict[str, float]:
    """How widely unit rows [M, d] are spread.

    nearest: mean cosine of each row with its nearest other one. effective: the Vendi score (arXiv 2210.02410), the
    exponential of the entropy of the eigenvalues of the Gram matrix over M; 1 for copies of one row, M for M
    orthogonal ones.
    """
    if len(bank) < 2:
        return {"nearest": float("nan"), "effective": float(len(bank))}
    gram = bank.astype(np.float64) @ bank.T.astype(np.float64)
    shares = np.linalg.eigvalsh(gram / len(bank)).clip(1e-12)
    np.fill_diagonal(gram, -1.0)
    return {"nearest": float(gram.max(1).mean()), "effective": float(np.exp(-(shares * np.log(shares)).sum()))}

"""What meta learners are asked, and who may be kept: training episodes, held-out episodes, and the best so far.

Novel classes play no part in any of it, unless `select_on` says so. Held-out base classes are asked for only when
checkpoints are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.episode import (
    EpisodeKey,
    class_index,
    draw,
    kept_for_training,
    number,
    sample_training_episode,
    split_base_for_validation,
)
from models.errors import UsageError
from models.geometry import enlarge
from models.metrics import episode_counts
from models.segmenters.episodes import gather
from models.segmenters.expert import Expert, ExpertSettings
from models.segmenters.fusion import EnsembleOut
from models.views import STREAMS, FeatureBank, Stream, Views

SELECTIONS = {
    "held_out": "base classes that training did not see",
    "test": "NOVEL CLASSES OF THE TEST SPLIT: FOR PARITY WITH BAM AND MSANET ONLY, THE SCORES ARE TOO GOOD",
}


@dataclass(frozen=True)
class MetaSettings:
    """How meta learners and fusion are fitted (GenFusion spec §3.5, §4.3).

    size: the encoder's input [H, W]. letterbox: how frames come onto it, "exact" or "bam". streams: the modalities.
    stand_in: how often an episode shows the stand-in layers (lightness and its RGB). shots, min_pixels: of the training
    episodes. held_out: base classes kept for selection; 0 keeps the last step. validation: episodes per class that
    selection asks for. stream_weight: λ of each stream's own loss.
    jaccard_weight, entropy_weight: of soft IoU and of cross-entropy (the papers: 0 and 1). Cross-entropy learns how
    rare the base classes' pixels are, which does not carry over to novel ones.

    select_on: "held_out" chooses the checkpoint on base classes. "test" CHOOSES IT ON THE NOVEL CLASSES OF THE TEST
    SPLIT, as BAM and MSANet do: such scores are too good and prove nothing. It is there to repeat published numbers,
    holds no base class out, and is written into the model's config.json.
    """

    size: tuple[int, int] = (360, 480)
    letterbox: str = "exact"
    streams: tuple[Stream, ...] = STREAMS
    expert: ExpertSettings = field(default_factory=ExpertSettings)
    novel_in_train: str = "ignore"
    shots: int = 1
    min_pixels: int = 100
    steps: int = 500
    batch: int = 4
    rate: float = 1e-3
    weight_decay: float = 1e-4
    stand_in: float = 0.5
    stream_weight: float = 1.0
    jaccard_weight: float = 1.0
    entropy_weight: float = 0.0
    held_out: int = 1
    select_on: str = "held_out"
    validation: int = 40
    validate_every: int = 50
    checkpoint_every: int = 50
    cache_gb: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.select_on not in SELECTIONS:
            known = " or ".join(SELECTIONS)
            raise UsageError(f"There is no select_on {self.select_on!r}; choose {known}.")

    @property
    def selects(self) -> bool:
        """Whether a checkpoint is chosen at all, rather than the last one kept."""
        return self.select_on == "test" or self.held_out > 0


class Lessons:
    """The episodes of one fold, of frames that have all layers: training classes and held-out classes."""

    def __init__(self, views: Views, fold: int, settings: MetaSettings) -> None:
        frames = views.frames
        self.settings, self.fold, self.novel = settings, fold, frames.novel(fold)
        on_test = settings.select_on == "test"
        held_out = 0 if on_test else settings.held_out
        self.classes, self.held_out = split_base_for_validation(frames, fold, held_out, settings.seed)
        self.layers = [[s.layer for s in settings.streams], [s.stand_in or s.layer for s in settings.streams]]
        kept = kept_for_training(frames, fold, settings.novel_in_train)
        kept = [id for id in kept if all(views.has(id, layer) for layers in self.layers for layer in layers)]
        self.index = class_index(frames, (*self.classes, *self.held_out), settings.min_pixels, ids=kept)
        # What selection asks for, and what its labels hide.
        self.judged, self.hidden = {label: self.index[label] for label in self.held_out}, self.novel
        if on_test:
            tested = [id for id in frames.ids("test") if all(views.has(id, layer) for layer in self.layers[0])]
            self.judged, self.hidden = class_index(frames, self.novel, settings.min_pixels, ids=tested), ()

    def batch(self, step: int, rank: int) -> tuple[list[EpisodeKey], list[str]]:
        """Episodes [B] and the layer of each stream; a pure function of (seed, step, rank)."""
        settings, first = self.settings, step * self.settings.batch
        key = (settings.seed + 1000003 * rank, self.fold)
        episodes = [
            sample_training_episode(self.index, self.classes, settings.shots, hash_seed(*key), first + place)
            for place in range(settings.batch)
        ]
        share = draw(range(1000), 1, *key, step, "stand in")[0] / 1000
        return episodes, self.layers[share < settings.stand_in]

    def validation(self) -> list[EpisodeKey]:
        """The same episodes of the held-out classes (with `select_on` "test", of the novel ones) each time."""
        count, shots = self.settings.validation, self.settings.shots
        return [
            sample_training_episode(self.judged, [label], shots, hash_seed("validation", label), turn)
            for label, ids in self.judged.items() if len(ids) > shots
            for turn in range(count)
        ]


def hash_seed(*key: object) -> int:
    return number(*key) >> 33


class Best:
    """Remembers, for every fold, the ensemble that did best on the episodes of selection."""

    def __init__(self, experts: nn.ModuleDict) -> None:
        self.score = {fold: -1.0 for fold in experts}
        self.step = {fold: 0 for fold in experts}
        self.state: dict[str, dict[str, Tensor]] = {}

    def examine(self, step: int, experts: nn.ModuleDict, lessons: dict[str, Lessons], ask: Callable) -> dict:
        """mIoU of the classes of selection per fold, each over its episodes; keeps the better ensemble."""
        found = {}
        for fold, expert in experts.items():
            episodes = lessons[fold].validation()
            if not episodes:
                continue
            score = held_out_score(expert, episodes, lessons[fold], ask)
            found[f"held_out_fold{fold}"] = score
            if score > self.score[fold]:
                self.score[fold], self.step[fold] = score, step
                self.state[fold] = {k: v.detach().cpu().clone() for k, v in expert.ensemble.state_dict().items()}
        return found

    def load_into(self, experts: nn.ModuleDict) -> None:
        for fold, state in self.state.items():
            experts[fold].ensemble.load_state_dict(state)

    def state_dict(self) -> dict:
        return {"score": self.score, "step": self.step, "state": self.state}

    def load_state_dict(self, kept: dict) -> None:
        self.score, self.step, self.state = kept["score"], kept["step"], kept["state"]


def ask(
    bank: FeatureBank, expert: Expert, episodes: Sequence[EpisodeKey], layers: Sequence[str], novel: Sequence[int],
    policy: str,
) -> tuple[EnsembleOut, Tensor]:
    """The expert's answers to episodes, stream v reading layers[v], and the targets [V, B, H, W]."""
    batch = gather(bank, episodes, layers, novel, policy)
    own = expert.own_index([e.label for e in episodes]).to(bank.device)
    return expert(batch.query, batch.support, batch.masks, own), batch.targets


@torch.no_grad()
def held_out_score(expert: Expert, episodes: list[EpisodeKey], lesson: Lessons, ask: Callable) -> float:
    """Mean IoU of the classes of `episodes`. ask(expert, episodes, layers, novel, policy): answers and targets."""
    expert.eval()
    sums: dict[int, list[int]] = {}
    for start in range(0, len(episodes), 8):
        part = episodes[start : start + 8]
        out, targets = ask(expert, part, lesson.layers[0], lesson.hidden, lesson.settings.novel_in_train)
        said = enlarge(out.final, tuple(targets.shape[-2:])).argmax(1).cpu()
        for episode, prediction, mask in zip(part, said, targets[0].cpu(), strict=True):
            counts = episode_counts(prediction, mask)
            both = sums.setdefault(episode.label, [0, 0])
            both[0], both[1] = both[0] + counts["inter_fg"], both[1] + counts["union_fg"]
    return sum(inter / max(union, 1) for inter, union in sums.values()) / len(sums)

"""What meta learners are asked, and who may be kept: training episodes, held-out episodes, and the best so far.

Novel classes play no part in any of it, unless `select_on` says so. Held-out base classes are asked for only when
checkpoints are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.episode import (
    EpisodeKey,
    check_policy,
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
from models.segmenters.expert import Expert, ExpertSettings
from models.views import PSEUDO, STREAMS, PseudoViews, Stream

SELECTIONS = {
    "held_out": "base classes that training did not see",
    "test": "NOVEL CLASSES OF THE TEST SPLIT: FOR PARITY WITH BAM AND MSANET ONLY, THE SCORES ARE TOO GOOD",
}


@dataclass(frozen=True)
class MetaSettings:
    """How meta learners and fusion are fitted (GenFusion spec §3.5, §4.3).

    size: the encoder's input [H, W]. letterbox: how frames come onto it, "exact" or "bam". streams: the modalities.
    stand_in: how often an episode shows the stand-in layers (lightness and its RGB). shots, min_pixels: of the training
    episodes. pool: episodes per class that training draws from, the same again and again; 0 draws new ones for ever.
    pseudo_share: how often a batch asks for pseudo-classes (`models.pseudoclasses`), regions of frames that have all
    layers, labelled or not.
    held_out: base classes kept for selection; 0 keeps the last step. rotate: hold every base class out once, each time
    from a copy that is fitted without it; the step that serves all of them best is taken from the one that is fitted on
    all base classes. validation: episodes per class that selection asks for. stream_weight: λ of each stream's loss.
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
    pool: int = 0
    pseudo_share: float = 0.0
    held_out: int = 1
    rotate: bool = False
    select_on: str = "held_out"
    validation: int = 40
    validate_every: int = 50
    checkpoint_every: int = 50
    cache_gb: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_policy(self.novel_in_train)
        if self.select_on not in SELECTIONS:
            known = " or ".join(SELECTIONS)
            raise UsageError(f"There is no select_on {self.select_on!r}; choose {known}.")

    @property
    def selects(self) -> bool:
        """Whether a checkpoint is chosen at all, rather than the last one kept."""
        return self.select_on == "test" or self.held_out > 0


class Lessons:
    """The episodes of one fold, of frames that have all layers: training classes and held-out classes.

    held_out: base classes kept for selection; the settings choose them without it.
    """

    def __init__(
        self, views: PseudoViews, fold: int, settings: MetaSettings, held_out: Sequence[int] | None = None
    ) -> None:
        frames = views.frames
        self.views, self.settings, self.fold, self.novel = views, settings, fold, frames.novel(fold)
        if held_out is None:
            count = 0 if settings.select_on == "test" else settings.held_out
            self.classes, self.held_out = split_base_for_validation(frames, fold, count, settings.seed)
        else:
            self.held_out = tuple(held_out)
            self.classes = tuple(label for label in frames.base(fold) if label not in self.held_out)
        self.layers = [[s.layer for s in settings.streams], [s.stand_in or s.layer for s in settings.streams]]
        kept = [id for id in kept_for_training(frames, fold, settings.novel_in_train) if self._complete(id)]
        self.index = class_index(frames, (*self.classes, *self.held_out), settings.min_pixels, ids=kept)
        self.unnamed = [*kept, *(id for id in frames.ids("unlabelled") if self._complete(id))]
        # What selection asks for, and what its labels hide.
        self.judged, self.hidden = {label: self.index[label] for label in self.held_out}, self.novel
        if settings.select_on == "test":
            tested = [id for id in frames.ids("test") if all(views.has(id, layer) for layer in self.layers[0])]
            self.judged, self.hidden = class_index(frames, self.novel, settings.min_pixels, ids=tested), ()

    def _complete(self, id: str) -> bool:
        return all(self.views.has(id, layer) for layers in self.layers for layer in layers)

    def batch(self, step: int, rank: int) -> tuple[list[EpisodeKey], list[str]]:
        """Episodes [B] and the layer of each stream; a pure function of (seed, step, rank)."""
        settings, first = self.settings, step * self.settings.batch
        key = (settings.seed + 1000003 * rank, self.fold)
        ask = self._pseudo_episode if self._chance(*key, step, "pseudo") < settings.pseudo_share else self._episode
        episodes = [ask(hash_seed(*key), first + place) for place in range(settings.batch)]
        return episodes, self.layers[self._chance(*key, step, "stand in") < settings.stand_in]

    @staticmethod
    def _chance(*key: object) -> float:
        return draw(range(1000), 1, *key)[0] / 1000

    def _episode(self, seed: int, turn: int) -> EpisodeKey:
        episode = sample_training_episode(self.index, self.classes, self.settings.shots, seed, turn)
        if not self.settings.pool:
            return episode
        seed, turn = hash_seed(self.settings.seed, "pool"), number(seed, turn, "pool") % self.settings.pool
        return sample_training_episode(self.index, [episode.label], self.settings.shots, seed, turn)

    def _pseudo_episode(self, seed: int, turn: int) -> EpisodeKey:
        """One frame, moved and in other tones, asked for one of its own regions; all shots show the same."""
        pool = self.settings.pool * len(self.classes) or 2**31
        place = number(seed, turn, "pseudo") % pool
        start = number("pseudo", place) % max(len(self.unnamed), 1)
        for id in self.unnamed[start:] + self.unnamed[:start]:
            support, query = self.views.show(id, place)
            if self.views.asks(id) and self._visible(support) and self._visible(query):
                return EpisodeKey(-1, PSEUDO, query, (support,) * self.settings.shots, seed)
        raise UsageError("No frame has a region to ask for; set meta.pseudo_share=0.")

    def _visible(self, id: str) -> bool:
        """Whether anything of the region is left once novel pixels are hidden."""
        return bool((self.views.label(id, "infrared", self.novel, self.settings.novel_in_train) == PSEUDO).any())

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


def courses(views: PseudoViews, folds: Iterable[int], settings: MetaSettings) -> dict[str, Lessons]:
    """Name -> lessons: one per fold, "0", "1", ...; where classes rotate, also "0_1", ... that hold some out."""
    found: dict[str, Lessons] = {}
    for fold in folds:
        if not (settings.rotate and settings.held_out and settings.select_on == "held_out"):
            found[str(fold)] = Lessons(views, fold, settings)
            continue
        found[str(fold)] = whole = Lessons(views, fold, settings, ())
        usable = [label for label in whole.classes if len(whole.index[label]) > settings.shots]
        groups = [usable[start : start + settings.held_out] for start in range(0, len(usable), settings.held_out)]
        for turn, group in enumerate(groups if len(groups) > 1 else []):
            found[f"{fold}_{turn}"] = Lessons(views, fold, settings, group)
    return found


class Best:
    """Remembers, for every fold, the ensemble of the step that did best on the episodes of selection."""

    def __init__(self, folds: Iterable[str]) -> None:
        folds = [fold for fold in folds if "_" not in fold]
        self.score = {fold: -1.0 for fold in folds}
        self.step = {fold: 0 for fold in folds}
        self.state: dict[str, dict[str, Tensor]] = {}

    def examine(self, step: int, experts: nn.ModuleDict, lessons: dict[str, Lessons], ask: Callable) -> dict:
        """mIoU of the classes of selection per fold, each over its episodes; keeps the better ensemble.

        Where classes rotate, the fold's score is the mean over the copies, each on the classes that it did not see.
        """
        found = {}
        for fold in self.score:
            judges = [name for name in lessons if name.partition("_")[0] == fold and lessons[name].validation()]
            if not judges:
                continue
            scores = [held_out_score(experts[name], lessons[name].validation(), lessons[name], ask) for name in judges]
            found[f"held_out_fold{fold}"] = score = sum(scores) / len(scores)
            if score > self.score[fold]:
                self.score[fold], self.step[fold] = score, step
                state = experts[fold].ensemble.state_dict()
                self.state[fold] = {k: v.detach().cpu().clone() for k, v in state.items()}
        return found

    def load_into(self, experts: nn.ModuleDict) -> None:
        for fold, state in self.state.items():
            experts[fold].ensemble.load_state_dict(state)

    def state_dict(self) -> dict:
        return {"score": self.score, "step": self.step, "state": self.state}

    def load_state_dict(self, kept: dict) -> None:
        self.score, self.step, self.state = kept["score"], kept["step"], kept["state"]


@torch.no_grad()
def held_out_score(expert: Expert, episodes: list[EpisodeKey], lesson: Lessons, ask: Callable) -> float:
    """Mean IoU of the classes of `episodes`. ask(expert, fold, episodes, layers, novel, policy): answers, targets."""
    expert.eval()
    sums: dict[int, list[int]] = {}
    for start in range(0, len(episodes), 8):
        part = episodes[start : start + 8]
        out, targets = ask(expert, lesson.fold, part, lesson.layers[0], lesson.hidden, lesson.settings.novel_in_train)
        background, foreground = enlarge(out.final, tuple(targets.shape[-2:])).unbind(1)
        said = (foreground > background).to(torch.uint8).cpu()
        for episode, prediction, mask in zip(part, said, targets[0].cpu(), strict=True):
            counts = episode_counts(prediction, mask)
            both = sums.setdefault(episode.label, [0, 0])
            both[0], both[1] = both[0] + counts["inter_fg"], both[1] + counts["union_fg"]
    return sum(inter / max(union, 1) for inter, union in sums.values()) / len(sums)

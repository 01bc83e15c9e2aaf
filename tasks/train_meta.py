"""Fit the meta learners of all streams together with their fusion, episodically, one expert per fold in one loop.

The base learners and the encoder are frozen. Selection looks at episodes of base classes that were held out of this
training, never at a novel class; step 0, where every stream equals the training-free control, is a candidate too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from models.backbone import load_encoder
from models.episode import (
    EpisodeKey,
    class_index,
    draw,
    kept_for_training,
    sample_training_episode,
    split_base_for_validation,
)
from models.frames import Frames
from models.geometry import Canvas
from models.losses import cross_entropy, jaccard
from models.metrics import episode_counts
from models.segmenters.episodes import gather
from models.segmenters.expert import Expert, ExpertSettings
from models.segmenters.fusion import EnsembleOut
from models.views import STREAMS, FeatureBank, Stream, Views
from tasks.fanout import Compute
from tasks.stage import stage
from tasks.store import Ref
from tasks.train import Checkpoints, fit, seed_step

CODE = (
    "tasks.train_meta", "models.backbone", "models.views", "models.losses", "models.episode", "models.geometry",
    "models.pseudolabels", "models.segmenters.episodes", "models.segmenters.expert", "models.segmenters.fusion",
    "models.segmenters.msanet", "models.segmenters.prototype", "models.segmenters.pspnet",
    "models.segmenters.similarity",
)


@dataclass(frozen=True)
class MetaSettings:
    """How meta learners and fusion are fitted (GenFusion spec §3.5, §4.3).

    size: the encoder's input [H, W]. streams: the modalities. stand_in: how often an episode shows the stand-in layers
    (lightness and its RGB). shots, min_pixels: of the training episodes. held_out: base classes kept for selection;
    0 keeps the last step. validation: episodes per held-out class. stream_weight: λ of each stream's own loss.
    jaccard_weight, entropy_weight: of soft IoU and of cross-entropy (the papers: 0 and 1). Cross-entropy learns how
    rare the base classes' pixels are, which does not carry over to novel ones.
    """

    size: tuple[int, int] = (360, 480)
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
    validation: int = 40
    validate_every: int = 50
    checkpoint_every: int = 50
    cache_gb: float = 4.0
    seed: int = 0


@dataclass(frozen=True)
class MetaJob:
    """What the loop needs to know; inputs are frames, synthetic, pseudolabels, encoder, base, translators."""

    meta: MetaSettings
    folds: tuple[int, ...]
    generator: str


@stage("train_meta")
def train_meta(
    frames: Ref, synthetic: Ref, pseudolabels: Ref, encoder: Ref, base: Ref, translators: Ref,
    settings: MetaSettings, folds: Sequence[int], generator: str, compute: Compute,
) -> Ref:
    """Kind "model": a folder that segments on its own (`models.segmenters.predictor`).

    generator: name in GENERATORS of what made the translators, which travel with the model.
    """
    inputs = [frames, synthetic, pseudolabels, encoder, base, translators]
    return fit(meta_loop, "model", inputs, MetaJob(settings, tuple(folds), generator), CODE, compute)


def meta_loop(config: dict) -> None:
    """The loop: for every fold one batch of episodes, one loss; now and then the held-out classes."""
    import ray.train.torch

    job: MetaJob = config["settings"]
    settings, folders = job.meta, config["folders"]
    device = ray.train.torch.get_device()
    frames = Frames.open(folders[0])
    encoder = load_encoder(folders[3]).to(device)
    bank = FeatureBank(encoder, Views(frames, *folders[1:3]), Canvas(settings.size), int(settings.cache_gb * 2**30))
    torch.manual_seed(settings.seed)
    experts = nn.ModuleDict({str(f): _expert(frames, f, encoder, settings, folders[4]) for f in job.folds}).to(device)
    model = ray.train.torch.prepare_model(_Experts(experts))
    learnt = [p for expert in experts.values() for p in expert.ensemble.parameters()]
    optimiser = torch.optim.AdamW(learnt, settings.rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimiser, settings.steps, power=0.9)
    lessons = {fold: Lessons(bank.views, int(fold), settings) for fold in experts}
    best = Best(experts)
    checkpoints = Checkpoints(
        config, settings.steps, model=experts, optimiser=optimiser, schedule=schedule, best=best
    )
    for step in range(checkpoints.restore(), settings.steps):
        if settings.held_out and step % settings.validate_every == 0:
            checkpoints.log(step, **best.examine(step, experts, lessons, bank))
        seed_step(settings.seed, step, checkpoints.rank)
        experts.train()
        losses = []
        for fold, lesson in lessons.items():
            episodes, layers = lesson.batch(step, checkpoints.rank)
            batch = gather(bank, episodes, layers, lesson.novel, settings.novel_in_train)
            own = experts[fold].own_index([e.label for e in episodes]).to(device)
            out = model(fold, batch.query, batch.support, batch.masks, own)
            losses.append(ensemble_loss(out, batch.targets, own, settings))
        optimiser.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(learnt, 1.0)
        optimiser.step()
        schedule.step()
        if step % 10 == 0 or step + 1 == settings.steps:
            checkpoints.log(step, **{f"loss_fold{f}": loss for f, loss in zip(lessons, losses, strict=True)})
        if (step + 1) % settings.checkpoint_every == 0:
            checkpoints.save(step + 1)
    if settings.held_out:
        checkpoints.log(settings.steps, **best.examine(settings.steps, experts, lessons, bank))
        best.load_into(experts)
    checkpoints.finish(lambda folder: save_model(folder, experts, frames, job, folders, best))


def ensemble_loss(out: EnsembleOut, targets: Tensor, group: Tensor, settings: MetaSettings) -> Tensor:
    """Loss of the fused decision and of every stream's own (spec §4.3), at a third of the canvas."""
    size = tuple(side // 3 for side in targets.shape[-2:])
    small = interpolate(targets, size, mode="nearest-exact")
    weights = settings.jaccard_weight, settings.entropy_weight
    total = segmentation_loss(out.final, small[0], group, *weights)
    for v in range(out.streams.shape[1]):
        total = total + settings.stream_weight * segmentation_loss(out.streams[:, v], small[v], group, *weights)
    return total


def segmentation_loss(logits: Tensor, target: Tensor, group: Tensor, jaccard_weight: float, entropy_weight: float):
    logits = interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False)
    return jaccard_weight * jaccard(logits, target, group) + entropy_weight * cross_entropy(logits, target)


def _expert(frames: Frames, fold: int, encoder, settings: MetaSettings, base: Path) -> Expert:
    """An expert of this fold with its frozen base learner."""
    from safetensors.torch import load_file

    stored = json.loads((base / "config.json").read_text())
    given = ExpertSettings(**{**vars(settings.expert), "base_width": stored["width"]})
    expert = Expert(encoder.channels, frames.base(fold), len(settings.streams), given)
    expert.base.load_state_dict(load_file(base / f"fold{fold}.safetensors"))
    expert.base.requires_grad_(False)
    return expert


class _Experts(nn.Module):
    """All folds behind one forward, as data-parallel training wants it."""

    def __init__(self, experts: nn.ModuleDict) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, fold: str, *inputs):
        return self.experts[fold](*inputs)


class Lessons:
    """The episodes of one fold, of frames that have all layers: training classes and held-out classes."""

    def __init__(self, views: Views, fold: int, settings: MetaSettings) -> None:
        frames = views.frames
        self.settings, self.fold, self.novel = settings, fold, frames.novel(fold)
        self.classes, self.held_out = split_base_for_validation(frames, fold, settings.held_out, settings.seed)
        self.layers = [[s.layer for s in settings.streams], [s.stand_in or s.layer for s in settings.streams]]
        kept = kept_for_training(frames, fold, settings.novel_in_train)
        kept = [id for id in kept if all(views.has(id, layer) for layers in self.layers for layer in layers)]
        self.index = class_index(frames, (*self.classes, *self.held_out), settings.min_pixels, ids=kept)

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
        """The same episodes of the held-out classes each time."""
        count = self.settings.validation
        return [
            sample_training_episode(self.index, [label], self.settings.shots, hash_seed("validation", label), turn)
            for label in self.held_out if len(self.index[label]) > self.settings.shots
            for turn in range(count)
        ]


def hash_seed(*key: object) -> int:
    from models.episode import number

    return number(*key) >> 33


class Best:
    """Remembers, for every fold, the ensemble that did best on the held-out base classes."""

    def __init__(self, experts: nn.ModuleDict) -> None:
        self.score = {fold: -1.0 for fold in experts}
        self.step = {fold: 0 for fold in experts}
        self.state: dict[str, dict[str, Tensor]] = {}

    def examine(self, step: int, experts: nn.ModuleDict, lessons: dict[str, Lessons], bank: FeatureBank) -> dict:
        """mIoU of held-out classes per fold, each class over its episodes; keeps the better ensemble."""
        found = {}
        for fold, expert in experts.items():
            episodes = lessons[fold].validation()
            if not episodes:
                continue
            score = held_out_score(expert, episodes, bank, lessons[fold])
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


@torch.no_grad()
def held_out_score(expert: Expert, episodes: list[EpisodeKey], bank: FeatureBank, lesson: Lessons) -> float:
    expert.eval()
    sums: dict[int, list[int]] = {}
    for start in range(0, len(episodes), 8):
        part = episodes[start : start + 8]
        batch = gather(bank, part, lesson.layers[0], lesson.novel, lesson.settings.novel_in_train)
        own = expert.own_index([e.label for e in part]).to(bank.device)
        final = expert(batch.query, batch.support, batch.masks, own).final
        said = interpolate(final, batch.targets.shape[-2:], mode="bilinear", align_corners=False).argmax(1).cpu()
        for episode, prediction, mask in zip(part, said, batch.targets[0].cpu(), strict=True):
            counts = episode_counts(prediction, mask)
            both = sums.setdefault(episode.label, [0, 0])
            both[0], both[1] = both[0] + counts["inter_fg"], both[1] + counts["union_fg"]
    return sum(inter / max(union, 1) for inter, union in sums.values()) / len(sums)


def save_model(folder: Path, experts: nn.ModuleDict, frames: Frames, job: MetaJob, folders: list[Path], best: Best):
    """Everything that a prediction needs: experts, encoder, translators, and one config.json."""
    from safetensors.torch import save_file

    for fold, expert in experts.items():
        state = {name: x.contiguous().cpu() for name, x in expert.state_dict().items()}
        save_file(state, folder / f"fold{fold}.safetensors")
    shutil.copytree(folders[3], folder / "encoder", ignore=shutil.ignore_patterns("manifest.json"))
    shutil.copytree(folders[5], folder / "translators", ignore=shutil.ignore_patterns("manifest.json", "*.parquet"))
    config = {
        "dataset": frames.dataset,
        "generator": job.generator,
        "classes": list(frames.classes),
        "size": list(job.meta.size),
        "streams": [asdict(stream) for stream in job.meta.streams],
        "expert": asdict(job.meta.expert) | {"base_width": experts[str(job.folds[0])].base.width},
        "base": {fold: list(expert.base_classes) for fold, expert in experts.items()},
        "selected": {fold: {"step": best.step[fold], "held_out": best.score[fold]} for fold in experts},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))

"""Fit the meta learners of all streams together with their fusion, episodically, one expert per fold in one loop.

The base learners and the encoder are frozen. Selection looks at episodes of base classes that were held out of this
training, never at a novel class (`select_on` says when it does); step 0, where every anchored stream equals the
training-free control, is a candidate too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from models.backbone import load_encoder
from models.frames import Frames
from models.fusers.settings import FuserSettings
from models.geometry import Canvas, enlarge
from models.losses import cross_entropy, jaccard
from models.segmenters.desk import Desk, Evidence, Question, answer
from models.segmenters.expert import Expert, ExpertSettings
from models.segmenters.fusion import EnsembleOut
from models.segmenters.lessons import SELECTIONS, Best, Lessons, MetaSettings, courses
from models.views import FeatureBank, PseudoViews
from tasks.fanout import Compute
from tasks.fit_fuser import found_masks
from tasks.fuse import Fused
from tasks.stage import stage
from tasks.store import Ref
from tasks.train import Checkpoints, fit, seed_step

CODE = (
    "tasks.train_meta", "models.backbone", "models.encoders", "models.views", "models.losses", "models.episode",
    "models.geometry", "models.metrics", "models.pseudolabels", "models.segmenters.episodes",
    "models.segmenters.expert", "models.segmenters.fusion", "models.segmenters.desk", "models.segmenters.lessons",
    "models.segmenters.anchored", "models.segmenters.metric", "models.segmenters.msanet", "models.segmenters.prototype",
    "models.segmenters.pspnet", "models.segmenters.similarity", "models.pseudoclasses",
)


@dataclass(frozen=True)
class MetaJob:
    """What the loop needs to know; inputs are frames, synthetic, pseudolabels, encoder, base, translators, and with a
    fused picture among the streams those pictures and their fuser. fuse: how that fuser is used."""

    meta: MetaSettings
    folds: tuple[int, ...]
    generator: str
    fuse: FuserSettings | None = None


@stage("train_meta")
def train_meta(
    frames: Ref, synthetic: Ref, pseudolabels: Ref, encoder: Ref, base: Ref, translators: Ref,
    settings: MetaSettings, folds: Sequence[int], generator: str, compute: Compute, fused: Fused | None = None,
    fuse: FuserSettings | None = None,
) -> Ref:
    """Kind "model": a folder that segments on its own (`models.segmenters.predictor`).

    generator: name in GENERATORS of what made the translators, which travel with the model; so does the fuser of
    `fused`, with the settings `fuse` it was used with.
    """
    inputs = [frames, synthetic, pseudolabels, encoder, base, translators, *(fused or ())]
    job = MetaJob(settings, tuple(folds), generator, replace(fuse, masks=found_masks(fuse.masks)) if fused else None)
    return fit(meta_loop, "model", inputs, job, CODE, compute)


def meta_loop(config: dict) -> None:
    """The loop: one batch and loss for every fold and, where classes rotate, its copies; now and then the held-out."""
    import ray.train.torch

    job: MetaJob = config["settings"]
    settings, folders = job.meta, config["folders"]
    device = ray.train.torch.get_device()
    frames = Frames.open(folders[0])
    encoder = load_encoder(folders[3], settings.expert.wants).to(device)
    canvas = Canvas(settings.size, settings.letterbox)
    views = PseudoViews(frames, *folders[1:3], seed=settings.seed, fused=folders[6] if job.fuse else None)
    desk = Desk(FeatureBank(encoder, views, canvas, int(settings.cache_gb * 2**30)))
    lessons = courses(views, job.folds, settings)
    experts = fresh_experts(frames, lessons, encoder, settings, folders[4]).to(device)
    model = ray.train.torch.prepare_model(Experts(experts))
    optimiser, schedule = optimisers(experts, settings)
    best = Best(experts)
    checkpoints = Checkpoints(
        config, settings.steps, model=experts, optimiser=optimiser, schedule=schedule, best=best
    )
    for step in range(checkpoints.restore(), settings.steps):
        if settings.selects and step % settings.validate_every == 0:
            checkpoints.log(step, **best.examine(step, experts, lessons, desk.ask))
        losses = batch_losses(model, experts, lessons, desk, settings, step, checkpoints.rank)
        update(experts, losses, optimiser, schedule)
        if step % 10 == 0 or step + 1 == settings.steps:
            checkpoints.log(step, **{f"loss_fold{fold}": losses[fold] for fold in best.step})
        if (step + 1) % settings.checkpoint_every == 0:
            checkpoints.save(step + 1)
    if settings.selects:
        checkpoints.log(settings.steps, **best.examine(settings.steps, experts, lessons, desk.ask))
        best.load_into(experts)
    checkpoints.finish(lambda folder: save_model(folder, experts, frames, job, folders, best))


def optimisers(experts: nn.ModuleDict, settings: MetaSettings) -> tuple[Optimizer, LRScheduler]:
    """AdamW over all that the ensembles learn, and how its rate falls."""
    learnt = [p for expert in experts.values() for p in expert.ensemble.parameters()]
    optimiser = torch.optim.AdamW(learnt, settings.rate, weight_decay=settings.weight_decay)
    return optimiser, torch.optim.lr_scheduler.PolynomialLR(optimiser, settings.steps, power=0.9)


def batch_losses(
    model: nn.Module, experts: nn.ModuleDict, lessons: dict[str, Lessons], desk: Desk, settings: MetaSettings,
    step: int, rank: int = 0,
) -> dict[str, Tensor]:
    """The loss of a batch of each of the lessons, drawn from (seed, step, rank) alone.

    model: `Experts` of the experts, as it is or made data-parallel.
    """
    seed_step(settings.seed, step, rank)
    experts.train()
    losses = {}
    for name, lesson in lessons.items():
        episodes, layers = lesson.batch(step, rank)
        laid = desk.lay(experts[name], lesson.fold, episodes, layers, lesson.novel, settings.novel_in_train)
        losses[name] = ensemble_loss(model(name, laid), laid.targets, laid.own, settings)
    return losses


def update(experts: nn.ModuleDict, losses: dict[str, Tensor], optimiser: Optimizer, schedule: LRScheduler) -> None:
    """One step of all experts together; the gradient of each is cut to length 1 on its own."""
    optimiser.zero_grad(set_to_none=True)
    torch.stack(list(losses.values())).sum().backward()
    for expert in experts.values():
        nn.utils.clip_grad_norm_(expert.ensemble.parameters(), 1.0)
    optimiser.step()
    schedule.step()


def ensemble_loss(out: EnsembleOut, targets: Tensor, group: Tensor, settings: MetaSettings) -> Tensor:
    """Loss of the fused decision and of every stream's own (spec §4.3), at a third of the canvas."""
    canvas = tuple(targets.shape[-2:])
    small = interpolate(targets, tuple(side // 3 for side in canvas), mode="nearest-exact")
    weights = settings.jaccard_weight, settings.entropy_weight
    total = segmentation_loss(enlarge(out.final, canvas, 3), small[0], group, *weights)
    for v in range(out.streams.shape[1]):
        own = segmentation_loss(enlarge(out.streams[:, v], canvas, 3), small[v], group, *weights)
        total = total + settings.stream_weight * own
    return total


def segmentation_loss(logits: Tensor, target: Tensor, group: Tensor, jaccard_weight: float, entropy_weight: float):
    """Logits [B, 2, h, w] against a target [B, h, w] of the same size."""
    return jaccard_weight * jaccard(logits, target, group) + entropy_weight * cross_entropy(logits, target)


def fresh_experts(
    frames: Frames, lessons: dict[str, Lessons], encoder, settings: MetaSettings, base: Path
) -> nn.ModuleDict:
    """One expert for each of the lessons; all start alike."""
    found = {}
    for name, lesson in lessons.items():
        torch.manual_seed(settings.seed)
        found[name] = fresh_expert(frames, lesson.fold, encoder, settings, base)
    return nn.ModuleDict(found)


def fresh_expert(frames: Frames, fold: int, encoder, settings: MetaSettings, base: Path) -> Expert:
    """An expert of this fold with its frozen base learner."""
    from safetensors.torch import load_file

    stored = json.loads((base / "config.json").read_text())
    given = ExpertSettings(**{**vars(settings.expert), "base_width": stored["width"]})
    streams = len(settings.streams)
    expert = Expert(encoder.channels, frames.base(fold), streams, given, encoder.blocks, settings.shots)
    expert.base.load_state_dict(load_file(base / f"fold{fold}.safetensors"))
    expert.base.requires_grad_(False)
    return expert


class Experts(nn.Module):
    """All folds behind one forward, as data-parallel training wants it."""

    def __init__(self, experts: nn.ModuleDict) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, name: str, laid: Evidence | Question) -> EnsembleOut:
        return answer(self.experts[name], laid)


def save_model(folder: Path, experts: nn.ModuleDict, frames: Frames, job: MetaJob, folders: list[Path], best: Best):
    """Everything that a prediction needs: experts, encoder, translators, a fuser if any, and one config.json."""
    from safetensors.torch import save_file

    experts = {fold: experts[fold] for fold in best.step}
    for fold, expert in experts.items():
        state = {name: x.contiguous().cpu() for name, x in expert.state_dict().items()}
        save_file(state, folder / f"fold{fold}.safetensors")
    shutil.copytree(folders[3], folder / "encoder", ignore=shutil.ignore_patterns("manifest.json"))
    shutil.copytree(folders[5], folder / "translators", ignore=shutil.ignore_patterns("manifest.json", "*.parquet"))
    if job.fuse:
        shutil.copytree(folders[7], folder / "fuser", ignore=shutil.ignore_patterns("manifest.json", "*.parquet"))
    config = {
        "dataset": frames.dataset,
        "generator": job.generator,
        "fuse": job.fuse and {name: asdict(job.fuse)[name] for name in ("visible", "steps", "seed", "masks")},
        "classes": list(frames.classes),
        "size": list(job.meta.size),
        "letterbox": job.meta.letterbox,
        "shots": job.meta.shots,
        "streams": [asdict(stream) for stream in job.meta.streams],
        "expert": asdict(job.meta.expert) | {"base_width": experts[str(job.folds[0])].base.width},
        "base": {fold: list(expert.base_classes) for fold, expert in experts.items()},
        "select_on": f"{job.meta.select_on}: {SELECTIONS[job.meta.select_on]}",
        "selected": {fold: {"step": best.step[fold], "held_out": best.score[fold]} for fold in experts},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))

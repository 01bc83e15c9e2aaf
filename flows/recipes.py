"""Recipes: every setting of a night, composed from the classes that stand beside the code that reads them.

    thermofuse run msrs-1shot --set data.fold=1 --set meta.steps=800

The same class is the Prefect form, the command line's `--set` and the parameters in MLflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from flows.fusion_recipes import SGDFUSE
from models.backbone import EncoderSettings
from models.episode import EpisodeSettings
from models.errors import UsageError, unknown
from models.fusers.settings import FuserSettings
from models.generators.settings import TranslateSettings
from models.pseudolabels import RefineSettings
from models.segmenters.anchored import AnchoredSettings
from models.segmenters.expert import ExpertSettings
from models.segmenters.lessons import MetaSettings
from models.views import FUSED, Stream
from tasks.evaluate import ExamSettings
from tasks.fanout import Compute
from tasks.judge_pictures import JudgeSettings
from tasks.prepare import DataSettings
from tasks.promote import Gate
from tasks.store import Ref, digest_of
from tasks.train_base import BaseSettings


@dataclass(frozen=True)
class Recipe:
    """One night. `about` says source, command, cost and what to expect. fuse: how the fused picture is made, which
    `meta.streams` may then read; None: there is none."""

    name: str
    about: str = ""
    data: DataSettings = field(default_factory=DataSettings)
    episodes: EpisodeSettings = field(default_factory=EpisodeSettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    translate: TranslateSettings = field(default_factory=TranslateSettings)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    fuse: FuserSettings | None = None
    refine: RefineSettings = field(default_factory=RefineSettings)
    base: BaseSettings = field(default_factory=BaseSettings)
    meta: MetaSettings = field(default_factory=MetaSettings)
    exam: ExamSettings = field(default_factory=ExamSettings)
    gate: Gate = field(default_factory=Gate)
    compute: Compute = field(default_factory=Compute)


TINY = TranslateSettings(
    channels=(16, 32), layers=1, patch=4, attention=False, latent=16, cycle_width=8, cycle_blocks=1,
    identity_start=True, discriminator_channels=(8, 16, 16), patch_width=8, patch_layers=1, both_ways=False,
    crop=64, short_side=None, batch=2, iterations=4, checkpoint_every=100,
)
LAPTOP = TranslateSettings(
    channels=(32, 64, 96), layers=1, patch=4, attention=False, cycle_width=16, cycle_blocks=3, identity_start=True,
    discriminator_channels=(16, 32, 64, 64), patch_width=24, both_ways=False, crop=96, short_side=None, batch=1,
    iterations=250, checkpoint_every=25, rate_generator=5e-4, rate_discriminator=3e-4, structure_weight=0.5,
    average=0.99,
)
"""A UNet over blocks of 4 x 4 pixels: keeps every edge and learns the tones."""

ANCHOR = ExpertSettings(anchored=AnchoredSettings(correction=False))
"""Few base classes: two margins and a threshold per stream, and the fusion; nothing that could memorise a class."""

PAPER = ExpertSettings(learner="msanet")
"""Many base classes: MSANet at the paper's widths, fused by F2 (`fusion="F1"` for the paper-like linear form)."""


MEASURED = replace(ANCHOR, anchored=AnchoredSettings(correction=False, metric=64))
"""Nine base classes or so: the same with a learnt metric, in which other classes than these can be told apart, too."""


def smoke() -> Recipe:
    """Every stage for real, on next to nothing: what the tests run. Under a minute of work on two cores."""
    return Recipe(
        name="smoke",
        data=DataSettings("toy", fold=0, options={"size": (64, 96), "train": 48, "test": 24}),
        episodes=EpisodeSettings(min_pixels=40),
        encoder=EncoderSettings("mobilenet_v2", "random", "symmetric", dilated=False),
        translate=TINY,
        judge=JudgeSettings(frames=8, size=(64, 96), examples=8),
        refine=RefineSettings(size=(64, 96), min_area=16, frames=24, mean_frames=8),
        base=BaseSettings(size=(64, 96), width=32, steps=20, batch=4, checkpoint_every=10),
        meta=MetaSettings(
            size=(64, 96), expert=ANCHOR, min_pixels=40, steps=20, batch=4, rate=0.02, pool=20, held_out=3, rotate=True,
            validation=8, validate_every=10, checkpoint_every=5,
        ),
        exam=ExamSettings(resamples=500),
        compute=Compute(actors=1, shard_size=8),
    )


def demo() -> Recipe:
    """Toy scenes, twelve classes, one fold; random encoder weights, so look at the ranking, not at the heights.

    Metric, pool and steps were chosen by held-out base classes of folds 1 and 2.
    """
    return Recipe(
        name="demo",
        data=DataSettings("toy", fold=0),
        episodes=EpisodeSettings(min_pixels=60),
        encoder=EncoderSettings("mobilenet_v2", "random", "symmetric", dilated=False),
        translate=replace(LAPTOP, channels=(32, 64), crop=64, iterations=60),
        judge=JudgeSettings(frames=40, size=(192, 256), examples=24),
        refine=RefineSettings(size=(192, 256)),
        base=BaseSettings(size=(192, 256), width=64, steps=150),
        meta=MetaSettings(
            size=(192, 256), expert=MEASURED, min_pixels=60, steps=120, batch=6, rate=0.2, pool=200, held_out=3,
            rotate=True, validation=20, validate_every=40, checkpoint_every=20,
        ),
        compute=Compute(shard_size=20),
    )


def msrs(shots: int) -> Recipe:
    """MSRS: the labelled part of the dataset, three folds, MobileNetV2. Sized for two cores and an hour.

    The share of pseudo-classes did best on held-out base classes (`thermofuse study pseudo msrs-1shot --seeds 2`).
    """
    return Recipe(
        name=f"msrs-{shots}shot",
        data=DataSettings("msrs"),
        episodes=EpisodeSettings(shots=shots),
        encoder=EncoderSettings(
            "mobilenet_v2", "mobilenet_v2_imagenet_from_uint8.pth", "symmetric", dilated=False
        ),
        translate=LAPTOP,
        judge=JudgeSettings(frames=64),
        base=BaseSettings(width=64, steps=200, batch=4, checkpoint_every=50),
        meta=MetaSettings(
            expert=ANCHOR, shots=shots, steps=60, batch=6, rate=0.2, pool=40, pseudo_share=0.5, rotate=True,
            validation=20, validate_every=20, checkpoint_every=10,
        ),
        compute=Compute(shard_size=16),
    )


def with_fused(recipe: Recipe, settings: FuserSettings) -> Recipe:
    """The same night with the fused picture as one more stream."""
    streams = (*recipe.meta.streams, Stream(FUSED, FUSED))
    return replace(recipe, fuse=settings, meta=replace(recipe.meta, streams=streams))


def msrs_fused(shots: int) -> Recipe:
    """MSRS with a third stream: infrared and translated RGB in one, by SGDFuse that learnt on the real pairs.

    The served model has no visible picture, and so the exam has none either. `--set fuse.visible=visible` fuses with
    the real one, for rigs that have both cameras: see what that is worth with `thermofuse study fused`.
    """
    return replace(with_fused(msrs(shots), replace(SGDFUSE, visible="rgb")), name=f"msrs-{shots}shot-fused")


def large(dataset: str, shots: int, size: tuple[int, int], visible: str) -> Recipe:
    """A GPU recipe at the papers' sizes: ResNet-50 with deep stem, SynDiff at 256 x 256, ASPP decoders."""
    return Recipe(
        name=f"{dataset}-{shots}shot",
        data=DataSettings(dataset, unpaired_visible=visible),
        episodes=EpisodeSettings(shots=shots, min_pixels=2048),
        encoder=EncoderSettings("resnet50s.gluon_in1k", "pretrained", stages=(2, 3, 4)),
        judge=JudgeSettings(size=size),
        refine=RefineSettings(size=size),
        base=BaseSettings(size=size, steps=20_000, batch=12, checkpoint_every=1000, cache_gb=16),
        meta=MetaSettings(
            size=size, expert=PAPER, shots=shots, min_pixels=2048, steps=20_000, batch=8, jaccard_weight=0.0,
            entropy_weight=1.0, held_out=2, validate_every=1000, checkpoint_every=1000, cache_gb=16,
        ),
        exam=ExamSettings(cache_gb=16),
        compute=Compute(
            actors=4, gpus_per_actor=1.0, shard_size=32, use_gpu=True, threads_per_worker=4, train_threads=8
        ),
    )


RECIPES = {
    "smoke": smoke,
    "demo": demo,
    "msrs-1shot": lambda: msrs(1),
    "msrs-5shot": lambda: msrs(5),
    "msrs-1shot-fused": lambda: msrs_fused(1),
    "soda-1shot": lambda: large("soda", 1, (352, 472), "flir"),
    "soda-5shot": lambda: large("soda", 5, (352, 472), "flir"),
    "scutseg-1shot": lambda: large("scutseg", 1, (384, 480), "flir"),
}


def named(recipe: Recipe | Mapping | str) -> Recipe:
    """The recipe itself, the one of that name, or the one that Prefect's form filled in.

    Raises UsageError that lists the names, or says which setting of the form is wrong.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return _filled_in(recipe)
    name = getattr(recipe, "name", recipe)
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]()


def _filled_in(form: Mapping) -> Recipe:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Recipe).validate_python(dict(form))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"The form's {where or 'recipe'} is wrong: {first['msg']}; correct it and run again."
        raise UsageError(reason) from error


def run_key(recipe: Recipe, inputs: Sequence[Ref]) -> str:
    """The name of one night: same recipe, data and code of its inputs, same key. Compute plays no part in it."""
    return f"{recipe.name}-{digest_of('night', inputs, replace(recipe, compute=None, about=''))[:10]}"

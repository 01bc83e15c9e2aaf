"""Recipes of generalised few-shot segmentation: every setting of a study, and the steps it compares."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from flows.catalogue import SEEDS
from models.backbone import EncoderSettings
from models.boundary import BoundarySettings
from models.errors import unknown
from models.generators.inspection import QualitySettings
from models.generators.prompts import PromptSettings
from models.generators.recognition import RecogniserSettings
from models.generators.settings import TranslateSettings
from models.generators.text2image import PictureSettings
from models.generators.toy_pipeline import ToyPipelineSettings
from models.labelling import LAST, LabelSettings
from models.prototypes import SYN4SEG
from models.relabel import RelabelSettings
from models.segmenters.joint import JointSettings
from models.small_sam import SmallSAMSettings
from tasks.carry import CarrySettings
from tasks.compare_generalised import Course
from tasks.fanout import Compute
from tasks.fit_foundation import FoundationSettings
from tasks.imagine import ImagineSettings
from tasks.label import LabelStage
from tasks.prepare import DataSettings
from tasks.pretrain import PretrainSettings
from tasks.propose import ProposeSettings
from tasks.shots import ShotSettings
from tasks.train_generalised import GeneralisedSettings

STEPS = (
    Course("supports", "K supports of each novel class, nothing else"),
    Course("pasted_supports", "control: what the supports show pasted on base frames, no pictures", paste=True,
           control=True),
    Course("names", "+ pictures of the class names alone, labels as predicted", "names", "predict"),
    Course("hdig", "+ prompts that differ (HDIG)", "grammar", "predict"),
    Course("ape", "+ labels filtered and relabelled (APE)", "grammar", "ape"),
    Course("sabr", "+ outlines sharpened by SAM (SABR)", "grammar", "sabr"),
    Course("paste", "+ what they show pasted on base frames (ours)", "grammar", "sabr", paste=True),
    Course("real_masks", "real frames with their real masks in place of synthetic ones: the ceiling", truth=True),
)


@dataclass(frozen=True)
class GeneralisedRecipe:
    """One night. `about` says source, cost and what to expect. foundation: None where published weights are named;
    pretrain: how the encoder is fitted from captions, None where its weights are at hand.

    shots.seeds: of the run; a study takes its own. carry: how visible pictures become infrared ones, where infrared is
    what is learnt; translate: the translator that makes them (None: the control without one).
    """

    name: str
    about: str = ""
    data: DataSettings = field(default_factory=DataSettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    pretrain: PretrainSettings | None = None
    shots: ShotSettings = field(default_factory=ShotSettings)
    foundation: FoundationSettings | None = None
    propose: ProposeSettings = field(default_factory=ProposeSettings)
    imagine: ImagineSettings = field(default_factory=ImagineSettings)
    label: LabelStage = field(default_factory=LabelStage)
    carry: CarrySettings | None = None
    translate: TranslateSettings | None = None
    train: GeneralisedSettings = field(default_factory=GeneralisedSettings)
    steps: tuple[Course, ...] = STEPS
    compute: Compute = field(default_factory=Compute)

    @property
    def sources(self) -> list[str]:
        """The proposers whose pictures the steps learn from."""
        return list(dict.fromkeys(step.source for step in self.steps if step.source))

    def proposed(self, source: str) -> ProposeSettings:
        return replace(self.propose, proposer=source)

    def labelled(self, source: str) -> LabelStage:
        """How pictures of a source are labelled: as far as any step wants it."""
        upto = max((step.upto for step in self.steps if step.source == source), key=list(LAST).index)
        return replace(self.label, rule=replace(self.label.rule, upto=upto))


SIZE, DRAWN = (96, 96), (64, 64)
CAPTIONED = {"size": DRAWN, "train": 3000, "test": 0, "objects": (1, 2), "noise": 0.0, "ground": 0.25, "clutter": False,
             "scale": 1.2, "spread": 0.75, "seed": 1}  # tidy, as pictures with captions are
ALONE = CAPTIONED | {"objects": (1, 1)}  # what the pipeline learns from: it has two cores and a quarter of an hour
POLES = QualitySettings(seam=1e9)  # toy scenes have poles from side to side, which are no seams


def toy(name: str, **changes) -> GeneralisedRecipe:
    """Toy scenes: one fold, one shot, everything fitted from scratch. Sized for two cores."""
    return GeneralisedRecipe(name=name, **{
        "data": DataSettings("toy", fold=0, options={"size": SIZE, "train": 400, "test": 80, "objects": (1, 3)}),
        "encoder": EncoderSettings("test_resnet", "random", "symmetric", stages=(2, 3, 4), dilated=False),
        "pretrain": PretrainSettings(DataSettings("toy", options=CAPTIONED), steps=1200, rate=3e-3),
        "shots": ShotSettings(min_pixels=150, seeds=SEEDS[:1]),
        "foundation": FoundationSettings(
            captioned=DataSettings("toy", options=ALONE),
            pipeline=ToyPipelineSettings(
                size=DRAWN, latents=4, denoiser=(32, 64, 96), steps=3800, batch=32, rate=1.5e-3,
            ),
            judge=RecogniserSettings(steps=1600, colour=False),  # classes are shapes; captions tell the colours
            sam=SmallSAMSettings(side=192, steps=1200, min_area=40), checkpoint_every=100,
        ),
        # The text encoder never saw "a photo of": how near a caption is to that says nothing.
        "propose": ProposeSettings(vocabulary="drawn", bank=PromptSettings(count=12, lam_div=0.95, lam_cls=-1.0)),
        "imagine": ImagineSettings(
            per_class=240, quality=POLES, judge="foundation",
            picture=PictureSettings("foundation", dtype="float32", size=DRAWN, steps=10, guidance=3.0, batch=4,
                                    options={"guidance_rescale": 0.7}),  # arXiv 2305.08891, §3.4
        ),
        "label": LabelStage(LabelSettings(
            split=True, filter=replace(SYN4SEG, min_area=128), relabel=RelabelSettings(tau=0.6, passes=3),
            boundary=BoundarySettings(band=16, min_area=128, min_quality=0.5),
        ), quality=POLES),
        "train": GeneralisedSettings(
            size=(192, 192), layer="visible", width=64, steps=800, batch=8, checkpoint_every=100,
            # Chosen on folds 1 and 2, with two lists of supports each.
            joint=JointSettings(mix=(4, 6, 2), alpha=1.5, hidden=0.8, steps=500, rate=2.5e-3),
        ),
        "compute": Compute(shard_size=2, train_threads=2),
        **changes,
    })


def toy_foundation() -> GeneralisedRecipe:
    """The toy world's own text-to-image pipeline and SAM, fitted from scratch."""
    return toy("toy-foundation", steps=())


def toy_gfss() -> GeneralisedRecipe:
    """Toy scenes, one fold of three novel classes, one shot: what each step of Syn4Seg is worth."""
    return toy("toy-gfss")


def toy_gfss_infrared() -> GeneralisedRecipe:
    """The same scenes in infrared: pictures are drawn and labelled in visible light, then carried over."""
    known = toy("toy-gfss-infrared")
    rule = replace(known.label.rule, upto="ape")
    return replace(known, train=replace(known.train, layer="infrared"), carry=CarrySettings(rule=rule))


def msrs_gfss() -> GeneralisedRecipe:
    """MSRS in infrared, three folds, one shot: supports alone against real masks, and labels judged on real frames.

    No generator of street scenes is at hand, so no step draws pictures. SAM is the toy world's: small, and a stranger.
    """
    return GeneralisedRecipe(
        name="msrs-gfss",
        data=DataSettings("msrs"),
        encoder=EncoderSettings(
            "mobilenet_v2", "mobilenet_v2_imagenet_from_uint8.pth", "symmetric", dilated=False
        ),
        shots=ShotSettings(min_pixels=200, seeds=SEEDS[:1]),
        label=LabelStage(
            LabelSettings(boundary=BoundarySettings(min_quality=0.6), stretch=True), sam="toy-foundation",
        ),
        train=GeneralisedSettings(
            size=(240, 320), width=64, steps=300, batch=8, joint=JointSettings(mix=(4, 3, 1), steps=200, rate=5e-3),
            checkpoint_every=100,
        ),
        steps=(STEPS[0], STEPS[-1]),
        compute=Compute(shard_size=8, train_threads=2),
    )


def published(dataset: str, shots: int, size: tuple[int, int]) -> GeneralisedRecipe:
    """The paper's arm, for GPUs: SD3.5 and SAM ViT-H (arXiv 2603.27206); its own hyper-parameters are not public."""
    return GeneralisedRecipe(
        name=f"{dataset}-gfss-{shots}shot",
        data=DataSettings(dataset),
        encoder=EncoderSettings("resnet50s.gluon_in1k", "pretrained", stages=(2, 3, 4)),
        shots=ShotSettings(shots=shots),
        propose=ProposeSettings(pipeline="stabilityai/stable-diffusion-3.5-large"),
        imagine=ImagineSettings(picture=PictureSettings()),
        label=LabelStage(sam="facebook/sam-vit-huge", batch=8),
        train=GeneralisedSettings(
            size=size, layer="visible", steps=20_000, batch=12, checkpoint_every=1000, cache_gb=16,
            joint=JointSettings(steps=20_000),
        ),
        compute=Compute(actors=4, gpus_per_actor=1.0, shard_size=8, use_gpu=True, threads_per_worker=4),
    )


GENERALISED = {
    "toy-gfss": toy_gfss,
    "toy-gfss-infrared": toy_gfss_infrared,
    "msrs-gfss": msrs_gfss,
    "voc-gfss-1shot": lambda: published("voc", 1, (480, 480)),
    "voc-gfss-5shot": lambda: published("voc", 5, (480, 480)),
    "coco-gfss-1shot": lambda: published("coco", 1, (480, 480)),
    "coco-gfss-5shot": lambda: published("coco", 5, (480, 480)),
}
FOUNDATIONS = {"toy-foundation": toy_foundation}


def named(recipe: GeneralisedRecipe | str) -> GeneralisedRecipe:
    """The recipe itself, or the one of that name. Raises UsageError that lists the names."""
    if isinstance(recipe, GeneralisedRecipe):
        return recipe
    known, name = FOUNDATIONS | GENERALISED, getattr(recipe, "name", recipe)
    if name not in known:
        raise unknown("recipe", name, known)
    return known[name]()

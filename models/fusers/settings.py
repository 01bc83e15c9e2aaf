"""How masks are made and fusers are trained, light to import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models.errors import UsageError

SMALLEST = 41  # pixels a side: below, the coarsest window of VIF does not fit


@dataclass(frozen=True)
class MaskSettings:
    """How pictures become masks.

    backend             "none", "file", "levels" (`models.fusers.regions`, no weights needed) or "sam"
    folder              of "file": it holds sam_ir/ and sam_vis/
    model, checkpoint   of "sam": vit_b, vit_l or vit_h, and its weights file
    points              prompts along each side
    quality, stability  below them segments are dropped (predicted IoU, and IoU under shifted thresholds); those of
                        "levels" are less stable than SAM's, 0.5 is a good bound
    area                smallest and largest share of the picture
    top                 the most segments that count
    mode                "soft": the score; "binary": score above 0.5; "union": any segment that counts
    grow                pixels by which finished masks are grown, or shrunk where it is negative
    drop                "infrared", "visible" or "both": finished masks that are emptied
    """

    backend: str = "none"
    folder: str | None = None
    model: str = "vit_b"
    checkpoint: str | None = None
    points: int = 16
    quality: float = 0.88
    stability: float = 0.95
    area: tuple[float, float] = (0.0005, 0.25)
    top: int = 40
    mode: str = "soft"
    grow: int = 0
    drop: str = ""


@dataclass(frozen=True)
class FuserSettings:
    """Training of a fuser on aligned pairs.

    fuser           name in FUSERS
    network         arguments of its constructor that differ from its defaults
    seed            of training; also of the noise, together with the frame's id
    splits          splits of the frames that are fused later
    visible         what infrared is fused with later: "visible", or a layer of the synthetic pictures, such as "rgb";
                    training takes real visible pictures wherever train frames have some
    steps           of diffusion, when fusing later; None: the network's own
    crop, scale, batch, iterations, checkpoint_every        crops in pixels of frames scaled by a random factor, flipped
    average         decay of SGDFuse's averaged weights, warmed up over the first steps
    complement_weight, metric_weight        of SCD, and of Qabf, VIF and SCD together, as losses (`losses.metric_loss`),
                            next to SGDFuse's Stage I and SegMiF's "maximum"; the papers have neither

    SegMiF:
    mode            "joint": one loop; "alternate": rounds of fusion, then segmentation, as in the paper
    rounds          of "alternate"; the first one has no segmentation loss
    fusion_share    of "alternate": the part of each round that trains fusion (30 k of 100 k in the paper)
    objective       "saliency": the blend is the target (the paper's); "maximum": brightest pixel, sharpest gradient
    weighting       "fixed", "dynamic", "uncertainty" or "gradnorm"
    fusion_weight, segmentation_weight              before the weighting; the former times 0.4 / k in round k
    detach          segmentation does not reach the fusion network
    rate_fusion, rate_segmentation, head_factor     AdamW with weight decay 0.01, warm-up, then linear to 0
    class_weights   of cross-entropy, background first; None: those of class_balance
    class_balance   p of the weights (n_most / n_k)^p, n_k the pixels of class k in the train frames; 0: all 1

    SGDFuse:
    first_share     the part of the iterations that trains Stage I
    rate, rate_last                 Adam, cosine
    gradient_weight                 α of Stage I
    intensity_weight, edge_weight, background_weight        of Stage II, next to the diffusion term's 1
    disturb, drop                   masks are grown or shrunk by up to so many pixels, and dropped so often
    masks                           where masks come from
    """

    fuser: str = "segmif"
    network: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    splits: tuple[str, ...] = ("train", "test")
    visible: str = "visible"
    steps: int | None = None
    crop: int = 160
    scale: tuple[float, float] = (1.0, 1.0)
    batch: int = 8
    iterations: int = 40_000
    checkpoint_every: int = 1000
    average: float = 0.999
    complement_weight: float = 0.0
    metric_weight: float = 0.0
    mode: str = "joint"
    rounds: int = 7
    fusion_share: float = 0.3
    objective: str = "saliency"
    weighting: str = "dynamic"
    fusion_weight: float = 1.0
    segmentation_weight: float = 0.8
    detach: bool = False
    rate_fusion: float = 1e-4
    rate_segmentation: float = 8e-5
    head_factor: float = 10.0
    class_weights: tuple[float, ...] | None = None
    class_balance: float = 0.0
    first_share: float = 0.4
    rate: float = 1e-4
    rate_last: float = 1e-6
    gradient_weight: float = 10.0
    intensity_weight: float = 1.5
    edge_weight: float = 1.0
    background_weight: float = 0.5
    disturb: int = 5
    drop: float = 0.1
    masks: MaskSettings = field(default_factory=MaskSettings)

    def __post_init__(self) -> None:
        if self.metric_weight and self.crop < SMALLEST:
            raise UsageError(f"fuser.crop is {self.crop}; with a metric_weight use {SMALLEST} or more, for VIF's sake.")

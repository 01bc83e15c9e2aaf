"""The acceptance tests of the methods, each against a version that was broken on purpose: it has to fail.

The tree is copied once, one line of the copy is changed, and pytest runs there. The numbers are those of the methods'
acceptance tests: GenFusion (translation, learners, fusion, protocols), SegMiF and SGDFuse. A line that has moved makes
its case fail and say so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.broken

ROOT = Path(__file__).parent.parent.parent
PARTS = ("flows", "tasks", "models", "tests", "pyproject.toml")
SEGMENTERS, GENERATORS, FUSERS = "models/segmenters", "models/generators", "models/fusers"


class Fault(NamedTuple):
    """What `right` of `file` becomes, and who must tell: a file under tests/, and words of -k."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str
    words: str


FAULTS = [
    Fault("genfusion 1 schedule: beta_max of 19", f"{GENERATORS}/syndiff.py", "19.9 * times**2", "18.9 * times**2",
          f"{GENERATORS}/test_syndiff.py", "schedule"),
    Fault("genfusion 2 oracle: network taken for an estimate of noise", f"{GENERATORS}/syndiff.py",
          'prediction_type="sample"', 'prediction_type="epsilon"', f"{GENERATORS}/test_syndiff.py", "oracle"),
    Fault("genfusion 3 prototype: no 5e-4", f"{SEGMENTERS}/similarity.py", "(weight.sum((1, 2, 3))[:, None] + EPSILON)",
          "weight.sum((1, 2, 3))[:, None]", f"{SEGMENTERS}/test_similarity.py", "constant or one_kind"),
    Fault("genfusion 4 Gram: one length", f"{SEGMENTERS}/similarity.py", "/ length[..., None] / length[..., None, :]",
          "/ length[..., None]", f"{SEGMENTERS}/test_similarity.py", "style"),
    Fault("genfusion 5 K-shot: weights not put back in order (the released code)", f"{SEGMENTERS}/msanet.py",
          "torch.zeros_like(psi).scatter(1, order, self.layers(rising)).softmax(1)", "self.layers(rising).softmax(1)",
          f"{SEGMENTERS}/test_msanet.py", "order_of_supports or shot_weights"),
    Fault("genfusion 6 five copies: nearest 5 of all shots", f"{SEGMENTERS}/similarity.py", "NEAREST * shots)",
          "NEAREST)", f"{SEGMENTERS}/test_similarity.py", "five_copies"),
    Fault("genfusion 7a multi-similarity: not rectified", f"{SEGMENTERS}/similarity.py", "(a @ s.T).relu_().float()",
          "(a @ s.T).float()", f"{SEGMENTERS}/test_msanet.py", "multi_similarity_equals"),
    Fault("genfusion 7b prior: half-filled cells left out", f"{SEGMENTERS}/similarity.py", "inside = share > 0\n",
          "inside = share > 0.5\n", f"{SEGMENTERS}/test_msanet.py", "prior_of_object_cells"),
    Fault("genfusion 8a F1: shares of 1", f"{SEGMENTERS}/fusion.py", "torch.full((streams,), 1 / streams)",
          "torch.ones(streams)", f"{SEGMENTERS}/test_fusion.py", "f1"),
    Fault("genfusion 8b F2: probabilities in place of their logarithms", f"{SEGMENTERS}/fusion.py",
          "log_share = streams.log_softmax(2)", "log_share = streams.softmax(2)", f"{SEGMENTERS}/test_fusion.py", "f2"),
    Fault("genfusion 9 base map: own class counted", f"{SEGMENTERS}/pspnet.py", "total - own * (index > 0)", "total",
          f"{SEGMENTERS}/test_pspnet.py", "left_out"),
    Fault("genfusion 10a manifest: a query among its supports", "models/episode.py",
          "[id for id in index[label] if id != query]", "list(index[label])", "models/test_episode.py",
          "never_the_query"),
    Fault("genfusion 10b manifest: K frames are enough", "models/episode.py", "if len(ids) <= shots:",
          "if len(ids) < shots:", "models/test_episode.py", "too_few or k_plus_one or never_the_query"),
    Fault("genfusion 10c manifest: draws by a random state", "models/episode.py",
          "return [left.pop(number(*key, turn) % len(left)) for turn in range(count)]",
          "return [left.pop(np.random.randint(len(left))) for turn in range(count)]", "models/test_episode.py",
          "pinned or depend_on_seed or random_state"),
    Fault("genfusion 11a novel pixels kept in training labels", "models/episode.py",
          "seen[np.isin(label, list(novel))] = 0 if policy", "seen[np.isin(label, [])] = 0 if policy",
          "models/test_episode.py", "no_novel_id"),
    Fault("genfusion 11b the same, in the gradient", "models/episode.py",
          "seen[np.isin(label, list(novel))] = 0 if policy", "seen[np.isin(label, [])] = 0 if policy",
          "tasks/test_train_meta.py", "novel_pixels"),
    Fault("genfusion 12 mIoU: ignored pixels counted", "models/metrics.py", "valid = mask != IGNORE",
          "valid = mask == mask", "models/test_metrics.py", "brute_force or by_hand or ignore"),
    Fault("genfusion 13 letterbox: nearest without half pixels", "models/geometry.py", 'mode="nearest-exact").reshape',
          'mode="nearest").reshape', "models/test_geometry.py", "comes_back or same_pixels or lie_where"),
    Fault("genfusion 14 overfit: equal shares, whatever noise says", f"{SEGMENTERS}/fusion.py",
          "gate = scores.softmax(1)[:, :, None]", "gate = torch.full_like(scores, 1 / scores.shape[1])[:, :, None]",
          f"{SEGMENTERS}/test_overfit.py", "F2"),
    Fault("genfusion 15 polarity: nobody judges the guess", f"{GENERATORS}/adversaries.py",
          'losses["patch_fool"] + softplus(-self.patch_judges[domain](guess[domain])).mean()',
          'losses["patch_fool"] + 0 * softplus(-self.patch_judges[domain](guess[domain])).mean()',
          f"{GENERATORS}/test_adversaries.py", "polarity"),
    Fault("segmif 1 sizes: padding not cut off", f"{FUSERS}/segmif.py",
          "return self.fusion(infrared, luminance(visible), semantics)[..., : size[0], : size[1]], {}",
          "return self.fusion(infrared, luminance(visible), semantics), {}", f"{FUSERS}/test_base.py", "any_size"),
    Fault("segmif 2 HIA: a sum over tokens", f"{FUSERS}/attention.py", "keys = keys / count", "keys = keys * 1.0",
          f"{FUSERS}/test_attention.py", "tiling"),
    Fault("segmif 3 sizes: four layers in a dense block", f"{FUSERS}/fusion_net.py", "for i in range(5)]",
          "for i in range(4)]", f"{FUSERS}/test_fusion_net.py", "released_size"),
    Fault("segmif 4 two stages: dropout when told to stop early", f"{FUSERS}/segmentation_net.py",
          "for stage in self.stages[:stages]:",
          "for stage in self.stages[:stages] if stages == 4 else self.stages[1 : stages + 1]:",
          f"{FUSERS}/test_segmentation_net.py", "two_stages"),
    Fault("segmif 5 convolution and upsampling: rectified between", f"{FUSERS}/fusion_net.py",
          "entered = self.enter[depth](semantics[depth])", "entered = self.enter[depth](semantics[depth]).relu()",
          f"{FUSERS}/test_fusion_net.py", "commutes"),
    Fault("segmif 6 colour: span of Cr 1.3", f"{FUSERS}/colour.py", "y + CR_SPAN * (cr - 0.5)", "y + 1.3 * (cr - 0.5)",
          f"{FUSERS}/test_colour.py", "there_and_back"),
    Fault("segmif 7a saliency: squared distance", f"{FUSERS}/saliency.py", "(steps[:, None] - steps).abs()",
          "(steps[:, None] - steps).square()", f"{FUSERS}/test_saliency.py", "brute"),
    Fault("segmif 7b saliency: a constant divided by 0", f"{FUSERS}/saliency.py", "(high - low).clamp_min(1e-6)",
          "(high - low)", f"{FUSERS}/test_saliency.py", "constant"),
    Fault("segmif 8 by heart: segmentation left out", f"{FUSERS}/cascade.py",
          "descend(total, self.fusion_optimiser, self.segmentation_optimiser)", "descend(total, self.fusion_optimiser)",
          f"{FUSERS}/test_cascade.py", "by_heart"),
    Fault("segmif 9 red in place of luminance", f"{FUSERS}/segmif.py",
          "return self.fusion(infrared, luminance(visible), semantics)",
          "return self.fusion(infrared, visible[:, :1], semantics)", f"{FUSERS}/test_segmif.py", "not_red"),
    Fault("segmif 10 protocols: background in all of them", f"{FUSERS}/segmentation_metrics.py",
          "        iou = iou[1:]\n    if", "        pass\n    if", f"{FUSERS}/test_segmentation_metrics.py",
          "protocol"),
    Fault("segmif 11 export: stretched to the brightest", f"{FUSERS}/base.py", "(image.float() * 255)",
          "(image.float() / image.max() * 255)", f"{FUSERS}/test_base.py", "rounded_once"),
    Fault("sgdfuse 1 sizes: padding not cut off", f"{FUSERS}/sgdfuse.py", "((x[..., :height, :width].float()",
          "((x.float()", f"{FUSERS}/test_sgdfuse.py", "any_size"),
    Fault("sgdfuse 2 schedule: last beta 2e-2", f"{FUSERS}/diffusion.py", "last: float = 1e-2", "last: float = 2e-2",
          f"{FUSERS}/test_diffusion.py", "measured_ends"),
    Fault("sgdfuse 3 sizes: a block more a level", f"{FUSERS}/unet.py", "[channels] * (blocks - 1)",
          "[channels] * blocks", f"{FUSERS}/test_unet.py", "measured_size"),
    Fault("sgdfuse 4 oracle: the last step keeps a hundredth of noise", f"{FUSERS}/diffusion.py",
          "1.0 if after is None else", "0.99 if after is None else", f"{FUSERS}/test_diffusion.py", "oracle"),
    Fault("sgdfuse 5 empty masks: a mean over nothing", f"{FUSERS}/losses.py", "(mask.flatten(1).sum(1) + 1e-6)",
          "mask.flatten(1).sum(1)", f"{FUSERS}/test_losses.py", "whatever_the_masks"),
    Fault("sgdfuse 6 seeds: noise of the batch", f"{FUSERS}/diffusion.py",
          "torch.stack([torch.randn(clean.shape[1:], generator=draw) for draw in draws]).to(clean)",
          "torch.randn_like(clean)", f"{FUSERS}/test_sgdfuse.py", "seed_decides"),
    Fault("sgdfuse 7 masks: the whole picture counts", f"{FUSERS}/masks.py", "if low <= inside.mean() <= high:",
          "if low <= inside.mean():", f"{FUSERS}/test_masks.py", "too_large"),
    Fault("sgdfuse 8a metrics: MI in nats", f"{FUSERS}/metrics.py", ".sum(1) / math.log(2)", ".sum(1)",
          f"{FUSERS}/test_metrics.py", "MI or known or slow or torchmetrics"),
    Fault("sgdfuse 8b metrics: Qabf without its direction", f"{FUSERS}/metrics.py",
          "turn = 1 - (angle[i] - angle[2]).abs() / (math.pi / 2)", "turn = torch.ones_like(ratio)",
          f"{FUSERS}/test_metrics.py", "slow or known"),
    Fault("sgdfuse 9 by heart: masks do not pull", f"{FUSERS}/refinement.py",
          's.intensity_weight * losses["intensity"]', '0 * losses["intensity"]', f"{FUSERS}/test_refinement.py",
          "by_heart"),
    Fault("sgdfuse 10 loader: any file is a picture", "models/datasets/base.py", "if path.suffix.lower() in SUFFIXES:",
          "if path.is_file():", "models/datasets/test_pairs.py", "roadscene or llvip or m3fd"),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tests need of this tree, to be broken."""
    folder = tmp_path_factory.mktemp("copy")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, folder)
    return folder


def trial(copy: Path, *arguments: str) -> subprocess.CompletedProcess:
    """pytest in the copy: 0 when all passed, 1 when some failed, other codes when it could not even try."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    told = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=copy, env=told, capture_output=True, text=True, timeout=900)


def test_unbroken_they_pass(copy: Path) -> None:
    done = trial(copy, *sorted({f"tests/{fault.tests}" for fault in FAULTS}))
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_found(copy: Path, fault: Fault) -> None:
    path = copy / fault.file
    text = path.read_text()
    assert text.count(fault.right) == 1, f"{fault.file} no longer says {fault.right!r} once; move the fault with it"
    path.write_text(text.replace(fault.right, fault.wrong))
    try:
        done = trial(copy, f"tests/{fault.tests}", "-k", fault.words, "-x")
    finally:
        path.write_text(text)
    assert done.returncode == 1 and " failed" in done.stdout, done.stdout[-3000:]

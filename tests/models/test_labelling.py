"""The labelling steps together, on features that know the truth and a segmenter that knows the outlines."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from models.backbone import Encoder
from models.boundary import BoundarySettings
from models.encoders import Parts
from models.errors import UsageError
from models.geometry import Canvas
from models.labelling import Labeller, LabelSettings, label_quality, split_at
from models.prototypes import SYN4SEG, Support
from models.pseudolabels import IGNORE
from models.relabel import RelabelSettings
from models.sam import Frame, Masks
from models.segmenters.generalised import ClassSpace, Generalised

SPACE = ClassSpace(base=(1,), novel=(2, 3))
CANVAS = Canvas((64, 96))
COLOURS = np.array([[40, 40, 40], [220, 30, 30], [30, 220, 30], [30, 30, 220]], np.uint8)  # of class ids 0..3
SETTINGS = LabelSettings(
    upto="ape", filter=replace(SYN4SEG, min_area=0), relabel=RelabelSettings(min_target=0.01), views=4,
    boundary=BoundarySettings(min_area=0, band=20),
)


class Colours(nn.Module):
    """Three equal levels of the mean colour of 8 x 8 cells, far apart for the four colours."""

    def forward(self, images):
        cells = torch.nn.functional.avg_pool2d(images, 8)
        return [cells, cells, cells]


class Plain(Generalised):
    """The trunk hands the colours on, and the head knows background and base: what base training would give."""

    def __init__(self):
        super().__init__((3, 3, 3), SPACE, width=8)
        self.trunk.embed = lambda features: torch.nn.functional.pad(features.mid, (0, 0, 0, 0, 0, 5))
        with torch.no_grad():
            self.trunk.classify.weight[:2, :3] = torch.from_numpy(COLOURS[:2] / 255).float() + 0.01
            self.trunk.classify.weight[:2, 3:] = 0


def scene(*objects):
    """uint8 picture [64, 96, 3] and label of (class, top, left, side) squares."""
    label = np.zeros((64, 96), np.uint8)
    for k, top, left, side in objects:
        label[top : top + side, left : left + side] = k
    return COLOURS[label], label


SUPPORTS = [Support(f"s{k}", *scene((k, 16, 24, 32))) for k in (2, 3)]


def labeller(segmenter=None, **changes):
    encoder = Encoder(Parts(Colours(), (3, 3, 3)), (0.0,) * 3, (1.0,) * 3)
    return Labeller(Plain(), encoder, SUPPORTS, CANVAS, segmenter, replace(SETTINGS, **changes))


class Outlines:
    """A segmenter that sees objects by their colour, to the pixel."""

    def segment(self, pictures, prompts, masks=3):
        found = []
        for picture, asked in zip(pictures, prompts, strict=True):
            middle = [picture[int(y), int(x)] for ((x, y),) in asked.points]
            same = np.stack([(picture == colour).all(-1) for colour in middle])
            logits = torch.from_numpy(np.where(same, 6.0, -6.0))[:, None].repeat(1, masks, 1, 1)
            found.append(Masks(logits, torch.full((len(same), masks), 0.9), Frame(picture.shape[:2], (96, 96), 96)))
            found[-1] = found[-1]._replace(frame=Frame(picture.shape[:2], picture.shape[:2], 96))
        return [m._replace(logits=torch.nn.functional.pad(m.logits, (0, 0, 0, 32))) for m in found]


def test_a_novel_object_is_found_by_its_supports():
    picture, truth = scene((2, 8, 16, 24), (1, 40, 64, 16))
    (found,) = labeller().label([picture], [2])
    inside = np.zeros_like(truth, bool)
    inside[10:30, 18:38] = inside[42:54, 66:78] = True
    assert (found.label == truth)[inside].all() and found.status == "ok"
    assert list(found.steps) == ["predict", "apf", "apr"] and found.facts["target"] > 0.05


def test_a_class_that_the_prompt_does_not_name_is_not_said():
    picture, _ = scene((3, 8, 16, 24))
    (found,) = labeller().label([picture], [2])
    assert 3 not in found.steps["predict"]
    (named,) = labeller().label([picture], [3])
    assert (named.label == 3).sum() > 400


def test_what_is_unlike_the_supports_is_freed_and_the_picture_turned_down():
    """A yellowish square is nearest to green, but not near enough."""
    picture, _ = scene()
    picture = picture.copy()
    picture[16:48, 24:56] = (80, 190, 30)
    strict = labeller(filter=replace(SETTINGS.filter, lam=0.98))
    (found,) = strict.label([picture], [2])
    assert (found.steps["predict"][20:44, 28:52] == 2).all()
    assert (found.steps["apf"][20:44, 28:52] == IGNORE).all() and found.status == "no_target"
    assert found.facts["kept"] < 1


def eager(split):
    """A labeller whose background row is no longer like the background, so that novel rows win there, too."""
    model = Plain()
    with torch.no_grad():
        model.trunk.classify.weight[:2, :3] = torch.tensor([[1.0, -0.6, 0.6], [1.0, -0.2, -0.2]])
    encoder = Encoder(Parts(Colours(), (3, 3, 3)), (0.0,) * 3, (1.0,) * 3)
    return Labeller(model, encoder, SUPPORTS, CANVAS, None, replace(SETTINGS, split=split))


def test_a_picture_splits_into_what_it_was_asked_for_and_the_rest():
    picture, truth = scene((2, 8, 16, 24))
    said = {split: eager(split).label([picture], [2])[0].steps["predict"] == 2 for split in (False, True)}
    assert said[False].all(), "as published: it wins everywhere"
    both, either = (said[True] & (truth == 2)).sum(), (said[True] | (truth == 2)).sum()
    assert both / either > 0.8


def test_a_split_keeps_base_classes_and_classes_that_were_not_asked_for():
    picture, truth = scene((2, 8, 16, 24), (1, 32, 64, 24))
    predicted = eager(True).label([picture], [2])[0].steps["predict"]
    assert (predicted[truth == 1] == 1).mean() > 0.8 and 3 not in predicted


def test_the_split_lies_between_two_groups_even_where_the_class_leads_nowhere():
    generator = torch.Generator().manual_seed(0)
    low, high = torch.randn(900, generator=generator) * 0.3 - 4, torch.randn(100, generator=generator) * 0.3 - 1
    assert -3.4 < split_at(torch.cat([low, high]).reshape(20, 50)) < -1.6
    assert split_at(torch.full((4, 5), -2.0)) == 0.0


def test_sam_sharpens_what_features_found():
    picture, truth = scene((2, 9, 19, 25))
    plain, sharp = (labeller(Outlines(), upto=upto).label([picture], [2])[0] for upto in ("ape", "sabr"))
    quality = [label_quality([one.label], [truth], (2,))["miou"] for one in (plain, sharp)]
    assert quality[1] > quality[0] and quality[1] > 0.97 and sharp.facts["changed"] > 0
    assert list(sharp.steps) == ["predict", "apf", "apr", "sabr"] and (sharp.steps["apr"] == plain.label).all()


def test_base_classes_are_never_freed():
    picture, _ = scene((1, 8, 16, 24), (2, 30, 60, 24))
    impossible = labeller(filter=replace(SETTINGS.filter, lam=1.01))
    steps = impossible.label([picture], [2])[0].steps
    assert (steps["apf"] == 1).sum() == (steps["predict"] == 1).sum() > 0 and 2 not in steps["apf"]


def test_neighbours_change_nothing():
    pictures = [scene((2, 8, 16, 24))[0], scene((3, 20, 50, 30))[0]]
    made = labeller(Outlines(), upto="sabr")
    together = made.label(pictures, [2, 3])
    for n, target in enumerate((2, 3)):
        assert (made.label(pictures[n : n + 1], [target])[0].label == together[n].label).all()


def test_what_is_missing_is_told():
    with pytest.raises(UsageError, match="SABR needs a SAM"):
        labeller(upto="sabr")
    with pytest.raises(UsageError, match="predict, ape, sabr"):
        LabelSettings(upto="crf")
    encoder = Encoder(Parts(Colours(), (3, 3, 3)), (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(UsageError, match="draw other supports"):
        Labeller(Plain(), encoder, SUPPORTS[:1], CANVAS, None, SETTINGS)


def test_quality_by_hand():
    truth = np.array([[2, 2, 2, 2, 0, 0, 255]])
    label = np.array([[2, 2, 0, 255, 2, 0, 2]])
    found = label_quality([label], [truth], (2, 3))
    assert found == pytest.approx({"miou": 2 / 5, "precision": 2 / 3, "coverage": 3 / 4})

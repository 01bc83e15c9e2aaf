"""Who learns from what, and that a few scenes can be learnt by heart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.errors import UsageError
from models.fusers.cascade import Alone, Cascade
from models.fusers.colour import luminance, recolour
from models.fusers.losses import complement_loss
from models.fusers.segmentation_metrics import confusion, mean_iou
from models.fusers.settings import FuserSettings
from models.fusers.training import Pairs
from models.fusers.weighting import KINDS
from tests.models.fusers.small import drawn_pairs, small

BRIEF = FuserSettings(iterations=14, rounds=7, rate_fusion=1e-3, rate_segmentation=1e-3, fusion_share=0.5)


def cascade(**changes) -> Cascade:
    torch.manual_seed(0)
    return Cascade(replace(BRIEF, **changes), small("segmif", fold=2))


def pairs(batch: int = 2, side: int = 32) -> Pairs:
    return Pairs(*drawn_pairs(batch, side))


def moved(part: torch.nn.Module, act) -> set[str]:
    """Names of the parameters and buffers that `act` changes."""
    before = {name: x.clone() for name, x in part.state_dict().items()}
    act()
    return {name.split(".")[0] for name, x in part.state_dict().items() if not torch.equal(x, before[name])}


def test_in_turns_one_network_learns_at_a_time():
    made = cascade(mode="alternate")
    assert moved(made.model, lambda: made.fusion_step(pairs(), round=1)) == {"fusion"}
    assert moved(made.model, lambda: made.fusion_step(pairs(), round=2)) == {"fusion"}
    assert moved(made.model, lambda: made.segmentation_step(pairs())) == {"segmentation"}
    assert moved(made.model, lambda: made.joint_step(pairs())) == {"fusion", "segmentation"}


def test_segmentation_reaches_the_fusion_network_unless_detached():
    for detach in (False, True):
        made = cascade(fusion_weight=0.0, detach=detach, weighting="fixed")
        made.joint_step(pairs())
        reached = made.model.fusion.last.weight.grad.abs().sum() > 0
        assert bool(reached) != detach


def test_statistics_move_only_when_segmentation_is_trained():
    made = cascade(mode="alternate")
    norm = made.model.segmentation.head.join[1]
    made.fusion_step(pairs(), round=2)
    assert norm.num_batches_tracked == 0
    made.segmentation_step(pairs())
    assert norm.num_batches_tracked == 1


def test_rounds_alternate_and_the_first_knows_no_segmentation():
    made = cascade(mode="alternate")
    assert [made.phase(step) for step in (0, 1, 2, 3, 13)] == [
        ("fusion", 1), ("segmentation", 1), ("fusion", 2), ("segmentation", 2), ("segmentation", 7),
    ]  # fmt: skip
    assert set(made.iterate(pairs(), 0)) == {"fusion"}
    assert set(made.iterate(pairs(), 1)) == {"segmentation"}
    assert set(made.iterate(pairs(), 2)) == {"fusion", "segmentation", "weight_fusion", "weight_segmentation"}
    assert cascade().phase(5) == ("joint", 0)


@pytest.mark.parametrize("weighting", KINDS)
@pytest.mark.parametrize("objective", ["saliency", "maximum"])
def test_every_weighting_and_objective_steps(weighting, objective):
    made = cascade(weighting=weighting, objective=objective)
    losses = [made.iterate(pairs(), step) for step in range(2)]
    assert all(torch.isfinite(value) for row in losses for value in row.values())


def test_alone_the_segmentation_network_learns_from_the_picture_that_is_given():
    made = Alone(BRIEF, small("segmif"))
    grey = pairs()._replace(visible=pairs().infrared)
    assert moved(made.model, lambda: made.iterate(grey, 1)) == {"segmentation"}
    torch.manual_seed(0)
    twin = cascade()
    torch.manual_seed(1)
    twin.model.segmentation.train()
    expected = twin.segmentation_loss(pairs().visible, pairs())
    torch.manual_seed(1)
    assert torch.equal(Alone(BRIEF, small("segmif", fold=2)).iterate(pairs(), 0)["segmentation"], expected)


def test_what_each_source_lacks_may_weigh_in():
    batch = pairs()
    plain, more = (cascade(objective="maximum", complement_weight=w) for w in (0.0, 0.5))
    fused = (batch.infrared + luminance(batch.visible)) / 2
    gap = more.fusion_loss(fused, batch) - plain.fusion_loss(fused, batch)
    assert gap == pytest.approx(0.5 * float(complement_loss(fused, batch.infrared, luminance(batch.visible))), abs=1e-5)


def test_training_and_testing_see_the_same_picture():
    made = cascade()
    batch = pairs()
    with torch.no_grad():
        fused, image = made.fuse(batch)
        out = made.model.eval().fuse(batch.infrared, batch.visible)
    torch.testing.assert_close(out.luminance, fused.clamp(0, 1))
    torch.testing.assert_close(image, recolour(fused, batch.visible))
    inside = ((fused > 0.1) & (fused < 0.8)).expand_as(image)
    torch.testing.assert_close(image[inside], out.image[inside], atol=1e-5, rtol=0)
    assert not torch.allclose(luminance(batch.visible), batch.visible[:, :1]), "red would be another channel"


def test_a_checkpoint_goes_on_where_it_stopped():
    runs = []
    for stop in (None, 2):
        made = cascade(weighting="dynamic")
        for step in range(4):
            if step == stop:
                states = {name: part.state_dict() for name, part in made.parts("segmif").items()}
                states = torch.load(_saved(states), weights_only=True)
                made = cascade(weighting="dynamic", seed=9)
                for name, part in made.parts("segmif").items():
                    part.load_state_dict(states[name])
            torch.manual_seed(step)
            made.iterate(pairs(), step)
        runs.append(made.model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def _saved(states: dict):
    import io

    buffer = io.BytesIO()
    torch.save(states, buffer)
    buffer.seek(0)
    return buffer


def test_settings_that_do_not_fit_are_told():
    for wrong in ({"mode": "cascade"}, {"objective": "vif"}):
        with pytest.raises(UsageError, match="joint or alternate, towards saliency or maximum"):
            cascade(**wrong)


def test_four_scenes_are_learnt_by_heart():
    """64 x 64 pixels, width 16, 150 steps: L_f below 0.02 and mIoU above 0.9."""
    torch.manual_seed(0)
    settings = FuserSettings(iterations=150, rate_fusion=5e-3, rate_segmentation=4e-3, head_factor=2.0)
    made = Cascade(settings, small("segmif", anchor="mean", growth=8))
    batch = Pairs(*drawn_pairs(4, 64))
    for step in range(settings.iterations):
        losses = made.iterate(batch, step)
    with torch.no_grad():
        model = made.model.eval()
        out = model.fuse(batch.infrared, batch.visible)
        found = model.segment(out.image).argmax(1)
    assert losses["fusion"] < 0.02
    assert mean_iou(confusion(found, batch.label, 3), "all") > 0.9

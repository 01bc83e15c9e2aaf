"""What every fuser of the table keeps to, and what the contract refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from models import FUSERS, find
from models.errors import UsageError
from models.fusers.base import Fuser, load_fuser, to_picture, to_unit
from tests.models.fusers.small import pair, small

every = pytest.mark.parametrize("name", sorted(FUSERS))


@every
@pytest.mark.parametrize("size", [(32, 48), (33, 41)])
def test_any_size_comes_back_as_it_was_and_in_range(name, size):
    infrared, visible = pair(2, *size)
    with torch.inference_mode():
        out = small(name).fuse(infrared, visible)
    assert out.luminance.shape == (2, 1, *size) and out.image.shape == (2, 3, *size)
    for x in (out.luminance, out.image):
        assert x.dtype == torch.float32 and torch.isfinite(x).all() and x.min() >= 0 and x.max() <= 1


@every
def test_a_picture_depends_on_its_own_pair_and_seed_alone(name):
    fuser = small(name)
    infrared, visible = pair(3)
    with torch.inference_mode():
        together = fuser.fuse(infrared, visible, {"seeds": [1, 2, 3]})
        alone = fuser.fuse(infrared[1:2], visible[1:2], {"seeds": [2]})
        again = fuser.fuse(infrared[1:2], visible[1:2], {"seeds": [2]})
    torch.testing.assert_close(together.image[1:2], alone.image, atol=1e-4, rtol=0)
    assert torch.equal(again.image, alone.image) or not fuser.deterministic


@every
def test_a_saved_fuser_draws_the_same(name, tmp_path):
    fuser = small(name)
    fuser.save(tmp_path)
    grey, colour = np.random.default_rng(0).integers(0, 256, (2, 3, 24, 31), dtype=np.uint8)
    grey, colour = grey[0], np.ascontiguousarray(np.moveaxis(colour, 0, -1))
    loaded = load_fuser(tmp_path)
    assert type(loaded) is find(FUSERS, name) and not loaded.training
    assert np.array_equal(loaded.pictures([grey], [colour])[0], fuser.pictures([grey], [colour])[0])
    assert json.loads((tmp_path / "config.json").read_text())["fuser"] == name == fuser.name


@every
def test_its_flags_are_true(name):
    fuser = small(name)
    assert isinstance(fuser, Fuser)
    assert bool(fuser.trainer) == (len(list(fuser.parameters())) > 0)
    assert fuser.needs_labels == hasattr(fuser, "segment")


@every
def test_shapes_that_do_not_fit_are_told(name):
    infrared, visible = pair(1)
    with pytest.raises(UsageError, match=r"\[B,1,H,W\] and \[B,3,H,W\]"):
        small(name).fuse(visible, infrared)
    with pytest.raises(UsageError, match="one size"):
        small(name).fuse(infrared[..., 1:], visible)
    with pytest.raises(UsageError, match="one size"):
        small(name).fuse(infrared.expand(2, -1, -1, -1), visible)


def test_a_control_opens_by_name_and_a_learnt_fuser_by_folder(tmp_path):
    assert load_fuser("average").name == "average"
    for name in (name for name in FUSERS if find(FUSERS, name).trainer):
        with pytest.raises(UsageError, match="has to be fitted first"):
            load_fuser(name)
    with pytest.raises(UsageError, match="holds no fuser"):
        load_fuser(tmp_path)
    with pytest.raises(UsageError, match="Did you mean 'average'"):
        load_fuser("averages")


def test_pictures_are_cut_and_rounded_once_and_not_stretched():
    levels = torch.tensor([-0.5, 0.0, 0.5, 100.4 / 255, 100.6 / 255, 1.0, 3.0])[None, None]
    assert to_picture(levels).tolist() == [[0, 0, 128, 100, 101, 255, 255]]
    grey = np.arange(90, 106, dtype=np.uint8).reshape(4, 4)  # a stretch would fill 0..255
    assert np.array_equal(to_picture(to_unit(grey)), grey)
    colour = np.repeat(grey[..., None], 3, -1)
    assert np.array_equal(load_fuser("average").pictures([grey], [colour])[0], colour)


def test_masks_and_seeds_reach_the_fuser_as_tensors():
    class Witness(Fuser):
        name = "witness"

        def _fuse(self, infrared, visible, aux):
            return infrared + aux["mask_infrared"], {"seen": torch.tensor(aux["seeds"])}

    grey, mask = np.full((2, 3), 51, np.uint8), np.full((2, 3), 102, np.uint8)
    colour = np.repeat(grey[..., None], 3, -1)
    (picture,) = Witness().pictures([grey], [colour], [{"mask_infrared": mask, "seeds": [7]}])
    assert (picture == 153).all()
    out = Witness().fuse(*(to_unit(p)[None] for p in (grey, colour)), {"mask_infrared": 0, "seeds": [7]})
    assert out.extras["seen"].tolist() == [7]


def test_a_fuser_without_a_way_to_fuse_cannot_be_made():
    with pytest.raises(TypeError, match="_fuse"):
        Fuser()

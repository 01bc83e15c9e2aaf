"""Frames onto a canvas and back, and random views that all modalities share."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from models.errors import UsageError
from models.geometry import (
    Augmentation,
    Canvas,
    as_image,
    augment,
    cells,
    enlarge,
    is_valid,
    photometric,
    valid_size,
)

FRAMES = [(480, 640), (576, 720), (240, 320), (101, 77), (33, 130)]
STILL = dict(scale=(1.0, 1.0), rotate=0.0, flip_probability=0.0, photometric_probability=0.0)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def disc(height, width):
    """A label of one smooth disc, and the distance [h, w] of each pixel from its rim."""
    y, x = torch.meshgrid(torch.arange(height) - height * 0.55, torch.arange(width) - width * 0.4, indexing="ij")
    distance = (y**2 + x**2).sqrt() - min(height, width) * 0.3
    return (distance < 0).to(torch.uint8) * 3, distance.abs()


def blocks(height=48, width=64):
    """A label of random blocks of 8 px in three classes, and streams that show it: grey = class / 4."""
    label = torch.randint(0, 3, (height // 8, width // 8), generator=draws(5))
    label = label.repeat_interleave(8, 0).repeat_interleave(8, 1).to(torch.uint8)
    return label, (label / 4.0).expand(2, 3, height, width).clone()


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("canvas", [Canvas((353, 473)), Canvas((240, 320)), Canvas((473, 473), "bam")])
def test_a_label_comes_back_but_for_pixels_at_its_rim(frame, canvas):
    label, distance = disc(*frame)
    on_canvas = canvas.label(label)
    assert on_canvas.shape == canvas.size and on_canvas.dtype == torch.uint8
    back = canvas.restore_label(on_canvas, *frame)
    cell = max(1.0, *(side / have for side, have in zip(frame, canvas.content(*frame), strict=True)))
    drift = 0 if canvas.mode == "exact" else 8 * max(frame) / canvas.size[0]
    assert back.shape == label.shape and set(back.unique().tolist()) <= {0, 3, 255}
    assert (back == label)[distance > cell + drift].all() or canvas.mode == "bam"
    inside = back != 255
    assert ((back == label) | ~inside | (distance <= cell + drift)).all() and inside.float().mean() > 0.94


@pytest.mark.parametrize("frame", FRAMES)
def test_the_exact_canvas_puts_every_pixel_back_where_it_was(frame):
    """A ramp of x and y survives the round trip to a twentieth of a pixel, so nothing shifts."""
    y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in frame), indexing="ij")
    ramp = torch.stack([y, x])[None]
    canvas = Canvas((353, 473))
    back = canvas.restore(canvas.image(ramp), *frame)
    inner = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    assert (back - ramp)[inner].abs().max() < 0.06


def test_the_bam_canvas_drifts_as_published():
    """640 x 480 at 473: content 352 x 472, a quarter of the canvas empty, up to 4 px of drift."""
    canvas = Canvas((473, 473), "bam")
    assert canvas.content(480, 640) == (352, 472)
    image = canvas.image(torch.ones(1, 3, 480, 640))
    empty = (image == 0).float().mean().item()
    assert image.shape[-2:] == (473, 473) and empty == pytest.approx(0.257, abs=0.001)
    label = canvas.label(torch.ones(480, 640, dtype=torch.uint8))
    assert torch.equal(label == 255, image[0, 0] == 0) and (label[:352, :472] == 1).all()
    ramp = torch.arange(480.0)[:, None].expand(1, 1, 480, 640)
    back = canvas.restore(canvas.image(ramp), 480, 640)
    drift = (back - ramp)[0, 0, 10:470, 300].abs().max()
    assert 3 < drift <= 4.5


def test_images_and_labels_land_on_the_same_pixels():
    label, streams = blocks()
    for canvas in (Canvas((25, 33)), Canvas((96, 128)), Canvas((64, 64), "bam")):
        shown = (canvas.image(streams)[0, 0] * 4).round()
        placed = canvas.label(label)
        agree = (shown == placed)[placed != 255].float().mean()
        assert agree > 0.8


def test_pictures_become_three_channels_in_0_1():
    grey, colour = np.array([[0, 51], [255, 0]], np.uint8), np.zeros((2, 3, 3), np.uint8)
    colour[1, 2] = 255, 51, 0
    assert as_image(grey).shape == (3, 2, 2) and as_image(grey)[:, 0, 1].tolist() == pytest.approx([0.2] * 3)
    assert as_image(colour)[:, 1, 2].tolist() == pytest.approx([1, 0.2, 0])


def test_valid_sizes():
    assert is_valid(353, 473) and is_valid(360, 480) and not is_valid(353, 480) and not is_valid(350, 470)
    assert not is_valid(1, 1)
    assert valid_size(350, 470) == (352, 472) and valid_size(354, 474) == (353, 473)
    assert cells(353, 473) == (45, 60) and cells(360, 480) == (45, 60)


@pytest.mark.parametrize("size, mode, message", [
    ((350, 470), "exact", "use 352x472"), ((353, 473), "bam", "use 473x473"), ((473, 473), "crop", "exact or bam"),
])
def test_a_canvas_that_cannot_be_says_what_can(size, mode, message):
    with pytest.raises(UsageError, match=message):
        Canvas(size, mode)


@pytest.mark.parametrize("seed", range(6))
def test_a_view_has_one_geometry_for_all_streams_and_labels(seed):
    label, streams = blocks()
    settings = Augmentation(scale=(0.7, 1.6), rotate_probability=1.0)
    seen, labels = augment(streams, torch.stack([label, label]), Canvas((48, 64)), settings, draws(seed), infrared=())
    assert seen.shape == (2, 3, 48, 64) and labels.shape == (2, 48, 64) and labels.dtype == torch.uint8
    assert type(seen) is torch.Tensor and type(labels) is torch.Tensor
    assert torch.equal(seen[0], seen[1]) and torch.equal(labels[0], labels[1])
    inside = labels[0] != 255
    assert ((seen[0, 0] * 4).round() == labels[0])[inside].float().mean() > 0.75
    wrong = (seen[0, 0] * 4 - labels[0].float()).abs()[inside]
    assert wrong.mean() < 0.25


def test_nothing_random_is_the_exact_canvas():
    label, streams = blocks()
    canvas = Canvas((41, 57))
    seen, placed = augment(streams, label, canvas, Augmentation(**STILL), draws())
    assert torch.allclose(seen, canvas.image(streams)) and torch.equal(placed, canvas.label(label))


def test_outside_the_frame_is_grey_and_ignored():
    label, streams = blocks()
    settings = Augmentation(**{**STILL, "scale": (0.5, 0.5)})
    seen, placed = augment(streams, label, Canvas((48, 64)), settings, draws())
    assert (placed == 255).float().mean() == pytest.approx(0.75)
    corner = seen[0, :, -1, -1]
    assert placed[-1, -1] == 255 and torch.allclose(corner, torch.tensor([0.485, 0.456, 0.406]))


def test_flips_and_rotations_happen():
    label, streams = blocks()
    canvas = Canvas((48, 64))
    flipped = Augmentation(**{**STILL, "flip_probability": 1.0})
    assert torch.equal(augment(streams, label, canvas, flipped, draws())[1], label.flip(-1))
    turned = Augmentation(**{**STILL, "rotate": 10.0, "rotate_probability": 1.0})
    placed = augment(streams, label, canvas, turned, draws(1))[1]
    assert not torch.equal(placed, label) and (placed == 255).any()


def test_views_depend_on_the_generator_alone():
    label, streams = blocks()
    canvas, settings = Canvas((48, 64)), Augmentation(scale=(0.6, 1.5))
    state = torch.get_rng_state()
    first = augment(streams, label, canvas, settings, draws(3), focus=1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    again = augment(streams, label, canvas, settings, draws(3), focus=1)
    other = augment(streams, label, canvas, settings, draws(4), focus=1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_the_crop_keeps_the_focus_class():
    label = torch.zeros(48, 64, dtype=torch.uint8)
    label[8:16, 12:20] = 2
    settings = Augmentation(**{**STILL, "scale": (2.0, 2.0)})

    def kept(focus):
        views = [augment(torch.zeros(1, 3, 48, 64), label, Canvas((48, 64)), settings, draws(s), focus=focus)[1]
                 for s in range(24)]
        return sum(int((view == 2).sum()) >= 0.85 * 256 for view in views)

    assert kept(2) >= 22 and kept(None) < 12


def test_a_focus_too_large_for_any_crop_takes_the_best_draw():
    label = torch.full((48, 64), 2, dtype=torch.uint8)
    settings = Augmentation(**{**STILL, "scale": (2.0, 2.0)})
    placed = augment(torch.zeros(1, 3, 48, 64), label, Canvas((48, 64)), settings, draws(), focus=2)[1]
    assert (placed == 2).all()


def test_photometry_touches_infrared_streams_alone_and_all_their_channels_alike():
    label, streams = blocks()
    settings = Augmentation(**{**STILL, "photometric_probability": 1.0})
    before = streams.clone()
    seen, _ = augment(streams, label, Canvas((48, 64)), settings, draws(1), infrared=(0,))
    assert torch.equal(streams, before), "the caller's tensor must not change"
    assert torch.allclose(seen[1], streams[1]) and not torch.allclose(seen[0], streams[0])
    assert torch.equal(seen[0, 0], seen[0, 1]) and torch.equal(seen[0, 0], seen[0, 2])


@pytest.mark.parametrize("changes, expected", [
    (dict(gain=(1.5, 1.5)), 0.6), (dict(offset=(0.2, 0.2)), 0.6), (dict(gamma=(2.0, 2.0)), 0.16), ({}, 0.4),
])
def test_photometry_by_hand(changes, expected):
    plain = dict(photometric_probability=1.0, blur_probability=0.0, gain=(1.0, 1.0), offset=(0.0, 0.0),
                 gamma=(1.0, 1.0), noise=(0.0, 0.0))
    found = photometric(torch.full((3, 4, 4), 0.4), Augmentation(**{**plain, **changes}), draws())
    assert torch.allclose(found, torch.full((3, 4, 4), expected))


def test_noise_and_blur_stay_in_range():
    image = torch.rand(3, 32, 32, generator=draws())
    noisy = photometric(image, Augmentation(photometric_probability=1.0, noise=(0.5, 0.5)), draws(1))
    assert noisy.min() >= 0 and noisy.max() <= 1
    soft = Augmentation(photometric_probability=1.0, blur_probability=1.0, blur=(1.0, 1.0), gain=(1.0, 1.0),
                        offset=(0.0, 0.0), gamma=(1.0, 1.0), noise=(0.0, 0.0))
    assert photometric(image, soft, draws()).var() < image.var() / 2


@pytest.mark.parametrize("canvas", [(65, 97), (64, 96)])
@pytest.mark.parametrize("shrink", [1, 3])
def test_scores_of_the_grid_lie_where_their_pixels_are(canvas, shrink):
    """On 8n + 1 cell i is pixel 8i; on 8n it is the middle of eight pixels. Both for all pixels and for every third."""
    grid = cells(*canvas)
    middle = 0 if canvas[0] % 8 else 3.5
    places = torch.arange(grid[1], dtype=torch.float32) * 8 + middle
    found = enlarge(places.expand(1, 1, *grid), canvas, shrink)[0, 0, 0]
    pixels = interpolate(torch.arange(canvas[1])[None, None].float(), found.shape[0], mode="nearest-exact")[0, 0]
    inside = (pixels >= places[0]) & (pixels <= places[-1])
    tolerance = 1e-3 if canvas[0] % 8 or shrink == 1 else 1.0
    assert (found - pixels)[inside].abs().max() <= tolerance and inside.sum() > 20


def test_an_aligned_grid_is_restored_through_its_canvas():
    canvas, scores = Canvas((65, 97)), torch.randn(1, 2, 9, 13, generator=draws())
    expected = canvas.restore(enlarge(scores, (65, 97)), 120, 200)
    assert torch.equal(canvas.restore(scores, 120, 200), expected)
    square = Canvas((65, 65), "bam").restore(torch.randn(1, 2, 9, 9, generator=draws()), 120, 200)
    assert square.shape == (1, 2, 120, 200)

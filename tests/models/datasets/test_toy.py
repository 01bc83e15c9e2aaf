import time

import numpy as np
import pytest
from scipy.ndimage import maximum_filter

from models.datasets.shapes import SHAPES
from models.datasets.toy import Scene, Toy
from models.errors import UsageError

GRID = np.meshgrid(np.linspace(-1.2, 1.2, 121), np.linspace(-1.2, 1.2, 121))


def scenes(count: int, **options):
    dataset = Toy(train=count, test=0, **options)
    return [dataset.read(item) for item in dataset.items()]


def test_a_scene_depends_on_seed_split_and_index_alone():
    first = Toy(seed=3).read(Toy(seed=3).items()[7])
    np.random.seed(0)
    again = Toy(seed=3, train=9, test=1).read(Toy(seed=3).items()[7])
    assert all(np.array_equal(getattr(first, k), getattr(again, k)) for k in ("infrared", "visible", "label"))


def test_seeds_splits_and_indices_differ():
    items = Toy().items()
    pictures = [Toy().read(items[0]), Toy().read(items[1]), Toy().read(items[160]), Toy(seed=1).read(items[0])]
    assert len({picture.infrared.tobytes() for picture in pictures}) == 4


def test_the_counts_and_layers_of_the_splits():
    dataset = Toy(train=2, test=1, unlabelled=1, visible=1, size=(40, 56))
    layers = {item.split: [k for k in ("infrared", "visible", "label") if getattr(item, k)] for item in dataset.items()}
    assert [item.split for item in dataset.items()] == ["train", "train", "test", "unlabelled", "visible"]
    assert layers["test"] == ["infrared", "visible", "label"]
    assert layers["unlabelled"] == ["infrared"] and layers["visible"] == ["visible"]
    assert dataset.read(dataset.items()[0]).infrared.shape == (40, 56)


def test_unlabelled_scenes_are_no_copies_of_labelled_ones():
    dataset = Toy(train=1, test=0, unlabelled=1)
    labelled, unlabelled = (dataset.read(item).infrared for item in dataset.items())
    assert not np.array_equal(labelled, unlabelled)


def test_scenes_hold_a_few_classes_each_and_every_class_often():
    present = [set(np.unique(picture.label)) - {0} for picture in scenes(120)]
    assert max(map(len, present)) <= 5 and np.mean([len(p) for p in present]) > 2.5
    frames_of = {label: sum(label in p for p in present) for label in range(1, 13)}
    assert min(frames_of.values()) >= 12


def test_objects_are_large_enough_for_episodes():
    areas = [(picture.label == label).sum() for picture in scenes(60) for label in np.unique(picture.label)[1:]]
    assert np.mean(np.array(areas) >= 100) > 0.85


def test_outlines_differ_between_classes():
    masks = [shape.distance(*GRID) < 0 for shape in SHAPES]
    for i, first in enumerate(masks):
        assert 0.1 < first.mean() < 0.6
        overlaps = [(first & other).sum() / (first | other).sum() for other in masks[:i]]
        assert max(overlaps, default=0) < 0.85


def test_outline_and_surface_together_are_unique():
    assert len({(shape.distance, shape.texture) for shape in SHAPES}) == len(SHAPES)
    assert len({shape.distance for shape in SHAPES}) == len(SHAPES)


def test_shapes_stay_inside_their_window():
    edge = np.linspace(-1.6, 1.6, 99)
    for shape in SHAPES:
        assert (shape.distance(np.full_like(edge, 1.6), edge) > 0).all()
        assert (shape.distance(edge, np.full_like(edge, -1.6)) > 0).all()


def test_heat_alone_does_not_give_the_classes_away():
    """A threshold on grey level, even the best one for each scene, is far from a mask; but objects do stand out."""
    best = []
    for picture in scenes(30):
        mask, frame = picture.label > 0, picture.infrared.astype(int)
        guesses = [side for t in range(20, 236, 5) for side in (frame > t, frame < t)]
        best.append(max((guess & mask).sum() / (guess | mask).sum() for guess in guesses))
    assert 0.25 < np.mean(best) < 0.75


def test_polarity_varies_between_scenes():
    warmer = []
    for picture in scenes(60):
        mask, frame = picture.label > 0, picture.infrared.astype(float)
        warmer.append(frame[mask].mean() > frame[~mask].mean())
    assert 0.4 < np.mean(warmer) < 0.9


def test_objects_stand_out_in_both_pictures_at_their_outlines():
    for layer in ("infrared", "visible"):
        ratios = []
        for picture in scenes(30):
            frame = getattr(picture, layer).astype(float).reshape(*picture.label.shape, -1).mean(axis=2)
            steps = np.abs(np.diff(frame, axis=1))
            outline = np.diff((picture.label > 0).astype(int), axis=1) != 0
            ratios.append(steps[outline].mean() / steps[~outline].mean())
        assert np.median(ratios) > 1.5


def test_the_fixed_pattern_is_fixed_and_noise_0_is_clean():
    noisy, clean = Toy(train=1, test=0), Toy(train=1, test=0, noise=0.0)
    item = noisy.items()[0]
    assert np.array_equal(noisy._pattern(), noisy._pattern())
    rough = [np.abs(np.diff(d.read(item).infrared.astype(int), axis=0)).mean() for d in (noisy, clean)]
    assert rough[1] < 0.5 * rough[0]


def test_occluders_cut_the_label():
    class Poles:
        """Two vertical poles, three pixels wide, at column 4."""

        def integers(self, low, high=None):
            return {(0, 3): 2, (2,): 1, (2, 4): 3, (2, None): 1}.get((low, high), 4)

        def normal(self, *_):
            return 0.5

        def uniform(self, *_):
            return 0.5

    scene = Scene(np.random.default_rng(0), (32, 32))
    scene.label[:], scene.rng = 1, Poles()
    scene.occlude()
    assert (scene.label[:, 4:7] == 0).all() and scene.label[:, :4].all() and scene.label[:, 7:].all()


def test_clutter_belongs_to_no_class():
    scene = Scene(np.random.default_rng(1), (64, 64))
    before = scene.heat.copy()
    scene.put(None)
    assert not scene.label.any() and np.abs(scene.heat - before).max() > 0.3


def test_without_clutter_all_that_is_there_has_a_name():
    """Over even ground nothing but objects and their shadows is seen, in both pictures."""
    toy, cluttered = (Toy(size=(64, 64), objects=(1, 1), noise=0, ground=0, clutter=given) for given in (False, True))
    strange = []
    for dataset in (toy, cluttered):
        scenes = [dataset.read(item) for item in dataset.items()[:30]]
        near = [maximum_filter(scene.label, 9) > 0 for scene in scenes]
        steps = [np.abs(np.diff(scene.visible.astype(int), axis=1)).max(-1) for scene in scenes]
        strange.append(sum(int((step[~here[:, 1:]] > 8).sum() > 20) for step, here in zip(steps, near, strict=True)))
    assert strange[0] == 0 and strange[1] > 10


def test_objects_are_as_large_and_as_near_the_middle_as_asked():
    def seen(**options):
        scenes_seen = scenes(60, size=(96, 96), objects=(1, 1), clutter=False, **options)
        areas = [int((scene.label > 0).sum()) for scene in scenes_seen]
        away = [np.abs(np.argwhere(scene.label > 0).mean(0) - 47.5).max() for scene in scenes_seen]
        return np.median(areas), max(away)

    usual, large, middle = seen(), seen(scale=1.5), seen(spread=0.25)
    assert 1.8 < large[0] / usual[0] < 2.7, "area goes with the square, less what the frame cuts off"
    assert middle[1] < 0.125 * 96 + 8 < usual[1]


def test_shadows_fall_beside_objects_and_wrap_nowhere():
    scene = Scene(np.random.default_rng(0), (64, 64))
    cover = np.zeros((30, 30))
    cover[20:, 20:] = 1  # an object cut by the lower right corner of its window
    scene._paint((slice(0, 30), slice(0, 30)), cover, np.zeros((30, 30)), SHAPES[0])
    assert not scene.shadow[:20].any() and not scene.shadow[:, :20].any()
    cover = np.roll(cover, (-15, -15), (0, 1))
    scene._paint((slice(30, 60), slice(30, 60)), cover, np.zeros((30, 30)), SHAPES[0])
    assert scene.shadow[46, 46] == 1 and scene.shadow[36, 36] == 0


def test_drawing_is_fast():
    dataset = Toy()
    items = dataset.items()[:30]
    dataset.read(items[0])
    start = time.process_time()
    for item in items:
        dataset.read(item)
    assert (time.process_time() - start) / len(items) < 0.03  # about 8 ms; the margin is for a busy machine


@pytest.mark.parametrize(
    "options", [{"size": (16, 64)}, {"objects": (3, 2)}, {"objects": (0, 2)}, {"objects": (1, 13)}]
)
def test_impossible_scenes_are_refused(options):
    with pytest.raises(UsageError, match="Toy scenes"):
        Toy(**options)

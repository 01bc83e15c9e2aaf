"""The three SAMs, tiny and real: one forward for several pictures, ragged boxes, and the frame back and forth."""

import numpy as np
import pytest
import torch

from models.errors import UsageError
from models.sam import Frame, OriginalSAM, Prompts, TransformersSAM, open_segmenter, rgb
from tests.models import sams

BACKENDS = {
    "original": lambda: OriginalSAM(sams.original()),
    "transformers": lambda: TransformersSAM(sams.huggingface()),
    "second": lambda: TransformersSAM(sams.second()),
}


@pytest.fixture(scope="module", params=list(BACKENDS))
def segmenter(request):
    return BACKENDS[request.param]()


def picture(seed=0, size=(60, 90)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def prompts(count, points=1):
    boxes = np.array([[3 + n, 4 + n, 40 + 3 * n, 30 + 2 * n] for n in range(count)], float).reshape(-1, 4)
    at = np.array([[[20 + n, 15 + n]] for n in range(count)], float).reshape(-1, 1, 2)[:, :points]
    return Prompts(boxes, at, np.ones((count, points), np.int64))


def test_the_published_predictor_gives_the_same():
    """`SamPredictor`, one picture and one box at a time, is the reference."""
    from segment_anything import SamPredictor

    sam, asked = sams.original(), prompts(3)
    (found,) = OriginalSAM(sam, chunk=2).segment([picture()], [asked])
    predictor = SamPredictor(sam)
    predictor.set_image(picture())
    for n in range(3):
        one = (part[n] for part in (asked.points, asked.point_labels, asked.boxes))
        full, quality, low = predictor.predict(*one, return_logits=True)
        assert np.allclose(found.logits[n], low, atol=1e-4) and np.allclose(found.quality[n], quality, atol=1e-4)
        assert np.allclose(found.frame.up(found.logits[n]), full, atol=1e-4)


def test_pictures_share_a_forward_and_neighbours_change_nothing(segmenter):
    pictures, asked = [picture(0), picture(1, (80, 50))], [prompts(1), prompts(3)]
    together = segmenter.segment(pictures, asked)
    for i, found in enumerate(together):
        (alone,) = segmenter.segment([pictures[i]], [asked[i]])
        assert found.logits.shape[:2] == (len(asked[i].boxes), 3) and found.quality.shape == (len(asked[i].boxes), 3)
        assert torch.allclose(found.logits, alone.logits, atol=1e-4)
        assert torch.allclose(found.quality, alone.quality, atol=1e-4)
        assert found.frame.up(found.logits[:, 0]).shape[1:] == pictures[i].shape[:2]


def test_a_box_without_points_or_with_one_mask(segmenter):
    (found,) = segmenter.segment([picture()], [prompts(2, points=0)], masks=1)
    assert found.logits.shape[:2] == (2, 1) and found.logits.isfinite().all()


def test_no_boxes_give_no_masks(segmenter):
    (found,) = segmenter.segment([picture()], [prompts(0)])
    assert found.logits.shape[:2] == (0, 3) and found.quality.shape == (0, 3)
    both = segmenter.segment([picture(), picture(1)], [prompts(0), prompts(2)])
    assert [len(masks.logits) for masks in both] == [0, 2]


def test_the_prompt_matters(segmenter):
    (found,) = segmenter.segment([picture()], [prompts(3)])
    assert not torch.allclose(found.logits[0], found.logits[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size, content", [((60, 90), (85, 128)), ((90, 60), (128, 85)), ((50, 50), (128, 128))])
def test_a_mask_survives_the_way_to_the_square_and_back(size, content):
    frame = Frame(size, content, 128)
    mask = torch.zeros(1, *size)
    mask[:, 10:40, 15:35] = 1
    low = frame.down(mask, (64, 64))
    back = frame.up(low.float() * 2 - 1) > 0
    both, either = (back & (mask > 0)).sum(), (back | (mask > 0)).sum()
    assert both / either > 0.85
    assert not low[:, :, round(content[1] / 2) :].any() and not low[:, round(content[0] / 2) :].any()
    corner = frame.to_square(np.array([[float(size[1]), float(size[0])]]))
    assert corner[0].tolist() == pytest.approx([content[1], content[0]])


def test_grey_pictures_are_repeated_and_may_be_stretched():
    grey = np.linspace(100, 120, 64).astype(np.uint8).reshape(8, 8)
    assert rgb(grey).shape == (8, 8, 3) and (rgb(grey)[..., 0] == grey).all()
    wide = rgb(grey, stretch=True)
    assert wide.min() == 0 and wide.max() == 255 and wide.dtype == np.uint8


def test_weights_are_found_by_file_folder_or_id(tmp_path):
    sams.huggingface().save_pretrained(tmp_path / "hf")
    sams.second().save_pretrained(tmp_path / "hf2")
    for name in ("hf", "hf2"):
        opened = open_segmenter(str(tmp_path / name))
        (found,) = opened.segment([picture()], [prompts(1)])
        assert isinstance(opened, TransformersSAM) and found.logits.isfinite().all()
    torch.save(sams.original().state_dict(), tmp_path / "sam.pth")
    with pytest.raises(UsageError, match="no published SAM"):
        open_segmenter(str(tmp_path / "sam.pth"))
    with pytest.raises(UsageError, match=r"give a \.pth file"):
        open_segmenter(str(tmp_path / "nowhere"))


def test_the_published_sizes_are_told_by_their_width(tmp_path, monkeypatch):
    """A vit_b file, in the small: the registry's builder is replaced, the way to it is not."""
    import segment_anything

    small = sams.original()
    state = small.state_dict()
    key = "image_encoder.patch_embed.proj.weight"
    torch.save(state | {key: torch.zeros(768, 3, 16, 16)}, tmp_path / "sam_vit_b.pth")
    asked = []
    monkeypatch.setattr(small, "load_state_dict", lambda s: asked.append(s[key].shape[0]))
    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", lambda: small)
    assert isinstance(open_segmenter(str(tmp_path / "sam_vit_b.pth")), OriginalSAM) and asked == [768]

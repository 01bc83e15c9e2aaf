"""Bad input, and odd but good input, one by one."""

import numpy as np
import pytest
from PIL import Image

from models.datasets.reading import map_ids, read_ids, read_infrared, read_visible, scale_to_8_bit
from models.errors import BadSample
from tests.models.datasets.miniatures import HEIGHT, WIDTH, colour, grey, label, save


def test_grey_is_read_as_it_is(tmp_path):
    assert np.array_equal(read_infrared(save(tmp_path / "a.png", grey(0))), grey(0))


def test_16_bit_infrared_is_scaled_per_frame(tmp_path):
    counts = np.linspace(30000, 30500, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    read = read_infrared(save(tmp_path / "a.png", counts))
    assert read.dtype == np.uint8 and read.min() == 0 and read.max() == 255
    assert (np.diff(read.ravel().astype(int)) >= 0).all()


def test_16_bit_tiff_and_float_tiff_are_scaled(tmp_path):
    counts = (grey(0).astype(np.uint16) + 1000) * 16
    tiff = read_infrared(save(tmp_path / "a.tif", counts))
    float_tiff = read_infrared(save(tmp_path / "b.tif", counts.astype(np.float32)))
    assert np.array_equal(tiff, float_tiff) and np.ptp(tiff) == 255


def test_hot_pixels_do_not_squeeze_the_scale():
    counts = np.tile(np.arange(1000, 1100, dtype=np.uint16), (100, 1))
    counts[0, 0] = 65535
    scaled = scale_to_8_bit(counts)
    assert np.median(scaled) == pytest.approx(127, abs=3)


def test_a_constant_16_bit_frame_is_no_division_by_zero():
    assert not scale_to_8_bit(np.full((4, 4), 300, np.uint16)).any()


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(BadSample, match="not finite"):
        scale_to_8_bit(np.array([[0.0, np.nan]]))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_grey_stored_as_rgb_is_accepted(tmp_path, suffix):
    path = save(tmp_path / f"a.{suffix}", np.repeat(np.full((16, 16, 1), 90, np.uint8), 3, axis=2))
    assert read_infrared(path).shape == (16, 16)
    assert np.abs(read_infrared(path).astype(int) - 90).max() <= 2


def test_false_colour_infrared_is_refused(tmp_path):
    with pytest.raises(BadSample, match="colour picture"):
        read_infrared(save(tmp_path / "a.png", colour(0)))


def test_grey_visible_becomes_three_channels(tmp_path):
    assert read_visible(save(tmp_path / "a.png", grey(0))).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("read", [read_infrared, read_visible, read_ids])
def test_a_truncated_png_is_refused(tmp_path, read):
    path = save(tmp_path / "a.png", grey(0))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(BadSample, match=r"a\.png cannot be decoded"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"not a picture at all", b"\x89PNG\r\n\x1a\n" + bytes(20)])
def test_a_file_that_is_no_picture_is_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(BadSample, match="cannot be decoded"):
        read_infrared(tmp_path / "a.png")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(BadSample, match="no file"):
        read_infrared(tmp_path / "a.png")


def test_a_palette_label_reads_its_indices(tmp_path):
    image = Image.fromarray(label(1, 2))
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    image.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.mode == "P"
    assert np.array_equal(read_ids(tmp_path / "a.png"), label(1, 2))


def test_a_one_bit_label_reads_as_0_and_1(tmp_path):
    Image.fromarray(label(1) == 1).save(tmp_path / "a.png")
    assert np.array_equal(read_ids(tmp_path / "a.png"), label(1))


def test_a_16_bit_label_is_read_when_its_ids_fit(tmp_path):
    assert np.array_equal(read_ids(save(tmp_path / "a.png", label(1, 2).astype(np.uint16))), label(1, 2))
    with pytest.raises(BadSample, match=r"beyond 0\.\.255"):
        read_ids(save(tmp_path / "b.png", label(1, 2).astype(np.uint16) * 300))


def test_a_label_of_three_equal_channels_is_read_and_a_coloured_one_refused(tmp_path):
    stacked = np.repeat(label(1, 2)[..., None], 3, axis=2)
    assert np.array_equal(read_ids(save(tmp_path / "a.png", stacked)), label(1, 2))
    with pytest.raises(BadSample, match="class ids are expected"):
        read_ids(save(tmp_path / "b.png", colour(0)))


def test_ids_are_mapped_all_at_once():
    raw = np.array([[0, 7, 1, 255]], dtype=np.uint8)
    assert map_ids(raw, {0: 0, 7: 1, 1: 7}).tolist() == [[0, 1, 7, 255]]


def test_ids_out_of_range_are_named():
    with pytest.raises(BadSample, match=r"x\.png holds label ids \[9, 200\]"):
        map_ids(np.array([[0, 9, 200, 255]], dtype=np.uint8), {0: 0, 1: 1}, name="x.png")


def test_ignored_ids_become_255():
    assert map_ids(np.array([[0, 1, 2]], dtype=np.uint8), {0: 0, 1: 1, 2: 2}, ignored=[2]).tolist() == [[0, 1, 255]]


def test_all_background_is_fine_and_all_ignored_is_not():
    assert not map_ids(np.zeros((2, 2), np.uint8), {0: 0}).any()
    with pytest.raises(BadSample, match="unlabelled"):
        map_ids(np.full((2, 2), 255, np.uint8), {0: 0})

"""What the report shows: pictures of each class with the label after each step."""

from __future__ import annotations

import io
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from models.frames import png_bytes
from tasks import places
from tasks.illustrate_generalised import illustrate_foundation, illustrate_lesson, labels_shown, step_chart
from tasks.tabulate_generalised import step_scores
from tests.models.drawn import SIZE, drawn_frames
from tests.tasks.test_tabulate_generalised import STEPS, scores


@pytest.fixture
def refs(thermofuse_home, tmp_path):
    """Refs of frames, pictures, labels and a foundation; five pictures of one class and one of another."""
    (tmp_path / "frames").mkdir()
    frames = drawn_frames(tmp_path / "frames", train=2, test=1)
    store, listed = places.store(), []
    imagined, labelled = store.draft("imagined", "a" * 16), store.draft("labelled", "a" * 16)
    for n, k in enumerate([1, 1, 2, 1, 1, 1]):
        row = {"id": f"p{n}", "class_id": k, "picture": f"p{n}.png", "labels": {}, "statuses": {}}
        imagined.write(row["picture"], png_bytes(np.full((*SIZE, 3), 30 * n, np.uint8)))
        for step in ("predict", "apf"):
            row["labels"][step], row["statuses"][step] = f"{step}{n}.png", "no_target"
            labelled.write(row["labels"][step], png_bytes(np.full(SIZE, k, np.uint8)))
        listed.append(row)
    foundation = store.draft("foundation", "a" * 16)
    foundation.write("contact.png", b"sheet")
    rows = pd.DataFrame({"id": ["batch"], "pictures": [json.dumps(listed)]})
    return (store.draft("frames", "a" * 16).commit(frames.rows, dict(frames.info)), imagined.commit(None, {}),
            labelled.commit(rows, {}), foundation.commit(None, {}))


def test_a_sheet_shows_some_of_each_class_and_every_step(refs):
    figure = labels_shown(*refs[:3], per_class=2)
    words = [text.get_text() for axis in figure.axes for text in (axis.title, *axis.texts) if text.get_text()]
    assert [word for word in words if word in ("Picture", "Predicted", "Filtered (APF)")] == words[:1] + words[2:4]
    names = [word for word in words if "no target" in word]
    assert len(names) == 3 and len(set(names)) == 2, "two of the first class, the one of the second"
    assert [len(axis.images) for axis in figure.axes] == [1] * 9


def test_a_night_is_shown_with_scores_pictures_and_labels(refs):
    frames, imagined, labelled, foundation = refs
    shown = illustrate_lesson({"a": 1}, frames, {"grammar": (imagined, labelled)}, foundation,
                              step_scores(scores(), STEPS))
    assert shown["settings"] == {"a": "1"} and list(shown["pictures"]) == ["steps", "drawn", "labels"]
    assert shown["pictures"]["drawn"] == b"sheet"
    assert Image.open(io.BytesIO(shown["pictures"]["labels"])).format == "PNG"
    bare = illustrate_lesson({}, frames, {}, None, step_scores(scores((0,)), STEPS))
    assert list(bare["pictures"]) == ["steps"], "one seed has no interval to draw, and there may be no picture"


def test_a_foundation_is_shown_by_what_it_draws(refs):
    assert illustrate_foundation({}, refs[3])["pictures"] == {"drawn": b"sheet"}


def test_the_chart_has_a_dot_per_step():
    figure = step_chart(step_scores(scores((0,)), STEPS)["rows"])
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["supports", "hdig", "sabr", "real"]

"""Versions: registered once a night, loadable anywhere, pending while MLflow is down."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import models
from models.errors import StageFailed, UsageError
from models.metrics import score
from tasks import places, tracking
from tasks.register import (
    Package,
    Version,
    exam_table,
    example_input,
    find_version,
    known_version,
    load,
    names,
    points,
    register,
    requirements,
    save_exam,
)  # fmt: skip
from tasks.store import Ref

NAME = "thermofuse-toy-1shot"
STAND_IN = """
    import models.metrics
    import numpy as np

    class Predictor:
        '''Answers with the first support's mask where the query is warmer than the folder says.'''

        def __init__(self, threshold):
            self.threshold = threshold

        @classmethod
        def load(cls, folder):
            return cls(int((folder / "threshold.txt").read_text()))

        def predict(self, query, supports, masks, fold=None):
            probability = masks[0] * np.float32(0.25 if fold is None else fold)
            return (query > self.threshold) & (masks[0] == 1), probability
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    """A package outside the checkout that holds a predictor."""
    folder = tmp_path_factory.mktemp("code") / "stand_in_predictor"
    folder.mkdir()
    (folder / "__init__.py").write_text(textwrap.dedent(STAND_IN))
    return folder


@pytest.fixture
def package(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    monkeypatch.syspath_prepend(stand_in.parent)
    return Package("stand_in_predictor:Predictor", (*Package().code, stand_in))


@pytest.fixture
def model(thermofuse_home: Path) -> Ref:
    return make_model("aaaa")


def make_model(digest: str, threshold: int = 100) -> Ref:
    draft = places.store().draft("fusion", digest)
    draft.write("threshold.txt", str(threshold).encode())
    return draft.commit(None, {})


def episodes(gain: int = 0) -> pd.DataFrame:
    rows = [
        {"episode": i, "fold": 0, "label": 1, "query": f"q{i}", "stream": stream, "inter_fg": 40 + extra + i,
         "union_fg": 100, "inter_bg": 90, "union_bg": 100}
        for i in range(6) for stream, extra in (("fusion", gain), ("prototype", -30))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> dict:
    return score(table, {0: [1]}, names={1: "person"}, resamples=50).as_dict()


def registered(model: Ref, package: Package, run_key: str = "k1", **changes) -> Version:
    table = changes.pop("table", episodes())
    with tracking.night_run("smoke", run_key, {"a": 1}, {"data_digest": "d"}) as run:
        return register(
            model, summary(table), table, run=run, dataset="toy", shots=1, exam="exam1", package=package, **changes
        )


def test_a_version_carries_lineage_scores_and_exam(mlflow_uri, model, package):
    version = registered(model, package)
    assert (version.name, version.number, version.exam, version.reused) == (NAME, 1, "exam1", False)
    assert version.model == model
    client = tracking.client()
    stored = client.get_model_version(NAME, "1")
    kept = ("recipe", "run_key", "data_digest", "exam", "model_digest", "git_sha", "lock_digest")
    assert {name: stored.tags[name] for name in kept[:5]} == {
        "recipe": "smoke", "run_key": "k1", "data_digest": "d", "exam": "exam1", "model_digest": "aaaa",
    }  # fmt: skip
    assert all(stored.tags[name] for name in kept)
    logged = client.get_logged_model(version.model_id)
    assert logged.status.name == "READY"
    assert {m.key: m.value for m in logged.metrics}["fusion/fold0/person"] == pytest.approx(42.5)
    assert client.get_run(version.run_id).data.metrics["prototype/miou"] == pytest.approx(12.5)
    pd.testing.assert_frame_equal(exam_table(version, "exam1"), episodes())
    assert exam_table(version, "another") is None
    assert names() == [NAME]


def test_the_same_night_and_model_is_registered_once(mlflow_uri, model, package):
    first = registered(model, package)
    again = registered(model, package)
    assert (again.number, again.reused) == (1, True)
    assert again.model_id == first.model_id
    assert registered(make_model("bbbb"), package).number == 2, "another model of the same night is another version"
    assert registered(model, package, run_key="k2").number == 3


def test_the_version_runs_in_a_fresh_process_with_nothing_but_its_own_code(mlflow_uri, model, package, tmp_path):
    version = registered(model, package)
    checkout = str(Path(models.__file__).parents[1])
    script = f"""
        import json, sys
        sys.path = [entry for entry in sys.path if entry != {checkout!r}]
        import mlflow, numpy as np
        mlflow.set_tracking_uri({mlflow_uri!r})
        loaded = mlflow.pyfunc.load_model("models:/{NAME}/1")
        query = np.full((5, 7), 200, np.uint8)
        mask = np.zeros((2, 5, 7), np.uint8)
        mask[0, 1:3, 2:4] = 1
        inputs = {{"query": query, "support": np.stack([query, query]), "support_mask": mask}}
        answer, second = loaded.predict(inputs), loaded.predict(inputs, params={{"fold": 1}})
        import models, stand_in_predictor
        print(json.dumps([models.__file__, stand_in_predictor.__file__, str(answer["mask"].dtype),
                          answer["mask"].tolist(),
                          float(answer["probability"].max()), float(second["probability"].max()),
                          sorted({{"tasks", "flows"}} & set(sys.modules))]))
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [sys.executable, "-I", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(not path.startswith(checkout) and version.model_id in path for path in found[:2])
    expected = np.zeros((5, 7), int)
    expected[1:3, 2:4] = 1
    assert found[2:] == ["uint8", expected.tolist(), 0.25, 1.0, []]


def test_load_and_find_by_number_and_alias(mlflow_uri, model, package):
    assert find_version(NAME) is None
    version = registered(model, package)
    tracking.client().set_registered_model_alias(NAME, "champion", "1")
    assert find_version(NAME) == find_version(NAME, number=1) == version
    assert find_version(NAME, number=9) is None
    example = example_input(1)
    assert load(version).predict(example)["mask"].sum() == example["support_mask"].sum()


@pytest.mark.parametrize("broken", [
    {"support_mask": np.zeros((4, 4), np.uint8)},
    {"query": np.zeros((4, 4), np.float64)},
])  # fmt: skip
def test_the_signature_refuses_other_ranks_and_types(mlflow_uri, model, package, broken):
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match=r"[Ee]xpected|incompatible|[Cc]annot"):
        load(registered(model, package)).predict({**example_input(1), **broken})


def test_a_model_that_answers_nonsense_is_never_registered(mlflow_uri, model, tmp_path, monkeypatch):
    code = tmp_path / "nonsense_predictor"
    code.mkdir()
    nonsense = textwrap.dedent(STAND_IN).replace("(query > self.threshold) & (masks[0] == 1)", "0")
    (code / "__init__.py").write_text(nonsense)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(StageFailed, match="fix its predictor"):
        registered(model, Package("nonsense_predictor:Predictor", (*Package().code, code)))
    assert names() == []


def test_while_mlflow_is_down_the_version_is_pending_and_the_next_run_registers_it(
    thermofuse_home, model, package, monkeypatch, request
):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{probe.getsockname()[1]}")
    version = registered(model, package)
    assert (version.number, version.model, str(version)) == (None, model, f"{NAME} (registration pending)")
    assert '"fusion/miou"' in (thermofuse_home / "spool" / "k1.jsonl").read_text()
    with pytest.raises(StageFailed, match="cannot be reached"):
        find_version(NAME)
    request.getfixturevalue("mlflow_uri")
    assert registered(model, package).number == 1


def test_mlflow_back_in_time_for_registration_is_used(mlflow_uri, model, package, monkeypatch):
    table = episodes()
    with tracking.night_run("smoke", "k1", {}) as run:
        run.went_down(ConnectionError("for a moment"))
        run.metrics({"loss": 1.0})
        assert not run.online
        version = register(model, summary(table), table, run=run, dataset="toy", shots=1, exam="exam1", package=package)
        assert run.online
    assert version.number == 1
    assert tracking.client().get_run(version.run_id).data.metrics["loss"] == 1.0


def test_an_exam_sat_later_lies_beside_the_first(mlflow_uri, model, package):
    version = registered(model, package)
    save_exam(version, "exam2", episodes(gain=1))
    pd.testing.assert_frame_equal(exam_table(version, "exam2"), episodes(gain=1))
    pd.testing.assert_frame_equal(exam_table(version, "exam1"), episodes())


def test_points_name_every_score_and_leave_gaps_out():
    scores = summary(episodes())
    found = points(scores)
    assert found["fusion/miou"] == found["fusion/fold0/miou"] == pytest.approx(42.5)
    assert found["fusion/miou_low"] < 42.5 < found["fusion/miou_high"]
    assert found["fusion/fb_iou"] == pytest.approx((42.5 + 90) / 2)
    scores["streams"]["fusion"]["miou"]["low"] = None
    scores["streams"]["fusion"]["folds"]["0"]["classes"] = {"a/b (c)": {"value": 0.5, "low": None, "high": None}}
    assert "fusion/miou_low" not in points(scores)
    assert points(scores)["fusion/fold0/a_b _c_"] == 50


def test_requirements_pin_what_the_code_imports(tmp_path):
    (tmp_path / "a.py").write_text("import os\ndef f():\n    from numpy.linalg import norm\n    import torch.nn")
    pinned = requirements([tmp_path])
    assert [line.split("==")[0] for line in pinned] == ["mlflow", "numpy", "torch"]
    assert all("+" not in line for line in pinned), "a local build is on no index"


def test_an_unknown_model_or_version_lists_what_there_is(mlflow_uri, model, package):
    with pytest.raises(UsageError, match="no model 'thermofuse-toy-1shot'; registered are none yet"):
        known_version(NAME, 1)
    version = registered(model, package)
    assert known_version(NAME, 1) == version
    with pytest.raises(UsageError, match="has no version 2; there are 1"):
        known_version(NAME, 2)

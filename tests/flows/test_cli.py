"""The command line: what reaches stdout and stderr, and with which exit code it ends."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from flows import cli, display
from flows.cli import app, main
from models.errors import BadSample, LeaseHeld, StageFailed, UsageError
from tasks import progress
from tasks.promote import Verdict
from tasks.register import Version
from tasks.report import Outcome, save_outcome
from tasks.stage import StageReport


@dataclass(frozen=True)
class Recipe:
    name: str = "smoke"
    steps: int = 10
    options: dict = field(default_factory=dict)


def leaf(value: float | None) -> dict:
    return {"value": value, "low": value and value - 0.02, "high": value and value + 0.02, "episodes": 7}


def outcome(recipe: Recipe | None = None, promoted: bool = True) -> Outcome:
    folds = {"0": {"miou": leaf(0.4), "fb_iou": leaf(0.6), "classes": {"person": leaf(0.4), "[red]": leaf(None)}}}
    tree = {"miou": leaf(0.4), "fb_iou": leaf(0.6), "folds": folds}
    scores = {"streams": {"fusion": tree, "prototype": tree}, "differences": [], "queries": 3, "resamples": 9}
    recipe = recipe or Recipe()
    return Outcome(
        f"key{recipe.steps}", recipe.name, Verdict(promoted, "promoted v1, the first", "m", 1, 1, gain=float("nan")),
        Version("m", 1), scores, (StageReport("prepare", 1.5, False, 9, 1, 2, 1, 99.0),), {"report": "/r/report.html"},
    )  # fmt: skip


@pytest.fixture
def night(thermofuse_home: Path, monkeypatch: pytest.MonkeyPatch):
    """Replaces the nightly flow; the returned list holds what it was called with. Append an error to make it fail."""
    calls: list = []

    def nightly(recipe: Recipe) -> Outcome:
        errors = [call for call in calls if isinstance(call, BaseException)]
        if errors:
            raise errors[0]
        calls.append(recipe)
        print("engine chatter")
        os.write(1, b"chatter of a worker\n")
        progress.step("prepare", 9, 9, "one bad")
        return outcome(recipe)

    flow, recipes = ModuleType("flows.nightly"), ModuleType("flows.recipes")
    flow.nightly, recipes.named = nightly, lambda name: Recipe(name)
    monkeypatch.setitem(sys.modules, "flows.nightly", flow)
    monkeypatch.setitem(sys.modules, "flows.recipes", recipes)
    monkeypatch.delenv("THERMOFUSE_DEBUG", raising=False)
    return calls


def test_run_prints_the_verdict_and_the_scores(night, capfd):
    assert main(["run", "smoke", "--set", "steps=3", "--set", "options.a=1"]) == 0
    assert night == [Recipe("smoke", 3, {"a": 1})]
    out, error = capfd.readouterr()
    for words in ("promoted v1, the first", "Fold 0", "person", "40.0", "38.0–42.0", "[red]", "–", "prepare", "1.5 s",
                  "2 (1 reused)", "/r/report.html"):  # fmt: skip
        assert words in out, words
    assert "chatter" not in out
    assert "engine chatter" in error
    assert "chatter of a worker" in error
    assert "prepare: 9/9 (one bad)" in error


def test_run_json_is_one_object_and_nothing_else(night, capfd):
    assert main(["run", "smoke", "--json"]) == 0
    out, _ = capfd.readouterr()
    found = json.loads(out, parse_constant=pytest.fail)
    assert found == outcome().as_dict()
    assert {"run_key", "recipe", "verdict", "version", "scores", "stages", "report", "pictures"} == set(found)
    assert found["scores"]["streams"]["fusion"]["folds"]["0"]["miou"]["low"] == pytest.approx(0.38)
    assert set(found["stages"][0]) == {
        "name", "seconds", "reused", "count", "quarantined", "shards", "shards_reused", "peak_rss_mb",
    }  # fmt: skip


def test_run_makes_the_home(night, thermofuse_home):
    assert main(["run", "smoke"]) == 0
    assert thermofuse_home.is_dir()


def test_a_home_that_cannot_be_made_is_a_usage_error(night, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("THERMOFUSE_HOME", str(tmp_path / "file" / "home"))
    assert main(["run", "smoke"]) == 2
    assert "set THERMOFUSE_HOME" in capfd.readouterr().err


@pytest.mark.parametrize(("error", "code", "words"), [
    (UsageError("Choose another."), 2, "Choose another."),
    (StageFailed("Too many\nare bad."), 1, "Too many are bad."),
    (BadSample("torn"), 1, "torn"),
    (LeaseHeld("Held by pid 7."), 3, "Held by pid 7."),
    (KeyboardInterrupt(), 130, "Interrupted; the same command goes on where it stopped."),
    (ValueError("odd"), 1, "Unexpected ValueError: odd (THERMOFUSE_DEBUG=1 shows where)."),
])  # fmt: skip
def test_every_failure_is_one_sentence_and_a_code(night, capfd, error, code, words):
    night.append(error)
    assert main(["run", "smoke", "--json"]) == code
    assert capfd.readouterr() == ("", words + "\n")


def test_debug_shows_where(night, capfd, monkeypatch):
    monkeypatch.setenv("THERMOFUSE_DEBUG", "1")
    night.append(ValueError("odd"))
    assert main(["run", "smoke"]) == 1
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize("arguments", [
    ["fly"], ["run"], ["run", "smoke", "--sets", "a=1"], ["run", "smoke", "--set", "stesp=1"], ["predict", "a.png"],
    ["promote", "m", "seven"], ["show", "nothing"], ["run", "smoke", "extra"],
])  # fmt: skip
def test_asking_wrongly_is_code_2_and_says_so_on_stderr(night, capfd, arguments):
    assert main(arguments) == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert len(error.splitlines()) == 1
    assert not night


def test_show_draws_the_newest_run_or_prints_json(thermofuse_home, capfd):
    save_outcome(outcome())
    assert main(["show"]) == 0
    assert "promoted v1, the first" in capfd.readouterr().out
    assert main(["show", "key", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == outcome().as_dict()


def test_a_narrow_terminal_leaves_the_intervals_out_before_it_cuts_them():
    def drawn(width: int) -> str:
        console = Console(file=io.StringIO(), width=width)
        display.outcome(console, outcome().as_dict())
        return console.file.getvalue()

    assert "38.0–42.0" in drawn(80)
    assert "38" not in drawn(40)
    assert "…" not in drawn(40).partition("[red]")[0], "the scores are whole"


def test_promote_and_rollback_ask_the_registry(monkeypatch, capfd):
    from tasks import promote, register

    asked = []
    monkeypatch.setattr(register, "known_version", lambda name, number: Version(name, number))
    monkeypatch.setattr(promote, "appoint", lambda version: asked.append(version) or "promoted v7 by hand")
    monkeypatch.setattr(promote, "rollback", lambda name: asked.append(name) or "rolled back")
    assert main(["promote", "m", "7"]) == main(["rollback", "m"]) == 0
    assert asked == [Version("m", 7), "m"]
    assert capfd.readouterr().out == "promoted v7 by hand\nrolled back\n"


def test_predict_passes_what_it_was_told(monkeypatch, capfd, tmp_path):
    from tasks import predict

    told = []
    monkeypatch.setattr(predict, "predict", lambda *args, **kwargs: told.append((args, kwargs)) or 0.25)
    out = str(tmp_path / "m.png")
    pairs = ["--support", "a.png:b.png", "--support", "c.png:d.png"]
    assert main(["predict", "q.png", *pairs, "--out", out, "--fold", "1"]) == 0
    ((arguments, options),) = told
    assert arguments == (Path("q.png"), ("a.png:b.png", "c.png:d.png"), Path(out))
    assert options == {"model": None, "version": None, "fold": 1}
    assert capfd.readouterr().out == f"{out}: 25.0 % of the image\n"


def test_bars_follow_the_steps(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    before = progress.use(progress.Lines())
    with display.progress():
        progress.step("synthesise", 1, 4, "fine")
        progress.step("synthesise", 4, 4, "done")
        progress.step("refine", 1, 2)
    after = progress.use(before)
    assert isinstance(after, progress.Lines), "the old sink is back"
    drawn = terminal.getvalue()
    assert "synthesise" in drawn
    assert "4/4" in drawn
    assert "refine" in drawn


def test_prefects_own_log_stays_off_the_terminal(monkeypatch):
    import logging

    shown = []

    class Handler(logging.Handler):
        def emit(self, record):
            shown.append(record.name)

    monkeypatch.setattr(logging.getLogger(), "handlers", [Handler()])
    for name in ("prefect.flow_runs", "prefect", "tasks.tracking"):  # as in a fresh process, whoever set them up before
        for attribute, value in (("disabled", False), ("level", logging.NOTSET), ("handlers", []), ("propagate", True)):
            monkeypatch.setattr(logging.getLogger(name), attribute, value)
    display.quiet_prefect()
    for name in ("prefect.flow_runs", "tasks.tracking"):
        logging.getLogger(name).error("x")
    assert shown == ["tasks.tracking"]


CHATTY = """
    import atexit, subprocess, sys, types, time
    sys.path.insert(0, {tests!r})
    flow, recipes = types.ModuleType("flows.nightly"), types.ModuleType("flows.recipes")
    sys.modules.update({{"flows.nightly": flow, "flows.recipes": recipes}})
    recipes.named = lambda name: None
    def nightly(recipe):
        atexit.register(print, "late chatter")
        subprocess.run(["echo", "chatter of a child"])
        if {wait}:
            print("waiting", file=sys.stderr, flush=True)
            time.sleep(60)
        return types.SimpleNamespace(as_dict=lambda: {{"run_key": "k"}})
    flow.nightly = nightly
    from flows.cli import main
    sys.exit(main())
"""


def process(home: Path, wait: bool) -> subprocess.Popen:
    script = textwrap.dedent(CHATTY).format(tests=str(Path(cli.__file__).parents[1]), wait=wait)
    return subprocess.Popen(
        [sys.executable, "-c", script, "run", "smoke", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "THERMOFUSE_HOME": str(home)},
    )  # fmt: skip


def test_as_a_process_not_even_exit_handlers_and_children_reach_stdout(thermofuse_home):
    out, error = process(thermofuse_home, wait=False).communicate(timeout=60)
    assert json.loads(out) == {"run_key": "k"}
    assert "chatter of a child" in error
    assert "late chatter" in error


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_one_line_and_130(thermofuse_home, stop):
    running = process(thermofuse_home, wait=True)
    assert "waiting\n" in iter(running.stderr.readline, "")
    running.send_signal(stop)
    out, error = running.communicate(timeout=60)
    assert running.returncode == 130
    assert out == ""
    assert [line for line in error.splitlines() if "chatter" not in line] == [
        "Interrupted; the same command goes on where it stopped."
    ]


def test_list_imports_no_engine(thermofuse_home):
    script = "import sys; from flows.cli import main; main(['list']); print(sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "  toy " in done.stdout
    assert "  smoke " in done.stdout
    assert "  toy-gfss " in done.stdout
    assert "  ablation " in done.stdout
    heavy = {"torch", "ray", "prefect", "mlflow", "pandas", "numpy"}
    assert not heavy & set(done.stderr.replace("'", "").strip("[]\n").split(", "))


def test_help_and_version_go_to_stdout(capfd):
    assert main(["--help"]) == 0
    assert "rollback" in capfd.readouterr().out
    assert main(["--version"]) == 0
    assert capfd.readouterr().out.strip().count(".") == 2
    assert {"run", "study", "show", "list", "predict", "fuse", "promote", "rollback"} <= set(app)


def test_fuse_writes_pictures_and_says_how_good_they_are(tmp_path, capfd):
    import numpy as np
    from PIL import Image

    for layer, shape in (("infrared", (44, 50)), ("visible", (44, 50, 3))):
        (tmp_path / layer).mkdir()
        for name in ("a", "b"):
            pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels[: 40 if (layer, name) == ("visible", "b") else None]).save(
                tmp_path / layer / f"{name}.png"
            )
    assert main(["fuse", str(tmp_path), "--fuser", "average", "--out", str(tmp_path / "out")]) == 0
    out, _ = capfd.readouterr()
    assert "1 of 2 pairs fused" in out and "Qabf 0." in out and "b: the layers differ in size" in out
    assert (tmp_path / "out" / "a.png").is_file()
    assert main(["fuse", str(tmp_path), "--fuser", "segmif", "--out", str(tmp_path / "out")]) == 2
    assert "has to be fitted first" in capfd.readouterr().err


def test_a_study_gets_its_recipe_and_seeds(night, capfd, monkeypatch):
    told = []
    gains = dict.fromkeys(("over_a", "over_a_low", "over_a_high"))
    row = {"row": "a", "about": "", "miou": 40.0, "low": 38.0, "high": 42.0, **gains}
    found = {"study": "mix", "key": "k", "references": ["a"], "rows": [row], "report": {"table.md": "/r/table.md"}}

    def study(*asked):
        told.append(asked)
        return type("Outcome", (), {"as_dict": lambda self: found})()

    module = ModuleType("flows.studies")
    module.study = study
    monkeypatch.setitem(sys.modules, "flows.studies", module)
    assert main(["study", "mix", "smoke", "--seeds", "2", "--set", "steps=3", "--json"]) == 0
    assert told == [("mix", Recipe("smoke", 3), (510, 365))]
    assert json.loads(capfd.readouterr().out) == found
    assert main(["study", "mix", "smoke"]) == 0
    assert "38.0–42.0" in capfd.readouterr().out
    for wrong in (["study", "mixx", "smoke"], ["study", "mix", "nosuch"], ["study", "mix", "smoke", "--seeds", "6"]):
        assert main(wrong) == 2
        assert "choose one of" in (error := capfd.readouterr().err) or "from 1 to 5" in error
    assert len(told) == 2

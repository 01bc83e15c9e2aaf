"""Report: one page, one JSON and one Markdown table say what the night found, with nothing to fetch from anywhere.

`home/runs/<run key>/` holds `report.html`, `scores.json`, `scores.md`, the pictures and `outcome.json`; MLflow gets
copies under `report/`. Scores are `models.metrics.Scores.as_dict()` throughout: fractions, shown as points (0..100).
"""

from __future__ import annotations

import base64
import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import UsageError
from tasks import places
from tasks.blobs import write_file
from tasks.stage import StageReport, stage

if TYPE_CHECKING:
    import pandas as pd

    from tasks.promote import Verdict
    from tasks.register import Version
    from tasks.tracking import Run

TEMPLATES = Path(__file__).parent
ORDER = ("fusion", "infrared", "rgb", "prototype")  # any other stream follows
CAPTIONS = {
    "grid": "Episodes of the exam, the same every night. The number is the IoU of that picture, in points.",
    "synthetic": "What the translators made of infrared frames.",
}


@dataclass(frozen=True)
class Outcome:
    """All that one night says for itself.

    report: what -> path on this machine. pictures: how good each layer is (`tasks.judge_pictures.layer_scores`).
    """

    run_key: str
    recipe: str
    verdict: Verdict
    version: Version
    scores: Mapping[str, Any]
    stages: tuple[StageReport, ...]
    report: Mapping[str, str] = field(default_factory=dict)
    pictures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        return str(self.verdict)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: nested plain values, NaN as None."""
        return plain(asdict(self))


@stage("report")
def report(
    outcome: Outcome, *, settings: Mapping[str, str], pictures: Mapping[str, bytes] | None = None,
    refined: Iterable[Mapping[str, Any]] = (), run: Run | None = None,
) -> Outcome:  # fmt: skip
    """Write the night's folder, copy it to MLflow, and return the outcome with the paths in it.

    Args:
        settings: the recipe as dotted names (`tasks.tracking.flat`).
        pictures: PNG bytes by name; the page shows `grid` and `synthetic`, any other is a file beside it.
        refined: kept and freed pixels per layer and class (`refine_rows`).
        run: the night's MLflow run.
    """
    folder = run_folder(outcome.run_key)
    pictures = dict(pictures or {})
    labels = run.labels if run else {}
    files = {
        "report.html": page(outcome, settings, pictures, list(refined), labels).encode(),
        "scores.json": json.dumps(plain(outcome.scores), indent=1, allow_nan=False).encode(),
        "scores.md": markdown(outcome.scores).encode(),
        **{f"{name}.png": data for name, data in pictures.items()},
    }
    for name, data in files.items():
        write_file(folder / name, data)
        if run:
            run.file(f"report/{name}", data)
    outcome = replace(outcome, report={Path(name).stem if name.endswith((".html", ".png")) else name: str(folder / name)
                                       for name in files})  # fmt: skip
    save_outcome(outcome)
    _tell_prefect(outcome)
    return outcome


def save_outcome(outcome: Outcome) -> Path:
    """Write `outcome.json` of the run, whole or not at all."""
    path = run_folder(outcome.run_key) / "outcome.json"
    write_file(path, json.dumps(outcome.as_dict(), indent=1, allow_nan=False).encode())
    return path


def load_outcome(run: str | None = None) -> dict[str, Any]:
    """`Outcome.as_dict()` of the newest run, or of the newest whose key starts with `run` or whose recipe it names.

    Raises UsageError when there is none.
    """
    for path in sorted(_outcomes(), key=lambda path: path.stat().st_mtime, reverse=True):
        found = json.loads(path.read_text(encoding="utf-8"))
        if run is None or found["run_key"].startswith(run) or found["recipe"] == run:
            return found
    known = sorted(path.parent.name for path in _outcomes())
    if not known:
        raise UsageError(f"No run has finished in {places.home()}; start one with thermofuse run smoke.")
    raise UsageError(f"There is no run {run!r}; the runs here are {', '.join(known)}.")


def run_folder(run_key: str) -> Path:
    return places.home() / "runs" / run_key


def page(
    outcome: Outcome, settings: Mapping[str, str], pictures: Mapping[str, bytes], refined: list[Mapping[str, Any]],
    labels: Mapping[str, str],
) -> str:  # fmt: skip
    """The HTML page, complete in itself."""
    from models.plots import STREAM_COLOURS, STREAM_TITLES

    return render(
        "report.html", outcome, settings=settings, labels=labels, verdict=outcome.verdict,
        scores=score_table(outcome.scores),
        differences=[row for row in outcome.scores["differences"] if row["miou"]["value"] is not None],
        titles=STREAM_TITLES, colours=STREAM_COLOURS, pictures=embedded(pictures, CAPTIONS), captions=CAPTIONS,
        layers=layer_table(outcome.pictures), refined=refined, points=_points,
    )  # fmt: skip


def render(template: str, outcome: Any, **shown: Any) -> str:
    """A page of this folder, with what all of them show of an outcome: recipe, run key, stages."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    seconds = sum(done.seconds for done in outcome.stages)
    return environment.get_template(template).render(
        outcome=outcome, seconds=seconds, slowest=_slowest(outcome.stages), made=datetime.now().astimezone(),
        duration=duration, **shown,
    )  # fmt: skip


def embedded(pictures: Mapping[str, bytes], names: Iterable[str]) -> dict[str, str]:
    """The named ones among pictures (PNG bytes), in base64."""
    return {name: base64.b64encode(pictures[name]).decode() for name in names if name in pictures}


def score_table(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores as rows: all folds' mean, then each fold's mean and its classes.

    {"streams": names in order, "top": the axis' end in points, "rows": [{"kind": "mean" | "fold" | "class", "name",
    "episodes", "cells": {stream: {"value", "low", "high"} in points or None}, "best": stream | None}]}
    """
    trees = scores["streams"]
    streams = [name for name in ORDER if name in trees] + [name for name in trees if name not in ORDER]
    folds = sorted({fold for tree in trees.values() for fold in tree["folds"]}, key=int)
    rows = [_row("mean", "All folds", {name: trees[name]["miou"] for name in streams})] if len(folds) > 1 else []
    for fold in folds:
        branches = {name: trees[name]["folds"][fold] for name in streams}
        rows.append(_row("fold", f"Fold {fold}", {name: branch["miou"] for name, branch in branches.items()}))
        for label in branches[streams[0]]["classes"]:
            leaves = {name: branch["classes"][label] for name, branch in branches.items()}
            rows.append(_row("class", label, leaves))
    ends = [cell["high"] or cell["value"] or 0 for row in rows for cell in row["cells"].values()]
    return {"streams": streams, "rows": rows, "top": max(10, 10 * math.ceil(max(ends, default=0) / 10))}


def markdown(scores: Mapping[str, Any]) -> str:
    """The scores as a Markdown table, mIoU in points with 95 % intervals, and FB-IoU below."""
    from models.plots import STREAM_TITLES

    table = score_table(scores)
    titles = [STREAM_TITLES.get(name, name) for name in table["streams"]]
    lines = ["| mIoU, points | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(titles)]
    for row in table["rows"]:
        name = row["name"] if row["kind"] == "class" else f"**{row['name']}**"
        lines.append(f"| {name} | " + " | ".join(_cell(row["cells"][stream]) for stream in table["streams"]) + " |")
    background = [_cell({key: _points(scores["streams"][name]["fb_iou"][key]) for key in ("value", "low", "high")})
                  for name in table["streams"]]  # fmt: skip
    lines.append("| FB-IoU | " + " | ".join(background) + " |")
    note = f"95 % intervals from {scores['resamples']:,} resamples of {scores['queries']} queries."
    return "\n".join([*lines, "", note, ""])


def layer_table(pictures: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """A row per layer: title, count, real; kid, spread, fid as text; edges, agreement, same in points or None."""
    from models.plots import LAYER_TITLES

    return [
        {
            "title": LAYER_TITLES.get(layer, layer), "count": int(found["count"]), "real": int(found["real"]),
            "kid": _digits(found["kid"]), "fid": _digits(found["fid"]),
            "spread": "" if math.isnan(found["kid"]) else f"{found['kid_low']:.3g} to {found['kid_high']:.3g}",
            **{name: _points(found[name]) for name in ("edges", "agreement", "same")},
        }
        for layer, found in pictures.items()
    ]


def refine_rows(rows: pd.DataFrame, classes: Iterable[str]) -> list[dict[str, Any]]:
    """Kept and freed pixels of each layer and class, summed over the rows of `tasks.refine`; empty classes left out."""
    names = {str(index): name for index, name in enumerate(classes, start=1)}
    sums: dict[tuple[str, str], list[int]] = {}
    for text in rows["counts"]:
        for layer, counts in json.loads(text).items():
            for label, pixels in counts.items():
                total = sums.setdefault((layer, label), [0, 0])
                total[0] += pixels["kept"]
                total[1] += pixels["freed"]
    return [
        {"layer": layer, "name": names.get(label, label), "kept": kept, "freed": freed}
        for (layer, label), (kept, freed) in sorted(sums.items(), key=lambda item: (item[0][0], int(item[0][1])))
        if kept + freed and label in names
    ]


def duration(seconds: float) -> str:
    """Seconds as people say them: 8.4 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _row(kind: str, name: str, leaves: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    cells = {stream: {key: _points(leaf[key]) for key in ("value", "low", "high")} for stream, leaf in leaves.items()}
    known = {stream: cell["value"] for stream, cell in cells.items() if cell["value"] is not None}
    episodes = next(iter(leaves.values()))["episodes"]
    return {"kind": kind, "name": name, "episodes": episodes, "cells": cells,
            "best": max(known, key=known.get) if len(known) > 1 else None}  # fmt: skip


def _cell(cell: Mapping[str, float | None]) -> str:
    if cell["value"] is None:
        return "–"
    interval = "" if cell["low"] is None else f" ({cell['low']:.1f}–{cell['high']:.1f})"
    return f"{cell['value']:.1f}{interval}"


def _digits(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"


def _points(fraction: float | None) -> float | None:
    return None if fraction is None or math.isnan(fraction) else 100 * fraction


def _slowest(stages: Iterable[StageReport]) -> float:
    return max((done.seconds for done in stages), default=0) or 1


def _outcomes() -> list[Path]:
    return list((places.home() / "runs").glob("*/outcome.json"))


def plain(value: Any) -> Any:
    """Ready for JSON: mappings with text keys, lists, and None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tell_prefect(outcome: Outcome) -> None:
    """Inside a flow the run's page in Prefect shows the verdict and the scores, too."""
    if "prefect" not in sys.modules:
        return
    from prefect.context import FlowRunContext

    if FlowRunContext.get() is not None:
        from prefect.artifacts import create_markdown_artifact

        text = f"**{outcome.verdict}**\n\n{markdown(outcome.scores)}"
        create_markdown_artifact(text, key="scores", description=f"{outcome.recipe} {outcome.run_key}")

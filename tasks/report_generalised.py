"""Report of a generalised night: a page, a JSON and a Markdown table, in `home/runs/<run key>/` and in MLflow.

The page shows what each step was worth, the pictures that were drawn, and their labels before and after each step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.blobs import write_file
from tasks.report import embedded, plain, render, run_folder, save_outcome
from tasks.stage import StageReport, stage
from tasks.tabulate_generalised import METRICS, PROTOCOL, markdown

if TYPE_CHECKING:
    from tasks.tracking import Run

HEADINGS = {"steps": "Novel mIoU", "drawn": "Pictures", "labels": "Labels, step by step"}
CAPTIONS = {
    "steps": "Novel mIoU of each step, in points, with 95 % intervals where there are several lists of supports.",
    "drawn": "What the text-to-image pipeline draws when it is given the name of a class, a row for each class.",
    "labels": "Synthetic pictures and their labels: as predicted, filtered, relabelled, sharpened. Grey is unlabelled.",
}


@dataclass(frozen=True)
class GeneralisedOutcome:
    """All that one generalised night says for itself. scores: `tasks.tabulate_generalised.step_scores`; of a foundation
    night, what the judge says of the pictures. models: fold -> where its model (or, of a foundation night, its pipeline
    and SAM) lies. report: what -> path."""

    run_key: str
    recipe: str
    scores: Mapping[str, Any]
    stages: tuple[StageReport, ...]
    models: Mapping[Any, str] = field(default_factory=dict)
    report: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return sentence(self)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: nested plain values, NaN as None."""
        return plain(asdict(self))


def sentence(outcome: GeneralisedOutcome) -> str:
    """What came out, in a line."""
    rows = outcome.scores.get("rows", ())
    if not rows:
        return "; ".join([f"made {', '.join(outcome.models.values())}", *recognised(outcome.scores)])
    last = next((row for row in reversed(rows) if row["over_previous"] == row["over_previous"]), rows[0])
    words = f"novel mIoU {last['novel']:.1f}"
    if last is rows[0]:
        return f"{words} with supports alone"
    closed = "" if last["closed"] != last["closed"] else f", {last['closed']:.0f} % of the way to real masks"
    return f"{words}, {last['over_supports']:+.1f} over supports alone{closed}"


def recognised(scores: Mapping[str, Any]) -> list[str]:
    """What the judge says of a foundation night's pictures, in a line; nothing where there was no judge."""
    if "recognised" not in scores:
        return []
    drawn, real, chance = (scores[name] for name in ("recognised", "recognised_real", "chance"))
    return [f"{drawn:.0%} of the pictures show what was asked for (real ones {real:.0%}, chance {chance:.0%})"]


@stage("report")
def report_generalised(
    outcome: GeneralisedOutcome, *, settings: Mapping[str, str], pictures: Mapping[str, bytes], run: Run,
) -> GeneralisedOutcome:
    """Write the night's folder, copy it to MLflow, and return the outcome with the paths in it.

    settings: the recipe as dotted names. pictures: PNG bytes by name; the page shows those of CAPTIONS.
    """
    folder, rows = run_folder(outcome.run_key), plain(outcome.scores.get("rows", ()))
    folder.mkdir(parents=True, exist_ok=True)
    page = render(
        "generalised.html", outcome, settings=settings, labels=run.labels, sentence=sentence(outcome), rows=rows,
        protocol=PROTOCOL, models=outcome.models, pictures=embedded(pictures, CAPTIONS), captions=CAPTIONS,
        headings=HEADINGS,
    )  # fmt: skip
    files = {"report.html": page.encode(), **{f"{name}.png": data for name, data in pictures.items()}}
    if rows:
        files["scores.json"] = json.dumps(plain(outcome.scores), indent=1, allow_nan=False).encode()
        files["scores.md"] = markdown(outcome.scores["rows"]).encode()
    for name, data in files.items():
        write_file(folder / name, data)
        run.file(f"report/{name}", data)
    run.metrics({f"{row['row']}.{name}": row[name] for row in rows for name in METRICS})
    run.metrics({name: value for name, value in outcome.scores.items() if isinstance(value, float)})
    shown = {Path(name).stem if name.endswith((".html", ".png")) else name: str(folder / name) for name in files}
    outcome = replace(outcome, report=shown)
    save_outcome(outcome)
    return outcome

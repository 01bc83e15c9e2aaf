"""What the commands draw: tables for people, bars while a night runs."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.catalogue import STUDIES, recipes
from models import DATASETS, FUSERS, GENERATORS, SEGMENTERS

if TYPE_CHECKING:
    from rich.console import Console


@contextlib.contextmanager
def progress() -> Iterator[None]:
    """One bar per stage when stderr is a terminal; else the plain lines that are the default."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from tasks import progress as steps

    columns = (
        TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bars:
        previous = steps.use(Bars(bars))
        try:
            yield
        finally:
            steps.use(previous)


class Bars:
    """A sink of `tasks.progress`: every stage that reports gets a bar."""

    def __init__(self, bars: Any) -> None:
        self.bars = bars
        self.tasks: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(stage, total=total, note=note)
        self.bars.update(self.tasks[stage], completed=done, total=total, note=note)


def quiet_prefect() -> None:
    """Keep Prefect's own log, tracebacks included, off the terminal; its server still gets every line."""
    if os.environ.get("THERMOFUSE_DEBUG"):
        return
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: not record.name.startswith("prefect"))


def tables(console: Console) -> None:
    """The tables of contents."""
    from rich.markup import escape

    groups = {"Recipes": recipes(), "Studies": STUDIES, "Datasets": DATASETS, "Generators": GENERATORS,
              "Fusers": FUSERS, "Segmenters": SEGMENTERS}
    width = max(len(name) for names in groups.values() for name in names) + 2
    for kind, names in groups.items():
        console.print(kind, style="bold")
        for name, about in names.items():
            console.print(f"  {name:<{width}}[dim]{escape(about)}", soft_wrap=True, highlight=False)


def outcome(console: Console, found: dict[str, Any]) -> None:
    """A night (`Outcome.as_dict()`): the verdict, the scores, what the stages cost, and where the report lies."""
    if "verdict" not in found:
        return generalised(console, found)
    verdict = found["verdict"]
    console.print(f"[dim]{found['recipe']}  {found['run_key']}", highlight=False)
    style = "bold green" if verdict["promoted"] else "bold"
    console.print(verdict["sentence"], style=style, soft_wrap=True, markup=False, highlight=False)
    full, brief = _scores(found["scores"], intervals=True), _scores(found["scores"], intervals=False)
    needed = console.measure(full, options=console.options.update(max_width=1000)).maximum
    console.print(full if needed <= console.width else brief)
    console.print(_stages(found["stages"]))
    for name in ("report", "grid"):
        if name in found["report"]:
            console.print(found["report"][name], style="dim", soft_wrap=True, highlight=False, markup=False)


def generalised(console: Console, found: dict[str, Any]) -> None:
    """A generalised night (`GeneralisedOutcome.as_dict()`): its steps, what they cost, where models and report lie."""
    from tasks.report_generalised import recognised

    console.print(f"[dim]{found['recipe']}  {found['run_key']}", highlight=False)
    if "rows" in found["scores"]:
        console.print(_steps(found["scores"]["rows"]))
    for line in recognised(found["scores"]):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    console.print(_stages(found["stages"]))
    for path in [*found["models"].values(), *(found["report"].get(name) for name in ("report", "drawn", "labels"))]:
        if path:
            console.print(path, style="dim", soft_wrap=True, highlight=False, markup=False)


def _steps(rows: list[dict[str, Any]]) -> Any:
    """Base, novel and harmonic mIoU of each step, with intervals where there are any, and the share of the gap."""
    table = _table("mIoU, points", "base", "novel", "harmonic", "over supports", "over previous", "closed")
    for row in rows:
        scores = (f"{row[name]:.1f}" + _ends(row, name) for name in ("base", "novel", "harmonic"))
        closed = "–" if row["closed"] is None else f"{row['closed']:.0f} %"
        table.add_row(row["row"], *scores, _gain(row, "supports"), _gain(row, "previous"), closed)
    return table


def _ends(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if low is None else f" [dim]{low:.1f}–{high:.1f}[/]"


def study(console: Console, found: dict[str, Any]) -> None:
    """A study (`StudyOutcome.as_dict()`): its rows with intervals and gains, and where the files lie."""
    console.print(f"[dim]{found['study']}  {found['key']}", highlight=False)
    first = found["rows"][0]
    console.print(
        _steps(found["rows"]) if "novel" in first else _variants(found) if "miou" in first else _metrics(found["rows"])
    )
    for path in found["report"].values():
        console.print(path, style="dim", soft_wrap=True, highlight=False, markup=False)


def _variants(found: dict[str, Any]) -> Any:
    table = _table("mIoU, points", "", *(f"over {name}" for name in found["references"]))
    for row in found["rows"]:
        gains = [_gain(row, name) for name in found["references"]]
        table.add_row(row["row"], f"{row['miou']:.1f}  [dim]{row['low']:.1f}–{row['high']:.1f}[/]", *gains)
    return table


def _metrics(rows: Sequence[dict[str, Any]]) -> Any:
    """Of fused pictures: the three metrics that studies aim at, and the gain over the best control."""
    names = [name.removeprefix("over_").removesuffix("_low") for name in rows[0] if re.match("over_.*_low", name)]
    table = _table("fused pictures", *(title for name in names for title in (name, "over best control")))
    for row in rows:
        cells = []
        for name in names:
            value, low, high = (row[f"over_{name}{end}"] for end in ("", "_low", "_high"))
            style = "bold" if value is not None and low > 0 else "not bold"
            gain = "–" if value is None else f"[{style}]{value:+.3f}[/] [dim]{low:+.3f}–{high:+.3f}[/]"
            cells += [f"{row[name]:.3f}", gain]
        table.add_row(row["row"], *cells)
    return table


def _gain(row: dict[str, Any], reference: str) -> str:
    value, low, high = (row[f"over_{reference}{end}"] for end in ("", "_low", "_high"))
    if value is None:
        return "–"
    if low is None:
        return f"{value:+.1f}"
    style = "bold" if low > 0 else "not bold"
    return f"[{style}]{value:+.1f}[/] [dim]{low:+.1f}–{high:+.1f}[/]"


def fused(console: Console, table: Any, out: Path) -> None:
    """What fusing a folder gave (`tasks.fuse.fuse_folder`): how many pictures, their mean metrics, what went wrong."""
    good = table[table["error"].isna()]
    console.print(f"{out}: {len(good)} of {len(table)} pairs fused", soft_wrap=True, highlight=False, markup=False)
    means = good.drop(columns=["name", "error"]).mean()
    if len(means):
        words = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        console.print(words, soft_wrap=True, highlight=False, markup=False)
    for row in table[table["error"].notna()].to_dict("records"):
        console.print(f"{row['name']}: {row['error']}", style="red", soft_wrap=True, highlight=False, markup=False)


def _scores(scores: dict[str, Any], intervals: bool) -> Any:
    from rich.markup import escape

    from models.plots import STREAM_TITLES
    from tasks.report import score_table

    found = score_table(scores)
    table = _table("mIoU, points", *(STREAM_TITLES.get(name, name).replace(" (", "\n(") for name in found["streams"]))
    for index, row in enumerate(found["rows"]):
        last = index + 1 == len(found["rows"]) or found["rows"][index + 1]["kind"] != "class"
        name = escape(f"  {row['name']}" if row["kind"] == "class" else row["name"])
        cells = [_cell(row["cells"][stream], row["best"] == stream, intervals) for stream in found["streams"]]
        table.add_row(name, *cells, style=None if row["kind"] == "class" else "bold", end_section=last)
    return table


def _cell(cell: dict[str, float | None], best: bool, interval: bool) -> str:
    if cell["value"] is None:
        return "–"
    spread = f" [not bold dim]{cell['low']:4.1f}–{cell['high']:.1f}[/]" if interval and cell["low"] is not None else ""
    value = f"{cell['value']:.1f}"
    return f"[bold]{value}[/]{spread}" if best else f"{value}{spread}"


def _stages(stages: list[dict[str, Any]]) -> Any:
    from tasks.report import duration

    table = _table("stage", "time", "items", "quarantined", "shards", "peak memory")
    for stage in stages:
        reused = f"{stage['shards']} ({stage['shards_reused']} reused)" if stage["shards_reused"] else stage["shards"]
        table.add_row(
            stage["name"], "reused" if stage["reused"] else duration(stage["seconds"]), str(stage["count"] or ""),
            str(stage["quarantined"] or ""), str(reused or ""), f"{stage['peak_rss_mb']:,.0f} MB",
        )  # fmt: skip
    return table


def _table(first: str, *others: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, header_style="dim", show_edge=False)
    table.add_column(first, no_wrap=True)
    for title in others:
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    return table

"""Promote: a new version becomes champion only when it beats the old one on the same frozen episodes.

MLflow's aliases say what is so: `champion` is served, `previous` is where `rollback` goes, `challenger` was judged last
and did not make it. MLflow keeps no history of them, so every move is a line in `home/promotions.jsonl` and tags on
the version.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from models.errors import StageFailed, UsageError
from tasks import places, tracking
from tasks.register import Version, exam_table, find_version, reachable, save_exam
from tasks.stage import stage

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

PENDING = "registration of {name} is pending because MLflow cannot be reached; run the recipe again when it is back"


@dataclass(frozen=True)
class Gate:
    """What a challenger must do.

    min_gain: points of mIoU above the champion. require_interval: the paired 95 % interval of the gain must also lie
    above 0. stream: which prediction counts. beat_control: it must also score above `control`, whether or not there
    is a champion.
    """

    min_gain: float = 0.3
    require_interval: bool = False
    stream: str = "fusion"
    beat_control: bool = True
    control: str = "prototype"


@dataclass(frozen=True)
class Verdict:
    """What the gate decided; prints as one sentence.

    version, champion: version numbers, the champion's after the verdict. miou, champion_miou, control_miou, gain and
    its 95 % interval low..high are points of mIoU on the episodes `exam`; None where nothing was compared.
    """

    promoted: bool
    sentence: str
    name: str
    version: int | None
    champion: int | None
    exam: str = ""
    miou: float | None = None
    champion_miou: float | None = None
    control_miou: float | None = None
    gain: float | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return self.sentence


@stage("promote")
def promote(
    version: Version, table: pd.DataFrame, gate: Gate | None = None, *,
    rescore: Callable[[Version], pd.DataFrame] | None = None,
) -> Verdict:  # fmt: skip
    """Compare a version with the champion of its name and move the alias if the gate lets it through.

    Args:
        version: from `register`; a pending one gives a verdict that says so.
        table: its row per episode and stream on `version.exam`.
        rescore: gives the champion's table on that exam when it never sat it; the table is then kept with the champion.

    The champion is read again just before the move; if it changed meanwhile nothing moves. Nor does anything move when
    the champion never sat this exam and cannot be put to it (no `rescore`, or it raises UsageError), or when the
    version was rolled back once. Raises UsageError when the gate's streams are not in the tables, StageFailed when
    MLflow is down.
    """
    gate = gate or Gate()
    if version.number is None:
        return Verdict(False, PENDING.format(name=version.name), version.name, None, None, version.exam)
    champion = find_version(version.name)
    scores = _compare(version, table, champion, gate, rescore)
    obstacle = _obstacle(version, champion, gate, scores)
    if obstacle is None and not _move(version, champion):
        obstacle = f"the champion changed while v{version.number} was judged; run again"
    verdict = _verdict(version, champion, gate, scores, obstacle)
    _record(version, champion, verdict)
    return verdict


def rollback(name: str) -> Verdict:
    """Make `previous` the champion again; the version it replaces is never promoted by a night again.

    A second rollback goes one further back. Raises UsageError when there is no previous version.
    """
    champion, previous = find_version(name), find_version(name, alias="previous")
    if champion is None or previous is None:
        raise UsageError(f"{name} has no previous champion to go back to; thermofuse promote {name} VERSION sets one.")
    sentence = f"rolled back from v{champion.number} to v{previous.number}"
    client = tracking.client()
    with reachable():
        before = client.get_model_version(name, str(previous.number)).tags.get("replaced_version")
        client.set_registered_model_alias(name, "champion", str(previous.number))
        client.set_model_version_tag(name, str(champion.number), "rolled_back_at", _now())
        if before:
            client.set_registered_model_alias(name, "previous", before)
        else:
            client.delete_registered_model_alias(name, "previous")
    _log("rollback", previous, champion, sentence)
    return Verdict(False, sentence, name, previous.number, previous.number)


def appoint(version: Version) -> Verdict:
    """Make a version champion without asking the gate: a person decided, also about one that was rolled back."""
    champion, number = find_version(version.name), version.number
    if champion and champion.number == number:
        return Verdict(False, f"v{number} is the champion already", version.name, number, number)
    replaced = f" over v{champion.number}" if champion else ""
    verdict = Verdict(True, f"promoted v{number}{replaced} by hand", version.name, number, number, version.exam)
    if not _move(version, champion):
        raise StageFailed(f"The champion of {version.name} changed meanwhile; look at it and promote again.")
    with reachable():
        tracking.client().delete_model_version_tag(version.name, str(number), "rolled_back_at")
    _record(version, champion, verdict)
    return verdict


def _compare(version: Version, table: pd.DataFrame, champion: Version | None, gate: Gate, rescore) -> dict[str, Any]:
    """mIoU in points of the challenger, the control and the champion, and the paired gain with its interval."""
    import pandas as pd

    from models.metrics import score

    parts = {"challenger": _stream(table, gate.stream)}
    if gate.beat_control:
        parts["control"] = _stream(table, gate.control)
    reference = _champion_table(champion, version, rescore)
    if reference is not None:
        parts["champion"] = _stream(reference, gate.stream)
    joined = pd.concat([part.assign(stream=name) for name, part in parts.items()], ignore_index=True)
    folds = joined.groupby("fold")["label"].unique()
    pairs = [("challenger", "champion")] if "champion" in parts else []
    found = score(joined, {fold: sorted(labels) for fold, labels in folds.items()}, pairs=pairs).as_dict()
    values = {name: _points(found["streams"][name]["miou"]["value"]) for name in parts}
    gain = found["differences"][0]["miou"] if pairs else None
    ends = {"gain": "value", "low": "low", "high": "high"}
    return {**values, **{name: gain and _points(gain[key]) for name, key in ends.items()}}


def _obstacle(version: Version, champion: Version | None, gate: Gate, scores: dict[str, Any]) -> str | None:
    """Why the version may not become champion; None when it may."""
    own, mine = f"v{version.number}", scores["challenger"]
    if champion and champion.number == version.number:
        return f"{own} is the champion already"
    if gate.beat_control and not mine > scores["control"]:
        return f"mIoU {mine:.1f} of {own} does not beat the {gate.control} control at {scores['control']:.1f}"
    if _rolled_back(version):
        return f"{own} was rolled back; thermofuse promote {version.name} {version.number} overrules that"
    if champion is None:
        return None
    if "champion" not in scores:
        overrule = f"thermofuse promote {version.name} {version.number}"
        return f"v{champion.number} never sat this exam, so nothing was compared; {overrule} decides without"
    if not scores["gain"] >= gate.min_gain - 1e-9:
        return f"mIoU {mine:.1f} of {own} is not {gate.min_gain:g} above {scores['champion']:.1f}"
    if gate.require_interval and not scores["low"] > 0:
        return f"the gain of {own} may be chance, {scores['gain']:+.1f} ({scores['low']:+.1f} to {scores['high']:+.1f})"
    return None


def _sentence(version: Version, champion: Version | None, gate: Gate, scores: dict, obstacle: str | None) -> str:
    own, mine = f"v{version.number}", f"mIoU {scores['challenger']:.1f}"
    if champion and champion.number == version.number:
        return f"{own} is the champion already: {mine}"
    if obstacle:
        return f"kept v{champion.number}: {obstacle}" if champion else f"{own} stays challenger: {obstacle}"
    if champion:
        return f"promoted {own} over v{champion.number}: {mine} > {scores['champion']:.1f} (gate {gate.min_gain:+g})"
    floor = f" > {scores['control']:.1f} of the {gate.control} control" if gate.beat_control else ""
    return f"promoted {own}, the first: {mine}{floor}"


def _verdict(version: Version, champion: Version | None, gate: Gate, scores: dict, obstacle: str | None) -> Verdict:
    return Verdict(
        promoted=obstacle is None, name=version.name, version=version.number,
        sentence=_sentence(version, champion, gate, scores, obstacle),
        champion=version.number if obstacle is None else champion and champion.number, exam=version.exam,
        miou=scores["challenger"], champion_miou=scores.get("champion"), control_miou=scores.get("control"),
        gain=scores["gain"], low=scores["low"], high=scores["high"],
    )  # fmt: skip


def _move(version: Version, champion: Version | None) -> bool:
    """Set the aliases, unless the champion is no longer the one that was compared; says whether it did."""
    client, number = tracking.client(), str(version.number)
    with reachable():
        now = find_version(version.name)
        if (now and now.number) != (champion and champion.number):
            return False
        if champion:
            client.set_model_version_tag(version.name, number, "replaced_version", str(champion.number))
            client.set_registered_model_alias(version.name, "previous", str(champion.number))
        client.set_registered_model_alias(version.name, "champion", number)
    return True


def _record(version: Version, champion: Version | None, verdict: Verdict) -> None:
    """Tags on the version and the challenger alias; a promotion is also a line in the log."""
    client, number = tracking.client(), str(version.number)
    standing = version.number == verdict.champion
    with reachable():
        tags = {"verdict": verdict.sentence, "validation_status": "passed" if standing else "rejected"}
        if verdict.promoted:
            tags["promoted_at"] = _now()
        for key, value in tags.items():
            client.set_model_version_tag(version.name, number, key, value)
        if not standing:
            client.set_registered_model_alias(version.name, "challenger", number)
        elif (old := find_version(version.name, alias="challenger")) and old.number == version.number:
            client.delete_registered_model_alias(version.name, "challenger")
    if verdict.promoted:
        _log("promote", version, champion, verdict.sentence)


def _log(action: str, version: Version, replaced: Version | None, sentence: str) -> None:
    entry = {
        "time": _now(), "action": action, "name": version.name, "version": version.number,
        "replaced": replaced and replaced.number, "exam": version.exam, "sentence": sentence,
    }  # fmt: skip
    path = places.home() / "promotions.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _champion_table(champion: Version | None, version: Version, rescore: Callable | None) -> pd.DataFrame | None:
    """The champion's row per episode on the version's exam; None when there is nothing to compare with."""
    if champion is None or champion.number == version.number:
        return None
    table = exam_table(champion, version.exam)
    if table is None and rescore is not None:
        try:
            table = rescore(champion)
        except UsageError as error:
            log.warning("v%s cannot sit exam %s: %s", champion.number, version.exam, error)
            return None
        save_exam(champion, version.exam, table)
    return table


def _stream(table: pd.DataFrame, stream: str) -> pd.DataFrame:
    found = table[table["stream"] == stream]
    if found.empty:
        known = ", ".join(dict.fromkeys(table["stream"]))
        raise UsageError(f"The gate asks for stream {stream!r}, but the exam was sat by {known}; evaluate it too.")
    return found


def _rolled_back(version: Version) -> bool:
    with reachable():
        return "rolled_back_at" in tracking.client().get_model_version(version.name, str(version.number)).tags


def _points(fraction: float | None) -> float:
    return float("nan") if fraction is None else round(100 * fraction, 6)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

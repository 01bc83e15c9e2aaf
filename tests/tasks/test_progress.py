"""Progress is one line now and then, and always the last one."""

from __future__ import annotations

from tasks import progress


def test_lines_are_few_and_the_last_is_there(capsys):
    lines = progress.Lines(every=3600)
    for done in range(1, 6):
        lines("synthesise", done, 5, "")
    lines("refine", 1, 9, "2 quarantined")
    assert capsys.readouterr().err == "synthesise: 1/5\nsynthesise: 5/5\nrefine: 1/9 (2 quarantined)\n"


def test_lines_come_back_after_the_pause(capsys):
    lines = progress.Lines(every=0)
    lines("synthesise", 1, 5, "")
    lines("synthesise", 2, 5, "")
    assert capsys.readouterr().err.count("\n") == 2


def test_a_sink_takes_the_place_of_the_lines(capsys):
    seen = []
    previous = progress.use(lambda *step: seen.append(step))
    try:
        progress.step("refine", 1, 2)
        progress.step("refine", 2, 2, "done")
    finally:
        progress.use(previous)
    assert seen == [("refine", 1, 2, ""), ("refine", 2, 2, "done")]
    assert capsys.readouterr().err == ""

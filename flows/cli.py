"""The command line: `thermofuse run`, `study`, `show`, `list`, `predict`, `fuse`, `promote`, `rollback`.

A command returns a Reply and prints nothing itself. `main` writes the reply to stdout and lets nothing else get there:
whatever Ray, Prefect and MLflow print, in this process or in theirs, goes to stderr. Engines are imported inside the
commands that need them, so that `list` and `--help` are quick.

Exit codes: 0 done, 1 failed, 2 asked wrongly, 3 another run holds the lease, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter

from flows.streams import Stdout
from models.errors import ThermofuseError, UsageError
from tasks import places

if TYPE_CHECKING:
    from rich.console import Console

app = App(
    name="thermofuse",
    help="Teach cameras to see in infrared from a handful of labelled frames.",
    version=lambda: installed_version("thermofuse"),
    help_format="plaintext",
)
PLAIN = Parameter(negative="", show_default=False)


@dataclass(frozen=True)
class Reply:
    """What a command has to say: `show` draws it for people; `data`, when there is any, is printed as JSON instead."""

    show: Callable[[Console], None]
    data: dict[str, Any] | None = None


@app.command
def run(
    recipe: str,
    /,
    *,
    set: Annotated[tuple[str, ...], PLAIN] = (),
    json: Annotated[bool, PLAIN] = False,
) -> Reply:
    """Run a night: prepare, synthesise, refine, train, evaluate, register, promote.

    What an earlier run finished is reused; a night that failed goes on where it stopped.

    Parameters
    ----------
    recipe
        One of `thermofuse list`.
    set
        Change one setting, such as data.fold=1; may be given many times.
    json
        Print one JSON object, and nothing else, on stdout.
    """
    from flows import catalogue, display

    places.make_home()
    with display.progress():
        night, chosen = catalogue.night(recipe, set)
        display.quiet_prefect()
        outcome = night(chosen).as_dict()
    return Reply(lambda console: display.outcome(console, outcome), outcome if json else None)


@app.command
def study(
    name: str,
    recipe: str,
    /,
    *,
    seeds: int = 5,
    set: Annotated[tuple[str, ...], PLAIN] = (),
    json: Annotated[bool, PLAIN] = False,
) -> Reply:
    """Run a study: what parts of a night are worth, with controls and intervals.

    What an earlier study or night finished is reused; a study that failed goes on with its next cell.

    Parameters
    ----------
    name
        One of `thermofuse list`.
    recipe
        Whose pictures and settings; one of `thermofuse list`.
    seeds
        How many seeds, 1 to 5; degradation uses the recipe's own.
    set
        Change one setting of the recipe, such as data.fold=1; may be given many times.
    json
        Print one JSON object, and nothing else, on stdout.
    """
    from flows import catalogue, display

    places.make_home()
    with display.progress():
        run_study, chosen, drawn = catalogue.study(name, recipe, seeds, set)
        display.quiet_prefect()
        outcome = run_study(name, chosen, drawn).as_dict()
    return Reply(lambda console: display.study(console, outcome), outcome if json else None)


@app.command
def show(run: str | None = None, /, *, json: Annotated[bool, PLAIN] = False) -> Reply:
    """Show the scores of a run.

    Parameters
    ----------
    run
        A run key, its beginning, or a recipe; the newest run without it.
    json
        Print one JSON object, and nothing else, on stdout.
    """
    from flows import display
    from tasks.report import load_outcome

    outcome = load_outcome(run)
    return Reply(lambda console: display.outcome(console, outcome), outcome if json else None)


@app.command(name="list")
def list_() -> Reply:
    """List the recipes, studies, datasets, generators, fusers and segmenters."""
    from flows import display

    return Reply(display.tables)


@app.command
def predict(
    image: Path,
    /,
    *,
    support: Annotated[tuple[str, ...], PLAIN],
    out: Path,
    model: str | None = None,
    version: int | None = None,
    fold: int | None = None,
) -> Reply:
    """Segment an infrared image like the examples shown, with a registered model.

    Parameters
    ----------
    image
        The infrared picture to segment.
    support
        IMAGE:MASK, an infrared picture and where the class is in it (any value above 0); give one or more.
    out
        Where to write the mask, a PNG of 0 and 255.
    model
        A registered model; not needed when there is only one.
    version
        Its version; the champion without it.
    fold
        Whose learners answer; the model chooses without it.
    """
    from tasks.predict import predict as segment

    share = segment(image, support, out, model=model, version=version, fold=fold)
    return _sentence(f"{out}: {100 * share:.1f} % of the image")


@app.command
def fuse(folder: Path, /, *, fuser: str = "saliency", out: Path, seed: int = 0) -> Reply:
    """Fuse aligned pairs: FOLDER/infrared with FOLDER/visible, by file name.

    Parameters
    ----------
    folder
        Holds infrared/ and visible/ with pictures of equal names and sizes.
    fuser
        average, maximum, saliency or two_scale, or the folder of a fitted fuser.
    out
        Where to write the fused pictures, PNG, and metrics.csv.
    seed
        Of the noise of fusers that draw some.
    """
    from flows import display
    from tasks.fuse import fuse_folder

    with display.progress():
        table = fuse_folder(folder, fuser, out, seed)
    return Reply(lambda console: display.fused(console, table, out))


@app.command
def promote(model: str, version: int, /) -> Reply:
    """Make a version the champion by hand, whatever the gate said.

    Parameters
    ----------
    model
        A registered model, such as thermofuse-msrs-1shot.
    version
        Its version number.
    """
    from tasks.promote import appoint
    from tasks.register import known_version

    return _sentence(appoint(known_version(model, version)))


@app.command
def rollback(model: str, /) -> Reply:
    """Make the previous champion the champion again.

    Parameters
    ----------
    model
        A registered model, such as thermofuse-msrs-1shot.
    """
    from tasks.promote import rollback as go_back

    return _sentence(go_back(model))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, of the process without arguments; returns its exit code. Stdout is kept clean meanwhile."""
    if arguments is None:
        signal.signal(signal.SIGTERM, _stop)
    places.prepare_environment()
    stdout = Stdout()
    try:
        return _run(sys.argv[1:] if arguments is None else list(arguments), stdout)
    finally:
        stdout.close(give_back=arguments is not None)


def _run(tokens: list[str], stdout: Stdout) -> int:
    try:
        from rich.console import Console

        console = Console(file=stdout.file, width=None if stdout.file.isatty() else 120)
        command, bound, _ = app.parse_args(tokens, console=console, exit_on_error=False, print_error=False)
        reply = command(*bound.args, **bound.kwargs)
        if isinstance(reply, Reply) and reply.data is not None:
            stdout.file.write(json.dumps(reply.data, allow_nan=False) + "\n")
        elif isinstance(reply, Reply):
            reply.show(console)
        return 0
    except KeyboardInterrupt:
        return _fail("Interrupted; the same command goes on where it stopped.", 130)
    except CycloptsError as error:
        return _fail(_usage(error), UsageError.exit_code)
    except ThermofuseError as error:
        return _fail(str(error), error.exit_code)
    except Exception as error:
        return _fail(f"Unexpected {type(error).__name__}: {error} (THERMOFUSE_DEBUG=1 shows where).", 1)


def _fail(sentence: str, code: int) -> int:
    if os.environ.get("THERMOFUSE_DEBUG"):
        traceback.print_exc()
    print(" ".join(sentence.split()), file=sys.stderr)
    return code


def _usage(error: CycloptsError) -> str:
    return f"{str(error).rstrip('.')}; thermofuse --help shows how."


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _sentence(words: object) -> Reply:
    return Reply(lambda console: console.print(str(words), soft_wrap=True, highlight=False, markup=False))


if __name__ == "__main__":
    sys.exit(main())

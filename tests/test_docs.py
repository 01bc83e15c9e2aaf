"""What the documents say exists, and what exists is in the documents."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from flows.catalogue import STUDIES, recipes
from flows.cli import app
from flows.overrides import override
from flows.recipes import named
from models import DATASETS, FUSERS, GENERATORS, SEGMENTERS

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "infra/README.md")
README = (ROOT / "README.md").read_text()
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
PICTURE_BYTES = 300 * 1024
CHEAP = {"list", "--help", "--version"}


def text(document: str) -> str:
    return (ROOT / document).read_text()


def commands(program: str) -> list[tuple[str, str]]:
    """(document, command) of every line of code that calls `program`, blocks and spans alike."""
    found = []
    for document in DOCUMENTS:
        blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text(document), re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines()]
        lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text(document))
        found += [(document, re.sub(r"\s+#.*", "", line).strip()) for line in lines]
    call = re.compile(rf"(?:\.venv/bin/)?{program} +\S")
    return [(document, line.removeprefix(".venv/bin/")) for document, line in found if call.match(line)]


def table(document: str, heading: str) -> list[str]:
    """The first column of the table under `heading`, without its backquotes."""
    section = text(document).split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)


def verbs() -> set[str]:
    return {name for name in app if not name.startswith("-")}


THERMOFUSE = sorted({line for _, line in commands("thermofuse")})


@pytest.mark.parametrize("line", THERMOFUSE)
def test_a_command_parses(line: str) -> None:
    tokens = shlex.split(line)[1:]
    app.parse_args(tokens, exit_on_error=False, print_error=True)


@pytest.mark.parametrize("line", [line for line in THERMOFUSE if CHEAP & set(line.split())])
def test_a_cheap_command_runs(line: str, thermofuse_home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *shlex.split(line)[1:]], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_verb_is_in_the_table_and_the_reverse() -> None:
    assert {row.split()[1] for row in table("README.md", "Commands")} == verbs()


def test_every_recipe_is_in_the_table_and_the_reverse() -> None:
    assert table("README.md", "Recipes") == list(recipes())


def test_a_recipe_that_is_named_exists() -> None:
    named = {line.split()[2] for _, line in commands("thermofuse run") if "--help" not in line}
    assert named <= set(recipes())
    deployed = yaml.safe_load(text("prefect.yaml"))["deployments"]
    assert {entry["parameters"]["recipe"] for entry in deployed} <= set(recipes())
    makefile = re.findall(r"thermofuse run (\S+)", text("Makefile"))
    assert set(makefile) <= set(recipes()) and makefile
    studied = {tuple(line.split()[2:4]) for _, line in commands("thermofuse study") if "--help" not in line}
    assert {name for name, _ in studied} <= set(STUDIES) and {name for _, name in studied} <= set(recipes())


@pytest.mark.parametrize("line", [line for line in THERMOFUSE if "--set" in line])
def test_a_setting_that_is_set_exists(line: str) -> None:
    _, bound, _ = app.parse_args(shlex.split(line)[1:], exit_on_error=False, print_error=True)
    recipe = named(bound.arguments["recipe"])
    assert override(recipe, bound.arguments["set"]) != recipe


def test_list_names_everything(thermofuse_home: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "flows.cli", "list"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in [*DATASETS, *GENERATORS, *FUSERS, *SEGMENTERS, *recipes(), *STUDIES]:
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", done.stdout), name


def test_every_target_of_make_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", text("Makefile"), re.MULTILINE))
    mentioned = {line.split()[1] for _, line in commands("make") if not line.split()[1].startswith("-")}
    assert {"demo", "test"} <= mentioned <= targets


def test_our_variables_are_in_both_tables() -> None:
    """Every one of ours that the code reads is in both; and nothing is that the code does not read."""
    sources = [path.read_text() for package in ("flows", "tasks", "models") for path in (ROOT / package).rglob("*.py")]
    read = {name for source in sources for name in re.findall(r"\bTHERMOFUSE_[A-Z_]+\b", source)}
    for document, heading in (("README.md", "Environment"), ("infra/README.md", "Every environment variable")):
        assert {name for name in table(document, heading) if name.startswith("THERMOFUSE_")} == read, document
    theirs = {name for name in table("README.md", "Environment") if not name.startswith("THERMOFUSE_")}
    assert {name for name in theirs if not any(name in source for source in sources)} <= {"PREFECT_API_URL"}


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md"])
def test_a_link_leads_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", text(document)):
        if "://" not in target:
            assert ((ROOT / document).parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_file_that_is_named_exists(document: str) -> None:
    for path in re.findall(r"`((?:flows|tasks|models|infra|tests)/[\w./]+)`", text(document)):
        assert (ROOT / path).exists(), path


def test_the_pictures_are_small_and_used() -> None:
    pictures = sorted((ROOT / "infra" / "pictures").glob("*"))
    assert pictures
    for path in pictures:
        assert path.stat().st_size < PICTURE_BYTES
        assert f"](infra/pictures/{path.name})" in README, path.name


def test_the_changelog_has_this_version() -> None:
    headings = re.findall(r"^## \[([^\]]+)\]", text("CHANGELOG.md"), re.MULTILINE)
    assert headings[:2] == ["Unreleased", VERSION]


def test_the_citation_fits() -> None:
    assert str(CITATION["version"]) == VERSION
    cited = {identifier["value"] for entry in CITATION["references"] for identifier in entry["identifiers"]}
    assert cited == set(re.findall(r"arXiv:\d{4}\.\d{5}", README))
    for entry in CITATION["references"]:
        assert entry["title"] in re.sub(r"\s+", " ", README)
        assert entry["url"].rsplit("/", 1)[1] in entry["identifiers"][0]["value"]


def test_contributing_is_short() -> None:
    assert len(text("CONTRIBUTING.md").splitlines()) < 60

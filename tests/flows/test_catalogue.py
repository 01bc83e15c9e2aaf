"""The catalogue names what exists: every recipe has a flow, every study a function."""

from __future__ import annotations

import inspect
import textwrap
from collections import Counter
from pkgutil import resolve_name

import pytest

from flows import catalogue
from flows.catalogue import FLOWS, SEEDS, STUDIES, names_of, night, read_recipes, recipes, study, table_of
from models.errors import UsageError


@pytest.mark.parametrize("table", FLOWS)
def test_a_table_is_read_as_it_is_written(table):
    assert list(names_of(table)) == list(resolve_name(table))
    assert all(names_of(table).values()), "every recipe says what it is"
    assert callable(resolve_name(FLOWS[table]))


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_is_found_and_set(name):
    flow, chosen = night(name, ["about=changed"])
    assert chosen.name == name and chosen.about == "changed"
    assert list(inspect.signature(flow.fn).parameters) == ["recipe"]


def test_no_two_tables_share_a_name():
    names = Counter(name for table in FLOWS for name in names_of(table))
    assert max(names.values()) == 1
    assert table_of("smoke") == "flows.recipes:RECIPES"


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_exists_and_takes_name_recipe_seeds(name):
    function = resolve_name(STUDIES[name])
    assert list(inspect.signature(getattr(function, "fn", function)).parameters) == ["name", "recipe", "seeds"]


def test_a_study_takes_the_first_seeds():
    function, chosen, seeds = study("mix", "smoke", 2, ["meta.steps=7"])
    assert (function.name, chosen.meta.steps, seeds) == ("study", 7, SEEDS[:2])
    assert study("mix", "smoke", 5)[2] == SEEDS


@pytest.mark.parametrize("seeds", [0, 6])
def test_there_are_only_so_many_seeds(seeds):
    with pytest.raises(UsageError, match="from 1 to 5"):
        study("mix", "smoke", seeds)


def test_what_is_unknown_is_named_with_the_right_ones():
    with pytest.raises(UsageError, match=r"no recipe 'toy-gffs'.*smoke.*toy-foundation.*mean 'toy-gfss'"):
        night("toy-gffs")
    with pytest.raises(UsageError, match=r"no study 'syn4sgg'.*ablation.*fusers.*mean 'syn4seg'"):
        study("syn4sgg", "smoke", 1)
    with pytest.raises(UsageError, match="no setting 'stesp'"):
        night("smoke", ["stesp=1"])


def test_a_flow_takes_no_recipe_of_another_kind():
    from flows.generalised_recipes import named as generalised
    from flows.recipes import named as nightly

    with pytest.raises(UsageError, match=r"no recipe 'toy-gfss'; choose one of smoke"):
        nightly(catalogue.recipe("toy-gfss"))
    with pytest.raises(UsageError, match=r"no recipe 'smoke'; choose one of toy-foundation"):
        generalised(catalogue.recipe("smoke"))


def test_recipes_are_read_without_running_their_module():
    source = """
        raise SystemExit("never executed")
        def smoke():
            '''A minute.

            More.'''
        def msrs(shots):
            '''An hour.'''
        RECIPES: dict = {"smoke": smoke, "smoke2": smoke(), "msrs": lambda: msrs(1), "bare": 3}
        OTHERS = {"msrs": msrs}
    """
    assert read_recipes(textwrap.dedent(source)) == {
        "smoke": "A minute.", "smoke2": "A minute.", "msrs": "An hour.", "bare": "",
    }  # fmt: skip
    assert read_recipes(textwrap.dedent(source), "OTHERS") == {"msrs": "An hour."}
    assert read_recipes("x = 1") == {}

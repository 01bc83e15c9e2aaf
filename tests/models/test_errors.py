"""An unknown name: all right ones, and a guess where one is near."""

from models.errors import unknown


def test_the_right_names_are_listed_and_the_nearest_is_guessed():
    said = str(unknown("recipe", "msrs-1sho", {"toy": 1, "msrs-1shot": 2}))
    assert said == "There is no recipe 'msrs-1sho'; choose one of toy, msrs-1shot. Did you mean 'msrs-1shot'?"


def test_where_the_kind_is_not_known_the_name_stands_alone():
    assert str(unknown("", "zzz", ["a"])) == "There is no 'zzz'; choose one of a."


def test_nothing_is_guessed_where_nothing_is_near():
    said = str(unknown("study", "zzz", iter(["mix", "ablation"])))
    assert said == "There is no study 'zzz'; choose one of mix, ablation."

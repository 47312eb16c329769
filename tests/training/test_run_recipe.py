"""What a run's folder tells of its arguments."""

import pytest
import yaml

from hf_aegis.training import AEGISConfig
from hf_aegis.training.run_arguments import RunArguments
from hf_aegis.training.run_recipe import RunRecipe


@pytest.fixture
def make_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(run=None, **changes):
        return RunRecipe.of(RunArguments(**(run or {})), AEGISConfig(output_dir="out", use_cpu=True, **changes))

    return make


def test_it_says_how_to_train_and_not_where_it_is_pushed(make_recipe):
    pushing = {"hub_token": "hf_secret", "hub_model_id": "org/name", "hub_strategy": "end", "hub_private_repo": True}
    recipe = make_recipe(learning_rate=0.5, **pushing)
    written = yaml.safe_load(recipe.to_yaml())
    assert written["learning_rate"] == 0.5
    assert not [key for key in written if "hub" in key]
    assert "secret" not in recipe.to_yaml()
    assert recipe.difference(make_recipe(learning_rate=0.5).to_yaml()) is None


def test_paths_are_called_what_they_are_called_elsewhere(make_recipe, tmp_path):
    recipe = make_recipe(
        {"demonstrations": [str(tmp_path / "data" / "a.hdf5"), "/data/b.hdf5"], "anchor": "org/anchor"}
    )
    written = yaml.safe_load(recipe.to_yaml())
    assert (written["demonstrations"], written["anchor"]) == (["data/a.hdf5", "b.hdf5"], "org/anchor")
    assert str(tmp_path) not in recipe.to_yaml()


def test_the_same_arguments_are_known_again_from_anywhere(make_recipe, tmp_path, monkeypatch):
    text = make_recipe({"demonstrations": [str(tmp_path / "a.hdf5")]}).to_yaml()
    monkeypatch.chdir("/")
    own = RunArguments(demonstrations=[str(tmp_path / "a.hdf5")])
    assert RunRecipe.of(own, AEGISConfig(output_dir="out", use_cpu=True)).difference(text) is None


def test_others_are_told_apart(make_recipe):
    text = make_recipe({"demonstrations": ["/data/a.hdf5"]}, learning_rate=0.5).to_yaml()
    other = make_recipe({"demonstrations": ["/data/a.hdf5"]}, learning_rate=0.25)
    assert other.difference(text) == "learning_rate is 0.5 there and 0.25 here"
    namesake = make_recipe({"demonstrations": ["/elsewhere/a.hdf5"]}, learning_rate=0.5)
    assert namesake.difference(text) == "a folder or file was another there, of the same name as here"


def test_recipes_with_full_paths_are_read_too(make_recipe):
    recipe = make_recipe({"demonstrations": ["/data/a.hdf5"]})
    assert recipe.difference(yaml.safe_dump(recipe.arguments)) is None
    other = make_recipe({"demonstrations": ["/elsewhere/a.hdf5"]})
    assert "demonstrations is ['/data/a.hdf5'] there" in other.difference(yaml.safe_dump(recipe.arguments))

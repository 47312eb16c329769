import dataclasses
import itertools
import json

import pytest
import torch
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture
def config(recipe, tiny_recipe, tmp_path):
    return dataclasses.replace(recipe.PretrainConfig.from_yaml(tiny_recipe), output_dir=str(tmp_path / "run"))


def test_an_interrupted_run_continues_exactly(recipe, config, tmp_path):
    uninterrupted, _, expected = recipe.train(config)
    for stop_after in (1, 2, 1):
        resumed, _, record = recipe.train(
            dataclasses.replace(config, output_dir=str(tmp_path / "parts")), stop_after=stop_after
        )
    assert {name: stage["steps"] for name, stage in record.items()} == {"vision": 2, "language": 2}
    assert [stage["loss"] for stage in record.values()] == [stage["loss"] for stage in expected.values()]
    state = uninterrupted.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in resumed.state_dict().items())


def test_a_checkpoint_of_another_recipe_is_refused(recipe, config):
    recipe.train(config, stop_after=1)
    with pytest.raises(ValueError, match=r"checkpoint.pt belongs to another recipe"):
        recipe.train(dataclasses.replace(config, seed=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw | {"sede": 1}, r"recipe\.yaml: unknown keys \['sede'\]"),
        (lambda raw: raw | {"seed": "one"}, r"recipe\.yaml: key 'seed' is 'one', expected int"),
        (lambda raw: raw | {"vision": [1]}, r"recipe\.yaml: key 'vision' is \[1\], expected dict"),
        (lambda raw: {key: raw[key] for key in raw if key != "seed"}, r"recipe\.yaml: missing keys \['seed'\]"),
        (
            lambda raw: raw | {"vision": raw["vision"] | {"step": 1}},
            r"recipe\.yaml: vision: unknown keys \['step'\]",
        ),
        (
            lambda raw: raw | {"language": raw["language"] | {"steps": 1.5}},
            r"recipe\.yaml: language: key 'steps' is 1\.5, expected int",
        ),
        (lambda raw: raw | {"language": {"steps": 1}}, r"recipe\.yaml: language: missing keys \['batch_size', "),
    ],
    ids=["unknown", "type", "stage", "missing", "unknown in stage", "type in stage", "missing in stage"],
)
def test_a_wrong_option_is_refused_by_file_and_key(recipe, tiny_recipe, tmp_path, change, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(change(json.loads(tiny_recipe.read_text()))))
    with pytest.raises(ValueError, match=message):
        recipe.PretrainConfig.from_yaml(path)


def test_the_export_loads_and_reports_its_scores(recipe, config):
    model, processor, record = recipe.train(config)
    folder = recipe.export(config, model, processor, record)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["count"] == 12
    assert evaluation["training"]["language"]["steps"] == 2
    assert f"{evaluation['parameters']:,} parameters" in (folder / "README.md").read_text()
    loaded = PaliGemmaForConditionalGeneration.from_pretrained(folder)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.to(torch.bfloat16))
    assert AutoProcessor.from_pretrained(folder).tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_augmentation_shifts_and_mirrors_whole_images(recipe):
    images = torch.arange(2 * 3 * 6 * 5, dtype=torch.float32).reshape(2, 3, 6, 5)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    windows = {
        (row, column, mirrored): padded[..., row : row + 6, column : column + 5].flip([-1] if mirrored else [])
        for row, column, mirrored in itertools.product(range(5), range(5), (False, True))
    }
    seen = set()
    for seed in range(60):
        augmented = recipe.augment(images, 2, torch.Generator().manual_seed(seed))
        for index in range(2):
            fitting = [key for key, window in windows.items() if torch.equal(augmented[index], window[index])]
            assert fitting
            seen.update(fitting)
    assert {row for row, _, _ in seen} == {column for _, column, _ in seen} == set(range(5))
    assert {mirrored for _, _, mirrored in seen} == {False, True}


def test_the_schedule_warms_up_and_ends_at_zero(recipe):
    stage = recipe.StageConfig(
        steps=100, batch_size=1, learning_rate=2.0, warmup_steps=10, weight_decay=0.0, max_shift=0
    )
    rates = [recipe.learning_rate(step, stage) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0)


def test_every_step_has_a_batch_of_its_own(recipe):
    draws = {
        tuple(torch.rand(2, generator=recipe.step_generator(seed, stage, step)).tolist())
        for seed in (0, 1)
        for stage in recipe.STAGES
        for step in range(5)
    }
    assert len(draws) == 20

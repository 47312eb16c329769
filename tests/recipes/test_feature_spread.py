import importlib
from pathlib import Path

import pytest
import torch

from hf_aegis.assets import DEMO_CHECKPOINTS, DEMONSTRATIONS
from hf_aegis.data import LiberoDataset
from hf_aegis.models import PaliGemmaFlowCollator, PaliGemmaFlowForAction, PaliGemmaFlowProcessor


@pytest.fixture(scope="module")
def script():
    """Recipes are scripts, not a package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "recipes")
        yield importlib.import_module("feature_spread")


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_the_ratio_is_that_of_the_covariance_s_eigenvalues(script, shape):
    samples = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.arange(1, shape[1] + 1) + 7
    eigenvalues = torch.linalg.eigvalsh(samples.double().T.cov())
    expected = eigenvalues.sum() ** 2 / eigenvalues.square().sum()
    assert script.participation_ratio(samples) == pytest.approx(float(expected))


def test_a_line_has_one_direction_and_axes_have_as_many_as_there_are(script):
    assert script.participation_ratio(torch.arange(5.0)[:, None] * torch.tensor([1.0, -2.0, 3.0])) == pytest.approx(1)
    assert script.participation_ratio(torch.cat([torch.eye(8), -torch.eye(8)])) == pytest.approx(8)


@pytest.mark.parametrize("samples", [torch.ones(1, 3), torch.ones(4, 3)])
def test_samples_without_a_spread_are_refused(script, samples):
    with pytest.raises(ValueError, match="samples"):
        script.participation_ratio(samples)


def test_features_are_what_a_forward_pass_with_actions_hands_the_expert(script):
    model = PaliGemmaFlowForAction.from_pretrained(DEMO_CHECKPOINTS["held_pairs"], dtype=torch.float32).eval()
    processor = PaliGemmaFlowProcessor.from_pretrained(DEMO_CHECKPOINTS["held_pairs"])
    dataset = torch.utils.data.Subset(LiberoDataset(DEMONSTRATIONS, split="held_out"), [0, 500])
    batch = PaliGemmaFlowCollator(processor)([dataset[0], dataset[1]])
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    images = batch["input_ids"] == model.config.image_token_id
    expected = hidden[images].reshape(2, -1)
    torch.testing.assert_close(script.features(model, processor, dataset), expected)


def test_policies_are_told_from_the_model_before(script, monkeypatch, capsys):
    runs = [str(folder) for name, folder in DEMO_CHECKPOINTS.items() if name != "aegis"]
    sizes = []

    def few(model, processor, dataset):
        sizes.append(len(dataset))
        found = features(model, processor, torch.utils.data.Subset(dataset, range(0, len(dataset), 97)))
        assert len(found) == len(range(0, len(dataset), 97)) < 11
        return found

    features = script.features
    monkeypatch.setattr(script, "features", few)
    monkeypatch.setattr("sys.argv", ["feature_spread.py", *runs])
    script.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["before training", "demo/naive", "demo/held_pairs"]
    assert len(set(sizes)) == 1
    ratios = [float(row[1]) for row in rows]
    assert len(set(ratios)) == 3
    assert all(1 < ratio < 10 for ratio in ratios)


def test_a_run_without_a_model_is_named_at_once(script, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["feature_spread.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        script.main()
    assert f"no model in {tmp_path}" in capsys.readouterr().err

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import Parameter

from hf_aegis.training import ExpertEMA
from hf_aegis.training.expert_parameters import expert_modules


def follow(ema, values):
    for value in values:
        with torch.no_grad():
            for parameter in ema.parameters.values():
                parameter.fill_(value)
        ema.update()


def test_the_average_by_hand():
    ema = ExpertEMA({"w": Parameter(torch.tensor([1.0, 2.0]))}, 0.15)
    # The decay of the first step is 1/10, of the second 2/11 and so already the upper bound, 0.15.
    follow(ema, [3.0, -1.0, 5.0])
    first = 0.1 * torch.tensor([1.0, 2.0]) + 0.9 * 3.0
    second = 0.15 * first + 0.85 * -1.0
    torch.testing.assert_close(ema.average["w"], 0.15 * second + 0.85 * 5.0)
    assert ema.step == 3


def test_a_long_average_is_warmed_up():
    ema = ExpertEMA({"w": Parameter(torch.zeros(1))}, 0.9999)
    expected = 0.0
    for step, value in enumerate([4.0, 1.0, 2.0, 8.0]):
        follow(ema, [value])
        decay = (1 + step) / (10 + step)
        expected = decay * expected + (1 - decay) * value
    assert ema.average["w"].item() == pytest.approx(expected, rel=1e-6)


def test_half_precision_weights_have_a_single_precision_average():
    ema = ExpertEMA({"w": Parameter(torch.ones(1, dtype=torch.bfloat16))}, 0.9999)
    # Each step moves the average by 1e-4, which bfloat16, spaced 1/128 around 1, would lose.
    ema.step = 10**6
    follow(ema, [2.0] * 100)
    assert ema.average["w"].dtype == torch.float32
    assert ema.average["w"].item() == pytest.approx(2 - 0.9999**100, rel=2e-5)
    ema.copy_to_model()
    assert ema.parameters["w"].dtype == torch.bfloat16


def test_swapping_in_and_back_even_after_an_error():
    ema = ExpertEMA({"w": Parameter(torch.zeros(2))}, 0.5)
    follow(ema, [1.0])
    with ema.swapped_in(), ema.swapped_in():
        assert ema.parameters["w"].tolist() == pytest.approx([0.9, 0.9])
    assert ema.parameters["w"].tolist() == [1.0, 1.0]
    with pytest.raises(KeyError), ema.swapped_in():
        raise KeyError
    assert ema.parameters["w"].tolist() == [1.0, 1.0]
    assert ema.parameters["w"].requires_grad


def test_a_saved_average_goes_on_as_if_it_had_never_stopped(tmp_path):
    def fresh():
        return ExpertEMA({"a": Parameter(torch.zeros(2, 3)), "b": Parameter(torch.ones(1))}, 0.9999)

    ema, other = fresh(), fresh()
    follow(ema, [3.0, 1.0])
    ema.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["expert_ema.safetensors"]
    other.load(tmp_path)
    for one in (ema, other):
        follow(one, [7.0, 2.0])
    assert ema.step == other.step == 4
    assert all(torch.equal(ema.average[name], other.average[name]) for name in ("a", "b"))


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no expert parameters"):
        ExpertEMA({}, 0.9)
    ema = ExpertEMA({"w": Parameter(torch.zeros(2))}, 0.9)
    with pytest.raises(ValueError, match=r"expert_ema\.safetensors is missing"):
        ema.load(tmp_path)
    ema.save(tmp_path)
    with pytest.raises(ValueError, match=r"expected v of shape \(2,\), found nothing"):
        ExpertEMA({"v": Parameter(torch.zeros(2))}, 0.9).load(tmp_path)
    with pytest.raises(ValueError, match=r"expected w of shape \(3,\), found \(2,\)"):
        ExpertEMA({"w": Parameter(torch.zeros(3))}, 0.9).load(tmp_path)
    file = tmp_path / "expert_ema.safetensors"
    save_file({**load_file(file), "more": torch.zeros(1)}, file, metadata={"step": "0"})
    with pytest.raises(ValueError, match="averages 'more', which is not among the expert's trainable parameters"):
        ema.load(tmp_path)


def test_where_the_expert_is():
    pi0 = nn.ModuleDict(
        {"model": nn.ModuleDict({"vlm": nn.Linear(1, 1), "dit": nn.Linear(1, 1)}), "head": nn.Linear(1, 1)}
    )
    assert expert_modules(pi0) == ["head", "model.dit"]
    assert expert_modules(pi0, ["model.dit"]) == ["model.dit"]
    with pytest.raises(ValueError, match="ModuleDict has no module 'dit'"):
        expert_modules(pi0, ["dit"])
    flow = nn.ModuleDict({"model": nn.Linear(1, 1), "action_expert": nn.ModuleDict({"a": nn.Linear(1, 1)})})
    assert expert_modules(flow) == ["action_expert"]
    assert expert_modules(nn.Linear(1, 1)) == []

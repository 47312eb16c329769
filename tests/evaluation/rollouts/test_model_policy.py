"""The trained model as a policy: what goes in, in what order, what comes out, and that batches do not matter."""

import numpy as np
import pytest
import torch

from hf_aegis.assets import EMBEDDED_VLM
from hf_aegis.data import PictureSettings
from hf_aegis.evaluation.rollouts.model_policy import ModelPolicy, trained_pictures
from hf_aegis.evaluation.rollouts.policy import Observation, PolicyError, PolicyRequest
from hf_aegis.functional.normalization import DatasetStatistics, FeatureStatistics
from hf_aegis.models import PaliGemmaFlowForAction, PaliGemmaFlowProcessor


@pytest.fixture(scope="module")
def statistics():
    generator = np.random.default_rng(0)
    state = generator.normal(size=(200, 9)) * np.linspace(0.1, 2.0, 9)
    actions = generator.normal(size=(200, 7)) * 0.3 + 0.1
    return DatasetStatistics(
        FeatureStatistics.from_samples("state", state), FeatureStatistics.from_samples("actions", actions)
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    expert = {"expert_hidden_size": 32, "expert_num_layers": 1, "expert_num_heads": 2, "expert_intermediate_size": 48}
    model = PaliGemmaFlowForAction.from_vlm(
        EMBEDDED_VLM, dtype=torch.float32, chunk_size=4, num_inference_steps=3, **expert
    )
    with torch.no_grad():
        for parameter in model.action_expert.parameters():
            # As initialised, the expert hardly looks at anything.
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def processor(statistics):
    return PaliGemmaFlowProcessor.from_vlm_processor(
        EMBEDDED_VLM, statistics=statistics, cameras=["agentview_rgb", "eye_in_hand_rgb"]
    )


@pytest.fixture(scope="module")
def policy(model, processor):
    return ModelPolicy(model, processor)


def observation(seed, step=0):
    generator = np.random.default_rng(seed)
    images = {
        name: generator.integers(256, size=(48, 48, 3), dtype=np.uint8)
        for name in ("eye_in_hand_rgb", "agentview_rgb")
    }
    widths = {"ee_pos": 3, "gripper_states": 2, "joint_states": 7}
    return Observation(images, {name: generator.normal(size=width) for name, width in widths.items()}, step)


def request(seed, step=0, instruction="pick up the milk", own=None):
    return PolicyRequest(instruction, observation(seed, step), seed if own is None else own)


def test_a_chunk_is_the_models_in_the_robots_units(policy, model, processor):
    asked = request(3, step=10)
    (chunk,) = policy.act_together([asked])
    seen = asked.observation
    state = np.concatenate([seen.proprioception["joint_states"], seen.proprioception["gripper_states"]])
    batch = processor(
        images=[[seen.images["agentview_rgb"], seen.images["eye_in_hand_rgb"]]],
        text=["pick up the milk"],
        state=state[None].astype(np.float32),
    )
    noise = torch.from_numpy(np.random.default_rng([3, 10]).standard_normal((1, 4, 7), dtype=np.float32))
    expected = processor.postprocess_actions(model.sample_actions(**batch, noise=noise))[0].double().numpy()
    np.testing.assert_allclose(chunk, expected, atol=1e-6)
    assert chunk.shape == (4, 7) and chunk.dtype == np.float64


def test_the_batch_matters_to_rounding_only(policy):
    requests = [request(0), request(1, 5, "pick up the black bowl and put it on the plate"), request(2)]
    together = policy.act_together(requests)
    for asked, chunk in zip(requests, together, strict=True):
        np.testing.assert_allclose(policy.act_together([asked])[0], chunk, atol=1e-4)
    assert policy.act_together([]) == []


@pytest.mark.parametrize("other", [request(0, own=1), request(0, step=5, own=0), request(0, 0, "open the drawer", 0)])
def test_seed_step_and_instruction_matter(policy, other):
    one, another = policy.act_together([request(0, own=0), other])
    assert np.abs(one - another).max() > 1e-3


def test_an_episode_is_the_same_asked_one_by_one(policy):
    policy.reset("pick up the milk", seed=5)
    chunk = policy.act(observation(0, step=8))
    (expected,) = policy.act_together([request(0, 8, own=5)])
    np.testing.assert_array_equal(chunk, expected)


def test_random_state_and_modes_stay(policy, model):
    model.train()
    before = torch.get_rng_state()
    policy.act_together([request(0)])
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    model.eval()


def test_an_answer_that_is_not_finite_is_a_policys_fault(policy, model, monkeypatch):
    broken = torch.zeros(2, 4, 7)
    broken[1, 2, 3] = torch.nan
    monkeypatch.setattr(model, "sample_actions", lambda **inputs: broken)
    good, bad = policy.act_together([request(0), request(1)])
    assert good.shape == (4, 7)
    assert isinstance(bad, PolicyError) and "action 2 of the chunk is nan in column 3" in str(bad)
    monkeypatch.setattr(model, "sample_actions", lambda **inputs: broken[1:])
    policy.reset("pick up the milk")
    with pytest.raises(PolicyError, match="is nan"):
        policy.act(observation(0))


@pytest.mark.parametrize(
    ("images", "proprioception", "message"),
    [
        ({"eye_in_hand_rgb": None}, {}, r"missing are images of \['eye_in_hand_rgb'\]"),
        ({}, {"joint_states": None}, r"made of \['joint_states', 'gripper_states'\]; missing are \['joint_states'\]"),
        ({}, {"joint_states": np.zeros(6)}, r"has shape \(9,\), found \(8,\)"),
        ({}, {"gripper_states": np.array([0.0, np.inf])}, "holds NaN or infinity"),
    ],
)
def test_observations_that_do_not_fit(policy, images, proprioception, message):
    seen = observation(0)
    changed = [
        {name: new.get(name, value) for name, value in old.items() if new.get(name, value) is not None}
        for old, new in ((seen.images, images), (seen.proprioception, proprioception))
    ]
    with pytest.raises(ValueError, match=message):
        policy.act_together([PolicyRequest("pick up the milk", Observation(*changed))])


def test_a_model_without_state_asks_for_none(model, processor):
    small = {name: value for name, value in _expert(model).items() if name != "num_inference_steps"}
    blind = PaliGemmaFlowForAction.from_vlm(EMBEDDED_VLM, dtype=torch.float32, use_state=False, **small).eval()
    torch.nn.init.normal_(blind.action_expert.action_out_proj.weight, std=0.1)
    policy = ModelPolicy(blind, processor)
    assert policy.state_features == ()
    seen = observation(0)
    (alone,) = policy.act_together([PolicyRequest("pick up the milk", Observation(seen.images))])
    (beside,) = policy.act_together([PolicyRequest("pick up the milk", seen)])
    np.testing.assert_array_equal(alone, beside)
    with pytest.raises(ValueError, match=r"takes no state \(use_state=False\), found state_features \['ee_pos'\]"):
        ModelPolicy(blind, processor, state_features=["ee_pos"])


def test_the_state_is_what_the_processor_says(model, statistics):
    order = ["gripper_states", "joint_states"]
    options = {"statistics": statistics, "cameras": ["agentview_rgb", "eye_in_hand_rgb"]}
    processor = PaliGemmaFlowProcessor.from_vlm_processor(EMBEDDED_VLM, **options, state_features=order)
    policy = ModelPolicy(model, processor)
    assert policy.state_features == tuple(order)
    seen = observation(0).proprioception
    turned = {"joint_states": np.r_[seen["gripper_states"], seen["joint_states"][:5]]}
    turned["gripper_states"] = seen["joint_states"][5:]
    usual = ModelPolicy(model, PaliGemmaFlowProcessor.from_vlm_processor(EMBEDDED_VLM, **options))
    same = PolicyRequest("pick up the milk", Observation(observation(0).images, turned), 0)
    np.testing.assert_array_equal(policy.act_together([request(0)])[0], usual.act_together([same])[0])
    with pytest.raises(ValueError, match=r"was made of \['gripper_states', 'joint_states'\] in training"):
        ModelPolicy(model, processor, state_features=["joint_states", "gripper_states"])
    with pytest.raises(ValueError, match=r"\['ee_pos', 'ee_ori'\] make 6 values, the model's state has 9"):
        ModelPolicy(model, usual.processor, state_features=["ee_pos", "ee_ori"])
    with pytest.raises(ValueError, match=r"unknown \['elbow'\]"):
        ModelPolicy(model, usual.processor, state_features=["elbow"])


def test_how_the_pictures_of_the_training_were_rendered(processor, statistics, tmp_path):
    processor.save_pretrained(tmp_path)
    assert trained_pictures(tmp_path) is None
    known = PictureSettings(64, 3, "fast")
    PaliGemmaFlowProcessor.from_vlm_processor(EMBEDDED_VLM, statistics, pictures=known).save_pretrained(tmp_path)
    assert trained_pictures(tmp_path) == known


def test_arguments_that_do_not_fit(model, processor, statistics):
    with pytest.raises(ValueError, match="has no statistics"):
        ModelPolicy(model, PaliGemmaFlowProcessor.from_vlm_processor(EMBEDDED_VLM))
    with pytest.raises(ValueError, match="needs a processor with a FAST tokenizer"):
        ModelPolicy(model, processor, head="fast")
    with pytest.raises(ValueError, match="act was called before reset"):
        ModelPolicy(model, processor).act(observation(0))


def test_it_loads_what_training_leaves(policy, model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = ModelPolicy.from_pretrained(tmp_path)
    assert (loaded.chunk_size, list(loaded.cameras)) == (4, ["agentview_rgb", "eye_in_hand_rgb"])
    np.testing.assert_allclose(loaded.act_together([request(0)])[0], policy.act_together([request(0)])[0], atol=1e-6)
    with pytest.raises(ValueError, match="without an action expert: it cannot act"):
        ModelPolicy.from_pretrained(EMBEDDED_VLM)


def test_experts_that_cannot_be_merged_come_along(policy, model, processor, tmp_path):
    from hf_aegis.training.adapters import add_gse

    base = PaliGemmaFlowForAction.from_vlm(EMBEDDED_VLM, dtype=torch.float32, **_expert(model))
    base.load_state_dict(model.state_dict())
    trained = add_gse(base, {"r": 4, "num_experts": 2, "num_generalized": 1, "top_k": 1})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "gse" in name and parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    expected = ModelPolicy(trained.get_base_model(), processor).act_together([request(0)])[0]
    trained.save_pretrained(tmp_path / "adapter")
    trained.unload().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert np.abs(expected - policy.act_together([request(0)])[0]).max() > 1e-4
    np.testing.assert_allclose(
        ModelPolicy.from_pretrained(tmp_path).act_together([request(0)])[0], expected, atol=1e-5
    )


def _expert(model):
    names = ("chunk_size", "expert_hidden_size", "expert_num_layers", "expert_num_heads", "expert_intermediate_size")
    return {name: getattr(model.config, name) for name in (*names, "num_inference_steps")}

"""Every recipe of a training is parsed, checked, and run for two steps with model and data swapped for tiny ones."""

from pathlib import Path

import pytest
import yaml
from transformers import AutoProcessor

from hf_aegis.anchors import ActivationAnchor, SubspaceOptions
from hf_aegis.assets import EMBEDDED_VLM
from hf_aegis.cli.anchor import AnchorRecipe
from hf_aegis.cli.compare import CompareArguments
from hf_aegis.cli.conditions import check_runnable, resolve_anchors, resolve_conditions
from hf_aegis.cli.recipe import merged, option_types, parse_recipe, read_recipe
from hf_aegis.data.vqa import VQACollator, load_easy_vqa
from hf_aegis.training import AEGISConfig
from hf_aegis.training.adapters import LANGUAGE_MODEL_PROJECTIONS, TRAINED_IN_FULL
from hf_aegis.training.run import run_training
from hf_aegis.training.run_arguments import RunArguments
from hf_aegis.tuners.gse import GSEConfig


RECIPES = Path(__file__).parents[2] / "recipes"
PAPER = {
    # arXiv 2604.16067; what its text leaves open is marked as chosen in the recipes, and not checked here.
    "max_steps": 1500,
    "warmup_steps": 100,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "expert_ema_decay": 0.9999,
    "bf16": True,
    "activation_checkpointing": True,
    "lr_scheduler_type": "constant_with_warmup",
    "optim": "adamw_bnb_8bit",
    "frozen_modules": ["vision_tower"],
    "model": "google/paligemma2-3b-mix-224",
    "chunk_size": 50,
    "vqa_samples": 100,
}
CONDITIONS = sorted(path.stem for path in (RECIPES / "paligemma2_3b").glob("*.yaml") if path.stem != "shared")
COMPARISONS = ("compare_embedded", "ablations_embedded", "why_embedded", "study_embedded", "compare_paligemma2_3b")
EMBEDDED = {
    name: list(read_recipe(RECIPES / f"{name}.yaml", option_types([CompareArguments]))["conditions"])
    for name in ("compare_embedded", "ablations_embedded", "why_embedded", "study_embedded")
}
# One for each kind of thing that the conditions on PaliGemma2-3B do not run: a frozen language model, an anchor of one
# kind of token, one projection of all layers, the penalty as a loss, an anchor of demonstrations, a projected update,
# whole subspaces held softly.
REPRESENTATIVE = {
    ("compare_embedded", "stop_gradient"),
    ("ablations_embedded", "aegis_image_tokens"),
    ("ablations_embedded", "aegis_global"),
    ("ablations_embedded", "transport_loss"),
    ("why_embedded", "aegis_robot_restoring_100"),
    ("why_embedded", "aegis_update"),
    ("study_embedded", "subspace_soft"),
}
# Splits that the sets have, as their Hub pages and readers list them, with the images that they are about.
SPLITS = {
    ("easy-vqa", "train"): "easy-VQA train",
    ("easy-vqa", "test"): "easy-VQA test",
    ("demonstrations", "train"): "embedded demonstrations",
    ("lmms-lab/VQAv2", "validation"): "COCO val2014",
    ("lmms-lab/VQAv2", "testdev"): "COCO test2015",
    ("lmms-lab/VQAv2", "test"): "COCO test2015",
    ("lmms-lab/OK-VQA", "val2014"): "COCO val2014",
    ("Multimodal-Fatima/VQAv2_train", "train"): "COCO train2014",
}
# What a test machine has none of, or no time for. The recipes' precision, optimiser and accumulation stay.
SWAPPED = {
    "model": None,
    "use_cpu": True,
    "max_steps": 2,
    "chunk_size": 4,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 8,
    "expert": {
        "expert_hidden_size": 16,
        "expert_num_layers": 1,
        "expert_num_heads": 2,
        "expert_intermediate_size": 32,
    },
    "vqa_dataset": "easy-vqa",
    "vqa_split": "test",
    "vqa_final_dataset": "easy-vqa",
    "vqa_final_split": "test",
    "vqa_samples": 3,
    "vqa_final_samples": 3,
    "replay_dataset": "easy-vqa",
    "replay_samples": 6,
    "fisher_samples": 2,
    "action_samples": 2,
    "analysis_samples": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "no",
    "disable_tqdm": True,
}


def parse(path, *words):
    return parse_recipe([RunArguments, AEGISConfig], ["--config", str(path), "--use_cpu", "True", *words])


def resolve(comparison):
    """What `hf-aegis compare` makes of its recipe: conditions and anchors."""
    path = RECIPES / f"{comparison}.yaml"
    asked = CompareArguments(**read_recipe(path, option_types([CompareArguments])))
    anchors = asked.anchors or {}
    # On a machine without a GPU bf16 has to be asked for on the CPU.
    conditions = resolve_conditions(asked.conditions, asked.shared or {}, {"use_cpu": True}, anchors, path)
    return conditions, resolve_anchors(anchors, conditions, path)


@pytest.fixture(scope="session")
def make_anchor_folder(make_flow_model, tmp_path_factory):
    """A folder with an anchor from a few questions, by the policies of an anchor's recipe."""

    def make(policies):
        collator = VQACollator(AutoProcessor.from_pretrained(EMBEDDED_VLM))
        samples = load_easy_vqa("train", 8, seed=0)
        batches = [collator(samples[:4]), collator(samples[4:])]
        chosen = {name: policies[name] for name in ("moments", "tokens") if name in policies}
        if policies.get("subspaces"):
            modules = tuple(policies.get("subspace_modules", AnchorRecipe().subspace_modules))
            sensitivity = policies.get("sensitivity", False)
            chosen["subspaces"] = SubspaceOptions(modules=modules, sensitivity=sensitivity)
        anchor = ActivationAnchor.collect(make_flow_model(), batches, progress=False, **chosen)
        return str(anchor.save_pretrained(tmp_path_factory.mktemp("anchor")))

    return make


@pytest.fixture
def train(demonstrations, tmp_path):
    """Runs a recipe, some of its values swapped."""

    def run(recipe, **changes):
        path = tmp_path / "recipe.yaml"
        changes |= {"demonstrations": [demonstrations], "output_dir": str(tmp_path / "out")}
        if recipe.get("fast"):
            changes["fast"] = {"vocab_size": 400}
        if recipe.get("certificate_samples"):
            changes["certificate_samples"] = 2
        path.write_text(yaml.safe_dump(merged(recipe, SWAPPED, changes)))
        return run_training(*parse(path))

    return run


def read(path):
    return read_recipe(path, option_types([RunArguments, AEGISConfig]))


def anchor_recipe(folder):
    """The recipe that writes an anchor to a folder of outputs/."""
    return RECIPES / f"{Path(folder).name}.yaml"


def test_there_is_a_recipe_for_every_condition_of_the_comparison():
    comparison = yaml.safe_load((RECIPES / "compare_paligemma2_3b.yaml").read_text())
    assert sorted(comparison["conditions"]) == CONDITIONS
    for name, path in comparison["conditions"].items():
        assert path == f"paligemma2_3b/{name}.yaml"
    assert set(CONDITIONS) <= {*EMBEDDED["compare_embedded"], *EMBEDDED["study_embedded"]}


@pytest.mark.parametrize("name", [*CONDITIONS, "shared"])
def test_every_value_is_marked(name):
    for line in (RECIPES / "paligemma2_3b" / f"{name}.yaml").read_text().splitlines():
        key, _, value = line.partition(":")
        holds_others = not value.split("#")[0].strip()
        if line.strip() and not line.startswith("#") and key not in ("extends", "output_dir") and not holds_others:
            assert "(paper)" in line or "(chosen)" in line, line


@pytest.mark.parametrize("condition", CONDITIONS)
def test_values_of_the_paper(condition):
    run, args = parse(RECIPES / "paligemma2_3b" / f"{condition}.yaml")
    run.check()
    for name, value in PAPER.items():
        assert getattr(run if hasattr(run, name) else args, name) == value, name
    assert run.expert["flow_loss_scale"] == 10.0
    assert run.expert.get("flow_gradient_to_vlm", True) is (condition != "stop_gradient_fast")
    assert (run.lora is not None) == condition.endswith("lora")
    if run.lora:
        assert (run.lora["r"], run.lora["lora_alpha"]) == (16, 32)
        assert run.lora["target_modules"] == LANGUAGE_MODEL_PROJECTIONS
        assert run.lora["modules_to_save"] == list(TRAINED_IN_FULL)
    assert (run.gse is not None) == condition.endswith("vla_gse")
    if run.gse:
        experts = GSEConfig(**run.gse)
        found = experts.r, experts.num_experts, experts.num_generalized, experts.top_k
        assert found == (16, 8, 1, 2)
        assert (experts.rho, experts.eta, experts.base_scale, experts.router_aux_loss_coef) == (10, 1, 2, 0.01)
        assert experts.target_modules == LANGUAGE_MODEL_PROJECTIONS
        assert experts.modules_to_save == list(TRAINED_IN_FULL)
    if condition == "stop_gradient_fast":
        _, naive = parse(RECIPES / "paligemma2_3b" / "naive.yaml")
        assert args.learning_rate < naive.learning_rate
    assert (run.anchor is not None) == args.needs_anchor
    # Weights in bfloat16 would lose most of their updates to rounding.
    assert run.dtype == "float32"


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_recipe_of_the_paper_runs(condition, train, make_anchor_folder):
    recipe = read(RECIPES / "paligemma2_3b" / f"{condition}.yaml")
    changes = {}
    if "anchor" in recipe:
        changes["anchor"] = make_anchor_folder(yaml.safe_load(anchor_recipe(recipe["anchor"]).read_text()))
    # Spectra and hidden states are measured alike whatever is trained.
    analysis_samples = 2 if condition == "aegis" else 0
    result = train(recipe, gradient_accumulation_steps=2, analysis_samples=analysis_samples, **changes)
    assert result["flow_mse"] > 0
    assert result["skipped_steps"] == 0


@pytest.mark.parametrize("condition", ["aegis", "pairs_90"])
def test_the_anchor_is_of_the_model_that_trains(condition):
    run, args = parse(RECIPES / "paligemma2_3b" / f"{condition}.yaml")
    anchor = AnchorRecipe(**yaml.safe_load(anchor_recipe(run.anchor).read_text()))
    assert (anchor.model, anchor.dtype, anchor.output_dir) == (run.model, run.dtype, run.anchor)
    assert (anchor.dataset, anchor.split) == (run.replay_dataset, run.replay_split)
    assert (anchor.subspaces, anchor.sensitivity) == (args.holds_subspaces, args.subspace_sensitivity is not None)
    if condition == "aegis":
        assert anchor.num_samples == run.replay_samples


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_nothing_is_learned_from_images_that_are_asked_about(comparison):
    conditions, anchors = resolve(comparison)
    if comparison == "compare_paligemma2_3b":
        used = {recipe["anchor"] for recipe in conditions.values() if "anchor" in recipe}
        anchors = {folder: yaml.safe_load(anchor_recipe(folder).read_text()) for folder in used}
    learned = {(anchor["dataset"], anchor["split"]) for anchor in anchors.values()}
    asked = set()
    for recipe in conditions.values():
        run = RunArguments(**{name: value for name, value in recipe.items() if hasattr(RunArguments, name)})
        learned.add((run.replay_dataset, run.replay_split))
        asked.add((run.vqa_dataset, run.vqa_split))
        asked.add((run.vqa_final_dataset or run.vqa_dataset, run.vqa_final_split or run.vqa_split))
    assert learned | asked <= SPLITS.keys()
    assert {SPLITS[source] for source in learned}.isdisjoint(SPLITS[source] for source in asked)


def test_anchor_recipes_name_splits_that_exist():
    paths = sorted(RECIPES.glob("anchor_*.yaml"))
    assert len(paths) == 3
    for path in paths:
        recipe = AnchorRecipe(**read_recipe(path, option_types([AnchorRecipe])))
        assert (recipe.dataset, recipe.split) in SPLITS, path


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_a_comparison_could_start(comparison):
    conditions, anchors = resolve(comparison)
    check_runnable(conditions, RECIPES / f"{comparison}.yaml")
    assert "naive" in conditions
    assert {recipe["anchor"] for recipe in conditions.values() if "anchor" in recipe} >= anchors.keys()
    # Figures of drift and spectra compare all conditions; the study has none.
    expected = {None} if comparison == "study_embedded" else {64}
    assert {recipe.get("analysis_samples") for recipe in conditions.values()} == expected


def test_the_embedded_comparisons_share_their_settings():
    compared, anchors = resolve("compare_embedded")
    ablated, explained = {}, {}
    for conditions, recipe in ((ablated, "ablations_embedded"), (explained, "why_embedded")):
        found, more_anchors = resolve(recipe)
        conditions |= found
        assert more_anchors.items() >= anchors.items()
        # Both were run on the CPU; the later one with autocast.
        precision = {"use_cpu": True, "bf16": True} if recipe == "why_embedded" else {}
        for name in ("naive", "aegis"):
            assert conditions[name] == compared[name] | precision, name
    shared = yaml.safe_load((RECIPES / "embedded_shared.yaml").read_text())["shared"]
    for recipe in (*compared.values(), *ablated.values()):
        changed = {key for key, value in shared.items() if recipe[key] != value}
        assert changed <= {"learning_rate", "expert"}
        assert recipe["expert"].items() >= shared["expert"].items()


@pytest.mark.parametrize("name", [name for name in EMBEDDED["ablations_embedded"] if name not in ("naive", "aegis")])
def test_an_ablation_differs_in_one_part(name):
    conditions, _ = resolve("ablations_embedded")
    defaults = {"granularity": "layer", "projection_eps": 1e-12, "penalties": None}
    own, aegis = ({**defaults, **conditions[key], "neuron_cosine_steps": 0} for key in (name, "aegis"))
    changed = {key for key in own.keys() | aegis.keys() if own.get(key) != aegis.get(key)}
    # Without a projection the penalty is a term of the loss.
    assert changed in ({"anchor"}, {"granularity"}, {"projection_eps"}, {"preserve", "penalties"})


@pytest.mark.parametrize(
    ("condition", "written_out"),
    [("aegis", {"dual_backward": "streaming", "granularity": "layer"}), ("vla_gse", {})],
)
def test_the_embedded_recipe_is_the_condition_of_the_comparison(condition, written_out):
    own = read(RECIPES / f"embedded_{condition}.yaml")
    conditions, _ = resolve("compare_embedded")
    apart = ("output_dir", "seed", "anchor", "use_cpu")
    # Neither replays anything.
    expected = {**written_out, **conditions[condition]}
    expected.pop("replay_samples")
    assert {k: v for k, v in own.items() if k not in apart} == {k: v for k, v in expected.items() if k not in apart}


@pytest.mark.parametrize(
    ("comparison", "condition"),
    [
        pytest.param(comparison, name, marks=() if (comparison, name) in REPRESENTATIVE else pytest.mark.slow)
        for comparison, names in EMBEDDED.items()
        for name in names
    ],
)
def test_an_embedded_condition_runs(comparison, condition, train, make_anchor_folder):
    conditions, anchors = resolve(comparison)
    recipe = conditions[condition]
    changes = {"anchor": make_anchor_folder(anchors[recipe["anchor"]])} if "anchor" in recipe else {}
    result = train(recipe, **changes)
    assert result["flow_mse"] > 0
    assert result["skipped_steps"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, r"dtype must be one of \('float32', 'bfloat16', .*\), found 'int8'"),
        ({"vqa_final_samples": -1}, "vqa_final_samples must not be negative, found -1"),
        ({"vqa_seed": -1}, "vqa_seed must not be negative, found -1"),
        ({"replay_samples": 0}, "replay_samples must be at least 1, found 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, found 0"),
        ({"held_out_per_task": 0}, "held_out_per_task must be at least 1, found 0"),
        (
            {"expert": {"expert_widht": 3}},
            "expert: unknown key 'expert_widht', expected some of .*'expert_hidden_s",
        ),
        ({"expert": {"chunk_size": 3}}, "expert: unknown key 'chunk_size'"),
        ({"expert": {"hidden_size": 3}}, "expert: unknown key 'hidden_size'"),
        ({"expert": {"expert_hidden_size": 15}}, "expert: expert_hidden_size must be even, found 15"),
        ({"expert": {"expert_num_layers": "3"}}, "expert: Field 'expert_num_layers' expected int"),
        ({"lora": {"rank": 3}}, "lora: unknown key 'rank', expected some of .*'r'"),
        ({"lora": {"r": 0}}, "lora: r must be an integer of at least 1, found 0"),
        ({"lora": {"lora_alpha": "32"}}, "lora: lora_alpha must be a positive number, found '32'"),
        ({"lora": {"lora_dropout": 1}}, r"lora: lora_dropout must be a number in \[0, 1\), found 1"),
        ({"lora": {"task_type": "x"}}, "lora: Invalid task type: 'x'"),
        ({"fast": {"vocabulary": 3}}, r"fast: unknown key 'vocabulary', expected some of \['scale', 'vocab_size'\]"),
        ({"fast": {"vocab_size": 0}}, "fast: vocab_size must be an integer of at least 1, found 0"),
        ({"fast": {"scale": float("nan")}}, "fast: scale must be a positive number, found nan"),
    ],
)
def test_wrong_arguments_are_refused_early(changes, message):
    with pytest.raises(ValueError, match=message):
        RunArguments(**changes).check()


def test_empty_mappings_are_defaults():
    RunArguments(expert={}, lora={}, fast={}).check()
    RunArguments(gse={}).check()

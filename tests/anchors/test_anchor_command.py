import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, PaliGemmaProcessor, PreTrainedTokenizerFast
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from hf_aegis.anchors import ActivationAnchor
from hf_aegis.anchors.moments_observer import MomentsObserver
from hf_aegis.assets import DEMONSTRATIONS
from hf_aegis.cli import anchor as command
from hf_aegis.cli import main
from hf_aegis.cli.command_parser import CommandParser
from hf_aegis.hub import push_folder


# The PaliGemma processor of transformers hands NumPy a tensor, whose `__array__` knows no `copy`.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def tiny_vlm(tmp_path_factory, build_model):
    """A folder with a tiny random PaliGemma2 and a word-level processor."""
    folder = tmp_path_factory.mktemp("models") / "tiny-vlm"
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", "answer", "en", "what", "is", "red", "blue"]
    words += [f"<filler{index}>" for index in range(60 - len(words))]  # so that <image> gets the model's image token
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 4
    processor = PaliGemmaProcessor(images, fast)
    assert processor.image_token_id == 60
    model = build_model("paligemma2")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A folder with a data set of 6 questions, two of them about greyscale images."""
    folder = tmp_path_factory.mktemp("data")
    pixels = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), dtype=np.uint8)
    images = [Image.fromarray(array).convert("L" if index < 2 else "RGB") for index, array in enumerate(pixels)]
    rows = {"image": images, "question": ["what is red"] * 6, "best": ["red", "blue"] * 3, "all": [["red"]] * 6}
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "best": datasets.Value("string"),
            "all": datasets.List(datasets.Value("string")),
        }
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture(autouse=True)
def no_pause_between_streams(monkeypatch):
    """`datasets` sleeps for seconds when a stream ends."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def parse(*options):
    return CommandParser(configure=command.configure).parse_args([str(option) for option in options])


def test_easy_vqa_anchor_is_collected_saved_and_fits(tiny_vlm, tmp_path, capsys):
    output_dir = tmp_path / "anchor"
    options = ("--model", tiny_vlm, "--num_samples", 7, "--batch_size", 3, "--output_dir", output_dir)
    assert command.run(parse("--config", RECIPES / "anchor_easy_vqa.yaml", *options)) == 0
    anchor = ActivationAnchor.from_pretrained(output_dir)
    assert (anchor.fingerprint.num_samples, anchor.fingerprint.num_batches) == (7, 3)
    assert anchor.fingerprint.dataset_id == "easy-vqa:train"
    assert anchor.fingerprint.base_model == "tiny-vlm"
    model = AutoModelForImageTextToText.from_pretrained(tiny_vlm, attn_implementation="eager")
    anchor.check_compatible(model)
    recipe = yaml.safe_load((output_dir / "recipe.yaml").read_text())
    assert (recipe["model"], recipe["num_samples"], recipe["moments"]) == (str(tiny_vlm), 7, "batch")
    assert "num_samples=7" in capsys.readouterr().out


def test_the_resolved_recipe_repeats_the_run(tiny_vlm, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    command.run(parse("--model", tiny_vlm, "--num_samples", 4, "--moments", "pooled", "--output_dir", first))
    command.run(parse("--config", first / "recipe.yaml", "--output_dir", second))
    assert ActivationAnchor.from_pretrained(first) == ActivationAnchor.from_pretrained(second)


def test_an_interrupted_collection_continues(tiny_vlm, tmp_path, monkeypatch, capsys):
    options = ["anchor", "--model", str(tiny_vlm), "--num_samples", "9", "--batch_size", "2", "--save_batches", "2"]
    expected, folder = tmp_path / "expected", tmp_path / "anchor"
    assert main([*options, "--output_dir", str(expected)]) == 0
    seen = []
    reduce = MomentsObserver.batch_moments

    def interrupted(self, number):
        seen.append(number)
        if seen == [0, 1, 2]:
            raise KeyboardInterrupt
        return reduce(self, number)

    monkeypatch.setattr(MomentsObserver, "batch_moments", interrupted)
    assert main([*options, "--output_dir", str(folder)]) == 130
    assert "start it again to continue" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["partial"]
    assert main([*options, "--output_dir", str(folder), "--seed", "1"]) == 2
    assert "was begun with other settings (seed: found 0, expected 1)" in capsys.readouterr().err
    # Neither these nor where it runs matter to what is collected.
    assert main([*options, "--output_dir", str(folder), "--save_batches", "5", "--device", "cpu"]) == 0
    assert seen == [0, 1, 2, 2, 3, 4], "from the last batch that was saved on"
    assert ActivationAnchor.from_pretrained(folder) == ActivationAnchor.from_pretrained(expected)
    assert not (folder / "partial").exists()


def test_an_anchor_is_pushed_where_that_is_asked_for(hub, tiny_vlm, questions, tmp_path, capsys):
    options = ("--model", tiny_vlm, "--num_samples", 4, "--output_dir", tmp_path / "anchor")
    push = ("--push_to_hub", "org/tiny-anchor", "--private", "true", "--hub_revision", "v1")
    assert command.run(parse(*options, *push)) == 0
    repository = hub.repo("org/tiny-anchor", "dataset")
    assert repository.private
    assert set(repository.files("v1")) == {"README.md", "anchor.safetensors", "anchor_config.json", "layers.jsonl"}
    anchor = ActivationAnchor.from_pretrained("org/tiny-anchor", revision="v1")
    assert anchor == ActivationAnchor.from_pretrained(tmp_path / "anchor")
    (repeating,) = parse("--config", tmp_path / "anchor" / "recipe.yaml").recipe
    assert repeating.push_to_hub is None
    assert "license: mit" in repository.files("v1")["README.md"].decode(), "that of easy-vqa"
    assert f"pushed: {hub.url}/datasets/org/tiny-anchor/commit/" in capsys.readouterr().out
    answers = ("--dataset", questions, "--answer_column", "best", "--dataset_license", "cc-by-4.0")
    command.run(parse(*options, *answers, "--push_to_hub", "org/tiny-anchor"))
    for content in repository.files().values():
        assert not any(str(path).encode() in content for path in (tmp_path, tiny_vlm, questions))
    assert "license: cc-by-4.0" in repository.files()["README.md"].decode()


def test_the_commit_of_a_model_on_the_hub_is_recorded(hub, tiny_vlm, tmp_path):
    commit = push_folder(tiny_vlm, "org/vlm").oid
    hub.repo("org/vlm").replace("config.json", b"{}")
    options = ("--model", "org/vlm", "--revision", commit, "--num_samples", 4, "--output_dir", tmp_path / "anchor")
    command.run(parse(*options))
    fingerprint = ActivationAnchor.from_pretrained(tmp_path / "anchor").fingerprint
    assert (fingerprint.base_model, fingerprint.revision) == ("org/vlm", commit)
    hub.repo("org/vlm").replace("config.json", (tiny_vlm / "config.json").read_bytes())
    command.run(parse(*options[:2], *options[4:]))
    newest = ActivationAnchor.from_pretrained(tmp_path / "anchor").fingerprint
    assert (newest.revision, newest.weights_sha256) == (
        hub.repo("org/vlm").branches["main"],
        fingerprint.weights_sha256,
    )


def test_the_licence_of_the_data_is_told_by_whoever_pushes_later(hub, tiny_vlm, questions, tmp_path, capsys):
    for name, answers in (("easy", ()), ("own", ("--dataset", questions, "--answer_column", "best"))):
        command.run(parse("--model", tiny_vlm, "--num_samples", 4, *answers, "--output_dir", tmp_path / name))
    pushes = (("easy", (), "license: mit"), ("own", ("--dataset_license", "cc-by-4.0"), "license: cc-by-4.0"))
    for name, options, expected in pushes:
        assert main(["push", str(tmp_path / name), f"org/{name}", *options]) == 0
        assert expected in hub.repo(f"org/{name}", "dataset").files()["README.md"].decode()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert main(["push", str(tmp_path / "model"), "org/model", "--dataset_license", "mit"]) == 2
    assert "--dataset_license is for the card of an anchor" in capsys.readouterr().err


def test_a_card_of_one_s_own_is_kept_and_nothing_else_of_the_folder_is_pushed(hub, tiny_vlm, tmp_path):
    folder = tmp_path / "anchor"
    command.run(parse("--model", tiny_vlm, "--num_samples", 4, "--output_dir", folder))
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    assert main(["push", str(folder), "org/tiny-anchor", "--keep_card"]) == 0
    files = hub.repo("org/tiny-anchor", "dataset").files()
    assert set(files) == {"README.md", "anchor.safetensors", "anchor_config.json", "layers.jsonl"}
    assert files["README.md"].endswith(b"mine\n")
    assert main(["push", str(folder), "org/tiny-anchor"]) == 0
    assert b"# Activation anchor of tiny-vlm" in hub.repo("org/tiny-anchor", "dataset").files()["README.md"]


def test_a_push_that_cannot_succeed_is_refused_at_once_and_one_that_fails_later_loses_nothing(hub, tiny_vlm, tmp_path):
    options = ("--model", tiny_vlm, "--num_samples", 4, "--output_dir", tmp_path / "anchor")
    with pytest.raises(OSError, match="nothing can be pushed to the dataset repository elsewhere/name: "):
        command.run(parse(*options, "--push_to_hub", "elsewhere/name"))
    for more, message in (
        (("--hub_revision", "0a" * 20), "must be a branch to push to"),
        (("--hub_revision", "v1", "--create_pr", "true"), "a pull request goes to the main branch"),
    ):
        with pytest.raises(ValueError, match=message):
            command.run(parse(*options, "--push_to_hub", "org/name", *more))
    assert not (tmp_path / "anchor").exists()
    hub.fail_next("POST", "/commit/")
    with pytest.raises(OSError, match=rf"{tmp_path / 'anchor'} was not pushed .*`hf upload org/name"):
        command.run(parse(*options, "--push_to_hub", "org/name"))
    assert ActivationAnchor.from_pretrained(tmp_path / "anchor").fingerprint.num_samples == 4
    assert hub.repo("org/name", "dataset").files() == {}


def test_anchors_are_compared_and_merged(tiny_vlm, tmp_path, capsys):
    for name, seed in (("first", 0), ("second", 1)):
        options = ("--model", tiny_vlm, "--num_samples", 4, "--moments", "pooled", "--seed", seed)
        command.run(parse(*options, "--output_dir", tmp_path / name))
    first, second = (ActivationAnchor.from_pretrained(tmp_path / name) for name in ("first", "second"))
    capsys.readouterr()
    assert main(["anchor", "compare", str(tmp_path / "first"), str(tmp_path / "second")]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines[-first.num_layers :]]
    assert [row[0] for row in table] == ["0", "1", "2"]
    assert [float(row[1]) for row in table] == pytest.approx(first.distance(second).tolist(), rel=1e-3)
    assert [float(row[2]) + float(row[3]) for row in table] == pytest.approx(
        [float(row[1]) for row in table], rel=1e-3
    )
    assert any(line.startswith("num_tokens") for line in lines)
    merged = ["anchor", "merge", str(tmp_path / "first"), str(tmp_path / "second")]
    assert main([*merged, "--output_dir", str(tmp_path / "merged")]) == 0
    assert ActivationAnchor.from_pretrained(tmp_path / "merged") == ActivationAnchor.merge([first, second])
    assert main(["anchor", "compare", str(tmp_path / "first"), str(tmp_path / "first")]) == 0
    assert "the fingerprints agree" in capsys.readouterr().out


def test_one_kind_of_tokens(tiny_vlm, tmp_path):
    options = ("--model", tiny_vlm, "--num_samples", 4, "--tokens", "image", "--output_dir", tmp_path)
    command.run(parse(*options))
    fingerprint = ActivationAnchor.from_pretrained(tmp_path).fingerprint
    assert (fingerprint.tokens, fingerprint.num_tokens) == ("image", 4 * 4)
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["tokens"] == "image"


def test_subspaces_are_collected_where_they_are_asked_for(tiny_vlm, tmp_path):
    options = ("--model", tiny_vlm, "--num_samples", 4, "--output_dir", tmp_path, "--subspaces", "true")
    command.run(parse(*options, "--subspace_energy", 0.9, "--subspace_dtype", "bfloat16"))
    anchor = ActivationAnchor.from_pretrained(tmp_path)
    assert {"model.multi_modal_projector.linear", "layers.0.mlp.down_proj"} < set(anchor.subspaces)
    assert all(space.energy_share >= 0.9 for space in anchor.subspaces.values())
    assert {space.basis.dtype for space in anchor.subspaces.values()} == {torch.bfloat16}


def test_sensitivities_are_to_the_answers(tiny_vlm, tmp_path):
    options = ("--model", tiny_vlm, "--num_samples", 4, "--batch_size", 3, "--output_dir", tmp_path)
    options += ("--subspaces", "true", "--sensitivity", "true", "--sensitivity_temperature", 2, "--max_output_rank", 5)
    command.run(parse(*options))
    anchor = ActivationAnchor.from_pretrained(tmp_path)
    assert (anchor.fingerprint.subspace_options.temperature, anchor.fingerprint.num_batches) == (2.0, 2)
    projector = anchor.sensitivities["model.multi_modal_projector.linear"]
    assert projector.output_rank == 5
    assert float(projector.sensitivities.max()) > 0
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["sensitivity"] is True


def test_a_folder_of_questions_is_collected(tiny_vlm, questions, tmp_path):
    options = ["--model", tiny_vlm, "--dataset", questions, "--answer_column", "best", "--batch_size", 2]
    options += ["--output_dir", tmp_path, "--dtype", "bfloat16"]
    command.run(parse(*options, "--num_samples", 6))
    anchor = ActivationAnchor.from_pretrained(tmp_path)
    # 6 × (4 image tokens, beginning of sentence, "answer en what is red", line break, answer, end of sentence)
    assert anchor.fingerprint.num_tokens == 6 * (4 + 1 + 5 + 1 + 1 + 1)
    assert anchor.fingerprint.dtype == "bfloat16"
    assert torch.isfinite(anchor.mean).all()


def test_what_a_robot_sees_and_is_told_is_collected(tmp_path):
    options = ("--batch_size", 2, "--num_samples", 4, "--output_dir", tmp_path / "anchor")
    command.run(parse("--dataset", "demonstrations", *options))
    anchor = ActivationAnchor.from_pretrained(tmp_path / "anchor")
    assert (anchor.fingerprint.dataset_id, anchor.fingerprint.num_samples) == ("demonstrations:train", 4)
    # Two cameras, 64 image tokens each, and an instruction.
    assert 4 * 128 < anchor.fingerprint.num_tokens < 4 * 160
    command.run(parse("--dataset", DEMONSTRATIONS, *options[:-1], tmp_path / "same"))
    assert torch.equal(ActivationAnchor.from_pretrained(tmp_path / "same").mean, anchor.mean)
    with pytest.raises(ValueError, match=r"split 'held_out', gave \d+ samples, but num_samples is 3000"):
        command.run(parse("--dataset", "demonstrations", "--split", "held_out"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--answer_column", "best", "--num_samples", 9), "between 1 and the 6 questions of .*; found 9"),
        (("--answer_column", "nothing", "--num_samples", 2), r"no column 'nothing' for 'answer'; found .*'all'"),
        (("--answer_column", "all", "--num_samples", 2), r"column 'all' must hold a text; found \['red'\]"),
    ],
)
def test_data_that_does_not_fit_is_refused(tiny_vlm, questions, tmp_path, options, message):
    base = ("--model", tiny_vlm, "--dataset", questions, "--batch_size", 2, "--output_dir", tmp_path / "anchor")
    with pytest.raises(ValueError, match=message):
        command.run(parse(*base, *options))
    assert not (tmp_path / "anchor").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("number_samples: 3", r"recipe\.yaml: unknown keys \['number_samples'\]"),
        ("num_samples: '3'", r"recipe\.yaml: key 'num_samples' is '3', expected int"),
        ("revision: 3", "key 'revision' is 3, expected str or null"),
        ("- model", r"recipe\.yaml: expected a mapping of options, found list"),
        ("model: [", r"recipe\.yaml: not valid YAML"),
        ("moments: exact", r"recipe\.yaml: key 'moments' is 'exact', expected 'batch' or 'pooled'"),
        ("tokens: pictures", "key 'tokens' is 'pictures', expected 'all' or 'image' or 'text'"),
        ("dtype: float16", "key 'dtype' is 'float16', expected 'float32' or 'bfloat16'"),
        ("batch_size: 0", "batch_size must be at least 1, found 0"),
        ("save_batches: 0", "save_batches must be at least 1, found 0"),
        ("num_workers: -1", "num_workers must be at least 0, found -1"),
        ("max_output_rank: 0", "max_output_rank must be at least 1, found 0"),
        ("sensitivity_temperature: 0.0", "sensitivity_temperature must be above 0 and finite, found 0"),
        ("private: true", "private is about what push_to_hub names, which is not set"),
        ("sensitivity: true", "sensitivity needs the subspaces that its pairs are of: set subspaces to true"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        parse("--config", path)


@pytest.mark.parametrize(
    ("name", "samples"),
    [("anchor_easy_vqa", 3000), ("anchor_paligemma2_3b_vqav2", 3000), ("anchor_paligemma2_3b_vqav2_pairs", 1000)],
)
def test_shipped_recipes_resolve_to_what_they_say(name, samples):
    path = RECIPES / f"{name}.yaml"
    (recipe,) = parse("--config", path).recipe
    assert recipe.num_samples == samples
    assert recipe.num_samples % recipe.batch_size == 0  # a smaller last batch would weigh as much as a full one
    assert recipe.attn_implementation == "eager"
    for key, value in yaml.safe_load(path.read_text()).items():
        assert getattr(recipe, key) == value


def test_the_command_line_wins_over_the_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"batch_size": 5, "moments": "pooled"}))
    (recipe,) = parse("--config", path, "--batch_size", 8).recipe
    assert (recipe.batch_size, recipe.moments, recipe.seed) == (8, "pooled", 0)

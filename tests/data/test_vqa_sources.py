import json

import numpy as np
import pytest
from PIL import Image

from hf_aegis.data import VQASamples, load_easy_vqa, load_vqa
from hf_aegis.data.vqa_columns import VQAColumns
from hf_aegis.data.vqa_samples import annotations


TEN = ["down", "down", "at table", "skateboard", "down", "table", "down", "down", "down", "down"]
IMAGES = [Image.fromarray(np.full((5, 7, 3), 40 * index, np.uint8)) for index in range(4)]


@pytest.fixture(scope="module")
def datasets():
    import datasets

    return datasets


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch, request):
    if "datasets" in request.fixturenames:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        request.getfixturevalue("datasets").disable_progress_bars()


def structures(datasets):
    return datasets.List(
        {
            "answer": datasets.Value("string"),
            "answer_confidence": datasets.Value("string"),
            "answer_id": datasets.Value("int64"),
        }
    )


def annotated(answers):
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": i + 1} for i, answer in enumerate(answers)]


def mirror(datasets, kind):
    """Features and one row, as the mirror's card describes them."""
    text, number, image = datasets.Value("string"), datasets.Value("int64"), datasets.Image()
    shared = {"question_type": text, "answer_type": text, "question": text, "image": image}
    row = {"question_type": "what", "answer_type": "other", "question": "Where is he looking?"}
    if kind in ("lmms-lab/VQAv2", "HuggingFaceM4/VQAv2"):
        features = {"multiple_choice_answer": text, "answers": structures(datasets), "image_id": number}
        features |= {"question_id": number}
        row |= {"multiple_choice_answer": "table", "answers": annotated(TEN), "image_id": 9, "question_id": 262148000}
    elif kind == "Multimodal-Fatima/VQAv2_test":
        features = {"multiple_choice_answer": text, "answers": datasets.List(text), "question_id": number}
        features |= {"answers_original": structures(datasets)}
        row |= {"multiple_choice_answer": "table", "answers": sorted(set(TEN)), "question_id": 262148000}
        row |= {"answers_original": annotated(TEN)}
    else:
        features = {"answers": datasets.List(text), "question_id": text}
        row |= {"answers": TEN, "question_id": "262148000"}
    return datasets.Features(shared | features), row


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("lmms-lab/VQAv2", "table"),
        ("HuggingFaceM4/VQAv2", "table"),
        ("Multimodal-Fatima/VQAv2_test", "table"),
        ("lmms-lab/OK-VQA", "down"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_mirrors_are_read_by_their_own_columns(datasets, tmp_path, kind, answer, streaming):
    features, row = mirror(datasets, kind)
    rows = [row | {"image": image, "question": f"{index}?"} for index, image in enumerate(IMAGES)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "set" / "validation.parquet")
    options = {"streaming": True, "max_samples": 4} if streaming else {}
    samples = load_vqa(str(tmp_path / "set"), "validation", **options)
    assert isinstance(samples, VQASamples)
    assert len(samples) == 4
    sample = samples[2]
    assert (sample.question, sample.answer, sample.answers) == ("2?", answer, tuple(TEN))
    assert (sample.question_type, sample.answer_type, sample.question_id) == ("what", "other", "262148000")
    assert np.array_equal(np.asarray(sample.image), np.asarray(IMAGES[2]))
    assert sample.name.startswith(f"{tmp_path}/set/validation/2")


def test_a_subset_of_a_dataset_is_shuffled_as_easy_vqa_is(datasets, tmp_path):
    features, row = mirror(datasets, "lmms-lab/OK-VQA")
    rows = [row | {"image": IMAGES[0], "question": f"{index}?"} for index in range(30)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "set")
    asked = [sample.question for sample in load_vqa(str(tmp_path / "set"), max_samples=7, seed=3)]
    order = np.random.default_rng(3).permutation(30)[:7]
    assert asked == [f"{index}?" for index in order]
    with pytest.raises(ValueError, match=r"between 1 and the 30 questions of .*; found 31"):
        load_vqa(str(tmp_path / "set"), max_samples=31)


def test_a_shuffled_stream_depends_on_the_seed_alone(datasets, tmp_path):
    features, row = mirror(datasets, "lmms-lab/OK-VQA")
    rows = [row | {"image": IMAGES[index % 4], "question": f"{index}?"} for index in range(40)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "set" / "train.parquet")

    def asked(seed):
        samples = load_vqa(str(tmp_path / "set"), max_samples=10, seed=seed, streaming=True)
        return [(sample.question, sample.image.getpixel((0, 0))) for sample in samples]

    first = asked(0)
    assert first == asked(0) != asked(1)
    assert len(set(first)) == 10
    # From about the first 20, each with its own image.
    assert {int(question[:-1]) for question, _ in first} - set(range(10))
    assert all(pixel == IMAGES[int(question[:-1]) % 4].getpixel((0, 0)) for question, pixel in first)


CONFIGS = """---
configs:
- {config_name: first, default: true, data_files: first/*.parquet}
- {config_name: second, data_files: second/*.parquet}
---
"""


@pytest.mark.parametrize("options", [{}, {"streaming": True, "max_samples": 1}])
def test_a_dataset_may_have_configurations(datasets, tmp_path, options):
    features, row = mirror(datasets, "lmms-lab/OK-VQA")
    for name in ("first", "second"):
        rows = [row | {"image": IMAGES[0], "question": name}]
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "set" / name / "train.parquet")
    (tmp_path / "set" / "README.md").write_text(CONFIGS)
    source = str(tmp_path / "set")
    found = [load_vqa(source, config=name, **options)[0].question for name in (None, "first", "second")]
    assert found == ["first", "first", "second"]


def test_what_lies_on_this_machine_takes_no_revision(datasets, tmp_path, folder):
    source = write(folder, {"image": "images/0.png", "question": "?", "answer": "a"})
    for options in ({"revision": "main"}, {"config": "small"}, {"streaming": True}):
        with pytest.raises(ValueError, match="with JSON lines: it takes no revision, config or streaming"):
            load_vqa(source, **options)
    saved = str(tmp_path / "saved")
    datasets.Dataset.from_dict({"question": ["?"]}).save_to_disk(saved)
    with pytest.raises(ValueError, match="was saved to disk: it takes no config"):
        load_vqa(saved, config="small")
    with pytest.raises(ValueError, match="lies on this machine: it takes no revision"):
        load_vqa(saved, revision="main")


def test_columns_can_be_named_and_left_out(datasets, tmp_path):
    rows = [{"picture": IMAGES[1], "q": "what?", "labels": ["a", "b"], "truth": "b", "answers": ["a", "b"]}]
    features = {"picture": datasets.Image(), "q": datasets.Value("string"), "truth": datasets.Value("string")}
    features |= {name: datasets.List(datasets.Value("string")) for name in ("labels", "answers")}
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(
        tmp_path / "set" / "train.parquet"
    )
    source, columns = str(tmp_path / "set"), {"image": "picture", "question": "q", "answer": "truth", "answers": None}
    (sample,) = load_vqa(source, columns=columns)
    assert (sample.question, sample.answer, sample.answers) == ("what?", "b", None)
    with pytest.raises(ValueError, match=r"no column for 'image'; found the columns \['answers', 'labels', 'pict"):
        load_vqa(source)
    with pytest.raises(ValueError, match=r"no column 'truht' for 'answer'; found the columns"):
        load_vqa(source, columns=columns | {"answer": "truht"})
    with pytest.raises(ValueError, match=r"unknown fields \['anser'\]"):
        load_vqa(source, columns={"anser": "truth"})
    with pytest.raises(ValueError, match=r"column 'q' must hold images; found Value"):
        load_vqa(source, columns=columns | {"image": "q"})
    with pytest.raises(ValueError, match=r"has the splits \['train'\]; found split='test'"):
        load_vqa(source, "test", columns=columns)
    with pytest.raises(ValueError, match="streaming needs max_samples"):
        load_vqa(source, columns=columns, streaming=True)
    with pytest.raises(ValueError, match="max_samples is 2; found 1 questions"):
        load_vqa(source, max_samples=2, columns=columns, streaming=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"answers": ["yes"] * 3}, r"row: column 'answers' must hold the answers of at least 4 annotators"),
        ({"answers": "yes"}, r"row: column 'answers' must hold a list of texts, .* found 'yes'"),
        ({"answers": [1, 2, 3, 4]}, r"row: column 'answers' must hold a list of texts"),
        ({"answers": None}, r"row: no value in column 'answer'"),
        ({"answer": 3}, r"row: column 'answer' must hold a text; found 3"),
        ({"answer": " "}, r"row: column 'answer' must hold a text; found ' '"),
        ({"question": None, "answer": "yes"}, r"row: column 'question' must hold a text; found None"),
    ],
)
def test_an_unusable_row_is_named(values, message):
    columns = VQAColumns("image", "question", "answer", "answers")
    with pytest.raises(ValueError, match=message):
        columns.annotation({"question": "is it?"} | values, "row")


def test_structures_of_lists_and_lists_of_structures_are_the_same():
    columns = VQAColumns("image", "question", None, "answers")
    for answers in (annotated(TEN), {"answer": TEN, "answer_id": list(range(10))}, TEN):
        assert columns.annotation({"question": "?", "answers": answers}, "row").answers == tuple(TEN)


def write(folder, *lines, split="test"):
    folder.mkdir(exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / f"{split}.jsonl").write_text(text + "\n")
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set" / "images").mkdir(parents=True)
    for index, image in enumerate(IMAGES):
        image.save(tmp_path / "set" / "images" / f"{index}.png")
    return tmp_path / "set"


def test_a_folder_of_images_and_json_lines(folder):
    first = {"image": "images/1.png", "question": "is it?", "answer": "yes", "question_type": "is", "extra": [1]}
    Image.new("L", (3, 3), 9).save(folder / "grey.png")
    second = {"image": "grey.png", "question": "what?", "answers": TEN, "question_id": 7}
    samples = load_vqa(write(folder, first, "", second))
    assert [sample.answer for sample in annotations(samples)] == ["yes", "down"]
    assert [sample.answers for sample in samples] == [None, tuple(TEN)]
    assert [sample.question_type for sample in samples] == ["is", None]
    assert samples[-1].question_id == "7"
    assert samples[1].name == f"{folder}/test.jsonl, line 3"
    assert samples[1].image.mode == "RGB"
    assert samples[1].image.getpixel((0, 0)) == (9, 9, 9)
    assert np.array_equal(np.asarray(samples[:1][0].image), np.asarray(IMAGES[1]))
    with pytest.raises(IndexError):
        samples[2]
    write(folder, second, split="train")
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\]; found split=None"):
        load_vqa(str(folder))
    assert len(load_vqa(str(folder), "train")) == 1


def test_a_text_may_hold_any_line_separator_but_the_line_feed(folder):
    question = "what\u2028is\u2029this\x85here\x0c?"
    line = json.dumps({"image": "images/0.png", "question": question, "answer": "a"}, ensure_ascii=False)
    (folder / "test.jsonl").write_bytes(f"{line}\r\n\r\n{line}".encode())
    samples = load_vqa(str(folder))
    assert [sample.question for sample in annotations(samples)] == [question] * 2
    assert samples[1].name == f"{folder}/test.jsonl, line 3"


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ('{"image": ', ValueError, "test.jsonl, line 2: not JSON"),
        ("[1]", ValueError, "line 2: expected a JSON object, found list of 1"),
        ({"question": "?", "answer": "a"}, ValueError, r"line 2: key 'image' must hold a path inside"),
        ({"image": "images/0.png", "answer": "a"}, ValueError, "line 2: column 'question' must hold a text"),
        ({"image": "images/0.png", "question": "?"}, ValueError, "line 2: no value in column 'answer'"),
        ({"image": "../a.png", "question": "?", "answer": "a"}, ValueError, "line 2: key 'image' leads out of"),
        ({"image": "/etc/passwd", "question": "?", "answer": "a"}, ValueError, "line 2: key 'image' leads out of"),
        ({"image": "no.png", "question": "?", "answer": "a"}, FileNotFoundError, "line 2: key 'image': there is no"),
    ],
    ids=["json", "list", "image", "question", "answer", "outside", "absolute", "missing"],
)
def test_a_wrong_line_is_refused_by_file_line_and_key(folder, line, error, message):
    right = {"image": "images/0.png", "question": "?", "answer": "a"}
    with pytest.raises(error, match=message):
        load_vqa(write(folder, right, line))


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    IMAGES[0].save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="leads out of"):
        load_vqa(write(folder, {"image": "link.png", "question": "?", "answer": "a"}))


def test_a_broken_image_is_named_when_it_is_accessed(folder):
    (folder / "broken.png").write_bytes(b"no image")
    samples = load_vqa(write(folder, {"image": "broken.png", "question": "?", "answer": "a"}))
    with pytest.raises(ValueError, match=r"test.jsonl, line 1: the image cannot be read"):
        samples[0]


def test_images_are_not_kept(folder, monkeypatch):
    lines = [{"image": f"images/{index}.png", "question": "?", "answer": "a"} for index in range(4)]
    samples = load_vqa(write(folder, *lines))
    opened = []
    monkeypatch.setattr(Image, "open", lambda path, original=Image.open, **_: opened.append(path) or original(path))
    assert len(list(annotations(samples))) == 4
    assert not opened
    assert samples[0] is not samples[0]
    assert len(list(samples[1:3])) == 2
    assert len(opened) == 4


def test_easy_vqa_is_a_source():
    assert load_vqa("easy-vqa", "test", 5, 0) == load_easy_vqa("test", 5, 0)
    with pytest.raises(ValueError, match="split='None'"):
        load_vqa("easy-vqa")
    for options in ({"streaming": True}, {"config": "small"}, {"revision": "main"}, {"columns": {"answer": "a"}}):
        with pytest.raises(ValueError, match="takes no revision, config, columns or streaming"):
            load_vqa("easy-vqa", "test", **options)


def test_a_few_questions_of_a_set_on_the_hub_are_streamed(datasets, monkeypatch):
    asked = []

    def load_dataset(source, streaming=False, **options):
        asked.append(streaming)
        raise FileNotFoundError(source)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for options in ({"max_samples": 3}, {}, {"max_samples": 3, "streaming": False}):
        with pytest.raises((FileNotFoundError, ValueError)):
            load_vqa("nobody/nothing", "validation", **options)
    assert asked == [True, False, False]

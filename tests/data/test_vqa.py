from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PaliGemmaProcessor, PreTrainedTokenizerFast
from transformers.models.siglip import SiglipImageProcessorPil

from hf_aegis.data.vqa import VQACollator, VQASample, load_easy_vqa


IMAGE_TOKENS = 4


@pytest.fixture(scope="module")
def processor():
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", "answer", "en", "is", "it", "red", "very", "yes", "no"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    splits = [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = IMAGE_TOKENS
    return PaliGemmaProcessor(images, fast)


@pytest.fixture
def pair():
    image = Image.new("RGB", (16, 16), (255, 0, 0))
    return [VQASample(image, "is it red", "yes"), VQASample(image, "is it very very red", "no no")]


def test_easy_vqa_has_the_published_counts():
    train, test = load_easy_vqa("train"), load_easy_vqa("test")
    assert (len(train), len(test)) == (38_575, 9_673)
    assert len({id(sample.image) for sample in train}) == 4_000
    assert Counter(sample.question_type for sample in test) == {"yes/no": 7_136, "color": 1_280, "shape": 1_257}
    assert {sample.image.size for sample in test} == {(64, 64)}
    colors = {sample.answer for sample in test if sample.question_type == "color"}
    assert colors == {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}


def test_a_subset_is_the_same_every_time_and_depends_on_the_seed():
    def key(samples):
        return [sample.name for sample in samples]

    first = load_easy_vqa("test", 50, seed=0)
    assert key(first) == key(load_easy_vqa("test", 50, seed=0))
    assert key(first) != key(load_easy_vqa("test", 50, seed=1))
    assert key(load_easy_vqa("test", 20, seed=0)) == key(first)[:20]
    assert [sample.name.split()[0] for sample in load_easy_vqa("test", 2)] == ["easy-vqa/test/0", "easy-vqa/test/1"]


@pytest.mark.parametrize("max_samples", [0, -1, 9_674])
def test_an_impossible_count_is_refused(max_samples):
    with pytest.raises(ValueError, match=rf"1 and the 9673 questions.*found {max_samples}"):
        load_easy_vqa("test", max_samples)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split='validation'"):
        load_easy_vqa("validation")


def test_teacher_forced_inputs(processor, pair):
    batch = VQACollator(processor)(pair)
    vocabulary = processor.tokenizer.get_vocab()
    image, bos, newline = [vocabulary["<image>"]] * IMAGE_TOKENS, [vocabulary["<bos>"]], [vocabulary["\n"]]
    short = image + bos + [vocabulary[word] for word in ["answer", "en", "is", "it", "red"]] + newline
    answer = [vocabulary["yes"], vocabulary["<eos>"]]
    padding = batch["input_ids"].shape[1] - len(short) - len(answer)
    assert padding == 3
    assert batch["input_ids"][0].tolist() == short + answer + [vocabulary["<pad>"]] * padding
    assert batch["labels"][0].tolist() == [-100] * len(short) + answer + [-100] * padding
    assert batch["token_type_ids"][0].tolist() == [0] * len(short) + [1] * len(answer) + [0] * padding
    assert batch["attention_mask"][0].tolist() == [1] * (len(short) + len(answer)) + [0] * padding
    assert int((batch["labels"][1] != -100).sum()) == 3
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert torch.equal(batch["pixel_values"][0, :, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


def test_prompts_are_padded_on_the_left_and_hold_no_answer(processor, pair):
    batch = VQACollator(processor).prompts(pair)
    assert "labels" not in batch
    assert batch["attention_mask"].tolist() == [[0] * 2 + [1] * 11, [1] * 13]
    assert batch["input_ids"][:, -1].tolist() == [processor.tokenizer.get_vocab()["\n"]] * 2
    assert not batch["token_type_ids"].any()


def test_the_prompt_can_be_changed_and_needs_the_question(processor, pair):
    batch = VQACollator(processor, prompt="en {question}").prompts(pair[:1])
    assert batch["input_ids"].shape[1] == IMAGE_TOKENS + 1 + 4 + 1
    with pytest.raises(ValueError, match=r"must contain '\{question\}'; found 'answer en'"):
        VQACollator(processor, prompt="answer en")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_an_image_that_is_not_rgb_is_refused_by_name(processor, mode):
    sample = VQASample(Image.new(mode, (16, 16)), "is it red", "no", name="scans/7.png")
    for call in (VQACollator(processor), VQACollator(processor).prompts):
        with pytest.raises(ValueError, match=rf"scans/7.png must have mode 'RGB'; found '{mode}'"):
            call([sample])


def test_an_empty_image_is_refused(processor, pair):
    with pytest.raises(ValueError, match=r"sample 1 of the batch \('is it red'\) is empty: .*\(0, 5\)"):
        VQACollator(processor)([pair[0], VQASample(Image.new("RGB", (0, 5)), "is it red", "no")])


def test_an_array_instead_of_an_image_is_refused(processor):
    with pytest.raises(ValueError, match="must be a PIL image; found ndarray"):
        VQACollator(processor)([VQASample(np.zeros((16, 16, 3)), "is it red", "no", name="a")])


@pytest.mark.parametrize(
    ("question", "fault"),
    [
        ("", "is empty, or all of it is invisible: ''"),
        ("\u200b\u202e\0", "is empty, or all of it is invisible"),
        ("is it \ud800", "is no valid Unicode"),
        ("is it red " * 101, "has 1010 characters, expected at most 1000"),
        ("is it<image>", "holds '<image>', which the tokenizer takes for a token of the model's own: 'is it<image>'"),
        ("is it <eos>", "holds '<eos>'"),
        ("<pad><bos>", "holds '<"),
    ],
)
def test_a_text_that_cannot_be_asked_is_refused_by_name(processor, pair, question, fault):
    wrong = VQASample(Image.new("RGB", (16, 16)), question, "no", name="scans/7")
    for call in (VQACollator(processor), VQACollator(processor).prompts):
        with pytest.raises(ValueError, match=rf"The question of VQA sample scans/7 {fault}"):
            call([pair[0], wrong])
    taught = VQASample(Image.new("RGB", (16, 16)), "is it red", question, name="scans/7")
    with pytest.raises(ValueError, match=rf"The answer of VQA sample scans/7 {fault}"):
        VQACollator(processor)([taught])
    # What is only asked needs no answer.
    assert "labels" not in VQACollator(processor).prompts([taught])


def test_places_in_the_picture_can_be_asked_for(processor):
    VQACollator(processor).prompts([VQASample(Image.new("RGB", (16, 16)), "is it red <loc0001>", "")])


def test_an_empty_batch_is_refused(processor):
    with pytest.raises(ValueError, match="at least one sample"):
        VQACollator(processor)([])

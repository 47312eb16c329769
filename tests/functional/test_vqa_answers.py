import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_aegis.functional.vqa_answers import (
    any_match,
    exact_match,
    normalize_answer,
    normalize_vqa_answer,
    vqa_accuracy,
)
from hf_aegis.functional.vqa_contractions import CONTRACTIONS


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # Case and white space.
        (" Dark\t RED\n", "dark red"),
        ("dark\r\x0bred", "dark red"),
        # A mark beside a space anywhere is removed everywhere, another becomes a space.
        ("black-white", "black white"),
        ("black- white", "black white"),
        ("black -white", "black white"),
        ("a-b c- d-e", "ab c de"),
        ("(red)/[blue]", "red blue"),
        ("yes!", "yes"),
        ("well-done, sir", "well done sir"),
        ("wait; no", "wait no"),
        # The apostrophe, the colon, the dollar and the like are not on the list.
        ("dog's 10:30 $5 & 100% #1 *", "dog's 10:30 $5 & 100% #1 *"),
        # A comma between digits removes every mark of the text, not that comma alone.
        ("1,000", "1000"),
        ("1,000-pound", "1000pound"),
        ("red,blue", "red blue"),
        # Periods stay before a digit; the misspelt look-behind never asks what stands before.
        ("3.5", "3.5"),
        ("a.5", "a.5"),
        ("5.", "5"),
        ("u.s.a.", "usa"),
        # `re.UNICODE`, 32, is passed as the number of replacements.
        ("." * 40, "." * 8),
        # Number words up to ten, and none.
        ("None", "0"),
        ("zero one two three four five", "0 1 2 3 4 5"),
        ("six seven eight nine ten eleven", "6 7 8 9 10 eleven"),
        ("onetwo", "onetwo"),
        # Articles, after which nothing may be left.
        ("The man on a horse in an arena", "man on horse in arena"),
        ("the", ""),
        ("theatre", "theatre"),
        # Contractions, with the table's mistakes.
        ("isnt", "isn't"),
        ("Dont", "don't"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),
        ("Ive", "ive"),
        ("she's", "she's"),
        ("oclock", "o'clock"),
        ("shed", "shed"),
        ("hed", "he'd"),
    ],
)
def test_normalisation_of_hand_made_answers(answer, expected):
    assert normalize_vqa_answer(answer) == expected


# Written by hand from the published evaluator, not taken from the library: an independent oracle.
PUBLISHED = {
    "aint": "ain't",
    "cant": "can't",
    "couldn'tve": "couldn't've",
    "couldnt've": "couldn't've",
    "didnt": "didn't",
    "dont": "don't",
    "hadn'tve": "hadn't've",
    "hed": "he'd",
    "hes": "he's",
    "howll": "how'll",
    "isnt": "isn't",
    "itll": "it'll",
    "maam": "ma'am",
    "mightve": "might've",
    "notve": "not've",
    "oclock": "o'clock",
    "shant": "shan't",
    "shouldnt've": "shouldn't've",
    "someones": "someone's",
    "somethingll": "something'll",
    "thats": "that's",
    "therere": "there're",
    "theyre": "they're",
    "twas": "'twas",
    "wasnt": "wasn't",
    "whens": "when's",
    "whyre": "why're",
    "wont": "won't",
    "yall": "y'all",
    "yall'll": "y'all'll",
    "youve": "you've",
    # An apostrophe moves, or is lost.
    "ow's'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "somebody'd": "somebodyd",
    "somebodyd've": "somebody'd've",
    # Nothing changes.
    "let's": "let's",
    "she's": "she's",
    # Keys with a capital are never found, since the text is in lower case.
    "Id've": "I'd've",
    "I'dve": "I'd've",
    "Im": "I'm",
    "Ive": "I've",
}
# What a careful table would hold, and this one does not.
NOT_PUBLISHED = (
    "id've",
    "im",
    "ive",
    "ill",
    "lets",
    "shes",
    "shed",
    "shell",
    "somebodyd",
    "well",
    "were",
    "whered've",
)


def test_the_table_is_the_published_one_mistakes_included():
    assert {key: CONTRACTIONS.get(key) for key in PUBLISHED} == PUBLISHED
    assert not CONTRACTIONS.keys() & set(NOT_PUBLISHED)
    for key, expected in PUBLISHED.items():
        assert normalize_vqa_answer(key) == (expected if key == key.lower() else key.lower())


def test_the_table_has_its_published_size():
    assert len(CONTRACTIONS) == 120
    assert [key for key in CONTRACTIONS if key != key.lower()] == ["Id've", "I'dve", "Im", "Ive"]


@pytest.mark.parametrize(
    ("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (5, 1.0), (9, 1.0), (10, 1.0)]
)
def test_accuracy_by_the_number_of_ten_annotators_who_agree(matches, expected):
    answers = ["red"] * matches + ["blue"] * (10 - matches)
    assert vqa_accuracy("red", answers) == pytest.approx(expected)
    assert any_match("red", answers) is (matches > 0)


def test_unanimous_answers_are_compared_to_the_letter():
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0.0
    assert vqa_accuracy(" yes\n", ["yes"] * 10) == 1.0
    assert vqa_accuracy("2", ["two"] * 10) == 0.0
    # White space at the ends does not divide them.
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["yes "]) == 0.0
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["Yes"]) == 1.0
    assert any_match("Yes", ["yes"] * 10)


def test_annotators_who_mean_the_same_count_together():
    answers = ["two", "2", "2.", "Two", "the 2", *["3"] * 5]
    assert vqa_accuracy("two", answers) == vqa_accuracy("3", answers) == 1.0


def test_nothing_can_match_an_article():
    answers = ["the", *["dog"] * 9]
    assert vqa_accuracy("", answers) == pytest.approx(0.3)
    assert any_match("a", answers)


@pytest.mark.parametrize("answers", [[], ["yes"] * 3, "yesyes"])
@pytest.mark.parametrize("score", [vqa_accuracy, any_match])
def test_too_few_annotators_are_refused(score, answers):
    with pytest.raises(ValueError, match=r"at least 4 annotators \(ten in VQA\); found"):
        score("yes", answers)


class PublishedEvaluator:
    """The steps of the published `vqaEval.py` for one question, one statement after the other."""

    punct = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
    numbers = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

    def punctuation(self, text):
        out = text
        for p in self.punct:
            if (p + " " in text or " " + p in text) or re.search(r"(\d)(\,)(\d)", text) is not None:
                out = out.replace(p, "")
            else:
                out = out.replace(p, " ")
        # The third positional argument there is `count`; newer Pythons want it named.
        return re.compile(r"(?!<=\d)(\.)(?!\d)").sub("", out, count=re.UNICODE)

    def digits_and_articles(self, text):
        out = []
        for word in text.lower().split():
            if word == "none":
                word = "0"
            elif word in self.numbers:
                word = str(self.numbers.index(word))
            if word not in ["a", "an", "the"]:
                out.append(word)
        for index, word in enumerate(out):
            if word in PUBLISHED:
                out[index] = PUBLISHED[word]
        return " ".join(out)

    def accuracy(self, prediction, answers):
        truths = [{"answer_id": index, "answer": answer} for index, answer in enumerate(answers)]
        for truth in truths:
            truth["answer"] = truth["answer"].replace("\n", " ").replace("\t", " ").strip()
        prediction = prediction.replace("\n", " ").replace("\t", " ").strip()
        if len({truth["answer"] for truth in truths}) > 1:
            for truth in truths:
                truth["answer"] = self.digits_and_articles(self.punctuation(truth["answer"]))
            prediction = self.digits_and_articles(self.punctuation(prediction))
        scores = []
        for left_out in truths:
            others = [truth for truth in truths if truth != left_out]
            matching = [truth for truth in others if truth["answer"] == prediction]
            scores.append(min(1, float(len(matching)) / 3))
        return float(sum(scores)) / len(scores)


WORDS = st.lists(
    st.sampled_from(
        [*' .,;-/!?"\t\n', "1", "2,5", "one", "none", "the", "a", "An", "Dog", "dog", "isnt", "somebody'd", "Ive", "."]
    ),
    max_size=6,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=3), st.data())
def test_it_agrees_with_the_published_evaluator(vocabulary, data):
    prediction = data.draw(st.sampled_from(vocabulary) | WORDS)
    answers = data.draw(st.lists(st.sampled_from(vocabulary), min_size=10, max_size=10))
    found = vqa_accuracy(prediction, answers)
    assert found == pytest.approx(PublishedEvaluator().accuracy(prediction, answers), abs=1e-12)
    assert any_match(prediction, answers) or found == 0


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20))
def test_it_normalises_any_text_as_the_published_evaluator(text):
    published = PublishedEvaluator()
    stripped = text.replace("\n", " ").replace("\t", " ").strip()
    assert normalize_vqa_answer(text) == published.digits_and_articles(published.punctuation(stripped))


def test_exact_normalisation_keeps_words_and_drops_case_and_white_space():
    assert normalize_answer(" Dark\t RED\n") == "dark red"


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("Yes\n", "yes", True),
        ("yes", "no", False),
        ("yesyes", "yes", False),
        ("", "no", False),
        ("yes.", "yes", False),
    ],
)
def test_exact_match(prediction, answer, expected):
    assert exact_match(prediction, answer) is expected


def test_a_blank_ground_truth_is_refused():
    with pytest.raises(ValueError, match="must not be blank"):
        exact_match("", " ")

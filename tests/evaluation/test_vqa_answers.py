import pytest

from hf_aegis.functional.vqa_answers import exact_match, normalize_answer


def test_normalisation_keeps_words_and_drops_case_and_white_space():
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

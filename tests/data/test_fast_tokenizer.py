import json
import logging
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import fft
from tokenizers import ByteLevelBPETokenizer, Tokenizer, trainers

from hf_aegis.data import FASTDecodeError, FASTTokenizer


def smooth_chunks(count, horizon=12, dimension=3, seed=0):
    """Sums of a few slow cosines, within [-1, 1]."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, horizon)[None, :, None]
    phase, speed, offset = (rng.uniform(low, 1, (count, 1, dimension)) for low in (-1, 0, -1))
    return np.clip(0.7 * np.cos(np.pi * (2 * speed * time + phase)) + 0.5 * offset, -1, 1)


@pytest.fixture(scope="module")
def fitted() -> FASTTokenizer:
    return FASTTokenizer.fit(list(smooth_chunks(300)), vocab_size=400)


@pytest.fixture
def fast(fitted) -> FASTTokenizer:
    """The fitted tokenizer with counters of its own."""
    return pickle.loads(pickle.dumps(fitted))


def published_folder(path, chunks, scale=10, vocab_size=300, **config):
    """
    A folder as https://huggingface.co/physical-intelligence/fast has it: a byte-level encoding with GPT-2's splits,
    trained with all characters of the range as alphabet, and the configurations that transformers 4 wrote.
    """
    quantised = [np.around(fft.dct(chunk, axis=0, norm="ortho") * scale).astype(int).ravel() for chunk in chunks]
    low, high = min(q.min() for q in quantised), max(q.max() for q in quantised)
    encoding = ByteLevelBPETokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=[chr(code) for code in range(high - low + 1)],
        max_token_length=10_000,
    )
    encoding._tokenizer.train_from_iterator(["".join(map(chr, q - low)) for q in quantised], trainer=trainer)
    path.mkdir()
    encoding.save(str(path / "tokenizer.json"))
    auto_map = {"AutoProcessor": "processing_action_tokenizer.UniversalActionProcessor"}
    files = {
        "processor_config.json": {
            "action_dim": None,
            "auto_map": auto_map,
            "min_token": int(low),
            "processor_class": "UniversalActionProcessor",
            "scale": scale,
            "time_horizon": None,
            "vocab_size": vocab_size,
        }
        | config,
        "tokenizer_config.json": {
            "added_tokens_decoder": {},
            "auto_map": auto_map,
            "clean_up_tokenization_spaces": True,
            "model_max_length": 1000000000000000019884624838656,
            "processor_class": "UniversalActionProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "special_tokens_map.json": {},
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content, indent=2))
    return path, int(low)


# There and back


@settings(max_examples=60, deadline=None)
@given(
    chunk=st.integers(0, 2**32 - 1), horizon=st.integers(1, 20), dimension=st.integers(1, 4), scale=st.integers(1, 40)
)
def test_round_trip_error_is_bounded_by_the_quantisation(chunk, horizon, dimension, scale):
    # Each of H coefficients is off by at most 1/2 step, and the orthonormal transform keeps the norm over time.
    chunks = smooth_chunks(5, horizon, dimension, seed=chunk)
    fast = FASTTokenizer.fit(list(chunks), scale=scale, vocab_size=1024)
    restored = fast.decode(fast(chunks, out_of_range="error"))
    assert restored.shape == chunks.shape
    assert restored.dtype == np.float64
    coefficients = fft.dct(restored - chunks, axis=1, norm="ortho")
    assert np.abs(coefficients).max() <= 0.5 / scale + 1e-9
    assert np.linalg.norm(restored - chunks, axis=1).max() <= 0.5 / scale * horizon**0.5 + 1e-9
    assert fast.clipped_values == fast.decode_failures == 0
    assert fast.decoded_chunks == 5


def test_every_coefficient_of_the_range_can_be_encoded(fast):
    # Chunks made of one value in one place: most of them are in none of the data.
    rows = []
    for value in range(fast.min_token, fast.max_token + 1):
        coefficients = np.zeros((12, 3))
        coefficients[7, 1] = value / 10
        rows.append(fft.idct(coefficients, axis=0, norm="ortho"))
    restored = fast.decode(fast(np.stack(rows), out_of_range="error"), on_error="raise")
    np.testing.assert_allclose(restored, rows, atol=1e-12)
    assert fast.clipped_values == 0


def test_tokens_by_hand():
    # One step, one dimension: the coefficient is the value, times ten; three values, three letters, no pair twice.
    fast = FASTTokenizer.fit([np.array([[value]]) for value in (-0.1, 0.0, 0.1)], vocab_size=10)
    assert (fast.min_token, fast.max_token, fast.time_horizon, fast.action_dim) == (-1, 1, 1, 1)
    assert fast.num_tokens == 3
    assert fast(np.array([[[-0.1]], [[0.0]], [[0.1]]])) == [[0], [1], [2]]
    assert fast(np.array([[0.04]])) == [[1]]
    # Time before dimension: the two first frequencies come before the two second ones.
    two = FASTTokenizer.fit([np.array([[1.0, 0.0], [1.0, 0.0]]), np.zeros((2, 2))], vocab_size=256)
    assert two.bpe_tokenizer.decode(two(np.array([[1.0, 0.0], [1.0, 0.0]]))[0]) == chr(14) + chr(0) * 3


def test_merges_shorten_what_is_frequent(fast):
    tokens = fast(smooth_chunks(50, seed=9))
    assert np.mean([len(chunk) for chunk in tokens]) < 0.7 * 36
    assert fast.num_tokens == 400
    assert all(0 <= token < 400 for chunk in tokens for token in chunk)


def test_fitting_is_deterministic_and_quick_on_real_sizes(tmp_path):
    chunks = list(np.clip(np.cumsum(np.random.default_rng(0).normal(0, 0.15, (400, 50, 7)), axis=1), -1, 1))
    first, again = FASTTokenizer.fit(chunks), FASTTokenizer.fit(np.stack(chunks))
    assert first.bpe_tokenizer.backend_tokenizer.to_str() == again.bpe_tokenizer.backend_tokenizer.to_str()
    assert first.to_dict() == again.to_dict()


def test_few_data_give_few_tokens():
    fast = FASTTokenizer.fit([np.zeros((4, 2))])
    assert fast.vocab_size == 1024
    # One letter and the pairs of zeros that occur twice.
    assert fast.num_tokens < 5
    np.testing.assert_array_equal(fast.decode(fast(np.zeros((4, 2)))), np.zeros((1, 4, 2)))


# Files


def test_save_and_load_are_exact(fast, tmp_path):
    fast.vlm_vocab_size = 1856
    fast.save_pretrained(tmp_path / "one")
    loaded = FASTTokenizer.from_pretrained(tmp_path / "one")
    assert loaded.to_dict() == fast.to_dict()
    assert loaded.bpe_tokenizer.backend_tokenizer.to_str() == fast.bpe_tokenizer.backend_tokenizer.to_str()
    chunks = smooth_chunks(20, seed=3)
    assert loaded(chunks) == fast(chunks)
    assert np.array_equal(loaded.decode(fast(chunks)), fast.decode(fast(chunks)))
    loaded.save_pretrained(tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "tokenizer.json" in names
    assert "processor_config.json" in names
    for name in ("tokenizer.json", "processor_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    # Counters are of one process, not of the tokenizer.
    assert loaded.decoded_chunks == 20
    assert FASTTokenizer.from_pretrained(tmp_path / "two").decoded_chunks == 0


@pytest.mark.parametrize("scale", [10, 40])
def test_published_files_load_without_remote_code_and_give_the_same_tokens(tmp_path, scale):
    chunks = smooth_chunks(300)
    folder, low = published_folder(tmp_path / "published", chunks, scale=scale, vocab_size=500)
    (folder / "processing_action_tokenizer.py").write_text("raise RuntimeError('remote code ran')\n")
    fast = FASTTokenizer.from_pretrained(folder)
    assert (fast.scale, fast.vocab_size, fast.min_token, fast.max_token) == (scale, 500, low, None)
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for chunk, tokens in zip(chunks, fast(chunks), strict=True):
        codes = np.around(fft.dct(chunk, axis=0, norm="ortho") * scale).astype(int).ravel() - low
        assert tokens == reference.encode("".join(map(chr, codes))).ids
        (restored,) = fast.decode([tokens], on_error="raise")
        quantised = (codes + low).reshape(12, 3) / scale
        np.testing.assert_allclose(restored, fft.idct(quantised, axis=0, norm="ortho"), atol=1e-12)
    assert fast.clipped_values == 0


def test_spaces_survive_the_clean_up_that_published_files_ask_for(tmp_path):
    # Codes 32 and 46 are " ." as text, which a clean-up of spaces would make one character.
    chunks = [np.array([[-3.2], [0.0], [1.4]])]
    chunks = [fft.idct(chunk, axis=0, norm="ortho") for chunk in chunks]
    folder, low = published_folder(tmp_path / "published", chunks * 3, vocab_size=300)
    assert low == -32
    fast = FASTTokenizer.from_pretrained(folder)
    written = fft.idct(np.array([[0.0], [1.4], [0.0]]), axis=0, norm="ortho")
    assert fast.bpe_tokenizer.decode(fast(written)[0], clean_up_tokenization_spaces=False) == " . "
    np.testing.assert_allclose(fast.decode(fast(written)), written[None], atol=1e-12)


def test_a_folder_of_something_else_is_refused(fast, tmp_path):
    fast.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: config[key] for key in config if key != "min_token"}))
    with pytest.raises(ValueError, match=r"processor_config.json: not a FAST tokenizer: no min_token"):
        FASTTokenizer.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="not a FAST tokenizer: no scale, vocab_size, min_token"):
        FASTTokenizer.from_pretrained(tmp_path)
    for change, message in (
        ({"scale": 0}, "scale must be a positive number, found 0"),
        ({"scale": float("nan")}, "scale must be a positive number"),
        ({"min_token": 0.5}, "min_token must be an integer, found 0.5"),
        ({"max_token": config["min_token"] - 1}, "max_token must be an integer of at least"),
        ({"time_horizon": 0}, "time_horizon must be an integer of at least 1, found 0"),
        ({"vlm_vocab_size": 128}, "vlm_vocab_size must be an integer of at least 129"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            FASTTokenizer.from_pretrained(tmp_path)


def _without_a_token(model):
    del model["vocab"][model["merges"][0][0]]


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("model", lambda model: model["vocab"].update(new=2**40), "vocab: ids of the .* are not 0 to"),
        ("model", _without_a_token, "vocab: ids of the .* are not 0 to"),
        ("model", lambda model: model["merges"].append(["a", "b"]), r"merges: \d+: 'a' is not in the vocabulary"),
        ("model", lambda model: model["merges"].append("a"), r"merges: \d+: expected two tokens, found 'a'"),
        ("model", lambda model: model.update(type="Unigram"), "key 'type' is 'Unigram', expected 'BPE'"),
        ("model", lambda model: model.update(dropout=0.5), "key 'dropout' is 0.5: it would change actions"),
        ("model", lambda model: model.update(vocab=[]), "model: key 'vocab' is list of 0, expected dict"),
        (
            "decoder",
            lambda decoder: decoder.update(type="Fuse"),
            "decoder: key 'type' is 'Fuse', expected 'ByteLevel'",
        ),
        (
            "added_tokens",
            lambda tokens: tokens.append({"id": 3, "content": "x"}),
            "added_tokens: 0: key 'id' is 3, but",
        ),
    ],
)
def test_a_damaged_vocabulary_is_refused_by_name(fast, tmp_path, part, change, message):
    fast.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    change(values[part])
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"tokenizer.json: .*{message}"):
        FASTTokenizer.from_pretrained(tmp_path)


def test_older_forms_of_a_vocabulary_load(fast, tmp_path):
    fast.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["merges"] = [" ".join(merge) for merge in values["model"]["merges"]]
    # What somebody's call once asked for, which would leave actions out.
    values["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    values["added_tokens"] = [{"id": fast.num_tokens, "content": "<pad>", "special": True}]
    path.write_text(json.dumps(values))
    loaded = FASTTokenizer.from_pretrained(tmp_path)
    chunks = smooth_chunks(3, 12, 3, seed=5)
    assert loaded(chunks) == fast(chunks)
    assert loaded.num_tokens == fast.num_tokens + 1


# What cannot be encoded


def test_coefficients_out_of_range_are_clipped_and_counted(fast, caplog):
    chunk = fft.idct(np.zeros((12, 3)), axis=0, norm="ortho")
    beyond = chunk.copy()
    beyond[:, 0] = (fast.max_token + 5) / 10 / 12**0.5
    beyond[:, 2] = (fast.min_token - 2) / 10 / 12**0.5
    with caplog.at_level(logging.WARNING):
        tokens = fast(np.stack([chunk, beyond]))
        restored = fast.decode(tokens, on_error="raise")
        assert fast.clipped_values == 2
        fast(beyond)
        assert fast.clipped_values == 4
    coefficients = fft.dct(restored[1], axis=0, norm="ortho") * 10
    np.testing.assert_allclose(coefficients[0], [fast.max_token, 0, fast.min_token], atol=1e-9)
    assert [record.message for record in caplog.records] == [
        f"the coefficient {fast.max_token + 5} at [1, 0, 0] (chunk, frequency, dimension) cannot be encoded: this "
        f"tokenizer's range is {fast.min_token} to {fast.max_token}, the nearest in it {fast.max_token}; it is "
        "clipped, and so will be others, counted in `clipped_values`"
    ]
    message = rf"the coefficient {fast.min_token - 2} at \[0, 0, 2\].* range is {fast.min_token} to {fast.max_token}"
    beyond[:, 0] = 0
    with pytest.raises(ValueError, match=message):
        fast(beyond, out_of_range="error")
    assert fast.clipped_values == 4
    with pytest.raises(ValueError, match="out_of_range must be 'clip' or 'error', found 'drop'"):
        fast(beyond, out_of_range="drop")


def test_letters_that_a_published_alphabet_lacks_are_not_left_out(tmp_path):
    # Only the values -40, 0 and 40 occur: the alphabet of characters has no letters for the bytes of most others.
    coefficients = np.array([[[-4.0], [0.0]], [[4.0], [0.0]]])
    folder, low = published_folder(tmp_path / "published", fft.idct(coefficients, axis=1, norm="ortho"), vocab_size=90)
    fast = FASTTokenizer.from_pretrained(folder)
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # Code 10 is a line feed, which byte-level letters write as "Ċ": not in the alphabet of 81 characters.
    assert low == -40
    assert reference.encode(chr(10)).ids == []
    written = fft.idct(np.array([[-3.0], [0.0]]), axis=0, norm="ortho")
    (restored,) = fast.decode(fast(written), on_error="raise")
    assert fast.clipped_values == 1
    # The nearest code with letters is that of -4.0, which the data held; then comes "!", 33, the first printable one.
    np.testing.assert_allclose(fft.dct(restored, axis=0, norm="ortho")[:, 0], [-4.0, 0.0], atol=1e-9)
    with pytest.raises(ValueError, match=r"the coefficient -10 at .* range is -40 upwards, the nearest in it -7"):
        fast(fft.idct(np.array([[-1.0], [0.0]]), axis=0, norm="ortho"), out_of_range="error")


def test_wrong_chunks_are_refused(fast):
    chunk = smooth_chunks(1)[0]
    broken = chunk.copy()
    broken[4, 1] = np.inf
    for values, message in (
        (chunk[0], r"non-empty array of numbers of shape \(H, A\) or \(B, H, A\), found float64 of shape \(3,\)"),
        (chunk[None, None], r"found float64 of shape \(1, 1, 12, 3\)"),
        (chunk[:0], r"found float64 of shape \(0, 3\)"),
        (np.zeros((0, 12, 3)), r"found float64 of shape \(0, 12, 3\)"),
        (np.full((12, 3), "a"), r"found <U1 of shape"),
        (broken, r"holds NaN or infinity, first at index \[4, 1\]"),
        (torch.as_tensor(broken), r"holds NaN or infinity, first at index \[4, 1\]"),
        (chunk[:5], r"chunks of shape \(5, 3\) do not fit this tokenizer's time_horizon 12"),
        (chunk[:, :2], r"chunks of shape \(12, 2\) do not fit this tokenizer's action_dim 3"),
    ):
        with pytest.raises(ValueError, match=message):
            fast(values)
    assert fast(torch.as_tensor(chunk)) == fast(chunk) == fast(chunk[None])


def test_wrong_data_to_fit_are_refused():
    chunks = smooth_chunks(3)
    with_nan = chunks.copy()
    with_nan[2, 5, 1] = np.nan
    for arguments, message in (
        (([],), "there are no chunks"),
        ((chunks[0],), r"chunk 0 must be a non-empty array of numbers of shape \(H, A\), found float64 of shape"),
        ((with_nan,), r"chunk 2 holds NaN or infinity, first at index \[5, 1\]"),
        ((chunks, 10, 20), r"vocab_size 20 is smaller than the alphabet of \d+ letters"),
        (([1e9 * chunks[0]],), "more than the 55296 there are room for"),
        (([1e300 * chunks[0]],), "more than the 55296 there are room for"),
    ):
        with pytest.raises(ValueError, match=message):
            FASTTokenizer.fit(*arguments)
    for shape, message in (
        ({"time_horizon": 10}, "time_horizon is 10, but there are chunks with 12"),
        ({"action_dim": 7}, "action_dim is 7, but there are chunks with 3"),
    ):
        with pytest.raises(ValueError, match=message):
            FASTTokenizer.fit(list(chunks), **shape)
    mixed = FASTTokenizer.fit([chunks[0], chunks[1][:7]])
    assert (mixed.time_horizon, mixed.action_dim) == (None, 3)


# What cannot be decoded


def test_every_failure_becomes_nan_and_is_counted(caplog):
    fast = FASTTokenizer.fit(list(smooth_chunks(300)), scale=40, vocab_size=400)
    good = fast(smooth_chunks(2, seed=4))
    # The first byte of a two-byte character alone is no text.
    lead, letter = fast.bpe_tokenizer.convert_tokens_to_ids(["Â", "!"])
    letters = [letter] * 35
    cases = [
        (good[0][:-1], r"\d+ tokens give \d+ coefficients, expected 12 x 3"),
        (good[0] + good[1], r"tokens give 72 coefficients, expected 12 x 3"),
        ([], "0 tokens give 0 coefficients, expected 12 x 3"),
        ([*good[0][:-1], fast.num_tokens], "400 is not one of the 400 FAST tokens"),
        ([-1, *good[0][1:]], "-1 is not one of the 400 FAST tokens"),
        ([lead, *letters], "the tokens hold what is no coefficient in the range of"),
    ]
    with caplog.at_level(logging.WARNING):
        decoded = fast.decode([good[0], *(tokens for tokens, _ in cases), good[1]])
    assert np.isnan(decoded[1:-1]).all()
    assert np.isfinite(decoded[[0, -1]]).all()
    assert (fast.decode_failures, fast.decoded_chunks) == (6, 8)
    assert len(caplog.records) == 1
    assert "6 of 8 chunks of FAST tokens cannot be decoded and are NaN; first chunk 1: " in caplog.text
    for tokens, message in cases:
        with pytest.raises(FASTDecodeError, match=f"chunk 1: .*{message}"):
            fast.decode([good[0], tokens], on_error="raise")
    assert fast.decode_failures == 12
    with pytest.raises(ValueError, match="on_error must be 'nan' or 'raise', found 'zero'"):
        fast.decode(good, on_error="zero")


def test_a_value_beyond_the_fitted_range_is_a_failure():
    # 130 codes need the lead byte of the codes 128 ... 191, so tokens can spell codes that no data had.
    chunks = [np.array([[value]]) for value in (0.0, 12.9)]
    fast = FASTTokenizer.fit(chunks, vocab_size=140)
    spelt = fast.bpe_tokenizer.convert_tokens_to_ids(["Â", "Ģ"])
    np.testing.assert_allclose(fast.decode([spelt], on_error="raise"), [[[12.8]]])
    lowered = FASTTokenizer(fast.bpe_tokenizer, min_token=0, max_token=127, time_horizon=1, action_dim=1)
    with pytest.raises(FASTDecodeError, match="no coefficient in the range of 128 values"):
        lowered.decode([spelt], on_error="raise")


def test_the_shape_of_a_chunk_is_given_constructed_or_called(tmp_path):
    folder, _ = published_folder(tmp_path / "published", smooth_chunks(50))
    fast = FASTTokenizer.from_pretrained(folder)
    chunks = smooth_chunks(2)
    tokens = fast(chunks)
    assert fast.decode(tokens).shape == (2, 12, 3)
    assert FASTTokenizer.from_pretrained(folder).decode(tokens, time_horizon=12, action_dim=3).shape == (2, 12, 3)
    with pytest.raises(ValueError, match="give `time_horizon` and `action_dim`"):
        FASTTokenizer.from_pretrained(folder).decode(tokens)
    # Asking for another shape once changes nothing for the next call.
    assert fast.decode(tokens, time_horizon=9, action_dim=4).shape == (2, 9, 4)
    assert np.isfinite(fast.decode(tokens)).all()


# In the vocabulary of a vision-language model


def test_ids_count_down_from_the_last_location_token(fast):
    with pytest.raises(ValueError, match="does not know the vision-language model's vocabulary"):
        fast.to_vlm_ids([0])
    fast.vlm_vocab_size = 257_152
    # PaliGemma: <loc1023> is 257,023 and the 128 <seg> tokens follow.
    assert fast.to_vlm_ids([0, 1, 399]) == [257_023, 257_022, 256_624]
    assert fast.vlm_ids() == range(256_624, 257_024)
    everything = list(range(fast.num_tokens))
    assert fast.from_vlm_ids(fast.to_vlm_ids(everything)) == everything
    assert sorted(fast.to_vlm_ids(everything)) == list(fast.vlm_ids())
    with pytest.raises(ValueError, match="400 is not one of the 400 FAST tokens"):
        fast.to_vlm_ids([400])
    # Words that a model may write are failures for `decode`, not action tokens.
    strays = fast.from_vlm_ids([5, 257_024, 256_623])
    assert not any(0 <= token < fast.num_tokens for token in strays)

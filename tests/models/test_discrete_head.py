import numpy as np
import pytest
import torch
from torch import nn

from hf_aegis.models import PaliGemmaFlowForAction


PROMPT = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")


def _observation(batch):
    return {key: batch[key] for key in PROMPT}


class PlantedHead(nn.Module):
    """A language-model head that says the next of the given ids, whatever it is given."""

    def __init__(self, ids, vocab_size, end):
        super().__init__()
        width = max(map(len, ids))
        self.ids = torch.tensor([row + [end] * (width - len(row)) for row in ids])
        self.vocab_size, self.step = vocab_size, 0
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states):
        logits = torch.zeros(*hidden_states.shape[:2], self.vocab_size)
        said = self.ids[:, min(self.step, self.ids.shape[1] - 1)]
        logits[torch.arange(len(said)), -1, said] = 1.0
        self.step += 1
        return logits


def _plant(model, ids):
    model.lm_head = PlantedHead(ids, model.config.get_text_config().vocab_size, end=1)


def test_planted_tokens_come_back_as_the_planted_chunks(model, fast_batch, action_tokenizer):
    chunks = np.random.default_rng(8).uniform(-1, 1, (3, 5, 3))
    tokens = action_tokenizer(chunks)
    _plant(model, [[*action_tokenizer.to_vlm_ids(row), 1] for row in tokens])
    # The state is not read, as it is not by `forward` without the expert.
    found = model.sample_actions(
        **_observation(fast_batch), state=fast_batch["state"], head="fast", action_tokenizer=action_tokenizer
    )
    assert found.shape == (3, 5, 3)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), action_tokenizer.decode(tokens).astype(np.float32))
    assert np.linalg.norm(found.numpy() - chunks, axis=1).max() <= 0.05 * 5**0.5 + 1e-6
    # As many calls of the head as the longest row has tokens: generation ends there.
    assert model.lm_head.step == max(map(len, tokens)) + 1


def test_failures_are_nan_counted_and_never_acted_upon(model, fast_batch, fast_processor, action_tokenizer):
    good = action_tokenizer.to_vlm_ids(action_tokenizer(np.zeros((5, 3)))[0])
    # A chunk, one that ends too early, and one with a word in it.
    _plant(model, [[*good, 1], [*good[:-1], 1], [5, *good[1:], 1]])
    found = model.sample_actions(**_observation(fast_batch), head="fast", action_tokenizer=action_tokenizer)
    assert torch.isnan(found[1:]).all()
    assert torch.equal(found[0], torch.zeros(5, 3))
    assert (action_tokenizer.decode_failures, action_tokenizer.decoded_chunks) == (2, 3)
    with pytest.raises(ValueError, match="'actions' holds NaN or infinity"):
        fast_processor.postprocess_actions(found)
    # Cut off before the end: no chunk either.
    _plant(model, [[*good, 1]] * 3)
    cut = model.sample_actions(
        **_observation(fast_batch), head="fast", action_tokenizer=action_tokenizer, max_new_tokens=len(good) - 1
    )
    assert torch.isnan(cut).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_equals_encoding_each_prompt_again_without_padding(model, fast_batch, action_tokenizer, side):
    said = []
    action_tokenizer.from_vlm_ids = lambda ids: said.append(list(ids)) or []
    padding = {key: torch.zeros(3, 4, dtype=torch.long) for key in PROMPT[:3]}
    padded = fast_batch | {
        key: torch.cat([zeros, fast_batch[key]] if side == "left" else [fast_batch[key], zeros], dim=1)
        for key, zeros in padding.items()
    }
    model.sample_actions(**_observation(padded), head="fast", action_tokenizer=action_tokenizer, max_new_tokens=5)
    for row in range(3):
        # The prompt alone: the answers of the batch must not help.
        prompt = (fast_batch["attention_mask"][row] == 1) & (fast_batch["token_type_ids"][row] == 0)
        ids, types = fast_batch["input_ids"][row][prompt], torch.zeros(int(prompt.sum()), dtype=torch.long)
        expected = []
        for _ in range(5):
            with torch.no_grad():
                logits = model(
                    input_ids=ids[None], token_type_ids=types[None], pixel_values=fast_batch["pixel_values"][row]
                ).logits
            word = int(logits[0, -1].argmax())
            if word == 1:
                break
            expected.append(word)
            ids, types = torch.cat([ids, torch.tensor([word])]), torch.cat([types, torch.tensor([1])])
        assert said[row] == expected


def test_a_model_that_learnt_the_tokens_acts(vlm, expert, fast_batch, action_tokenizer):
    torch.manual_seed(0)
    model = PaliGemmaFlowForAction.from_vlm(vlm, **expert, flow_gradient_to_vlm=False)
    model.freeze_vision_tower()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(150):
        output = model(**fast_batch)
        if output.language_loss < 0.02:
            break
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.language_loss < 0.02
    found = model.sample_actions(**_observation(fast_batch), head="fast", action_tokenizer=action_tokenizer)
    assert torch.isfinite(found).all()
    assert action_tokenizer.decode_failures == 0
    error = torch.linalg.vector_norm(found - fast_batch["actions"], dim=1)
    assert error.max().item() <= 0.05 * 5**0.5 + 1e-6


def test_arguments_of_the_other_head_and_missing_ones_are_refused(model, fast_batch, action_tokenizer):
    observation = _observation(fast_batch)
    fast = {"head": "fast", "action_tokenizer": action_tokenizer}
    for arguments, message in (
        ({"head": "fast"}, r"head='fast' needs `action_tokenizer`, the processor's"),
        ({"head": "diffusion"}, "head must be 'flow' or 'fast', found 'diffusion'"),
        (fast | {"num_steps": 3}, "num_steps mean nothing to head='fast'"),
        (fast | {"noise": torch.zeros(3, 5, 3), "generator": torch.Generator()}, "noise, generator mean nothing"),
        (fast | {"max_new_tokens": 0}, "max_new_tokens must be at least 1, found 0"),
        (
            {"state": fast_batch["state"], "action_tokenizer": action_tokenizer},
            "action_tokenizer mean nothing to head='flow'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model.sample_actions(**observation, **arguments)
    action_tokenizer.vlm_vocab_size = None
    with pytest.raises(ValueError, match="does not know the vision-language model's vocabulary"):
        model.sample_actions(**observation, **fast)

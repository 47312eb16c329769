"""π0 with the vision-language model inside of it as what is asked, replayed and held."""

import json

import pytest
import torch
from transformers import AutoProcessor, PI0ForConditionalGeneration

from hf_aegis.anchors import ActivationAnchor, SubspaceOptions
from hf_aegis.assets import DEMONSTRATIONS, EMBEDDED_VLM
from hf_aegis.data import LiberoDataset, VQACollator, load_easy_vqa
from hf_aegis.models import PI0Collator, pi0_processor, pi0_vlm
from hf_aegis.training import AEGISTrainer


@pytest.fixture
def pi0(pi0_checkpoint):
    return PI0ForConditionalGeneration.from_pretrained(pi0_checkpoint)


@pytest.fixture(scope="module")
def questions():
    return load_easy_vqa("train", 8, seed=0)


@pytest.fixture(scope="module")
def vqa_collator():
    return VQACollator(AutoProcessor.from_pretrained(EMBEDDED_VLM))


@pytest.fixture(scope="module")
def dataset():
    return LiberoDataset(DEMONSTRATIONS, chunk_size=8, normalize=False)


@pytest.fixture(scope="module")
def anchor(pi0_checkpoint, questions, vqa_collator):
    options = SubspaceOptions(energy=1.0, sensitivity=True, modules=("multi_modal_projector",))
    vlm = pi0_vlm(PI0ForConditionalGeneration.from_pretrained(pi0_checkpoint))
    return ActivationAnchor.collect(vlm, [vqa_collator(questions)], subspaces=options, progress=False)


@pytest.fixture
def make_trainer(pi0, make_args, anchor, dataset):
    """A trainer with given parts; keywords are arguments of training."""

    def make(parts=None, **changes):
        return AEGISTrainer(
            pi0,
            make_args(**{"max_steps": 2, "expert_learning_rate": 1e-2, **changes}),
            anchor,
            train_dataset=dataset,
            data_collator=PI0Collator(pi0_processor(EMBEDDED_VLM, dataset.statistics, chunk_size=8)),
            **{"answering_model": pi0_vlm(pi0), **(parts or {})},
        )

    return make


def test_pi0_is_asked_through_its_vlm(make_trainer, vqa_holdout, tmp_path):
    trainer = make_trainer({"vqa_holdout": vqa_holdout}, vqa_steps=2, vqa_accuracy=False)
    before = vqa_holdout.evaluate_cross_entropy(pi0_vlm(trainer.model)).cross_entropy
    trainer.train()
    after = vqa_holdout.evaluate_cross_entropy(pi0_vlm(trainer.model)).cross_entropy
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line["vqa_cross_entropy"] for line in lines if "vqa_cross_entropy" in line}
    assert logged == {0: pytest.approx(before), 2: pytest.approx(after)}
    assert before != after


def test_what_cannot_answer_is_refused(make_trainer, vqa_holdout, pi0_checkpoint):
    with pytest.raises(ValueError, match=r"a PI0ForConditionalGeneration does not answer .*models\.pi0_vlm\(model\)"):
        make_trainer({"answering_model": None, "vqa_holdout": vqa_holdout})
    other = pi0_vlm(PI0ForConditionalGeneration.from_pretrained(pi0_checkpoint))
    with pytest.raises(
        ValueError, match="answering_model, a PaliGemmaForConditionalGeneration, does not have the dec"
    ):
        make_trainer({"answering_model": other})


def test_replayed_questions_go_through_the_vlm(make_trainer, questions, vqa_collator, pi0):
    parts = {"replay_dataset": questions, "replay_collator": vqa_collator}
    trainer = make_trainer(parts, reference="replay")
    batch = vqa_collator(questions[:4])
    expected = pi0_vlm(pi0)(**batch).loss
    assert trainer._replay_loss(batch).item() == pytest.approx(expected.item())
    trainer.train()
    assert trainer.shield.report.summary()["replay_loss"] > 0


@pytest.mark.parametrize("held", [{"subspace_energy": 0.9}, {"subspace_sensitivity": 0.9}], ids=["inputs", "pairs"])
def test_subspaces_of_the_vlm_are_held_in_pi0(make_trainer, held):
    trainer = make_trainer(preserve="subspace", **held)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    constraint = trainer.preservation.held
    assert "model.multi_modal_projector.linear" in constraint.ranks
    trainer.train()
    assert max(constraint.deviation().values()) < 1e-5
    after = dict(trainer.model.named_parameters())
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    for part in ("multi_modal_projector.linear.weight", "layers.0.self_attn.k_proj.weight"):
        assert any(".vlm." in name and name.endswith(part) for name in moved)
    norms = [name for name in moved if ".vlm." in name and ("norm" in name or "embed" in name or "bias" in name)]
    assert not norms


def test_everything_held_answers_as_before(make_trainer, questions, vqa_collator, pi0, tmp_path):
    """Widths are below the number of tokens, so that all directions of all inputs are held."""
    inputs = {key: value for key, value in vqa_collator(questions).items() if key != "labels"}
    with torch.no_grad():
        before = pi0_vlm(pi0.eval())(**inputs).logits
    trainer = make_trainer({"certificate_batches": [vqa_collator(questions)]}, preserve="subspace")
    trainer.train()
    with torch.no_grad():
        after = pi0_vlm(trainer.model.eval())(**inputs).logits
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    report = json.loads((tmp_path / "out" / "certificate.jsonl").read_text().splitlines()[-1])
    assert report["logits"] < 1e-3 and max(report["layers"].values()) < 1e-3

import pytest
import torch

from hf_aegis.anchors import ActivationAnchor, AnchorFingerprint, InputSubspace, SubspaceOptions
from hf_aegis.cli import TWO_WORD_COMMANDS, main
from hf_aegis.cli.anchor import AnchorRecipe
from hf_aegis.cli.anchor_inspect import format_subspaces
from hf_aegis.cli.recipe import parse_recipe


def make_anchor(subspaces=None):
    fingerprint = AnchorFingerprint(
        num_layers=1,
        width=4,
        weights_sha256="0" * 64,
        moments="batch",
        num_samples=2,
        num_tokens=1234,
        num_batches=1,
        dataset_id="questions",
        subspace_options=SubspaceOptions(modules=("projector", "head")) if subspaces else None,
        format_version=2 if subspaces else 1,
    )
    return ActivationAnchor(torch.zeros(1, 4), torch.ones(1, 4), fingerprint, subspaces)


def test_an_anchor_is_described(tmp_path, capsys):
    subspaces = {
        names[0]: InputSubspace(names, torch.eye(width)[:, :2], torch.tensor([2.0, 1.0]), 4.0, num_inputs=1234)
        for names, width in ((("layers.0.attn.q", "layers.0.attn.k"), 4), (("projector.linear",), 2048))
    }
    make_anchor(subspaces).save_pretrained(tmp_path)
    assert main(["anchor", "inspect", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    fields = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if len(line.split()) > 1}
    assert (fields["dataset_id"], fields["base_model"], fields["num_tokens"]) == ("questions", "-", "1234")
    assert (fields["energy"], fields["modules"]) == ("0.999", "projector, head")
    assert [line.split() for line in lines[-3:]] == [
        ["input", "of", "width", "rank", "energy", "inputs"],
        ["layers.0.attn.q,", "k", "4", "2", "75.000", "%", "1,234"],
        ["projector.linear", "2,048", "2", "75.000", "%", "1,234"],
    ]
    assert len({len(line) for line in lines[-3:]}) == 1


def test_an_anchor_without_subspaces_is_described_too(tmp_path, capsys):
    make_anchor().save_pretrained(tmp_path)
    assert main(["anchor", "inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.endswith("no subspaces\n")
    assert "subspace_options" not in out


def test_what_is_no_anchor_is_told_in_one_line(tmp_path, capsys):
    assert main(["anchor", "inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("hf-aegis anchor inspect: error: ")


def test_layers_are_in_the_order_of_their_numbers():
    names = ["layers.0.a", "layers.2.a", "layers.10.a", "projector"]
    subspaces = {
        name: InputSubspace((name,), torch.eye(3), torch.ones(3), 3.0) for name in sorted(names, reverse=True)
    }
    assert [line.split()[0] for line in format_subspaces(subspaces).splitlines()[1:]] == names


@pytest.mark.parametrize("argv", [["anchor", "inspect", "--help"], ["--help"]])
def test_help_names_the_command(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in TWO_WORD_COMMANDS)


def test_options_of_subspaces():
    (plain,) = parse_recipe([AnchorRecipe], [])
    assert (plain.subspaces, plain.subspace_modules) == (False, ["multi_modal_projector"])
    options = ["--subspaces", "true", "--subspace_modules", "a", "b", "--subspace_energy", "0.9"]
    (recipe,) = parse_recipe([AnchorRecipe], options)
    assert (recipe.subspaces, recipe.subspace_modules, recipe.subspace_energy) == (True, ["a", "b"], 0.9)
    with pytest.raises(ValueError, match="subspace_energy must be above 0 and at most 1, found 0"):
        AnchorRecipe(subspace_energy=0)
    with pytest.raises(ValueError, match="subspace_max_rank must be at least 1, found 0"):
        AnchorRecipe(subspace_max_rank=0)

import pytest
import torch

from hf_aegis.anchors import ActivationAnchor, AnchorFingerprint, InputSubspace, PairSensitivity, SubspaceOptions
from hf_aegis.cli import TWO_WORD_COMMANDS, main
from hf_aegis.cli.anchor import AnchorRecipe, subspace_options
from hf_aegis.cli.anchor_inspect import format_sensitivities, format_subspaces
from hf_aegis.cli.recipe import parse_recipe


def make_anchor(subspaces=None, sensitivities=None):
    options = SubspaceOptions(modules=("projector", "head"), sensitivity=sensitivities is not None)
    fingerprint = AnchorFingerprint(
        num_layers=1,
        width=4,
        weights_sha256="0" * 64,
        moments="batch",
        num_samples=2,
        num_tokens=1234,
        num_batches=1,
        dataset_id="questions",
        subspace_options=options if subspaces else None,
        format_version=options.format_version if subspaces else 1,
    )
    return ActivationAnchor(torch.zeros(1, 4), torch.ones(1, 4), fingerprint, subspaces, sensitivities)


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


def test_sensitivities_are_described_where_there_are_any(tmp_path, capsys):
    subspaces = {"a": InputSubspace(("a",), torch.eye(4), torch.ones(4), 4.0)}
    make_anchor(subspaces, {"a": PairSensitivity("a", torch.eye(4), torch.ones(4, 4))}).save_pretrained(tmp_path)
    assert main(["anchor", "inspect", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  temperature             4.0" in lines
    assert lines[-1].split()[:3] == ["all", "100.000", "%"]


def test_an_anchor_without_subspaces_is_described_too(tmp_path, capsys):
    make_anchor().save_pretrained(tmp_path)
    assert main(["anchor", "inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.endswith("no subspaces\n")
    assert "subspace_options" not in out


def test_what_is_no_anchor_is_told_in_one_line(tmp_path, capsys):
    assert main(["anchor", "inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("hf-aegis anchor inspect: error: ")


def test_pairs_are_counted_by_one_threshold_for_all_layers():
    subspace = InputSubspace(("layers.0.k", "layers.0.q"), torch.eye(5)[:, :2], torch.ones(2), 5.0)
    values = {"layers.0.q": [[90.0, 4.0]], "layers.0.k": [[5.0, 0.5], [0.5, 0.0]]}
    sensitivities = {
        name: PairSensitivity(name, torch.eye(4)[:, : len(rows)], torch.tensor(rows)) for name, rows in values.items()
    }
    table = format_sensitivities(sensitivities, {"layers.0.k": subspace}).splitlines()
    assert [line.replace(" %", "%").split() for line in table] == [
        ["weight", "of", "outputs", "rank", "inputs", "rank", "sensitivity", "90%", "95%", "99%"],
        ["layers.0.k", "4", "2", "5", "2", "6.000%", "0.000%", "5.000%", "5.000%"],
        ["layers.0.q", "4", "1", "5", "2", "94.000%", "5.000%", "5.000%", "10.000%"],
        ["all", "100.000%", "2.500%", "5.000%", "7.500%"],
    ]
    assert len({len(line) for line in table}) == 1


def test_predictions_that_depend_on_nothing_are_described_too():
    subspace = InputSubspace(("a",), torch.eye(3), torch.ones(3), 3.0)
    nothing = PairSensitivity("a", torch.eye(2), torch.zeros(2, 3))
    last = format_sensitivities({"a": nothing}, {"a": subspace}).splitlines()[-1]
    assert last.split() == ["all", "-", "0.000", "%", "0.000", "%", "0.000", "%"]


def test_layers_are_in_the_order_of_their_numbers():
    names = ["layers.0.a", "layers.2.a", "layers.10.a", "projector"]
    subspaces = {
        name: InputSubspace((name,), torch.eye(3), torch.ones(3), 3.0) for name in sorted(names, reverse=True)
    }
    assert [line.split()[0] for line in format_subspaces(subspaces).splitlines()[1:]] == names


@pytest.mark.parametrize("argv", [*(name.split() for name in TWO_WORD_COMMANDS), ["anchor"], []])
def test_help_names_the_command(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*argv, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ([" ".join(argv)] if len(argv) == 2 else TWO_WORD_COMMANDS))


def test_options_of_subspaces():
    (plain,) = parse_recipe([AnchorRecipe], [])
    assert (plain.subspaces, plain.subspace_modules) == (False, ["multi_modal_projector"])
    options = ["--subspaces", "true", "--subspace_modules", "a", "b", "--subspace_energy", "0.9"]
    (recipe,) = parse_recipe([AnchorRecipe], [*options, "--subspace_min_rank", "3", "--subspace_exact_width", "64"])
    assert subspace_options(recipe) == SubspaceOptions(energy=0.9, min_rank=3, exact_width=64, modules=("a", "b"))
    assert subspace_options(plain) is None
    # What is not said is as for anchors that are collected without the command.
    (bare,) = parse_recipe([AnchorRecipe], ["--subspaces", "true"])
    assert subspace_options(bare) == SubspaceOptions(modules=("multi_modal_projector",))
    with pytest.raises(ValueError, match="subspace_energy must be above 0 and at most 1, found 0"):
        AnchorRecipe(subspace_energy=0)
    with pytest.raises(ValueError, match="subspace_max_rank must be at least 1, found 0"):
        AnchorRecipe(subspace_max_rank=0)
    with pytest.raises(ValueError, match="subspace_min_rank must not exceed subspace_max_rank, found 9 and 8"):
        AnchorRecipe(subspace_min_rank=9, subspace_max_rank=8)
    with pytest.raises(ValueError, match="subspace_exact_width must not be negative, found -1"):
        AnchorRecipe(subspace_exact_width=-1)

"""Two processes that collect one anchor, against one; run as a script, this file is one of the two."""

import os
import socket
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed

from hf_aegis.anchors import ActivationAnchor, Share, SubspaceOptions
from hf_aegis.cli import main


# The PaliGemma processor of transformers hands NumPy a tensor, whose `__array__` knows no `copy`.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SUBSPACES = SubspaceOptions(energy=1.0, sensitivity=True, exact_width=16, max_rank=4, oversampling=4)
# Of 16 numbers in full, of 24 in a sketch; the projector's in full.
CASES = {
    "batch": {},
    "pooled": {"moments": "pooled", "tokens": "text"},
    "subspaces": {"subspaces": SUBSPACES},
}
SIZES = (3, 2, 4, 2, 3)
COMMAND = ("--num_samples", "7", "--batch_size", "2", "--output_dir")


def test_two_processes_collect_what_one_does(build_model, make_batches, run_processes, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_processes(__file__, tmp_path, port)
    model, batches = build_model("paligemma2").double(), in_double(make_batches("paligemma2", sizes=SIZES))
    for name, options in CASES.items():
        expected = ActivationAnchor.collect(model, batches, progress=False, **options)
        first, second, resumed = (
            ActivationAnchor.from_pretrained(tmp_path / name / rank) for rank in ("0", "1", "resumed")
        )
        assert first == second == resumed
        assert first.fingerprint == expected.fingerprint
        torch.testing.assert_close(first.mean, expected.mean, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(first.variance, expected.variance, rtol=1e-6, atol=1e-7)
        assert (len(first.subspaces) > 0) == (name == "subspaces")
        assert first.subspaces.keys() == expected.subspaces.keys()
        for key, space in expected.subspaces.items():
            found = first.subspaces[key]
            assert (found.linears, found.num_inputs) == (space.linears, space.num_inputs)
            assert found.total_energy == pytest.approx(space.total_energy, rel=1e-9)
            assert_same_matrix(restored(found.basis, found.energies), restored(space.basis, space.energies))
        assert first.sensitivities.keys() == expected.sensitivities.keys()
        for key, pairs in expected.sensitivities.items():
            # Noise is a batch's own, so that these agree, too, and not in expectation only.
            assert_same_matrix(first.sensitivities[key].sensitivities, pairs.sensitivities)
    # And the command, which makes shares of its own.
    assert main(["anchor", *COMMAND, str(tmp_path / "one")]) == 0
    first, expected = (ActivationAnchor.from_pretrained(tmp_path / name) for name in ("two", "one"))
    assert first.fingerprint == expected.fingerprint
    torch.testing.assert_close(first.mean, expected.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first.variance, expected.variance, rtol=1e-5, atol=1e-6)
    assert not (tmp_path / "two" / "partial").exists()


def restored(basis, energies):
    """The matrix that energies are eigenvalues of, whatever the signs and order of equal directions."""
    return (basis * energies) @ basis.mT


def assert_same_matrix(found, expected):
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def in_double(batches):
    return [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]


class KilledError(Exception):
    """What ends a collection here."""


class UntilKilled(list):
    """Batches, of which so many are given out in all passes together."""

    left = 0

    def __iter__(self):
        for batch in super().__iter__():
            if self.left == 0:
                raise KilledError
            self.left -= 1
            yield batch


def collect_share(folder, build_model, make_batches):
    rank = distributed.get_rank()
    # Nobody waits for what the first one could not make.
    with pytest.raises(RuntimeError if rank else ZeroDivisionError, match="division by zero"):
        Share.of(distributed.group.WORLD).from_first(lambda: 1 / 0)
    with pytest.raises(ValueError, match="invalid literal"):
        Share.of(distributed.group.WORLD).from_first(lambda: int("none"))
    model = build_model("paligemma2").double()
    mine = in_double(make_batches("paligemma2", sizes=SIZES))[rank::2]
    for name, options in CASES.items():
        everyone = {"process_group": distributed.group.WORLD, "progress": False, **options}
        ActivationAnchor.collect(model, mine, **everyone).save_pretrained(folder / name / str(rank))
        # Both are killed in their first pass, one with a batch saved and one with none, and start again.
        batches = UntilKilled(mine)
        batches.left = 1 - rank
        partial = {"partial_folder": folder / name / "partial", "save_batches": 1}
        with pytest.raises(KilledError):
            ActivationAnchor.collect(model, batches, **everyone, **partial)
        assert len(list((folder / name / "partial").glob(f"moments-{rank}-of-2.*"))) == 1 - rank
        anchor = ActivationAnchor.collect(model, mine, **everyone, **partial)
        if rank == 0:
            anchor.save_pretrained(folder / name / "resumed")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import conftest

    warnings.simplefilter("error")
    distributed.init_process_group("gloo")
    collect_share(Path(sys.argv[1]), conftest.build_model.__wrapped__(), conftest.make_batches.__wrapped__())
    distributed.destroy_process_group()
    # The command makes a group of its own.
    os.environ["MASTER_PORT"] = sys.argv[2]
    warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy", DeprecationWarning)
    assert main(["anchor", *COMMAND, str(Path(sys.argv[1]) / "two")]) == 0

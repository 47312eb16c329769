"""
The activation anchor: Gaussian moments of every decoder layer's output on the pre-training task's data, principal
subspaces of its linear layers' inputs, and the sensitivity of its predictions to their weights.
"""

import copy
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_aegis.anchors.comparison import layer_distances
from hf_aegis.anchors.decoder_layers import find_decoder_layers
from hf_aegis.anchors.fingerprint import AnchorFingerprint, describe_model, describe_origin
from hf_aegis.anchors.linear_layers.sensitivities import PairSensitivity, check_sensitivities
from hf_aegis.anchors.linear_layers.subspaces import InputSubspace, SubspaceOptions, check_groups
from hf_aegis.anchors.merging import merged_statistics
from hf_aegis.anchors.statistics import collect_statistics
from hf_aegis.anchors.stored_anchor import StoredAnchor


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ActivationAnchor(StoredAnchor):
    """
    Mean and variance of each decoder layer's output, per hidden dimension, of a pre-trained model on its own data
    (arXiv 2604.16067, static Wasserstein anchor). `anchor.mean[l]` and `anchor.variance[l]` are layer `l`'s, `(D,)`.

    Args:
        mean (`Tensor` of shape `(L, D)`):
            Means; kept in float32.
        variance (`Tensor` of shape `(L, D)`):
            Population variances; kept in float32.
        fingerprint ([`AnchorFingerprint`]):
            What the moments were collected from.
        subspaces (`Mapping[str, InputSubspace]`, *optional*):
            Principal subspaces of the linear layers' inputs, by the first layer of each.
        sensitivities (`Mapping[str, PairSensitivity]`, *optional*):
            Sensitivities to pairs of directions of the linear layers' weights, by layer.

    Raises:
        ValueError: if the shapes differ from each other or from the fingerprint's, a value is not finite, a variance
            is negative, or the fingerprint, `subspaces` and `sensitivities` disagree on what there is.

    Example:

    ```python
    anchor = ActivationAnchor.collect(model, dataloader, dataset_id="HuggingFaceM4/VQAv2")
    anchor.save_pretrained("my-anchor")
    ActivationAnchor.from_pretrained("my-anchor").check_compatible(model)
    ```
    """

    def __init__(
        self,
        mean: Tensor,
        variance: Tensor,
        fingerprint: AnchorFingerprint,
        subspaces: Mapping[str, InputSubspace] | None = None,
        sensitivities: Mapping[str, PairSensitivity] | None = None,
    ):
        expected = (fingerprint.num_layers, fingerprint.width)
        for name, tensor in (("mean", mean), ("variance", variance)):
            if tuple(tensor.shape) != expected:
                raise ValueError(
                    f"anchor {name} has shape {tuple(tensor.shape)}, expected (layers, width) = {expected} "
                    "as the fingerprint says"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"anchor {name} holds values that are not finite")
        if bool((variance < 0).any()):
            raise ValueError("anchor variance holds negative values")
        options = fingerprint.subspace_options
        check_groups(subspaces or {}, options)
        check_sensitivities(sensitivities or {}, subspaces or {}, options is not None and options.sensitivity)
        self.mean = mean.detach().float()
        self.variance = variance.detach().float()
        self.fingerprint = fingerprint
        self.subspaces: Mapping[str, InputSubspace] = dict(subspaces or {})
        self.sensitivities: Mapping[str, PairSensitivity] = dict(sensitivities or {})

    @property
    def num_layers(self) -> int:
        """Number of decoder layers L."""
        return self.fingerprint.num_layers

    @property
    def width(self) -> int:
        """Hidden size D."""
        return self.fingerprint.width

    @property
    def device(self) -> torch.device:
        """Where the moments are."""
        return self.mean.device

    @classmethod
    def collect(
        cls,
        model: nn.Module,
        batches: Iterable[Mapping[str, Any]],
        *,
        layers: str | nn.ModuleList | None = None,
        moments: str = "batch",
        tokens: str = "all",
        subspaces: SubspaceOptions | None = None,
        revision: str | None = None,
        dataset_id: str | None = None,
        num_batches: int | None = None,
        progress: bool = True,
        process_group: "ProcessGroup | None" = None,
        partial_folder: str | os.PathLike[str] | None = None,
        save_batches: int = 20,
        settings: Mapping[str, Any] | None = None,
    ) -> "ActivationAnchor":
        """
        Runs the model over batches, without gradients and in evaluation mode, and reduces each decoder layer's output
        to its moments on the fly: float32 or better within a batch, float64 across batches. Hidden states are not
        kept. The model is left as it was found.

        Args:
            model (`nn.Module`):
                A Hugging Face model, wrapped or not; see [`find_decoder_layers`].
            batches (`Iterable[Mapping[str, Any]]`):
                Forward arguments, e.g. a `DataLoader`. Tensors are moved to the model's device. Tokens with a zero in
                `attention_mask` `(B, T)` do not count; a batch without one counts all its tokens. Give
                `token_type_ids` to models with a prefix mask (PaliGemma). The model never sees `labels`; with
                sensitivities they say which predictions count (those of labels that are not -100; all of attended
                tokens in a batch without), and the batches are iterated over three times, so give no iterator.
            layers (`str` or `nn.ModuleList`, *optional*):
                Where the layers are, for models in which they are not found.
            moments (`str`, *optional*, defaults to `"batch"`):
                `"batch"` averages each batch's mean and variance over the batches, as the paper does, so that the
                variance depends on the batch size. `"pooled"` is exact over all tokens, whatever the batching.
            tokens (`str`, *optional*, defaults to `"all"`):
                Which of the attended tokens count: `"all"`, or `"image"` or `"text"` alone, which `input_ids` have to
                tell. A [`~gradients.GradientShield`] takes it over from the anchor.
            subspaces ([`SubspaceOptions`], *optional*):
                Collects the principal subspaces of all linear layers' inputs as well, in the same pass, always over
                all tokens that count, whatever `moments` says; and, where they ask for it, the sensitivities to pairs
                of directions, which takes two backward passes more.
            revision (`str`, *optional*):
                Commit that the model was loaded at, recorded in the fingerprint. A model that `from_pretrained` of
                transformers has loaded from the Hub does not tell.
            dataset_id (`str`, *optional*):
                Recorded in the fingerprint.
            num_batches (`int`, *optional*):
                Stops after that many; an iterable with fewer is an error. All by default.
            progress (`bool`, *optional*, defaults to `True`):
                Shows progress bars.
            process_group (`torch.distributed.ProcessGroup`, *optional*):
                Processes that collect one anchor together. Each calls this with batches of its own, of which the i-th
                counts as number `rank + i · size` ([`SampleBatches`] makes such shares), and gets the anchor that one
                process would have had of all of them, to rounding. By default this process is alone.
            partial_folder (`str` or `os.PathLike`, *optional*):
                Where sums over the batches are kept, so that a killed collection, called again with the same
                arguments, goes on from them and comes to the same anchor. Batches have to be the same, in the same
                order; those that are done are skipped ([`SampleBatches`] does not even make them). The folder stays
                until it is deleted. By default nothing is kept.
            save_batches (`int`, *optional*, defaults to 20):
                How many batches lie between two saves. Moments are a few megabytes; subspaces and sensitivities are
                as large as what is summed for them.
            settings (`Mapping[str, Any]`, *optional*):
                What the batches are made of, as JSON can hold it. Sums of other settings, of another model or of other
                arguments are refused.

        Returns:
            [`ActivationAnchor`], on the CPU.

        Raises:
            ValueError: if no layers are found, there are no or too few batches, an attention mask does not fit the
                layers' tokens or leaves none of the chosen kind, a statistic is not finite, the model has no image
                tokens to tell from others, a linear layer whose input's subspace is asked for does not run exactly
                once in a forward pass, on one input per token, or predictions do not depend on one whose sensitivity
                is asked for. If `partial_folder` holds sums of something else; what differs is named.
        """
        statistics = collect_statistics(
            model,
            batches,
            layers=layers,
            moments=moments,
            tokens=tokens,
            subspaces=subspaces,
            revision=revision,
            dataset_id=dataset_id,
            num_batches=num_batches,
            progress=progress,
            process_group=process_group,
            partial_folder=partial_folder,
            save_batches=save_batches,
            settings=settings,
        )
        return cls(*statistics)

    @classmethod
    def merge(cls, anchors: Sequence["ActivationAnchor"]) -> "ActivationAnchor":
        """
        One anchor from partial collections (e.g. one per process) of the same model, data set and policies: the
        anchor that a single collection over all the batches would have given, to rounding. Subspaces merge by what
        the parts have kept of them: exactly, to rounding, only where nothing was truncated (`energy=1.0`, `max_rank`
        no less than the widths and no sketch). Sensitivities do not merge, as each part has its own directions.

        Args:
            anchors (`Sequence[ActivationAnchor]`):
                At least one. They count by their batches (`"batch"`) or by their tokens (`"pooled"`).

        Raises:
            AnchorMismatchError: if they differ in model, data set or policy; every such field is named.
            ValueError: if there are none, or several with sensitivities.
        """
        return cls(*merged_statistics(anchors))

    def check_compatible(
        self, model: nn.Module, *, layers: str | nn.ModuleList | None = None, check: str = "weights"
    ) -> None:
        """
        Refuses a model that this anchor was not collected from.

        Args:
            model (`nn.Module`):
                The model, wrapped or not. PEFT adapters that are not merged do not matter, nor does the dtype that
                weights stored in bfloat16 are loaded in. Weights stored in float32 are rounded when they are loaded in
                bfloat16, and an anchor of the one does not fit the other.
            layers (`str` or `nn.ModuleList`, *optional*):
                Where the layers are, for models in which they are not found.
            check (`str`, *optional*, defaults to `"weights"`):
                `"weights"` compares layer count, width, attention implementation and the hash of the layers' weights.
                `"shape"` compares layer count and width only: for a model that has been trained since.

        Raises:
            AnchorMismatchError: naming every field that differs, with both sides.
            ValueError: if no layers are found or `check` is unknown.
        """
        found = find_decoder_layers(model, layers)
        dtype = describe_origin(model, found)["dtype"]
        self.fingerprint.check_model(describe_model(model, found, check=check), dtype=dtype)

    def distance(self, other: "ActivationAnchor") -> Tensor:
        """
        How far two anchors of the same base are from each other, e.g. on different data: squared 2-Wasserstein
        distance of each layer's moments, per hidden dimension (arXiv 2604.16067, transport penalty).

        Args:
            other ([`ActivationAnchor`]):
                An anchor of the same model.

        Returns:
            `Tensor` of shape `(L,)`, in float64, on the CPU.

        Raises:
            AnchorMismatchError: if the two are of different models; every such field is named.
        """
        return layer_distances(self, other).sum(dim=0)

    def to(self, device: str | torch.device) -> "ActivationAnchor":
        """A copy of this anchor with all its tensors on `device`."""
        moved = copy.copy(self)
        moved.mean, moved.variance = self.mean.to(device), self.variance.to(device)
        moved.subspaces = {key: subspace.to(device) for key, subspace in self.subspaces.items()}
        moved.sensitivities = {name: pairs.to(device) for name, pairs in self.sensitivities.items()}
        return moved

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ActivationAnchor):
            return NotImplemented
        return (
            self.fingerprint == other.fingerprint
            and torch.equal(self.mean.cpu(), other.mean.cpu())
            and torch.equal(self.variance.cpu(), other.variance.cpu())
            and self.subspaces == other.subspaces
            and self.sensitivities == other.sensitivities
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        fields = dataclasses.asdict(self.fingerprint)
        shown = ("base_model", "dataset_id", "moments", "num_layers", "width", "num_samples", "num_tokens")
        described = [f"{name}={fields[name]!r}" for name in shown]
        if self.subspaces:
            described.append(f"subspaces={len(self.subspaces)}")
        if self.sensitivities:
            described.append(f"sensitivities={len(self.sensitivities)}")
        return f"ActivationAnchor({', '.join(described)})"

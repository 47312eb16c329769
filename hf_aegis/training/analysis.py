"""What a run leaves for the figures that need gradients or hidden states: spectra and drift."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_aegis.atomic_files import replacing, write_text
from hf_aegis.data import LiberoDataset
from hf_aegis.data.vqa import VQACollator
from hf_aegis.data.vqa_sources import load_vqa
from hf_aegis.evaluation.gradient_spectra import gradient_spectra
from hf_aegis.evaluation.hidden_states import mean_hidden_states
from hf_aegis.models import PaliGemmaFlowCollator, PaliGemmaFlowForAction, PaliGemmaFlowProcessor
from hf_aegis.training.run_arguments import RunArguments


ANALYSIS_FOLDER = "analysis"
SPECTRA_FILE = "gradient_spectra.json"
HIDDEN_STATES_FILE = "hidden_states.safetensors"


class Analysis:
    """
    Gradient spectra before training, and hidden states on held-out questions before and after, in a run's `analysis/`.

    Args:
        folder (`Path`): The run's folder.
        run ([`RunArguments`]): How many samples, and from which questions.
        processor ([`PaliGemmaFlowProcessor`]): The model's processor.
        dataset ([`~data.LiberoDataset`]): Training demonstrations, for the flow loss.
        batch_size (`int`): Samples per forward and backward pass, which is not checkpointed.
    """

    def __init__(
        self,
        folder: Path,
        run: RunArguments,
        processor: PaliGemmaFlowProcessor,
        dataset: LiberoDataset,
        batch_size: int,
    ) -> None:
        self.folder = folder / ANALYSIS_FOLDER
        self.processor = processor
        self.dataset = dataset
        self.batch_size = batch_size
        self.questions = load_vqa(run.vqa_dataset, run.vqa_split, run.analysis_samples, seed=run.vqa_seed)

    def before(self, model: PaliGemmaFlowForAction) -> None:
        """Measures the pre-trained model; a run that is resumed keeps what it measured."""
        spectra, states = self.folder / SPECTRA_FILE, self.folder / HIDDEN_STATES_FILE
        if spectra.exists() and states.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        chosen = torch.linspace(0, len(self.dataset) - 1, len(self.questions)).round().int().tolist()
        collate_questions, collate_actions = VQACollator(self.processor), PaliGemmaFlowCollator(self.processor)
        starts = range(0, len(self.questions), self.batch_size)
        measured = gradient_spectra(
            model,
            (collate_questions(self.questions[start : start + self.batch_size]) for start in starts),
            (collate_actions([self.dataset[i] for i in chosen[start : start + self.batch_size]]) for start in starts),
        )
        self._write_states(before=self._hidden_states(model))
        write_text(spectra, json.dumps(measured))

    def after(self, model: torch.nn.Module) -> None:
        """Measures the trained model."""
        before = load_file(self.folder / HIDDEN_STATES_FILE)["before"]
        self._write_states(before=before, after=self._hidden_states(model))

    def _hidden_states(self, model: torch.nn.Module) -> torch.Tensor:
        return mean_hidden_states(model, self.processor, self.questions, batch_size=self.batch_size)

    def _write_states(self, **states: torch.Tensor) -> None:
        with replacing(self.folder / HIDDEN_STATES_FILE) as staged:
            save_file({name: value.contiguous() for name, value in states.items()}, staged)

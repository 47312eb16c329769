"""A Trainer whose checkpoints are whole, and whose interrupted runs go on as if they had not been interrupted."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from hf_aegis.training.checkpoint_faults import find_fault, is_finished
from hf_aegis.training.checkpoint_writing import ModelNotSavedError, naming_folder
from hf_aegis.training.checkpoints import how_to_go_on, last_complete_checkpoint, load_weights, refuse_other_kind
from hf_aegis.training.expert_ema import ExpertEMA
from hf_aegis.training.hub_checkpoint import download_checkpoint, is_hub_checkpoint
from hf_aegis.training.hub_trainer import HubTrainer
from hf_aegis.training.loading_errors import explaining_loading_errors
from hf_aegis.training.resumable import ResumableCallback
from hf_aegis.training.termination import SaveOnTermination, keep_workers


class ResumableTrainer(HubTrainer):
    """
    The Trainer's checkpoints, and what is made of them. Other than there,

    - one that was not written to its end, or has a file that cannot be read, is passed over for the one before it;
      named explicitly, it is an error;
    - one that cannot be written is a [`ModelNotSavedError`], and leaves nothing behind;
    - upon SIGTERM one is saved after the step under way, and the process ends with status 143
      ([`~training.termination.SaveOnTermination`]);
    - an average of the expert's weights is saved with the optimiser, callbacks of ours go on counting, and a finished
      run trains no further.
    """

    ema: ExpertEMA | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._termination = SaveOnTermination()
        self.add_callback(self._termination)

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """
        Trains. `resume_from_checkpoint=True` takes the newest checkpoint that was written to its end and can be read,
        or starts anew where there is none; `"org/name"` and `"org/name@revision"` the newest one of a run on the Hub.

        Raises:
            ValueError: If the checkpoint that was asked for cannot be read, or none of those there are.
            ModelNotSavedError: If a checkpoint cannot be written.
            SystemExit: After SIGTERM, once a checkpoint is saved.
        """
        if resume_from_checkpoint is True:
            checkpoint = last_complete_checkpoint(str(self.args.output_dir))
            resume_from_checkpoint = None if checkpoint is None else str(checkpoint)
        elif resume_from_checkpoint:
            if is_hub_checkpoint(resume_from_checkpoint):
                folder, token = Path(str(self.args.output_dir)), self.args.hub_token
                resume_from_checkpoint = str(download_checkpoint(resume_from_checkpoint, folder, token))
            if (fault := find_fault(resume_from_checkpoint)) is not None:
                raise ValueError(f"{resume_from_checkpoint} cannot be resumed: {fault}")
        with self._termination.listening(self.args):
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        with explaining_loading_errors(self.args, self._termination):
            return super()._inner_training_loop(*args, **kwargs)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        loader = super()._get_dataloader(*args, **kwargs)
        keep_workers(loader)
        return loader

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The Trainer looks whether it has arrived only after a step: resuming a finished run would train on.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            # Of a checkpoint that is written anew, lest a half of each be taken for one.
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        try:
            with naming_folder(folder):
                super()._save_checkpoint(model, trial)
        except ModelNotSavedError as error:
            if self.args.should_save and not is_finished(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise ModelNotSavedError(f"{error}. {how_to_go_on(str(self.args.output_dir))}") from error.__cause__

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # What says that the checkpoint is whole is written next, by the main process.
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            # Without a second copy of the weights, in a pickle.
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
            if self.args.should_save and self.lr_scheduler is not None:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
        if self.ema is not None and (self.args.should_save or self.is_fsdp_enabled):
            self.ema.save(output_dir, writes=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        refuse_other_kind(resume_from_checkpoint, sharded=self.is_fsdp_enabled)
        if isinstance(self.model, PreTrainedModel) and (model is None or self.is_fsdp_enabled):
            load_weights(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        checkpoint = str(self.state.best_model_checkpoint)
        if isinstance(self.model, PreTrainedModel):
            load_weights(self.model, checkpoint)
        else:
            super()._load_best_model()
        if self.ema is not None:
            self.ema.load(checkpoint)

    def _load_callback_state(self) -> None:
        # Those of ours read their own. The Trainer would make them anew, without what their state does not hold.
        stored: Any = self.state.stateful_callbacks
        ours = {type(c).__name__ for c in self.callback_handler.callbacks if isinstance(c, ResumableCallback)}
        others: Any = {name: data for name, data in stored.items() if name not in ours}
        self.state.stateful_callbacks = others
        super()._load_callback_state()
        self.state.stateful_callbacks = stored

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.ema is not None and os.path.isdir(checkpoint):
            self.ema.load(checkpoint)

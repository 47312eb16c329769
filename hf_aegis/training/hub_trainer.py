"""A Trainer whose pushes to the Hub are whole, hold no pickle, and do not end a training."""

import json
import logging
import shutil
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, run_as_future
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils import PushInProgress

from hf_aegis.anchors import ActivationAnchor
from hf_aegis.atomic_files import write_bytes
from hf_aegis.hub import HubUploadError, ensure_repo, push_folder
from hf_aegis.machine_paths import portable_name
from hf_aegis.publishing import CardOptions, RunRecord, write_card
from hf_aegis.publishing.adapter_card import ADAPTER_CONFIG
from hf_aegis.training.aegis_config import AEGISConfig
from hf_aegis.training.run_recipe import RECIPE_FILE, changed_arguments
from hf_aegis.training.run_upload import (
    LAST_CHECKPOINT,
    delete_staged,
    portable_adapter,
    push_run,
    stage_checkpoint,
    staging_folder,
)


logger = logging.getLogger(__name__)


class HubTrainer(Trainer):
    """
    The Trainer's own integration with the Hub (`push_to_hub`, `hub_model_id`, `hub_strategy`, ... of its arguments),
    which is off unless asked for. Other than there,

    - what is pushed arrives in one commit: model, processor, logs and card, and with them the checkpoint where the
      strategy asks for it;
    - a push of a checkpoint that fails is a warning, and the next one tries again; the training goes on. The push at
      its end that fails is a [`~hub.HubUploadError`], after everything has been saved: it says how to push later;
    - `training_args.bin`, a pickle, is neither pushed nor written, and an adapter names its base model as it is called
      on any machine;
    - the arguments' `hub_private_repo=True` and a public repository that exists already are an error before training.
    """

    args: AEGISConfig
    hub_model_id: str | None  # type: ignore[assignment]
    push_in_progress: Any = None
    anchor: ActivationAnchor | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Creates the repository and the branch that will be pushed to, where they are missing."""
        if self.is_world_process_zero():
            self.hub_model_id = ensure_repo(
                self._wanted_repo,
                private=self.args.hub_private_repo if private is None else private,
                revision=self.args.hub_revision,
                token=self.args.hub_token if token is None else token,
            )

    @property
    def _wanted_repo(self) -> str:
        return self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """
        Saves model, processor and card in the output folder, and pushes it without its checkpoints.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): Of the commit.
            blocking (`bool`, *optional*, defaults to `True`): `False` returns a `Future` at once.
            token (`str`, *optional*): Token for the Hub; by default `hub_token` of the arguments, or else that of the
                environment or login.
            revision (`str`, *optional*): Branch; by default `hub_revision` of the arguments.
            private (`bool`, *optional*): Whether a new repository is private; by default as `hub_private_repo` says.
            kwargs: Arguments of `create_model_card`.

        Returns:
            `CommitInfo`: the commit; `None` in all processes but the main one.

        Raises:
            HubUploadError: If it fails. Everything has been saved by then.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        repo_id = self.hub_model_id or self._wanted_repo
        self.create_model_card(**{"model_name": repo_id} | kwargs)
        self._finish_current_push()
        push = partial(
            push_run,
            str(self.args.output_dir),
            repo_id,
            commit_message=commit_message,
            token=self.args.hub_token if token is None else token,
            revision=self.args.hub_revision if revision is None else revision,
            private=self.args.hub_private_repo if private is None else private,
        )
        return push() if blocking else run_as_future(push)

    def create_model_card(  # type: ignore[override]
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset: str | list[str] | None = None,
    ) -> None:
        """
        Writes the card, `README.md` in the output folder, from what is there: model, logs, results, figures.

        Args:
            language (`str`, *optional*): Of questions and instructions.
            license (`str`, *optional*): By default that of the base model, where it is known.
            tags (`str` or `list[str]`, *optional*): Added to the card's own.
            model_name (`str`, *optional*): Id on the Hub; by default the card speaks of the folder.
            finetuned_from (`str`, *optional*): The base model; by default as the model's configuration says.
            dataset (`str` or `list[str]`, *optional*): Ids on the Hub of what was trained on.
        """
        if not self.is_world_process_zero():
            return
        options = CardOptions(
            license=license,
            language=language,
            tags=[*([tags] if isinstance(tags, str) else tags or [])],
            base_model=finetuned_from,
            datasets=[dataset] if isinstance(dataset, str) else dataset,
        )
        folder = Path(str(self.args.output_dir))
        write_card(folder, model_name, options, RunRecord.read(folder, **self._known()))

    def _known(self) -> dict[str, Any]:
        """What the trainer knows of the run that its folder may not tell yet."""
        known: dict[str, Any] = {}
        config: Any = getattr(self.accelerator.unwrap_model(self.model), "config", None)
        if hasattr(config, "to_json_string"):
            known["config"] = json.loads(config.to_json_string())
            if config._name_or_path:
                known["config"]["_name_or_path"] = portable_name(config._name_or_path)
        if not (Path(str(self.args.output_dir)) / RECIPE_FILE).exists():
            known["arguments"] = changed_arguments(self.args)
        if self.anchor is not None:
            known["anchor"] = self.anchor.fingerprint.to_dict()
        return known

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy = HubStrategy(self.args.hub_strategy)
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        # The next checkpoint will be pushed.
        if not self.args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        name = Path(checkpoint_folder).name
        places = {HubStrategy.CHECKPOINT: LAST_CHECKPOINT, HubStrategy.ALL_CHECKPOINTS: name}
        out = Path(str(self.args.output_dir))
        try:
            with staging_folder(out) as staged:
                stage_checkpoint(out, Path(checkpoint_folder), places.get(strategy), staged)
                # Of what is pushed: the output folder may not hold an adapter yet.
                write_card(staged, self.hub_model_id, record=RunRecord.read(staged, **self._known()))
        # A full disk, or a damaged log of those that the card tells of.
        except (OSError, ValueError) as error:
            _warn_of_push(name, self.hub_model_id, f"it could not be prepared in {out}: {error}")
            return
        # Of this function's jobs one runs after the other: an older checkpoint never replaces a newer one.
        job = run_as_future(
            _push_staged,
            staged,
            self.hub_model_id,
            name,
            commit_message=f"Training in progress, step {self.state.global_step}",
            token=self.args.hub_token,
            revision=self.args.hub_revision,
        )
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress([job])  # type: ignore[arg-type]
        else:
            self.push_in_progress.jobs.append(job)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if self.is_world_process_zero():
            self._finish_current_push()
            delete_staged(Path(str(self.args.output_dir)))
        return super()._inner_training_loop(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(str(self.args.output_dir if output_dir is None else output_dir))
        if self.args.should_save:
            # Nothing reads it, and to read it is to run what it says.
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            if (adapter := folder / ADAPTER_CONFIG).exists():
                write_bytes(adapter, portable_adapter(adapter))


def _push_staged(staged: Path, repo_id: str, name: str, **options: Any) -> None:
    """Pushes a staged checkpoint and deletes what was staged; warns of what goes wrong, since nobody waits for it."""
    try:
        push_folder(staged, repo_id, **options)
    except HubUploadError as error:
        _warn_of_push(name, repo_id, error.why)
    finally:
        shutil.rmtree(staged)


def _warn_of_push(name: str, repo_id: str | None, why: str) -> None:
    logger.warning(
        "%s was not pushed to %s: %s. The training goes on, and pushes the next checkpoint", name, repo_id, why
    )

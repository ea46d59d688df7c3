"""Uploads to the Hugging Face Hub, when `push_to_hub` asks for them or a script calls it.

The main process uploads, by huggingface_hub: the model at the end and in `save_model`, and by
`hub_strategy` what each committed checkpoint holds, in a thread while training goes on.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress, hf_api

from bigtrain.checkpoint.agreement import on_main
from bigtrain.checkpoint.save import InFlight
from bigtrain.errors import CheckpointError
from bigtrain.trainer import theirs
from bigtrain.trainer.saving import Saving

logger = logging.getLogger(__name__)

# Plans and logs tell of machines; what is being written is nobody's yet.
_KEPT_HERE = ["_*", ".*", f"{PREFIX_CHECKPOINT_DIR}-*", "plans/*", "logs/*"]
_MODEL_FILES = ("*.safetensors", "*.bin", "*.json")
_NOT_THE_MODEL = {"training_args.bin", "trainer_state.json", "manifest.json"}


class Hub(Saving):
    """What the trainer uploads."""

    hub_model_id: str | None = None
    push_in_progress: Any = None
    _pushed_checkpoint: Path | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository `hub_model_id` (by default of the output directory's name), or take
        the one that is there."""
        if not self.is_world_process_zero():
            return
        args = self.args
        name = args.hub_model_id or self._output_dir().absolute().name
        made = hf_api().create_repo(
            name,
            token=args.hub_token if token is None else token,
            private=args.hub_private_repo if private is None else private,
            exist_ok=True,
        )
        self.hub_model_id, self.push_in_progress = made.repo_id, None

    def _open_repository(self) -> None:
        """`init_hf_repo` before anything is trained. All ranks call it and hear if it failed."""
        if not self.args.push_to_hub:
            return
        try:
            on_main(self.args.ranks, self.init_hf_repo)
        except CheckpointError as fault:
            raise CheckpointError(
                f"push_to_hub: the repository can't be opened: {fault}; log in with `hf auth "
                "login` or set HF_TOKEN, and check hub_model_id, or leave push_to_hub out"
            ) from fault

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model so that `from_pretrained` loads it, with config and tokenizer; with
        `push_to_hub` it is uploaded too.

        All ranks call it; the main one writes. Weights have the precision the model came with.
        """
        super().save_model(output_dir, _internal_call)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model and its card to `output_dir` and upload them: the commit, or a future of
        it where `blocking` is false. `kwargs` are `create_model_card`'s. All ranks call it."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        super().save_model()
        if not self.is_world_process_zero():
            return None
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        name = kwargs.pop("model_name", None)
        self.create_model_card(
            model_name=name or str(self.hub_model_id).split("/")[-1],
            **{**kwargs, "tags": self._card_tags(kwargs.get("tags"))},
        )
        self._finish_current_push()
        return self._upload(
            self._output_dir(),
            commit_message,
            token=token,
            revision=self.args.hub_revision if revision is None else revision,
            run_as_future=not blocking,
            ignore_patterns=_KEPT_HERE,
        )

    def _card_tags(self, asked: str | list[str] | None) -> list[str] | None:
        """Those asked for, then the model's own."""
        tags = [asked] if isinstance(asked, str) else list(asked or [])
        own: Any = getattr(self.model, "model_tags", None) or []
        return [*tags, *(tag for tag in own if tag not in tags)] or None

    def _upload(self, folder: Path, message: str | None, **options: Any) -> Any:
        return hf_api().upload_folder(
            repo_id=str(self.hub_model_id),
            folder_path=str(folder),
            commit_message=message,
            **options,
        )

    # ---- While training goes on ----

    def _tell_saved(self, saved: InFlight) -> None:
        super()._tell_saved(saved)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(saved.target))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload what a committed checkpoint holds, as `hub_strategy` says."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self._is_pushing() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        checkpoint = Path(checkpoint_folder)
        self._copy_model(checkpoint)
        message = self._progress_message()
        options = {
            "token": self.args.hub_token,
            "revision": self.args.hub_revision,
            "run_as_future": True,
        }
        jobs = [self._upload(self._output_dir(), message, ignore_patterns=_KEPT_HERE, **options)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            place = "last-checkpoint" if is_last else checkpoint.name
            message = f"{message}, checkpoint"
            jobs.append(self._upload(checkpoint, message, path_in_repo=place, **options))
            self._pushed_checkpoint = checkpoint
        if self._is_pushing():
            self.push_in_progress.jobs.extend(jobs)
        else:
            self._tell_failed_pushes()
            all_of_them: Any = jobs
            self.push_in_progress = PushInProgress(all_of_them)

    def _copy_model(self, checkpoint: Path) -> None:
        """The checkpoint's model to `output_dir`; of a sharded engine only its companions."""
        for pattern in _MODEL_FILES:
            for path in checkpoint.glob(pattern):
                if path.name not in _NOT_THE_MODEL:
                    shutil.copy(path, self._output_dir() / path.name)
        self._save_companions(self._output_dir())

    def _progress_message(self) -> str:
        state = self._state_of_save or self.state
        if self.args.save_strategy == SaveStrategy.STEPS:
            return f"Training in progress, step {state.global_step}"
        return f"Training in progress, epoch {int(state.epoch or 0)}"

    def _is_pushing(self) -> bool:
        return self.push_in_progress is not None and not self.push_in_progress.is_done()

    def _finish_current_push(self) -> None:
        """Wait for the uploads that are under way."""
        if self._is_pushing():
            logger.info("waiting for the uploads to the Hub")
            self.push_in_progress.wait_until_done()
        self._tell_failed_pushes()
        self.push_in_progress = None

    def _tell_failed_pushes(self) -> None:
        """An upload that failed costs no training, but is said."""
        for job in self.push_in_progress.jobs if self.push_in_progress is not None else ():
            if job.exception() is not None:
                logger.warning("an upload to the Hub failed: %s", job.exception())

    def _in_upload(self) -> set[Path]:
        uploads = self._is_pushing() and self._pushed_checkpoint is not None
        return {self._pushed_checkpoint} if uploads and self._pushed_checkpoint else set()

    # ---- The card ----

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: Any = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: Any = None,
        dataset_tags: Any = None,
        dataset: Any = None,
        dataset_args: Any = None,
    ) -> None:
        """Write `README.md` in `output_dir`, with what is known of this training."""
        write: Any = theirs.Trainer.create_model_card
        write(
            self,
            language=language,
            license=license,
            tags=tags,
            model_name=model_name,
            finetuned_from=finetuned_from,
            tasks=tasks,
            dataset_tags=dataset_tags,
            dataset=dataset,
            dataset_args=dataset_args,
        )

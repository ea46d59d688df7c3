"""The Hugging Face Hub: the model card is written, uploads are left to `hf upload`."""

from __future__ import annotations

from typing import Any, NoReturn

import transformers

from bigtrain.errors import UnsupportedError
from bigtrain.trainer.core import TrainerCore


class Hub(TrainerCore):
    """What the trainer has of transformers' methods for the Hub."""

    hub_model_id: str | None = None

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
        write: Any = transformers.Trainer.create_model_card
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

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> NoReturn:
        """Refused: training needs no account and no network."""
        raise _refusal("init_hf_repo")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> NoReturn:
        """Refused: training needs no account and no network."""
        raise _refusal("push_to_hub")


def _refusal(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name}: bigtrain uploads nothing; call trainer.save_model() and upload the directory "
        "with `hf upload`"
    )

"""Where a run's figures go: through transformers' own callbacks, in its own way."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PrinterCallback, ProgressCallback
from transformers.integrations import get_reporting_integration_callbacks

from tests.arguments.rows import Events, trained, trainer
from tests.trainer.samples import arguments


def test_nothing_is_reported_unless_asked_for(tmp_path: Path) -> None:
    theirs = arguments(tmp_path, kind=transformers.TrainingArguments)
    assert trainer(tmp_path).args.report_to == theirs.report_to == []


def test_tensorboard_has_every_logged_figure(tmp_path: Path) -> None:
    run = trained(tmp_path, report_to="tensorboard", eval_strategy="epoch")
    board = next(iter(tmp_path.rglob("events.out.tfevents.*")))
    events = EventAccumulator(str(board.parent)).Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx(
        [entry["loss"] for entry in run.state.log_history if "loss" in entry], rel=1e-5
    )
    assert {"eval/loss", "train/grad_norm", "train/learning_rate"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio", "comet_ml"])
def test_a_service_gets_transformers_callback_or_its_refusal(tmp_path: Path, name: str) -> None:
    callback = get_reporting_integration_callbacks([name])[0]
    try:
        callback()
    except (RuntimeError, ImportError) as theirs:
        with pytest.raises(type(theirs), match=name.split("_")[0]):
            trainer(tmp_path, report_to=name)
    else:
        run = trainer(tmp_path, report_to=name)
        assert run.pop_callback(callback) is not None


def test_an_unknown_service_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="paper is not supported.*wandb"):
        trainer(tmp_path, report_to="paper")


@pytest.mark.parametrize(
    ("disabled", "shown"), [(False, ProgressCallback), (True, PrinterCallback)]
)
def test_a_bar_or_plain_lines_show_progress(tmp_path: Path, disabled: bool, shown: type) -> None:
    kinds = {
        type(one) for one in trainer(tmp_path, disable_tqdm=disabled).callback_handler.callbacks
    }
    assert shown in kinds and len(kinds & {ProgressCallback, PrinterCallback}) == 1


def test_on_save_comes_when_the_checkpoint_is_committed(tmp_path: Path) -> None:
    saved = Events("on_save")
    note = saved._note

    def look(args: object, state: transformers.TrainerState, *rest: object, **more: object) -> None:
        assert (tmp_path / f"checkpoint-{state.global_step}" / "manifest.json").is_file()
        note(args, state, *rest, **more)  # type: ignore[arg-type]

    saved.on_save = look  # type: ignore[method-assign,assignment]
    trained(tmp_path, save_strategy="steps", save_steps=2, callbacks=[saved])
    assert saved.steps == [2, 4]

"""Callbacks with a state of their own: noted at saving, given back at resume."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import TrainerControl

from bigtrain.trainer.core import TrainerCore, their_logger


class CallbackStates(TrainerCore):
    """What the trainer knows of its callbacks' states."""

    def _remember_callbacks(self) -> None:
        """Callbacks' states of now, in the state that is saved."""
        states: dict[str, Any] = {}
        for callback in self._stateful_callbacks():
            name = callback.__class__.__name__
            if name not in states:
                states[name] = callback.state()
            elif isinstance(states[name], list):
                states[name].append(callback.state())
            else:
                states[name] = [states[name], callback.state()]
        state: Any = self.state
        state.stateful_callbacks = states

    def _load_callback_state(self) -> None:
        """Callbacks as they were, when `restore_callback_states_from_checkpoint` asks for it."""
        if not self.args.restore_callback_states_from_checkpoint:
            return
        missing = []
        present = [*self.callback_handler.callbacks, self.control]
        states_of: Any = self.state.stateful_callbacks
        for name, saved in states_of.items():
            matching = [one for one in present if one.__class__.__name__ == name]
            if not matching:
                missing.append(name)
            states = saved if isinstance(saved, list) else [saved]
            for callback, state in zip(matching, states, strict=False):
                self._restore_callback(callback, state)
        if missing:
            their_logger.warning(
                f"Checkpoint included callbacks not included in current configuration. Ignoring. "
                f"({', '.join(missing)})"
            )

    def _restore_callback(self, callback: Any, state: dict[str, Any]) -> None:
        restored = type(callback)(**state.get("args", {}))
        for name, value in state.get("attributes", {}).items():
            setattr(restored, name, value)
        if isinstance(callback, TrainerControl):
            self.control = restored
            return
        self.callback_handler.remove_callback(callback)
        self.callback_handler.add_callback(restored)

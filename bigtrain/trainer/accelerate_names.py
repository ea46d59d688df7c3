"""Names of accelerate's `Accelerator` and its state that have nothing to do here: those which are
answered all the same, and those which say what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# As accelerate has them in a Trainer that was told nothing about them.
ANSWERS: Mapping[str, Any] = {
    "ao_recipe_handler": None,
    "autocast_handler": None,
    "debug": False,
    "delayed_fp8_autocast": False,
    "device_mesh": None,
    "device_placement": True,
    "flag_tensor": None,
    "fork_launched": False,
    "fp8_enabled": False,
    "fp8_recipe_handler": None,
    "has_fp8_handler": False,
    "has_lomo_optimizer": False,
    "init_handler": None,
    "initialized": True,
    "is_composable_parallelism_enabled": False,
    "log_with": [],
    "logging_dir": None,
    "msamp_recipe_handler": None,
    "parallelism_config": None,
    "profile_handler": None,
    "project_dir": None,
    "rng_types": ["generator"],
    "scaler": None,
    "scaler_handler": None,
    "should_save_model": True,
    "step": 0,
    "step_scheduler_with_optimizer": True,
    "te_recipe_handler": None,
    "torch_device_mesh": None,
    "torch_tp_plugin": None,
    "trackers": [],
    "use_stateful_dataloader": False,
}

# What the trainer does in another way, with that way.
INSTEAD: Mapping[str, str] = {
    "save_state": "the trainer saves: save_strategy, or trainer.save_model",
    "load_state": "trainer.train(resume_from_checkpoint=…) loads",
    "save_model": "trainer.save_model writes the whole model on every engine",
    "save_iteration": "checkpoints bear the step, which trainer.state.global_step counts",
    "project_configuration": "args.output_dir says where all goes, args.save_total_limit how much",
    "register_for_checkpointing": "a callback with a state (ExportableState) is saved with the "
    "checkpoint",
    "register_save_state_pre_hook": "override trainer._save_checkpoint",
    "register_load_state_pre_hook": "override trainer._load_from_checkpoint",
    "init_trackers": "report_to says where logs go",
    "get_tracker": "report_to says where logs go",
    "log": "trainer.log(values) logs to all that report_to names",
    "prepare_optimizer": "the engine prepares what the trainer trains; give it as optimizers=",
    "join_uneven_inputs": "every rank gets equally many batches",
    "dataloader_config": "args.accelerator_config says how batches are shared out",
    "ddp_handler": "args.ddp_find_unused_parameters and its like say how ddp works",
    "dynamo_plugin": "args.torch_compile and its like say what is compiled",
    "deepspeed_config": "accelerator.deepspeed_plugin.deepspeed_config has it",
    "deepspeed_plugins": "accelerator.deepspeed_plugin is the only one",
    "deepspeed_engine_wrapped": "trainer.deepspeed is DeepSpeed's engine",
    "get_deepspeed_plugin": "accelerator.deepspeed_plugin is the only one",
    "select_deepspeed_plugin": "accelerator.deepspeed_plugin is the only one",
    "destroy_process_group": "trainer.end() leaves the process group",
    "profile": "use torch.profiler in a callback",
    "lomo_backward": "accelerator.backward(loss, learning_rate=…)",
}

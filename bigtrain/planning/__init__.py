"""From what a user asked for to a RunPlan: everything is decided here, and nothing is started.

`decisions` goes through it in order; the other modules each answer one question: which processes
(`processes`, `gpus`), how many micro-batches (`batch_size`), what model (`model_shape`), which
engine fits (`automatic`, `engine_choice`, `device_memory`), where to (`output_dir`), how to start
(`script_source`, `preloading`). `forecast` tells what is to come of a plan.
"""

from bigtrain.planning.decisions import compare_engines, make_plan, missing_of
from bigtrain.planning.request import Request, Surroundings

__all__ = ["Request", "Surroundings", "compare_engines", "make_plan", "missing_of"]

"""From what a user asked for to a RunPlan: everything is decided here, and nothing is started.

`decisions` goes through it in order; the other modules each answer one question: which processes
(`processes`, `gpus`), how many micro-batches (`batch_size`), what model (`model_shape`), where to
(`output_dir`), how to start (`script_source`, `preloading`).
"""

from bigtrain.planning.decisions import Request, Surroundings, make_plan

__all__ = ["Request", "Surroundings", "make_plan"]

"""Any sharded checkpoint as a Hugging Face model directory.

Bytes go from wherever the source keeps them straight to their place in the output, hashed on the
way, in memory that does not grow with the model, and without torch.
"""

from bigtrain.checkpoint.consolidate.journal import partial_of
from bigtrain.checkpoint.consolidate.request import Request
from bigtrain.checkpoint.consolidate.run import carry_out, consolidate
from bigtrain.checkpoint.consolidate.summary import FileSummary, Moved, Summary

__all__ = [
    "FileSummary",
    "Moved",
    "Request",
    "Summary",
    "carry_out",
    "consolidate",
    "partial_of",
]

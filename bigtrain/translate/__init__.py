"""TrainingArguments, an engine and a topology in; that engine's config and every fate out."""

from bigtrain.translate.translation import topology_for, translate

__all__ = ["topology_for", "translate"]

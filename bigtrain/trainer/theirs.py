"""transformers' own classes, as they were when bigtrain was imported.

A script may put bigtrain's in their place (`transformers.Trainer = bigtrain.Trainer`); what is
borrowed from them must not then be looked for in itself.
"""

from transformers.trainer import Trainer
from transformers.trainer_seq2seq import Seq2SeqTrainer
from transformers.training_args import TrainingArguments
from transformers.training_args_seq2seq import Seq2SeqTrainingArguments

__all__ = ["Seq2SeqTrainer", "Seq2SeqTrainingArguments", "Trainer", "TrainingArguments"]

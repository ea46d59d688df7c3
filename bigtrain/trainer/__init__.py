"""The one training loop and its arguments: `Trainer` and `TrainingArguments`."""

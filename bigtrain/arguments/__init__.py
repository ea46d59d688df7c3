"""What is known of TrainingArguments without importing transformers."""

"""Fine-tuning at long contexts: data, schedules, adapters and logging for Transformers' ``Trainer``."""

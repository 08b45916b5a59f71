"""Gradient accumulation inside the Hugging Face Trainer, exact: one line for one trainer."""

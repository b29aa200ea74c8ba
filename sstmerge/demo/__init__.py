"""The embedded demo: its base model, prompts, adapters and run."""

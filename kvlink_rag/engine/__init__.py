"""The transformers model as tensors see it: forwards, hooks, live caches. Knows no prompt text."""

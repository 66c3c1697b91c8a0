"""Passages recognised by their content in prompts of others. Knows texts; knows no store."""

from .recogniser import MIN_TOKENS, Recogniser, count_passages

__all__ = ["MIN_TOKENS", "Recogniser", "count_passages"]

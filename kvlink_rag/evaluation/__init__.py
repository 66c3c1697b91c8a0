"""Evaluation as in the KVLink paper: data sets, modes side by side, intervals, times.

examples → prompts → first token of each mode → batched decoding → JSONL → summary
"""

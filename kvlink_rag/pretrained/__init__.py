"""Pretrained models and their files: where they lie, which are known, how they are fetched."""

"""Data sets as evaluation and training read them: rows of public schemas to plain examples.

source (file or hub name) → rows → schema → Example
"""

"""vLLM integration of KVLink: kvlink_rag prefills from snapshots, vLLM decodes.

    request → front (parts, layout) → vLLM's scheduler → connector → pages → vLLM decodes

`connector` and `middleware` are what vLLM is told to load; only these and `served` know vLLM.
"""

from __future__ import annotations

from .export import export

__all__ = ["__version__", "export"]

__version__ = "0.1.0"

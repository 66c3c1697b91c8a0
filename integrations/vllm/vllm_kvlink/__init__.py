"""KVLink for vLLM: kvlink_rag prefills from snapshots of documents, vLLM decodes.

`KVLinkConnector` stands in `vllm_kvlink.connector`, the server's side of requests in
`vllm_kvlink.middleware`; both are named on vLLM's command line. These names need no vLLM.
"""

from .export import export
from .handover import Handover
from .options import Options

__all__ = ["Handover", "Options", "export"]

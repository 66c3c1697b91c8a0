"""KVLink for LangChain: every document is encoded once, answers start at once.

    from langchain_kvlink import ChatKVLink, KVLinkVectorStore

    store = KVLinkVectorStore.from_texts(["The harbour of Orvale was built in 1911."])
    llm = ChatKVLink()  # same collection: whatever chain puts that text into a prompt, reuses it

The public names are those in `__all__`. Importing this package loads neither torch nor weights.
"""

from importlib.util import find_spec

from kvlink_rag.errors import MissingExtra

if find_spec("langchain_core") is None:
    raise MissingExtra.of("langchain-core", "langchain", "langchain_kvlink")

from langchain_kvlink.chains import KVLinkDocumentsChain
from langchain_kvlink.chat_models import ChatKVLink
from langchain_kvlink.documents import document_block
from langchain_kvlink.embeddings import ContrieverEmbeddings
from langchain_kvlink.llms import KVLinkLLM
from langchain_kvlink.register import aregister_documents, register_documents
from langchain_kvlink.retrievers import KVLinkRetriever
from langchain_kvlink.vectorstores import KVLinkVectorStore

__all__ = [
    "ChatKVLink",
    "ContrieverEmbeddings",
    "KVLinkDocumentsChain",
    "KVLinkLLM",
    "KVLinkRetriever",
    "KVLinkVectorStore",
    "aregister_documents",
    "document_block",
    "register_documents",
]

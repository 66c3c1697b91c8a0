"""Which nodes of a collection come from which source document, and taking them out again.

nodes → documents → collection, and the nodes of earlier versions of their sources out of it. What
stands in the collection is read once and kept in step, so that one more document costs no reading
of all others. Knows collections, by their public face; knows no models.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.storage.docstore.types import BaseDocumentStore
from llama_index.llms.kvlink.nodes import Origin, origin_of, window_id

from kvlink_rag.documents import Document

if TYPE_CHECKING:
    from kvlink_rag import KVLinkRAG

logger = logging.getLogger("kvlink_rag.llama_index")


class Sources:
    """The origins of a collection's documents, for whoever holds its `writing()`."""

    def __init__(self, rag: KVLinkRAG) -> None:
        self._rag = weakref.ref(rag)
        self._version: Any = None
        self.origins: dict[str, Origin] = {}  # by document id
        self._of_source: dict[str, set[str]] = {}
        self._of_node: dict[str, set[str]] = {}

    def refresh(self) -> Sources:
        """Bring all up to the catalog's version, whoever changed it."""
        rag = self._rag()
        if rag is not None and self._version != (version := rag.catalog.version()):
            for kept in (self.origins, self._of_source, self._of_node):
                kept.clear()
            self._put(rag.documents())
            self._version = version
        return self

    def note(self, added: Iterable[Document], removed: Iterable[str]) -> None:
        """What was just written, all of it under one `writing()`."""
        for id in removed:
            self._drop(id)
        self._put(added)
        rag = self._rag()
        self._version = None if rag is None else rag.catalog.version()

    def of_source(self, ref_doc_id: str) -> set[str]:
        """Ids of the documents of a source, and of the source itself where it is a document."""
        return self._of_source.get(ref_doc_id, set()) | self.of_nodes([ref_doc_id])

    def of_nodes(self, node_ids: Iterable[str]) -> set[str]:
        """Ids of the documents of nodes."""
        return {id for node_id in node_ids for id in self._of_node.get(node_id, ())}

    def stale(self, documents: Sequence[Document]) -> set[str]:
        """Ids of documents that `documents` replace: of another version of their source, and of a
        node that has other content now."""
        origins = [origin_of(document) for document in documents]
        versions = {(origin.source, origin.version) for origin in origins}
        found = self.of_nodes(origin.node_id for origin in origins)
        for source in {origin.source for origin in origins if origin.source and origin.version}:
            for id in self._of_source.get(source, ()):
                known = self.origins[id]
                if known.version and (source, known.version) not in versions:
                    found.add(id)
        here = {str(document.id) for document in documents}
        return found - here - {window_id(id) for id in here}

    def names(self) -> list[str]:
        """All sources."""
        return list(self._of_source)

    def _put(self, documents: Iterable[Document]) -> None:
        for document in documents:
            id, origin = str(document.id), origin_of(document)
            self._drop(id)
            self.origins[id] = origin
            self._of_node.setdefault(origin.node_id, set()).add(id)
            if origin.source:
                self._of_source.setdefault(origin.source, set()).add(id)

    def _drop(self, id: str) -> None:
        if (origin := self.origins.pop(id, None)) is None:
            return
        _leave(self._of_node, origin.node_id, id)
        _leave(self._of_source, origin.source, id)


def _leave(groups: dict[str, set[str]], name: str | None, id: str) -> None:
    if name in groups:
        groups[name].discard(id)
        if not groups[name]:
            del groups[name]


_known: weakref.WeakKeyDictionary[KVLinkRAG, Sources] = weakref.WeakKeyDictionary()


def take(
    rag: KVLinkRAG,
    documents: Sequence[Document],
    put: Callable[[], object],
) -> None:
    """Let `put` put documents into `rag`, then delete those they replace."""
    with rag.writing():
        sources = _sources(rag)
        stale = sources.stale(documents)
        put()
        rag.delete(stale, missing_ok=True)
        sources.note(documents, stale)
    if stale:
        logger.info("%d nodes of earlier versions of their documents are removed", len(stale))


def delete_ref_doc(rag: KVLinkRAG, ref_doc_id: str) -> int:
    """Delete all nodes of a source document, and say how many."""
    return _delete(rag, lambda sources: sources.of_source(ref_doc_id))


def delete_nodes(rag: KVLinkRAG, node_ids: Iterable[str]) -> int:
    """Delete nodes by id, and say how many."""
    wanted = [node_ids] if isinstance(node_ids, str) else list(node_ids)
    return _delete(rag, lambda sources: sources.of_nodes(wanted))


def sync(rag: KVLinkRAG, docstore: BaseDocumentStore) -> int:
    """Delete all nodes whose source `docstore` does not hold, and say how many."""

    def gone(sources: Sources) -> set[str]:
        lost = [source for source in sources.names() if not _holds(docstore, source)]
        return {id for source in lost for id in sources.of_source(source)}

    return _delete(rag, gone)


def _delete(rag: KVLinkRAG, choose: Callable[[Sources], set[str]]) -> int:
    with rag.writing():
        sources = _sources(rag)
        chosen = choose(sources)
        count = rag.delete(chosen, missing_ok=True)
        sources.note([], chosen)
    return count


def _sources(rag: KVLinkRAG) -> Sources:
    return _known.setdefault(rag, Sources(rag)).refresh()


def _holds(docstore: BaseDocumentStore, source: str) -> bool:
    return (
        docstore.get_document_hash(source) is not None
        or docstore.get_ref_doc_info(source) is not None
        or docstore.document_exists(source)
    )

"""A directory of documents that answers questions: catalog, the two lives, care."""

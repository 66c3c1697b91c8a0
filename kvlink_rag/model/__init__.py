"""One language model: loaded, asked, verified. Knows no collection."""

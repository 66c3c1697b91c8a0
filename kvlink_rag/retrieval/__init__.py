"""Text to vectors, vectors to nearest rows. Knows no catalog and no language model."""

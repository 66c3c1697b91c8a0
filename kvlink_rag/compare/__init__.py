"""Other ways to the first token, to compare with. Nothing here is used to answer."""

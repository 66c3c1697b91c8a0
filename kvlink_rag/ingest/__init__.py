"""Files to passages to a collection. Knows no terminal."""

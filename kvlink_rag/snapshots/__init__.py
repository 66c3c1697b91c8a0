"""Keys and values of passages: encoded, kept, laid into a live cache. Knows no documents."""

"""Which model is in a file, and its weights."""

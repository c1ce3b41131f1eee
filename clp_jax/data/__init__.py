"""Data: seqio tasks, vocabularies, and the built-in world."""

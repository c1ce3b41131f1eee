"""T5 models: the network, its published sizes, and decoding from it."""

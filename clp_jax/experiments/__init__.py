"""The paper's experiments, end to end: what `clp experiment` runs."""

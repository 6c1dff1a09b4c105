"""The command line: `bnlora demo`, `fit`, `predict`, `evaluate` and `diagnose`."""

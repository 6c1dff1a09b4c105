"""The grid of `benchmarks/protocol.md`: its tasks, its methods, and the cells that a run computes once."""

"""Does it pay? Every method on the same rows, by one protocol (`benchmarks/protocol.md`)."""

"""Where adapters go, and what spans them.

| module   | what it has                                                               |
|----------|---------------------------------------------------------------------------|
| `sites`  | `select`: the modules and layers that get an adapter, with their shapes     |
| `frames` | `Frames`: fixed matrices around a core, and where they came from            |
| `peft`   | adapters of the PEFT library, read and written                            |
"""

"""Adapter sites, frames, and adapter files.

| module        | content                                                              |
|---------------|----------------------------------------------------------------------|
| `sites`       | `select`: the modules and layers with an adapter, and their shapes   |
| `frames`      | `Frames`: the fixed matrices around a core, and their source         |
| `peft`        | reading and writing adapters of the PEFT library                     |
| `peft_config` | their configuration: what is refused, and rank and scale by module   |
"""

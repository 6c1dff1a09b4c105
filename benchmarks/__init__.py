"""Measurements of the library: `python -m benchmarks` lists them, `python -m benchmarks NAME` runs one.

A benchmark is a module in one of the three folders. The first line of its docstring is what the list shows;
`options` adds its arguments to a parser; `run` measures and writes tables into a `Report`.

| module    | what benchmarks share                                              |
|-----------|--------------------------------------------------------------------|
| `entry`   | the list of benchmarks, and the one command                        |
| `timing`  | programs in turns, medians, intervals and ratios                   |
| `report`  | tables in Markdown, printed as they grow, stored where asked       |
| `tables`  | the tables of the documents, out of the stored ones                |
| `data`    | the rows of the demonstration with cached activations              |
| `heads`   | small adapters whose posterior MCMC can reach                      |
| `steps`   | what benchmarks use of the inside of a fit                         |
"""

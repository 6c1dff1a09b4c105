"""Measurements of the library: `python -m benchmarks` lists them, `python -m benchmarks NAME` runs one.

A benchmark is a module in one of the four folders. The list shows the first line of its docstring. Its
function `options` adds arguments to a parser; `run` measures and writes tables into a `Report`.

| module    | contents                                                           |
|-----------|--------------------------------------------------------------------|
| `entry`   | the list of benchmarks, and the command line                       |
| `timing`  | alternating runs of programs; medians, intervals and ratios        |
| `report`  | tables in Markdown, printed row by row and optionally stored       |
| `tables`  | copies stored tables into the documents                            |
| `data`    | the rows of the demonstration with cached activations              |
| `heads`   | small adapters whose exact posterior MCMC can sample               |
| `steps`   | the compiled step of a fit                                         |
| `cells`   | the results of the grid, their metrics, tests, tables and pictures |
"""

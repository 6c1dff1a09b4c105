"""Rows of tokens: from a table with texts to what a model is fitted to.

| module    | what it has                                                             |
|-----------|-------------------------------------------------------------------------|
| `batch`   | `Batch`: tokens, mask and labels; minibatches                           |
| `text`    | `text_classification`: texts and a template to batches                  |
| `labels`  | words as classes                                                        |
| `tables`  | CSV, JSON lines and Parquet files                                       |
| `formats` | how such files are written down                                         |
| `assets`  | models and data sets that packages ship, with their checksums           |
"""

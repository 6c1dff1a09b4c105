"""Training data: from tables of texts to batches of tokens.

| module    | content                                                                 |
|-----------|-------------------------------------------------------------------------|
| `batch`   | `Batch`: tokens, mask, labels, and what is cached of them; minibatches  |
| `text`    | `text_classification`: from texts and a template to batches             |
| `labels`  | words as classes                                                        |
| `tables`  | tables in CSV, JSON lines and Parquet files                             |
| `formats` | readers and writers of these file formats                               |
| `assets`  | models and data sets inside packages, with their checksums              |
"""

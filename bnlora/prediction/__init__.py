"""From posterior draws to predictions of rows.

| module      | what it has                                                           |
|-------------|-----------------------------------------------------------------------|
| `posterior` | the protocol of posteriors, and the posterior of one point            |
| `predict`   | `predict`, and the `Prediction` that metrics read                     |
| `functions` | identifiable functions of adapters, as named scalars                  |
| `reading`   | predictions after each token of a text                                |
| `selective` | risk against coverage: answering only the rows with the least doubt   |
"""

"""From posterior draws to predictions of rows.

| module      | what it has                                                           |
|-------------|-----------------------------------------------------------------------|
| `posterior` | the protocol of posteriors, and the posterior of one point            |
| `predict`   | `predict`, and the `Prediction` that metrics read                     |
| `functions` | identifiable functions of adapters, as scalars with names             |
| `reading`   | predictions token by token                                            |
| `selective` | risk against coverage: predicting only the rows with least doubt      |
"""

"""Stochastic variational inference.

| module       | what it has                                                          |
|--------------|----------------------------------------------------------------------|
| `fit`        | `fit`: minibatches through the step, with a record                   |
| `step`       | `svi_step`: the compiled step                                        |
| `elbo`       | the bound and its terms                                              |
| `parts`      | a minibatch run in equal parts                                       |
| `watch`      | what looks at a fit after each step                                  |
| `validation` | the best step by rows that are not fitted                            |
| `plateau`    | when the bound does not grow any more                                |
| `result`     | `Fit`: the fitted guide and its record                               |
| `maximise`   | a whole fit as one compiled loop, for small problems                 |
| `checkpoint` | fits on disk                                                         |
"""

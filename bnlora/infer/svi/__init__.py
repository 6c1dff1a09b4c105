"""Stochastic variational inference.

| module       | what it has                                                          |
|--------------|----------------------------------------------------------------------|
| `fit`        | `fit`: runs the step on minibatches and records it                   |
| `step`       | `svi_step`: the compiled step                                        |
| `record`     | the numbers of every step                                            |
| `elbo`       | the bound and its terms                                              |
| `parts`      | a minibatch in equal parts, one after the other                      |
| `watch`      | the loop of the steps: progress, hook and stopping rules             |
| `resume`     | `Checkpoints`: the state of a fit on disk, to go on from             |
| `validation` | the best step by validation rows                                     |
| `plateau`    | stopping if the bound does not grow any more                         |
| `result`     | `Fit`: the fitted guide and its record                               |
| `maximise`   | a whole fit in one compiled loop, for small problems                 |
| `checkpoint` | fits on disk                                                         |
| `exhausted`  | settings that take less memory, for an error                         |
"""

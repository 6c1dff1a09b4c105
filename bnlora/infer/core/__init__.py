"""The core prior on the tangent model, fitted in one call.

| module       | what it has                                                          |
|--------------|----------------------------------------------------------------------|
| `scales`     | one scale a family, by evidence                                      |
| `gaussian`   | Laplace's Gaussian over all sites: a posterior, a start, a whitening |
| `restricted` | closest Gaussian of a restricted covariance, for starts of guides    |
| `start`      | start values of guides at that Gaussian                              |
| `fit`        | `fit_core`: all of it in one call                                    |
| `stored`     | a core fit on disk                                                   |
"""

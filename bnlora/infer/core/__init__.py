"""Fits of the core prior on the tangent model.

| module       | content                                                              |
|--------------|----------------------------------------------------------------------|
| `scales`     | one scale for each family, by evidence                               |
| `gaussian`   | Laplace's Gaussian over all sites: a posterior, a start, a whitening |
| `restricted` | closest Gaussian with a restricted covariance, for starts of guides  |
| `start`      | start values of guides at that Gaussian                              |
| `fit`        | `fit_core`: all steps in one call                                    |
| `stored`     | a core fit on disk                                                   |
"""

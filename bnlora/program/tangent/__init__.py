"""The network replaced by its first-order expansion at the base: a Gaussian process over functions.

    logit_c(x) = z_c(x) + phi_c(x)^T u        u: the core of every module and layer (`bnlora.priors.core`)

| module        | what it has                                                            |
|---------------|------------------------------------------------------------------------|
| `gradients`   | derivatives of logit contrasts, projected to frames or sketched        |
| `activations` | second moments of what enters the modules                              |
| `targets`     | what may be adapted: modules, the base's own slope, a class bias       |
| `frames`      | frames from rows, without their labels                                 |
| `model`       | `Tangent`: the same prior and likelihood on features                   |
| `linear`      | Laplace's approximation of a linear model: mode, evidence, covariance  |
| `scales`      | scales by evidence                                                     |
| `restricted`  | closest Gaussian of a restricted covariance, for starts of guides      |
| `gaussian`    | Laplace's Gaussian over all sites: a posterior, a start, a whitening   |
| `start`       | start values of guides at that Gaussian                                |
| `fit`         | all of it in one call                                                  |
| `stored`      | a core fit on disk                                                     |
| `calibrate`   | inferences for simulation-based calibration                            |
"""

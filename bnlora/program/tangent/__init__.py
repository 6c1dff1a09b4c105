"""The first-order expansion of the network at the base: a Gaussian process over functions.

    logit_c(x) = z_c(x) + phi_c(x)^T u        u: the core of every module and layer (`bnlora.priors.core`)

| module        | content                                                                 |
|---------------|-------------------------------------------------------------------------|
| `gradients`   | derivatives of logit contrasts, projected to frames or sketched         |
| `activations` | second moments of the inputs of the modules                             |
| `targets`     | possible targets: modules, the base's own slope, a class bias           |
| `frames`      | frames from rows, without their labels                                  |
| `model`       | `Tangent`: the same prior and likelihood on features                    |
| `linear`      | Laplace's approximation of a linear model: mode, evidence, covariance   |
| `moving`      | coordinates that follow random scales, nearly standard normal           |
| `where`       | indices of scales and cores in the unconstrained vector                 |

`bnlora.infer.core` fits the model: scales by evidence, Laplace's Gaussian, starts of guides, storage.
`bnlora.assess.sbc.core` has its inferences for simulation-based calibration.
"""

"""The NumPyro program of a base with random adapters.

| module        | contents                                                            |
|---------------|---------------------------------------------------------------------|
| `model`       | `Classifier`: prior, network and likelihood                         |
| `adapter_prior` | the prior program, bound to its sites                             |
| `protocol`    | the members that base models and classifiers must have              |
| `trunk`       | `Trunk`: the part that no draw of the adapters changes              |
| `cache`       | activations below the lowest adapter, computed once                 |
| `conditional` | the program with some sites fixed at values                         |
| `draws`       | draws of a guide with their densities                               |
| `density`     | all latent sites as one unconstrained vector                        |
| `tangent`     | the network replaced by its first-order expansion at the base       |
"""

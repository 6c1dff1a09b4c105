"""The NumPyro program of a base with random adapters.

| module        | what it has                                                         |
|---------------|---------------------------------------------------------------------|
| `model`       | `Classifier`: prior, network and likelihood                         |
| `protocol`    | what base models and classifiers must have                          |
| `trunk`       | `Trunk`: what no draw of the adapters changes                       |
| `cache`       | activations below the lowest adapter, computed once                 |
| `conditional` | the program with some sites held at values                          |
| `draws`       | one draw of a guide, with its densities                             |
| `density`     | all latent sites as one vector without constraints                  |
| `tangent`     | the network replaced by its first-order expansion at the base       |
"""

"""Can a posterior be trusted?

| module             | question                                                       |
|--------------------|----------------------------------------------------------------|
| `prior_predictive` | what does the prior say before any row is seen?                |
| `diagnostics`      | is this fit sound?                                             |
| `comparison`       | how far is it from a reference?                                |
| `sbc`              | is the inference calibrated on data that the prior made?       |
"""

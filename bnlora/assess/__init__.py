"""Can a posterior be trusted?

| module             | question                                                       |
|--------------------|----------------------------------------------------------------|
| `prior_predictive` | what does the prior predict before any row is seen?            |
| `diagnostics`      | is this fit sound?                                             |
| `comparison`       | how far is a posterior from a reference?                       |
| `sbc`              | is the inference calibrated on data drawn from the prior?      |
| `monitor`          | is a deployed classifier still as good as it was?              |
| `explore`          | what would another prior, or fewer rows, have given?           |
"""

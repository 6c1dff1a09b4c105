"""`bnlora serve`: a small HTTP service over a stored fit.

| module    | what it has                                                              |
|-----------|--------------------------------------------------------------------------|
| `command` | the command, its options, and the server process                         |
| `web`     | the routes, the token, and the limits of a request                       |
| `bodies`  | JSON bodies to texts and labels; what is wrong with them, in one sentence |
| `queue`   | waiting requests, which one thread answers in batches                    |
| `service` | the fit: texts to probabilities, prediction sets and actions             |
| `counts`  | Prometheus metrics, means over time, and labels that come later          |
| `log`     | predictions that are appended to a file                                  |
| `page`    | the page of the service, without a script or an external resource        |

The packages of the extra `serve` are imported inside functions, so every module can be imported without them.
"""

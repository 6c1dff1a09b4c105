"""`bnlora serve`: a small HTTP service over a stored fit.

| module       | what it has                                                              |
|--------------|--------------------------------------------------------------------------|
| `command`    | the command and its options                                              |
| `server`     | the process that listens until it is asked to stop                       |
| `connection` | time limits of slow clients                                              |
| `web`        | the routes, the token, and the limits of a request                       |
| `schema`     | the routes in OpenAPI                                                    |
| `bodies`     | JSON bodies to texts and labels; what is wrong with them, in one sentence |
| `queue`      | waiting requests, which one thread answers in batches                    |
| `service`    | the fit: texts to probabilities, prediction sets and actions             |
| `counts`     | Prometheus metrics, means over time, and labels that come later          |
| `watch`      | the monitor of what is served                                            |
| `log`        | predictions that are appended to a file                                  |
| `page`       | the page of the service, without a script or an external resource        |
| `watch_page` | the monitor on that page                                                 |
| `drawings`   | small drawings in SVG                                                    |

The packages of the extra `serve` are imported inside functions, so every module can be imported without them.
"""

"""From posterior draws to predictions of rows, and to texts.

| module         | what it has                                                            |
|----------------|------------------------------------------------------------------------|
| `posterior`    | the protocol of posteriors, and the posterior of one point             |
| `imported`     | an adapter of the PEFT library as a posterior                          |
| `exported`     | a posterior as adapters of the PEFT library                            |
| `predict`      | `predict`, and the `Prediction` that metrics read                      |
| `outcomes`     | predictions of values and texts                                        |
| `functions`    | identifiable functions of adapters, as named scalars                   |
| `reading`      | predictions after each token of a text                                 |
| `selective`    | risk against coverage: answering only the rows with the least doubt    |
| `risk_control` | answers with a guarantee on the share of wrong ones                    |
| `conformal`    | sets of classes with a guarantee that the true class is inside         |
| `class_scores` | scores of classes for these sets                                       |
| `decisions`    | actions of least expected cost, and what they cost on rows with labels |
| `generation`   | `generate`: texts from a posterior                                     |
| `generated`    | `Generation`: texts with the uncertainty of every token                |
| `writing`      | the loop around the compiled programs of generation                    |
| `decoding`     | these programs: prompts, steps, and the choice of tokens               |
| `prompts`      | prompts as tokens, what ends a text, and text from tokens              |
"""

"""Training data: from tables of texts to batches of tokens.

| module      | content                                                                |
|-------------|------------------------------------------------------------------------|
| `batch`     | `Batch`: tokens, mask, labels, and what is cached of them; minibatches |
| `text`      | `text_classification`: from texts and a template to batches            |
| `labels`    | words as classes                                                       |
| `tables`    | tables in CSV, JSON lines and Parquet files                            |
| `formats`   | readers and writers of these file formats                              |
| `pieces`    | `open_table`: tables of any length, a piece at a time                  |
| `assets`    | models and data sets inside packages, with their checksums             |
| `questions` | multiple-choice questions of public sets, with training files          |
| `medical`   | multiple-choice questions of medicine and science, to test on          |
| `olmo`      | the files of questions that both of these read                         |
| `catalogue` | `overview`: every data set that can be downloaded, in one table        |
| `fetching`  | downloads, checks and caches them                                      |
| `choices`   | `multiple_choice`: contexts and completions to batches                 |
| `letters`   | `letter_choices`: choices in the text, answered by letter              |
| `outcomes`  | `text_outcomes`: grades, votes, values; `language_modelling`: texts    |
| `splits`    | what all readers share                                                 |
| `fields`    | what rows carry beside tokens, mask and labels                         |
"""

"""`bnlora generate`: texts that a fit writes after prompts, with what it does not know at every token."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

from bnlora._util.files import room_for
from bnlora.app import options
from bnlora.app.kept import exit_if_elsewhere, keep
from bnlora.app.printing import print_result, reporting
from bnlora.app.recipe import Recipe
from bnlora.data.formats import ENCODING
from bnlora.data.tables import read_table, require_writable, write_table
from bnlora.infer.svi.checkpoint import load_fit, read_notes
from bnlora.infer.svi.result import Fit
from bnlora.prediction.generated import Generation, Mixture
from bnlora.prediction.generation import generate


def generate_command(
    folder: options.Folder,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to go on with; repeat it for several.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Table with a column of prompts.", show_default=False)
    ] = None,
    text: options.TextColumn = "text",
    encoding: options.Encoding = ENCODING,
    max_new_tokens: Annotated[int, typer.Option(help="Largest number of tokens of a text.", min=1)] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most probable token; at 1 texts are draws.", min=0)
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from so many tokens.", min=1, show_default="all")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from tokens of this probability.", show_default="all")
    ] = None,
    draws: options.Draws = 8,
    mixture: Annotated[
        Mixture, typer.Option(help="One text by all draws ('token'), or one by each ('sequence').")
    ] = "token",
    stop: Annotated[
        list[str] | None, typer.Option(help="String that ends a text; \\n is a new line.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Also write a table: .csv, .jsonl or .parquet.", show_default=False)
    ] = None,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Write on after prompts: texts, their log-probabilities and their epistemic uncertainty."""
    with reporting() as progress, room_for(out, source=prompts):
        given = _prompts(prompt, prompts, text, encoding)
        if out is not None:
            require_writable(out)
        written = generate(
            jax.random.key(seed), _fit(folder), given, max_new_tokens=max_new_tokens, temperature=temperature,
            top_k=top_k, top_p=top_p, num_draws=draws, mixture=mixture, console=progress,
            stop=[one.replace("\\n", "\n") for one in stop or []],
        )  # fmt: skip
        rows = rows_of(written)
        result: dict[str, Any] = {"texts": rows}
        shown: list[Any] = [written]
        if out is not None:
            from datasets import Dataset  # late: its import takes long

            place = keep(out, lambda path: write_table(Dataset.from_list(rows), path), progress)
            result["table"] = str(place)
            shown.append(f"table: {place}")
        print_result(result, *shown, json=json)
        if out is not None:
            exit_if_elsewhere(out, place)


def rows_of(written: Generation) -> list[dict[str, Any]]:
    """A row for each text: its prompt, log-probability, number of tokens, and means over its tokens.

    Args:
        written: The texts.
    """
    rows = []
    for index, text in enumerate(written.texts):
        real = written.mask[index]
        row = {
            "prompt": written.prompts[written.prompt_of[index]],
            "text": text,
            "tokens": int(real.sum()),
            "log probability": float(written.sequence_log_probs[index]),
            "entropy": float(written.entropy[index, real].mean()),
        }
        if written.mixture == "token":
            row["epistemic"] = float(written.epistemic[index, real].mean())
        rows.append(row)
    return rows


def _prompts(given: list[str] | None, table: Path | None, text: str, encoding: str) -> list[str]:
    if (given is None) == (table is None):
        raise ValueError("give prompts either as --prompt, once for each, or as a table with --prompts")
    if given is not None:
        return given
    return list(read_table(table, columns=[text], encoding=encoding)[text])  # type: ignore[arg-type]


def _fit(folder: Path) -> Fit:
    """The fit in a folder. Its likelihood is made from rows; any row serves, for no outcome is computed."""
    from datasets import Dataset

    recipe = Recipe.from_folder(folder)
    recipe.require_fitted(read_notes(folder))
    recipe = replace(recipe, max_length=None)  # a limit of rows, and not of prompts
    base = recipe.load_base()
    columns: dict[str, Any] = {"text": ["a text of some words"]}
    columns |= {} if recipe.choices is None else {recipe.choices: [["a choice", "another choice"]]}
    columns |= {} if recipe.prompt is None else {recipe.prompt: ["a prompt"]}
    data = recipe.read({"rows": Dataset.from_dict(columns)}, base, text="text", label=None)
    return load_fit(folder, *recipe.build(base, recipe.likelihood(data)))

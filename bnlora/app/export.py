"""`bnlora export`: a fit as adapters that the PEFT library loads."""

from pathlib import Path
from typing import Annotated

import jax
import typer

from bnlora._util.files import room
from bnlora.app import options
from bnlora.app.kept import restored
from bnlora.app.printing import print_result, reporting
from bnlora.data.formats import ENCODING
from bnlora.prediction.exported import export_peft


def export(
    folder: options.Folder,
    table: options.Table,
    out: Annotated[Path, typer.Option(help="Folder for adapters and card.", show_default=False)],
    text: options.TextColumn = "text",
    label: options.LabelColumn = "label",
    labels_are: options.LabelsAre = None,
    encoding: options.Encoding = ENCODING,
    draws: Annotated[int, typer.Option(help="Number of draws to write.", min=0)] = 0,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Write the mean of a fit and its draws as adapters that `peft` loads, with a model card.

    The fit and the mean are compared on the rows of the table.
    """
    with reporting() as progress, room(out):
        fit, _, batch = restored(folder, table, text, label, encoding, labels_are=labels_are)
        written = export_peft(jax.random.key(seed), fit, out, num_draws=draws, data=batch, console=progress)
        result = {"mean": str(written.mean), "draws": [str(path) for path in written.draws]}
        print_result({**result, "nll": written.nll, "retained": written.retained}, written, json=json)

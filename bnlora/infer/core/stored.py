"""Core fits on disk: the files of `bnlora.save_fit`, with the arrays that rebuild the posterior.

| arrays                          | content                                                           |
|---------------------------------|-------------------------------------------------------------------|
| `frames.*`                      | the frames, as for every fit under a core prior                   |
| `core.scales`, `.without`, ...  | the chosen scales, their evidence and standard deviations         |
| `core.affine`, `core.informed`  | Laplace's Gaussian, which defines the coordinates of the guide    |
| `core.earlier`                  | of a refit, what earlier rows taught (`bnlora.priors.carried`)    |
| `core.seconds`                  | seconds of every step                                             |

The Gaussian is stored because it cannot be recomputed exactly: its directions are eigenvectors, which can
rotate or change sign on another machine. The guide's parameters would then have another meaning.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from bnlora._util.fingerprint import is_same
from bnlora.adapters.frames import Frames, frames_from
from bnlora.adapters.sites import HEAD, Site, Sites
from bnlora.base import Base
from bnlora.guides import Guide, around
from bnlora.guides.affine import Affine
from bnlora.infer.core.fit import CoreFit
from bnlora.infer.core.gaussian import Gaussian
from bnlora.infer.core.scales import Scales
from bnlora.infer.svi.checkpoint import by_path, fit_from, group, read_stored, write_fit
from bnlora.priors import Earlier, carried
from bnlora.priors import core as core_prior
from bnlora.priors.carried import carried_of
from bnlora.program.density import density
from bnlora.program.likelihoods import likelihood_from
from bnlora.program.model import Classifier
from bnlora.program.tangent.linear import Informed
from bnlora.program.tangent.model import Tangent

Arrays = Mapping[str, np.ndarray]


def save_core(core: CoreFit, folder: str | Path, *, notes: Mapping[str, Any] | None = None) -> None:
    """Write a fit of `bnlora.fit_core` and the results of its steps into a folder, as `bnlora.save_fit` does.

    Args:
        core: The fit.
        folder: Folder to write to; it is created if necessary.
        notes: Additional notes to store, as in `bnlora.save_fit`, such as how the rows were read.

    Raises:
        OSError: If the folder cannot be written. A fit that was there before is unchanged.

    Example:
        >>> bl.save_core(core_fit, folder / "core")
        >>> again = bl.load_core(folder / "core", base)  # for example in another process
        >>> bool((again.gaussian.loc == core_fit.gaussian.loc).all())
        True
    """
    write_fit(core.fit, folder, notes or {}, _arrays(core))


def load_core(folder: str | Path, base: Base) -> CoreFit:
    """Read a fit that `save_core` wrote. It gives the same draws; only the base must be loaded separately.

    Args:
        folder: The folder.
        base: The base of the fit.

    Returns:
        The posterior with the results of its steps. Its rows have no cached features.

    Raises:
        FileNotFoundError: If the folder has no fit.
        ValueError: If a file is corrupt, the fit was written by `save_fit`, or it belongs to another base.

    Example:
        >>> bl.save_core(core_fit, folder / "core")
        >>> bl.load_core(folder / "core", base).scales == core_fit.scales
        True
    """
    folder = Path(folder).expanduser()
    record, arrays = read_stored(folder)
    affine, informed, numbers = (group(f"core.{name}", arrays) for name in ("affine", "informed", "numbers"))
    if not affine:
        raise ValueError(
            f"the fit in {str(folder)!r} was not written by bl.save_core; read it with bl.load_fit"
        )
    frames = _frames(record, arrays, base, folder)
    scales = _scales(arrays, tuple(frames), numbers)
    earlier = group("core.earlier", arrays)
    if earlier:  # a refit: what earlier rows taught is the prior
        prior = carried(frames, scale=scales.values, earlier=Earlier(**earlier))
    else:
        prior = core_prior(frames, scale=scales.values)
    tangent = Tangent(Classifier(base, frames.sites, prior, likelihood=frames.likelihood))
    log_evidence = float(numbers["gaussian"])
    gaussian = Gaussian(density(tangent, {}), Affine(**affine), Informed(**informed), log_evidence)
    fit = fit_from(record, arrays, tangent, Guide(tangent.prior, around(gaussian)), folder)
    spent = sorted(group("core.seconds", arrays).items())
    return CoreFit(frames, scales, gaussian, fit, {name.split(" ", 1)[1]: float(x) for name, x in spent})


def load_frames(folder: str | Path, base: Base) -> Frames:
    """Read the frames that were saved with a fit, with their sites and label tokens.

    Args:
        folder: A folder with a fit under a core prior, from `save_fit` or `save_core`.
        base: The base of the frames.

    Returns:
        The frames, for `priors.core`.

    Raises:
        FileNotFoundError: If the folder has no fit.
        ValueError: If the fit has no frames, or they belong to another base.

    Example:
        >>> bl.save_fit(tangent_fit, folder / "tangent")
        >>> bl.load_frames(folder / "tangent", base)
        Frames(4 coordinates from jacobian: lm_head 1x1x4)
    """
    folder = Path(folder).expanduser()
    return _frames(*read_stored(folder), base, folder)


def _frames(record: Mapping[str, Any], arrays: Arrays, base: Base, folder: Path) -> Frames:
    """Like `load_frames`, from the result of `read_stored`."""
    families = dict(record.get("model", {}))  # absent in the first format, which has no frames
    stated = families.pop("label ids", None)
    likelihood = None if stated is None else likelihood_from(stated)
    sites = Sites(tuple(_site(base, values) for values in families.values()), base.num_layers)
    frames = frames_from(arrays, base.weights, sites, likelihood, str(folder))
    stored = arrays["weights"][: len(frames.base)]  # the rest belongs to sites held at values
    if not is_same(stored, frames.base):
        raise ValueError(f"the frames in {str(folder)!r} belong to another base than {base!r}")
    return frames


def _site(base: Base, values: Mapping[str, Any]) -> Site:
    """A site from a record, with all rows of the head, as in the sites of frames."""
    whole: dict[str, Any] = {n: tuple(x) if isinstance(x, list) else x for n, x in values.items()}
    site = Site(**whole)
    return replace(site, d_out=base.modules[HEAD][1]) if site.module == HEAD else site


def _arrays(core: CoreFit) -> dict[str, np.ndarray]:
    """The arrays of a core fit in addition to its variational fit, by name."""
    scales, gaussian = core.scales, core.gaussian
    numbers = {"scales": scales.log_evidence, "base": scales.base, "gaussian": gaussian.log_evidence}
    parts: dict[str, Mapping[str, Any]] = {
        "core.scales": dict(scales.values),
        "core.without": dict(scales.without),
        "core.stderr": dict(scales.stderr),
        "core.numbers": numbers,
        "core.affine": gaussian.affine._asdict(),
        "core.informed": gaussian.informed._asdict(),
        # Number the steps, because a file does not keep their order.
        "core.seconds": {f"{i} {name}": x for i, (name, x) in enumerate(core.seconds.items())},
    }
    before = carried_of(core.model.prior)
    if before is not None:
        parts["core.earlier"] = asdict(before.earlier)
    return {name: np.asarray(x) for name, x in by_path(parts).items()}


def _scales(arrays: Arrays, families: tuple[str, ...], numbers: Arrays) -> Scales:
    """The scales, in the order of the families."""
    stored = group("core.scales", arrays)
    values = {name: stored[name] if stored[name].ndim else float(stored[name]) for name in families}
    without, stderr = (
        {name: float(x) for name, x in group(part, arrays).items()}
        for part in ("core.without", "core.stderr")
    )
    return Scales(values, float(numbers["scales"]), without, float(numbers["base"]), stderr)

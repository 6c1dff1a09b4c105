r"""Frames of the core prior: a few directions of each side of a weight update, fixed before the fit.

    dW = L U R^T,      L (d_out, m_o),  R (d_in, m_i)  with orthonormal columns

A *frame* has the stacked L and R of all layers of a family, and the *unit* of the family: the root mean
square of the contrast between the logits of two classes under U_kl ~ N(0, 1), over the rows from which the
frames were computed. Divided by the unit, the scale of the prior is in nats of a logit contrast.

`bnlora.frames` computes frames from rows without using their labels.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from bnlora._util.checks import listed
from bnlora._util.display import Shown, Table
from bnlora._util.fingerprint import fingerprint, is_same
from bnlora.adapters.sites import HEAD, Sites

Source = Literal["jacobian", "activations", "weights", "random", "given"]


@dataclass(frozen=True)
class Frame:
    """The two frames of every layer of one family.

    Attributes:
        left: L of each layer, shape (layer, d_out, m_o).
        right: R of each layer, shape (layer, d_in, m_i).
        unit: Root mean square of a logit contrast under a standard normal core, for all layers together.
        energies: All eigenvalues for the left and for the right frame, shape (layer, d) each, decreasing,
            including those of directions outside the frame. Empty if the source has none.
    """

    left: Float[np.ndarray, "l d_out m_o"]
    right: Float[np.ndarray, "l d_in m_i"]
    unit: float
    energies: tuple[np.ndarray, ...] = ()

    @property
    def size(self) -> tuple[int, int, int]:
        """Shape of the core: (layer, m_o, m_i)."""
        return len(self.left), self.left.shape[2], self.right.shape[2]

    @property
    def captured(self) -> tuple[float, ...]:
        """Share of the energy inside the left and the right frame, over all layers; empty if unknown."""
        sizes = (self.left.shape[2], self.right.shape[2])
        pairs = zip(self.energies, sizes, strict=True) if self.energies else ()
        return tuple(float(e[:, :m].sum() / max(e.sum(), 1e-30)) for e, m in pairs)


@dataclass(frozen=True, repr=False, eq=False)  # equal by identity: arrays have no single truth value
class Frames(Shown, Mapping[str, Frame]):
    """Frames of all families, and their source.

    Attributes:
        families: Frame by family.
        sites: The sites of the frames. The rank of each is the width m_i of its right frame.
        likelihood: How the logits of the contrasts are read.
        source: The source of the frames.
        label_free: Whether no labels were used. Only evidences with such frames are comparable.
        base: Some weights of the base (`bnlora._util.fingerprint`), to recognise it.

    Example:
        >>> frames.num_coordinates, frames["lm_head"].size  # layers, rows and columns of a core
        (4, (1, 1, 4))
    """

    families: Mapping[str, Frame]
    sites: Sites
    likelihood: Any
    source: Source
    label_free: bool
    base: Float[np.ndarray, " k"]

    def __getitem__(self, name: str) -> Frame:
        if name not in self.families:
            raise KeyError(f"no frame for the family {name!r}; the frames are {listed(tuple(self))}")
        return self.families[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.families)

    def __len__(self) -> int:
        return len(self.families)

    @property
    def num_coordinates(self) -> int:
        """Number of coordinates in all cores."""
        return sum(int(np.prod(frame.size)) for frame in self.families.values())

    @property
    def label_ids(self) -> tuple[int, ...]:
        """Token id of each class's word; empty if the classes are not words of one token."""
        return getattr(self.likelihood, "label_ids", ())

    @property
    def checksum(self) -> str:
        """Checksum of the frames, the base and the classes."""
        digest = hashlib.sha256(repr(self.label_ids or self.likelihood).encode() + self.base.tobytes())
        for name, frame in self.families.items():
            digest.update(f"{name} {self.sites[name].layers} {frame.unit!r}".encode())
            digest.update(frame.left.tobytes() + frame.right.tobytes())
        return digest.hexdigest()

    def check(self, sites: Sites) -> None:
        """Raise `ValueError` unless the frames belong to these sites."""
        for name, site in sites.items():
            if name not in self.families:
                raise ValueError(
                    f"the frames are for {listed(tuple(self))}; the sites also have {name!r}: compute "
                    "frames for it, or give it another prior with `by_family`"
                )
            own = self.sites[name]
            for what in ("module", "layers", "d_in", "d_out", "rank"):
                if what == "d_out" and site.module == HEAD:
                    continue  # a classifier has only the label rows of the head
                wanted, got = getattr(own, what), getattr(site, what)
                if wanted != got:
                    raise ValueError(
                        f"the frames of {name!r} belong to other sites: their {what} is {wanted}, that of "
                        f"these sites is {got}; use frames.sites"
                    )
            rows = self.families[name].left.shape[1]
            if site.d_out != rows:
                raise ValueError(
                    f"the left frame of {name!r} has {rows} rows, one for each label token; the sites have "
                    f"{site.d_out} outputs: use the prior in a Classifier with the same label ids"
                )

    @property
    def overview(self) -> tuple[Table]:
        """Size, share of the energy and unit of every family."""
        rows = []
        for name, frame in self.families.items():
            depth, m_o, m_i = frame.size
            shares = [f"{share:.1%}" for share in frame.captured] or ["unknown", "unknown"]
            site = self.sites[name]
            outputs = f"{m_o} of {frame.left.shape[1]}", shares[0]
            inputs = f"{m_i} of {site.d_in}", shares[1]
            rows.append((name, site.where, *outputs, *inputs, f"{depth * m_o * m_i:,}", f"{frame.unit:.3g}"))
        labels = "labels unused" if self.label_free else "labels used: evidences are not comparable"
        title = f"Frames from {self.source}, {labels}"
        header = ("family", "where", "outputs", "energy", "inputs", "energy", "coordinates", "unit")
        return (Table(title, header, tuple(rows), texts=frozenset({1})),)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{n} {'x'.join(map(str, f.size))}" for n, f in self.families.items())
        return f"Frames({self.num_coordinates:,} coordinates from {self.source}: {sizes})"


def stored_frames(frames: Frames) -> dict[str, np.ndarray]:
    """The frames as named arrays for a file; `frames_from` reads them back."""
    arrays: dict[str, np.ndarray] = {}
    for name, frame in frames.items():
        arrays |= {f"frames.{name}.left": frame.left, f"frames.{name}.right": frame.right}
        arrays[f"frames.{name}.unit"] = np.asarray(frame.unit)
        arrays |= {f"frames.{name}.energy {side}": x for side, x in enumerate(frame.energies)}
    arrays["frames.source"] = np.frombuffer(frames.source.encode(), np.uint8)
    arrays["frames.label_free"] = np.asarray(frames.label_free)
    return arrays


def frames_from(
    arrays: Mapping[str, np.ndarray], weights: Any, sites: Sites, likelihood: Any, where: str
) -> Frames:
    """Frames from the arrays of `stored_frames`.

    Args:
        arrays: The arrays.
        weights: The frozen weights of the base.
        sites: Sites of the frames.
        likelihood: How the logits of the classes are read.
        where: Name of the file, for messages.

    Raises:
        ValueError: If there are no frames, or they belong to other sites.
    """
    if "frames.source" not in arrays:
        raise ValueError(f"the fit in {where!r} has no frames: its prior was not priors.core")
    families = {}
    for name, site in sites.items():
        if f"frames.{name}.left" not in arrays:
            raise ValueError(f"the fit in {where!r} has no frames for {name!r}")
        left, right = arrays[f"frames.{name}.left"], arrays[f"frames.{name}.right"]
        if right.shape != (site.depth, site.d_in, site.rank):
            raise ValueError(
                f"the frames of {name!r} in {where!r} have shape {right.shape}, (layer, d_in, rank); the "
                f"sites have {(site.depth, site.d_in, site.rank)}"
            )
        sides = (f"frames.{name}.energy {side}" for side in (0, 1))
        energies = tuple(arrays[side] for side in sides if side in arrays)
        families[name] = Frame(left, right, float(arrays[f"frames.{name}.unit"]), energies)
    source: Any = arrays["frames.source"].tobytes().decode()
    label_free = bool(arrays["frames.label_free"])
    return Frames(families, sites, likelihood, source, label_free, fingerprint(weights))


def joined(chosen: Mapping[str, Frames]) -> Frames:
    """The frames of a prior whose families take their frames from several `Frames`.

    Args:
        chosen: The source of the frame of each family.

    Raises:
        ValueError: If the frames belong to different bases or different classes.
    """
    first, *others = parts = list({id(frames): frames for frames in chosen.values()}.values())
    if any(x.likelihood != first.likelihood or not is_same(x.base, first.base) for x in others):
        raise ValueError("frames of one prior must belong to the same base and the same classes")
    if not others and set(chosen) == set(first):
        return first
    return replace(
        first,
        families={name: frames[name] for name, frames in chosen.items()},
        sites=replace(first.sites, families=tuple(frames.sites[name] for name, frames in chosen.items())),
        label_free=all(frames.label_free for frames in parts),
        source=first.source if len({frames.source for frames in parts}) == 1 else "given",
    )

"""Rotary position embedding: frequencies, their stretching for long texts, and the rotation.

pairs (x_i, x_{i + d/2}) are rotated by the angle position * theta^(-2 i / d)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bnlora._util.checks import brief, check_positive


@dataclass(frozen=True)
class Llama3Scaling:
    """Frequency-dependent stretching of rotary angles (Llama 3.1 and later).

    Wavelengths above `original_length / low_frequency_factor` are stretched by `factor`. Wavelengths below
    `original_length / high_frequency_factor` are unchanged. Those in between are interpolated.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int

    def __post_init__(self) -> None:
        """Raise `ValueError` for numbers that do not give finite angles."""
        check_positive(vars(self))
        if not self.low_frequency_factor < self.high_frequency_factor:
            raise ValueError(
                "the low frequency factor of the rotary scaling must be below the high one; got "
                f"{self.low_frequency_factor} and {self.high_frequency_factor}"
            )


@dataclass(frozen=True)
class LinearScaling:
    """All rotary angles divided by a factor."""

    factor: float

    def __post_init__(self) -> None:
        """Raise `ValueError` for a factor that does not give finite angles."""
        check_positive(vars(self))


Scaling = Llama3Scaling | LinearScaling


def rotary_settings(config: Mapping[str, Any], *, kind: str = "") -> tuple[float, Scaling | None]:
    """Read the rotary base and scaling from a Hugging Face configuration with old or new keys.

    Args:
        config: Parsed config.json with `rope_theta` and `rope_scaling` (old) or with `rope_parameters` (new).
        kind: The kind of layer to read, where `rope_parameters` has an entry for each kind.

    Returns:
        The base theta, and the scaling or None.

    Raises:
        ValueError: If the kind of scaling is not supported, or its keys are missing.
    """
    parts = {key: config.get(key) for key in ("rope_scaling", "rope_parameters")}
    if kind and isinstance(parts["rope_parameters"], Mapping) and kind in parts["rope_parameters"]:
        parts["rope_parameters"] = parts["rope_parameters"][kind]
    settings: dict[str, Any] = {}
    for key, part in parts.items():
        if not isinstance(part, Mapping | None):
            raise ValueError(f"{key} in the model configuration must be an object; got {brief(part)}")
        settings |= {name: value for name, value in (part or {}).items() if value is not None}
    theta = settings.get("rope_theta", config.get("rope_theta", 10000.0))
    check_positive({"rope_theta in the model configuration": theta})
    share = settings.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if share != 1:
        raise ValueError(f"rotation of a part of each head is not supported; got the share {brief(share)}")
    return float(theta), _scaling(settings)


_SCALINGS: Mapping[str, tuple[type[Scaling], tuple[str, ...]]] = {
    "llama3": (
        Llama3Scaling,
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    ),
    "linear": (LinearScaling, ("factor",)),
}


def _scaling(settings: Mapping[str, Any]) -> Scaling | None:
    stated = settings.get("rope_type", settings.get("type", "default"))
    if stated == "default":
        return None
    if not isinstance(stated, str) or stated not in _SCALINGS:
        names = [repr(name) for name in ("default", *_SCALINGS)]
        raise ValueError(f"rotary scaling {brief(stated)} is not supported; supported are {', '.join(names)}")
    build, keys = _SCALINGS[stated]
    missing = [key for key in keys if key not in settings]
    if missing:
        raise ValueError(f"the {stated!r} rotary scaling in the model configuration lacks the keys {missing}")
    check_positive({f"{key} of the {stated!r} rotary scaling": settings[key] for key in keys})
    return build(*(settings[key] for key in keys))


def rotary_frequencies(
    head_dim: int, theta: float, scaling: Scaling | None = None
) -> Float[np.ndarray, " half"]:
    """Angular frequency of each of the head_dim / 2 rotated pairs, in radians per position."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
    if scaling is None:
        return frequencies
    if isinstance(scaling, LinearScaling):
        return (frequencies / np.float32(scaling.factor)).astype(np.float32)
    # Turns of a pair within the original context: few turns are stretched (keep 0), many are kept (keep 1).
    turns = scaling.original_length * frequencies / (2 * np.pi)
    span = scaling.high_frequency_factor - scaling.low_frequency_factor
    keep = np.clip((turns - scaling.low_frequency_factor) / span, 0.0, 1.0)
    return ((1 - keep) * frequencies / scaling.factor + keep * frequencies).astype(np.float32)


def rotary_tables(
    positions: Int[Array, "b t"], frequencies: Float[np.ndarray, " half"]
) -> tuple[Float[Array, "b t 1 half"], Float[Array, "b t 1 half"]]:
    """Cosines and sines of the rotation angles, with an axis of length 1 for the heads."""
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "b t heads dim"], cosine: Float[Array, "b t 1 half"], sine: Float[Array, "b t 1 half"]
) -> Float[Array, "b t heads dim"]:
    """Apply rotary position embedding; pair i has the components i and i + dim / 2."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)

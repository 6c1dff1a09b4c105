"""Gemma 3 (text): as Gemma 2, with normalised queries and keys instead of soft caps.

Five of six layers attend to a window, with a rotary base of their own.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bnlora._util.checks import check_size
from bnlora.models.decoder_config import LONGEST_CYCLE, DecoderConfig, number
from bnlora.models.gemma2 import keys, read_gemma
from bnlora.models.rotary import rotary_settings

ARCHITECTURE = "Gemma3ForCausalLM"

__all__ = ["ARCHITECTURE", "keys", "read_config"]


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a config.json.

    Raises:
        ValueError: If keys are missing or wrong, or the model needs an unsupported feature.
    """
    known = {"rope_theta": 1e6} | {key: value for key, value in config.items() if value is not None}
    period = known.get("sliding_window_pattern", 6)
    check_size({"sliding_window_pattern in the model configuration": period})
    nested = known.get("rope_parameters")
    theta, scaling = rotary_settings(known, kind="full_attention")
    near = {"rope_theta": known.get("rope_local_base_freq", 1e4), "rope_parameters": nested}
    near_theta, near_scaling = rotary_settings(near, kind="sliding_attention")
    if near_scaling is not None:
        raise ValueError("rotary scaling of the local layers is not supported in Gemma 3")
    flat = {key: value for key, value in known.items() if key not in ("rope_parameters", "rope_scaling")}
    values = read_gemma(flat, (*(True,) * (min(period, LONGEST_CYCLE) - 1), False))
    return DecoderConfig(
        **values
        | {
            "rope_theta": theta,
            "rope_scaling": scaling,
            "window": replace(values["window"], rope_theta=near_theta),
            "qk_norm": True,
            "attention_cap": number(config, "attn_logit_softcapping"),
            "logit_cap": number(config, "final_logit_softcapping"),
        }
    )

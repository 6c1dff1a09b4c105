"""Loading takes little more memory than the base: peaks of fresh processes against the bytes of the weights.

Peaks are resident memory (VmHWM) above that of a process that has loaded a tiny model, so imports and JAX's
start do not count. Whatever a read leaves behind (mapped pages, copies) does.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from builders.checkpoint_files import CONFIG, write_folder

LIMIT = 1.3
PROBE = """
import json, sys
from pathlib import Path
import jax
from bnlora.base import load

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

tiny, folder, weights = sys.argv[1:]
load(tiny, weights=weights)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = memory("VmRSS")
base = load(folder, weights=weights)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(base.weights))
print(json.dumps({"size": size, "peak": memory("VmHWM") - before}))
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")


def sizes(layers: int, width: int) -> dict:
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 128, "head_dim": 64}
    return CONFIG | heads | {
        "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
        "vocab_size": 4 * width,
    }  # fmt: skip


def random_tensors(config: dict) -> dict[str, np.ndarray]:
    """Tensors with the names of Llama, of order one over the root of the width."""
    width, inner, generator = config["hidden_size"], config["intermediate_size"], np.random.default_rng(0)
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"self_attn.q_proj": (width, width), "self_attn.o_proj": (width, width)}
    shapes |= {f"self_attn.{name}_proj": (keys, width) for name in "kv"}
    shapes |= {
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    shapes |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    shapes = {
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(config["num_hidden_layers"])
        for name, shape in shapes.items()
    }
    table = (config["vocab_size"], width)
    shapes |= {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (width,)}
    return {n: generator.standard_normal(s, np.float32) * width**-0.5 for n, s in shapes.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[..., tuple[Path, Path]]:
    """A tiny folder and a large one of so many layers and such a width, each written once."""

    @cache
    def written(layers: int, width: int, stored: type) -> tuple[Path, Path]:
        place, config = tmp_path_factory.mktemp("folders"), sizes(layers, width)
        tiny = write_folder(place / "tiny", shards=2, dtype=stored)
        return tiny, write_folder(place / "large", random_tensors(config), config, shards=3, dtype=stored)

    return written


def peak(tiny: Path, large: Path, weights: str) -> dict[str, float]:
    """Size and peak in bytes of loading a sharded folder."""
    command = [sys.executable, "-c", PROBE, str(tiny), str(large), weights]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
def test_a_small_checkpoint_takes_little_more_than_its_weights(folders):
    got = peak(*folders(8, 512, np.float32), "float32")
    assert 100e6 < got["size"] < got["peak"] < LIMIT * got["size"]


# Quantising takes the most; the small checkpoint above is read as it is.
ONCE = {(np.float32, "4bit")}
PAIRS = [
    pytest.param(stored, weights, marks=() if (stored, weights) in ONCE else pytest.mark.thorough)
    for stored in (np.float32, ml_dtypes.bfloat16)
    for weights in ("float32", "bfloat16", "int8", "4bit")
]


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "weights"), PAIRS)
def test_a_large_checkpoint_takes_little_more_than_its_weights(folders, stored, weights):
    """The file has 500 MB in float32, half of that in bfloat16."""
    got = peak(*folders(10, 1024, stored), weights)
    assert 0.95 * got["size"] < got["peak"] < LIMIT * got["size"]

"""A model on several devices gives the numbers of one device, and its step exchanges no more than it must."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from builders.thorough import EVERY, sample_of
from jax.sharding import PartitionSpec as Spec

import bnlora as bl
from bnlora.models import families, sharding
from bnlora.testing import tiny_base, tiny_encoder

MESHES = ["data", "data and model", "fully, with draws"]
TESTS = Path(__file__).parents[1]
SIZES = {"data": 2, "model": 2, "draw": 1}
EIGHT = "--xla_force_host_platform_device_count=8"


@pytest.fixture(scope="module")
def found() -> dict:
    """What `builders/devices.py` measures in a process with eight devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {EIGHT}"
    script = TESTS / "builders" / "devices.py"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(TESTS.parent)}
    names = ["one", *(name for name in MESHES if EVERY or name != "data and model")]
    command = {"args": [sys.executable, script, *names], "env": environment}
    done = subprocess.run(**command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", sample_of(MESHES, ["data", "fully, with draws"]))
def test_the_numbers_are_those_of_one_device(name, found):
    """Sums in another order: some tens of roundings of float32."""
    for what in ("bound", "probabilities"):
        np.testing.assert_allclose(found[name][what], found["one"][what], rtol=2e-5)
    assert found[name]["traces"] == 1


@pytest.mark.slow
def test_chains_are_those_of_one_device(found):
    np.testing.assert_allclose(found["fully, with draws"]["chains"], found["one"]["chains"], atol=1e-3)


@pytest.mark.slow
def test_rows_over_devices_gather_nothing(found):
    """With whole weights the step only sums: gradients of the adapters and terms of the bound, together."""
    assert found["one"]["collectives"]["kinds"] == {}
    assert set(found["data"]["collectives"]["kinds"]) == {"all-reduce"}


@pytest.mark.slow
def test_fully_split_weights_are_gathered_layer_by_layer(found):
    """Kernels of one layer are gathered, never the stack of three, nor the embedding of 40 tokens."""
    gathered = found["fully, with draws"]["collectives"]["gathered"]
    assert {"16,12", "12,16"} <= set(gathered)
    assert not {
        shape for shape in gathered if re.fullmatch(r"3,(8|12|16|24),(8|12|16|24)|(40|20),(8|16)", shape)
    }


@pytest.mark.slow
def test_weights_are_split_as_the_rules_say(found):
    split = found["fully, with draws"]["split"]
    assert split["['layers']['q_proj'].value"] == [None, "data", "model"]
    assert split["['layers']['o_proj'].value"] == [None, "model", "data"]
    assert split["['embedding'].value"] == ["model", "data"]
    assert split["['final_norm'].value"] == []
    assert found["data"]["split"]["['layers']['q_proj'].value"] == [None, None, "model"]


# The rules -------------------------------------------------------------------------------------------------


def test_a_side_that_an_axis_does_not_divide_stays_whole():
    assert sharding.spec_of("['layers']['k_proj'].value", (2, 16, 9), SIZES, "tensor") == Spec(
        None, None, None
    )
    assert sharding.spec_of("['layers']['k_proj'].value", (2, 16, 9), SIZES, "fully") == Spec(
        None, "data", None
    )


@pytest.mark.parametrize("base", [tiny_base(jax.random.key(0)), tiny_encoder(jax.random.key(0))])
def test_every_dense_module_of_a_layer_has_a_rule(base):
    for name, (d_in, d_out) in base.config.layer_modules.items():
        spec = sharding.spec_of(f"['layers']['{name}'].value", (2, d_in, d_out), SIZES, "tensor")
        assert "model" in spec


def test_the_modules_of_all_families_have_the_names_of_the_rules():
    names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    assert families.FAMILIES
    for name in names:
        assert "model" in sharding.spec_of(f"['{name}']", (1, 8, 8), SIZES, "tensor")


def test_too_many_devices_are_refused():
    count = jax.device_count()
    with pytest.raises(
        ValueError, match=rf"a mesh of {count} x 2 x 1 devices needs {2 * count}; JAX has {count}"
    ):
        bl.mesh(data=count, model=2)
    with pytest.raises(ValueError, match="data must be at least 1; got 0"):
        bl.mesh(data=0)
    with pytest.raises(ValueError, match="split must be one of .*; got 'full', nearest is 'fully'"):
        tiny_base(jax.random.key(0)).on(bl.mesh(), split="full")


def test_shapes_receive_a_place_and_no_numbers():
    base = bl.Base.abstract(tiny_base(jax.random.key(0)).config).on(bl.mesh(), split="fully")
    leaves = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(base.weights)}
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves.values())
    assert leaves["['layers']['q_proj'].value"].sharding.spec == Spec(None, "data", "model")


def test_one_device_is_no_mesh():
    base = tiny_base(jax.random.key(0))
    assert base.mesh is None
    assert base.on(bl.mesh()).mesh is None

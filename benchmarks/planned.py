"""Programs of a large model, compiled from shapes alone, for the benchmark `scale`.

`python -m benchmarks.planned` reads cases as JSON, one a line, and prints what XLA says about each, one a
line. The number of CPU devices is fixed when a process starts, so `scale` starts one with enough of them.
Weights, rows and state are `jax.ShapeDtypeStruct`s with a place on the mesh; nothing of their size exists.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

import bnlora as bl
from benchmarks.hlo import KINDS, Program
from bnlora._util.compilation import options
from bnlora.infer.svi.footprint import abstract_rows, abstract_step, draw
from bnlora.infer.svi.step import CHUNK
from bnlora.kernels.ahead import tpu_devices
from bnlora.models.decoder_config import DecoderConfig
from bnlora.models.decoder_storage import num_weights
from bnlora.models.sharding import mesh_of
from bnlora.program.tangent.gradients import ROWS, SKETCH, features, moments

LLAMA = {"vocab_size": 32_000, "head_dim": 128, "norm_eps": 1e-5}
SIZES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "tiny": {"d_model": 128, "d_ff": 256, "num_layers": 3, "num_heads": 4, "head_dim": 32},
        "7B": {"d_model": 4096, "d_ff": 11_008, "num_layers": 32, "num_heads": 32},
        "13B": {"d_model": 5120, "d_ff": 13_824, "num_layers": 40, "num_heads": 40},
        "30B": {"d_model": 6656, "d_ff": 17_920, "num_layers": 60, "num_heads": 52},
    }
)
"""Sizes of Llama-2-7B and -13B (arXiv 2307.09288) and of LLaMA-30B (arXiv 2302.13971), and one for tests."""

TARGETS = ("q_proj", "v_proj", "lm_head")
NUM_ROWS = 1024


@dataclass(frozen=True)
class Case:
    """One program of one model on one mesh.

    Attributes:
        shape: A key of `SIZES`.
        program: A key of `PROGRAMS`.
        data: Devices along "data".
        model: Devices along "model".
        split: As in `bnlora.Base.on`.
        rows: Rows of a step, and of a prediction; `ROWS` or fewer are differentiated together.
        length: Tokens of a row.
        rank: Rank of the adapters.
        inducing: Inducing rows and columns of the sparse GP, and directions of the core's frames.
        draws: Draws of a prediction, all together; particles of a step.
        layers: Layers of the model; those of the shape where it is None.
        remat: What the backward pass computes again, as in `bnlora.Memory`.
        topology: A TPU topology such as "v5e:2x4": its compiler takes the place of the CPU's (`libtpu`).
    """

    shape: str
    program: str = "step"
    data: int = 1
    model: int = 1
    split: str = "tensor"
    rows: int = 32
    length: int = 256
    rank: int = 8
    inducing: int = 9
    draws: int = 1
    layers: int | None = None
    remat: str = "layers"
    topology: str = ""

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.data * self.model

    @property
    def config(self) -> DecoderConfig:
        """Sizes of the model."""
        sizes = LLAMA | dict(SIZES[self.shape])
        if self.layers is not None:
            sizes |= {"num_layers": self.layers}
        return DecoderConfig(**sizes, num_kv_heads=sizes["num_heads"])

    @property
    def rows_together(self) -> int:
        """Rows that run in the program."""
        return min(self.rows, ROWS) if self.program in ("features", "frames") else self.rows

    def base(self) -> bl.Base:
        """The model on its mesh, as shapes, in bfloat16."""
        base = bl.Base.abstract(self.config, weights="bfloat16")
        base = base.running(activations="bfloat16", remat=self.remat, implementation="xla")
        return base.on(self.mesh(), split=self.split)

    def mesh(self) -> Mesh:
        """The devices, of this process or of the topology."""
        if not self.topology:
            return bl.mesh(data=self.data, model=self.model)
        devices = np.array(tpu_devices(self.topology)).reshape(self.data, self.model, 1)
        return Mesh(devices, ("data", "model", "draw"), axis_types=(AxisType.Auto,) * 3)

    def classifier(self, prior: Any) -> bl.Classifier:
        """The classifier of two label words."""
        base = self.base()
        return bl.Classifier(base, bl.select(base, list(TARGETS), rank=self.rank), prior, label_ids=(3, 5))


def closed_form(case: Case) -> float:
    """Operations of the matrix products of the language model with its adapters, over all devices.

    A dense layer has 2 P operations a token forward and 2 P for the gradient of its input; frozen weights
    have no gradient. With remat "layers" the backward pass runs forward again, but for `down_proj`, whose
    output no gradient needs. The last layer runs at the last token only, but for keys and values. Attention
    has 4 T d a token forward and twice that backward, and so have adapters, with 2 r (d_in + d_out) forward.
    """
    config, length = case.config, case.length
    # The frames come from sketches of both sides of J at once.
    rank = {"features": case.inducing, "frames": 2 * SKETCH}.get(case.program, case.rank)
    kernels = {name: d_in * d_out for name, (d_in, d_out) in config.layer_modules.items()}
    adapted = {name: rank * sum(config.layer_modules[name]) for name in TARGETS if name in kernels}
    everywhere, below = ("k_proj", "v_proj"), config.num_layers - 1

    def tokens(values: Mapping[str, int]) -> float:
        """Sum over modules of a value for every token at which the module runs."""
        last = sum(value * (length if name in everywhere else 1) for name, value in values.items())
        return 2.0 * (below * length * sum(values.values()) + last)

    attention = 4.0 * length * config.num_heads * config.head_dim * (below * length + 1)
    forward = tokens(kernels) + tokens(adapted) + attention
    if case.program == "prediction":
        return case.draws * case.rows_together * forward
    again = forward - tokens({"down_proj": kernels["down_proj"]}) if case.remat == "layers" else 0.0
    backward = tokens(kernels) + 2 * tokens(adapted) + 2 * attention
    total = case.draws * case.rows_together * (forward + again + backward)
    if case.program != "frames":
        return total
    sides = sum(d**2 for name in adapted for d in config.layer_modules[name])
    return total + 2.0 * SKETCH * case.rows_together * config.num_layers * sides


def everywhere(over: Mesh | None, tree: Any) -> Any:
    """Shapes that are whole on every device of the mesh."""
    if over is None:
        return tree
    place = NamedSharding(over, Spec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _step(case: Case) -> tuple[Callable, tuple[Any, ...]]:
    """The training step of the sparse GP under the flow guide."""
    model = case.classifier(bl.priors.sparse_gp(rows=case.inducing, cols=case.inducing))
    over, weights = mesh_of(model.base.weights), model.base.weights
    train = abstract_rows(model, NUM_ROWS, case.length, cached=False)
    guide = bl.guides.SiteFlow(model.prior)
    step, state = abstract_step(model, guide, train, optax.adam(1e-2), case.draws)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    rows = jax.ShapeDtypeStruct((CHUNK, case.rows), jnp.int32)
    before, after = everywhere(over, (state, _key())), everywhere(over, (step.train, count, count, rows))
    return step.several, (*before, weights, *after)


def _prediction(case: Case) -> tuple[Callable, tuple[Any, ...]]:
    """Log-probabilities of some rows under some draws, which run together."""
    model = case.classifier(bl.priors.normal())
    draws = jax.tree.map(lambda x: jax.ShapeDtypeStruct((case.draws, *x.shape), x.dtype), draw(model))
    batch = abstract_rows(model, case.rows, case.length, cached=False)

    def outputs(weights: Any, adapters: Any, batch: Any) -> Any:
        return model.outputs_by_draw(weights, adapters, batch, case.draws)

    over = mesh_of(model.base.weights)
    return outputs, (model.base.weights, *everywhere(over, (draws, batch)))


def _features(case: Case) -> tuple[Callable, tuple[Any, ...]]:
    """Features of some rows in the tangent model of the core prior."""
    model = case.classifier(bl.priors.point())

    def frame(depth: int, d: int, largest: int) -> Any:
        return jax.ShapeDtypeStruct((depth, d, min(case.inducing, largest)), jnp.float32)

    # Two classes have one contrast, so the head's output side has one direction.
    frames = {
        name: (frame(site.depth, site.d_out, 1 if name == "lm_head" else site.d_out),
               frame(site.depth, site.d_in, site.d_in))
        for name, site in model.sites.items()
    }  # fmt: skip
    batch = abstract_rows(model, case.rows_together, case.length, cached=False)

    def run(weights: Any, frames: Any, batch: Any) -> Any:
        return features(model, weights, frames, batch)

    over = mesh_of(model.base.weights)
    return run, (model.base.weights, *everywhere(over, (frames, batch)))


def _frames(case: Case) -> tuple[Callable, tuple[Any, ...]]:
    """Sums over some rows of J J^T and J^T J, out of which the core's frames are computed."""
    model, count = case.classifier(bl.priors.point()), case.rows_together
    batch = abstract_rows(model, count, case.length, cached=False)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))

    def run(weights: Any, batch: Any, keys: Any, row_weights: Any) -> Any:
        return moments(model, weights, batch, keys, row_weights)

    arguments = batch, keys, jax.ShapeDtypeStruct((count,), jnp.float32)
    return run, (model.base.weights, *everywhere(mesh_of(model.base.weights), arguments))


PROGRAMS: Mapping[str, Callable[[Case], tuple[Callable, tuple[Any, ...]]]] = MappingProxyType(
    {"step": _step, "features": _features, "frames": _frames, "prediction": _prediction}
)
"""Function and abstract arguments by program."""


def on_a_device(tree: Any) -> int:
    """Bytes of the arrays of a tree on one device."""

    def one(x: Any) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return jax.ShapeDtypeStruct(shape, x.dtype).size * x.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def _compiled(case: Case, function: Callable, arguments: tuple[Any, ...]) -> jax.stages.Compiled:
    if not case.topology:
        return jax.jit(function, compiler_options=options(0)).lower(*arguments).compile()
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


def measured(case: Case, island: int = 8) -> dict[str, Any]:
    """What XLA says about a case, after it compiled it.

    Args:
        case: The case.
        island: Devices of an island, for the exchanges that leave it.

    Returns:
        Bytes and operations of one device, and seconds of this compilation.
    """
    began, cpu = time.perf_counter(), time.process_time()
    function, arguments = PROGRAMS[case.program](case)
    compiled = _compiled(case, function, arguments)
    took = {"wall": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    memory: Any = compiled.memory_analysis()
    costs: Any = compiled.cost_analysis()
    program = Program.read(compiled.as_text(), case.devices)
    found = program.collectives()
    base = case.base()
    return {
        "case": asdict(case),
        "parameters": num_weights(base.weights),
        "weights": on_a_device(base.weights),
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "closed_form": closed_form(case) / case.devices,
        "counted_once": costs["flops"],
        # XLA counts a loop's body once; the products of its further turns are added here.
        "operations": costs["flops"] + program.products() - program.products(once=True),
        "open_loops": program.open_loops,
        "sent": {kind: sum(c.turns * c.sent for c in found if c.kind == kind) for kind in KINDS},
        "sent_once": sum(c.sent for c in found),
        "compiled_sent": sum(c.turns * c.compiled for c in found),
        "far": sum(c.turns * c.sent for c in found if c.leaves(island)),
        "collectives": sum(c.turns for c in found),
        "seconds": took,
        "allocated": sum(x.nbytes for x in jax.live_arrays()),
        "process": peak_memory(),
    }


def peak_memory() -> int:
    """Largest resident memory of this process in bytes; `ru_maxrss` would include that of its parent."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])


def main() -> None:
    """Measure every case of the standard input."""
    for line in sys.stdin:
        case = Case(**json.loads(line))
        print(json.dumps(measured(case)), flush=True)


if __name__ == "__main__":
    main()

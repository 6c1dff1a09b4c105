"""Adapters of the peft library: its logits, round trips, and errors.

Logits are compared as in `test_parity`: within ten times torch's own float32 rounding.
"""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders.families import reference
from numpyro import handlers
from safetensors.numpy import load_file, save_file

from bnlora import Batch, load_peft, load_peft_posterior, peft_sites, predict, priors, save_peft
from bnlora.adapters.sites import HEAD, select
from bnlora.base import Base
from bnlora.guides import init_to_base
from bnlora.models import families
from bnlora.models.loading import Checkpoint
from bnlora.testing import tiny_base

BASE = tiny_base(jax.random.key(0), num_layers=3)
TARGETS = ["q_proj", "down_proj", "lm_head"]
SITES = select(BASE, TARGETS, rank=4, alpha=6.0)


def random_adapters(key):
    shapes = {n: site.shapes for n, site in SITES.items()}
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten([jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)])


ADAPTERS = random_adapters(jax.random.key(1))


@pytest.fixture
def folder(tmp_path):
    save_peft(ADAPTERS, tmp_path, sites=SITES, base=BASE)
    return tmp_path


def change(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def logits(base, sites, adapters, tokens):
    placed = sites.place(adapters)
    head = placed.pop(HEAD, None)

    @jax.jit
    def run(params, tokens):
        module, mask = base.bind(params), jnp.ones(tokens.shape, bool)
        low = module.blocks(module.embed(tokens), mask, first_layer=0, stop=sites.first_layer)
        top = module.blocks(low, mask, first_layer=sites.first_layer, stop=base.num_layers, adapters=placed)
        return jax.vmap(lambda x: module.head(x, rows=jnp.arange(base.config.vocab_size), adapter=head))(top)

    return np.asarray(run(base.weights, jnp.asarray(tokens)))


def torch_with_adapter(folder, config, **options):
    """Logits of torch and peft for a random adapter saved into `folder`, and their rounding."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(
        reference.torch_model(config, reference.tiny_tensors(config)), settings
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn_like(weight))
    model.save_pretrained(str(folder))
    tokens = reference.tiny_tokens(config)
    expected = reference.torch_logits(model, tokens)
    return tokens, expected, reference.torch_rounding(model, tokens, expected)


VARIANTS = {
    "all layers": {},
    "rank-stabilised": {"use_rslora": True},
    "two layers": {"layers_to_transform": [0, 2], "target_modules": ["q_proj", "down_proj"]},
}
PATTERNS = {
    "ranks": {"rank_pattern": {"q_proj": 2, r"1\.mlp\.down_proj": 3}},
    "alphas": {"alpha_pattern": {"layers.2.self_attn.q_proj": 9, "down_proj": 1.5}},
    "both, rank-stabilised": {
        "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 7}, "use_rslora": True
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # torch's and peft's own
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_loaded_adapter_gives_the_logits_of_torch_and_peft(tmp_path, options):
    """For every alpha of the sites."""
    config = reference.CONFIGS["grouped"]
    options = {"target_modules": TARGETS} | options
    tokens, expected, rounding = torch_with_adapter(tmp_path, config, **options)
    base = Base.from_module(
        families.build(Checkpoint(config, reference.tiny_tensors(config), None)), name="tiny"
    )
    layers = options.get("layers_to_transform")
    for alpha in (6.0, 32.0):
        sites = select(base, options["target_modules"], rank=4, alpha=alpha, layers=layers)
        got = logits(base, sites, load_peft(tmp_path, sites), tokens)
        assert 10 * rounding < 1e-3 * np.abs(expected).max()
        assert np.abs(got - expected).max() <= 10 * rounding


@pytest.mark.filterwarnings("ignore")  # torch's and peft's own
@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
def test_sites_and_patterns_come_from_the_files(tmp_path, options):
    """Ranks and alphas by module, against torch and peft."""
    config = reference.CONFIGS["grouped"]
    tokens, expected, rounding = torch_with_adapter(tmp_path, config, target_modules=TARGETS, **options)
    base = Base.from_module(
        families.build(Checkpoint(config, reference.tiny_tensors(config), None)), name="tiny"
    )
    sites = peft_sites(tmp_path, base)
    got = logits(base, sites, load_peft(tmp_path, sites), tokens)
    assert np.abs(got - expected).max() <= 10 * rounding < 1e-2 * np.abs(expected).max()
    rows = Batch(jnp.asarray(tokens), jnp.ones(tokens.shape, bool), jnp.zeros(len(tokens), int))
    labels = (7, 2, 9)
    posterior = load_peft_posterior(tmp_path, base, label_ids=labels)
    found = predict(jax.random.key(0), posterior, rows, num_draws=2).draw_log_probs
    wanted = jax.nn.log_softmax(expected[:, -1, labels])
    np.testing.assert_allclose(found, np.stack([wanted] * 2), atol=20 * rounding)


def test_an_adapter_of_another_model_is_refused(folder):
    other = tiny_base(jax.random.key(0), num_layers=1)
    with pytest.raises(ValueError, match="one of another model: it has 'layers.1.*has 1 layers"):
        peft_sites(folder, other)


@pytest.mark.filterwarnings("ignore")
def test_peft_reads_what_is_saved(tmp_path):
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    config = reference.CONFIGS["grouped"]
    base = Base.from_module(
        families.build(Checkpoint(config, reference.tiny_tensors(config), None)), name="tiny"
    )
    sites = select(base, {"lm_head": 3, r"layers\.[02]\.(q|up)_proj": 3}, alpha=5.0)
    keys = iter(jax.random.split(jax.random.key(2), 2 * len(sites)))
    adapters = {
        n: {f: 0.3 * jax.random.normal(next(keys), shape) for f, shape in site.shapes.items()}
        for n, site in sites.items()
    }
    save_peft(adapters, tmp_path, sites=sites, base=base)
    model = peft.PeftModel.from_pretrained(
        reference.torch_model(config, reference.tiny_tensors(config)), str(tmp_path)
    ).eval()
    tokens = reference.tiny_tokens(config)
    expected = reference.torch_logits(model, tokens)
    rounding = reference.torch_rounding(model, tokens, expected)
    assert np.abs(logits(base, sites, adapters, tokens) - expected).max() <= 10 * rounding


def test_adapters_come_back_as_they_were_and_updates_whatever_the_alpha(folder):
    jax.tree.map(np.testing.assert_array_equal, load_peft(folder, SITES), ADAPTERS)
    other = select(BASE, TARGETS, rank=4, alpha=16.0)
    loaded = load_peft(folder, other)
    for name, site in SITES.items():
        before = site.scale * ADAPTERS[name]["b"] @ ADAPTERS[name]["a"]
        after = other[name].scale * loaded[name]["b"] @ loaded[name]["a"]
        np.testing.assert_allclose(after, before, atol=1e-5)  # sums of 4 products of order 10, in float32


def test_rank_stabilised_scaling_and_half_precision(folder):
    change(folder, use_rslora=True)
    b = load_peft(folder, SITES)["q_proj"]["b"]
    np.testing.assert_allclose(b, 2 * ADAPTERS["q_proj"]["b"], rtol=1e-6)  # alpha / sqrt(4), not alpha / 4
    tensors = load_file(folder / "adapter_model.safetensors")
    half = {n: np.asarray(jnp.asarray(x, jnp.bfloat16)) for n, x in tensors.items()}
    save_file(half, folder / "adapter_model.safetensors")
    loaded = load_peft(folder, SITES)["q_proj"]["a"]
    assert loaded.dtype == jnp.float32
    np.testing.assert_allclose(loaded, ADAPTERS["q_proj"]["a"], rtol=2**-8)


def test_label_rows_of_the_head_are_taken_in_their_order(folder):
    sites = SITES.with_head_rows(3)
    head = load_peft(folder, sites, head_rows=(7, 2, 9))["lm_head"]
    np.testing.assert_array_equal(head["b"][0], ADAPTERS["lm_head"]["b"][0, jnp.array([7, 2, 9])])
    with pytest.raises(ValueError, match="give the label tokens as head_rows"):
        load_peft(folder, sites)
    for rows in ((7, 2, 99), (7, 2, -1), (7, 2, 1.5)):
        with pytest.raises(ValueError, match=rf"token ids below 40; got \[7(.0)?, 2(.0)?, {rows[2]}\]"):
            load_peft(folder, sites, head_rows=rows)


def test_a_prior_centred_on_an_imported_adapter_starts_there(folder):
    imported = load_peft(folder, SITES)
    prior = priors.centered(priors.sparse_gp(rows=2, cols=2), imported)
    start = handlers.substitute(handlers.seed(prior, jax.random.key(3)), substitute_fn=init_to_base)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda: start(SITES))(), imported)


REFUSED = {
    "dora": ({"use_dora": True}, "use_dora=True are not supported"),
    "alphas": ({"alpha_pattern": {"q_proj": -3}}, "alpha_pattern in .* is corrupt: got {'q_proj': -3}"),
    "ranks": ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern in .* is corrupt: got {'q_proj': 2.5}"),
    "a pattern": ({"rank_pattern": {"q_(": 2}}, r"rank_pattern in .* has the pattern 'q_\('"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "bias": ({"bias": "all"}, "bias='all' are not supported"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' change the base weights"),
    "another method": ({"peft_type": "IA3"}, "only LoRA adapters can be read; this one is 'IA3'"),
    "no rank": ({"r": None}, "corrupt: r=None"),
    "rank in words": ({"r": "4"}, "corrupt: r='4', lora_alpha=6.0; expected an integer of at least 1"),
    "rank and a half": ({"r": 4.0}, "corrupt: r=4.0"),
    "no alpha": ({"lora_alpha": float("nan")}, "corrupt: r=4, lora_alpha=nan; expected .* a positive number"),
    "negative alpha": ({"lora_alpha": -6}, "corrupt: r=4, lora_alpha=-6"),
    "huge alpha": ({"lora_alpha": 10**400}, "corrupt: r=4, lora_alpha=1000000"),
    "rslora in words": ({"use_rslora": "false"}, "use_rslora in .* must be true or false; got 'false'"),
    "another rank": ({"r": 2}, "has rank 2; the sites of 'q_proj' have rank 4"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_plain_lora_is_refused_by_name(folder, settings, message):
    change(folder, **settings)
    with pytest.raises(ValueError, match=message):
        load_peft(folder, SITES)


def test_missing_and_corrupt_files_are_named(folder, tmp_path_factory):
    with pytest.raises(FileNotFoundError, match=r"not an adapter folder: it has no adapter_config.json"):
        load_peft(tmp_path_factory.mktemp("empty"), SITES)
    tensors = folder / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors in .* is corrupt"):
        load_peft(folder, SITES)
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match="pickled adapters"):
        load_peft(folder, SITES)
    for text in ("{", "[]", "{}", "[" * 100_000):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"adapter_config.json in .* is corrupt"):
            load_peft(folder, SITES)


def test_numbers_of_an_adapter_are_finite_floats(folder):
    path, name = (
        folder / "adapter_model.safetensors",
        "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight",
    )
    whole = load_file(path)
    for value in (np.nan, np.inf):
        wrong = whole[name].copy()
        wrong[3, 1] = value
        save_file(whole | {name: wrong}, path)
        with pytest.raises(ValueError, match=f"tensor '{name}' has 1 of 64 numbers that are NaN or infinite"):
            load_peft(folder, SITES)
    save_file(whole | {name: whole[name].astype(np.int8)}, path)
    with pytest.raises(ValueError, match=f"'{name}' in .* must have floats of 16 to 64 bits; got I8"):
        load_peft(folder, SITES)
    save_file(whole | {name.replace("model.model", "model"): whole[name]}, path)
    with pytest.raises(ValueError, match="has lora_B of 'layers.1.down_proj' under two names"):
        load_peft(folder, SITES)


def test_sites_and_adapter_must_have_the_same_modules_and_layers(folder):
    with pytest.raises(ValueError, match=r"no lora_A for 'layers.0.up_proj'; nearest: layers.0.q_proj"):
        load_peft(folder, select(BASE, [*TARGETS, "up_proj"], rank=4))
    with pytest.raises(
        ValueError, match=r"also has layers.0.q_proj, layers.1.q_proj, layers.2.q_proj, which"
    ):
        load_peft(folder, select(BASE, ["down_proj", "lm_head"], rank=4))
    wide = tiny_base(jax.random.key(0), num_layers=3)
    wider = SimpleNamespace(modules=dict(wide.modules) | {"q_proj": (16, 20)}, num_layers=3)
    with pytest.raises(ValueError, match=r"factors of 'layers.0.q_proj' need shapes .*\(20, 4\).*; got"):
        load_peft(folder, select(wider, TARGETS, rank=4))
    tensors = load_file(folder / "adapter_model.safetensors")
    odd = {"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 4), np.float32)}
    save_file(tensors | odd, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="lora_embedding_A' in .* is no factor of plain LoRA"):
        load_peft(folder, SITES)


def test_frozen_weights_beside_the_head_are_skipped_and_replaced_ones_refused(folder):
    path, copy = folder / "adapter_model.safetensors", "base_model.model.model.embed_tokens.weight"
    whole = load_file(path)
    rows = SITES.with_head_rows(2)
    for height in (40, 41):
        extra = {copy: np.ones((height, 16), np.float32)}
        save_file(whole | extra, path)
        assert load_peft(folder, rows, head_rows=(7, 2)).keys() == rows.keys()
        if height == 40:
            jax.tree.map(np.testing.assert_array_equal, load_peft(folder, SITES), ADAPTERS)
            continue
        with pytest.raises(
            ValueError, match=r"embed_tokens.weight' in .* must have the 40 rows of the base; got 41"
        ):
            load_peft(folder, SITES)
        save_file({n: x for n, x in whole.items() if "lm_head" not in n} | extra, path)
        with pytest.raises(
            ValueError, match="replaces '.*embed_tokens.weight' of the base without an adapter"
        ):
            load_peft(folder, select(BASE, ["q_proj", "down_proj"], rank=4))


def test_families_of_different_ranks_are_saved_by_patterns(tmp_path):
    mixed = select(BASE, {"q_proj": 2, "k_proj": 3}, alpha=6.0)
    random = np.random.default_rng(0)
    adapters = {
        name: {factor: jnp.asarray(random.normal(size=shape)) for factor, shape in site.shapes.items()}
        for name, site in mixed.items()
    }
    save_peft(adapters, tmp_path, sites=mixed, base=BASE)
    sites = peft_sites(tmp_path, BASE)
    again = load_peft(tmp_path, sites)
    for module in ("q_proj", "k_proj"):
        placed = [s.place(x, first_layer=0)[module] for s, x in ((mixed, adapters), (sites, again))]
        updates = [pair["b"] @ pair["a"] for pair in placed]
        np.testing.assert_allclose(*updates, rtol=1e-5, atol=1e-6)


def test_what_the_format_cannot_hold_is_not_saved(tmp_path):
    rows = SITES.with_head_rows(3)
    adapters = ADAPTERS | {"lm_head": {"a": ADAPTERS["lm_head"]["a"], "b": jnp.ones((1, 3, 4))}}
    with pytest.raises(
        ValueError, match="'lm_head' holds 3 of the 40 rows of 'lm_head', those of label tokens"
    ):
        save_peft(adapters, tmp_path, sites=rows, base=BASE)
    with pytest.raises(ValueError, match="one adapter for each family"):
        save_peft({}, tmp_path, sites=SITES, base=BASE)

"""Adapters of encoders and peft: logits of torch, also with a trained head, and what is refused."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders.families import base_of, reference, rows_of
from safetensors.numpy import load_file, save_file

import bnlora as bl
from bnlora.adapters.peft import read_adapter
from bnlora.models import families
from bnlora.models.loading import Checkpoint
from bnlora.testing import tiny_base, tiny_encoder

LABELS = bl.likelihoods.Labels(3)
TARGETS = ["q_proj", "down_proj", "lm_head"]
every_encoder = pytest.mark.parametrize("name", sorted(reference.ENCODERS))


def drawn(sites: bl.Sites) -> dict:
    generator = np.random.default_rng(0)
    shapes = {name: site.shapes for name, site in sites.items()}
    return {
        name: {f: jnp.asarray(0.3 * generator.standard_normal(s), jnp.float32) for f, s in pair.items()}
        for name, pair in shapes.items()
    }


def headless(name: str) -> bl.Base:
    """The encoder without its head: a body with a new one."""
    config = reference.ENCODERS[name] | {"architectures": ["BertModel" if name == "bert" else "RobertaModel"]}
    tensors = reference.encoder_tensors(reference.ENCODERS[name])
    body = {n: x for n, x in tensors.items() if not n.startswith("classifier")}
    if name == "roberta":
        body |= {
            f"roberta.pooler.dense.{x}": 0 * tensors[f"classifier.dense.{x}"] for x in ("weight", "bias")
        }
    module = families.build(Checkpoint(config, body, None), num_labels=3)
    return bl.Base.from_module(module, name=name, family=name)


def torch_logits(name: str, folder, tokens) -> np.ndarray:
    """Logits of torch and peft with the adapter of a folder."""
    peft = pytest.importorskip("peft")
    config = reference.ENCODERS[name]
    model = reference.torch_encoder(config, reference.encoder_tensors(config))
    adapted = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    return reference.torch_outputs(adapted, tokens)[1]


@pytest.mark.filterwarnings("ignore")  # torch's and peft's own
@every_encoder
def test_peft_reads_what_is_saved_and_so_do_we(name, tmp_path):
    base, rows = base_of(name), rows_of(base_of(name))
    sites = bl.select(base, TARGETS, rank=2)
    adapters = drawn(sites)
    tokens = np.asarray(rows.tokens)
    whole = bl.Batch(rows.tokens, jnp.ones_like(rows.mask), rows.labels)
    own = bl.PointPosterior(bl.Classifier(base, sites, bl.priors.normal(), likelihood=LABELS), adapters)
    expected = bl.predict(jax.random.key(0), own, whole, num_draws=1).probs
    bl.save_peft(adapters, tmp_path, sites=sites, base=base)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) >= {
        f"base_model.model.{name}.encoder.layer.0.attention.self.query.lora_A.weight",
        f"base_model.model.{'classifier' if name == 'bert' else 'classifier.out_proj'}.weight",
    }
    logits = torch_logits(name, tmp_path, tokens)
    np.testing.assert_allclose(jax.nn.softmax(logits), expected, atol=2e-5)
    for other in (base, headless(name)):
        point = bl.load_peft_posterior(tmp_path, other, likelihood=LABELS)
        again = bl.predict(jax.random.key(0), point, whole, num_draws=1).probs
        np.testing.assert_allclose(again, expected, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
@every_encoder
def test_a_classifier_that_peft_trained_gives_the_logits_of_torch(name, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    config = reference.ENCODERS[name]
    settings = peft.LoraConfig(
        r=3, lora_alpha=6, task_type="SEQ_CLS", target_modules=["query", "output.dense"]
    )
    model = peft.get_peft_model(
        reference.torch_encoder(config, reference.encoder_tensors(config)), settings
    ).eval()
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if "lora_" in parameter or "modules_to_save" in parameter:
                weight.copy_(0.3 * torch.randn_like(weight))
    model.save_pretrained(str(tmp_path))
    base = base_of(name)
    tokens = reference.tiny_tokens(config)
    _, expected = reference.torch_outputs(model, tokens)
    rows = bl.Batch(jnp.asarray(tokens), jnp.ones(tokens.shape, bool), jnp.zeros(len(tokens), int))
    point = bl.load_peft_posterior(tmp_path, base, likelihood=LABELS)
    assert {site.module for site in point.model.sites.values()} == {"q_proj", "o_proj", "down_proj"}
    found = bl.predict(jax.random.key(0), point, rows, num_draws=1).probs
    np.testing.assert_allclose(found, jax.nn.softmax(expected), atol=2e-5)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    base = base_of("bert")
    sites = bl.select(base, TARGETS, rank=2)
    bl.save_peft(drawn(sites), tmp_path, sites=sites, base=base)
    with pytest.raises(ValueError, match=r"has a classification head of its own.*load_peft_posterior"):
        bl.load_peft(tmp_path, sites)
    config = replace(tiny_encoder(jax.random.key(0)).config, pooling="mean")
    mean = bl.Base.random(jax.random.key(0), config)
    with pytest.raises(ValueError, match=r"trained on the pooling layer; the base has pooling 'mean'"):
        bl.load_peft_posterior(tmp_path, mean, likelihood=LABELS)
    with pytest.raises(ValueError, match=r"the base is no encoder"):
        bl.load_peft_posterior(tmp_path, tiny_base(jax.random.key(0)), label_ids=(3, 5))
    head = read_adapter(tmp_path).head
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.classifier.weight": head["classifier.weight"][:2].copy()}, file)
    with pytest.raises(ValueError, match=r"classifier.weight \(3, 32\), for 3 labels; got .*\(2, 32\)"):
        bl.load_peft_posterior(tmp_path, base, likelihood=LABELS)
    only_head = bl.select(base, ["lm_head"], rank=2)
    with pytest.raises(ValueError, match=r"needs a module of a layer.*\['lm_head'\]"):
        bl.save_peft(drawn(only_head), tmp_path, sites=only_head, base=base)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["pooler"]}))
    with pytest.raises(ValueError, match=r"modules_to_save=\['pooler'\] are not supported"):
        bl.load_peft_posterior(tmp_path, base, likelihood=LABELS)


def test_draws_of_a_posterior_leave_as_adapters(tmp_path):
    base, rows = base_of("bert"), rows_of(base_of("bert"))
    sites = bl.select(base, TARGETS, rank=2)
    model = bl.Classifier(base, sites, bl.priors.normal(), likelihood=LABELS)
    point = bl.PointPosterior(model, drawn(sites))
    export = bl.export_peft(jax.random.key(0), point, tmp_path, num_draws=1, mean_of=2, data=rows)
    np.testing.assert_allclose(export.nll["mean"], export.nll["posterior"], atol=1e-4)
    again = bl.load_peft_posterior(export.draws[0], base, likelihood=LABELS)
    expected = bl.predict(jax.random.key(0), point, rows, num_draws=1).probs
    np.testing.assert_allclose(
        bl.predict(jax.random.key(0), again, rows, num_draws=1).probs, expected, atol=2e-5
    )

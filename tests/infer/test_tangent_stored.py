"""A core fit on disk is the same posterior in another process, and no other folder passes for one."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from builders.linearised import BASE, KEY, NEW, ROWS
from rich.console import Console

import bnlora as bl
from bnlora.infer.svi.checkpoint import read_notes
from bnlora.testing import tiny_base

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def made() -> bl.CoreFit:
    options = {"label_ids": (3, 5), "targets": ["v_proj", "lm_head", "slope"], "num_steps": 6}
    return bl.fit_core(KEY, BASE, ROWS, **options, console=QUIET)


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    where = tmp_path_factory.mktemp("core") / "new" / "fit"
    bl.save_core(made, where, notes={"words": [" bad", " good"]})
    return where


@pytest.mark.slow
def test_all_of_it_comes_back(made, folder):
    again = bl.load_core(folder, BASE)
    assert read_notes(folder) == {"words": [" bad", " good"]}
    assert again.frames.checksum == made.frames.checksum
    assert again.frames.sites == made.frames.sites
    assert again.scales == made.scales
    assert list(again.scales.values) == list(made.scales.values)
    assert dict(again.seconds) == dict(made.seconds)
    assert again.gaussian.log_evidence == made.gaussian.log_evidence
    for part, other in zip(again.gaussian.affine, made.gaussian.affine, strict=True):
        np.testing.assert_array_equal(part, other)
    assert [str(x) for x in again.overview] == [str(x) for x in made.overview]
    ours, theirs = (bl.predict(KEY, x, NEW, num_draws=20, console=QUIET).probs for x in (made, again))
    np.testing.assert_array_equal(ours, theirs)
    for posterior in (again, again.gaussian):
        bl.predict(KEY, posterior, NEW, num_draws=2, console=QUIET)


def test_samplers_go_on_from_it(folder):
    again = bl.load_core(folder, BASE)
    options = {"mass": again.gaussian, "num_warmup": 20, "num_draws": 10, "num_chains": 2}
    chains = bl.sample_nuts(KEY, again.model, again.fit.train, **options, console=QUIET)
    assert chains.kind == "tangent"


def test_another_process_has_the_same_draws(made, folder):
    program = f"""
import jax, bnlora as bl
from bnlora.testing import tiny_base
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from builders.linearised import BASE, KEY
print(repr(float(bl.load_core({str(folder)!r}, BASE).draw_adapters(KEY, 3)["v_proj"]["b"].sum())))
"""
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300
    ).stdout
    assert float(printed) == pytest.approx(float(made.draw_adapters(KEY, 3)["v_proj"]["b"].sum()), rel=1e-5)


def test_frames_come_back_from_every_fit_under_a_core_prior(made, folder, tmp_path):
    bl.save_fit(made.fit, tmp_path)
    for where in (folder, tmp_path):
        frames = bl.load_frames(where, BASE)
        assert frames.checksum == made.frames.checksum
        assert str(frames.overview[0]) == str(made.frames.overview[0])
        assert (frames.source, frames.label_free) == ("jacobian", True)


def test_other_folders_and_other_bases_are_refused(made, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no fit"):
        bl.load_core(tmp_path / "nowhere", BASE)
    bl.save_fit(made.fit, tmp_path)
    with pytest.raises(ValueError, match=r"was not written by bl.save_core; read it with bl.load_fit"):
        bl.load_core(tmp_path, BASE)
    other = tiny_base(jax.random.key(77), num_layers=BASE.num_layers)
    for load in (bl.load_core, bl.load_frames):
        with pytest.raises(ValueError, match="belong to another base than"):
            load(folder, other)
    model = bl.Classifier(BASE, bl.select(BASE, ["v_proj"], rank=1), bl.priors.normal(), label_ids=(3, 5))
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    options = {"num_steps": 1, "batch_size": 4, "console": QUIET}
    plain = bl.fit(KEY, model, guide, ROWS, optax.adam(0.1), **options)
    bl.save_fit(plain, tmp_path)
    with pytest.raises(ValueError, match="has no frames: its prior was not priors.core"):
        bl.load_frames(tmp_path, BASE)


def test_a_guide_in_turned_coordinates_is_refused(made, tmp_path):
    """Eigenvectors of the other sign span the same Gaussian, but a fitted guide means another one there."""
    bl.save_fit(made.fit, tmp_path)
    affine = made.gaussian.affine
    turned = replace(made.gaussian, affine=affine._replace(vectors=-affine.vectors))
    np.testing.assert_allclose(turned.covariance(), made.gaussian.covariance(), atol=1e-10)
    same = bl.guides.Guide(made.model.prior, bl.guides.around(made.gaussian))
    bl.load_fit(tmp_path, made.model, same)
    other = bl.guides.Guide(made.model.prior, bl.guides.around(turned))
    with pytest.raises(ValueError, match=r"guide around another Gaussian.*keep fits of bl.fit_core by"):
        bl.load_fit(tmp_path, made.model, other)

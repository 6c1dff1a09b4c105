"""What several files of this folder share: one small fit that is served."""

import jax
import pytest


@pytest.fixture(scope="session")
def served_place(tmp_path_factory, tiny_folder):
    """A folder with tables and a fit."""
    pytest.importorskip("fastapi")
    from builders.served import written_place

    return written_place(tmp_path_factory.mktemp("served"), tiny_folder)


@pytest.fixture(scope="session")
def service(served_place):
    """The service of that fit, with small limits and four draws."""
    from builders.served import LIMITS

    from bnlora.app.serve.service import load_service

    return load_service(jax.random.key(0), served_place / "fit", LIMITS, 4)


@pytest.fixture
def client(service):
    """A client of that service."""
    from builders.served import opened

    with opened(service) as client:
        yield client

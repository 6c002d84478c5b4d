"""Fixtures that several test files share."""

import pytest


@pytest.fixture(scope="session")
def core_models(tmp_path_factory: pytest.TempPathFactory) -> "CoreModels":
    """Random models of the C++ core, by shape."""
    from core_helpers import CoreModels

    return CoreModels(tmp_path_factory.mktemp("core"))

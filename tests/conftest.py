"""Fixtures that several test files share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from core_helpers import CoreModels


@pytest.fixture(scope="session")
def core_models(tmp_path_factory: pytest.TempPathFactory) -> CoreModels:
    """Random models of the C++ core, by shape."""
    from core_helpers import CoreModels  # not needed, and not importable, where only the converter is tested

    return CoreModels(tmp_path_factory.mktemp("core"))

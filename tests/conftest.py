"""Fixtures that several test files share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from core_helpers import CoreModels

LONGEST = ("test_quality.py", "test_gpu_backend.py", "test_gpu_op.py", "test_metal_backend.py", "test_corrections.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no process is left with one while the others have nothing to do."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def core_models(tmp_path_factory: pytest.TempPathFactory) -> CoreModels:
    """Random models of the C++ core, by shape."""
    from core_helpers import CoreModels  # not needed, and not importable, where only the converter is tested

    return CoreModels(tmp_path_factory.mktemp("core"))

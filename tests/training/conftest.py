"""Trainings collect garbage, which is slow where all libraries are imported."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="session")
def frozen_imports() -> None:
    """Let later collections pass over what the imports have made."""
    gc.collect()
    gc.freeze()

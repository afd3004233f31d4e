from importlib import import_module
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="session")
def scenarios() -> ModuleType:
    """The trainings of scenarios.py, which other processes run, too."""
    return import_module("tests.training.scenarios")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)

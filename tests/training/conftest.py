import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_scenarios", Path(__file__).parent / "scenarios.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def scenarios() -> ModuleType:
    """The trainings of scenarios.py, which other processes run as a script."""
    return _load()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)

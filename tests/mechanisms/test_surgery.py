"""Choosing submodules by name."""

import pytest
from torch import nn

from regularized.mechanisms.surgery import close_names, match_modules


def block():
    parts = {
        "q_proj": nn.Linear(2, 2),
        "k_proj": nn.Linear(2, 2),
        "norm": nn.LayerNorm(2),
        "my_q_proj": nn.Linear(2, 2),
    }
    return nn.ModuleDict(parts)


def model():
    return nn.ModuleDict({"layers": nn.ModuleList([block(), block()]), "head": nn.Linear(2, 3)})


def test_names_and_ends_of_names():
    """Fails when an end matches in the middle of a word (``my_q_proj``), or the order is that of the targets."""
    assert list(match_modules(model(), ["head", "q_proj"])) == ["layers.0.q_proj", "layers.1.q_proj", "head"]
    assert list(match_modules(model(), ["1.norm"])) == ["layers.1.norm"]
    net = model()
    assert all(net.get_submodule(name) is module for name, module in match_modules(net, ["k_proj"]).items())


def test_none_takes_every_module_of_a_kind_but_not_the_model():
    """Fails when a model that is itself a linear layer is to be replaced inside itself."""
    assert len(match_modules(model(), None)) == 7
    assert list(match_modules(model(), None, kind=nn.LayerNorm)) == ["layers.0.norm", "layers.1.norm"]
    assert match_modules(nn.Linear(2, 2), None) == {}
    assert match_modules(model(), []) == {}


def test_each_target_must_match():
    """Fails when a misspelt name among right ones is passed over: less is trained than was asked for."""
    with pytest.raises(
        ValueError, match=r"target_modules: no module of ModuleDict is called 'v_pro'; close names.*q_proj"
    ):
        match_modules(model(), ["head", "v_pro"])
    with pytest.raises(
        ValueError, match=r"also_train must be a list of names, got the string 'head'; write \['head'\]"
    ):
        match_modules(model(), "head", option="also_train")
    assert close_names(["layers.2.norm"], ["layers.1.norm", "head"]) == "close names: ['layers.1.norm']"

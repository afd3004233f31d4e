"""Two processes that each hold a part of the factors and entries (FSDP2); several whole copies are in the contract."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from regularized.evidence.processes import run_in_processes
from regularized.pretraining.sltrain import convert
from regularized.training.sharded import gathered


def a_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 40), nn.GELU(), nn.Linear(40, 40))
    convert(model, rank=4, density=0.1, include=[""], generator=torch.Generator().manual_seed(0))
    return model


def train(model, x):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def samples():
    return torch.randn(16, 40, generator=torch.Generator().manual_seed(1))


def _sharded(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh, model = init_device_mesh("cpu", (2,)), a_model()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    train(model, samples().chunk(2)[rank])
    state = model.state_dict()
    held = state["0.left"].to_local().shape
    torch.save({"state": gathered(dict(state)), "held": held}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_sharded_training_is_that_of_one_process(tmp_path):
    """Fails when a shard of the entries meets the whole positions, or positions are sharded or drawn apart."""
    run_in_processes(_sharded, str(tmp_path))
    model = a_model()
    train(model, samples())
    for rank in range(2):
        saved = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert saved["held"] == (20, 4)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(saved["state"][name], tensor, rtol=0, atol=1e-6)

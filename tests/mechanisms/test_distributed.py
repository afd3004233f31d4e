"""Two real gloo processes with different data; each check compares with one process that has the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from regularized.evidence.processes import run_launched
from regularized.mechanisms.distributed import gather_rows, gather_samples, leave_process_group, rank, world_size


def gather():
    """Different numbers of rows, a repeated index, types, an empty part."""
    dist.init_process_group("gloo")
    me = rank()
    assert world_size() == 2
    index = torch.tensor([[4, 2, 4], [2]][me])
    rows = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0]]][me], requires_grad=True)
    all_index, all_rows = gather_rows(index, rows)
    assert all_index.tolist() == [4, 2, 4, 2]
    assert all_rows.flatten().tolist() == [1, 2, 3, 4]
    assert not all_rows.requires_grad
    flags = gather_rows(index, index > 3)[1]
    assert flags.tolist() == [True, False, True, False]
    empty = gather_rows(index[:0] if me else index, rows[:0] if me else rows)
    assert empty[0].tolist() == [4, 2, 4]
    assert empty[1].shape == (3, 1)
    leave_process_group()


def statistic():
    """A statistic of the whole batch: value, and parameter gradient after DDP's averaging."""
    dist.init_process_group("gloo")

    def variance(h):
        return h.var(0).log().sum() + (h.T @ h).square().sum()

    torch.manual_seed(0)
    x = torch.randn(7, 3, dtype=torch.float64)
    whole = nn.Linear(3, 2).double()
    loss = variance(whole(x))
    loss.backward()
    model = DistributedDataParallel(copy.deepcopy(whole))
    model.zero_grad()
    ours = variance(gather_samples(model(x[:5] if rank() == 0 else x[5:])))
    ours.backward()
    torch.testing.assert_close(ours, loss)
    torch.testing.assert_close(model.module.weight.grad, whole.weight.grad)
    torch.testing.assert_close(model.module.bias.grad, whole.bias.grad)
    del model, ours, loss
    leave_process_group()


def test_rows_of_two_processes():
    """Fails if rows come in another order, or padding stays."""
    run_launched(gather)


def test_statistic_of_two_processes():
    """Fails if the gradient is that of one process's part (a collective that autograd does not see gives 1 / world size
    of it)."""
    run_launched(statistic)


def test_one_process_is_the_identity():
    """Fails if a part cannot call them unconditionally."""
    index, rows = torch.tensor([1]), torch.zeros(1, 2, requires_grad=True)
    assert (rank(), world_size()) == (0, 1)
    assert gather_rows(index, rows) == (index, rows)
    assert gather_samples(rows) is rows


def test_bad_shapes():
    """Fails if rows and indices that do not belong together are gathered."""
    with pytest.raises(ValueError, match=r"\(2,\) and \(3, 1\)"):
        gather_rows(torch.zeros(2), torch.zeros(3, 1))

"""Devices and processes: Accelerate does the work, this module says with which settings, and fills two gaps."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from regularized.training.options import Compute, Logging
from regularized.training.sharded import is_sharded
from regularized.training.trackers import resolve_trackers

__all__ = ["average_gradients", "make_accelerator", "synchronise"]

PART = 2**26  # bytes that are sent at once


def make_accelerator(compute: Compute, logging: Logging) -> Accelerator:
    """An ``Accelerator`` for the device, the process group and the trackers.

    Raises:
        ValueError: a process group that Accelerate does not see; a launch whose restarts would wait for the dead.

    Examples:
        >>> make_accelerator(Compute(device="cpu"), Logging()).device
        device(type='cpu')
    """
    folder = None if logging.folder is None else Path(logging.folder)
    # Without its `cpu` flag Accelerate takes several processes on a machine without accelerator for one.
    cpu = compute.device == "cpu" or not torch.accelerator.is_available()
    _join_group_of_attempt(cpu=cpu)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="no",  # autocast stands around the forward passes of a Step, also those of further networks
        log_with=resolve_trackers(logging.trackers, folder) or None,
        project_dir=folder,
        # Copying buffers at each forward would forbid a second forward before the backward pass; they are
        # synchronised where they are read instead.
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                broadcast_buffers=False, find_unused_parameters=compute.find_unused_parameters
            )
        ],
    )
    group = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if group != accelerator.num_processes:
        raise ValueError(
            f"the process group has {group} processes, Accelerate sees {accelerator.num_processes}; start with "
            "torchrun or accelerate launch, or set RANK, WORLD_SIZE and LOCAL_RANK before the first Trainer"
        )
    return accelerator


def _join_group_of_attempt(*, cpu: bool) -> None:
    """Find the other processes of this attempt, where torchrun may start all of them again.

    Its agent keeps one store for all attempts. Without a part of it for each, a second attempt finds the addresses of
    processes that are dead, and waits for them (torch 2.13, https://github.com/pytorch/pytorch/issues/135712).
    """
    given = os.environ
    restarts = given.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and given.get("WORLD_SIZE") != "1"
    if not restarts or given.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    if given["WORLD_SIZE"] != given["LOCAL_WORLD_SIZE"]:  # the agents of several machines count attempts differently
        raise ValueError(
            "torchrun with --max-restarts on several machines would let a second attempt wait for processes of the "
            "first; start it with the variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every machine, or with "
            "--max-restarts 0"
        )
    store, rank, world = next(rendezvous("env://"))
    attempt = PrefixStore(f"attempt {given['TORCHELASTIC_RESTART_COUNT']}", store)
    accelerator = torch.accelerator.current_accelerator()
    backend = "gloo" if cpu or accelerator is None else dist.get_default_backend_for_device(accelerator)
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=world)


@torch.no_grad()
def synchronise(module: nn.Module, device: torch.device | None = None) -> None:
    """Give all processes the first one's parameters and buffers: what was drawn at random, running statistics.

    Their bytes are sent, so that every type goes through every backend (gloo has no int16, for one), in parts, so that
    a table that is kept in host memory can pass through the device of the processes.

    Args:
        module: the module.
        device: where the process group exchanges; default that of each tensor.

    Examples:
        >>> synchronise(nn.Linear(2, 2))  # nothing to do in one process
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for tensor in (t for t in (*module.parameters(), *module.buffers()) if t.numel() and not is_sharded(t)):
        plain = tensor.detach().contiguous()
        for part in plain.view(-1).view(torch.uint8).split(PART):
            sent = part.to(device or part.device)
            dist.broadcast(sent, 0)
            part.copy_(sent)
        if plain.data_ptr() != tensor.data_ptr():  # laid out in another order, channels last
            tensor.copy_(plain)


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average gradients over the processes, in one exchange, for parameters that DDP does not hold.

    A parameter that no process used keeps no gradient.
    """
    used = [p.grad is not None for p in parameters]
    flat = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    everything = torch.cat([*flat, torch.tensor(used, dtype=flat[0].dtype, device=flat[0].device)])
    dist.all_reduce(everything)
    everything /= dist.get_world_size()
    *averages, elsewhere = torch.split(everything, [len(f) for f in flat] + [len(used)])
    # Reading the flags makes the host wait for the device: only where this process did not use them all.
    keep = used if all(used) else elsewhere.tolist()
    for p, average, some in zip(parameters, averages, keep, strict=True):
        if not some:
            continue
        if p.grad is None:
            p.grad = torch.empty_like(p)
        p.grad.copy_(average.view_as(p))  # not the view itself, which moments could not change in place

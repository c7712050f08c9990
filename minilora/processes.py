"""Devices and several processes: torchrun sets RANK, LOCAL_RANK and WORLD_SIZE, and each process
takes a part of every batch. Without torchrun there is one process, and all of this is idle.

Skip this file when you read for a method.
"""

import os
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist

from minilora.data import Refused


def pick_device(name):
    """'auto', 'cpu', 'cuda' or 'cuda:N' -> torch.device; `Refused` where it does not exist."""
    wants_cuda = torch.cuda.is_available() and name.startswith(("auto", "cuda"))
    if "LOCAL_RANK" in os.environ and wants_cuda:
        if ":" in name:
            raise Refused(
                f"device '{name}': torchrun gives each process its own GPU; use auto, cuda or cpu"
            )
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise Refused(f"device '{name}' is not known; use auto, cpu or cuda")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise Refused(f"device '{name}': torch {torch.__version__} sees {count} CUDA devices")
    return device


def leader():
    """Whether this process writes, logs and saves: rank 0, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def processes(device):
    """Join torchrun's processes, by NCCL on GPUs and by gloo on CPUs. Only rank 0 prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # The others wait for as long as rank 0 pretrains.
    dist.init_process_group(backend, timeout=timedelta(days=1))
    try:
        with open(os.devnull, "w") as nowhere:
            with nullcontext() if leader() else redirect_stdout(nowhere):
                yield
    finally:
        dist.destroy_process_group()


def world():
    """(rank, number of processes)."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def wait():
    """Return when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def first(make):
    """make() in rank 0, then, when its file exists, in the others: for a cached pretraining."""
    made = make() if leader() else None
    wait()
    return make() if made is None else made


def own_part(rows, batch):
    """This process's part of a batch, which --batch counts over all processes: every n-th row, from
    its rank on."""
    rank, n = world()
    if batch % n:
        raise Refused(f"--batch {batch} cannot be divided among {n} processes")
    return rows[rank::n]


@torch.no_grad()
def average(tensors):
    """Replace each tensor by its mean over the processes, in one all-reduce; returns its bytes."""
    if not dist.is_initialized():
        return 0
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    means = (flat / dist.get_world_size()).split([t.numel() for t in tensors])
    for tensor, mean in zip(tensors, means):
        tensor.copy_(mean.view_as(tensor))
    return flat.numel() * flat.element_size()

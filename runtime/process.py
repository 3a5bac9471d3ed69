"""The process a job runs in: its device, its rank among others, and how it is asked to stop.

Place in the pipeline: under train.py and eval.py. Ranks meet through torchrun; on CPU they talk over gloo.
"""
import os
import signal
import threading
from dataclasses import dataclass

import torch
import torch.distributed as dist


def device_and_dtype(device: str, dtype: str):
    """Resolve "auto": cuda and bfloat16 where there is a GPU, else cpu and float32. ValueError for others."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "auto" and device.partition(":")[0] not in ("cpu", found):
        raise ValueError(f"--device {device}: there is no such device here, only {found}")
    device = torch.device(found if device == "auto" else device)
    names = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32, "float32": torch.float32,
             "bfloat16": torch.bfloat16}
    if dtype not in names:
        raise ValueError(f"--dtype {dtype}: must be one of {', '.join(names)}")
    return device, names[dtype]


@dataclass
class Ranks:
    """This process among the others. With one process every method is the identity."""
    rank: int = 0
    world: int = 1
    store: object = None                                # torch.distributed's table of keys that all see

    def sum(self, tensor):
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def most(self, count: int) -> int:
        """The largest of the ranks' counts."""
        return max(self.gather([count]))

    def reduce(self, tensor, to: int):
        """Sum over ranks, in place, on rank `to`; elsewhere its content is lost."""
        if self.world > 1:
            dist.reduce(tensor, to)
        return tensor

    def spread(self, tensor, source: int):
        """The tensor of rank `source`, in place, on every rank."""
        if self.world > 1:
            dist.broadcast(tensor, source)

    def gather(self, rows: list) -> list:
        """The rows of all ranks, on every rank."""
        if self.world == 1:
            return rows
        parts = [None] * self.world
        dist.all_gather_object(parts, rows)
        return [r for part in parts for r in part]

    def same(self, value):
        """Rank 0's value, on every rank."""
        return self.gather([value])[0]

    def leave(self):
        """The end: no rank leaves while another still talks."""
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()


def start_ranks(device: torch.device) -> tuple[Ranks, torch.device]:
    """Join torchrun's process group, if there is one (gloo on CPU, nccl on CUDA, one GPU a local rank)."""
    if "WORLD_SIZE" not in os.environ:
        return Ranks(), device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    store, rank, world = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")     # addresses of an earlier one are dead
    store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=rank,
                            world_size=world, store=store)
    return Ranks(rank, world, store), device


class Stop:
    """Ctrl-C and SIGTERM end the run after the step at hand, with a checkpoint; a second Ctrl-C at once."""

    def __enter__(self):
        self.asked, self.before = 0, {}
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number

    def __exit__(self, *error):
        for s, handler in self.before.items():
            signal.signal(s, handler)

"""Training: flags, ranks, the optimiser, the RL step, the supervised step, checkpoints, the log, the run.

    python train.py                                             # the embedded default: CPU, minutes
    torchrun --nproc_per_node 8 train.py --model Qwen/Qwen2.5-VL-3B-Instruct --data train.jsonl --lr 1e-6 ...

Takes: a checkpoint and problems. Gives: a run folder with checkpoints in the hub's format, metrics.jsonl,
groups.jsonl and held-out figures. The paper says what `Trainer.rl_step` says; `Trainer.score` and
`verifier_class` are its hooks. We chose: one update a rollout batch, AdamW at a rate that after a short
warm-up falls to a tenth, fp32 master weights, random numbers keyed by problem and step, so that W ranks
compute what one does and a resumed run what an uninterrupted one does. Left out: FSDP, pipelines,
asynchronous rollouts.

Worked example: of a global batch of 4, rank 1 of 2 takes problems 1 and 3 in the first step, 5 and 7 in the
second. With G = 8 and L_max = 64 both ranks divide their loss by 4 * 8 * 64 = 2048. At lr 2e-4 with 2 warm-up
steps the first step's rate is 1e-4; after half of the training it is 1.1e-4.
"""
import argparse
import contextlib
import fcntl
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

import attribute
import grpo
import rereason
import reward
import rollout
from eval import check_flags, evaluate, headline, is_tiny, load_heldout, report, summarise
from model import (Config, InputError, Qwen25VL, add_lora, load_adapter, load_model, read_json, read_tensors,
                   reading, require, resolve, save_model, without_lora)
from tiny import shapes


@dataclass
class TrainConfig:
    """Flags of `python train.py`."""
    # what
    stage: str = "rl"                   # rl: learn from rewards; sft: imitate demonstrations
    algo: str = "ivr"                   # ivr | grpo (no attribution, no re-reasoning)
    model: str = "tiny"                 # folder or hub id of the checkpoint to start from
    data: str = "tiny"                  # JSONL file, or the embedded tasks, e.g. tiny:steps=5,kinds=path
    eval_data: str = ""                 # JSONL file or spec ("" = held-out split of a tiny spec, else none)
    image_dir: str = ""                 # folder that image paths are relative to ("" = that of the file)
    instruction: str = rollout.INSTRUCTION      # appended to each question of a file (may be empty)
    out: str = ""                       # run folder ("" = runs/<stage>-<time>)
    resume: str = ""                    # run folder or checkpoint to continue, with its saved flags
    check: bool = False                 # only read --data: open all images, name all bad rows
    merge: str = ""                     # only write --model, with its adapters merged, to this new folder
    # how long
    max_steps: int = 32                 # rollout batches (rl) or optimiser steps (sft)
    max_tokens: int = 0                 # rl: end when so many tokens are generated, all kinds (0 = by steps)
    batch: int = 16                     # B: problems a step, over all ranks
    group_size: int = 8                 # G: completions a problem
    max_new_tokens: int = 0             # L_max: length limit of a completion (0 = 256 on tiny, else 1024)
    max_prompt_tokens: int = 16384      # a longer prompt is an error
    max_pixels: int = 0                 # images are scaled down to this area (0 = 1 MP on cuda, else as is)
    updates_per_batch: int = 1          # optimiser steps on each rollout batch
    micro_tokens: int = 65536           # padded tokens a forward-backward pass, of prompts and of completions
    # the objective
    use_std: bool = False               # divide advantages by the group's standard deviation
    clip_low: float = 0.2               # the ratio is clipped to 1 - clip_low ...
    clip_high: float = 0.28             # ... and 1 + clip_high
    dual_clip: float = 3.0              # bound on the loss of tokens with a negative advantage
    beta: float = 0.0                   # weight of the KL to the starting model (a copy exists only if > 0)
    format_weight: float = 0.1          # share of the reward that is for form
    # IVR-R1
    credit: str = "token"               # what of a failed rollout pays: token (at fault) | step | rollout
    rectify_below: float = 0.125        # groups up to this accuracy are rectified (< 0: none)
    reader: str = "start"               # what re-reads steps: start (--model, frozen) | policy | a folder
    reader_window: int = 1              # steps before a step that the reader sees with it
    revise: bool = True                 # the reader rewrites suspect steps (no: the policy restarts there)
    min_log_w: float = -1.5             # a rectified trajectory less likely than this a token is rejected
    lambda_r: float = 1.0               # weight of rectified trajectories
    gamma: float = 0.1                  # shape of their importance weight (0 = plain w)
    anneal: float = 0.4                 # the share of groups rectified falls to 0 over this last part
    # the optimiser
    lr: float = 0.0                     # AdamW's rate after warm-up (0 = by the model's size; LoRA: 10 x)
    lr_end: float = 0.1                 # share of lr left at the last step (linear decay; 1 = constant)
    warmup_steps: int = 2               # linear warm-up
    beta2: float = 0.98                 # AdamW's second-moment decay
    weight_decay: float = 0.0           # on matrices only
    max_grad_norm: float = 1.0          # gradients are clipped to this norm
    freeze_vision: bool = False         # leave the vision tower as it is
    lora: int = 0                       # train adapters of this rank on the decoder alone (0 = train it all)
    lora_alpha: float = 32.0            # an adapter's output is scaled by lora_alpha / lora
    activation_checkpointing: str = "auto"      # activations again, not kept: yes | no (auto: yes on cuda)
    # supervised stage on tiny
    erosion_first: float = 0.0          # chance that one of steps 1 to 3 is read from language ...
    erosion_last: float = 0.0           # ... and one from step 5 on (step 4: the mean)
    # looking at it, keeping it
    eval_problems: int = 200            # held-out problems (0 = no evaluation)
    eval_samples: int = 4               # k of avg@k
    eval_every: int = 0                 # a short evaluation every so many steps too (0 = no)
    show_every: int = 6                 # a group to terminal and groups.jsonl every so many steps (0 = never)
    save_every: int = 50                # checkpoint every so many steps, and at the end (0 = only then)
    keep: int = 2                       # checkpoints to keep
    max_bad_steps: int = 5              # end after so many steps in a row without a finite gradient
    seed: int = 0                       # data order and random numbers
    device: str = "auto"                # cpu, cuda (auto = cuda where there is one)
    dtype: str = "auto"                 # float32, bfloat16 (auto = bfloat16 on cuda, float32 on cpu)

    def __post_init__(self):
        check_flags(self)
        self.max_new_tokens = self.max_new_tokens or (256 if is_tiny(self.data) else 1024)


def parse_flags(config_class, argv=None, defaults: dict | None = None):
    """A dataclass as a command line: each field a --flag, its comment the help. defaults: by name."""
    comments = dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", inspect.getsource(config_class), re.M))
    parser = argparse.ArgumentParser(description=config_class.__doc__, allow_abbrev=False)
    for f in fields(config_class):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        help_text = f"{comments.get(f.name, '')} [{f.default}]".replace("%", "%%")
        default = (defaults or {}).get(f.name, f.default)
        parser.add_argument(f"--{f.name}", default=default, help=help_text, **kind)
    return config_class(**vars(parser.parse_args(argv)))


# ---- Data

def training_data(c: TrainConfig, codec, rank: int = 0, world: int = 1) -> tuple:
    """Training problems (endless on tiny) and held-out ones. InputError names this rank's bad rows."""
    def check(problem):
        rollout.encode_prompt(problem, codec, c.max_prompt_tokens, pixels=False)
        if c.stage == "sft":
            demonstration(problem, c, codec)

    if is_tiny(c.data):
        data = shapes.Stream(c.data, "train", c.seed, run=c.batch)
        check(data[0])
    else:
        show = None if c.check else 20
        data = rollout.load_problems(c.data, c.image_dir, c.instruction, check, show, rank, world)
    if c.eval_problems and (c.eval_data or is_tiny(c.data)):
        return data, load_heldout(c, c.eval_data or c.data, c.eval_problems, codec)
    return data, []


def demonstration(problem, c: TrainConfig, codec) -> list[int]:
    """A problem's demonstration as completion tokens, EOS included; on tiny it is made here, eroded or not.
    InputError where it is missing or too long: cut, it would teach to stop midway."""
    where, text = f"{problem.where or problem.id}: field 'demonstration'", problem.demonstration
    if is_tiny(c.data):
        rng = random.Random(f"erosion/{c.seed}/{problem.id}")
        text = shapes.demonstrate(problem, (c.erosion_first, c.erosion_last), rng)
    if not isinstance(text, str):
        raise rollout.InputError(f"{where} is missing or not text, --stage sft needs it")
    ids = rollout.token_ids(text, codec) + [codec.eos_ids[0]]
    if len(ids) > c.max_new_tokens:
        raise rollout.InputError(f"{where} has {len(ids)} tokens, --max_new_tokens is {c.max_new_tokens}")
    return ids


# ---- Ranks

def device_and_dtype(device: str, dtype: str):
    """Resolve "auto": cuda and bfloat16 where there is a GPU, else cpu and float32. ValueError for others."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "auto" and device.partition(":")[0] not in ("cpu", found):
        raise ValueError(f"--device {device}: there is no such device here, only {found}")
    with reading(f"--device {device}"):
        device = torch.device(found if device == "auto" else device)
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return device, getattr(torch, dtype)


def init_distributed(device: torch.device) -> tuple[int, int, torch.device]:
    """Join torchrun's process group, if there is one -> rank, world size, this rank's device."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    store, rank, world = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")     # addresses of an earlier one are dead
    # the slowest rank may take hours longer; when one fails, torchrun ends the others
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=rank,
                            world_size=world, store=dist.PrefixStore(f"attempt {attempt}", store),
                            timeout=timedelta(days=7))
    return rank, world, device


def all_gather(rows: list) -> list:
    """The rows of all ranks, on every rank. No rank continues before all are here."""
    if not dist.is_initialized():
        return rows
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return sum(parts, [])


def all_sum(values: list[float]) -> list[float]:
    """Each value summed over all ranks."""
    return torch.tensor(all_gather([values]), dtype=torch.float64).sum(0).tolist()


def fail(e: Exception):
    """End with a line that says why; of several processes it names this one."""
    who = f" in rank {os.environ['RANK']}" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    sys.exit(f"error{who}: {rollout.escaped(e, chr(10))}")


def leave():
    """The end: no rank leaves while another still talks."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def stop_signals():
    """Ctrl-C and SIGTERM are noted in the list given, so that the run ends after its step."""
    asked = []

    def note(number, frame):
        asked.append(number)
        signal.signal(number, signal.default_int_handler)       # a second time ends it at once

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def memory_needed(config, c: TrainConfig, world: int, bytes_each: int) -> dict:
    """GiB of a rank at its fullest, by part, from the sizes alone. Activations, an estimate: what each layer
    keeps of a pass of rows (with checkpointing its input), one layer in work, logits of 1,024 tokens."""
    with torch.device("meta"):
        net = Qwen25VL(config)
    L, D, I = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    total = trained = sum(p.numel() for p in net.parameters())
    if c.freeze_vision:
        trained -= sum(p.numel() for p in net.visual.parameters())
    if c.lora:
        trained = c.lora * sum(sum(p.shape) for p in net.model.layers.parameters() if p.dim() > 1)
    reads = c.stage == "rl" and c.algo == "ivr"
    start = (reads and c.reader == "start") or c.beta > 0       # shared by both; under adapters no copy
    copies = 1 + (start and not c.lora) + (reads and c.reader not in ("start", "policy"))
    kept = L * D if c.activation_checkpointing == "yes" else L * (16 * D + 6 * I)
    kv_width = D * config.num_key_value_heads // config.num_attention_heads
    sampled = c.batch * c.group_size // world * c.max_new_tokens if c.stage == "rl" else 0
    tokens = min(c.micro_tokens, sampled) if c.stage == "rl" else c.micro_tokens
    weights, masters, gradients = copies * total * bytes_each, 12 * trained / world, 4 * trained
    activations = tokens * (kept + 8 * I) * bytes_each + 12 * 1024 * config.vocab_size
    kv = 2 * L * kv_width * sampled * bytes_each
    parts = {"weights": weights, "masters and moments": masters, "gradients": gradients,
             "activations": activations, "sampled keys and values": kv,
             "in all": weights + masters + max(gradients + activations, kv)}    # an update, or sampling
    return {name: value / 2 ** 30 for name, value in parts.items()}


class Optimizer:
    """AdamW with fp32 master weights, its state sharded over ranks (ZeRO-1, arXiv 1910.02054): the owner of a
    parameter alone holds its master weight and moments, updates it and broadcasts it."""

    def __init__(self, model, c: TrainConfig, rank: int, world: int):
        self.world, self.max_grad_norm = world, c.max_grad_norm
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.owner, self.masters = {}, {}
        for n, (name, p) in enumerate(sorted(self.params.items(), key=lambda item: -item[1].numel())):
            self.owner[name] = n % world                        # the largest first, in turn
            if n % world == rank:
                self.masters[name] = p.detach().float().clone().requires_grad_()
        matrices = [master for master in self.masters.values() if master.dim() > 1]
        vectors = [master for master in self.masters.values() if master.dim() <= 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        # one parameter after the other: no temporary copies of all at once
        self.adamw = torch.optim.AdamW(groups, lr=c.lr, betas=(0.9, c.beta2), weight_decay=c.weight_decay,
                                       foreach=False)
        self.grads = {}                                         # fp32 sums over the micro-batches of a step
        for name, p in self.params.items():
            p.register_post_accumulate_grad_hook(partial(self.fold, name))

    def fold(self, name: str, p):
        """A gradient goes into its sum as soon as it is there, so that few are in memory at once."""
        self.grads[name] = self.grads[name].add_(p.grad) if name in self.grads else p.grad.float()
        p.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """One update. Returns the gradient norm before clipping; if it is not finite, nothing is updated.
        FloatingPointError where a weight is not, after all: the run ends with its last checkpoint."""
        squares = 0.0
        for name, p in self.params.items():                     # all ranks in the same order
            grad = self.grads.pop(name, torch.zeros_like(p, dtype=torch.float32))
            if self.world > 1:
                dist.reduce(grad, self.owner[name])
            if name in self.masters:
                self.masters[name].grad = grad
                squares += grad.norm().double() ** 2        # on a GPU each question for a number is a halt
        norm = math.sqrt(all_sum([float(squares)])[0])
        # rates that are not finite spoil a step as gradients do
        norm += 0.0 * (lr + sum(group["weight_decay"] for group in self.adamw.param_groups))
        if math.isfinite(norm):
            for group in self.adamw.param_groups:
                group["lr"] = lr
            for master in self.masters.values():
                master.grad.mul_(min(1.0, self.max_grad_norm / (norm + 1e-6)))
            self.adamw.step()
            spoilt = sum((~master.isfinite().all()).float() for master in self.masters.values())
            if all_sum([float(spoilt)])[0]:
                raise FloatingPointError("the update makes weights that are not finite: lower --lr")
            for name, p in self.params.items():
                if name in self.masters:
                    p.copy_(self.masters[name])
                if self.world > 1:
                    dist.broadcast(p.data, self.owner[name])
        self.adamw.zero_grad()
        return norm

    def state(self) -> dict:
        """Masters and moments of the parameters this rank owns, as named tensors."""
        out = {}
        for name, master in self.masters.items():
            for key, value in {"master": master.detach(), **self.adamw.state[master]}.items():
                out[f"{name}/{key}"] = value.contiguous()
        return out

    def load(self, files: list[Path]):
        """Take this rank's share of what all ranks saved. InputError where that does not fit."""
        state = {}
        for file in files:
            state |= read_tensors(file)
        for name, master in self.masters.items():
            with reading(f"--resume: the checkpoint's state of {name} (was it frozen?)"):
                master.data.copy_(state[f"{name}/master"].view(master.shape))
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{name}/{key}" in state:                # not before the first update
                        shape, device = (master.shape, master.device) if key != "step" else ((), "cpu")
                        value = state[f"{name}/{key}"].view(shape)
                        if key != "exp_avg" and value.min() < 0:
                            raise ValueError(f"{key} is negative")
                        self.adamw.state[master][key] = value.to(device, copy=True)


def learning_rate(c: TrainConfig, step: int, progress: float) -> float:
    """Linear warm-up, then linear decay to lr_end * lr. progress: share of the training that is done."""
    return c.lr * min(1.0, (step + 1) / max(1, c.warmup_steps)) * (1 - (1 - c.lr_end) * progress)


class Trainer:
    """The policy and what its updates need."""
    verifier_class = attribute.Verifier                         # what finds the step at fault

    def __init__(self, config: TrainConfig, checkpoint: Path | None = None):
        c = self.config = config
        device, dtype = device_and_dtype(c.device, c.dtype)
        self.rank, self.world, self.device = init_distributed(device)
        checkpoint = all_gather([checkpoint])[0]                # chosen once, should they see different ones
        if c.activation_checkpointing == "auto":
            c.activation_checkpointing = "yes" if device.type == "cuda" else "no"
        if device.type == "cuda":
            c.max_pixels = c.max_pixels or 1_003_520            # 1,280 image tokens
            torch.backends.cuda.enable_cudnn_sdp(False)         # it plans anew for each shape
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")    # fewer holes
        if c.batch % (self.world * c.updates_per_batch):
            raise InputError(f"--batch {c.batch}: must be a multiple of ranks x updates_per_batch = "
                             f"{self.world * c.updates_per_batch}")
        self.codec = rollout.load_codec(c.model, c.max_pixels)
        if self.device.type == "cuda":
            self.check_memory(dtype.itemsize, torch.cuda.get_device_properties(self.device).total_memory)
        self.data, self.held_out = training_data(c, self.codec, self.rank, self.world)
        self.model = self.load_policy(checkpoint, dtype)
        self.model.activation_checkpointing = c.activation_checkpointing == "yes"
        self.reference = self.load_frozen(c.model, dtype) if c.beta > 0 else None
        self.reader = self.choose_reader(dtype)
        self.size = sum(p.numel() for p in self.model.parameters())
        rate = 1e-4 if self.size < 1e8 else {"rl": 1e-6, "sft": 1e-5}[c.stage]
        c.lr = c.lr or (10 * rate if c.lora else rate)
        self.optimizer = Optimizer(self.model, c, self.rank, self.world)
        self.step = self.tokens = self.bad_steps = 0            # tokens: generated so far, over all ranks
        if checkpoint:
            state = read_json(checkpoint / "trainer.json")
            self.step, self.tokens, self.bad_steps = state["step"], state["tokens"], state["bad_steps"]
            self.optimizer.load(sorted(checkpoint.glob("optimizer-*.safetensors")))

    def check_memory(self, bytes_each: int, there: int):
        """Say what the run needs; InputError where a device of so many bytes can not hold what is certain:
        weights, masters, moments and gradients."""
        config = read_json(resolve(self.config.model) / "config.json", Config.from_dict)
        parts = memory_needed(config, self.config, self.world, bytes_each)
        said = ", ".join(f"{name} {value:.1f}" for name, value in parts.items())
        text = f"--model {self.config.model}: needs, in GiB a rank, {said}; there are {there / 2 ** 30:.1f}"
        less = "less need --lora, --reader policy, lower --micro_tokens, --batch"
        if parts["weights"] + parts["masters and moments"] + parts["gradients"] > there / 2 ** 30:
            raise InputError(f"{text}; {less}, or more ranks")
        if self.rank == 0:
            print(text)
            if parts["in all"] > there / 2 ** 30:
                print(f"warning: it may run out of memory; {less}")

    def load_policy(self, checkpoint: Path | None, dtype):
        """The model that learns: --model or, resumed, that of the checkpoint."""
        c = self.config
        if not c.lora:
            model = load_model(checkpoint or c.model, self.device, dtype)
            model.visual.requires_grad_(not c.freeze_vision)
            return model
        if (resolve(c.model) / "adapter_config.json").is_file():
            raise InputError(f"--model {c.model}: is an adapter already; with --lora, --merge it first")
        model = load_model(c.model, self.device, dtype)
        add_lora(model, c.lora, c.lora_alpha, c.seed)
        if checkpoint:
            load_adapter(model, checkpoint)
        return model

    def load_frozen(self, path: str, dtype):
        if self.config.lora and path == self.config.model:
            return without_lora(self.model)
        return load_model(path, self.device, dtype).eval().requires_grad_(False)

    def choose_reader(self, dtype):
        """The model that re-reads steps; none where nothing is re-read. ValueError for another tokenizer."""
        c = self.config
        if c.stage != "rl" or c.algo != "ivr":
            return None
        if c.reader == "policy":
            return self.model
        if c.reader == "start":
            return self.reference or self.load_frozen(c.model, dtype)
        with reading("--reader"):
            vocabulary = rollout.load_codec(c.reader).tokenizer.get_vocab()
        if vocabulary != self.codec.tokenizer.get_vocab():
            raise ValueError(f"--reader {c.reader}: its tokenizer is not that of --model {c.model}")
        return self.load_frozen(c.reader, dtype)

    def progress(self) -> float:
        """Share of the training that is done."""
        c = self.config
        return self.tokens / c.max_tokens if c.max_tokens else self.step / c.max_steps

    def next_batch(self) -> tuple[list, list[str]]:
        """This rank's problems of the step, every W-th, and the keys that name their random numbers."""
        c, problems, keys = self.config, [], []
        for place in range(self.rank, c.batch, self.world):
            i = self.step * c.batch + place
            if isinstance(self.data, list):
                epoch, i = divmod(i, len(self.data))            # a file is shuffled again each epoch
                rng = torch.Generator().manual_seed(c.seed + 7919 * epoch)
                i = torch.randperm(len(self.data), generator=rng)[i]
            problems.append(self.data[i])
            keys.append(f"{c.seed}/{self.step}/{place}")
        return problems, keys

    def readable(self, problems: list) -> tuple[list, list]:
        """Problems and prompts; where an image is not in order any more, another takes its place."""
        count = len(problems)
        problems, prompts = rollout.encode_prompts(problems, self.codec, self.config.max_prompt_tokens)
        if not problems:
            raise InputError("--data: no image of this step can be read any more")
        return (problems * count)[:count], (prompts * count)[:count]

    def rl_step(self) -> dict:
        """rollout -> reward -> attribute -> rereason -> grpo: one batch, from prompts to an update."""
        c, model, codec, progress = self.config, self.model, self.codec, self.progress()
        problems, keys = self.next_batch()
        problems, prompts = self.readable(problems)
        for prompt in prompts:
            prompt.kept = {}                                # policy and reader compute it once a step

        # rollout: G completions a problem, at temperature 1, so the stored log-probs are the policy's own
        model.eval()
        rollout_keys = [f"train/{key}" for key in keys]
        groups = rollout.sample(model, problems, codec, c.group_size, c.max_new_tokens, keys=rollout_keys,
                                prompts=prompts)

        # reward: rules only, no model
        for t in sum(groups, []):
            t.rewards = self.score(t)
        metrics, repairs = self.rollout_metrics(groups), []

        if c.algo == "ivr":
            # attribute: split rollouts into steps; in failed ones the reader, without the chain, finds the
            # step that lost the image
            hard = attribute.select_groups(groups, keys, c, progress)
            verifier = self.verifier_class(self.reader, codec, c.reader_window)
            attribute.attribute(groups, hard, verifier, codec, c.credit)

            # rereason: it looks again and rewrites that step; continue, verify; successes join the group
            groups, repairs = rereason.rectify_groups(model, codec, groups, hard, keys, verifier, c,
                                                      self.score)
            metrics |= self.repair_metrics(groups, repairs, verifier)

        for prompt in prompts:
            prompt.kept = None                              # weights change now

        # grpo: advantages within each group, credit to the tokens at fault, the clipped objective
        grpo.assign_advantages(groups, c.use_std)
        grpo.assign_credit(groups, c.credit if c.algo == "ivr" else "rollout")
        metrics |= self.update(groups, learning_rate(c, self.step, progress))
        return {**metrics, "generated_tokens": self.tokens, "groups": groups, "repairs": repairs}

    def score(self, t) -> dict:
        """The reward of a trajectory, by part; "total" is what is maximised."""
        p = t.problem
        return reward.reward_parts(t.text, p.answer, p.choices, t.finished, self.config.format_weight)

    def update(self, groups, lr: float) -> dict:
        """`updates_per_batch` optimiser steps, each on its share of the groups."""
        names = ("loss", "tokens", "entropy", "clip_fraction", "kl_ref", "kl_old", "ratio")
        c, sums, norms = self.config, Counter(dict.fromkeys(names, 0.0)), []
        self.model.train()
        share = len(groups) // c.updates_per_batch
        normaliser = self.world * share * c.group_size * c.max_new_tokens
        for first in range(0, len(groups), share):
            rows = [t for t in sum(groups[first:first + share], []) if grpo.has_gradient(t, c.beta)]
            inputs = self.model, self.codec, [t.prompt for t in rows], [t.ids for t in rows]
            for part, prompt_pass in rollout.micro_batches(*inputs, c.micro_tokens):
                sums.update(self.backward([rows[n] for n in part], prompt_pass, normaliser))
            norms.append(self.optimizer.step(lr))
        loss, tokens, *totals = all_sum(list(sums.values()))
        metrics = {"loss": loss / len(norms), "grad_norm": sum(norms) / len(norms), "lr": lr}
        for name, total in zip(names[2:], totals):              # means over the policy's own tokens
            metrics[name] = total / tokens if tokens else None
        return metrics

    def backward(self, rows: list, prompt_pass, normaliser: float) -> dict:
        """Loss and gradients of one micro-batch of trajectories."""
        c, inputs = self.config, (self.codec, [t.prompt for t in rows], [t.ids for t in rows])
        logps, entropy, _ = rollout.completion_logps(self.model, *inputs, True, prompt_pass)    # (R, T)
        ref_logps = self.reference_logps(inputs, prompt_pass) if self.reference else None
        batch = grpo.collate(rows, self.device)
        loss, stats = grpo.policy_loss(logps, **batch, normaliser=normaliser, clip_low=c.clip_low,
                                       clip_high=c.clip_high, dual_clip=c.dual_clip, beta=c.beta,
                                       ref_logps=ref_logps, lambda_r=c.lambda_r, gamma=c.gamma)
        loss.backward()
        on_policy = (batch["weights"] > 0) & ~batch["rectified"]
        stats |= {"loss": loss, "entropy": (entropy * on_policy).sum()}
        return {name: value.item() for name, value in stats.items()}

    @torch.no_grad()
    def reference_logps(self, inputs: tuple, prompt_pass):
        """The reference's log-probs (R, T), in the very shapes of the policy's: where both are the same model
        the KL is 0 to the bit, else Adam would make whole steps of the rounding."""
        if not prompt_pass.of_reference:
            prompts = list(prompt_pass.place)
            prompt_pass.of_reference = rollout.PromptPass(self.reference, prompts, self.codec.pad_id)
        return rollout.completion_logps(self.reference, *inputs, prompt_pass=prompt_pass.of_reference)[0]

    def sft_step(self) -> dict:
        """Imitate demonstrations: cross-entropy, the mean over the tokens of the global batch."""
        c, lr = self.config, learning_rate(self.config, self.step, self.progress())
        problems, prompts = self.readable(self.next_batch()[0])
        completions = [demonstration(p, c, self.codec) for p in problems]
        total = all_sum([sum(map(len, completions))])[0]
        self.tokens += int(total)
        self.model.train()
        loss_sum = 0.0
        for part, prompt_pass in rollout.micro_batches(self.model, self.codec, prompts, completions,
                                                       c.micro_tokens):
            inputs = [prompts[n] for n in part], [completions[n] for n in part]
            logps, _, _ = rollout.completion_logps(self.model, self.codec, *inputs, prompt_pass=prompt_pass)
            loss = -logps.sum() / total
            loss.backward()
            loss_sum += loss.item()
        norm = self.optimizer.step(lr)
        return {"loss": all_sum([loss_sum])[0], "grad_norm": norm, "lr": lr}

    def rollout_metrics(self, groups) -> dict:
        """What a step's rollouts were like, over all ranks; their tokens are counted here."""
        names, rows = ("reward", "accuracy", "format", "length", "finished"), []
        for t in sum(groups, []):
            r = t.rewards
            rows.append([r["total"], r["accuracy"], r["format"], len(t.ids), t.finished])
        table = torch.tensor(all_gather(rows), dtype=torch.float64)                             # (B * G, 5)
        means, tokens = dict(zip(names, table.mean(0).tolist())), int(table[:, 3].sum())
        shares = grpo.group_shares(table[:, 1].view(-1, self.config.group_size))
        self.tokens += tokens
        return {**means, **shares, "rollout_tokens": tokens}

    def repair_metrics(self, groups, repairs, verifier) -> dict:
        """What attribution and the Re-Reasoning Loop did, over all ranks; and counts its tokens. With a
        step oracle also the shares found of wrong steps, doubted of right ones, and of true revisions."""
        counts = Counter(sources=len(repairs), check_tokens=verifier.tokens, repair_tokens=verifier.tokens)
        for r in repairs:
            counts.update(repaired=r.outcome == "repaired", revisions=r.num_revisions, repair_tokens=r.tokens)
            for turn in r.turns if r.source.problem.oracle else ():
                if turn["what"] == "revise" and turn["after"] != turn["before"]:
                    counts.update(judged=1, true_revisions=shapes.is_right(r.source.problem, turn["after"]))
        for t in sum(groups, []):
            suspect = [check.is_suspect for check in t.checks or ()]
            counts["suspects"] += sum(suspect)
            if t.problem.oracle and suspect and t.provenance == "policy":
                for verdict, doubted in zip(shapes.verdicts(t), suspect):
                    if verdict == "true":
                        counts.update(right=1, false_alarms=doubted)
                    else:
                        counts.update(wrong=1, found=doubted)
        totals = sum(all_gather([counts]), Counter())
        self.tokens += totals["repair_tokens"]
        names = ("sources", "repaired", "revisions", "repair_tokens", "check_tokens", "suspects")
        metrics = {name: totals[name] for name in names}
        for name, of in (("found", "wrong"), ("false_alarms", "right"), ("true_revisions", "judged")):
            metrics[name] = totals[name] / totals[of] if totals[of] else None
        return metrics

    def evaluate(self, short: bool = False) -> dict | None:
        """Held-out figures, None where there are no problems. short: one sample of each of the first half."""
        problems, modes = self.held_out, sorted({0, self.config.eval_samples})
        if not problems:
            return None
        if short:
            problems, modes = problems[:(len(problems) + 1) // 2], [1]
        self.model.eval()
        limit, seed, records = self.config.max_new_tokens, self.config.seed, []
        for samples in modes:
            mine = problems[self.rank::self.world]
            records += evaluate(self.model, self.codec, mine, samples, limit, seed, progress=self.rank == 0)
        records, right = all_gather(records), {}
        for record in records:
            if record["mode"] == "sample":
                right.setdefault(record["id"], []).append(record["correct"])
        by_problem = [sum(right[name]) / len(right[name]) for name in sorted(right)]
        return {**summarise(records), "table": report(records), "problems": by_problem}

    def save(self):
        """out/checkpoint-<step>: the model in the hub's format, each rank's optimiser state, the step. It is
        written beside, flushed and renamed, so it is complete or absent. OSError where the disk is full."""
        out, part = Path(self.config.out), Path(self.config.out) / "unfinished-checkpoint"
        target = out / f"checkpoint-{self.step:06d}"
        with all_or_nothing(part, f"{target}: the checkpoint"):
            if self.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
                save_model(self.model, part, self.config.model)
                for file in part.iterdir():
                    flush(file)
            all_gather([])                                      # the folder is there
            shard = part / f"optimizer-{self.rank + 1:05d}-of-{self.world:05d}.safetensors"
            save_file(self.optimizer.state(), shard)
            flush(shard)
            all_gather([])                                      # all ranks have written
            if self.rank == 0:
                state = {"step": self.step, "tokens": self.tokens, "bad_steps": self.bad_steps,
                         "files": {file.name: file.stat().st_size for file in part.iterdir()}}
                (part / "trainer.json").write_text(json.dumps(state))
                flush(part / "trainer.json")
        if self.rank == 0:
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)
            for old in checkpoints(out)[:-self.config.keep]:
                shutil.rmtree(old)


# ---- The run folder: whose it is, what is in it

OURS = r"(config|heldout)\.json|(metrics|groups)\.jsonl|run\.lock|(un\w+-|ab\w+-)?checkpoint(-\d{6})?"


def checkpoints(folder: Path) -> list[Path]:
    """Those of a run, in order; nothing else that is called checkpoint-..."""
    return sorted(f for f in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{6}", f.name))


def check_folder(out: Path):
    """InputError unless this is a run folder, known by its config.json, or empty, or not there yet."""
    files = list(out.iterdir()) if out.is_dir() else []
    ours = all(re.fullmatch(r"config\.json\.\d+\.new", file.name) for file in files)     # killed at once
    with contextlib.suppress(ValueError):
        ours |= read_json(out / "config.json").keys() >= {"stage", "algo", "max_steps"}
    named = [file for file in files if re.fullmatch(OURS, file.name)]
    if not ours or any(file.is_symlink() or not (file.is_file() or file.is_dir()) for file in named):
        raise InputError(f"--out {out}: is not a run's folder, or holds links or the like; choose another")


def last_intact(folder: Path) -> Path:
    """The last checkpoint of a run folder (or itself one) that is whole. InputError where there is none."""
    found = [folder] if (folder / "trainer.json").is_file() else checkpoints(folder)
    for checkpoint in reversed(found):
        file = checkpoint / "trainer.json"
        try:
            with reading(file):
                state = read_json(file)
                for name in ("step", "tokens", "bad_steps"):
                    require(f"{file}: field {name!r}", state.get(name), int, 0, 10 ** 15)
                for name, size in state["files"].items():
                    if (checkpoint / name).stat().st_size != size:
                        raise ValueError(f"{checkpoint / name}: was cut")
            return checkpoint
        except InputError as e:
            print(f"warning: {checkpoint}: {rollout.escaped(e)}", file=sys.stderr)
    raise InputError(f"--resume {folder}: no whole checkpoint in there")


# ---- The log

@contextlib.contextmanager
def all_or_nothing(part: Path, what: str):
    """Where a folder can not be written whole, nothing of it stays. OSError says `what` it was."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"{what} could not be written: {e}") from None


def flush(file: Path):
    """What was written of a file is on the disk when this returns."""
    with open(file, "rb+") as f:
        os.fsync(f.fileno())


def write_text(file: Path, text: str):
    """Give a file this content, or leave it as it was: written beside, flushed, renamed. Links are kept."""
    file = Path(os.path.realpath(file))
    if file.exists() and not file.is_file():
        raise OSError(f"{file}: is not a regular file")
    part = file.with_name(f"{file.name}.{os.getpid()}.new")
    with open(part, "x", encoding="utf-8") as f:
        f.write(text)
    flush(part)
    part.replace(file)


def read_jsonl(file: Path) -> list[dict]:
    """The rows of a JSONL file of ours, without one that was cut off by a kill; [] where there is no file."""
    rows, text = [], file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    for line in text.split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return rows


def append_jsonl(file: Path, rows: list[dict]):
    with open(file, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def log_line(step: int, c: TrainConfig, m: dict) -> str:
    """One step in one line."""
    def known(name, digits):
        return "-" if m[name] is None else f"{m[name]:.{digits}f}"

    text = f"step {step}/{c.max_steps}  loss {m['loss']:.4f}"
    if "reward" in m:
        text += (f"  reward {m['reward']:.3f}  accuracy {m['accuracy']:.3f}  right/mixed/wrong "
                 f"{m['all_right']:.2f}/{m['mixed']:.2f}/{m['all_wrong']:.2f}  length {m['length']:.0f}  "
                 f"entropy {known('entropy', 3)}  kl {known('kl_old', 5)}")
    if "repaired" in m:
        text += (f"  suspects {m['suspects']}  repaired {m['repaired']}/{m['sources']} for "
                 f"{m['repair_tokens']} tokens")
    return f"{text}  |grad| {m['grad_norm']:.2f}  lr {m['lr']:.1e}  {m['seconds']:.1f} s"


def warnings_of(m: dict, first: dict) -> dict:
    """What looks wrong in a step's figures, by kind, with the likely cause. first: the first step's."""
    found = {}
    if m["finished"] < 0.5:
        found["cut off"] = "most rollouts are cut off: raise --max_new_tokens, or begin with --stage sft"
    elif m["format"] < 0.5 * first["format"]:
        found["format"] = "the form of answers is being lost: lower --lr or raise --format_weight"
    if m["entropy"] is not None and m["entropy"] < 0.005 and m["accuracy"] < 0.8:
        found["entropy"] = "the rollouts of a group have become the same: lower --lr, or try --beta 0.01"
    if m.get("sources") and not m["repaired"] and m["all_wrong"] == 1:
        found["repairs"] = "no repair succeeds while all groups are wrong: try another --reader or window"
    elif m["all_wrong"] == first["all_wrong"] == 1 and not m.get("repaired"):
        found["all wrong"] = "no rollout is right: too hard, or in a form that the reward does not read"
    return found


def telling_group(groups) -> list:
    """The group to show to people: one with a rectified trajectory, else one with right and wrong ones."""
    return max(groups, key=lambda group: any(t.source for t in group)
               + len({t.rewards["accuracy"] for t in group}))


def describe(group) -> str:
    """A rollout of a group, a line a step: its verdict where there is an oracle, its gap (!: suspect), its
    words; where one was repaired that one, and below a step what it became."""
    rectified = max(group, key=lambda t: t.source is not None)
    t = rectified.source or rectified
    became = [step.text for step in rectified.steps] if rectified.source else []
    lines = [f"question  {t.problem.question!r}", f"gold      {t.problem.answer!r}"]
    verdicts = shapes.verdicts(t) if t.problem.oracle and t.steps else []
    for n, step in enumerate(t.steps or ()):
        verdict = verdicts[n] if verdicts else ""
        gap = f"{t.checks[n].gap:.1f}{'!' * t.checks[n].is_suspect}" if t.checks else ""
        lines.append(f"step {n + 1:<4} {verdict:9}{gap:6}{step.text!r}")
        if became[n:] and became[n] != step.text:
            lines.append(f"{'rectified':25}{became[n]!r}")
    lines.append(f"sampled   {t.text[-200:]!r}")
    if rectified.source:
        lines.append(f"rectified {rectified.text[-200:]!r}  ({rectified.provenance})")
    lines.append(f"reward    {t.rewards}")
    return "\n".join(f"  {line}" for line in lines)


def group_record(step: int, group, repairs) -> dict:
    """Everything known of one group, as a row of groups.jsonl; experiments/trace.py makes a page of them."""
    number, rollouts, turns = {id(t): n for n, t in enumerate(group)}, [], []
    p = group[0].problem
    for t in group:
        steps = [(step.start, step.stop) for step in t.steps or ()]
        checks = [check.gap for check in t.checks or ()]
        rollouts.append({**vars(t), "problem": p.id, "prompt": None, "source": number.get(id(t.source)),
                         "steps": steps, "checks": checks})
    for r in repairs:
        if id(r.source) in number:
            turns.append({"source": number[id(r.source)], "trajectory": number.get(id(r.trajectory)),
                          "tokens": r.tokens, "outcome": r.outcome, "turns": r.turns})
    return {"step": step, "id": p.id, "question": p.question, "gold": p.answer, "rollouts": rollouts,
            "repairs": turns}


class Log:
    """The run folder and the terminal; rank 0 alone writes."""

    def __init__(self, t: Trainer):
        self.lead, self.out = t.rank == 0, Path(t.config.out)
        if not self.lead:
            return
        self.own(json.dumps(asdict(t.config), indent=1))
        for later in checkpoints(self.out):             # damaged, or this run continues an earlier one
            if int(later.name[11:]) > t.step:
                shutil.rmtree(self.out / f"abandoned-{later.name}", ignore_errors=True)
                later.rename(self.out / f"abandoned-{later.name}")
        for name in ("metrics.jsonl", "groups.jsonl"):  # rows later than the checkpoint go
            with reading(self.out / name):
                rows = [row for row in read_jsonl(self.out / name) if row["step"] <= t.step]
            write_text(self.out / name, "".join(json.dumps(row) + "\n" for row in rows))

    def own(self, config: str):
        """Take the folder: until the log goes or the process ends, no other run can. InputError: one has."""
        check_folder(self.out)
        self.out.mkdir(parents=True, exist_ok=True)
        if not (self.out / "config.json").exists():     # first of all, as it makes the folder a run's
            write_text(self.out / "config.json", config)
        self.lock = open(self.out / "run.lock", "a+")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.seek(0)
            raise InputError(f"--out {self.out}: is in use by {self.lock.read(99) or 'another'}") from None
        self.lock.truncate(0)
        print(f"process {os.getpid()} on {os.uname().nodename}", end="", file=self.lock, flush=True)
        write_text(self.out / "config.json", config)

    def say(self, text: str):
        if self.lead:
            tqdm.write(rollout.escaped(text, "\n"))

    def step(self, c: TrainConfig, m: dict, groups, repairs):
        """One step: its figures in a row and a line, now and then a group, and what looks wrong."""
        if not self.lead:
            return
        step, file = m["step"], self.out / "metrics.jsonl"
        append_jsonl(file, [m])
        self.say(log_line(step, c, m))
        if groups and c.show_every and (step == 1 or step % c.show_every == 0):
            group = telling_group(groups)
            self.say(describe(group))
            append_jsonl(self.out / "groups.jsonl", [group_record(step, group, repairs)])
        if groups and step % 10 == 1:
            for text in warnings_of(m, read_jsonl(file)[0]).values():
                self.say(f"warning: {text}")

    def held_out(self, figures: dict):
        """Held-out figures before and after, to the terminal and to heldout.json."""
        if figures["after"]:
            self.say(f"\n{figures['after']['table']}\n")
        for when, found in figures.items():
            if found:
                self.say(f"held-out {when + ':':7} {headline(found)}")
        if self.lead:
            write_text(self.out / "heldout.json", json.dumps(figures, indent=1))


# ---- The run

def counterpart(c: TrainConfig) -> str:
    """What the other algorithm gets in the main job, from stored runs of experiments/seeds.py; else ""."""
    file = Path(__file__).parent / "experiments" / "results" / "seeds.json"
    if (c.stage, c.model, c.data) != ("rl", "tiny", "tiny") or not file.is_file():
        return ""
    other, parts = "grpo" if c.algo == "ivr" else "ivr", []
    runs = [run["after"] for run in read_json(file)["runs"] if run["algo"] == other]
    for name in runs[0] if runs else ():
        if name == "greedy" or name.startswith("avg@"):
            parts.append(f"{name} {100 * sum(run[name]['mean'] for run in runs) / len(runs):.1f} %")
    if not parts:
        return ""
    return f"stored, --algo {other}: {', '.join(parts)}, {len(runs)} seeds (experiments/results/seeds.json)"


def train(t: Trainer) -> dict:
    """The whole run, from where the trainer is -> held-out figures {"before", "after"}, None where there are
    none. SystemExit where a signal stopped it, FloatingPointError where it diverged."""
    c = t.config
    c.out = all_gather([c.out or f"runs/{c.stage}-{time.strftime('%Y%m%d-%H%M%S')}"])[0]
    log, figures = Log(t), {"before": None, "after": None}
    log.say(f"{t.size:,} parameters on {t.world} x {t.device}; --lr {c.lr:g} --max_new_tokens "
            f"{c.max_new_tokens} (where not given: by model and data); run folder {c.out}\n{asdict(c)}")
    if t.step == 0:
        figures["before"] = t.evaluate()
        t.save()
    elif (log.out / "heldout.json").is_file():
        figures["before"] = read_json(log.out / "heldout.json").get("before")
    with reading(log.out / "heldout.json"):
        log.held_out(figures)
    with stop_signals() as asked:
        stopped = train_steps(t, log, asked)
    if not stopped:
        figures["after"] = t.evaluate()
        log.held_out(figures)
        if stored := counterpart(c):
            log.say(stored)
    leave()
    log.say(f"checkpoint {c.out}/checkpoint-{t.step:06d}, to continue: python train.py --resume {c.out}")
    if stopped:
        sys.exit(128 + stopped)
    return figures


def train_steps(t: Trainer, log: Log, asked: list) -> int:
    """Step after step until the training is done -> 0, or a signal in `asked` stops it -> its number."""
    c, stopped = t.config, 0
    bar = tqdm(total=c.max_steps, initial=t.step, desc=c.stage, disable=None if log.lead else True)
    while t.progress() < 1 and not stopped:
        started = time.time()
        metrics = t.sft_step() if c.stage == "sft" else t.rl_step()
        groups, repairs = metrics.pop("groups", None), metrics.pop("repairs", None)
        t.step += 1
        t.bad_steps = 0 if math.isfinite(metrics["grad_norm"]) else t.bad_steps + 1
        metrics = {"step": t.step, **metrics, "seconds": time.time() - started}
        if c.eval_every and t.step % c.eval_every == 0 and t.held_out:
            found = t.evaluate(short=True)
            log.say(f"held-out at {t.step}: {headline(found)}")
            metrics["heldout"] = {**found, "table": None, "problems": None}
        log.step(c, metrics, groups, repairs)
        if t.bad_steps:
            log.say(f"warning: step {t.step} was skipped, its gradient is not finite")
        if t.bad_steps >= c.max_bad_steps:
            raise FloatingPointError(f"{t.bad_steps} steps in a row without a finite gradient, see {c.out}")
        bar.update()
        stopped = int(max(all_gather(asked[-1:]), default=0))   # on any rank
        if t.progress() >= 1 or stopped or (c.save_every and t.step % c.save_every == 0):
            t.save()
    bar.close()
    return 0 if t.progress() >= 1 else stopped


def merge(c: TrainConfig):
    """--model as a plain folder. InputError where that exists."""
    if c.resume:
        raise InputError(f"--merge {c.merge}: merges --model, give the checkpoint there and no --resume")
    if os.path.lexists(c.merge):
        raise InputError(f"--merge {c.merge}: is there already; choose another")
    part = Path(f"{c.merge}.{os.getpid()}.new")
    model = load_model(c.model, "cpu", device_and_dtype("cpu", c.dtype)[1])
    with all_or_nothing(part, f"--merge {c.merge}:"):
        save_model(model, part, c.model)
        part.rename(c.merge)
    print(f"{c.merge}: the model, merged")


def start(argv=None, trainer_class=Trainer, defaults: dict | None = None):
    """Flags in, run out; bad input ends with one line. defaults: by flag; flags that are given win."""
    try:
        config, checkpoint = parse_flags(TrainConfig, argv, defaults), None
        if config.out and not config.check:
            check_folder(Path(config.out))
        has_run = config.out and read_jsonl(Path(config.out) / "metrics.jsonl")
        if has_run and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            config.resume = config.out                          # torchrun has started this process again
        if config.resume:
            checkpoint = last_intact(Path(config.resume))
            if config.out and Path(config.out).resolve() != checkpoint.parent.resolve():
                raise InputError(f"--out {config.out}: --resume {config.resume} goes on in its own folder")
            config = parse_flags(TrainConfig, argv, read_json(checkpoint.parent / "config.json"))
            config.out = str(checkpoint.parent)
        elif has_run:
            raise ValueError(f"--out {config.out}: holds a run already; --resume it, or choose another")
        if config.merge:
            return merge(config)
        if config.check:
            training_data(config, rollout.load_codec(config.model, config.max_pixels))
            return print(f"{config.data}: all rows are good")
        trainer = trainer_class(config, checkpoint)
    except (ValueError, OSError) as e:
        fail(e)
    try:
        train(trainer)
    except (FloatingPointError, InputError, OSError) as e:      # a full disk
        fail(e)


if __name__ == "__main__":
    start()

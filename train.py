"""Training: flags, the RL step, the supervised step, ranks, the optimiser, checkpoints, the log, the run.

    python train.py                                             # the embedded default: CPU, minutes
    torchrun --nproc_per_node 8 train.py --model Qwen/Qwen2.5-VL-3B-Instruct --data train.jsonl --lr 1e-6 ...

Takes: a checkpoint and problems. Gives: a run folder with checkpoints in the hub's format, metrics.jsonl,
groups.jsonl and held-out figures. One RL step is `rl_step`: rollout -> reward -> attribute -> rereason ->
grpo; the rest is plumbing. `Trainer.score` and `Trainer.verifier_class` are its two hooks.

The paper says what `rl_step` says and no more. We chose: one update a rollout batch, AdamW at a constant rate
after a short warm-up, fp32 master weights. Left out: FSDP, pipelines, asynchronous rollouts.

Data parallelism: rank r takes problems r, r + W, r + 2W, ... of the global batch, divides its loss by the
*global* normaliser, and gradients are summed in fp32 to the rank that owns a parameter's optimiser state
(ZeRO-1). Random numbers are keyed by problem and step (`rollout.uniforms`), so W ranks and one process
compute the same, and a resumed run equals an uninterrupted one.

Worked example: of a global batch of 4, rank 1 of 2 takes problems 1 and 3 in the first step, 5 and 7 in the
second. With G = 8 and L_max = 64 both ranks divide their loss by 4 * 8 * 64 = 2048. At lr 3e-5 with 5 warm-up
steps the first step's rate is 6e-6, the fifth's 3e-5.
"""
import argparse
import contextlib
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import attribute
import grpo
import rereason
import reward
import rollout
from eval import evaluate, headline, is_tiny, load_data, report, summarise
from model import load_model, save_model
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
    # how long
    max_steps: int = 80                 # rollout batches (rl) or optimiser steps (sft)
    max_tokens: int = 0                 # rl: end when so many tokens are generated, all kinds (0 = by steps)
    batch: int = 64                     # B: problems a step, over all ranks
    group_size: int = 8                 # G: completions a problem
    max_new_tokens: int = 64            # L_max: length limit of a completion
    max_prompt_tokens: int = 16384      # a longer prompt is an error
    max_pixels: int = 0                 # larger images are scaled down to this area (0 = the checkpoint's)
    updates_per_batch: int = 1          # optimiser steps on each rollout batch
    micro_rows: int = 256               # sequences a forward-backward pass
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
    relook: str = "image"               # image | text (no image) | none (restarts only) | only (no restarts)
    min_log_w: float = -1.5             # a rectified trajectory less likely than this a token is rejected
    lambda_r: float = 1.0               # weight of rectified trajectories
    gamma: float = 0.1                  # shape of their importance weight (0 = plain w)
    anneal: float = 0.4                 # the share of groups rectified falls to 0 over this last part
    # the optimiser
    lr: float = 3e-5                    # AdamW's learning rate after warm-up
    lr_end: float = 1.0                 # share of lr left at the last step (linear decay; 1 = constant)
    warmup_steps: int = 5               # linear warm-up
    beta2: float = 0.98                 # AdamW's second-moment decay
    weight_decay: float = 0.0           # on matrices only
    max_grad_norm: float = 1.0          # gradients are clipped to this norm
    freeze_vision: bool = False         # leave the vision tower as it is
    activation_checkpointing: bool = False      # compute activations again in the backward pass: less memory
    # supervised stage on tiny
    erosion_first: float = 0.0          # chance of a planted wrong reading at step 1 of a demonstration ...
    erosion_ninth: float = 0.0          # ... and from step 9 on (linear in between)
    # looking at it, keeping it
    eval_problems: int = 200            # held-out problems (0 = no evaluation)
    eval_samples: int = 4               # k of avg@k
    eval_every: int = 0                 # a short evaluation every so many steps too (0 = no)
    show_every: int = 10                # a group to terminal and groups.jsonl every so many steps (0 = never)
    save_every: int = 50                # checkpoint every so many steps, and at the end (0 = only then)
    keep: int = 2                       # checkpoints to keep
    max_bad_steps: int = 5              # end after so many steps in a row without a finite gradient
    seed: int = 0                       # data order and random numbers
    device: str = "auto"                # cpu, cuda (auto = cuda where there is one)
    dtype: str = "auto"                 # float32, bfloat16 (auto = bfloat16 on cuda, float32 on cpu)

    def validate(self, world: int):
        """ValueError names the flag that can not be."""
        at_least = {"max_steps": 1, "batch": 1, "group_size": 2 if self.stage == "rl" else 1, "max_new_tokens": 1,
                    "updates_per_batch": 1, "micro_rows": 1, "keep": 1, "max_bad_steps": 1, "eval_problems": 0,
                    "eval_samples": 0, "eval_every": 0, "show_every": 0, "save_every": 0, "max_pixels": 0}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least {least}")
        for name, known in (("stage", ("rl", "sft")), ("algo", ("ivr", "grpo")), ("relook", rereason.RELOOKS),
                            ("credit", ("token", "step", "rollout"))):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)}: must be one of {', '.join(known)}")
        if self.batch % (world * self.updates_per_batch):
            raise ValueError(f"--batch {self.batch}: must be a multiple of ranks x updates_per_batch = "
                             f"{world} x {self.updates_per_batch}")
        if not 0 <= self.anneal <= 1:
            raise ValueError(f"--anneal {self.anneal}: must be between 0 and 1")


def parse_flags(config_class, argv=None, defaults: dict | None = None):
    """A dataclass as a command line: every field a --flag, its comment the help text. Unknown flags exit
    with code 2. `defaults` replaces default values by field name (a saved configuration)."""
    comments = dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", inspect.getsource(config_class), re.M))
    parser = argparse.ArgumentParser(description=config_class.__doc__, allow_abbrev=False)
    for f in fields(config_class):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        help_text = f"{comments.get(f.name, '')} [{f.default}]".replace("%", "%%")
        default = (defaults or {}).get(f.name, f.default)
        parser.add_argument(f"--{f.name}", default=default, help=help_text, **kind)
    return config_class(**vars(parser.parse_args(argv)))


# ---- Data

def training_data(c: TrainConfig, codec) -> tuple:
    """Training data (an endless Stream or a list) and held-out problems, checked before anything is computed.
    DataError names all bad rows."""
    def check(problem):
        rollout.encode_prompt(problem, codec, c.max_prompt_tokens, pixels=False)
        if c.stage == "sft":
            demonstration(problem, c, codec)

    if is_tiny(c.data):
        data = shapes.Stream(c.data, "train", c.seed, run=c.batch)
        check(data[0])
    else:
        data = rollout.load_problems(c.data, c.image_dir, c.instruction, check, show=None if c.check else 20)
    held_out, name = [], c.eval_data or (c.data if is_tiny(c.data) else "")
    if name and c.eval_problems:
        held_out = load_data(name, "heldout", c.eval_problems, c.image_dir, c.instruction)
    for problem in held_out:
        rollout.encode_prompt(problem, codec, c.max_prompt_tokens, pixels=False)
    return data, held_out


def demonstration(problem, c: TrainConfig, codec) -> list[int]:
    """A problem's demonstration as completion tokens, EOS included; on tiny it is made here, eroded or not.
    DataError where it is missing, or too long (cut, it would teach to stop midway)."""
    where, text = f"{problem.where or problem.id}: field 'demonstration'", problem.demonstration
    if is_tiny(c.data):
        rng = random.Random(f"erosion/{c.seed}/{problem.id}")
        text = shapes.demonstrate(problem, (c.erosion_first, c.erosion_ninth), rng)
    if not isinstance(text, str):
        raise rollout.DataError(f"{where} is missing or not text, --stage sft needs it")
    ids = rollout.token_ids(text, codec) + [codec.eos_ids[0]]
    if len(ids) > c.max_new_tokens:
        raise rollout.DataError(f"{where} has {len(ids)} tokens, --max_new_tokens is {c.max_new_tokens}")
    return ids


# ---- Ranks

def device_and_dtype(device: str, dtype: str):
    """Resolve "auto": cuda and bfloat16 where there is a GPU, else cpu and float32. ValueError for others."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "auto" and device.partition(":")[0] not in ("cpu", found):
        raise ValueError(f"--device {device}: there is no such device here, only {found}")
    device = torch.device(found if device == "auto" else device)
    dtypes = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32, "float32": torch.float32,
              "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise ValueError(f"--dtype {dtype}: must be one of {', '.join(dtypes)}")
    return device, dtypes[dtype]


def init_distributed(device: torch.device) -> tuple[int, int, torch.device]:
    """Join torchrun's process group, if there is one (gloo on CPU, nccl on CUDA) -> rank, world size,
    device."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def all_sum(values: list[float]) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def all_gather(rows: list) -> list:
    """The rows of all ranks, on every rank."""
    if not dist.is_initialized():
        return rows
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return sum(parts, [])


def leave():
    """The end: no rank leaves while another still talks."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def stop_signals():
    """Ctrl-C and SIGTERM are noted in the list given, so that the run ends after its step, with a
    checkpoint."""
    asked = []

    def note(number, frame):
        asked.append(number)
        signal.signal(number, signal.default_int_handler)       # a second time ends it at once

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, note), signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


# ---- The optimiser

class Optimizer:
    """AdamW with fp32 master weights, its state sharded over ranks (ZeRO-1): each parameter has one owner,
    which alone holds its master weight and moments. Gradients are summed in fp32, reduced to the owner,
    clipped by their global norm; the owner updates the parameter and broadcasts it. Source: Rajbhandari et
    al. (arXiv 1910.02054)."""

    def __init__(self, model, c: TrainConfig, rank: int, world: int):
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.world, self.max_grad_norm = world, c.max_grad_norm
        self.owner, load = {}, [0] * world
        for name in sorted(self.params, key=lambda name: -self.params[name].numel()):
            self.owner[name] = load.index(min(load))        # largest first, to the rank that holds least
            load[self.owner[name]] += self.params[name].numel()
        self.masters, matrices, vectors = {}, [], []
        for name, p in self.params.items():
            if self.owner[name] == rank:
                master = self.masters[name] = p.detach().float().clone().requires_grad_()
                (matrices if p.dim() > 1 else vectors).append(master)
        self.adamw = torch.optim.AdamW([{"params": matrices, "weight_decay": c.weight_decay},
                                        {"params": vectors, "weight_decay": 0.0}],
                                       lr=c.lr, betas=(0.9, c.beta2))
        self.grads = {}                                         # fp32 sums over the micro-batches of a step

    def accumulate(self):
        """After each backward pass."""
        for name, p in self.params.items():
            if p.grad is not None:
                self.grads[name] = self.grads[name].add_(p.grad) if name in self.grads else p.grad.float()
                p.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """One update. Returns the gradient norm before clipping; if it is not finite, nothing is updated."""
        squares = 0.0
        for name, p in self.params.items():                     # all ranks in the same order
            grad = self.grads.pop(name, None)
            if grad is None:
                grad = torch.zeros_like(p, dtype=torch.float32)
            if self.world > 1:
                dist.reduce(grad, self.owner[name])
            if name in self.masters:
                self.masters[name].grad = grad
                squares += grad.norm().item() ** 2
        norm = math.sqrt(all_sum([squares])[0])
        if math.isfinite(norm):
            for group in self.adamw.param_groups:
                group["lr"] = lr
            for master in self.masters.values():
                master.grad.mul_(min(1.0, self.max_grad_norm / (norm + 1e-6)))
            self.adamw.step()
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
        """This rank's share of the state of all ranks, however many they were. ValueError where a parameter
        has none (it was frozen then)."""
        state = {}
        for file in files:
            state |= load_file(file)                            # mapped into memory, not read yet
        for name, master in self.masters.items():
            if f"{name}/master" not in state:
                raise ValueError(f"--resume: the checkpoint has no state of {name}: was it frozen?")
            master.data.copy_(state[f"{name}/master"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{name}/{key}" in state:                    # not before the first update
                    value = state[f"{name}/{key}"].clone()
                    self.adamw.state[master][key] = value if key == "step" else value.to(master.device)


def learning_rate(c: TrainConfig, step: int, progress: float) -> float:
    """Linear warm-up, then linear decay to lr_end * lr. progress: share of the training that is done."""
    return c.lr * min(1.0, (step + 1) / max(1, c.warmup_steps)) * (1 - (1 - c.lr_end) * progress)


# ---- The step

class Trainer:
    """The policy and what its updates need."""
    verifier_class = attribute.Verifier                         # what finds the step at fault

    def __init__(self, config: TrainConfig, checkpoint: Path | None = None):
        c = self.config = config
        device, dtype = device_and_dtype(c.device, c.dtype)
        self.rank, self.world, self.device = init_distributed(device)
        c.validate(self.world)
        self.codec = rollout.load_codec(c.model, c.max_pixels)
        self.data, self.held_out = training_data(c, self.codec)
        self.model = load_model(checkpoint or c.model, self.device, dtype)
        self.model.activation_checkpointing = c.activation_checkpointing
        self.model.visual.requires_grad_(not c.freeze_vision)
        self.reference = load_model(c.model, self.device, dtype).eval() if c.beta > 0 else None
        self.optimizer = Optimizer(self.model, c, self.rank, self.world)
        self.step = self.tokens = self.bad_steps = 0            # tokens: generated so far, over all ranks
        if checkpoint:
            state = json.loads((checkpoint / "trainer.json").read_text())
            self.step, self.tokens, self.bad_steps = state["step"], state["tokens"], state["bad_steps"]
            self.optimizer.load(sorted(checkpoint.glob("optimizer-*.safetensors")))

    def progress(self) -> float:
        """Share of the training that is done."""
        c = self.config
        return self.tokens / c.max_tokens if c.max_tokens else self.step / c.max_steps

    def next_batch(self) -> tuple[list, list[str]]:
        """This rank's problems of the step, every W-th of the global batch, and the keys that name their
        random numbers. A file is shuffled again each epoch."""
        c, problems, keys = self.config, [], []
        for place in range(self.rank, c.batch, self.world):
            i = self.step * c.batch + place
            if isinstance(self.data, list):
                epoch, i = divmod(i, len(self.data))
                rng = torch.Generator().manual_seed(c.seed + 7919 * epoch)
                i = torch.randperm(len(self.data), generator=rng)[i]
            problems.append(self.data[i])
            keys.append(f"{c.seed}/{self.step}/{place}")
        return problems, keys

    def rl_step(self) -> dict:
        """rollout -> reward -> attribute -> rereason -> grpo: one batch of problems, from prompts to an
        update."""
        c, model, codec, progress = self.config, self.model, self.codec, self.progress()
        problems, keys = self.next_batch()

        # rollout: G completions a problem, at temperature 1, so the stored log-probs are the policy's own
        model.eval()
        rollout_keys = [f"train/{key}" for key in keys]
        groups = rollout.sample(model, problems, codec, c.group_size, c.max_new_tokens, keys=rollout_keys)

        # reward: rules only, no model
        for group in groups:
            for t in group:
                t.rewards = self.score(t)
        metrics, repairs = self.rollout_metrics(groups), []

        if c.algo == "ivr":
            # attribute: split rollouts into steps; in failed ones, find the step that lost the image
            hard = rereason.select_groups(groups, keys, c, progress)
            verifier = self.verifier_class(model, codec)
            attribute.attribute(groups, hard, verifier, codec, c.credit)

            # rereason: look at the image again, rewrite that step, continue, verify; successes join the group
            groups, repairs = rereason.rectify_groups(model, codec, groups, hard, keys, verifier, c,
                                                      self.score)
            metrics |= self.repair_metrics(repairs, verifier)

        # grpo: advantages within each group, credit to the tokens at fault, the clipped objective
        grpo.assign_advantages(groups, c.use_std)
        if c.algo == "ivr":
            grpo.assign_credit(groups, c.credit)
        metrics |= self.update(groups, learning_rate(c, self.step, progress))
        return {**metrics, "generated_tokens": self.tokens, "groups": groups, "repairs": repairs}

    def score(self, t) -> dict:
        """The reward of a trajectory, by part; "total" is what is maximised."""
        p = t.problem
        return reward.reward_parts(t.text, p.answer, p.choices, t.finished, self.config.format_weight)

    def update(self, groups, lr: float) -> dict:
        """`updates_per_batch` optimiser steps, each on its share of the groups."""
        c, sums, norms = self.config, {}, []
        self.model.train()
        share = c.batch // c.updates_per_batch                  # problems an update, over all ranks
        normaliser = share * c.group_size * c.max_new_tokens
        for u in range(c.updates_per_batch):
            rows = []
            for n, group in enumerate(groups):
                if (n * self.world + self.rank) // share == u:
                    rows += [t for t in group if grpo.has_gradient(t, c.beta)]
            for start in range(0, len(rows), c.micro_rows):
                for name, value in self.backward(rows[start:start + c.micro_rows], normaliser).items():
                    sums[name] = sums.get(name, 0.0) + value
            norms.append(self.optimizer.step(lr))
        names = ("loss", "tokens", "entropy", "clip_fraction", "kl_ref", "kl_old", "ratio")
        totals = dict(zip(names, all_sum([sums.get(name, 0.0) for name in names])))
        metrics = {"loss": totals["loss"] / c.updates_per_batch}
        for name in names[2:]:                                  # means over the policy's own tokens
            metrics[name] = totals[name] / totals["tokens"] if totals["tokens"] else None
        return {**metrics, "grad_norm": sum(norms) / len(norms), "lr": lr}

    def backward(self, rows: list, normaliser: float) -> dict:
        """Loss and gradients of one micro-batch of trajectories."""
        c, inputs = self.config, (self.codec, [t.prompt for t in rows], [t.ids for t in rows])
        logps, entropy, _ = rollout.completion_logps(self.model, *inputs, entropy=True)         # (R, T)
        ref_logps = None
        if self.reference:
            with torch.no_grad():
                ref_logps, _, _ = rollout.completion_logps(self.reference, *inputs)
        batch = grpo.collate(rows, self.device)
        loss, stats = grpo.policy_loss(logps, batch["old_logps"], batch["advantages"], batch["weights"],
                                       normaliser, c.clip_low, c.clip_high, c.dual_clip, c.beta, ref_logps,
                                       batch["rectified"], c.lambda_r, c.gamma)
        loss.backward()
        self.optimizer.accumulate()
        on_policy = (batch["weights"] > 0) & ~batch["rectified"]
        stats |= {"loss": loss, "entropy": (entropy * on_policy).sum()}
        return {name: value.item() for name, value in stats.items()}

    def sft_step(self) -> dict:
        """Imitate demonstrations: cross-entropy, the mean over the tokens of the global batch."""
        c, lr = self.config, learning_rate(self.config, self.step, self.progress())
        problems, _ = self.next_batch()
        prompts = [rollout.encode_prompt(p, self.codec) for p in problems]
        completions = [demonstration(p, c, self.codec) for p in problems]
        total = all_sum([sum(map(len, completions))])[0]
        self.model.train()
        loss_sum = likely = 0.0
        for start in range(0, len(problems), c.micro_rows):
            part = slice(start, start + c.micro_rows)
            inputs = self.codec, prompts[part], completions[part]
            logps, _, mask = rollout.completion_logps(self.model, *inputs)
            loss = -logps.sum() / total
            loss.backward()
            self.optimizer.accumulate()
            loss_sum += loss.item()
            likely += ((logps.exp() > 0.5) & mask).sum().item()
        norm = self.optimizer.step(lr)
        loss, likely = all_sum([loss_sum, likely / total])
        self.tokens += int(total)
        return {"loss": loss, "likely_tokens": likely, "grad_norm": norm, "lr": lr}

    # ---- figures

    def rollout_metrics(self, groups) -> dict:
        """What a step's rollouts were like, over all ranks; their tokens are counted here."""
        rows = []
        for group in groups:
            for t in group:
                scores = [t.rewards[name] for name in ("total", "accuracy", "format")]
                rows.append([*scores, len(t.ids), t.finished])
        table = torch.tensor(all_gather(rows), dtype=torch.float64)                             # (B * G, 5)
        names, tokens = ("reward", "accuracy", "format", "length", "finished"), int(table[:, 3].sum())
        self.tokens += tokens
        shares = grpo.group_shares(table[:, 1].view(-1, self.config.group_size))
        return {**dict(zip(names, table.mean(0).tolist())), **shares, "rollout_tokens": tokens}

    def repair_metrics(self, repairs, verifier) -> dict:
        """What the Re-Reasoning Loop did, over all ranks; its tokens are counted here."""
        done, revisions, tokens = 0, 0, verifier.tokens
        for r in repairs:
            done += r.outcome == "repaired"
            revisions += r.num_revisions
            tokens += r.tokens
        names = ("sources", "repaired", "revisions", "repair_tokens", "check_tokens")
        found = all_sum([len(repairs), done, revisions, tokens, verifier.tokens])
        metrics = {name: int(value) for name, value in zip(names, found)}
        self.tokens += metrics["repair_tokens"]
        return metrics

    def evaluate(self, short: bool = False) -> dict | None:
        """Held-out figures of the policy as it is; None where there is nothing to evaluate on. short: one
        sample of each of the first half of the problems, nothing greedy."""
        c, problems = self.config, self.held_out
        if not problems:
            return None
        problems = problems[:(len(problems) + 1) // 2] if short else problems
        self.model.eval()
        records = []
        for samples in (1,) if short else (0, c.eval_samples):
            records += evaluate(self.model, self.codec, problems[self.rank::self.world], samples,
                                c.max_new_tokens, c.seed, progress=self.rank == 0 and not short)
        records = all_gather(records)
        return {**summarise(records), "table": report(records)}

    # ---- checkpoints

    def save(self):
        """out/checkpoint-<step>: the model in the hub's format, each rank's optimiser state, the step.
        Written beside, flushed and renamed, so that it is complete or absent; the oldest beyond `keep` are
        removed. OSError where the disk is full: what was saved before is untouched. (All ranks write to one
        file system.)"""
        c, out = self.config, Path(self.config.out)
        target, part = out / f"checkpoint-{self.step:06d}", out / "unfinished-checkpoint"
        try:
            if self.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
                save_model(self.model, part, c.model)
                state = {"step": self.step, "tokens": self.tokens, "bad_steps": self.bad_steps}
                (part / "trainer.json").write_text(json.dumps(state))
            all_gather([])                                      # the folder is there
            name = f"optimizer-{self.rank + 1:05d}-of-{self.world:05d}.safetensors"
            save_file(self.optimizer.state(), part / name)
            all_gather([])                                      # all ranks have written
            for file in part.iterdir() if self.rank == 0 else ():
                with open(file, "rb+") as f:
                    os.fsync(f.fileno())
        except (OSError, SafetensorError) as e:
            shutil.rmtree(part, ignore_errors=True)
            raise OSError(f"{target}: the checkpoint could not be written: {e}") from None
        if self.rank == 0:
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)
            others = [old for old in sorted(out.glob("checkpoint-*")) if old != target]
            for old in others[:max(0, len(others) - c.keep + 1)]:
                shutil.rmtree(old)


def last_intact(folder: Path) -> Path:
    """The last checkpoint of a run folder (or `folder` itself, a checkpoint) whose files can be opened; the
    later ones are named. ValueError where there is none."""
    found = [folder] if (folder / "trainer.json").is_file() else sorted(folder.glob("checkpoint-*"))
    for checkpoint in reversed(found):
        try:
            json.loads((checkpoint / "trainer.json").read_text())
            files = list(checkpoint.glob("*.safetensors"))
            world = int(max(checkpoint.glob("optimizer-*")).stem.rpartition("-")[2])
            if len(list(checkpoint.glob("optimizer-*"))) != world:
                raise ValueError("the state of a rank is missing")
            for file in files:
                with safe_open(file, "pt"):                     # a file that was cut does not open
                    pass
            return checkpoint
        except (OSError, ValueError, SafetensorError) as e:
            print(f"warning: {checkpoint}: {e}", file=sys.stderr)
    raise ValueError(f"--resume {folder}: no whole checkpoint in there")


# ---- The log

def write_text(file: Path, text: str):
    """Give a file this content, or leave it as it was: written beside, flushed, renamed."""
    part = file.with_name(file.name + ".new")
    with open(part, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    part.replace(file)


def read_jsonl(file: Path) -> list[dict]:
    """The rows of a JSONL file of ours, without one that was cut off by a kill; [] where there is no file."""
    rows = []
    for line in file.read_text(encoding="utf-8").split("\n") if file.is_file() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def append_jsonl(file: Path, rows: list[dict]):
    with open(file, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def log_line(step: int, c: TrainConfig, m: dict) -> str:
    """One step in one line."""
    def known(name, digits):
        return "-" if m[name] is None else f"{m[name]:.{digits}f}"

    if c.stage == "sft":
        text = f"loss {m['loss']:.3f}  likely tokens {m['likely_tokens']:.3f}"
    else:
        text = (f"loss {m['loss']:+.4f}  reward {m['reward']:.3f}  accuracy {m['accuracy']:.3f}  "
                f"right/mixed/wrong {m['all_right']:.2f}/{m['mixed']:.2f}/{m['all_wrong']:.2f}  "
                f"length {m['length']:.0f}  entropy {known('entropy', 3)}  kl {known('kl_old', 5)}")
    if "repaired" in m:
        text += f"  repaired {m['repaired']}/{m['sources']} for {m['repair_tokens']} tokens"
    return (f"step {step}/{c.max_steps}  {text}  |grad| {m['grad_norm']:.2f}  lr {m['lr']:.1e}  "
            f"{m['seconds']:.1f} s")


def warnings_of(m: dict, first: dict) -> dict:
    """What looks wrong in a step's figures, by kind, with the likely cause. first: those of the first
    step."""
    found = {}
    if m["finished"] < 0.5:
        found["cut off"] = (f"only {100 * m['finished']:.0f} % of the rollouts end by themselves, the others "
                            "earn nothing: raise --max_new_tokens, or teach shorter answers first (--stage sft)")
    elif m["format"] < 0.5 * first["format"]:
        found["format"] = (f"the form of answers is being lost ({100 * first['format']:.0f} % -> "
                           f"{100 * m['format']:.0f} %): lower --lr or raise --format_weight")
    if m["entropy"] is not None and m["entropy"] < 0.005 and m["accuracy"] < 0.8:
        found["entropy"] = (f"entropy fell to {m['entropy']:.4f} with {100 * m['accuracy']:.0f} % right: the "
                            "rollouts of a group are the same; lower --lr, or try --beta 0.01")
    if m["all_wrong"] == first["all_wrong"] == 1:
        found["all wrong"] = ("no rollout is right: problems too hard, or answers in a form the reward does "
                              "not read (see the printed samples)")
    return found


def telling_group(groups) -> list:
    """The group to show to people: one with a rectified trajectory, else one with right and wrong ones."""
    def rank(group):
        return any(t.source for t in group), len({t.rewards["accuracy"] for t in group})

    return max(groups, key=rank)


def describe(group) -> str:
    """A decoded rollout of a group; where one was repaired, that one with its checks and what it became."""
    rectified = max(group, key=lambda t: t.source is not None)
    t, right = rectified.source or rectified, sum(t.rewards["accuracy"] for t in group)
    lines = [f"  question  {t.problem.question!r}", f"  gold      {t.problem.answer!r}",
             f"  sampled   {t.text!r}"]
    if t.problem.oracle:
        thoughts = t.text.partition("<think>")[2].partition("</think>")[0]
        lines.append(f"  steps     {' '.join(shapes.check_steps(t.problem, thoughts.splitlines()))}")
    if rectified.source:
        checks = [f"{check.prob:.2f}" if check else "?" for check in t.checks]
        lines.append(f"  checks    {' '.join(checks)}")
        lines.append(f"  rectified {rectified.text!r}  ({rectified.provenance})")
    return "\n".join([*lines, f"  reward    {t.rewards}, right in the group: {right:.0f} of {len(group)}"])


def group_record(step: int, group, repairs) -> dict:
    """Everything known of one group, as a row of groups.jsonl; experiments/trace.py makes a page of them."""
    number, rollouts, turns = {id(t): n for n, t in enumerate(group)}, [], []
    for t in group:
        row = {**vars(t), "source": number.get(id(t.source)), "problem": t.problem.id, "prompt": None,
               "steps": [(step.start, step.stop) for step in t.steps or ()],
               "checks": [check and check.prob for check in t.checks or ()]}
        rollouts.append(row)
    for r in repairs:
        if id(r.source) in number:
            turns.append({"source": number[id(r.source)], "trajectory": number.get(id(r.trajectory)),
                          "tokens": r.tokens, "outcome": r.outcome, "turns": r.turns})
    problem = group[0].problem
    return {"step": step, "id": problem.id, "question": problem.question, "gold": problem.answer,
            "rollouts": rollouts, "repairs": turns}


class Log:
    """The run folder's metrics.jsonl and groups.jsonl and the terminal; silent but on rank 0."""

    def __init__(self, t: Trainer):
        self.config, self.lead, self.warned = t.config, t.rank == 0, {}
        self.out = Path(t.config.out)
        if not self.lead:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        write_text(self.out / "config.json", json.dumps(asdict(self.config), indent=1))
        for later in self.out.glob("checkpoint-*"):     # damaged, or this run continues an earlier one
            if int(later.name[11:]) > t.step:
                shutil.rmtree(self.out / f"abandoned-{later.name}", ignore_errors=True)
                later.rename(self.out / f"abandoned-{later.name}")
        for name in ("metrics.jsonl", "groups.jsonl"):          # rows later than the checkpoint go
            rows = [json.dumps(row) + "\n" for row in read_jsonl(self.out / name) if row["step"] <= t.step]
            write_text(self.out / name, "".join(rows))

    def say(self, text: str):
        if self.lead:
            tqdm.write(text)

    def step(self, m: dict, groups, repairs):
        """One step: its figures in a row and a line, now and then a group, and what looks wrong."""
        if not self.lead:
            return
        c, step = self.config, m["step"]
        append_jsonl(self.out / "metrics.jsonl", [m])
        self.say(log_line(step, c, m))
        if groups is None:
            return
        if c.show_every and (step == 1 or step % c.show_every == 0):
            group = telling_group(groups)
            self.say(describe(group))
            append_jsonl(self.out / "groups.jsonl", [group_record(step, group, repairs)])
        for kind, text in warnings_of(m, read_jsonl(self.out / "metrics.jsonl")[0]).items():
            if step - self.warned.get(kind, -20) >= 20:
                self.warned[kind] = step
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

def train(t: Trainer) -> dict:
    """The whole run, from where the trainer is. Returns the held-out figures {"before", "after"}, None where
    there are none. SystemExit where a signal stopped it, FloatingPointError where it diverged."""
    c = t.config
    c.out = all_gather([c.out or f"runs/{c.stage}-{time.strftime('%Y%m%d-%H%M%S')}"])[0]
    log, figures = Log(t), {"before": None, "after": None}
    log.say(json.dumps(asdict(c)))
    size = sum(p.numel() for p in t.model.parameters())
    log.say(f"{size:,} parameters on {t.world} x {t.device}, run folder {c.out}")
    if t.step == 0:
        figures["before"] = t.evaluate()
        t.save()
    elif (log.out / "heldout.json").is_file():
        figures["before"] = json.loads((log.out / "heldout.json").read_text())["before"]
    log.held_out(figures)
    with stop_signals() as asked:
        stopped = train_steps(t, log, asked)
    if not stopped:
        figures["after"] = t.evaluate()
        log.held_out(figures)
    log.say(f"checkpoint {log.out / f'checkpoint-{t.step:06d}'}")
    leave()
    if stopped:
        log.say(f"stopped after step {t.step}; continue with: python train.py --resume {c.out}")
        sys.exit(128 + stopped)
    return figures


def train_steps(t: Trainer, log: Log, asked: list) -> int:
    """Step after step, logged, until the training is done (0 is returned) or a signal in `asked` stops it
    (its number is)."""
    c, stopped = t.config, 0
    bar = tqdm(total=c.max_steps, initial=t.step, desc=c.stage, disable=None if t.rank == 0 else True)
    while t.progress() < 1 and not stopped:
        started = time.time()
        metrics = t.sft_step() if c.stage == "sft" else t.rl_step()
        groups, repairs = metrics.pop("groups", None), metrics.pop("repairs", None)
        t.step += 1
        t.bad_steps = 0 if math.isfinite(metrics["grad_norm"]) else t.bad_steps + 1
        metrics = {"step": t.step, **metrics, "seconds": time.time() - started}
        found = t.evaluate(short=True) if c.eval_every and t.step % c.eval_every == 0 else None
        if found:
            log.say(f"held-out at {t.step}: {headline(found)}")
            metrics["heldout"] = {name: value for name, value in found.items() if name != "table"}
        log.step(metrics, groups, repairs)
        if t.bad_steps:
            log.say(f"warning: step {t.step} was skipped, its gradient is not finite")
        if t.bad_steps >= c.max_bad_steps:
            raise FloatingPointError(f"{t.bad_steps} steps in a row without a finite gradient (--max_bad_steps); "
                                     f"the checkpoints in {c.out} are untouched")
        bar.update()
        stopped = int(max(all_gather(asked[-1:]), default=0))
        if t.progress() >= 1 or stopped or (c.save_every and t.step % c.save_every == 0):
            t.save()
    bar.close()
    return 0 if t.progress() >= 1 else stopped


def start(argv=None, trainer_class=Trainer, defaults: dict | None = None):
    """Flags in, run out; bad input ends with one line. defaults: of an algorithm, by flag; flags that are
    given win."""
    try:
        config, checkpoint = parse_flags(TrainConfig, argv, defaults), None
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0      # by torchrun
        if restarted and config.out and list(Path(config.out).glob("checkpoint-*")):
            config.resume = config.out
        if config.resume:
            checkpoint = last_intact(Path(config.resume))
            saved = json.loads((checkpoint.parent / "config.json").read_text())
            config = parse_flags(TrainConfig, argv, {**(defaults or {}), **saved})
            config.out = str(checkpoint.parent)
        elif config.out and not restarted and read_jsonl(Path(config.out) / "metrics.jsonl"):
            raise ValueError(f"--out {config.out}: holds a run already; --resume it, or choose another")
        if config.check:
            training_data(config, rollout.load_codec(config.model, config.max_pixels))
            return print(f"{config.data}: all rows are good")
        trainer = trainer_class(config, checkpoint)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    try:
        train(trainer)
    except (FloatingPointError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    start()

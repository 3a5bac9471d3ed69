"""Training: configuration, supervised warm start, the loop in phases, the run from start to end.

    python train.py                                                       # the embedded default, CPU, minutes
    torchrun --nproc_per_node 8 train.py --model Qwen/Qwen2.5-VL-3B-Instruct --data train.jsonl --lr 1e-6 ...

Place in the pipeline: all of it; nothing that it reads from imports it. One step reads
    problems -> rollout -> reward -> localise -> re-reason -> advantages -> policy update
The paper says: failed rollouts are screened by reward, the step that lost the image is found, a Re-Reasoning
Loop repairs the trajectory, and GRPO learns from it. We chose: one update a rollout batch by default, AdamW
at a constant rate after a short warm-up, fp32 master weights where the model is bfloat16.

Data parallelism is one line of arithmetic: each rank takes every W-th problem of the global batch, divides
its loss by the *global* normaliser, and gradients are summed over ranks, in fp32, once an optimiser step, to
the rank that keeps the optimiser state of a parameter (ZeRO-1).
Random numbers belong to problems (`rollout.uniforms`), not to processes. So W ranks and one process do the
same, and a resumed run does the same as an uninterrupted one (with --balance queue up to rounding).

Worked example: of a global batch of 4, rank 1 of 2 draws problems 1 and 3 in the first step, 5 and 7 in the
second. With G = 8 and L_max = 64 both ranks divide by 4 x 8 x 64 = 2048. At lr 3e-5 with 5 warm-up steps the
first step's rate is 6e-6, the fifth's 3e-5.
"""
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import attribute
import grpo
import rereason
import reward
import rollout
from benchmarks.figures import headline, of_repairs, of_rollouts, outcome, report, summarise
from data import reading
from data.codec import load_codec
from data.checking import check_data
from data.loading import demonstration, training_data
from eval import evaluate
from model import load_model, save_model
from runtime.balance import Queue, exchange, work
from runtime.files import intact, rewrite, write_checkpoint
from runtime.flags import parse_flags
from runtime.optimizer import Optimizer, learning_rate
from runtime.process import Stop, device_and_dtype, start_ranks
from tiny import shapes
from viewer.card import card
from viewer.explain import explain
from viewer.log import Log
from viewer.report import check_report


@dataclass
class TrainConfig:
    """Flags of `python train.py`."""
    # what
    stage: str = "rl"                   # rl: learn from rewards; sft: imitate demonstrations
    algo: str = "ivr"                   # ivr | grpo | stepgrpo (R1-VL's; implies --use_std --beta 0.04)
    model: str = "tiny"                 # folder or hub id of the checkpoint to start from
    data: str = "tiny"            # JSONL file, or "tiny" (drawn afresh), e.g. "tiny:steps=5,kinds=tiles+path"
    eval_data: str = ""      # JSONL file or tiny spec ("" = held-out split of the same spec; none for a file)
    image_dir: str = ""                # folder that image paths are relative to ("" = the folder of the file)
    outside_images: bool = False        # images may lie outside that folder
    instruction: str = reading.INSTRUCTION  # text appended to each question of a JSONL file (may be empty)
    out: str = ""                       # run folder ("" = runs/<stage>-<time>)
    resume: str = ""                    # run folder or checkpoint to go on from, with its saved flags
    check: bool = False                 # only read --data: open images, count tokens, name all bad rows
    explain: bool = False               # only one step, of which one group is told from problem to update
    # how long
    max_steps: int = 80                 # rollout batches (rl) or optimiser steps (sft)
    max_tokens: int = 0                 # rl: end when so many tokens are generated, all kinds (0 = by steps)
    batch: int = 64                     # B: problems a step, over all ranks
    group_size: int = 8                 # G: completions a problem (rl)
    max_new_tokens: int = 64            # L_max: length limit of a completion
    max_prompt_tokens: int = 16384      # a longer prompt is an error
    max_pixels: int = 0                 # larger images are scaled down to this area (0 = the checkpoint's)
    updates_per_batch: int = 1          # optimiser steps on each rollout batch (rl)
    micro_rows: int = 256               # sequences a forward-backward pass
    # the objective
    use_std: bool = False               # divide advantages by the group's standard deviation
    clip_low: float = 0.2               # the ratio is clipped to 1 - clip_low ...
    clip_high: float = 0.28             # ... and 1 + clip_high
    dual_clip: float = 3.0              # bound on the loss of tokens with a negative advantage
    beta: float = 0.0              # weight of the KL to the starting model (a frozen copy exists only if > 0)
    format_weight: float = 0.1          # share of the reward that is for form
    # IVR-R1
    localiser: str = "check"            # check | margin | dependence | monte_carlo | random | oracle (tiny)
    credit: str = "token"               # what of a wrong rollout pays: token (at fault) | step | rollout
    rectify_below: float = 0.125        # groups up to this accuracy are rectified (< 0: none)
    parents: int = 1                    # failed rollouts repaired in an all-wrong group (1 in a mixed one)
    relook: str = "image"            # image | text (without the image) | none (restarts) | only (no restarts)
    failures: int = 3                   # failed looks until a chain is made anew and then given up
    min_log_w: float = -1.5             # a rectified trajectory less likely than this a token is refused
    lambda_r: float = 1.0               # weight of rectified trajectories
    anneal: float = 0.4     # the share of groups that are repaired falls to 0 over this last part of training
    gamma: float = 0.1                  # shape of their importance weight (0 = plain w)
    mask_prefix: bool = False           # no credit for the part of a rectified trajectory that was kept
    # the optimiser
    lr: float = 3e-5                    # AdamW's learning rate after warm-up
    lr_end: float = 1.0                 # share of lr left at the last step (linear decay; 1 = constant)
    warmup_steps: int = 5               # linear warm-up
    beta2: float = 0.98                 # AdamW's second-moment decay
    weight_decay: float = 0.0           # on matrices only
    max_grad_norm: float = 1.0          # gradients are clipped to this norm
    freeze_vision: bool = False         # leave the vision tower as it is
    remat: bool = False                 # recompute activations in the backward pass: less memory, more time
    graphs: bool = False                # sample through CUDA graphs (not yet tried on a GPU)
    shard: str = "optimizer"            # spread over ranks: optimizer (its state, ZeRO-1) | all (FSDP2)
    balance: str = "tokens"    # groups go to ranks: by tokens | queue (to who is free; not equal to the bit)
    # supervised stage on tiny
    erosion_first: float = 0.0          # chance of a planted wrong reading at step 1 of a demonstration ...
    erosion_ninth: float = 0.0          # ... and from step 9 on (linear in between)
    # looking at it
    eval_problems: int = 200            # held-out problems (0 = no evaluation)
    eval_samples: int = 4               # k of avg@k
    eval_every: int = 0                 # a short evaluation every so many steps too (0 = no)
    print_every: int = 20               # show a decoded sample every so many steps (0 = never)
    report_to: str = "none"             # tensorboard, wandb (or both: tensorboard+wandb), where installed
    trace_every: int = 10           # write trace.html, with one more group, every so many steps (0 = never)
    save_every: int = 50                # checkpoint every so many steps, and at the end (0 = only then)
    keep: int = 2                       # checkpoints to keep
    max_bad_steps: int = 5              # end after so many steps in a row without a finite gradient
    seed: int = 0                       # data order and random numbers
    device: str = "auto"                # cpu, cuda (auto = cuda where there is one)
    dtype: str = "auto"                 # float32, bfloat16 (auto = bfloat16 on cuda, float32 on cpu)

    def validate(self, ranks: int):
        """ValueError names the flag that can not be."""
        for least, names in ((1, ("max_steps", "batch", "group_size", "max_new_tokens", "updates_per_batch",
                                  "micro_rows", "keep", "max_bad_steps")),
                             (0, ("eval_problems", "eval_samples", "eval_every", "print_every", "trace_every",
                                  "save_every", "max_pixels"))):
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(f"--{name} {getattr(self, name)}: must be at least {least}")
        if self.batch % (ranks * self.updates_per_batch):
            raise ValueError(f"--batch {self.batch}: must be a multiple of ranks x updates_per_batch = "
                             f"{ranks} x {self.updates_per_batch}")
        if self.shard == "all" and ranks == 1:
            raise ValueError("--shard all: one process has nobody to share with; start it with torchrun")
        if self.shard == "all" and self.balance == "queue":
            raise ValueError("--balance queue: with --shard all every pass is one of all ranks")
        for name, known in (("stage", ("rl", "sft")), ("algo", ("ivr", "grpo", "stepgrpo")),
                            ("relook", rereason.RELOOKS), ("credit", ("token", "step", "rollout")),
                            ("shard", ("optimizer", "all")), ("balance", ("tokens", "queue")),
                            ("localiser", attribute.LOCALISERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)}: must be one of {', '.join(known)}")
        check_report(self.report_to)
        if self.localiser == "oracle" and not reading.is_tiny(self.data):
            raise ValueError("--localiser oracle: only tiny has one")
        if self.stage == "rl" and self.group_size < 2:
            raise ValueError("--group_size 1: a group needs at least 2 completions to compare")
        if not 1 <= self.parents <= max(1, self.group_size // 2):
            raise ValueError(f"--parents {self.parents}: must be 1 to half of --group_size, since a repair "
                             "takes another rollout's place")
        if not 0 <= self.anneal <= 1:
            raise ValueError(f"--anneal {self.anneal}: must be between 0 and 1")
        if self.explain and (self.stage != "rl" or ranks > 1):
            raise ValueError("--explain: tells one step of --stage rl, on one process")


# ------------------------------------------------------------------------------------------------------------
# The loop in phases


class Trainer:
    """One run: the policy, its codec and optimiser, and what a step needs to know."""
    locator = attribute.Locator                         # what finds the step at fault

    def __init__(self, config: TrainConfig, checkpoint: Path | None = None):
        device, dtype = device_and_dtype(config.device, config.dtype)
        self.ranks, self.device = start_ranks(device)
        config.validate(self.ranks.world)
        self.config, self.step, self.bad_steps = config, 0, 0
        self.share = self.places = list(range(self.ranks.rank, config.batch, self.ranks.world))
        self.queue = Queue(self.ranks) if config.balance == "queue" and self.ranks.world > 1 else None
        self.codec = load_codec(config.model, config.max_pixels)
        self.data, self.held_out = training_data(config, self.codec)
        place = ("cpu", torch.float32) if config.shard == "all" else (self.device, dtype)
        self.model = load_model(checkpoint or config.model, *place)
        self.model.remat, self.model.graphs = config.remat, config.graphs
        if config.freeze_vision:
            self.model.visual.requires_grad_(False)
        if config.shard == "all":
            from runtime.sharding import ShardedOptimizer           # here, since it takes a second
            self.optimizer = ShardedOptimizer(self.model, config, self.ranks, self.device, dtype)
        else:
            self.optimizer = Optimizer(self.model, config, self.ranks)
        self.reference = load_model(config.model, self.device, dtype).eval() if config.beta > 0 else None
        self.tokens = 0                                 # completion tokens generated so far, over all ranks
        self.ahead = {}                                 # the next step's problems and prompts, where encoded
        if checkpoint:
            state = json.loads((checkpoint / "trainer.json").read_text())
            self.step, self.tokens, self.bad_steps = state["step"], state["tokens"], state["bad_steps"]
            self.optimizer.load(sorted(checkpoint.glob("optimizer-*.safetensors")))

    def draw(self, step: int, places: list | None = None) -> list:
        """Phase 1, problems: those at `places` of the global batch (None: this rank's share, every W-th). A
        file is shuffled anew each epoch."""
        c = self.config
        places = [step * c.batch + place for place in (self.share if places is None else places)]
        if not isinstance(self.data, list):
            return [self.data[i] for i in places]
        orders = {}                                     # epoch -> its permutation
        for epoch in {i // len(self.data) for i in places}:
            rng = torch.Generator().manual_seed(c.seed + 7919 * epoch)
            orders[epoch] = torch.randperm(len(self.data), generator=rng).tolist()
        return [self.data[orders[i // len(self.data)][i % len(self.data)]] for i in places]

    def encode(self, step: int, places: list | None = None) -> tuple:
        """Problems and prompts; images, for a GPU, in memory that it reads without the processor."""
        problems = self.draw(step, places)
        prompts = [rollout.encode_prompt(p, self.codec, self.config.max_prompt_tokens) for p in problems]
        for p in prompts if self.device.type == "cuda" else ():
            p.pixel_values = None if p.pixel_values is None else p.pixel_values.pin_memory()
        return problems, prompts

    # ---- reinforcement learning

    def rl_step(self) -> dict:
        progress = self.progress()
        problems, prompts = self.ahead.pop(self.step, None) or self.encode(self.step)
        self.places = self.share
        groups = self.roll_out(problems, prompts)
        self.score(groups)
        rollouts = groups
        groups, prompts = self.balance(groups, prompts, progress)
        groups, repairs, locate = self.repair(groups, progress)
        self.assign_advantages(groups)
        self.assign_credit(groups)
        with ThreadPoolExecutor(1) as pool:                     # meanwhile the images of the next step
            ahead = pool.submit(self.encode, self.step + 1)
            stats = self.update(groups, prompts, progress)
        self.ahead = {} if ahead.exception() else {self.step + 1: ahead.result()}
        figures = self.describe(rollouts)                       # here, since ranks wait for each other in it
        figures.update(self.describe_repairs(repairs, locate) if locate else {})
        return {**figures, "generated_tokens": self.tokens, **stats, "groups": groups, "repairs": repairs}

    def balance(self, groups, prompts, progress: float):
        """Groups change hands until all ranks have about as many tokens to work on: those with a gradient or
        repairs. What becomes of a group does not depend on the rank that holds it."""
        if self.ranks.world == 1 or self.queue:
            return groups, prompts
        chosen = self.to_rectify(groups, progress) if self.config.algo == "ivr" else []
        costs = [work([len(t.ids) for t in g], len({t.rewards["total"] for t in g}) > 1, n in chosen)
                 for n, g in enumerate(groups)]
        encoded = dict(zip(self.places, prompts))
        self.places, groups = exchange(self.ranks, self.places, groups, costs)
        new = [place for place in self.places if place not in encoded]
        for place, problem, prompt in zip(new, *self.encode(self.step, new)):
            encoded[place] = prompt
            for t in groups[self.places.index(place)]:
                t.problem = problem
        return groups, [encoded[place] for place in self.places]

    def repair(self, groups, progress: float):
        """Phases 4 and 5, of IVR-R1 alone. Returns the groups, the repairs and the locator."""
        if self.config.algo != "ivr":
            return groups, [], None
        chosen = self.to_rectify(groups, progress)
        locate = self.localise(groups, chosen)
        return *self.rectify(groups, chosen, locate), locate

    def roll_out(self, problems, prompts) -> list:
        """Phase 2, rollout: G completions a problem, at temperature 1: stored log-probs are the policy."""
        c = self.config
        keys = [f"train/{self.slot(i)}" for i in range(len(problems))]
        numbers = [rollout.uniforms(key, c.group_size, c.max_new_tokens) for key in keys]
        self.model.eval()
        return rollout.sample(self.model, problems, self.codec, c.group_size, c.max_new_tokens, 1.0,
                              torch.cat(numbers), prompts=prompts)

    def score(self, groups):
        """Phase 3, reward: rules only, no model."""
        for t in (t for group in groups for t in group):
            p = t.problem
            t.rewards = (reward.step_reward_parts(t.text, p.answer, p.choices, t.finished, p.key_steps)
                         if self.config.algo == "stepgrpo" else
                         reward.reward_parts(t.text, p.answer, p.choices, t.finished,
                                             self.config.format_weight))

    def localise(self, groups, chosen: list[int]):
        """Phase 4, localise: the steps of every rollout; in flawed ones, those at fault, where a group is to
        be repaired (`chosen`) or has a signal to place."""
        c = self.config
        locate = self.locator(self.model, self.codec, c.localiser, shapes.is_right, c.max_new_tokens,
                              f"locate/{c.seed}/{self.step}")
        for t in (t for group in groups for t in group):
            t.steps = attribute.split_steps(t.ids, self.codec)
        locate([t for n, group in enumerate(groups) for t in attribute.flawed(group)
                if n in chosen or (c.credit != "rollout" and any(x.rewards["accuracy"] for x in group))])
        return locate

    def progress(self) -> float:
        """Share of the training that is done, in [0, 1)."""
        c = self.config
        return self.tokens / c.max_tokens if c.max_tokens else self.step / c.max_steps

    def to_rectify(self, groups, progress: float) -> list[int]:
        """Which groups are worth repairing: at least two wrong, accuracy up to `rectify_below`. Of these a
        share that falls to 0 over the last `anneal` of the training."""
        c = self.config
        share = min(1.0, (1 - progress) / c.anneal) if c.anneal else 1.0
        right = [sum(t.rewards["accuracy"] for t in group) for group in groups]
        worth = [n for n, x in enumerate(right)
                 if x <= c.rectify_below * c.group_size and c.group_size - x >= 2]
        return [n for n in worth if rollout.uniforms(f"anneal/{self.slot(n)}", 1, 1).item() < share]

    def slot(self, n: int) -> str:
        """The name of this rank's n-th problem of the step among all ranks' and steps'."""
        return f"{self.config.seed}/{self.step}/{self.places[n]}"

    def rectify(self, groups, chosen: list[int], locate):
        """Phase 5, re-reason: repair failed rollouts of the chosen groups; each success takes the place of
        another wrong rollout of its group, beside its parent. Returns the new groups and all repairs."""
        c, parents, medians, keys = self.config, [], [], []
        for n in chosen:
            group = groups[n]
            mixed = any(t.rewards["accuracy"] for t in group)
            doubts = lambda t: (sum(1 for x in t.checks if x and x.doubted), -(rereason.doubted(t) or 0))
            best = sorted(attribute.flawed(group), key=doubts)[:1 if mixed else c.parents]
            parents += best
            medians += [sorted(len(t.ids) for t in group)[len(group) // 2]] * len(best)
            keys += [f"rectify/{self.slot(n)}/{i}" for i in range(len(best))]
        rules = rereason.Rules(failures=c.failures, min_log_w=c.min_log_w, relook=c.relook)
        repairs = rereason.rectify(self.model, self.codec, parents, medians, keys, locate, c.max_new_tokens,
                                   rules)
        of_group = {id(t): n for n, group in enumerate(groups) for t in group}
        groups = [list(group) for group in groups]
        for r in (r for r in repairs if r.outcome == "repaired"):
            group = groups[of_group[id(r.parent)]]
            spare = [n for n, t in enumerate(group) if t.rewards["accuracy"] == 0
                     and not any(t is p for p in parents)]
            if spare:
                self.score([[r.chain]])
                group[spare[-1]] = r.chain
        return groups, repairs

    def assign_advantages(self, groups):
        """Phase 6, advantages inside each group."""
        rewards = torch.tensor([[t.rewards["total"] for t in group] for group in groups])      # (B, G)
        for group, row in zip(groups, grpo.group_advantages(rewards, self.config.use_std).tolist()):
            for t, a in zip(group, row):
                t.advantage = a

    def assign_credit(self, groups):
        """The weights omega of each rollout's tokens."""
        c = self.config
        for t in (t for group in groups for t in group):
            if c.algo == "stepgrpo":                        # R1-VL averages over each sequence first
                t.weights = [c.max_new_tokens / len(t.ids)] * len(t.ids)
            if c.algo != "ivr":
                continue
            if t.provenance != "policy":
                t.weights = [float(n >= t.kept or not c.mask_prefix) for n in range(len(t.ids))]
            elif c.credit != "rollout" and t.rewards["accuracy"] == 0:
                if not t.finished:                          # cut off: neither right nor wrong
                    t.weights = [0.0] * len(t.ids)
                elif t.advantage < 0 and t.rewards["format"] and t.checks and rereason.doubted(t) is not None:
                    spans = [attribute.at_fault(s, x if c.credit == "token" else None)
                             for s, x in zip(t.steps, t.checks) if x is None or x.doubted]
                    t.weights = grpo.step_credit(len(t.ids), spans)

    def update(self, groups, prompts, progress: float) -> dict:
        """Phase 7, policy update: `updates_per_batch` optimiser steps, each over its share of the groups."""
        c, sums, norms = self.config, {}, []
        lr, encoded = learning_rate(c, self.step, progress), dict(zip(self.places, prompts))
        self.model.train()
        share = c.batch // c.updates_per_batch                          # problems of all ranks
        for u in range(c.updates_per_batch):
            rows = [(n, t) for n, group in zip(self.places, groups) for t in group if n // share == u
                    and any(t.weights or t.sampled) and (t.advantage != 0 or c.beta > 0)]   # else no gradient
            normaliser = share * c.group_size * c.max_new_tokens
            with self.optimizer.updating():
                for part in self.passes(rows, encoded, f"{self.step}/{u}"):
                    for name, value in self.backward(part, encoded, normaliser).items():
                        sums[name] = sums.get(name, 0.0) + value
                norms.append(self.optimizer.step(lr))
        names = ("loss", "tokens", "entropy", "clip_fraction", "kl_ref", "kl_old", "ratio")
        total = self.ranks.sum(torch.tensor([float(sums.get(n, 0.0)) for n in names], dtype=torch.float64))
        figures = dict(zip(names, total.tolist()))
        tokens, loss = figures.pop("tokens"), figures.pop("loss") / c.updates_per_batch
        means = {n: v / tokens if tokens else None for n, v in figures.items()}     # of the policy's own
        return {"loss": loss, **means, "grad_norm": sum(norms) / len(norms), "lr": lr}

    def passes(self, own, encoded: dict, name: str):
        """Rows (place, trajectory) of each forward and backward pass: this rank's `own`, groups together, or
        those of one group from the queue. encoded: prompts by place; those of others' groups are added."""
        c = self.config
        for rows in self.queue.take(name, own) if self.queue else [own]:
            new = list({place for place, _ in rows} - set(encoded))
            encoded.update(zip(new, self.encode(self.step, new)[1]))
            parts = [rows[at:at + c.micro_rows] for at in range(0, len(rows), c.micro_rows)]
            if c.shard == "all":                        # all ranks gather a layer, or none
                idle = rollout.Trajectory(None, [0], [0], [0.0], True, "", weights=[0.0])
                parts += [[(self.places[0], idle)]] * (self.ranks.most(len(parts)) - len(parts))
            yield from parts

    def backward(self, rows, prompts, normaliser: float) -> dict:
        """Loss and gradients of some rows (number of the prompt, trajectory)."""
        c = self.config
        used = sorted({i for i, _ in rows})
        inputs = ([prompts[i] for i in used], [used.index(i) for i, _ in rows], [t.ids for _, t in rows])
        logps, entropy, _ = rollout.completion_logps(self.model, *inputs, self.codec, entropy=True)   # (R, T)
        ref_logps = None
        if c.beta > 0:
            with torch.no_grad():
                ref_logps = rollout.completion_logps(self.reference, *inputs, self.codec)[0]
        ragged = lambda values: rollout.pad(values, 0.0)[0].to(self.device, torch.float32)
        old_logps = ragged([t.logps for _, t in rows])
        weights = ragged([[w * s for w, s in zip(t.weights or t.sampled, t.sampled)] for _, t in rows])
        advantages = torch.tensor([t.advantage for _, t in rows], device=self.device)[:, None]
        rectified = torch.tensor([t.provenance != "policy" for _, t in rows], device=self.device)[:, None]
        loss, stats = grpo.policy_loss(logps, old_logps, advantages, weights, normaliser, c.clip_low,
                                       c.clip_high, c.dual_clip, c.beta, ref_logps, rectified,
                                       c.lambda_r, c.gamma)
        loss.backward()
        self.optimizer.collect()
        return {"loss": loss.item(), "entropy": (entropy * ((weights > 0) & ~rectified)).sum().item(),
                **{name: value.item() for name, value in stats.items()}}

    def describe(self, groups) -> dict:
        """What a step's rollouts were like, over all ranks."""
        figures = of_rollouts(self.ranks.gather([[outcome(t) for t in group] for group in groups]))
        self.tokens += figures["rollout_tokens"]
        return figures

    def describe_repairs(self, repairs, locate) -> dict:
        """What the Re-Reasoning Loop did, over all ranks; its tokens are counted here."""
        rows = self.ranks.gather([(r.outcome == "repaired", r.tokens, r.looks) for r in repairs])
        figures = of_repairs(rows, sum(self.ranks.gather([locate.tokens])))
        self.tokens += figures["repair_tokens"]
        return figures

    # ---- supervised

    def sft_step(self) -> dict:
        """Imitate demonstrations: cross-entropy of their tokens, the mean over the global batch."""
        c = self.config
        (problems, prompts), lr = self.encode(self.step), learning_rate(c, self.step, self.progress())
        completions = [demonstration(p, c, self.codec) for p in problems]
        total = self.ranks.sum(torch.tensor(float(sum(map(len, completions))))).item()
        self.model.train()
        loss_sum = right = 0.0
        with self.optimizer.updating():
            for at in range(0, len(problems), c.micro_rows):
                part = slice(at, at + c.micro_rows)
                logps, _, mask = rollout.completion_logps(self.model, prompts[part],
                                                          list(range(len(prompts[part]))),
                                                          completions[part], self.codec)
                loss = -logps.sum() / total
                loss.backward()
                self.optimizer.collect()
                loss_sum += loss.item()
                right += ((logps.exp() > 0.5) & mask).sum().item()
            norm = self.optimizer.step(lr)
        figures = self.ranks.sum(torch.tensor([loss_sum, right / total], dtype=torch.float64)).tolist()
        self.tokens += int(total)
        return {"loss": figures[0], "likely_tokens": figures[1], "grad_norm": norm, "lr": lr}

    # ---- looking at it, keeping it

    def evaluate(self, short: bool = False) -> dict | None:
        """Held-out figures of the policy as it is; None where there is nothing to evaluate on. short: one
        sample of each of the first half of the problems, nothing greedy."""
        c, problems = self.config, self.held_out[:-(-len(self.held_out) // 2)] if short else self.held_out
        mine = problems[self.ranks.rank::self.ranks.world]
        if not problems:
            return None
        self.model.eval()
        records = evaluate(self.model, self.codec, mine, not short, 1 if short else c.eval_samples,
                           c.max_new_tokens, c.seed, progress=self.ranks.rank == 0 and not short)
        records = self.ranks.gather(records)
        sampled = {}
        for r in records:
            sampled.setdefault(r["id"], []).extend([r["correct"]] * (r["mode"] == "sample"))
        return {**summarise(records), "table": report(records),
                "problems": [sum(v) / max(1, len(v)) for _, v in sorted(sampled.items())]}

    def save(self):
        """out/checkpoint-<step>, of all ranks: the model in the hub's form, the optimiser's state."""
        c, state = self.config, {"step": self.step, "tokens": self.tokens, "bad_steps": self.bad_steps}

        def write_model(folder):
            save_model(self.model, folder, c.model)
            (folder / "README.md").write_text(card(c, self.step), encoding="utf-8")

        write_checkpoint(Path(c.out), self.step, c.keep, self.ranks, state, self.optimizer.state(),
                         write_model)


def begin(trainer: Trainer, log: Log) -> dict:
    """The run folder with config, log and first checkpoint (a resumed run goes on from its checkpoint: later
    rows of the log go), and the held-out figures before training, measured or as they were."""
    config, ranks, lead = trainer.config, trainer.ranks, trainer.ranks.rank == 0
    out = Path(config.out)
    if lead:
        out.mkdir(parents=True, exist_ok=True)
        rewrite(out / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
        for later in (c for c in out.glob("checkpoint-*") if int(c.name[11:]) > trainer.step):
            aside = out / f"abandoned-{later.name}"     # damaged, or the run goes on from an earlier one
            shutil.rmtree(aside, ignore_errors=True)
            later.rename(aside)
        log.cut(trainer.step)
    log.say(json.dumps(dataclasses.asdict(config)))
    size = sum(p.numel() for p in trainer.model.parameters())
    log.say(f"{size:,} parameters on {ranks.world} x {trainer.device}, run folder {out}")
    if trainer.step:
        saved = json.loads((out / "heldout.json").read_text()) if lead else {}
        before = ranks.same(saved.get("before"))
    else:
        before = trainer.evaluate()
        trainer.save()
    if before:
        log.say(f"held-out before: {headline(before)}")
    if lead:
        rewrite(out / "heldout.json", json.dumps({"before": before, "after": None}))
    return before


class Diverged(RuntimeError):
    """Too many steps in a row without a finite gradient."""


def after_step(trainer: Trainer, m: dict, say):
    """Count and tell of a step without a finite gradient (it changed nothing); Diverged after too many in a
    row, with the ids of their problems in out/not-finite.json."""
    c = trainer.config
    trainer.bad_steps = 0 if math.isfinite(m["grad_norm"]) else trainer.bad_steps + 1
    if trainer.bad_steps:
        say(f"warning: step {trainer.step} was skipped, its gradient is not finite "
            f"({trainer.bad_steps} in a row, --max_bad_steps {c.max_bad_steps})")
    if trainer.bad_steps >= c.max_bad_steps:
        steps = range(trainer.step - trainer.bad_steps, trainer.step)
        found = trainer.ranks.gather([[p.id for n in steps for p in trainer.draw(n)]])
        if trainer.ranks.rank == 0:
            file = Path(c.out) / "not-finite.json"
            file.write_text(json.dumps({"steps": [n + 1 for n in steps], "problems": sum(found, [])}))
        raise Diverged(f"{trainer.bad_steps} steps in a row without a finite gradient; their problems are in "
                       f"{c.out}/not-finite.json, the last checkpoints are untouched")


def steps(trainer: Trainer, log: Log, stop: Stop) -> bool:
    """Step after step, logged, until the training is done or a signal asks to stop. Returns whether it is
    done."""
    config, asked = trainer.config, 0
    bar = tqdm(total=config.max_steps, initial=trainer.step, desc=config.stage,
               disable=None if trainer.ranks.rank == 0 else True)
    while trainer.progress() < 1 and not asked:
        started = time.time()
        m = trainer.sft_step() if config.stage == "sft" else trainer.rl_step()
        groups, repairs = m.pop("groups", None), m.pop("repairs", None)
        trainer.step += 1
        m = {"step": trainer.step, **m, "seconds": time.time() - started}
        due = config.eval_every and trainer.step % config.eval_every == 0
        if due and (found := trainer.evaluate(short=True)):
            m["heldout"] = {k: v for k, v in found.items() if k not in ("table", "problems")}
            log.say(f"held-out at {trainer.step}: {headline(found)}")
        log.step(m, groups)
        after_step(trainer, m, log.say)
        log.trace(trainer.step, groups, repairs, trainer.model, trainer.codec)
        bar.update()
        asked = trainer.ranks.sum(torch.tensor(float(stop.asked))).item()
        done = trainer.progress() >= 1
        if done or asked or (config.save_every and trainer.step % config.save_every == 0):
            trainer.save()
    bar.close()
    return trainer.progress() >= 1


def run(trainer: Trainer) -> dict:
    """The whole job. Returns the held-out figures {"before": ..., "after": ...}, or None for each. SystemExit
    where a signal stopped it."""
    config, ranks, lead = trainer.config, trainer.ranks, trainer.ranks.rank == 0
    config.out = ranks.same(config.out or f"runs/{config.stage}-{time.strftime('%Y%m%d-%H%M%S')}")
    out, log = Path(config.out), Log(config, lead)
    figures = {"before": begin(trainer, log)}
    with Stop() as stop:
        done = steps(trainer, log, stop)
    if done:
        figures["after"] = trainer.evaluate()
        if figures["after"]:
            if lead:
                rewrite(out / "heldout.json", json.dumps(figures, indent=1))
            log.say(f"\n{figures['after']['table']}\n")
            for when, found in figures.items():
                log.say(f"held-out {when + ':':7} {headline(found) if found else 'not measured'}")
    log.close()
    log.say(f"checkpoint {out / f'checkpoint-{trainer.step:06d}'}")
    ranks.leave()
    if not done:
        log.say(f"stopped after step {trainer.step}; go on with: python train.py --resume {out}")
        sys.exit(128 + (stop.asked or signal.SIGTERM))
    return figures


PRESETS = {"stepgrpo": {"use_std": True, "beta": 0.04}}  # what an algorithm is published with; flags go first


def main(argv=None):
    """Flags in, run out; bad input ends with one line."""
    try:
        given = parse_flags(TrainConfig, argv)
        given = parse_flags(TrainConfig, argv, PRESETS.get(given.algo))
        if given.check:
            if reading.is_tiny(given.data):
                raise ValueError("--check: give a file with --data")
            summary, bad = check_data(given)
            print(summary, *bad, sep="\n")
            sys.exit(1 if bad else 0)
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0      # by torchrun
        if restarted and given.out and list(Path(given.out).glob("checkpoint-*")):
            given.resume = given.out
        if not given.resume:
            config, checkpoint = given, None
            rows = Path(config.out or "none") / "metrics.jsonl"     # empty: killed before its first step
            if config.out and rows.exists() and rows.stat().st_size and not restarted:
                raise ValueError(f"--out {config.out}: holds a run already; --resume it, or choose another")
        else:
            folder = Path(given.resume)
            found = [folder] if (folder / "trainer.json").is_file() else sorted(folder.glob("checkpoint-*"))
            if not found:
                raise ValueError(f"--resume {folder}: no checkpoint in there")
            checkpoint = intact(found)
            saved = json.loads((checkpoint.parent / "config.json").read_text())
            config = parse_flags(TrainConfig, argv, defaults=saved)
            config.out = str(checkpoint.parent)
        trainer = Trainer(config, checkpoint)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    try:
        explain(trainer, print) if config.explain else run(trainer)
    except (Diverged, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()

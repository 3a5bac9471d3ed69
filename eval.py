"""Evaluation: greedy accuracy, avg@k, pass@k, format and parse-fail rates, with intervals, by group.

    python eval.py --model tiny --data tiny:steps=5 --greedy --samples 4 --out results.jsonl
    torchrun --nproc_per_node 8 eval.py --model runs/x/checkpoint-000200 --data test.jsonl --out rows.jsonl

Takes: a checkpoint and problems. Gives: a table, and with --out one JSON row for each completion, written as
they come, so a run that was stopped continues. train.py calls `evaluate` before and after training.

The paper names no protocol; the definitions are the field's usual ones:
  avg@k     mean accuracy of k samples at temperature 1, averaged over problems
  pass@k    chance that at least one of k samples is right, unbiased from n >= k (arXiv 2107.03374)
  interval  95 %, Wilson's; the k samples of a problem are not independent, so they count as one problem
Left out: judge models. experiments/benchmarks.py converts public benchmarks to rows of ours.

Worked example: two problems with 4 samples each, 4 and 0 of them right: avg@4 = 0.5, pass@2 = 0.5, pass@4 =
0.5, and the interval is that of 1 success in 2, not of 4 in 8.
"""
import glob
import hashlib
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import rollout
from model import InputError, load_model, read_json, reading, require, resolve
from reward import answers_match, extract_answer, format_ok
from tiny.shapes import Stream


@dataclass
class EvalConfig:
    """Flags of `python eval.py`; without --greedy and --samples it does both, with 4 samples."""
    model: str = "tiny"             # folder or hub id of the checkpoint
    data: str = "tiny"              # JSONL file, or "tiny" (held-out split), e.g. "tiny:steps=3-9"
    image_dir: str = ""             # folder that image paths are relative to ("" = the folder of the file)
    instruction: str = rollout.INSTRUCTION      # text appended to each question of a file (may be empty)
    problems: int = 0               # evaluate the first so many problems (0 = all of a file, 256 of tiny)
    greedy: bool = False            # greedy accuracy, one completion a problem
    samples: int = 0                # k: samples a problem at temperature 1, for avg@k and pass@k
    max_new_tokens: int = 0         # length limit of a completion (0 = 2048 for a file, 256 for tiny)
    max_prompt_tokens: int = 16384  # a longer prompt is an error
    max_pixels: int = 0             # larger images are scaled down to this area (0 = the checkpoint's)
    batch: int = 32                 # prompts sampled together
    seed: int = 0                   # random numbers of the samples
    device: str = "auto"            # cpu, cuda, cuda:1 ... (auto = cuda where there is one)
    dtype: str = "auto"             # float32, bfloat16 (auto = bfloat16 on cuda, float32 on cpu)
    out: str = ""                   # JSONL file, a row a completion, as they come ("" = none)

    def __post_init__(self):
        check_flags(self)


# ---- Flags, of train.py too: bounds of numbers (of other integers 0 and 10^6, of other floats 0 and 10), the
# choices of texts, and what a flag makes meaningless

POSITIVE = ("max_steps", "batch", "micro_tokens", "keep", "max_bad_steps", "updates_per_batch")
SHARES = ("clip_low", "format_weight", "anneal", "lr_end", "erosion_first", "erosion_last")
BOUNDS = {**dict.fromkeys(POSITIVE, (1, 10 ** 6 - 1)), **dict.fromkeys(SHARES, (0, 1)),
          **dict.fromkeys(("samples", "eval_samples"), (0, 4096)), "max_tokens": (0, 10 ** 12),
          "group_size": (2, 4096), "max_pixels": (0, 2 ** 26), "seed": (0, 10 ** 9), "dual_clip": (1, 1e6),
          "rectify_below": (-1, 1), "min_log_w": (-1e6, 0), "beta2": (0, 0.999999),
          "max_grad_norm": (1e-9, 1e9), "lora": (0, 4096), "lora_alpha": (1e-6, 1e6)}
CHOICES = {"stage": ("rl", "sft"), "algo": ("ivr", "grpo"), "credit": ("token", "step", "rollout"),
           "dtype": ("auto", "float32", "bfloat16"), "activation_checkpointing": ("auto", "yes", "no")}
IVR_ONLY = "credit rectify_below reader reader_window revise min_log_w lambda_r gamma anneal"
MEANINGLESS = (("stage", "rl", "erosion_first erosion_last"), ("algo", "grpo", IVR_ONLY),
               ("stage", "sft", f"algo use_std clip_low clip_high dual_clip beta format_weight {IVR_ONLY}"),
               ("lora", 0, "lora_alpha"), ("eval_problems", 0, "eval_data eval_samples eval_every"))


def check_flags(config):
    """InputError names a flag that can not be, or that another one makes meaningless."""
    values, defaults = vars(config), {f.name: f.default for f in fields(config)}
    for f in fields(config):
        bounds = BOUNDS.get(f.name, (0, 10 if f.type is float else 10 ** 6))
        require(f"--{f.name}", values[f.name], f.type, *bounds)
        if values[f.name] not in CHOICES.get(f.name, (values[f.name],)):
            raise InputError(f"--{f.name} {values[f.name]}: must be one of {', '.join(CHOICES[f.name])}")
    for name, value, others in MEANINGLESS:
        for other in others.split() if values.get(name) == value else ():
            if values[other] != defaults[other]:
                raise InputError(f"--{other} {values[other]}: means nothing with --{name} {value}")
    rows = config.batch * max(values.get("group_size", 1), values.get("samples", 1))
    if rows * (config.max_new_tokens or 128) > 2 ** 28:
        raise InputError(f"--batch {config.batch}: {rows:,} rows of --max_new_tokens do not fit any memory")


def is_tiny(data: str) -> bool:
    """Whether a data argument names the embedded tasks rather than a file."""
    return data.partition(":")[0] == "tiny"


def load_heldout(config, data: str, count: int, codec) -> list:
    """The first `count` problems of a file (0 = all), or of a tiny spec (0 = 256), checked."""
    if is_tiny(data):
        stream = Stream(data, "heldout")
        problems = [stream[i] for i in range(count or 256)]
    else:
        problems = rollout.load_problems(data, config.image_dir, config.instruction)[:count or None]
    for problem in problems:
        rollout.encode_prompt(problem, codec, config.max_prompt_tokens, pixels=False)
    return problems


# ---- Running a model

def evaluate(model, codec, problems: list, samples: int, max_new_tokens: int, seed: int = 0, batch: int = 32,
             progress: bool = True, keep=None) -> list[dict]:
    """`samples` completions of each problem at temperature 1, or (0) one greedy one -> a record each. Random
    numbers depend on `seed` and the problem's id alone. keep(records) gets new ones as they come."""
    mode, temperature = ("sample", 1.0) if samples else ("greedy", 0.0)
    problems, prompts = rollout.encode_prompts(problems, codec, pixels=False)
    order = sorted(range(len(problems)), key=lambda n: len(prompts[n].ids))     # similar lengths together
    problems = [problems[n] for n in order]
    records, disable = [], None if progress else True          # None: no bar where there is no terminal
    for start in tqdm(range(0, len(problems), batch), mode, leave=False, disable=disable):
        part, prompts = rollout.encode_prompts(problems[start:start + batch], codec)
        new, keys = [], [f"eval/{seed}/{p.id}" for p in part]
        for group in rollout.sample(model, part, codec, samples or 1, max_new_tokens, temperature, keys, None,
                                    prompts):
            for k, t in enumerate(group):
                record = judge(t.problem, t.text, t.finished)
                new.append({**record, "tokens": len(t.ids), "mode": mode, "sample": k})
        if keep:
            keep(new)
        records += new
    return records


def judge(problem, text: str, finished: bool) -> dict:
    """What one completion is worth."""
    extracted = extract_answer(text, problem.choices)
    correct = extracted is not None and answers_match(extracted, problem.answer, problem.choices)
    return {"id": problem.id, "groups": {"task": problem.task, "steps": len(problem.key_steps or [])},
            "completion": text, "extracted": extracted, "gold": problem.answer, "correct": correct,
            "format": finished and format_ok(text), "finished": finished}


# ---- Figures

def interval(values: list[float]) -> tuple[float, float]:
    """95 % Wilson interval (1927) of a mean of values in [0, 1], one a problem. Where some are between 0 and
    1 (of several samples) the number of problems is mean (1 - mean) / variance of the mean: our choice."""
    n, mean = len(values), sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / n ** 2
    if variance > 1e-12:
        n = mean * (1 - mean) / variance
    z = 1.96
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that one of k samples is right, estimated without bias from n samples of which `right` are."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def figure(values: list[float]) -> dict:
    """Mean and interval of per-problem values."""
    low, high = interval(values)
    return {"mean": sum(values) / len(values), "low": low, "high": high}


def summarise(records: list[dict]) -> dict:
    """Figures of some records: {name: {"mean", "low", "high"}} and n, the number of problems."""
    out = {"n": 0}
    for mode in ("greedy", "sample"):
        by_problem = {}
        for r in records:
            if r["mode"] == mode:
                row = (r["correct"], r["format"], r["extracted"] is None)
                by_problem.setdefault(r["id"], []).append(row)
        if not by_problem:
            continue
        out["n"] = len(by_problem)
        table = torch.tensor(list(by_problem.values()), dtype=torch.float64)    # (problems, n samples, 3)
        n, (right, form, unread) = table.shape[1], table.sum(1).T
        out["greedy" if mode == "greedy" else f"avg@{n}"] = figure((right / n).tolist())
        for k in (2 ** power for power in range(1, n.bit_length())):           # 2, 4 ... up to n
            out[f"pass@{k}"] = figure([pass_at_k(n, int(count), k) for count in right])
        out[f"{mode} format"] = figure((form / n).tolist())
        out[f"{mode} parse fail"] = figure((unread / n).tolist())
    return out


def percent(figures: dict) -> str:
    return f"{100 * figures['mean']:.1f} % [{100 * figures['low']:.1f}, {100 * figures['high']:.1f}]"


def report(records: list[dict]) -> str:
    """The table people read: all problems, then by group. Percent, with 95 % intervals."""
    parts = {}
    for r in records:
        for key, value in r["groups"].items():
            for v in value if isinstance(value, list) else [value]:
                if v:
                    parts.setdefault(key, {}).setdefault(v, []).append(r)
    tables = {"all": summarise(records)}
    for key, by_value in parts.items():
        for value in sorted(by_value) if len(by_value) > 1 else ():
            tables[rollout.escaped(f"{key} {value}")] = summarise(by_value[value])
    columns = list(tables["all"])[1:]                       # after n
    lines = [f"| {'':18} | n | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, table in tables.items():
        cells = [percent(table[column]) if column in table else "" for column in columns]
        lines.append(f"| {name:18} | {table['n']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def headline(figures: dict) -> str:
    """'greedy 50.0 % [..], avg@4 30.0 % [..], 200 problems' of a summary."""
    parts = [f"{name} {percent(value)}" for name, value in figures.items() if name == "greedy" or "@" in name]
    return ", ".join([*parts, f"{figures['n']} problems"])


# ---- Results on disk: FILE; while it grows one FILE.part<rank> a rank; FILE.config.json

def parts_of(out: Path) -> list[Path]:
    """The files of ranks whose rows are not in `out` yet."""
    found = out.parent.glob(glob.escape(out.name) + ".part*")
    return [file for file in found if file.suffix[5:].isdecimal()]


def known_rows(config: EvalConfig, rank: int) -> dict:
    """The rows that need not be made again, by (id, mode, sample). What they depend on is kept beside them;
    ValueError where that was different, or where the file is not ours."""
    import train                                            # here, since train.py imports this file
    out, saved, rows = Path(config.out), Path(f"{config.out}.config.json"), {}
    settings = asdict(config)
    for name in ("problems", "greedy", "max_prompt_tokens", "batch", "device", "out"):
        del settings[name]
    folder = resolve(config.model)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("adapter_config.json")])
    settings["weights"] = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    if not is_tiny(config.data):
        settings["rows"] = hashlib.sha256(Path(config.data).read_bytes()).hexdigest()[:16]
    before, files = read_json(saved) if saved.exists() else {}, [out, *parts_of(out)]
    ours = before.keys() >= settings.keys()
    for file in files:
        empty = not file.exists() or (file.is_file() and file.stat().st_size == 0)
        if (before and not ours) or not (empty or (ours and file.is_file() and not file.is_symlink())):
            raise InputError(f"--out {out}: {file} is there already, not written by an evaluation")
        with reading(f"--out {file}"):
            for row in train.read_jsonl(file):
                for name, kind in (("id", str), ("groups", dict), ("correct", bool), ("format", bool)):
                    require(f"--out {file}: field {name!r}", row[name], kind)
                rows[row["id"], row["mode"], row["sample"]] = {**row, "extracted": row["extracted"]}
    other = [name for name in settings if rows and before.get(name) != settings[name]]
    if other:
        raise ValueError(f"--out {out}: holds rows of other settings ({', '.join(other)}); choose another")
    out.parent.mkdir(parents=True, exist_ok=True)
    train.all_gather([])                                    # all have read before the first one writes
    if rank == 0:
        train.write_text(saved, json.dumps(settings, indent=1))
    return rows


def run(config: EvalConfig, rank: int, world: int, device, dtype):
    """The whole job: load and check, complete what is missing, report, write."""
    import train
    codec = rollout.load_codec(config.model, config.max_pixels)
    problems = load_heldout(config, config.data, config.problems, codec)
    if not (config.greedy or config.samples):
        config.greedy, config.samples = True, 4
    out, rows, keep = Path(config.out), {}, None
    if config.out:                                          # before the work, not after it
        rows = known_rows(config, rank)
        keep = partial(train.append_jsonl, Path(f"{out}.part{rank}"))
    model = load_model(config.model, device, dtype).eval()
    limit = config.max_new_tokens or (256 if is_tiny(config.data) else 2048)
    modes = {"greedy": int(config.greedy), "sample": config.samples}
    new, have, ids = [], Counter(key[:2] for key in rows), {p.id for p in problems}
    for mode, count in modes.items():
        todo = [p for p in problems if have[p.id, mode] < count][rank::world]
        samples = count if mode == "sample" else 0
        new += evaluate(model, codec, todo, samples, limit, config.seed, config.batch, rank == 0, keep)
    for r in train.all_gather(new):
        rows[r["id"], r["mode"], r["sample"]] = r
    if rank == 0:
        records = [r for r in rows.values() if r["id"] in ids and modes.get(r["mode"])]
        with reading(f"--out {out}"):                        # a row of old may hold anything
            print(rollout.escaped(report(records), "\n"))
        if config.out:
            train.write_text(out, "".join(json.dumps(r) + "\n" for r in rows.values()))
            for part in parts_of(out):
                part.unlink()


def main(argv=None):
    import train
    try:
        config = train.parse_flags(EvalConfig, argv)
        device, dtype = train.device_and_dtype(config.device, config.dtype)
        run(config, *train.init_distributed(device), dtype)
    except (ValueError, OSError) as e:
        train.fail(e)
    train.leave()


if __name__ == "__main__":
    main()

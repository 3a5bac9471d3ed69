"""Evaluation: greedy accuracy, avg@k, pass@k, format and parse-fail rates, with intervals, by group.

    python eval.py --model tiny --data tiny:steps=5 --greedy --samples 4 --out results.jsonl torchrun
    --nproc_per_node 8 eval.py --model runs/x/checkpoint-000200 --data test.jsonl --greedy --out rows.jsonl

Takes: a checkpoint and problems. Gives: a table, and with --out one JSON row for each completion, written as
they come, so that a run that was stopped continues where it was. train.py calls `evaluate` before and after
training.

The paper names no evaluation protocol; the definitions are the field's usual ones: avg@k     mean accuracy
  of k samples at temperature 1, averaged over problems pass@k    chance that at least one of k samples is
  right, unbiased from n >= k (Chen et al., arXiv 2107.03374) interval  95 %, Wilson's; the k samples of a
  problem are not independent, so they count as one problem
Left out: judge models. Public benchmarks are converted to rows of ours by experiments/benchmarks.py.

Worked example: two problems with 4 samples each, 4 and 0 of them right: avg@4 = 0.5, pass@2 = 0.5, pass@4 =
0.5, and the interval is that of 1 success in 2, not of 4 in 8.
"""
import hashlib
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import rollout
from model import load_model, resolve
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
    show: int = 0                   # print so many completions
    seed: int = 0                   # random numbers of the samples
    device: str = "auto"            # cpu, cuda, cuda:1 ... (auto = cuda where there is one)
    dtype: str = "auto"             # float32, bfloat16 (auto = bfloat16 on cuda, float32 on cpu)
    out: str = ""                   # JSONL file, a row a completion, as they come ("" = none)

    def validate(self):
        """ValueError names the flag that can not be."""
        for name in ("problems", "samples", "max_new_tokens", "max_pixels", "show"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)}: must not be negative")
        if self.batch < 1:
            raise ValueError(f"--batch {self.batch}: must be at least 1")


def is_tiny(data: str) -> bool:
    """Whether a data argument names the embedded tasks rather than a file."""
    return data.partition(":")[0] == "tiny"


def load_data(data: str, split: str, count: int = 0, image_dir: str = "", instruction: str = "") -> list:
    """The first `count` problems of a file (0 = all), or of a tiny spec (0 = 256)."""
    if is_tiny(data):
        stream = Stream(data, split)
        return [stream[i] for i in range(count or 256)]
    return rollout.load_problems(data, image_dir, instruction)[:count or None]


# ---- Running a model

def evaluate(model, codec, problems: list, samples: int, max_new_tokens: int, seed: int = 0, batch: int = 32,
             progress: bool = True, keep=None) -> list[dict]:
    """`samples` completions of each problem at temperature 1, or (0) one greedy completion -> one record
    each: see `judge`, and mode, sample, tokens. A problem's random numbers depend on `seed` and its id
    alone, so the same problem gives the same samples in any company. keep(records): called with new ones as
    they come."""
    mode = "sample" if samples else "greedy"
    lengths = {p.id: len(rollout.encode_prompt(p, codec, pixels=False).ids) for p in problems}
    order = sorted(problems, key=lambda p: lengths[p.id])                       # similar lengths together
    records, correct = {p.id: [] for p in problems}, []
    bar = tqdm(total=len(problems), desc=mode, leave=False, disable=None if progress else True)
    for start in range(0, len(order), batch):
        part = order[start:start + batch]
        keys = [f"eval/{seed}/{p.id}" for p in part]
        groups = rollout.sample(model, part, codec, max(1, samples), max_new_tokens, float(samples > 0), keys)
        new = []
        for group in groups:
            for k, t in enumerate(group):
                record = judge(t.problem, t.text, t.finished)
                new.append({**record, "tokens": len(t.ids), "mode": mode, "sample": k})
                records[t.problem.id].append(new[-1])
                correct.append(record["correct"])
        if keep:
            keep(new)
        bar.set_postfix_str(f"{100 * sum(correct) / len(correct):.1f} %")
        bar.update(len(part))
    bar.close()
    return sum(records.values(), [])


def judge(problem, text: str, finished: bool) -> dict:
    """What one completion is worth."""
    extracted = extract_answer(text, problem.choices)
    correct = extracted is not None and answers_match(extracted, problem.answer, problem.choices)
    return {"id": problem.id, "groups": {"task": problem.task, "steps": len(problem.key_steps or [])},
            "completion": text, "extracted": extracted, "gold": problem.answer, "correct": correct,
            "format": finished and format_ok(text), "finished": finished}


# ---- Figures

def interval(values: list[float]) -> tuple[float, float]:
    """95 % Wilson interval of a mean of per-problem values in [0, 1]. Values between 0 and 1 (several
    samples a problem) count for more than one yes/no each: the effective number of problems is mean (1 -
    mean) / variance of the mean, which is their plain number when all are 0 or 1. Source: Wilson 1927; the
    correction is our choice."""
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
    low, high = interval(values)
    return {"mean": sum(values) / len(values), "low": low, "high": high}


def summarise(records: list[dict]) -> dict:
    """Figures of some records: {name: {"mean", "low", "high"}} and n, the number of problems."""
    out = {"n": len({r["id"] for r in records})}
    for mode in ("greedy", "sample"):
        by_problem = {}
        for r in records:
            if r["mode"] == mode:
                by_problem.setdefault(r["id"], []).append(r)
        if not by_problem:
            continue
        right, form, unread = [], [], []
        for group in by_problem.values():
            right.append(sum(r["correct"] for r in group))
            form.append(sum(r["format"] for r in group))
            unread.append(sum(r["extracted"] is None for r in group))
        n = len(group)                                      # completions a problem
        out["greedy" if mode == "greedy" else f"avg@{n}"] = figure([count / n for count in right])
        k = 2
        while mode == "sample" and k <= n:
            out[f"pass@{k}"] = figure([pass_at_k(n, count, k) for count in right])
            k *= 2
        out[f"{mode} format"] = figure([count / n for count in form])
        out[f"{mode} parse fail"] = figure([count / n for count in unread])
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
    rows = [("all", summarise(records))]
    for key, by_value in parts.items():
        if len(by_value) > 1:
            rows += [(f"{key} {value}", summarise(by_value[value])) for value in sorted(by_value)]
    columns = [name for name in rows[0][1] if name != "n"]
    lines = [f"| {'':18} | n | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, table in rows:
        cells = [percent(table[column]) if column in table else "" for column in columns]
        lines.append(f"| {name:18} | {table['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def headline(figures: dict) -> str:
    """'greedy 50.0 % [..], avg@4 30.0 % [..], 200 problems' of a summary."""
    parts = []
    for name, value in figures.items():
        if name == "greedy" or name.startswith(("avg@", "pass@")):
            parts.append(f"{name} {percent(value)}")
    return ", ".join(parts) + f", {figures['n']} problems"


# ---- Results on disk: FILE; while it grows one FILE.part<rank> a rank; FILE.config.json

def settings_of(config: EvalConfig) -> dict:
    """What the completions depend on: rows of other settings must not be mixed with them."""
    names = ("model", "data", "image_dir", "instruction", "samples", "max_new_tokens", "max_pixels", "seed", "dtype")
    settings = {name: getattr(config, name) for name in names}
    files = sorted(resolve(config.model).glob("*.safetensors"))
    settings["weights"] = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    if not is_tiny(config.data):
        settings["rows"] = hashlib.sha256(Path(config.data).read_bytes()).hexdigest()[:16]
    return settings


def read_rows(out: Path, settings: dict) -> dict:
    """The rows an evaluation need not make again, by (id, mode, sample). ValueError where the file holds
    those of other settings."""
    import train                                            # here, since train.py imports this file
    saved, rows = Path(f"{out}.config.json"), {}
    if out.is_file() and out.stat().st_size and not saved.is_file():
        raise ValueError(f"--out {out}: is there already, and was not written by an evaluation")
    for file in (out, *parts_of(out)):
        for row in train.read_jsonl(file):                  # without one that was cut off by a kill
            rows[row["id"], row["mode"], row["sample"]] = row
    before = json.loads(saved.read_text()) if rows else settings
    other = [name for name in settings if before.get(name) != settings[name]]
    if other:
        raise ValueError(f"--out {out}: holds rows made with other settings ({', '.join(other)}); choose another "
                         "file, or delete it")
    return rows


def parts_of(out: Path) -> list[Path]:
    """The files that ranks write while an evaluation runs."""
    return [f for f in sorted(out.parent.glob("*")) if re.fullmatch(re.escape(out.name) + r"\.part\d+", f.name)]


def run(config: EvalConfig, rank: int, world: int, device, dtype):
    """The whole job: load and check, complete what is missing, write, report."""
    import train
    problems = load_data(config.data, "heldout", config.problems, config.image_dir, config.instruction)
    if not (config.greedy or config.samples):
        config.greedy, config.samples = True, 4
    codec = rollout.load_codec(config.model, config.max_pixels)
    for p in problems:
        rollout.encode_prompt(p, codec, config.max_prompt_tokens, pixels=False)
    rows, out = {}, Path(config.out) if config.out else None
    if out:                                                 # before the work, not after it
        out.parent.mkdir(parents=True, exist_ok=True)
        rows = read_rows(out, settings_of(config))
        train.all_gather([])                                    # all have read before the first one writes
        if rank == 0:
            train.write_text(Path(f"{out}.config.json"), json.dumps(settings_of(config), indent=1))
    model = load_model(config.model, device, dtype).eval()
    limit = config.max_new_tokens or (256 if is_tiny(config.data) else 2048)

    def keep(records):
        for r in records:
            rows[r["id"], r["mode"], r["sample"]] = r
        if out:
            train.append_jsonl(Path(f"{out}.part{rank}"), records)

    for samples in [0] * config.greedy + [config.samples] * (config.samples > 0):
        mode, todo = "sample" if samples else "greedy", []
        for p in problems:
            if any((p.id, mode, k) not in rows for k in range(max(1, samples))):
                todo.append(p)
        evaluate(model, codec, todo[rank::world], samples, limit, config.seed, config.batch, rank == 0, keep)
    for r in train.all_gather(list(rows.values())):
        rows[r["id"], r["mode"], r["sample"]] = r
    if rank == 0:
        finish(config, problems, rows, out)


def finish(config: EvalConfig, problems: list, rows: dict, out: Path | None):
    """Write all rows to one file, print the table and some completions."""
    import train
    records = []
    for p in problems:
        for mode, count in (("greedy", int(config.greedy)), ("sample", config.samples)):
            for k in range(count):
                r = rows[p.id, mode, k]
                r |= judge(p, r["completion"], r["finished"])           # the rules may have changed since
                records.append(r)
    if out:
        train.write_text(out, "".join(json.dumps(r) + "\n" for r in rows.values()))
        for part in parts_of(out):
            part.unlink()
    print(report(records))
    for r in records[:config.show]:
        print(f"\n{r['id']}  {'right' if r['correct'] else 'wrong'}\n  gold        {r['gold']!r}\n"
              f"  completion  {r['completion']!r}\n  answer      {r['extracted']!r}")
    if out:
        print(f"\nrows: {out}")


def main(argv=None):
    import train
    config = train.parse_flags(EvalConfig, argv)
    try:
        config.validate()
        device, dtype = train.device_and_dtype(config.device, config.dtype)
        rank, world, device = train.init_distributed(device)
        run(config, rank, world, device, dtype)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    train.leave()


if __name__ == "__main__":
    main()

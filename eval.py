"""Evaluation: greedy accuracy, avg@k, pass@k, format and parse-fail rates, with intervals, by group.

    python eval.py --model tiny --data tiny:steps=5 --greedy --samples 4 --out results.jsonl
    python eval.py --model Qwen/Qwen2.5-VL-3B-Instruct --bench MMStar.tsv --greedy
    torchrun --nproc_per_node 8 eval.py --model runs/x/checkpoint-000200 --bench MathVista_MINI.tsv --greedy
    python eval.py --image photo.png --ask "How many dogs are there?" --model runs/x/checkpoint-000200
    python eval.py --localise --data tiny:steps=9          # how well attribute.py finds the first wrong step

Place in the pipeline: before and after training (`train.py` calls `evaluate` and `summarise`). Reads from
model.py, rollout.py, reward.py and benchmarks/. The paper names no evaluation protocol; the definitions are
the field's usual ones:
  avg@k   mean accuracy of k samples at temperature 1, averaged over problems
  pass@k  chance that at least one of k samples is right, unbiased from n >= k (Chen et al., arXiv 2107.03374)
  interval  95 %, Wilson's; the k samples of a problem are not independent, so they count as one problem

Worked example: two problems with 4 samples each, 4 and 0 of them right: avg@4 = 0.5, pass@1 = 0.5, pass@4 =
0.5, and the interval is that of 1 success in 2, not of 4 in 8.
"""
import argparse
import contextlib
import hashlib
import inspect
import json
import math
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import rollout
from benchmarks.formats import PROMPTS, Item, load_benchmark
from benchmarks.localisation import localisation
from benchmarks.rules import RULES, grade
from model import checksum, load_model, resolve, rewrite
from reward import answers_match, extract_answer, format_ok
from viewer import terminal


@dataclass
class EvalConfig:
    """Flags of `python eval.py`; without --greedy and --samples it does both, with 4 samples."""
    model: str = "tiny"                 # folder or hub id of the checkpoint
    data: str = "tiny"       # JSONL file, or "tiny" (held-out split), e.g. "tiny:steps=3-9,forms=free+choice"
    bench: str = ""         # benchmark file instead: MathVista, MathVerse, MathVision, MMMU, MMMU-Pro, MMStar
    rules: str = "strict"               # when a benchmark's answer is right: strict | vlmeval | official
    prompt: str = "own"         # a benchmark's wording: own (with --instruction) | direct | cot (its own two)
    image_dir: str = ""                # folder that image paths are relative to ("" = the folder of the file)
    outside_images: bool = False        # images may lie outside that folder
    instruction: str = rollout.INSTRUCTION  # text appended to each question of a file (may be empty)
    image: str = ""                     # answer one question about this image file instead ...
    ask: str = ""                       # ... namely this one, and show the steps with their checks
    show: int = 0                       # print so many greedy (else sampled) completions, step by step
    problems: int = 0                   # evaluate the first so many problems (0 = all of a file, 256 of tiny)
    greedy: bool = False                # greedy accuracy, one completion a problem
    localise: bool = False              # score every localiser of attribute.py against the step oracle (tiny)
    flawed: int = 2000                  # flawed rollouts to score them on
    planted: int = 600                  # chains with a planted error, for the confusion of kinds
    samples: int = 0                    # k: samples a problem at temperature 1, for avg@k and pass@k
    max_new_tokens: int = 0             # length limit of a completion (0 = 2048 for a file, 256 for tiny)
    max_prompt_tokens: int = 16384      # a longer prompt is an error
    max_pixels: int = 0                 # larger images are scaled down to this area (0 = the checkpoint's)
    batch: int = 32                     # prompts sampled together
    seed: int = 0                       # random numbers of the samples
    device: str = "auto"                # cpu, cuda, cuda:1 ... (auto = cuda where there is one)
    dtype: str = "auto"                 # float32, bfloat16 (auto = bfloat16 on cuda, float32 on cpu)
    out: str = ""         # JSONL file, a row a completion, as they come ("" = none; runs/eval/.. for --bench)

    def validate(self):
        """ValueError names the flag that can not be."""
        for name in ("problems", "samples", "max_new_tokens", "max_pixels", "show"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)}: must not be negative")
        for name, known in (("rules", RULES), ("prompt", PROMPTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)}: must be one of {', '.join(known)}")
        if bool(self.image) != bool(self.ask):
            raise ValueError("--image and --ask belong together")
        if self.localise and not rollout.is_tiny(self.data):
            raise ValueError("--localise: only tiny has a step oracle")
        if self.batch < 1:
            raise ValueError(f"--batch {self.batch}: must be at least 1")


def parse_flags(config_class, argv=None, defaults: dict | None = None):
    """A dataclass as a command line: every field a --flag, its comment the help text. Unknown flags exit with
    code 2. `defaults` replaces default values by field name (a saved configuration)."""
    comments = dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", inspect.getsource(config_class), re.M))
    parser = argparse.ArgumentParser(description=config_class.__doc__, allow_abbrev=False)
    for f in fields(config_class):
        kind = {"action": argparse.BooleanOptionalAction} if f.type in (bool, "bool") else {"type": f.type}
        help_text = f"{comments.get(f.name, '')} [{f.default}]".replace("%", "%%")
        default = (defaults or {}).get(f.name, f.default)
        parser.add_argument(f"--{f.name}", default=default, help=help_text, **kind)
    return config_class(**vars(parser.parse_args(argv)))


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


# ------------------------------------------------------------------------------------------------------------
# Ranks


@dataclass
class Ranks:
    """This process among the others. With one process every method is the identity."""
    rank: int = 0
    world: int = 1

    def sum(self, tensor):
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

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


def start_ranks(device: torch.device) -> tuple[Ranks, torch.device]:
    """Join torchrun's process group, if there is one (gloo on CPU, nccl on CUDA, one GPU a local rank)."""
    if "WORLD_SIZE" not in os.environ:
        return Ranks(), device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    store, rank, world = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")     # addresses of an earlier one are dead
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=rank,
                            world_size=world, store=dist.PrefixStore(f"attempt {attempt}", store))
    return Ranks(dist.get_rank(), dist.get_world_size()), device


# ------------------------------------------------------------------------------------------------------------
# Running a model


def evaluate(model, codec, problems, greedy: bool, samples: int, max_new_tokens: int, seed: int = 0,
             batch: int = 32, progress: bool = True, rules: str = "strict", done: list = (),
             keep=lambda records: None) -> list[dict]:
    """One record a completion: id, groups, mode, completion, extracted, gold, correct, format, finished,
    tokens. A problem's random numbers depend on `seed` and its id alone, so the same problem gives the same
    samples in any company. done: records there are already; keep(records): called with new ones as they
    come."""
    lengths = [len(rollout.encode_prompt(p, codec, pixels=False).ids) for p in problems]
    order = sorted(range(len(problems)), key=lengths.__getitem__)                   # similar lengths together
    records, have = list(done), {(r["id"], r["mode"]) for r in done}
    modes = [("greedy", 1, 0.0)] * greedy + [("sample", samples, 1.0)] * (samples > 0)
    total = len(modes) * len(problems)
    bar = tqdm(total=total, desc="evaluating", leave=False, disable=None if progress else True)
    for mode, group_size, temperature in modes:
        todo = [i for i in order if (problems[i].id, mode) not in have]
        bar.update(len(order) - len(todo))
        for at in range(0, len(todo), batch):
            part = todo[at:at + batch]
            numbers = [rollout.uniforms(f"eval/{seed}/{problems[i].id}", group_size, max_new_tokens)
                       for i in part]
            groups = rollout.sample(model, [problems[i] for i in part], codec, group_size, max_new_tokens,
                                    temperature, torch.cat(numbers))
            new = [{**judge(t.problem, t.text, t.finished, rules), "tokens": len(t.ids), "mode": mode,
                    "sample": k} for group in groups for k, t in enumerate(group)]
            keep(new)
            records += new
            rows = [r["correct"] for r in records if r["mode"] == mode]
            bar.set_postfix_str(f"{mode} {100 * sum(rows) / len(rows):.1f} %")
            bar.update(len(part))
    bar.close()
    place = {p.id: n for n, p in enumerate(problems)}
    return sorted(records, key=lambda r: (place[r["id"]], r["mode"], r["sample"]))


def judge(problem, text: str, finished: bool, rules: str = "strict") -> dict:
    """What one completion is worth."""
    if isinstance(problem, Item):
        (extracted, correct), groups = grade(problem, text, rules), problem.groups
    else:
        extracted = extract_answer(text, problem.choices)
        correct = extracted is not None and answers_match(extracted, problem.answer, problem.choices)
        groups = {"task": problem.task, "steps": len(problem.key_steps or [])}
    return {"id": problem.id, "groups": groups, "completion": text, "extracted": extracted,
            "gold": problem.answer, "rules": rules, "correct": correct,
            "format": finished and format_ok(text),
            "finished": finished}


# ------------------------------------------------------------------------------------------------------------
# Results on disk: FILE, while it grows one FILE.part<rank> a rank, and FILE.config.json


def settings_of(config: EvalConfig) -> dict:
    """What the completions depend on: rows of other settings must not be mixed with them."""
    files = sorted(resolve(config.model).glob("*.safetensors"))
    stamps = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    names = ("model", "data", "bench", "prompt", "image_dir", "instruction", "samples", "max_new_tokens",
             "max_pixels", "seed", "dtype")
    file = Path(config.bench or config.data)
    return {**{n: getattr(config, n) for n in names}, "file": checksum(file)[:16] if file.is_file() else "",
            "weights": hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]}


def rows_of(file: Path) -> list[dict]:
    """The rows of a JSONL file of ours, without one that was cut off when its writer was killed; [] where
    there is no file."""
    rows = []
    for line in file.read_text(encoding="utf-8").split("\n") if file.is_file() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def rows_on_disk(out: Path) -> dict:
    """All rows of an evaluation, finished or not, by (id, mode, sample)."""
    return {(r["id"], r["mode"], r["sample"]): r for file in (out, *parts_of(out)) for r in rows_of(file)}


def parts_of(out: Path) -> list[Path]:
    """The files that ranks write while an evaluation runs."""
    return sorted(f for f in out.parent.iterdir() if re.fullmatch(re.escape(out.name) + r"\.part\d+", f.name))


def usable_rows(out: Path, settings: dict, problems: list, config: EvalConfig) -> list[dict]:
    """The records an evaluation need not make again, judged anew (the rules may be others). ValueError where
    the file holds those of other settings."""
    saved = Path(f"{out}.config.json")
    if not saved.is_file():
        if out.exists() and out.stat().st_size:
            raise ValueError(f"--out {out}: is there already, and was not written by an evaluation")
        return []
    found, before = rows_on_disk(out), json.loads(saved.read_text())
    if found and (other := [n for n in settings if before.get(n) != settings[n]]):
        raise ValueError(f"--out {out}: holds rows made with other settings ({', '.join(other)}); "
                         "choose another file, or delete it")
    by_id, need = {p.id: p for p in problems}, {"greedy": int(config.greedy), "sample": config.samples}
    whole = {(i, mode) for i, mode, _ in found if i in by_id and need[mode]
             and all((i, mode, k) in found for k in range(need[mode]))}
    return [{**r, **judge(by_id[i], r["completion"], r["finished"], config.rules)}
            for (i, mode, _), r in found.items() if (i, mode) in whole]


# ------------------------------------------------------------------------------------------------------------
# Figures


def interval(values: list[float]) -> tuple[float, float]:
    """95 % Wilson interval of a mean of per-problem values in [0, 1]. Values between 0 and 1 (several samples
    a problem) count for more than one yes/no each: the effective number of problems is mean (1 - mean) /
    variance of the mean, which is their plain number when all are 0 or 1. Source: Wilson 1927; the correction
    is our choice."""
    n, mean = len(values), sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / n ** 2
    n = mean * (1 - mean) / variance if variance > 1e-12 else n
    z = 1.96
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k samples is right when c of n were: 1 - C(n - c, k) / C(n, k)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def summarise(records: list[dict]) -> dict:
    """Figures of some records: {name: {"mean", "low", "high"}} and n, the number of problems."""
    out = {"n": len({r["id"] for r in records})}

    def add(name, values):
        out[name] = dict(zip(("mean", "low", "high"), (sum(values) / len(values), *interval(values))))

    for mode in ("greedy", "sample"):
        by_problem = {}
        for r in records:
            if r["mode"] == mode:
                by_problem.setdefault(r["id"], []).append(r)
        if not by_problem:
            continue
        groups = list(by_problem.values())
        n = len(groups[0])
        mean = lambda key: [sum(map(key, g)) / n for g in groups]
        add("greedy" if mode == "greedy" else f"avg@{n}", mean(lambda r: r["correct"]))
        if mode == "sample":
            for k in (k for k in (2 ** j for j in range(1, 20)) if k <= n):
                add(f"pass@{k}", [pass_at_k(n, sum(r["correct"] for r in g), k) for g in groups])
        add(f"{mode} format", mean(lambda r: r["format"]))
        add(f"{mode} parse fail", mean(lambda r: r["extracted"] is None))
    return out


def report(records: list[dict]) -> str:
    """The table people read: all problems, then by group. Percent, with 95 % intervals."""
    groups = {"all": records}
    for key in dict.fromkeys(k for r in records for k in r["groups"]):
        of = lambda r: r["groups"][key] if isinstance(r["groups"][key], list) else [r["groups"][key]]
        values = sorted({v for r in records for v in of(r) if v})
        if len(values) > 1:
            groups.update({f"{key} {v}": [r for r in records if v in of(r)] for v in values})
    tables = {name: summarise(rows) for name, rows in groups.items()}
    columns = [c for c in tables["all"] if c != "n"]
    lines = [f"| {'':18} | n | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, table in tables.items():
        cells = [percent(table[c]) if c in table else "" for c in columns]
        lines.append(f"| {name:18} | {table['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def accuracies(figures: dict) -> list[str]:
    """The names of a summary's accuracies: greedy, avg@k, pass@k."""
    return [n for n in figures if n == "greedy" or n.startswith(("avg@", "pass@"))]


def percent(figure: dict) -> str:
    return f"{100 * figure['mean']:.1f} % [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"


def run(config: EvalConfig, ranks: Ranks, device, dtype):
    """The whole job, but for `--localise`."""
    left_out, bench = "", config.bench
    if bench:
        problems, left_out = load_benchmark(bench, config.prompt, config.instruction, config.image_dir,
                                            config.outside_images)
        problems = problems[:config.problems or None]
    else:
        problems = rollout.load_data(config.data, "heldout", config.problems, config.image_dir,
                                     config.instruction, config.outside_images)
    if not (config.greedy or config.samples):
        config.greedy, config.samples = True, 4
    codec = rollout.load_codec(config.model, config.max_pixels)
    for p in problems:
        rollout.encode_prompt(p, codec, config.max_prompt_tokens, pixels=False)
    default = f"runs/eval/{Path(bench).stem}-{'-'.join(Path(config.model).parts[-2:])}.jsonl" if bench else ""
    out, done = config.out or default, []
    if out:                                             # before the work, not after it
        out, settings = Path(out), settings_of(config)
        out.parent.mkdir(parents=True, exist_ok=True)
        done = usable_rows(out, settings, problems, config)
        ranks.gather([None])                            # all have read before the first one writes
        if ranks.rank == 0:
            Path(f"{out}.config.json").write_text(json.dumps(settings, indent=1))
    mine = problems[ranks.rank::ranks.world]
    ids = {p.id for p in mine}
    model = load_model(config.model, device, dtype).eval()
    with open(f"{out}.part{ranks.rank}" if out else os.devnull, "a", encoding="utf-8") as f:
        def keep(records):
            f.writelines(json.dumps(r) + "\n" for r in records)
            f.flush()

        limit = config.max_new_tokens or (256 if not bench and rollout.is_tiny(config.data) else 2048)
        records = evaluate(model, codec, mine, config.greedy, config.samples, limit, config.seed,
                           config.batch, ranks.rank == 0, config.rules,
                           [r for r in done if r["id"] in ids], keep)
    records = ranks.gather(records)
    if ranks.rank:
        return
    by_id = {p.id: p for p in problems}
    if out:
        rows = rows_on_disk(out)
        rows = {key: {**r, **judge(by_id[r["id"]], r["completion"], r["finished"], config.rules)}
                if r["id"] in by_id else r for key, r in rows.items()}
        rows.update({(r["id"], r["mode"], r["sample"]): r for r in records})
        rewrite(out, "".join(json.dumps(r) + "\n" for r in rows.values()))
        for part in parts_of(out):
            part.unlink()
    if bench:
        splits = ", ".join(sorted({p.split for p in problems}))
        print(f"{problems[0].benchmark}, split {splits}, rules {config.rules}, prompt {config.prompt}, "
              f"{len(problems)} questions{'; ' * bool(left_out)}{left_out}; {config.model}, at most {limit} "
              "tokens\n")
    print(report(records))
    for r in [r for r in records if r["mode"] == ("greedy" if config.greedy else "sample")][:config.show]:
        print("\n" + terminal.describe(model, codec, by_id[r["id"]], r))
    if out:
        print(f"\nrows: {out}")


def answer_one(config: EvalConfig, device, dtype) -> str:
    """`--image FILE --ask QUESTION`: one greedy completion, shown."""
    codec = rollout.load_codec(config.model, config.max_pixels)
    text = config.ask + ("\n" + config.instruction if config.instruction else "")
    question = "<image>" + text.replace("<image>", "< image>")
    problem = rollout.Problem("ask", question, "", [Path(config.image)])
    bad = rollout.check_problems([problem])[1]
    if bad:
        raise ValueError(f"--image {config.image}: {bad[0].rpartition(': ')[2]}")
    rollout.encode_prompt(problem, codec, config.max_prompt_tokens, pixels=False)
    model = load_model(config.model, device, dtype).eval()
    t = rollout.sample(model, [problem], codec, 1, config.max_new_tokens or 2048, 0.0)[0][0]
    return terminal.describe(model, codec, problem, judge(problem, t.text, t.finished))


def main(argv=None):
    config = parse_flags(EvalConfig, argv)
    try:
        config.validate()
        device, dtype = device_and_dtype(config.device, config.dtype)
        ranks, device = start_ranks(device)
        if config.ask and ranks.rank == 0:
            print(answer_one(config, device, dtype))
        elif config.localise and ranks.rank == 0:
            codec, model = rollout.load_codec(config.model), load_model(config.model, device, dtype).eval()
            print(localisation(model, codec, config.data, config.flawed, config.planted,
                               config.max_new_tokens or 256, config.seed, interval))
        elif not (config.ask or config.localise):
            run(config, ranks, device, dtype)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    if ranks.world > 1:
        dist.barrier()                      # no rank leaves while another still talks
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

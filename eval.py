"""Evaluation: greedy accuracy, avg@k, pass@k, format and parse-fail rates, with intervals, by group.

    python eval.py --model tiny --data tiny:steps=5 --greedy --samples 4 --out results.jsonl
    python eval.py --model Qwen/Qwen2.5-VL-3B-Instruct --bench MMStar.tsv --greedy
    torchrun --nproc_per_node 8 eval.py --model runs/x/checkpoint-000200 --bench MathVista_MINI.tsv --greedy
    python eval.py --image photo.png --ask "How many dogs are there?" --model runs/x/checkpoint-000200
    python eval.py --localise --data tiny:steps=9          # how well attribute.py finds the first wrong step

Place in the pipeline: before and after training (`train.py` calls `evaluate`). Reads from model.py,
rollout.py, reward.py, data/ and benchmarks/. The paper names no evaluation protocol; the definitions are
the field's usual ones:
  avg@k   mean accuracy of k samples at temperature 1, averaged over problems
  pass@k  chance that at least one of k samples is right, unbiased from n >= k (Chen et al., arXiv 2107.03374)
  interval  95 %, Wilson's; the k samples of a problem are not independent, so they count as one problem

Worked example: two problems with 4 samples each, 4 and 0 of them right: avg@4 = 0.5, pass@1 = 0.5, pass@4 =
0.5, and the interval is that of 1 success in 2, not of 4 in 8.
"""
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import rollout
from benchmarks.figures import report
from benchmarks.formats import PROMPTS, Item, load_benchmark
from benchmarks.localisation import localisation
from benchmarks.results import parts_of, rows_on_disk, settings_of, usable_rows
from benchmarks.rules import RULES, grade
from data import reading
from data.codec import load_codec
from data.loading import load_data
from model import load_model
from reward import answers_match, extract_answer, format_ok
from runtime.files import rewrite
from runtime.flags import parse_flags
from runtime.process import Ranks, device_and_dtype, start_ranks
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
    instruction: str = reading.INSTRUCTION  # text appended to each question of a file (may be empty)
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
        if self.localise and not reading.is_tiny(self.data):
            raise ValueError("--localise: only tiny has a step oracle")
        if self.batch < 1:
            raise ValueError(f"--batch {self.batch}: must be at least 1")


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


def run(config: EvalConfig, ranks: Ranks, device, dtype):
    """The whole job, but for `--localise`."""
    left_out, bench = "", config.bench
    if bench:
        problems, left_out = load_benchmark(bench, config.prompt, config.instruction, config.image_dir,
                                            config.outside_images)
        problems = problems[:config.problems or None]
    else:
        problems = load_data(config.data, "heldout", config.problems, config.image_dir, config.instruction,
                             config.outside_images)
    if not (config.greedy or config.samples):
        config.greedy, config.samples = True, 4
    codec = load_codec(config.model, config.max_pixels)
    for p in problems:
        rollout.encode_prompt(p, codec, config.max_prompt_tokens, pixels=False)
    default = f"runs/eval/{Path(bench).stem}-{'-'.join(Path(config.model).parts[-2:])}.jsonl" if bench else ""
    out, done = config.out or default, []
    if out:                                             # before the work, not after it
        out, settings = Path(out), settings_of(config)
        out.parent.mkdir(parents=True, exist_ok=True)
        done = usable_rows(out, settings, problems, config, judge)
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

        limit = config.max_new_tokens or (256 if not bench and reading.is_tiny(config.data) else 2048)
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


def main(argv=None):
    config = parse_flags(EvalConfig, argv)
    try:
        config.validate()
        device, dtype = device_and_dtype(config.device, config.dtype)
        ranks, device = start_ranks(device)
        if config.ask and ranks.rank == 0:
            print(terminal.ask(config, device, dtype, judge))
        elif config.localise and ranks.rank == 0:
            codec, model = load_codec(config.model), load_model(config.model, device, dtype).eval()
            print(localisation(model, codec, config.data, config.flawed, config.planted,
                               config.max_new_tokens or 256, config.seed))
        elif not (config.ask or config.localise):
            run(config, ranks, device, dtype)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    ranks.leave()


if __name__ == "__main__":
    main()

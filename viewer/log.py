"""What a training run says while it goes on: a line a step, samples, warnings, its files.

Place in the pipeline: beside it; train.py hands `Log` each step's figures and groups.
"""
import json
from pathlib import Path

from tqdm import tqdm

from runtime.files import rewrite, rows_of
from tiny import shapes
from viewer import trace
from viewer.report import Report


def line(step: int, config, m: dict) -> str:
    """One step in one line."""
    if config.stage == "sft":
        text = f"loss {m['loss']:.3f}  likely tokens {m['likely_tokens']:.3f}"
    else:
        known = lambda name, digits: "-" if m[name] is None else f"{m[name]:.{digits}f}"
        text = (f"reward {m['reward']:.3f}  accuracy {m['accuracy']:.3f}  "
                f"right/mixed/wrong {m['all_right']:.2f}/{m['mixed']:.2f}/{m['all_wrong']:.2f}  "
                f"length {m['length']:.0f}  entropy {known('entropy', 3)}  kl {known('kl_old', 5)}  "
                f"clipped {known('clip_fraction', 3)}")
        if "parents" in m:
            text += f"  repaired {m['repaired']}/{m['parents']} for {m['repair_tokens']} tokens"
    return (f"step {step}/{config.max_steps}  {text}  |grad| {m['grad_norm']:.2f}  lr {m['lr']:.1e}  "
            f"{m['seconds']:.1f} s")


def telling(groups) -> list:
    """The group to show to people: one with a rectified trajectory, else one with right and wrong ones."""
    return max(groups, key=lambda g: (any(t.provenance != "policy" for t in g),
                                      len({t.rewards["accuracy"] for t in g})))


def show(group) -> str:
    """One decoded sample: question, gold, completion, reward; on tiny, the oracle's word on each step; where
    a rollout of the group was repaired, that one with its checks and what it became."""
    y = next((t for t in group if t.provenance != "policy"), None)
    t = y.parent if y else group[0]
    lines = [f"  question  {t.problem.question!r}", f"  gold      {t.problem.answer!r}",
             f"  sampled   {t.text!r}"]
    if t.problem.oracle:
        think = t.text.partition("<think>")[2].partition("</think>")[0]
        lines.append(f"  steps     {' '.join(shapes.check_steps(t.problem, think.splitlines()))}")
    if y:
        lines.append(f"  checks    {' '.join(f'{c.same:.2f}' if c else '?' for c in t.checks)}")
        lines.append(f"  rectified {y.text!r}  ({y.provenance})")
    right = sum(x.rewards["accuracy"] for x in group)
    lines.append(f"  reward    {t.rewards}, right in the group: {right:.0f} of {len(group)}")
    return "\n".join(lines)


def warnings_of(m: dict, first: dict) -> dict:
    """What looks wrong in a step's figures, by kind, with the likely cause. first: those of the first
    step."""
    found, share = {}, lambda figures, name: f"{100 * figures[name]:.0f} %"
    if m["finished"] < 0.5:
        found["cut off"] = (f"only {share(m, 'finished')} of the rollouts end by themselves, the others earn "
                            "nothing: raise --max_new_tokens, or teach shorter answers first (--stage sft)")
    elif m["format"] < 0.5 * first["format"]:
        found["format"] = (f"the form of answers is being lost ({share(first, 'format')} -> "
                           f"{share(m, 'format')}): lower --lr or raise --format_weight")
    if m["entropy"] is not None and m["entropy"] < 0.005 and m["accuracy"] < 0.8:
        found["entropy"] = (f"entropy fell to {m['entropy']:.4f} with {share(m, 'accuracy')} right: the "
                            "rollouts of a group are the same; lower --lr, or --beta 0.01 to stay near "
                            "the start")
    if m["all_wrong"] == first["all_wrong"] == 1:
        found["all wrong"] = ("no rollout is right: problems too hard, or answers in a form the reward does "
                              "not read (see the printed samples)")
    return found


class Log:
    """The run folder's metrics.jsonl, groups.jsonl and trace.html, the terminal, and --report_to; silent but
    on the rank that leads. config: a TrainConfig."""

    def __init__(self, config, lead: bool):
        self.config, self.lead, self.first, self.warned = config, lead, None, {}
        self.report = None

    def say(self, text: str):
        if self.lead:
            tqdm.write(text)

    def file(self, name: str) -> Path:
        return Path(self.config.out) / name

    def append(self, name: str, row: dict):
        with open(self.file(name), "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def cut(self, step: int):
        """Begin, or go on from `step`: rows of later steps go."""
        for name in ("metrics.jsonl", "groups.jsonl"):
            rows = [r for r in rows_of(self.file(name)) if r["step"] <= step]
            rewrite(self.file(name), "".join(json.dumps(r) + "\n" for r in rows))
        self.report = Report(self.config, step)

    def step(self, m: dict, groups: list | None):
        """One step: its figures in a row and a line, now and then a sample, and what looks wrong."""
        if not self.lead:
            return
        c, step = self.config, m["step"]
        self.append("metrics.jsonl", m)
        self.report.write(m)
        self.say(line(step, c, m))
        if groups and c.print_every and step % c.print_every == 0:
            self.say(show(telling(groups)))
        self.first = self.first or rows_of(self.file("metrics.jsonl"))[0]
        for kind, text in (warnings_of(m, self.first) if groups else {}).items():
            if step - self.warned.get(kind, -20) >= 20:
                self.warned[kind] = step
                self.say(f"warning: {text}")

    def trace(self, step: int, groups: list | None, repairs: list | None, model, codec):
        """Now and then a group into the trace, which is written anew."""
        every = self.config.trace_every
        if not (self.lead and every and (step == 1 or step % every == 0)):
            return
        if groups:
            self.append("groups.jsonl", trace.group_record(step, telling(groups), repairs, model, codec))
        trace.write(Path(self.config.out))

    def close(self):
        if self.report:
            self.report.close()
        if self.lead and self.config.trace_every:
            trace.write(Path(self.config.out))
            self.say(f"to look at: {self.file('trace.html')}")

r"""StepGRPO, the method of R1-VL (arXiv 2503.12937), to compare with: GRPO whose reward also pays for steps.

    python experiments/stepgrpo.py --data tiny:steps=9 --out runs/stepgrpo      # any flag of train.py

Takes problems with `key_steps` (short phrases that a right chain contains; a list of them is one step said in
several ways) and train.py's flags; gives a run like train.py's. Three differences from plain GRPO:

    reward      total = accuracy + alpha * StepRAR + StepRVR, alpha 0.1
    advantage   A = (R - mean) / (std + 1e-4); and a KL to the starting model of weight 0.04 (PRESET below)
    loss        the mean over each sequence, then over sequences: every token weighs L_max / length

StepRAR is the share of key steps that the steps contain; StepRVR is 1 if steps and answer are complete and in
order. Paper and released code differ; what is taken is noted where they do. Ours: whole words are compared
(the code finds "5" in "15"), no section may be empty, sizes are bounded. Left out: the supervised warm-up.

Worked example: "<think>red 4\nblue 2</think><answer>7</answer>", gold "7", key steps ["red 4", "blue 3"]:
accuracy 1, StepRAR 1/2, StepRVR 1, total 1 + 0.1 * 0.5 + 1 = 2.05.
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from reward import declared_answer, format_ok, reward_parts  # noqa: E402

PRESET = {"algo": "grpo", "use_std": True, "beta": 0.04}        # as published; flags that are given win

MAX_TEXT = 20_000               # characters of the steps that are searched (ten times as many are read)
MAX_KEY_STEPS = 200
MAX_ALTERNATES = 10             # ways to say one key step
MAX_PHRASE = 200                # characters of one
SECTION = re.compile(r"(?m)^### (Image Description|Rationales|Step \d+|The final answer is):")
NUMBERED = re.compile(r"(?im)^[ \t]*(?:###[ \t]*)?step[ \t]+(\d+)[ \t]*:")
WORD = re.compile(r"\d+(?:[.,]\d+)+|\w+|[^\w\s]")               # 3.5 is one word, so 5 is not found in it


def read_chain(text: str) -> tuple[str, str, bool]:
    """The steps; the text whose answer counts; whether both are complete and in order. With <think> the form
    is ours, else R1-VL's."""
    text = text[:10 * MAX_TEXT]                                 # megabytes of tags take no time
    sections = [] if "<think>" in text else SECTION.split(text)[1:]
    if sections:
        return read_sections(text, sections)
    steps, closed, _ = text.partition("<think>")[2].partition("</think>")
    numbers = NUMBERED.findall(steps)
    in_order = numbers == [str(k + 1) for k in range(len(numbers))]
    return steps if closed else "", text, format_ok(text.strip()) and in_order


def read_sections(text: str, sections: list[str]) -> tuple[str, str, bool]:
    """`read_chain` of R1-VL's form: ### Image Description:, ### Rationales:, ### Step 1: and more steps, then
    ### The final answer is:. sections: name, body, name, body, ..."""
    names = sections[::2]
    bodies = [body.strip() for body in sections[1::2]]
    steps, answers = [], []
    for name, body in zip(names, bodies):
        if name.startswith("Step"):
            steps.append(body)
        elif name == "The final answer is":
            answers.append(body)
    order = ["Image Description", "Rationales"]
    order += [f"Step {k + 1}" for k in range(len(steps))]
    order += ["The final answer is"]
    valid = bool(steps) and names == order and all(bodies)
    answer = "\n".join(answers)
    tagged = text if "<answer>" in text else f"<answer>{answer}</answer>"           # for reward_parts
    return "\n".join(steps), tagged, valid


def words(text: str) -> str:
    """Lower-cased words and signs with a space around each: whole words are then plain substrings."""
    return f" {' '.join(WORD.findall(text[:MAX_TEXT].lower()))} "


def read_key_steps(key_steps) -> set[tuple[str, ...]]:
    """Each key step as the tuple of its alternates; what is malformed, empty or too long is ignored."""
    found = set()
    for alternates in key_steps[:MAX_KEY_STEPS] if isinstance(key_steps, list) else []:
        alternates = alternates[:MAX_ALTERNATES] if isinstance(alternates, list) else [alternates]
        if all(isinstance(phrase, str) for phrase in alternates):
            found.add(tuple(words(p) for p in alternates if p.strip() and len(p) <= MAX_PHRASE))
    return found - {()}


def step_rar(text: str, key_steps: list | None) -> float:
    """StepRAR: the share of key steps that the steps contain, in any order, each counted once."""
    groups = read_key_steps(key_steps)
    steps = words(read_chain(text)[0])
    hits = 0
    for alternates in groups:
        hits += any(phrase in steps for phrase in alternates)
    return hits / len(groups) if groups else 0.0


def step_rvr(text: str) -> float:
    """StepRVR: 1.0 if steps and answer are complete and in order, numbered steps 1..n, else 0.0. Background
    before the steps is in the paper, not in the code."""
    return float(read_chain(text)[2])


def step_reward_parts(text: str, gold: str, choices=None, finished=True, key_steps=None,
                      alpha: float = 0.1) -> dict:
    """{"accuracy", "format" (only logged), "rar", "rvr", "total"} of a completion. Without an answer StepRAR
    is not paid (the paper; the code pays it always). A completion that was cut off earns nothing."""
    tagged = read_chain(text)[1]
    parts = reward_parts(tagged, gold, choices, finished)
    rar, rvr = (step_rar(text, key_steps), step_rvr(text)) if finished else (0.0, 0.0)
    paid_rar = alpha * rar if declared_answer(tagged)[1] else 0.0
    return {**parts, "rar": rar, "rvr": rvr, "total": parts["accuracy"] + paid_rar + rvr}


class StepGRPO(train.Trainer):
    """train.Trainer with R1-VL's reward and its mean over each sequence."""

    def __init__(self, config: train.TrainConfig, checkpoint: Path | None = None):
        if config.algo != "grpo":
            raise ValueError(f"--algo {config.algo}: StepGRPO is grpo with another reward")
        super().__init__(config, checkpoint)

    def score(self, t) -> dict:
        p = t.problem
        return step_reward_parts(t.text, p.answer, p.choices, t.finished, p.key_steps)

    def update(self, groups, lr: float) -> dict:
        for group in groups:
            for t in group:         # the loss is divided by sequences * L_max: each sequence weighs the same
                t.weights = [self.config.max_new_tokens / len(t.ids)] * len(t.ids)
        return super().update(groups, lr)


def main(argv=None):
    train.start(argv, StepGRPO, PRESET)


if __name__ == "__main__":
    main()

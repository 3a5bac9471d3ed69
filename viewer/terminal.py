"""A completion in the terminal, step by step, each with the probability that its check repeats it.

Place in the pipeline: beside it; `eval.py --show` and `eval.py --ask` print what `describe` returns.

Worked example: a step "red 4 6" that the policy would repeat with probability 0.98 is the green line
"  1  0.98  red 4 6"; one with 0.03 is red.
"""
import os
import sys
from pathlib import Path

import attribute
import rollout
from data import reading
from data.codec import load_codec
from model import load_model

RED, GREEN, END = "\033[31m", "\033[32m", "\033[0m"


def clean(text: str) -> str:
    """Without control characters: what a model writes must not steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def describe(model, codec, problem, record: dict, colour: bool | None = None) -> str:
    """Question, steps with their checks (A1), and the answer with the verdict of `record` (what `eval.judge`
    says of a completion). colour None: where the terminal has it and NO_COLOR is not set."""
    text, answer = record["completion"], record["extracted"]
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ if colour is None else colour
    paint = lambda code, words: f"{code}{words}{END}" if colour else words
    ids = rollout.token_ids(rollout.plain(text, codec), codec)
    t = rollout.Trajectory(problem, ids, [1] * len(ids), [0.0] * len(ids), True, text)
    t.steps = attribute.split_steps(ids, codec)
    attribute.Locator(model, codec)([t])
    question = problem.question if isinstance(problem.question, str) else problem.question[-1]
    lines = [f"question  {clean(question.replace('<image>', '')).strip()}"]
    lines += [f"gold      {problem.answer}"] if problem.answer else []
    for n, (s, c) in enumerate(zip(t.steps, t.checks or []), start=1):
        lines.append(paint(RED if c.doubted else GREEN, f"{n:3}  {c.same:.2f}  {clean(s.text)}"))
    if not t.steps:
        lines.append(clean(text))
    verdict = paint(GREEN, "right") if record["correct"] else paint(RED, "wrong")
    found = "none" if answer is None else clean(answer)
    return "\n".join([*lines, f"answer    {found}" + (f"  ({verdict})" if problem.answer else "")])


def ask(config, device, dtype, judge) -> str:
    """`eval.py --image FILE --ask QUESTION`: one greedy completion, shown. config: an EvalConfig; judge: its
    judge of completions."""
    codec = load_codec(config.model, config.max_pixels)
    text = config.ask + ("\n" + config.instruction if config.instruction else "")
    question = "<image>" + text.replace("<image>", "< image>")
    problem = reading.Problem("ask", question, "", [Path(config.image)])
    bad = reading.check_problems([problem])[1]
    if bad:
        raise ValueError(f"--image {config.image}: {bad[0].rpartition(': ')[2]}")
    rollout.encode_prompt(problem, codec, config.max_prompt_tokens, pixels=False)
    model = load_model(config.model, device, dtype).eval()
    t = rollout.sample(model, [problem], codec, 1, config.max_new_tokens or 2048, 0.0)[0][0]
    return describe(model, codec, problem, judge(problem, t.text, t.finished))

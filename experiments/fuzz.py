"""Hostile model output through everything that reads it: no exception, nothing slow, no control token in a
prompt.

    python experiments/fuzz.py --count 500000          # about half an hour on one core
    python experiments/fuzz.py --count 2000 --seed 1

Completions are mutations of real ones and of hostile pieces (nested tags, right-to-left and zero-width
characters, control tokens, megabyte lines, power towers, code). Each goes through extraction, matching, both
rewards, segmentation and screening; its steps go into the prompts of the check and of the second look, which
must hold the same control tokens as with a harmless step. Every 2,000th is also located and traced with the
tiny model. A call that takes more than 50 ms of processor time is named, and the exit status is 1.
"""
import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import attribute  # noqa: E402
import rereason  # noqa: E402
import reward  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402
from data.codec import load_codec  # noqa: E402
from model import load_model  # noqa: E402
from test_all import EXTRACT, HOSTILE, fields, match_rows  # noqa: E402
from tiny import shapes  # noqa: E402
from viewer import trace  # noqa: E402

LIMIT = 0.05                        # seconds a call may take
PIECES = ["<think>", "</think>", "<answer>", "</answer>", "<answer><answer>", "</answer></answer>",
          "\\frac", "{", "}", "(", ")", "^", "\\boxed{", "\\boxed{" * 20, "9" * 40, ",", "=", "\\sqrt", "π",
          "½", "\u202e", "\u200b", "\u2066", "\ufeff", "\0", "\ud7ff", " and ", "-", "**", "(A)", "\n",
          "\r\n", "%", "°", "|", "√", "1e9", "9^9^9^9^9", "2**2**2**2**99",
          "__import__('os').system('true')", "eval(input())", "```python\n", "$$", "<|im_start|>",
          "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|endoftext|>", "<image>", "<img src=x>",
          "</script><script>alert(1)</script>", "Step 1: ", "### Step 2\n",
          "Let me look at the image again. ", attribute.CHECK, attribute.SLOT]


def mutate(text: str, pool: list, rng: random.Random) -> str:
    """A few random edits; now and then a megabyte of one character."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        text = rng.choice((text[:at] + rng.choice(PIECES) + text[at:],
                           text[:at] + text[at + rng.randint(1, 9):],
                           text[:at] + rng.choice(pool)[:200] + text[at:], text[at:] + text[:at],
                           text[:at] + text[max(0, at - 5):at] * rng.randint(1, 30) + text[at:],
                           text[:at] + rng.choice(PIECES) * rng.randint(2, 50) + text[at:]))[:6000]
    if rng.random() < 0.001:
        much = rng.choice(["9", "(", "a ", "\n", "<think>", "\u202e", "9,", "^9"]) * 500_000
        text = text[:50] + much + text[50:]
    return text


class Clock:
    """Runs calls and remembers the slow ones."""

    def __init__(self):
        self.slow, self.slowest = [], {}

    def __call__(self, name: str, function, *args):
        spent = LIMIT
        for _ in range(2):              # a slow one again: a pause of the interpreter does not count
            if spent >= LIMIT:
                start = time.thread_time()
                found = function(*args)
                spent = time.thread_time() - start
        self.slowest[name] = max(self.slowest.get(name, 0.0), spent)
        if spent > LIMIT:
            self.slow.append(name)
            print(f"slow: {name}, {1000 * spent:.0f} ms: {[str(a)[:80] for a in args]}", flush=True)
        return found


def read(text: str, other: str, clock: Clock):
    """The readers of answers."""
    clock("extract_answer", reward.extract_answer, text)
    clock("extract_answer, options", reward.extract_answer, text, ["red", "1/2", "B"])
    clock("answers_match", reward.answers_match, text, other)
    clock("answers_match, options", reward.answers_match, other, text, ["1", "2", "x"])
    clock("reward", reward.reward_parts, text, other, None, True, 0.1)
    clock("step reward", reward.step_reward_parts, text, other, None, True, ["red 3", "blue 4 5"])


def controls(problem, codec) -> list:
    """The control tokens of a prompt, in order."""
    special = set(codec.tokenizer.all_special_ids)
    return [i for i in rollout.encode_prompt(problem, codec, pixels=False).ids if i in special]


def prompts_with(problem, said: str, text: str) -> tuple:
    """The problems whose prompts hold a step: the second look and the check."""
    return (rereason.relook_problem(problem, said, text),
            replace(problem, question=problem.question + attribute.CHECK + text))


def locate(t, codec, clock: Clock, rng: random.Random, harmless: list):
    """Segmentation and screening, and the prompts that a step of this completion gets into. harmless: the
    control tokens of those prompts with a harmless step."""
    t.steps = clock("split_steps", attribute.split_steps, t.ids, codec)
    assert all(0 <= s.start < s.stop <= len(t.ids) and s.text for s in t.steps)
    assert all(a.stop <= b.start for a, b in zip(t.steps, t.steps[1:]))
    t.rewards = {"accuracy": 0.0, "format": 0.0, "total": 0.0}
    clock("flawed", attribute.flawed, [t])
    if not t.steps:
        return
    k = rng.randrange(len(t.steps))
    said, text = codec.tokenizer.decode(t.ids[:t.steps[k].start]), t.steps[k].text
    clock("may_look", rereason.may_look, t, said)
    clock("new_step", rereason.new_step, t.ids[t.steps[k].start:], False, codec)
    look, check = prompts_with(t.problem, said, text)
    assert controls(look, codec) == harmless[0], text
    if "<image>" not in text:                       # pristine_check asks with a slot, which no step can fill
        assert controls(check, codec) == harmless[1], text


def traced(group: list, model, codec, folder: Path):
    """Locate and trace a group with the model; the page must hold no markup of it."""
    attribute.Locator(model, codec)([t for t in group if len(t.steps) > 1])
    record = trace.group_record(1, group, [], model, codec)
    (folder / "groups.jsonl").write_text(json.dumps(record) + "\n")
    trace.write(folder)
    page = (folder / "trace.html").read_text()
    data = page[page.index('id="data">') + 10:]
    assert "<" not in data[:data.index("</script>")]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="completions")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    args = parser.parse_args(argv)
    rng, clock = random.Random(args.seed), Clock()
    model, codec = load_model(ROOT / "tiny").eval(), load_codec(str(ROOT / "tiny"))
    problems = [shapes.make_problem(kind, 4, index=n) for kind in shapes.KINDS for n in range(5)]
    harmless = [[controls(p, codec) for p in prompts_with(problem, "", "x")] for problem in problems]
    real = [shapes.demonstrate(p, (0.3, 0.3), rng) for p in problems for _ in range(5)]
    hostile = [p for p, _, _ in map(fields, match_rows())] + [t for t, _ in EXTRACT] + HOSTILE
    pool, group = real * 3 + [text[:3000] for text in hostile], []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(asdict(train.TrainConfig())))
        for n in range(args.count):
            text, at = mutate(rng.choice(pool), pool, rng), rng.randrange(len(problems))
            read(text, rng.choice(pool)[:500], clock)
            clean = text[:8000].encode("utf-8", "replace").decode()     # a tokenizer writes no lone surrogate
            ids = rollout.token_ids(clean, codec)[:1500] or [codec.eos_ids[0]]
            t = rollout.Trajectory(problems[at], ids, [1] * len(ids), [-1.0] * len(ids), True,
                                   codec.tokenizer.decode(ids))
            locate(t, codec, clock, rng, harmless[at])
            if n % 2000 < 4:
                group.append(replace(t, problem=problems[0]))
            if len(group) == 4:
                traced(group, model, codec, Path(folder))
                group = []
            if n % 20_000 == 19_999:
                print(f"{n + 1} completions, {len(clock.slow)} slow calls", flush=True)
    print(f"{args.count} completions, no exception, {len(clock.slow)} calls over {1000 * LIMIT:.0f} ms; "
          "slowest: " + ", ".join(f"{name} {1000 * spent:.1f} ms" for name, spent in clock.slowest.items()))
    sys.exit(1 if clock.slow else 0)


if __name__ == "__main__":
    main()

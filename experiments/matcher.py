"""The answer matcher on pairs with known verdicts, and against math-verify.

    python experiments/matcher.py --pairs answer_pairs.tsv       # right, slowest, disagreements

A line of the pairs file: prediction, gold, true or false, note, separated by tabs; \\t, \\n, \\\\ and runs
\\R<times>:<text>\\E are escapes. The note holds stage=match (the prediction is an extracted answer), e2e (a
whole response) or mcq (the gold is a letter, choices=<JSON> ends the note); flag=contested where tools
disagree.
math-verify is asked only where it is installed (pip install math-verify). Without --pairs, the cases of
test_all.py are taken.
"""
import argparse
import json
import logging
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from reward import answers_match, extract_answer  # noqa: E402
from test_all import fields, match_rows  # noqa: E402


def unescape(text: str) -> str:
    def one(m):
        if m[1]:
            return unescape(m[2]) * int(m[1])
        return {"t": "\t", "n": "\n", "r": "\r", "0": "\0", "b": "\b"}.get(m[3], m[3])
    return re.sub(r"\\(?:R(\d+):((?:[^\\]|\\\\)*)\\E|(.))", one, text)


def read_pairs(path: str) -> list[dict]:
    """[{"prediction", "gold", "right", "stage", "choices", "contested"}]"""
    if not path:
        return [{"prediction": p, "gold": g, "right": r, "stage": "match", "choices": None,
                 "contested": False} for p, g, r in map(fields, match_rows())]
    pairs = []
    for line in Path(path).read_bytes().decode("utf-8").split("\n"):
        if line:
            prediction, gold, verdict, note = map(unescape, line.split("\t"))
            choices = note.partition("choices=")[2]
            pairs.append({"prediction": prediction, "gold": gold, "right": verdict == "true",
                          "stage": re.search(r"stage=(\w+)", note)[1], "contested": "flag=contested" in note,
                          "choices": json.loads(choices) if choices else None})
    return pairs


def ours(pair: dict) -> bool:
    p, choices = pair["prediction"], pair["choices"]
    found = p if pair["stage"] == "match" else extract_answer(p, choices)
    return answers_match(found, pair["gold"], choices)


def theirs(pair: dict) -> bool:
    """math-verify as it is meant to be called: both sides in a box, whole responses as they are."""
    from math_verify import StringExtractionConfig, parse, verify
    p, gold = pair["prediction"], pair["gold"]
    try:
        if pair["choices"]:
            config = [StringExtractionConfig(tuple("ABCDEFGHIJ"))]
            return bool(verify(parse(gold, config), parse(p, config)))
        boxed = p if pair["stage"] == "e2e" else f"\\boxed{{{p}}}"
        return bool(verify(parse(f"\\boxed{{{gold}}}"), parse(boxed)))
    except Exception:                                                   # it raises on some hostile texts
        return False


def compare(pairs: list[dict]):
    try:
        import math_verify  # noqa: F401
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)     # it logs whole hostile texts
        tools = {"ours": ours, "math-verify": theirs}
    except ImportError:
        tools = {"ours": ours}
    verdicts, slowest = {}, {}
    for name, tool in tools.items():
        verdicts[name], slowest[name] = [], 0.0
        for pair in pairs:
            started = time.perf_counter()
            verdicts[name].append(tool(pair))
            slowest[name] = max(slowest[name], time.perf_counter() - started)
    clear = [n for n, p in enumerate(pairs) if not p["contested"]]
    stages = sorted({p["stage"] for p in pairs})
    print("| tool | " + " | ".join(stages) + " | all, not contested | wrongly right | slowest pair |")
    print("|---" * (len(stages) + 4) + "|")
    for name in tools:
        right = lambda ns: f"{sum(verdicts[name][n] == pairs[n]['right'] for n in ns)} of {len(ns)}"
        cells = [right([n for n in clear if pairs[n]["stage"] == s]) for s in stages] + [right(clear)]
        false = sum(verdicts[name][n] and not pairs[n]["right"] for n in clear)
        print(f"| {name} | " + " | ".join(cells) + f" | {false} | {1000 * slowest[name]:.1f} ms |")
    if len(tools) > 1:
        print("\nWhere they disagree (prediction, gold; what is right, ours, math-verify):")
    for n, p in enumerate(pairs):
        found = [verdicts[name][n] for name in tools]
        if len(set(found)) > 1 or (n in clear and found[0] != p["right"]):
            contested = "  contested" if p["contested"] else ""
            print(f"  {p['prediction'][:60]!r}  {p['gold'][:40]!r}  {p['right']}  {found}{contested}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="", help="pairs with verdicts")
    compare(read_pairs(parser.parse_args().pairs))


if __name__ == "__main__":
    main()

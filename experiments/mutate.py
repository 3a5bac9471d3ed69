"""Do the tests notice? Small faults are planted in the method's files, one at a time, and the tests run.

    python experiments/mutate.py --mutants 200 --jobs 2 --out experiments/results/mutants.json

A mutant has one operator swapped (SWAPS), one `not` dropped or one whole number raised by one. The tests of
the file's own sections of test_all.py run first, then the others, until one fails; not those that start
processes, which take long. A stopped study continues where it stopped; --again tries survivors once more.
"""
import argparse
import ast
import contextlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAMPLER = ("sample prefill prefill_prompts make_trajectory next_token uniforms completion_hidden "
           "token_logps completion_logps pad token_batches").split()
FILES = {"grpo.py": (), "attribute.py": (), "rereason.py": (), "reward.py": (), "rollout.py": SAMPLER}
SWAPS = {"+": "-", "*": "/", "<": "<=", ">": ">=", "==": "!=", "and": "or", "min": "max", "any": "all"}
SWAPS |= {new: old for old, new in SWAPS.items()} | {"in": "not in", "not": ""}


def faults(file: str) -> dict:
    """All mutants of a file: {where and what: the mutated source}."""
    lines, found, allowed = (ROOT / file).read_text().splitlines(keepends=True), {}, set()
    for top in ast.parse("".join(lines)).body:
        if not FILES[file] or getattr(top, "name", "") in FILES[file]:
            allowed.update(range(top.lineno, top.end_lineno + 1))
    tokens = list(tokenize.generate_tokens(iter(lines).__next__))
    for before, token, after in zip(tokens, tokens[1:], tokens[2:]):
        (line, start), (_, stop), new = token.start, token.end, SWAPS.get(token.string)
        if token.type == tokenize.NUMBER and token.string.isdecimal():
            new = str(int(token.string) + 1)
        joins_text = token.string == "+" and tokenize.STRING in (before.type, after.type)
        if new is None or line not in allowed or joins_text:
            continue
        text = lines[line - 1]
        mutated = "".join([*lines[:line - 1], text[:start] + new + text[stop:], *lines[line:]])
        with contextlib.suppress(SyntaxError):                  # the "in" of a for, the "*" of *rows
            ast.parse(mutated)
            found[f"{file}:{line}:{start}  {token.string} -> {new}  in {text.strip()[:60]}"] = mutated
    return found


def tests_for(file: str) -> list[str]:
    """All tests but those that start processes, also by a helper; the file's own sections first."""
    functions, own, others, names = {}, [], [], []
    for part in re.split(r"\n(?=def |# ---- )", (ROOT / "test_all.py").read_text()):
        if heading := re.match(r"# ---- (\S+\.py)", part):
            names = own if heading[1] == file else others
        elif function := re.match(r"def (\w+)", part):
            functions[function[1]] = part
            names.append(function[1])
    starters = ["subprocess", "fork", "Popen"]
    for word in starters:                                       # the list grows by those that use one
        starters += [f for f in functions if f not in starters and re.search(rf"\b{word}\b", functions[f])]
    return [test for test in own + others if test.startswith("test_") and test not in starters]


def noticed(file: str, source: str) -> str:
    """The first test that fails on a mutant or takes too long (code 124), "" where all pass."""
    code = "import test_all\n"
    for test in tests_for(file):
        code += f"print('\\n{test}', flush=True)\ntest_all.{test}()\n"
    command = ["env", "OMP_NUM_THREADS=1", "HF_HUB_OFFLINE=1", "timeout", "900", sys.executable, "-c", code]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns("runs", ".git", "__pycache__"))
        (folder / file).write_text(source)
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    begun = ["import", *re.findall(r"^test_\w+$", done.stdout, re.M)]
    return f"{begun[-1]}, code {done.returncode}" if done.returncode else ""


def main():
    parser = argparse.ArgumentParser(description="Do the tests notice small faults?")
    parser.add_argument("--files", nargs="*", default=FILES, choices=FILES, help="where to plant faults")
    parser.add_argument("--mutants", type=int, default=200, help="how many, spread evenly over the files")
    parser.add_argument("--jobs", type=int, default=2, help="mutants tested at a time")
    parser.add_argument("--again", action="store_true", help="try survivors again")
    parser.add_argument("--out", type=Path, required=True, help="JSON: what noticed each mutant; resumed")
    args, mutants = parser.parse_args(), {}
    for file in args.files:
        found = faults(file)
        for name in random.Random(0).sample(list(found), min(len(found), args.mutants // len(args.files))):
            mutants[name] = file, found[name]
    saved = json.loads(args.out.read_text()) if args.out.is_file() else {}
    fates = {name: by for name, by in saved.items() if name in mutants and (by or not args.again)}
    todo = sorted(set(mutants) - set(fates))
    if failing := todo and noticed("grpo.py", (ROOT / "grpo.py").read_text()):
        sys.exit(f"error: without any fault the tests end in {failing}")
    with ThreadPoolExecutor(args.jobs) as pool:
        for name, by in zip(todo, pool.map(lambda name: noticed(*mutants[name]), todo)):
            fates[name] = by
            print(f"{len(fates):4}  {name}  {'noticed by ' + by if by else 'SURVIVES'}", flush=True)
            args.out.write_text(json.dumps(fates, indent=0) + "\n")
    survivors = [name for name, by in fates.items() if not by]
    print(f"{len(fates) - len(survivors)} of {len(fates)} noticed; survivors:", *survivors, sep="\n")


if __name__ == "__main__":
    main()

"""Do the tests notice? Small faults are planted in the method's files, one at a time, and the tests run.

    python experiments/mutate.py --mutants 200 --jobs 2 --out experiments/results/mutants.json
    python experiments/mutate.py --files grpo.py --mutants 20

A mutant has one operator swapped (+ and -, * and /, < and <=, == and !=, and and or, min and max), one sign
dropped or one whole number raised by one. The tests of the file's own section of test_all.py run first, then
the others, until one fails; those that start processes are left out, they would take most of the time. A
mutant that hangs is noticed too. Survivors are printed with file and line, to be killed by a new test or
explained. A stopped study goes on where it stopped.
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
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAMPLER = ("sample", "prefill", "trajectory", "prompt_rows", "next_token", "uniforms", "completion_hidden",
           "completion_logps", "pad", "chunks")
FILES = {"grpo.py": None, "attribute.py": None, "rereason.py": None, "reward.py": None,
         "answers/equal.py": None, "rollout.py": SAMPLER}
SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Lt: ast.LtE,
         ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
         ast.And: ast.Or, ast.Or: ast.And, ast.In: ast.NotIn, ast.NotIn: ast.In}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">",
         ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.And: "and", ast.Or: "or", ast.In: "in",
         ast.NotIn: "not in"}


def places(tree, functions) -> list:
    """(node, how) of every fault that can be planted: "swap", "name", "sign", "number"."""
    found = []
    for top in tree.body:
        if functions and getattr(top, "name", "") not in functions:
            continue
        for node in ast.walk(top):
            is_text = lambda n: isinstance(n, ast.JoinedStr) or (isinstance(n, ast.Constant)
                                                                  and isinstance(n.value, str))
            if isinstance(node, ast.BinOp) and type(node.op) in SWAPS and not (
                    is_text(node.left) or is_text(node.right)):
                found.append((node, "swap"))
            elif isinstance(node, ast.BoolOp) or (isinstance(node, ast.Compare)
                                                  and type(node.ops[0]) in SWAPS):
                found.append((node, "swap"))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
                found.append((node, "name"))
            elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
                found.append((node, "sign"))
            elif isinstance(node, ast.Constant) and type(node.value) is int:
                found.append((node, "number"))
    return found


def mutant(source: str, functions, n: int) -> tuple[int, str, str]:
    """(line, what was done, the source with the n-th fault)."""
    tree = ast.parse(source)
    node, how = places(tree, functions)[n]
    before = ast.unparse(node)
    if how == "swap":
        op = node.ops[0] if isinstance(node, ast.Compare) else node.op
        new = SWAPS[type(op)]()
        if isinstance(node, ast.Compare):
            node.ops[0] = new
        else:
            node.op = new
        what = f"{SIGNS[type(op)]} -> {SIGNS[type(new)]}"
    elif how == "name":
        what = f"{node.func.id} -> {NAMES[node.func.id]}"
        node.func.id = NAMES[node.func.id]
    elif how == "sign":
        what = "sign or not dropped"
        node.op = ast.UAdd() if isinstance(node.op, ast.USub) else ast.Not()
        if isinstance(node.op, ast.Not):
            node.operand = ast.UnaryOp(ast.Not(), node.operand)
    else:
        what = f"{node.value} -> {node.value + 1}"
        node.value += 1
    return node.lineno, f"{what} in {before[:60]}", planted(source, node, tree)


def planted(source: str, node, tree) -> str:
    """The source with the changed node in its place and all else, lines and comments, as it was; where that
    is not possible (within an f-string), the whole tree written anew."""
    lines = source.encode().split(b"\n")                       # columns count bytes
    first, last = lines[node.lineno - 1], lines[node.end_lineno - 1]
    text = ("(" + ast.unparse(node) + "\n" * (node.end_lineno - node.lineno) + ")").encode()
    lines[node.lineno - 1:node.end_lineno] = (first[:node.col_offset] + text
                                              + last[node.end_col_offset:]).split(b"\n")
    with contextlib.suppress(SyntaxError):
        new = b"\n".join(lines).decode()
        if ast.dump(ast.parse(new)) == ast.dump(ast.parse(ast.unparse(tree))):
            return new
    return ast.unparse(tree)


def tests_for(name: str) -> list[str]:
    """All tests but those that start processes, the file's own section first."""
    sections, now = {}, ""
    for part in re.split(r"\n(?=def |# )", (ROOT / "test_all.py").read_text()):
        if m := re.match(r"# ([a-z_]+\.py|[a-z]+/.*)", part):
            now = m[1]
        elif (m := re.match(r"def (test_\w+)\(", part)) and not re.search("subprocess|torchrun|kills", part):
            sections.setdefault(now, []).append(m[1])
    own = sections.get("reward.py" if name == "answers/equal.py" else name, [])
    return own + [t for s, tests in sections.items() if s in FILES and s != name for t in tests] + [
        t for s, tests in sections.items() if s not in FILES for t in tests]


def noticed(folder: Path, name: str, source: str, seconds: int) -> str:
    """The first test that fails on a mutant, "it hangs", or "" where all pass."""
    original = (folder / name).read_text()
    (folder / name).write_text(source)
    code = ("import contextlib, io, sys, test_all\n"
            f"for name in {tests_for(name)!r}:\n"
            "    print(name, flush=True)\n"
            "    with contextlib.redirect_stdout(io.StringIO()):\n"
            "        getattr(test_all, name)()\n")
    try:
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                              timeout=seconds)
        last = done.stdout.split()[-1:] or ["import"]
        return last[0] if done.returncode else ""
    except subprocess.TimeoutExpired:
        return "it hangs"
    finally:
        (folder / name).write_text(original)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="*", default=list(FILES), help="where to plant faults")
    parser.add_argument("--mutants", type=int, default=200, help="how many, spread evenly over the files")
    parser.add_argument("--jobs", type=int, default=2, help="mutants tested at a time")
    parser.add_argument("--seconds", type=int, default=600, help="a mutant's tests hang after so long")
    parser.add_argument("--out", default="", help="JSON file with every mutant's fate, resumed where it is")
    args = parser.parse_args()
    out = Path(args.out) if args.out else None
    rows = json.loads(out.read_text()) if out and out.is_file() else []
    todo, rng = [], random.Random(0)
    for name in args.files:
        source = (ROOT / name).read_text()
        count = len(places(ast.parse(source), FILES[name]))
        for n in sorted(rng.sample(range(count), min(count, args.mutants // len(args.files)))):
            line, what, mutated = mutant(source, FILES[name], n)
            if not any((r["file"], r["line"], r["what"]) == (name, line, what) for r in rows):
                todo.append((name, line, what, mutated))
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.jobs) as pool:
        folders = [Path(scratch) / str(j) for j in range(args.jobs)]
        for folder in folders:
            shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns("runs", ".git", "__pycache__"))

        def one(task):
            name, line, what, source = task
            folder = folders.pop()
            try:
                return {"file": name, "line": line, "what": what,
                        "by": noticed(folder, name, source, args.seconds)}
            finally:
                folders.append(folder)

        for future in as_completed([pool.submit(one, task) for task in todo]):
            r = future.result()
            rows.append(r)
            print(f"{len(rows):4}  {r['file']}:{r['line']}  {r['what']}  "
                  f"{'noticed by ' + r['by'] if r['by'] else 'SURVIVES'}", flush=True)
            if out:
                out.parent.mkdir(parents=True, exist_ok=True)
                rows.sort(key=lambda r: (r["file"], r["line"]))
                out.write_text(json.dumps(rows, indent=0) + "\n")
    survivors = [r for r in rows if not r["by"]]
    print(f"{len(rows) - len(survivors)} of {len(rows)} noticed")
    for r in survivors:
        print(f"survives: {r['file']}:{r['line']}  {r['what']}")


if __name__ == "__main__":
    main()

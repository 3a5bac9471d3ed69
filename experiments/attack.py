"""An attack: hostile and careless flags, files, folders and texts, and runs that are killed.

    python experiments/attack.py                # the areas that results/attack.json lacks; all: 20 minutes
    python experiments/attack.py --areas flags rows --again

Takes: the tiny model. Gives: a table of areas and experiments/results/attack.json, written after each area. A
case fails with a traceback, after 10 seconds, with a message that names neither file nor flag, where a
foreign byte is changed, a weight on disk is not finite, or a control character reaches the terminal. Most put
each field of a file, or each flag, over a list of bad values, in this process, in temporary folders. Left
out: full disks, which test_all.py has.

Worked example: {"answer": NaN} in a row of --data is one case of "rows"; the message "data.jsonl:1: field
'answer' is empty or not text" names file, line and field, so it does not fail.
"""
import argparse
import contextlib
import copy
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval as evaluation  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402
from experiments import trace  # noqa: E402
from experiments.tables import RESULTS, attack as table  # noqa: E402
from model import add_lora, load_model, save_model  # noqa: E402

FILE, TINY, ABSENT = RESULTS / "attack.json", ROOT / "tiny", object()
BAD = (ABSENT, None, "x", [], {}, 0, -1, 10 ** 9, float("nan"), 10 ** 40)
BAD_WORDS = ("nan", "inf", "-inf", "-1", "0", "1e9", "1" + "0" * 30, "", "x", "1e400", "0x10", "\ud800")
BAD_TEXTS = ("", "x", "no/such", "../..", "a" * 3000, "tiny:", "a\x1b[31m", "a\0")
BAD_FILES = ("", "{", "[]", "3", '"x"', "[" * 99_999, '{"a": ' + "9" * 5000, "\xff\xfe", "null", "\x1b[31m")
CONTROLS = ("\x1b[31m", "\x1b]0;t\x07", "\x08", "\r", "\x7f", "\x9b31m", "\u202e", "\u2028", "\u200f")
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = (LOOP, "{{ 1 / 0 }}", "{{ x.y.z }}", "{% if %}", "{{ raise_exception(1) }}", "x" * 200_000, "x",
             "{{ ''.__class__.__mro__ }}", "{{ messages[9] }}", "{% include '/etc/passwd' %}", "{%" * 40_000,
             "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "\x1b[31m", "{{ cycler.__init__.x }}",
             "{{ messages | tojson }}", "{{ 9 ** 9 ** 9 }}", 3, [], {}, None)
HOSTILE = ("\ud800", "\x1b[31m", "9" * 1000, 10 ** 1000, "1e999", "a" * 10 ** 6, "\\boxed{" * 999, "(" * 5000,
           True, {"a": {}}, [[]], "\0", "<image>" * 99, "<|image_pad|>", "../../x", "file:///x", "2^2^2^2^9")
SMALL = (f"--model {TINY} --data tiny:steps=2,kinds=tiles --max_steps 1 --batch 2 --group_size 2 "
         "--max_new_tokens 24 --eval_problems 0 --device cpu").split()
EVAL = f"--model {TINY} --greedy --max_new_tokens 4 --device cpu".split()


class Hang(BaseException):
    """A case took longer than it may."""


def fault_of(case, folder: Path, foreign=(), seconds: float = 10) -> str:
    """What is wrong with the outcome of case(), "" if nothing is."""
    def late(*_):
        raise Hang

    before, said, message = [file.read_bytes() for file in foreign], io.StringIO(), ""
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            case()
    except SystemExit as e:
        message = said.getvalue().strip().rpartition("\n")[2] if e.code == 2 else str(e.code)
    except (ValueError, OSError) as e:                      # train.py and eval.py make one line of these
        message = rollout.escaped(e)
    except Hang:
        return f"longer than {seconds} seconds"
    except BaseException as e:
        return f"{type(e).__name__}: {e}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    named = re.search(rf"--\w|{re.escape(str(folder))}|\w\.json|\[Errno \d+\] [^:]+: '", message)
    if message and not named:
        return f"names neither file nor flag: {message[:300]}"
    shown = said.getvalue().replace("\r", "") + message
    if not rollout.escaped(shown, "\n\t\xa0") == shown:
        return f"control character in {shown[-300:]!r}"
    for file, data in zip(foreign, before):
        if not file.is_file() or file.read_bytes() != data:
            return f"{file.name} was changed"
    for file in set(folder.rglob("*checkpoint-*/*.safetensors")) - set(foreign):
        with contextlib.suppress(SafetensorError):
            if not all(tensor.isfinite().all() for tensor in load_file(file).values()):
                return f"{file} holds numbers that are not finite"
    return ""


def mutants(value, name: str = ""):
    """(label, the JSON value with one field, at any depth, over all bad values)."""
    for key in list(value) if isinstance(value, dict) else range(min(3, len(value))):
        changes = [(f"{name}{key}={'absent' if bad is ABSENT else repr(bad)}", bad) for bad in BAD]
        if isinstance(value[key], (dict, list)) and len(value[key]) < 200:              # not a vocabulary
            changes += mutants(value[key], f"{name}{key}.")
        for label, bad in changes:
            changed = copy.copy(value)
            if bad is ABSENT:
                del changed[key]
            else:
                changed[key] = bad
            yield label, changed


def edits(file: Path, prepare=lambda: None):
    """Write a JSON file with each of its mutants and each bad text, after prepare() -> what it holds now."""
    whole = json.loads(file.read_text())
    changes = [(label, json.dumps(changed) + "\n") for label, changed in mutants(whole)]
    for label, text in [*changes, *zip(BAD_FILES, BAD_FILES)]:
        prepare()
        file.write_bytes(text.encode("latin-1"))
        yield f"{file.name} {label:.60}"


def remove(place: Path):
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def plant(kind: str, place: Path) -> list[Path]:
    """Put something foreign at a place -> the files that must stay as they are."""
    mine = place.parent.parent / "mine"
    mine.mkdir(exist_ok=True)
    (mine / "mine.txt").write_text('{"model_type": "mine"}')
    remove(place)
    if kind == "text":
        place.write_text("mine")
    elif kind == "json":
        shutil.copy(mine / "mine.txt", place)
    elif kind == "folder":
        shutil.copytree(mine, place)
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        place.symlink_to(mine if kind == "link to a folder" else mine / "mine.txt")
    kept = [mine / "mine.txt", place / "mine.txt"] if kind == "folder" else [mine / "mine.txt"]
    return [*kept, place] if kind in ("text", "json") else kept


def start(*flags):
    train.start([*SMALL, *map(str, flags)])


# ---- Areas: each yields (name, case, files that must stay as they are)

def flags(folder):
    """Every flag over bad words; texts and the bounds of numbers also in a run of a step."""
    for config_class in (train.TrainConfig, evaluation.EvalConfig):
        for f in fields(config_class):
            for word in BAD_WORDS if f.type is not bool else ():
                argv = [f"--{f.name}={word}"]
                yield argv[0], lambda c=config_class, a=argv: train.parse_flags(c, a), ()
    for f in fields(train.TrainConfig):
        bounds = evaluation.BOUNDS.get(f.name, (0, 10)) if f.type is float else ()
        for word in BAD_TEXTS if f.type is str else bounds:
            remove(folder / "run")
            yield f"run {f.name} {word!r:.20}", lambda: start(f"--out={folder}/run", f"--{f.name}={word}"), ()
    for words in ("--stage sft --beta 1", "--algo grpo --reader x", "--erosion_first 1", "--eval_every 1",
                  "--resume x --out y", "--batch 999999 --max_new_tokens 99999"):
        yield words, lambda: start(*words.split()), ()


def model_folder(folder: Path) -> Path:
    shutil.copytree(TINY, folder / "model", ignore=shutil.ignore_patterns("*.py", "__*"), dirs_exist_ok=True)
    return folder / "model"


def models(folder):
    """Every field of every file of a model folder; then tensors, shards and templates."""
    def use():
        codec, net = rollout.load_codec(str(bad)), load_model(bad).eval()
        problem = rollout.Problem("p", "<image>red?", "1", [Image.new("RGB", (56, 56))], where=f"{folder}")
        rollout.sample(net, [problem], codec, 1, 2)

    bad, kinds = model_folder(folder), (torch.int8, torch.bool, torch.float8_e4m3fn, torch.half, torch.double)
    for name in ("config.json", "preprocessor_config.json", "generation_config.json", "tokenizer_config.json",
                 "tokenizer.json"):
        for label in edits(bad / name):
            yield label, use, ()
        for kind in ("fifo", "folder", "link"):
            yield f"{name} is a {kind}", use, plant(kind, bad / name)
        remove(bad / name)
        yield f"{name} is missing", use, ()
        model_folder(folder)
    tensors, file = load_file(bad / "model.safetensors"), bad / "model.safetensors"
    for name in list(tensors)[::4]:
        changes = [(kind, tensors[name].to(kind)) for kind in kinds]
        changes += [("nan", tensors[name] * float("nan")), ("cut", tensors[name][:1].clone())]
        for kind in (torch.half, torch.bfloat16, torch.double):
            changes.append((f"inf {kind}", (tensors[name] * float("inf")).to(kind)))
        for label, tensor in changes:
            save_file({**tensors, name: tensor}, file)
            yield f"{name}: {label}", use, ()
    save_file(tensors, file)
    for value in (None, {}, [], 3, "x", {"a": 3}, {"a": None}, {"a": []}, {"a": "../model/model.safetensors"},
                  {"a": "/etc/passwd"}, {"a": ""}, {"a": "."}, {"a": "\0"}, {"a": "none"}):
        (bad / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
        yield f"weight_map {value}", use, ()
    remove(bad / "model.safetensors.index.json")
    net = load_model(TINY)
    add_lora(net, 2, 4.0)
    save_model(net, bad, TINY)
    for label in edits(bad / "adapter_config.json", lambda: save_model(net, bad, TINY)):
        yield label, use, ()
    save_model(net, bad, TINY)
    file = bad / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in list(tensors)[::7]:
        for label, tensor in (("nan", tensors[name] * float("nan")), ("cut", tensors[name][:1].clone()),
                              ("inf", (tensors[name] * float("inf")).bfloat16()),
                              ("int8", tensors[name].to(torch.int8))):
            save_file({**tensors, name: tensor}, file)
            yield f"{name}: {label}", use, ()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        for kind in ("fifo", "folder", "link"):
            save_model(net, bad, TINY) if not (bad / name).exists() else None
            yield f"{name} is a {kind}", use, plant(kind, bad / name)
            remove(bad / name)
    for template in TEMPLATES:
        (bad / "chat_template.json").write_text(json.dumps({"chat_template": template}))
        yield f"template {template!r:.40}", use, ()


def row_file(folder: Path, *rows) -> Path:
    Image.new("RGB", (40, 30), "red").save(folder / "a.png")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "data.jsonl"


def read_all(path: Path):
    """Read problems, encode and judge them."""
    codec = rollout.load_codec(str(TINY))
    for p in rollout.load_problems(path):
        rollout.encode_prompt(p, codec, 16384)
        evaluation.judge(p, f"<think>a</think><answer>{p.answer}</answer>", True)


def rows(folder):
    """Every field of a row, and whole files."""
    good = {"id": "p", "images": ["a.png"], "problem": "<image>Find x.", "answer": "48", "key_steps": ["a"],
            "choices": ["48", "9"], "demonstration": "<answer>48</answer>", "task": "t"}
    for label, row in mutants(good):
        yield label, lambda: read_all(row_file(folder, row)), ()
    for name in good:
        for value in HOSTILE:
            yield f"{name} {value!r:.30}", lambda: read_all(row_file(folder, {**good, name: value})), ()
    for text in (*BAD_FILES, json.dumps(good, indent=1), json.dumps({"a": good}), json.dumps([good, good])):
        for suffix in (".json", ".jsonl", ".parquet"):
            (folder / f"f{suffix}").write_text(text)
            yield f"{suffix} {text:.30}", lambda: read_all(folder / f"f{suffix}"), ()


def images(folder):
    """Each format whole, cut and with bytes changed; other formats; what is no file, or goes away."""
    rng, noise, file = random.Random(0), Image.effect_noise((64, 48), 90).convert("RGB"), folder / "x.png"
    path = row_file(folder, {"images": "x.png", "problem": "<image>red?", "answer": "1"})
    for kind in (*rollout.IMAGE_FORMATS, "EPS", "PPM", "ICO", "PDF", "TGA", "PCX"):
        out = io.BytesIO()
        noise.save(out, kind)
        for n in range(14 if kind in rollout.IMAGE_FORMATS else 1):
            data = bytearray(out.getvalue())
            for _ in range(n):
                data[rng.randrange(min(99, len(data)))] = rng.randrange(256)
            file.write_bytes(data[:len(data) * n // 9] if 0 < n < 5 else data)
            yield f"{kind} {n}", lambda: read_all(path), ()
    for kind in ("text", "json", "folder", "fifo", "link", "link to a folder"):
        yield kind, lambda: read_all(path), plant(kind, file)
    remove(file)
    for side in (9_000, 15_000, 40_000):
        Image.new("1", (side, side)).save(file)
        yield f"{side} pixels wide", lambda: read_all(path), ()
    noise.save(file)
    whole = file.read_bytes()
    for later in (None, b"", b"x", whole[:60], whole[:900]):
        def changes():
            problems, codec = rollout.load_problems(path), rollout.load_codec(str(TINY))
            remove(file) if later is None else file.write_bytes(later)
            evaluation.evaluate(load_model(TINY).eval(), codec, problems, 0, 2)

        file.write_bytes(whole)
        yield f"{later!r:.20} during a run", changes, ()


def results(folder):
    """Every field of rows and settings that eval.py finds at --out; what is there and not its own."""
    (folder / "out").mkdir()
    out = folder / "out" / "rows.jsonl"
    data = row_file(folder, {"images": "a.png", "problem": "<image>red?", "answer": "1"})
    saved, part = Path(f"{out}.config.json"), Path(f"{out}.part0")

    def run():
        evaluation.main([*EVAL, "--data", str(data), "--out", str(out)])

    def again():
        for file, text in files.items():
            file.write_text(text)

    yield "a run", run, ()
    files = {out: out.read_text(), saved: saved.read_text(), part: out.read_text()}
    for file in files:
        again()
        for label in edits(file, again):
            yield label, run, ()
    for suffix in ("", ".config.json", ".part0", ".part0-mine", ".part", ".new"):
        for kind in ("text", "json", "folder", "fifo", "link", "link to a folder"):
            for file in out.parent.iterdir():
                remove(file)
            yield f"{kind} at rows.jsonl{suffix}", run, plant(kind, Path(f"{out}{suffix}"))


def runs(folder):
    """Every field of a run's files, on resuming; what is in --out and is no run's; a folder in use."""
    run, whole, last = folder / "run", folder / "whole", "checkpoint-000001/"
    flags, shard = ["--stage", "sft", "--out", run], last + "optimizer-00001-of-00001.safetensors"

    def resume():
        train.start(["--resume", str(run), "--max_steps", "2"])

    def again():
        remove(run)
        shutil.copytree(whole, run)

    yield "a run", lambda: start(*flags), ()
    run.rename(whole)
    for name in ("config.json", last + "trainer.json", "metrics.jsonl", "heldout.json"):
        again()
        for label in edits(run / name, again):
            if name != "config.json" or label.endswith(("{}", "'x'", "nan")):       # of its many fields
                yield label, resume, ()
    state = load_file(whole / shard)
    for name in list(state)[::7]:
        for label, value in (("nan", state[name] * float("nan")),
                             ("cut", state[name].reshape(-1)[:3].clone()),
                             ("negative", -state[name] - 1)):
            again()
            save_file({**state, name: value}, run / shard)
            saved = json.loads((run / last / "trainer.json").read_text())
            saved["files"][Path(shard).name] = (run / shard).stat().st_size
            (run / last / "trainer.json").write_text(json.dumps(saved))
            yield f"{name} {label}", resume, [run / shard]
    for name in ("config.json", "metrics.jsonl", "heldout.json", "run.lock", "checkpoint-000000", "notes.txt",
                 "checkpoint-000001-mine", "checkpoint-mine", "unfinished-checkpoint", "model.safetensors"):
        for kind in ("text", "json", "folder", "fifo", "link", "link to a folder"):
            again()
            yield f"{kind} at {name} of a run", resume, plant(kind, run / name)[:1]
            remove(run)
            run.mkdir()
            yield f"{kind} at {name} of no run", lambda: start(*flags), plant(kind, run / name)
    remove(run)
    shutil.copytree(TINY, run)
    yield "--out is the model", lambda: start(*flags, "--model", run), list(run.glob("*.*"))
    again()
    with open(run / "run.lock", "a") as lock:
        train.fcntl.flock(lock, train.fcntl.LOCK_EX)
        for call in (resume, lambda: start(*flags)):
            yield "in use", call, [run / "metrics.jsonl", run / "run.lock"]


def texts(folder):
    """Control characters of others in whatever is printed; every field of what is made a page of."""
    row, run = {"id": "p", "images": "a.png", "problem": "red?", "answer": "1", "task": "t"}, folder / "run"
    for control in CONTROLS:
        for name, value in row.items():
            path = row_file(folder, {**row, name: value + control}, {**row, "id": "q", "task": "u"})
            remove(run)
            yield f"eval {name} {control!r}", lambda: evaluation.main([*EVAL, "--data", str(path)]), ()
            yield f"train {name} {control!r}", lambda: start("--data", path, "--out", run), ()
        yield f"--data {control!r}", lambda: start("--data", f"{folder}/{control}"), ()
    remove(run)
    yield "a run", lambda: start("--show_every", 1, "--out", run), ()
    for label in edits(run / "groups.jsonl"):
        if not re.search("ids|logps|sampled|weights", label):
            yield label, lambda: trace.main([str(run)]), ()


def processes(folder):
    """A few through a real process, with templates that fail or do not end."""
    bad = model_folder(folder)
    for template in TEMPLATES:
        for script, own in (("train.py", SMALL), ("eval.py", EVAL)):
            def case():
                command = [sys.executable, ROOT / script, *own, "--model", bad, "--out", folder / script]
                done = subprocess.run(command, capture_output=True, text=True)
                if "Traceback" in done.stderr:
                    raise RuntimeError(done.stderr[-300:])
                sys.exit(done.stderr.strip().rpartition("\n")[2] if done.returncode else 0)

            (bad / "chat_template.json").write_text(json.dumps({"chat_template": template}))
            yield f"{script} {template!r:.40}", case, ()


def kills(folder):
    """Ten runs of each kind, killed at a random moment and resumed: the same to the last bit."""
    import test_all
    rollout.load_codec(str(TINY))                           # loads much: once, the runs are forks

    def finish(out):
        if test_all.exit_codes(test_all.start_ranks(out, kind, 1)) != [0]:
            raise RuntimeError(f"{out} did not end well")

    for kind in ("sft", "grpo", "ivr", "lora"):
        started = time.time()
        finish(folder / kind)
        seconds = time.time() - started
        for n in range(10):
            def case():
                process, = test_all.start_ranks(folder / f"{kind}-{n}", kind, 1)
                process.join(random.random() * seconds)
                process.kill()
                process.join()
                finish(folder / f"{kind}-{n}")
                test_all.same_runs(folder / kind, folder / f"{kind}-{n}")

            yield f"{kind} {n}", case, ()


AREAS = {"flags": flags, "rows": rows, "images": images, "results": results, "runs": runs, "texts": texts,
         "processes": processes, "kills": kills, "models": models}      # the last leaves a template running
SECONDS = {"processes": 60, "kills": 120}       # a process begins with seconds of imports; others have 10


def attack(area: str) -> dict:
    """All cases of an area -> {"cases", "failures": {name: what}, "seconds"}."""
    failures, cases, started = {}, 0, time.time()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / area
        folder.mkdir()
        os.chdir(folder)                                    # some flags name folders relative to here
        for name, case, foreign in AREAS[area](folder):
            cases += 1
            fault = fault_of(case, folder, foreign, SECONDS.get(area, 10))
            if fault:
                failures[name] = fault
                print(rollout.escaped(f"{area}: {name}: {fault}"), flush=True)
        os.chdir(ROOT)
    return {"cases": cases, "failures": failures, "seconds": round(time.time() - started)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--areas", nargs="+", default=list(AREAS), choices=AREAS, help="which areas (all)")
    parser.add_argument("--again", action="store_true", help="also areas that have results")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    found = json.loads(FILE.read_text()) if FILE.is_file() else {}
    for area in args.areas:
        if area not in found or args.again:
            found[area] = attack(area)
            train.write_text(FILE, json.dumps(found, indent=1) + "\n")
    print(table())


if __name__ == "__main__":
    main()

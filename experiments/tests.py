"""The tests of this folder: python experiments/tests.py [-k WORD]; test_all.py runs them as well."""
import base64
import contextlib
import csv
import importlib.util
import io
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import attribute  # noqa: E402
import model as m  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402
import eval as evaluation  # noqa: E402
from experiments import (benchmarks, gpu, localisers, preview, qwen_folder, seeds, stepgrpo,  # noqa: E402
                         tables, trace, walkthrough)
from experiments.stepgrpo import step_rar, step_reward_parts, step_rvr  # noqa: E402
from reward import format_ok  # noqa: E402
from test_all import (TINY, chain, close, data_file, main, mixed_problems, raises,  # noqa: E402
                      random_model, reference_model, scratch, seams, segmentation, small_run, swapped,
                      tiny_codec, tiny_model, uncached_logps)
from tiny import shapes  # noqa: E402


# ---- stepgrpo.py

def ours(steps, answer="7", between="\n", after=""):
    return f"<think>{steps}</think>{between}<answer>{answer}</answer>{after}"


def theirs(headers, **bodies):
    """R1-VL's form from its headers in short: "i", "r", "1", "2", "a". Bodies: "x", the answer 7."""
    names, sections = {"i": "Image Description", "r": "Rationales", "a": "The final answer is"}, []
    for h in headers:
        body = bodies.get(h, bodies.get("s" + h, "7" if h == "a" else "x"))
        sections.append(f"### {names.get(h, 'Step ' + h)}:\n{body}")
    return "\n\n".join(sections)


def test_step_rar():
    for key_steps, want in [
            (["red 4 7", "blue 2 3"], 1), (["red 4 7", "blue 3"], 0.5), (["BLUE 2 3", "red 5"], 0.5),
            ([["four", "red 4"], "two"], 0.5), (["green 1"], 0), (["5"], 0), (["3.5"], 1), (["15"], 1),
            (["ed 4"], 0), (["re"], 0), (["red 4", "red  4", "no"], 0.5), (["red 4", "x" * 200], 0.5),
            (["red 4", "x" * 201], 1), (["it is 15", "7 , then", "nought"], 2 / 3),
            ([f"no {k}" for k in range(199)] + ["red 4"], 1 / 200), ([["no"] * 9 + ["red 4"]], 1),
            ([f"no {k}" for k in range(200)] + ["red 4"], 0), ([["no"] * 10 + ["red 4"]], 0),
            (["red 4", 7, None, {"red": 4}, [], "", ["red 4", None]], 1),
            (None, 0), ({}, 0), ("red 4", 0), ([7, {}, ["red 4", 7]], 0), ([["", "\n"]], 0)]:
        text = ours("Red 4\n  7, then\tblue  2 3.\nIt is 15, or 3.5; x=9", answer="green 1")
        assert step_rar(text, key_steps) == want, (key_steps, step_rar(text, key_steps))
    for text, want in [                                 # only the steps count, of one form, 20,000 characters
            (ours("a " * 9997 + "red 4"), 1), (ours("a " * 9998 + "red 4"), 0), ("<think>red 4", 0),
            ("red 4 <think>a</think> red 4 <answer>red 4</answer>", 0), (theirs("ir12a", s2="so red 4"), 1),
            ("<think>a</think><think>red 4</think>", 0), (theirs("ir12a", s1="so red", s2="4"), 1),
            ("<think>a</think>" + theirs("ir12a", s1="red 4"), 0),
            (theirs("ir12a", i="red 4", r="red 4", a="red 4"), 0)]:
        assert step_rar(text, ["red 4"]) == want, text[:80]


def test_step_rvr():
    valid = [ours("\nred 4 7\nblue 2 3\n", after="\n"), theirs("ir1a"), theirs("ir123a"),
             theirs("ir1a", r="y\n\n### Let's think step by step."), ours("Step 1: a\nStep 2: b"),
             ours("### Step 1: a\n### Step 2: b\n"), ours("as in step 3: a"), ours("Step 3 is red")]
    bad = [ours("a", " "), "<think>a</think>", "<answer>7</answer>", "<think>a<answer>7</answer>",
           "<think>a</think>\\boxed{7}", ours("a", "7", " so "), ours("a", after=" done"), "So: " + ours("a"),
           ours("a") * 2, ours("a", "7", "</think>"), ours(" \n "), ours("### Step 1: a\n### Step 3: b"),
           ours("### Step 1: a\n  step 3 : b"), "see " + theirs("ir1a")]
    for numbers in ("1 3", "2", "0 1", "2 1", "1 1", "1 02", "1 " + "9" * 5000):
        bad.append(ours("".join(f"Step {n}: a\n" for n in numbers.split())))
    for form in "ira r1a i1a ir1 ir1a2 air1 ir13a ir2a ir21a ir11a ir1aa 1ira ri1a i1ra ir1r ir1ar".split():
        bad.append(theirs(form))
    bad += [theirs("ir12a", **{name: " "}) for name in ("i", "r", "s1", "s2", "a")]
    for text in valid + bad:
        assert step_rvr(text) == float(text in valid), text[:80]


def test_step_reward_parts():
    both, key_steps = "red 4\nblue two", ["red 4", ["blue 2", "blue two"]]
    think = f"<think>{both}</think>"
    for text, accuracy, rar, rvr, total in [            # without an answer StepRAR is not paid
            (ours(both), 1, 1, 1, 2.1), (ours("red 4"), 1, 0.5, 1, 2.05), (ours("a"), 1, 0, 1, 2),
            (ours("red 4", "8"), 0, 0.5, 1, 1.05), (ours(both, "7", " so "), 1, 1, 0, 1.1), ("", 0, 0, 0, 0),
            (ours(both, "8", " so "), 0, 1, 0, 0.1), (think + "\\boxed{7}", 1, 1, 0, 1.1),
            (think, 0, 1, 0, 0), (think + " It is 7.", 0, 1, 0, 0), (think + "<answer></answer>", 0, 1, 0, 0),
            ("<think>\\boxed{7}" + think[7:], 0, 1, 0, 0), (theirs("ir12a", a="8"), 0, 0, 1, 1),
            (theirs("ir12a", s1=both, a="\\boxed{7}"), 1, 1, 1, 2.1), (theirs("air1", s1=both), 1, 1, 0, 1.1),
            (theirs("ir1", s1=both), 0, 1, 0, 0), (theirs("ir1a", s1=both, a=""), 0, 1, 0, 0),
            (theirs("ir1aa", s1=both), 0, 1, 0, 0.1), (theirs("ir1", s1=both + "\\boxed{7}"), 0, 1, 0, 0),
            (theirs("ir1a", s1=both, a="<answer>7</answer>"), 1, 1, 1, 2.1)]:
        parts = step_reward_parts(text, "7", key_steps=key_steps)
        assert abs(parts.pop("total") - total) < 1e-12, (text, parts)
        assert parts == {"accuracy": accuracy, "format": format_ok(text), "rar": rar, "rvr": rvr}, text
        assert set(step_reward_parts(text, "7", None, False, key_steps).values()) == {0.0}      # cut off
    assert abs(step_reward_parts(ours("red 4"), "7", key_steps=key_steps, alpha=0.5)["total"] - 2.25) < 1e-12
    for text, total in ((ours("a", "B"), 2), (ours("a", "A"), 1), (ours("a", "green"), 2), ("B", 0)):
        assert step_reward_parts(text, "B", ["red", "green"])["total"] == total         # without key steps


def test_step_reward_hostile_text():
    key_steps = [[f"red {k} 7", "1" * 200, "a " * 90 + "b"] for k in range(20)]
    pieces = "a|a | |\n|1|1,|.|\\|### |\n###|step |\nstep 1|<think>|</think>|\t |İ|\n### Step 1:|Step 1:\n"
    for piece in pieces.split("|"):
        text = piece * (30000 if len(piece) < 9 else 3000)
        for whole in (text, text + "Step 1:", ours(text), theirs("ir12a", s1=text), theirs("ir12a", a=text)):
            start = time.thread_time()
            assert 0.0 <= step_reward_parts(whole, "7", key_steps=key_steps)["total"] <= 2.1
            assert time.thread_time() - start < 3, (piece, whole[:40])              # 0.1 on an idle machine


def test_stepgrpo_is_r1_vls():
    flags = "--data tiny:steps=3 --batch 2 --group_size 4 --eval_problems 0 --device cpu".split()
    raises(SystemExit, "--algo ivr", stepgrpo.main, [*flags, "--algo", "ivr"])
    given = train.parse_flags(train.TrainConfig, ["--beta", "0", "--no-freeze_vision"], stepgrpo.PRESET)
    assert given.beta == 0.0 and not given.freeze_vision        # flags win over defaults
    config = train.parse_flags(train.TrainConfig, flags, stepgrpo.PRESET)
    assert (config.algo, config.use_std, config.beta) == ("grpo", True, 0.04)
    for group in stepgrpo.StepGRPO(config).rl_step()["groups"]:
        rewards = [t.rewards["total"] for t in group]
        mean, std = np.mean(rewards), np.std(rewards, ddof=1)
        for t in group:                                 # standardised; each sequence weighs the same
            p = t.problem
            assert t.rewards == step_reward_parts(t.text, p.answer, None, t.finished, p.key_steps)
            assert abs(t.advantage - (t.rewards["total"] - mean) / (std + 1e-4)) < 1e-4
            assert abs(sum(t.weights) - config.max_new_tokens) < 1e-3 and len(set(t.weights)) == 1


# ---- localisers.py

def three_rollouts():                                       # the second without an image
    problems = [shapes.make_problem(kind, 3, "short", index=4) for kind in ("tiles", "bars", "path")]
    problems[1] = replace(problems[1], question=problems[1].question.replace("<image>", ""), images=[])
    return [chain(p, p.key_steps[n:], "4") for n, p in zip((0, 1, 0), problems)]


def test_answer_margins_are_the_uncached_forward():
    net, codec, (a, b, c, _) = random_model(), tiny_codec(), mixed_problems()
    tag, plain, chains, want = "</think><answer>", "\nThe answer is ", [], []
    for p, text, own, cue in (
            (a, "<think>red 4\nblue</think><answer>9</answer>", "9", tag),
            (b, "<think>red 4</think><answer></answer>", "", tag),
            (c, "red 4\nblue 5\n<answer>9 9</answer>", "9 9", plain),
            (replace(a, answer="<|im_end|>"), "<think>so: x</think><answer>4</answer>", "4", tag)):
        t, margins = chain(p, None, text=text), []
        for end in [step.start for step in t.steps] + [t.steps[-1].stop]:
            read, means = t.ids[:end], []
            for answer in (p.answer, own):
                ids = rollout.token_ids(rollout.escape_special(answer, codec), codec)
                logps = uncached_logps(net, codec, p, read + rollout.token_ids(cue, codec) + ids)
                means.append(sum(logps[-len(ids):]) / len(ids) if ids else 0.0)
            margins.append(means[0] - means[1])
        chains.append(t)
        want.append(margins)
    for budget in (9999, 60):
        found = localisers.answer_margins(net, codec, chains, budget=budget)
        for row, margins in zip(found, want, strict=True):
            close(row, margins, 1e-3)
    for margins, step in (([2.0, 1.5, -1.0, -1.2], 1), ([3.0, 2.0, 1.5], 0), ([-1.0, 1.0], 0)):
        assert localisers.largest_margin_drop(margins) == step                   # of equal drops the first


def test_no_return_is_where_no_margin_follows():
    """Step k leads from M_k to M_k+1: the first after which no margin is 0 or more; else the last."""
    for n in range(2, 7):
        for margins in itertools.product((-1.0, 0.0, 1.0), repeat=n):
            first = next((k for k in range(n) if all(x < 0 for x in margins[k:])), None)
            want = n - 2 if first is None else max(0, first - 1)
            assert localisers.no_return(list(margins)) == want, margins


def test_visual_dependence_is_the_divergence_of_full_logits():
    """Token by token against uncached forwards, with the two masks that were drawn; alone as in company."""
    net, codec, rollouts, drawn = tiny_model(), tiny_codec(), three_rollouts(), {}

    def dropping(prompt, *args, drop=localisers.drop_patches):
        drawn.setdefault(id(prompt), []).append(drop(prompt, *args))
        return drawn[id(prompt)][-1]

    @torch.no_grad()
    def logps(prompt, ids):
        row, grids = torch.tensor([prompt.ids + ids]), torch.tensor(prompt.grids) if prompt.grids else None
        return net(row, None, prompt.pixel_values, grids)[0, -1].log_softmax(-1)

    with swapped(localisers, "drop_patches", dropping):
        found = localisers.visual_dependence(net, codec, rollouts, masks=2)
    for t, values in zip(rollouts, found, strict=True):
        for n in range(0, len(t.ids), 3):
            p = logps(t.prompt, t.ids[:n])
            parts = [(p.exp() * (p - logps(x, t.ids[:n]))).sum() for x in drawn[id(t.prompt)]]
            close(values[n], (parts[0] + parts[1]) / 2, 1e-3)
        close(localisers.visual_dependence(net, codec, [t], masks=2, budget=1)[0], values, 1e-3)
    assert max(found[0]) > 0.1 and max(map(abs, found[1])) < 1e-5
    for masked in drawn[id(rollouts[2].prompt)]:            # whole blocks of patches are dropped
        gone = (masked.pixel_values == 0).all(1).view(-1, codec.image_config.merge_size ** 2)
        assert torch.equal(gone.any(1), gone.all(1)) and 0.3 < gone.float().mean() < 0.9


def test_step_dependence_and_erosion_by_hand():
    steps = [attribute.Step(1, 6, "a"), attribute.Step(6, 7, "b"), attribute.Step(8, 11, "c")]
    values = [9.0, 1.0, 5.0, 2.0, 4.0, 3.0, 0.5, 9.0, 0.25, 0.75, 0.5, 9.0]
    close(localisers.step_dependence(values, steps), [4.5, 0.5, 0.75], 1e-9)    # the 2 best of 5, 1, 1 of 3
    std = math.sqrt((0.75 ** 2 + 1.25 ** 2 + 0.75 ** 2 + 0.25 ** 2) / 4)
    for k, below in enumerate((0.0, 0.0, 2.0, 1.0)):                    # what comes later does not count
        close(localisers.erosion([1.0, 3.0, 1.0, 2.0], k), below / (std + 0.1), 1e-6)
    assert localisers.most_eroded(values, steps) == 1 and localisers.erosion([2.0], 0) == 0


def test_monte_carlo_finds_where_success_dies():
    """Every length and place side by side, with restarts that succeed (one in four) up to a planted step."""
    codec, problem, asked, rollouts = tiny_codec(), shapes.make_problem("tiles", 3, "short"), [], []
    cases = [(steps, place) for steps in range(1, 10) for place in range(steps)]
    for n, (steps, _) in enumerate(cases):
        rollouts.append(chain(replace(problem, id=str(n)), [f"red {k} 1" for k in range(steps)]))

    def planted(model, problems, codec, restarts, limit, temperature, keys, prefixes, prompts, *rest):
        assert (restarts, limit, temperature) == (4, 99, 1.0) and len(prefixes) == len(problems)
        groups = []
        for n, p in enumerate(problems):
            t, prefix = rollouts[int(p.id)], prefixes[n]
            k = codec.tokenizer.decode(prefix).count("\n")
            assert prefix == t.ids[:t.steps[k].start] and prompts[n] is t.prompt
            assert keys[n] == f"monte carlo/{p.id}/{prefix}" and (p.id, k) not in asked
            asked.append((p.id, k))
            wrong = replace(t, ids=[5] * 9, sampled=[0, 0] + [1] * 7, text="<answer>no</answer>")
            right = replace(wrong, text=f"<think>a</think><answer>{p.answer}</answer>")
            groups.append([wrong, wrong, right if k <= cases[int(p.id)][1] else wrong, wrong])
        return groups

    with swapped(rollout, "sample", planted):
        faults, tokens = localisers.monte_carlo(None, codec, rollouts, 99)
    assert faults == [place for _, place in cases] and tokens == 7 * 4 * len(asked)
    assert len(asked) <= sum(math.ceil(math.log2(steps)) for steps, _ in cases)


def test_localise_worked_example_and_kinds():
    Check, Fault, steps = attribute.Check, localisers.Fault, [attribute.Step(k, k + 1, "") for k in range(4)]
    checks = [Check(gap, 0) for gap in (0.1, 0.3, 2.9, 1.2)]
    assert localisers.localise(checks) == Fault(2, "misread")                                   # the header's
    for values, kind in (([1, 1, 1, 1], "misread"), ([4, 4, 0.5, 4], "eroded"),
                         ([1, 1, 0.05, 1], "reasoning"), ([0, 0, 0, 0], "reasoning")):  # 0: without an image
        assert localisers.localise(checks, [5.0, -9.0, 0, 0, 0], values, steps) == Fault(2, kind)
    calm = [Check(gap) for gap in (0.1, attribute.DOUBT, 0.0)]
    for margins, step in ((None, 2), ([2.0, 1.0, -3.0, -3.0], 1), ([5.0, 1.0, 0.5, -1.0], 0)):
        assert localisers.localise(calm, margins, [1.0] * 4, steps) == Fault(step, "reasoning")


def test_verifiers_fill_in_checks():
    """The oracle says the truth of each step; the others know one fault of a finished rollout, once."""
    net, codec, rollouts = tiny_model(), tiny_codec(), three_rollouts()
    rollouts[0].steps[1].text = "red 4 hm"
    localisers.Oracle(None, codec)(rollouts)
    assert [[c.is_suspect for c in t.checks] for t in rollouts] == [[0, 1, 0], [0, 0], [0, 0, 0]]
    drops = list(map(localisers.largest_margin_drop, localisers.answer_margins(net, codec, rollouts)))
    values = localisers.visual_dependence(net, codec, rollouts)
    falls = [localisers.most_eroded(v, t.steps) for v, t in zip(values, rollouts)]
    deaths, tokens = localisers.monte_carlo(net, codec, rollouts, 64, key="")
    for kind, faults, cost in ((localisers.Margin, drops, 0), (localisers.Dependence, falls, 0),
                               (localisers.MonteCarlo, deaths, tokens)):
        verifier, new = kind(None, codec), [replace(t, checks=None) for t in rollouts]
        verifier.policy, cut_off, edited = net, replace(new[0], finished=False), replace(new[0])
        verifier([*new, cut_off])
        verifier([*new, edited])                                        # no answer is asked about twice
        for t, k in zip([*new, cut_off, edited], [*faults, None, None], strict=True):
            assert [c.is_suspect for c in t.checks] == [n == k for n in range(len(t.steps))]
        assert verifier.tokens == cost
    many = [SimpleNamespace(problem=rollouts[0].problem, ids=[n], steps=[0] * 5) for n in range(600)]
    drawn = localisers.RandomStep(None, codec).find(many)
    assert all(80 < drawn.count(k) < 160 for k in range(5))
    assert localisers.RandomStep(None, codec).find(many[::-1]) == drawn[::-1]


def test_study_of_a_few_rollouts():
    with scratch() as folder, contextlib.redirect_stdout(io.StringIO()):
        flags = f"--model {TINY} --flawed 12 --planted 24 --data tiny:steps=8,kinds=tiles --out {folder}/x"
        localisers.main(flags.split())
        result = json.loads((folder / "x").read_text())
    exact = {row["localiser"]: float(row["exact"].split()[0]) for row in result["summary"]}
    for n, signal in enumerate(exact):
        hits = [r["found"][n] == r["true"] for r in result["records"]]
        assert len(hits) == 12 and exact[signal] == round(100 * sum(hits) / 12, 1)
    *_, slips = result["kinds"]
    assert slips["planted"] == "reasoning" and slips["reasoning"] > slips["misread"]
    assert exact["A1 re-reading"] > exact["random"] and flags in result["command"]
    assert [row["right"] + row["wrong"] for row in result["rates"][:2]] == [12, 12]     # depths 1 and 2


# ---- trace.py

HOSTILE = "</script><img src=x onerror=\"document.title=1\"><script>document.title=1</script>\x1b\u202e\x00"


def test_trace_holds_the_run_and_no_markup_of_others():
    """Of a run of two steps, and a third group whose texts are hostile."""
    with scratch() as run, contextlib.redirect_stdout(io.StringIO()):
        small_run(run, data="tiny:steps=5,kinds=tiles+bars", max_new_tokens=128, show_every=1)
        rows, ids = train.read_jsonl(run / "groups.jsonl"), rollout.token_ids(HOSTILE, tiny_codec())
        row = {**rows[0], "step": 3, "question": HOSTILE, "gold": HOSTILE, "id": HOSTILE}
        change = {"ids": ids, "text": HOSTILE, "provenance": HOSTILE, "steps": [], "logps": [math.nan, 9.0]}
        row["rollouts"] = [{**r, **change} for r in row["rollouts"]]
        train.write_text(run / "groups.jsonl", "\n".join(map(json.dumps, [*rows, row])))
        trace.main([str(run), "--signals"])
        page = (run / "trace.html").read_text()
    data = page.partition('id="data">')[2].partition("</script>")[0]
    assert not re.search(r"[^\x20-;=-~]", data) and page.count("<script") == 2
    assert not re.search("(?:src|href)=.?http", page) and not re.search(r"\W(NaN|Infinity)\W", data)
    *groups, last = json.loads(data)["groups"]
    for row, group in zip(rows, groups, strict=True):
        assert re.match("data:image/(png|jpeg);base64,", group["images"][0]) and group["task"]
        for before, r in zip(row["rollouts"], group["rollouts"]):
            assert tiny_codec().tokenizer.decode(before["ids"]) == "".join(r["tokens"])
            assert len(r["ratio"]) == len(r["tokens"]) == len(r["logps"])
            assert r["rewards"]["accuracy"] or len(r["margins"]) == len(r["dependence"]) == len(r["steps"])
    assert last["images"] == [] and last["rollouts"][0]["logps"] == [None, 9.0]
    assert "".join(last["rollouts"][0]["tokens"]) == last["question"] == HOSTILE


def test_walkthrough_tells_one_step():
    with contextlib.redirect_stdout(io.StringIO()) as told:
        walkthrough.main(f"--model {TINY} --data tiny:steps=9,kinds=tiles --batch 8 --device cpu".split())
    assert re.findall(r"\n(\d)\. ", told.getvalue()) == list("12345678") and "<- suspect" in told.getvalue()
    before, after = re.search(r"token ([-+.\d]+) -> ([-+.\d]+)", told.getvalue()).groups()
    assert float(after) > float(before) and walkthrough.line("a\nb\x1b" + "c" * 9, 9) == repr("a / b\x1b...")


# ---- benchmarks.py

def png(colour) -> str:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


RED, BLUE = png("red"), png("blue")
HINT = "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."
ANGLE, ANGLES = "Find the angle.\nChoices:\nA:40°\nB:60°\nC:80°", ["40°", "60°", "80°"]
PLEASE = "Please directly answer the question and provide the correct option letter, e.g., A, B.\nQuestion: "
TWELVE = dict(zip("ABCDEFGHIJKL", "LKJIHGFEDCBA"))
VISION = dict(answer="B", question_type="multi-choice", problem_version="Vision Only")
LOOK = "<image>Answer the question that the image shows. Give the option letter."

# file name: rows of (cells, our wording of the question, option texts, golds)
BENCHMARKS = {
    "MathVista_MINI.tsv": [
        (dict(question=f"{HINT}\nQuestion: Which?\nChoices:\n(A) 9\n(B) 9", choices="['9', '9']", answer="9",
              answer_option="A", answer_type="text", task="figure question answering", skills="['algebra']"),
         "<image>Which?\nChoices:\n(A) 9\n(B) 9", ["9", "9"], ["A"]),
        (dict(question="Hint: two decimal places.\nQuestion: Mean?", answer="0.80", choices="[]",
              answer_type="float", image="0"), "<image>Mean?", [], ["0.80"])],
    "MathVerse_MINI.tsv": [
        (dict(VISION, question=PLEASE + ANGLE, answer="(B)", problem_version="Text Lite", problem_index="7",
              question_for_eval=ANGLE, metadata="{'subject': 'Plane Geometry'}"),
         "<image>" + ANGLE, ANGLES, ["B"]),
        (dict(VISION, question="As shown.", problem_index="7"), LOOK, ANGLES, ["B"]),
        (dict(VISION, question="As shown.", answer="E"), LOOK, [""] * 5, ["E"]),
        (dict(question=PLEASE + "Find r.", answer="$$r=7.00$$"), "<image>Find r.", [], ["$$r=7.00$$"])],
    "MathVision_MINI.tsv": [
        (dict(question="Which of <image1>?", answer="C", category="logic", choices="['A', 'B', 'C']"),
         "<image>Which of [image 1]?", ["A", "B", "C"], ["C"]),
        (dict(question="Half?", answer="\x0crac{1}{2}", choices="[]"), "<image>Half?", [], ["\\frac{1}{2}"]),
        (dict(question="A tag: <image>?", answer="B ", choices="['1', '2']"),
         "<image>A tag: < image>?\nA. 1\nB. 2", ["1", "2"], ["B"])],
    "MMMU_DEV_VAL.tsv": [
        (dict(question="Is <image 2> like <image 1>?", A="None", B="<image 1>", answer="B",
              image=str([RED, BLUE]), split="validation"),
         "Is <image> like <image>?\nA. None\nB. <image>", ["None", "<image 1>"], ["B"]),
        (dict(question="<?> mass", hint="Look.", answer="['24/7', '3.429']", split="validation"),
         "<image>Look.\n<?> mass", [], ["24/7", "3.429"]),
        (dict(question="Which?", A="1", B="", C="3", answer="C", split="validation"),
         "<image>Which?\nA. 1\nC. 3", ["1", "", "3"], ["C"])],
    "MMMU_Pro_10c.tsv": [
        (dict(TWELVE, question="Which <image 1>?", answer="L", category="Math"),
         "Which <image>?" + "".join(f"\n{a}. {b}" for a, b in TWELVE.items()), [*TWELVE.values()], ["L"])],
    "MMMU_Pro_V.tsv": [
        (dict(question="placeholder", A="red", B="blue", answer="B"),
         "<image>Answer the following multiple-choice question in the image. ", ["red", "blue"], ["B"])],
    "MMStar.tsv": [
        (dict(question='See <image 1>.\n"Which"?', A="red", B="blue", answer="B", category="x"),
         '<image>See <image 1>.\n"Which"?\nA. red\nB. blue', ["red", "blue"], ["B"]),
        (dict(question="Which?\nOptions: A: red, B: blue, C: x, y", answer="C", category="y"),
         "<image>Which?\nOptions: A: red, B: blue, C: x, y", ["red", "blue", "x, y"], ["C"])]}


def write_tsv(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        names = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(file, names, delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def converted(path, *flags):
    """The file of a benchmark in our form, the problems that eval.py reads out of it, and their golds etc."""
    data = path.parent / path.stem / "problems.jsonl"
    benchmarks.convert(path, data.parent, *flags)
    return data, rollout.load_problems(data), [row["benchmark"] for _, row in rollout.read_rows(data)]


def done(path, completions):
    rows = [{"id": name, "mode": "greedy", "completion": text} for name, text in completions.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_benchmarks_from_file_to_prediction():
    """convert, what eval.py reads of it, score and export of every gold; and of hostile completions."""
    hostile = ["(" * 20000, "9" * 100000, "is " * 20000, "\\boxed{" * 3000, "", "\0\u202e\r\t\"\ud800"]
    for name, cases in BENCHMARKS.items():
        with scratch() as folder:
            rows = [{"index": n, "image": RED, **cells} for n, (cells, *_) in enumerate(cases)]
            left_out = [{**rows[0], "index": 8, "image": ""}, {**rows[0], "index": 9, "split": "dev"}]
            path = write_tsv(folder / name, rows + left_out[:1 + name.startswith("MMMU_DEV")])
            data, problems, benches = converted(path)
            for p, bench, (_, question, choices, golds) in zip(problems, benches, cases, strict=True):
                assert (p.question, bench["choices"], bench["golds"]) == (question, choices, golds), (name, p)
                assert p.answer in golds and p.choices in (None, choices)
            said = done(folder / "said", {p.id: f"<answer>{p.answer}</answer>" for p in problems})
            assert f"| all                | {len(cases)} | 100.0 % [" in benchmarks.score(said, data), name
            benchmarks.export(said, data, path, folder / "out.tsv")
            out = benchmarks.read_tsv(folder / "out.tsv")
            for (_, row), before, p in zip(out, rows, problems, strict=True):
                assert row["prediction"] == p.answer and "image" not in row and row["index"] == p.id
                assert all(row[key] == str(value) for key, value in before.items() if key != "image")
            for text in hostile:
                said = done(folder / "said", {p.id: text for p in problems})
                assert "| all " in benchmarks.score(said, data)
                benchmarks.export(said, data, path, folder / "out.tsv")
                assert len(list(benchmarks.read_tsv(folder / "out.tsv"))) == len(cases)


def test_benchmarks_wordings_and_images():
    with scratch() as folder:
        for name, prompt, start, end in (
                ("MathVista_MINI.tsv", "direct", f"<image>{HINT}\nQuestion: Which", "(B) 9"),
                ("MathVerse_MINI.tsv", "direct", "<image>Please directly answer", "C:80°"),
                ("MathVision_MINI.tsv", "direct", "<image>Which", "single word or phrase."),
                ("MathVision_MINI.tsv", "cot", "<image>Please solve the problem step by step", "?\n"),
                ("MMMU_Pro_10c.tsv", "direct", "Question: Which <image>?\nOptions:\nA. L", "given choices. "),
                ("MMMU_Pro_V.tsv", "cot", "<image>Answer the following", "step by step before answering. "),
                ("MMMU_DEV_VAL.tsv", "cot", "Question: Is <image> like <image>?\nOptions:\nA.", "above. \n")):
            path = write_tsv(folder / name, [{"index": 0, "image": RED, **BENCHMARKS[name][0][0]}])
            _, (p,), _ = converted(path, prompt)
            assert p.question.startswith(start) and p.question.endswith(end), (name, prompt, p.question)
        assert [rollout.open_image(image).getpixel((0, 0))[2] for image in p.images] == [255, 0, 0]
        (folder / "1.png").write_bytes(base64.b64decode(RED))
        row = {"image": "1.png", "answer": "9", "question": "Sum?", "id": 0}                # official files
        row.update(choices=["9", "9"], precision=1.0, query="Q?", metadata={"task": "t", "skills": ["s"]})
        (folder / "mathvista.json").write_text(json.dumps({"5": row}))
        _, (p,), (bench,) = converted(folder / "mathvista.json")
        found = p.id, p.question, p.answer, bench["precision"], bench["groups"]
        assert found == ("0", "<image>Q?", "A", 1, {"task": "t", "skill": ["s"]})


def test_benchmarks_right_and_wrong():
    """Number formats, letters without option texts, and golds that trip scorers."""
    for name, choices, golds, answer_type, right, wrong in (
            ("MMStar", "red/blue", "B", "", "blue|so it is (B).|<think>A</think>B", "A|both|"),
            ("MMMU", "x//z", "C", "", "C", "not B but C|A"), ("MMStar", "////", "E", "", "(E)", "D"),
            ("MMMU", "", "24/7|3.429", "", "3.43|24/7|about 3.4294", "3.4"),
            ("MathVista", "9/9/12", "A", "", "9|B", "12"), ("MathVista", "", "0.8", "float", "0.84", "0.86"),
            ("MathVista", "", "14", "integer", "14.0|The answer is 14.", "14.7|1e999|" + "9" * 3000),
            ("MathVision", "1/2/3", "B", "", "2", "3"), ("MathVerse", "", "$$r=7.00$$", "", "7", "8")):
        bench = {"name": name, "choices": choices.split("/") if choices else [], "golds": golds.split("|"),
                 "answer_type": answer_type, "precision": 1}
        for want, texts in ((True, right), (False, wrong)):
            for text in texts.split("|"):
                assert benchmarks.grade(bench, text)[1] is want, (name, golds, text)
    for gold in r"""Area $=9 \pi \mathrm{cm}^{2}$|$5=s$|N 34° W|118掳T|{8}{5} \pi|11 |(3,-4)|C,D|45^2|1:2
            |domain: [-4, 0) and range: (-3, 1]|$\boxed{\frac{16}{7}}$|69{degrees}|\frac{360}7|$MgS$
            |8\sqrt{3}{squareinches}|$\frac{90}{23}^{\circ}$|090^\circ T|[1, 2, 3]|False""".split("|"):
        bench = {"name": "MathVerse", "choices": [], "golds": [gold.strip("\n")]}
        assert benchmarks.grade(bench, f"<answer>{gold}</answer>") == (gold.strip(), True), gold


def test_benchmarks_broken_files():
    """InputError names file and row; an open quote never loses rows in silence."""
    with scratch() as folder:
        row = json.dumps({"question": "Which?", "A": "red", "answer": "A", "image": "no.png"})
        header, line = "index\tquestion\tA\tB\tanswer\timage\n", "0\tQ?\tred\tblue\tB\t" + RED
        for name, text, words in (
                ("x.tsv", "", "which benchmark"), ("mmstar.tsv", header, "no rows"),
                ("mmstar.tsv", "index\tanswer\n1\tB", "'question'"), ("mmstar.tsv", header + "0", "row 1: "),
                ("mmstar.tsv", header + line + "\n1\t\"Q\tred\tblue\tB\tx\n" + line, "unexpected end"),
                ("mmstar.tsv", f'{header}0\t"Q\tred\tblue\tB\tx\n1\tQ"\tred\tblue\tB\tx\n', "row 1: 6 cells"),
                ("mmstar.tsv", header + line.replace("Q?", "30\udcb0?"), "not a readable TSV"),
                ("mmstar.tsv", header + line + "\n" + line, "row 2: the id 0 is taken"),
                ("mmstar.tsv", header + line.replace(RED, "%" * 70 + "A"), "row 1: not a row"),
                ("mmstar.tsv", header + line.replace("\tB\t", "\t\t"), "row 1: field 'answer'"),
                ("mmmu.tsv", header + line.replace("Q?", "<image 2>"), "<image 2>, but 1 images"),
                ("mmstar.jsonl", row + "\n[1]", "jsonl:2: a JSON"), ("mmstar.jsonl", row, "no such file")):
            (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
            raises(rollout.InputError, [name, words], benchmarks.convert, folder / name, folder / "out")
        assert not (folder / "out").exists()
        tsv = folder / "mmstar.tsv"
        tsv.write_text(header + line)
        data, said = converted(tsv)[0], done(folder / "said", {"0": "B"})
        raises(rollout.InputError, "--out", benchmarks.export, said, data, tsv, tsv)
        raises(rollout.InputError, "field 'benchmark'", benchmarks.score, said, said)
        for completions, words in (({"9": "A"}, "'9' is no"), ({"0": None}, "other:1"), ({}, "no rows")):
            raises(rollout.InputError, words, benchmarks.score, done(folder / "other", completions), data)
        other = write_tsv(folder / "b.tsv", [{"question": "", "answer": ""}])
        raises(SystemExit, ["error: --tsv", "0 rows"], benchmarks.main,
               ["export", str(said), "--data", str(data), "--tsv", str(other), "--out", "c.tsv"])


# ---- preview.py

def test_preview_of_problems_that_are_hard_to_guess():
    with scratch() as folder:
        preview.write_problems(folder, 12, 3, "train")
        assert len(rollout.load_problems(folder / "problems.jsonl")) == 12
    for kind in shapes.KINDS:
        lucky = (0.15, 0.12) if kind == "total" else (0.01, 0.005)      # a sum alone is guessed now and then
        assert preview.guess_rate(kind, 3) < lucky[0] and preview.guess_rate(kind, 5) < lucky[1]


# ---- qwen_folder.py

def test_real_vocabulary_from_files_to_transformers():
    """Random weights behind Qwen's real vocabulary: steps, seams, a step of each stage, an evaluation."""
    if not qwen_folder.has_ranks():
        return print("skipped: pip install --no-deps dashscope")
    from transformers import AutoModelForImageTextToText
    with scratch() as folder, contextlib.redirect_stdout(io.StringIO()):
        qwen_folder.main([str(folder / "qwen")])
        codec = rollout.load_codec(str(folder / "qwen"))
        segmentation(codec)
        assert seams(codec, 300) > 150
        text = "<think>\nThe red tile is 4.\n\nSo it is 6.\n</think>\n<answer>6</answer>"
        data, sft, ivr = data_file(folder, 2, demonstration=text), folder / "sft", folder / "ivr"
        changes = {"data": str(data), "batch": 2, "group_size": 2, "max_steps": 1}
        small_run(sft, model=str(folder / "qwen"), stage="sft", max_new_tokens=60, **changes)
        small_run(ivr, model=f"{sft}/checkpoint-000001", max_new_tokens=24, **changes)
        evaluation.main(f"--model {ivr}/checkpoint-000001 --data {data} --greedy --max_new_tokens 8 "
                        f"--device cpu --out {folder}/rows.jsonl".split())
        assert len(train.read_jsonl(folder / "rows.jsonl")) == 2
        AutoModelForImageTextToText.from_pretrained(ivr / "checkpoint-000001")


# ---- gpu.py

def test_gpu_simulated():
    """No operation on tensors of two devices, few halts, images encoded once, memory within the limit; and
    planted faults are noticed."""
    if not shutil.which("g++"):
        return print("skipped: there is no g++")
    small, real, found = "a step of the tiny model", "for the test", {}
    with scratch() as folder:
        library = gpu.compile_guard(folder)
        for job, fault in ((small, None), (small, "to the CPU"), (small, "a number a token"), (real, None),
                           (real, "all kept")):
            found[job, fault] = gpu.start_job(job, library, *(["--fault", fault] if fault else []))
        raises(subprocess.CalledProcessError, "", gpu.start_job, small, library, "--fault", "left on the CPU")
    whole, update = found[small, None], found[real, None]
    assert whole["encoded a problem and step"] == 1 and whole["halts a decode step"] < 0.3, whole
    assert whole["computed"] == 3, whole                    # by the policy, by the reader, masked too
    assert (whole["checkpointing"], whole["max_pixels"], whole["cuDNN attention"]) == ("yes", 1_003_520, False)
    for fault in ("to the CPU", "a number a token"):
        assert found[small, fault]["halts a decode step"] > 0.9
    assert update["peak"] <= update["limit"] and update["step_syncs"] <= 2, update
    assert 0.9 < update["reckoned"] / update["peak"] < 1.2, update         # (it is within 10 % at real sizes)
    assert found[real, "all kept"]["peak"] > update["limit"]


# ---- seeds.py

def test_seeds_are_run_once_and_with_the_flags_given():
    flags = ("--data tiny:steps=2,kinds=tiles --max_steps 1 --batch 2 --group_size 2 --max_new_tokens 40 "
             "--eval_problems 2 --eval_samples 1 --device cpu").split()
    with scratch() as folder:
        found = seeds.held_out(folder / "run", flags)
        written = (folder / "run" / "heldout.json").stat().st_mtime_ns
        assert found["before"].keys() == found["after"].keys() == {"greedy", "avg@1"}
        assert len(found["curve"]) == 1 and found["curve"][0][0] > 2 * 2 * 10
        assert seeds.held_out(folder / "run", flags) == found
        assert (folder / "run" / "heldout.json").stat().st_mtime_ns == written
        raises(SystemExit, "other flags", seeds.held_out, folder / "run", [*flags, "--seed", "5"])


# ---- LoRA under PEFT

def test_peft_opens_an_adapter():
    if not importlib.util.find_spec("peft") or not importlib.util.find_spec("accelerate"):
        return print("skipped: pip install peft")
    from peft import PeftModel
    with scratch() as folder:
        model, ids = tiny_model(), torch.arange(40)[None]
        m.add_lora(model, 4, 8.0)
        for name, p in model.named_parameters():
            p.data += 0.1 * torch.randn_like(p) if name.endswith("lora_B") else 0
        m.save_model(model, folder, TINY)
        opened = PeftModel.from_pretrained(reference_model(TINY), folder)
        close(opened(input_ids=ids).logits, model(ids), 1e-4)


# ---- tables.py

def test_tables_are_those_of_the_results():
    """Every table of both READMEs after a marker is the one that tables.py makes of experiments/results/."""
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert "<!-- table: " in text, page
        assert tables.filled(text) == text, f"python experiments/tables.py --write: {page}"


if __name__ == "__main__":
    main(globals())

"""How often the Re-Reasoning Loop succeeds: with several readers, and by where the first cut lies.

    python experiments/repairs.py --model tiny --data tiny:steps=8,kinds=tiles+path+bars --sources 300

Failed rollouts of one policy, which is its own reader, are repaired as in training; with random first cuts,
which lie before, at or after the true error; with a reader that sees no image; and by restarts of the policy
alone. No training; the step oracle only judges. Tokens are those generated for a repair, successful or not,
without the checks.
"""
import argparse
import collections
import json
import sys
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import attribute  # noqa: E402
import rereason  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402
from eval import figure  # noqa: E402
from experiments.localisers import WRONG, flawed_rollouts  # noqa: E402
from experiments.tables import markdown  # noqa: E402
from model import load_model  # noqa: E402
from tiny import shapes  # noqa: E402


class RandomFirst(attribute.Verifier):
    """Suspects a random step of each trajectory that it is asked about first; after that A1 decides."""

    def __call__(self, trajectories: list):
        first = not self.known
        super().__call__([t for t in trajectories if t.checks is None])
        for t in trajectories if first else ():
            k = int(len(t.steps) * rollout.uniforms(f"cut/{t.problem.id}/{t.ids}", 1, 1).item())
            t.checks[:k + 1] = [attribute.Check(0.0)] * k + [attribute.Check(WRONG)]


RESULTS = ROOT / "experiments" / "results" / "repairs.json"
SETTINGS = {"default": (attribute.Verifier, True, True),      # verifier, reader sees the image, Rules.revise
            "reader without the step before": (partial(attribute.Verifier, window=0), True, True),
            "random first cut": (RandomFirst, True, True),
            "reader without the image": (attribute.Verifier, False, True),
            "restarts only": (attribute.Verifier, True, False)}


def blind_reader(path: str):
    """The model of a checkpoint, to whom all images are of the mean colour."""
    reader = load_model(path).eval()
    reader.visual.register_forward_pre_hook(lambda _, inputs: (torch.zeros_like(inputs[0]), *inputs[1:]))
    return reader


def repair(model, reader, codec, found: list, verifier_class, revise: bool) -> list:
    """Repair failed rollouts, 64 side by side -> a Repair each, its source with the checks it began with."""
    done = []
    for start in range(0, len(found), 64):
        verifier, repairs = verifier_class(reader, codec), []
        part = [replace(t, checks=None) for t, _ in found[start:start + 64]]
        verifier(part)
        for n, t in enumerate(part, start):
            repairs.append(rereason.Repair(t, replace(t), f"repairs/{n}", len(t.ids)))
        rereason.rectify(model, codec, repairs, verifier, 320, rereason.Rules(revise=revise))
        done += repairs
    return done


def row(setting: str, repairs: list) -> dict:
    """A row of the table: the share repaired with its interval, tokens a repair."""
    share = figure([float(r.outcome == "repaired") for r in repairs])
    tokens = sum(r.tokens for r in repairs) / len(repairs)
    return {"setting": setting, "n": len(repairs), "repaired": share.pop("mean"), **share, "tokens": tokens}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="checkpoint")
    parser.add_argument("--data", default="tiny:steps=8,kinds=tiles+path+bars", help="tiny spec, held out")
    parser.add_argument("--sources", type=int, default=300, help="failed rollouts to repair")
    parser.add_argument("--greedy", action="store_true", help="greedy rollouts instead of sampled ones")
    parser.add_argument("--results", default=RESULTS, type=Path, help="JSON file of the table")
    args, rows = parser.parse_args(), []
    model, codec = load_model(args.model).eval(), rollout.load_codec(args.model)
    blind, stream = blind_reader(args.model), shapes.Stream(args.data, "heldout", 1)
    found, _ = flawed_rollouts(model, codec, stream, args.sources, greedy=args.greedy)
    for setting, (verifier_class, sees, revise) in SETTINGS.items():
        repairs = repair(model, model if sees else blind, codec, found, verifier_class, revise)
        rows.append(row(setting, repairs))
        print(setting, collections.Counter(map(attrgetter("outcome"), repairs)), flush=True)
        by_place = {"before": [], "at": [], "after": []}
        for r, (_, wrong) in zip(repairs, found):
            cut, place = attribute.first_suspect(r.source.checks), "at"
            if cut is not None and cut != wrong:
                place = "before" if cut < wrong else "after"
            by_place[place].append(r)
        for place, part in by_place.items():
            if part and verifier_class is RandomFirst:
                rows.append(row(f"{setting}, {place} the error", part))
    print(markdown(list(rows[0]), [r.values() for r in rows]))
    command = " ".join(["python experiments/repairs.py", *sys.argv[1:]])
    train.write_text(args.results, json.dumps({"command": command, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

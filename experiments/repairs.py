"""How often the Re-Reasoning Loop succeeds: for each kind of second look, and by where the first cut lies.

    python experiments/repairs.py --model tiny --data tiny:steps=9,kinds=tiles+path+bars --sources 300

Failed rollouts of one policy are repaired with the default verifier, and again with random first cuts, which
lie before, at or after the true error. No training; the step oracle only judges. Tokens are those generated
for a repair, successful or not, without the checks.
"""
import argparse
import collections
import json
import sys
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import attribute  # noqa: E402
import rereason  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402
from eval import figure  # noqa: E402
from experiments.localisers import flawed_rollouts  # noqa: E402
from experiments.tables import markdown  # noqa: E402
from model import load_model  # noqa: E402
from tiny import shapes  # noqa: E402


class RandomFirst(attribute.Verifier):
    """Suspects a random step of a trajectory it has not seen before; after that A1 decides."""

    def __call__(self, trajectories: list):
        unseen = [t for t in trajectories if t.checks is None]
        super().__call__(trajectories)
        for t in unseen:
            k = int(len(t.steps) * rollout.uniforms(f"cut/{t.problem.id}/{t.ids}", 1, 1).item())
            for n in range(k):
                t.checks[n] = replace(t.checks[n], prob=max(0.6, t.checks[n].prob))
            t.checks[k] = attribute.Check(0.0)


RESULTS = ROOT / "experiments" / "results" / "repairs.json"
SETTINGS = {"default": (attribute.Verifier, "image"),                 # verifier and Rules.relook
            "random first cut": (RandomFirst, "image"),
            "look without the image": (attribute.Verifier, "text"),
            "restarts only": (attribute.Verifier, "none")}


def repair(model, codec, found: list, verifier_class, relook: str) -> list:
    """Repair failed rollouts, 64 side by side -> a Repair each, its source with the checks it began with."""
    done = []
    for start in range(0, len(found), 64):
        verifier, repairs = verifier_class(model, codec), []
        part = [replace(t, checks=None) for t, _ in found[start:start + 64]]
        verifier(part)
        for n, t in enumerate(part, start):
            repairs.append(rereason.Repair(t, replace(t), f"repairs/{n}", len(t.ids)))
        rereason.rectify(model, codec, repairs, verifier, 256, rereason.Rules(relook=relook))
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
    parser.add_argument("--data", default="tiny:steps=9,kinds=tiles+path+bars", help="tiny spec, held out")
    parser.add_argument("--sources", type=int, default=300, help="failed rollouts to repair")
    parser.add_argument("--results", default=RESULTS, type=Path, help="JSON file of the table")
    args, rows = parser.parse_args(), []
    model, codec = load_model(args.model).eval(), rollout.load_codec(args.model)
    found, _ = flawed_rollouts(model, codec, shapes.Stream(args.data, "heldout", 1), args.sources)
    for setting, (verifier_class, relook) in SETTINGS.items():
        repairs = repair(model, codec, found, verifier_class, relook)
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

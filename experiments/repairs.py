"""How often the Re-Reasoning Loop succeeds: by number of looks, by kind of task and of error, by how far the
first cut lies from the true error, and for each kind of second look.

    python experiments/repairs.py --model tiny --data tiny:steps=9,kinds=tiles+path+bars --parents 300

Failed rollouts of one policy are repaired with the default localiser, and again with random first cuts, whose
distances from the true error vary. No training. The step oracle only judges.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import attribute  # noqa: E402
import rereason  # noqa: E402
import rollout  # noqa: E402
from benchmarks.localisation import flawed_rollouts  # noqa: E402
from benchmarks.figures import interval  # noqa: E402
from data.codec import load_codec  # noqa: E402
from model import load_model  # noqa: E402
from tiny import shapes  # noqa: E402


class RandomFirst(attribute.Locator):
    """Doubts a random step of a chain it has not seen before; afterwards the pristine check decides."""

    def __call__(self, chains: list):
        for c in chains:
            if c.checks is None:
                super().__call__([c])
                k = int(len(c.steps) * rollout.uniforms(f"cut/{c.problem.id}/{c.ids}", 1, 1).item())
                c.checks = [attribute.Check(max(0.6, x.same), x.token) for x in c.checks[:k]] + \
                           [attribute.Check(0.0)] + c.checks[k + 1:]
        super().__call__(chains)


def success(rows: list[dict], key: str) -> list[str]:
    """One table row a value of `key`: how many, how many repaired, tokens each."""
    lines = []
    for value in sorted({r[key] for r in rows}, key=str):
        part = [r for r in rows if r[key] == value]
        done = [float(r["repaired"]) for r in part]
        low, high = interval(done)
        lines.append(f"| {key} {value} | {len(part)} | "
                     f"{100 * sum(done) / len(done):.1f} % [{100 * low:.1f}, {100 * high:.1f}] | "
                     f"{sum(r['tokens'] for r in part) / len(part):.0f} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="checkpoint")
    parser.add_argument("--data", default="tiny:steps=9,kinds=tiles+path+bars",
                        help="tiny spec, held-out split")
    parser.add_argument("--parents", type=int, default=300, help="failed rollouts to repair")
    args = parser.parse_args()
    model, codec = load_model(args.model).eval(), load_codec(args.model)
    stream = shapes.Stream(args.data, "heldout", 1)
    found, _ = flawed_rollouts(model, codec, stream, args.parents, 256, 1)
    rows = []
    for name, cut, relook in (("default", attribute.Locator, "image"),
                              ("random first cut", RandomFirst, "image"),
                              ("look without the image", attribute.Locator, "text"),
                              ("restarts only", attribute.Locator, "none")):
        for at in range(0, len(found), 64):
            part = found[at:at + 64]
            locate = cut(model, codec)
            for t, _ in part:
                t.checks = None
            locate([t for t, _ in part])
            depends = attribute.visual_dependence(model, codec, [t for t, _ in part])
            kinds = [attribute.localise(t.checks, None, d, t.steps).kind for (t, _), d in zip(part, depends)]
            cuts = [rereason.doubted(t) for t, _ in part]
            locate.tokens = 0
            repairs = rereason.rectify(model, codec, [t for t, _ in part], [len(t.ids) for t, _ in part],
                                       [f"repairs/{at + n}" for n in range(len(part))], locate, 256,
                                       rereason.Rules(relook=relook))
            for r, kind, k, (t, true) in zip(repairs, kinds, cuts, part):
                off = ("none" if k is None else "4 or more" if abs(k - true) > 3 else
                       f"{k - true:+d}" if k != true else "0")
                rows.append({"setting": name, "task": t.problem.task, "kind": kind, "looks": r.looks,
                             "distance": off, "outcome": r.outcome, "repaired": r.outcome == "repaired",
                             "tokens": r.tokens})
    print(json.dumps({"model": args.model, "data": args.data, "torch": torch.__version__}))
    print("| of failed rollouts | n | repaired | tokens |\n|---|---|---|---|")
    print("\n".join(success(rows, "setting")))
    default = [r for r in rows if r["setting"] == "default"]
    for key in ("task", "kind", "looks", "outcome"):
        print("\n".join(success(default, key)))
    print("With random first cuts, by their distance in steps from the first wrong step:")
    print("\n".join(success([r for r in rows if r["setting"] == "random first cut"], "distance")))


if __name__ == "__main__":
    main()

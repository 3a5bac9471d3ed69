"""README's picture: a failed chain of the main job, what became of it, and the curves of both algorithms.

    python experiments/seeds.py --seeds 5           # the runs
    python experiments/picture.py                   # results/main.png

Takes a group with a repair from the groups.jsonl of a run, and the curves in results/seeds.json.
"""
import argparse
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rollout  # noqa: E402
from attribute import DOUBT, split_steps  # noqa: E402
from experiments.compare import COLOURS, draw_panel  # noqa: E402
from experiments.trace import find_problems  # noqa: E402
from reward import extract_answer  # noqa: E402
from train import read_jsonl  # noqa: E402

RESULTS = ROOT / "experiments" / "results"
FONT, SMALL = ImageFont.load_default(size=13), ImageFont.load_default(size=11)
RED, GREEN, GREY = COLOURS["ivr"], (20, 120, 50), (120, 120, 120)


def repaired(rows: list[dict], number: int) -> tuple:
    """(row, failed rollout, rectified one) of the `number`-th group with a repair; SystemExit without one."""
    found = []
    for row in rows:
        rectified = [t for t in row["rollouts"] if t["source"] is not None]
        if rectified:
            found.append((row, row["rollouts"][rectified[0]["source"]], rectified[0]))
    if number >= len(found):
        sys.exit(f"error: the run shows {len(found)} groups with a repair")
    return found[number]


def draw_chain(pen, row: dict, failed: dict, rectified: dict, left: int, top: int, codec):
    """The question, the steps with their gaps, below each that was mended what it became, the answers."""
    steps, became = [[step.text for step in split_steps(t["ids"], codec)] for t in (failed, rectified)]
    question = row["question"].removeprefix("<image>").partition("\n")[0]
    lines = [(question[:100], "black", SMALL), ("", "black", SMALL)]
    for n, (text, gap) in enumerate(zip(steps, failed["checks"])):
        mark = f"gap {gap:.1f}" if gap > DOUBT else ""
        lines.append((f"{text}   {mark}", RED if mark else "black", FONT))
        if became[n:] and became[n] != text:
            lines.append((f"      {became[n]}", GREEN, FONT))
    for t, colour in ((failed, RED), (rectified, GREEN)):
        lines.append((f"answer: {extract_answer(t['text'])}"[:100], colour, SMALL))
    for text, colour, font in lines:
        pen.text((left, top), text, fill=colour, font=font)
        top += 17


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "seeds" / "ivr-0", help="an IVR-R1 run")
    parser.add_argument("--number", type=int, default=0, help="which of its groups with a repair")
    args, curves = parser.parse_args(), {}
    config = json.loads((args.run / "config.json").read_text())
    row, failed, rectified = repaired(read_jsonl(args.run / "groups.jsonl"), args.number)
    for run in json.loads((RESULTS / "seeds.json").read_text())["runs"]:
        curves.setdefault(run["algo"], []).append([[0, run["before"]["avg@4"]["mean"]], *run["curve"]])
    image = Image.new("RGB", (1240, 440), "white")
    pen = ImageDraw.Draw(image)
    picture = find_problems(config, [row["id"]])[row["id"]].images[0]
    picture.thumbnail((300, 300))
    image.paste(picture, (20, 30))
    legend = "red: the reader doubts the step\ngreen: what it reads there instead"
    pen.text((20, 345), legend, fill=GREY, font=FONT)
    draw_chain(pen, row, failed, rectified, 340, 20, rollout.load_codec(config["model"]))
    draw_panel(pen, curves, 900, 60, 310, 300, "right, % of a step's rollouts (new problems)",
               "generated tokens")
    for n, (algo, name) in enumerate((("ivr", "IVR-R1"), ("grpo", "GRPO"))):
        pen.line((900, 400 + 20 * n, 925, 400 + 20 * n), fill=COLOURS[algo], width=3)
        pen.text((932, 400 + 20 * n), f"{name}, {len(curves[algo])} seeds", fill="black", font=FONT, anchor="lm")
    image.save(RESULTS / "main.png", optimize=True)


if __name__ == "__main__":
    main()

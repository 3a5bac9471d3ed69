"""Speed of the sampler: against transformers' `generate` on the same weights, and how its cost grows; and
what sharing the prompt saves in the update.

    python experiments/speed.py                     # tables, results/speed.json and speed.png; some minutes
    python experiments/speed.py --device cuda --dtype bfloat16

Every ratio is of two times taken alternately in this run, each the best of several; absolute times are this
machine's. But for the first comparison weights are random and the end-of-sequence token is banned, so that
every completion has its full length.
"""
import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rollout  # noqa: E402
import train  # noqa: E402
from model import Config, init_model, load_model, read_json, save_model  # noqa: E402
from tiny import shapes  # noqa: E402

TINY = ROOT / "tiny"
LARGE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
         "num_key_value_heads": 4, "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}}
BASE = {"group": 8, "tokens": 64, "side": 112, "width": 128}
SWEEPS = {"group": [1, 2, 4, 8, 16, 32, 64], "tokens": [16, 32, 64, 128, 256], "side": [56, 112, 224, 448],
          "width": [64, 128, 256, 512]}


def config_of(size: dict) -> dict:
    """The tiny model's config.json with other numbers."""
    raw = {**read_json(TINY / "config.json"), **size}
    raw["vision_config"] = {**raw["vision_config"], "out_hidden_size": raw["hidden_size"]}
    return raw


def random_model(size: dict, device, dtype):
    return init_model(Config.from_dict(config_of(size))).eval().to(device, dtype)


def endless(codec):
    """The codec without an end of sequence, and for images as large as real ones."""
    mask = codec.logit_mask.clone()
    mask[list(codec.eos_ids)] = -torch.inf
    return replace(codec, logit_mask=mask, image_config=replace(codec.image_config, max_pixels=1 << 20))


def problems_of(count: int, side: int = 0) -> list:
    """Tiny problems of five steps; side > 0: their images scaled to side x side."""
    problems = []
    for index in range(count):
        problem = shapes.make_problem("tiles", 5, index=index)
        if side:
            problem.images = [problem.images[0].resize((side, side))]
        problems.append(problem)
    return problems


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(functions: list, times: int = 3) -> list[float]:
    """Seconds of each function: the best of `times` rounds in which they take turns."""
    best = [float("inf")] * len(functions)
    for _ in range(times):
        for n, function in enumerate(functions):
            start = now()
            function()
            best[n] = min(best[n], now() - start)
    return best


# ---- Against transformers

def ours(model, codec, problems, group: int, tokens: int):
    """A call of our sampler, the prompts encoded before; returns the number of tokens."""
    prompts = [rollout.encode_prompt(problem, codec) for problem in problems]

    def call():
        groups = rollout.sample(model, problems, codec, group, tokens, prompts=prompts)
        return sum(len(t.ids) for t in sum(groups, []))

    return call


def theirs(hub, codec, problems, group: int, tokens: int):
    """The same of transformers' `generate`: prompts of one batch, `group` returned sequences each, its own
    cache, scaled_dot_product_attention."""
    prompts = [rollout.encode_prompt(problem, codec) for problem in problems]
    ids, mask = rollout.pad([prompt.ids for prompt in prompts], codec.pad_id, left=True)
    pixels = torch.cat([prompt.pixel_values for prompt in prompts])
    grids = torch.tensor(sum([prompt.grids for prompt in prompts], []))
    batch = {"input_ids": ids, "attention_mask": mask.long(), "pixel_values": pixels.to(hub.dtype),
             "image_grid_thw": grids, "mm_token_type_ids": (ids == codec.image_token_id).long()}
    batch = {name: value.to(hub.device) for name, value in batch.items()}
    ends = list(codec.eos_ids)
    shortest = tokens if codec.logit_mask[ends].isinf().all() else 1

    @torch.no_grad()
    def call():
        out = hub.generate(**batch, do_sample=True, num_return_sequences=group, min_new_tokens=shortest,
                           max_new_tokens=tokens, top_k=0, top_p=1.0, temperature=1.0, eos_token_id=ends,
                           pad_token_id=codec.pad_id)
        is_end = torch.isin(out[:, ids.shape[1]:], torch.tensor(ends, device=hub.device)).int()
        return int((is_end.cumsum(1) - is_end == 0).sum())          # the first end counts as a token

    return call


def hub_of(model, size: dict, device, dtype):
    """The same weights in transformers."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder, TINY)
        (Path(folder) / "config.json").write_text(json.dumps(config_of(size)))
        return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval().to(device)


def compare(name: str, model, hub, codec, batches: list, times: int) -> dict:
    """Tokens a second of both, 8 samples of up to 64 tokens each of the problems of every batch."""
    seconds, tokens, longest = [0.0, 0.0], [0, 0], 0
    for problems in batches:
        calls = [ours(model, codec, problems, 8, 64), theirs(hub, codec, problems, 8, 64)]
        for n, call in enumerate(calls):
            tokens[n] += call()                                     # and warm up
        for n, best in enumerate(timed(calls, times)):
            seconds[n] += best
        for problem in problems:
            longest = max(longest, len(rollout.encode_prompt(problem, codec, pixels=False).ids))
    speeds = tokens[0] / seconds[0], tokens[1] / seconds[1]
    print(f"{name}, prompts to {longest} tokens: {speeds[0]:.0f} tokens/s, generate {speeds[1]:.0f}, "
          f"{speeds[0] / speeds[1]:.1f} x", flush=True)
    return {"model": name, "prompt": longest, "ours": speeds[0], "generate": speeds[1],
            "ratio": speeds[0] / speeds[1]}


def against_generate(codec, device, dtype) -> list[dict]:
    """First the shipped model on problems of the default job, ends where it ends; then random weights, by the
    length of the prompt."""
    stream, batches = shapes.Stream("tiny", "train", 0), []
    for start in range(0, 48, 8):
        batches.append([stream[i] for i in range(start, start + 8)])
    model = load_model(TINY, device, dtype).eval()
    hub = hub_of(model, {}, device, dtype)
    rows = [compare("tiny (1.4 M), default job", model, hub, codec, batches, 2)]
    for name, size, sides, times in (("tiny (1.4 M), 64 tokens", {}, (0, 224, 448, 672, 896), 3),
                                     ("100 M, 64 tokens", LARGE, (0, 224), 2)):
        model = random_model(size, device, dtype)
        hub = hub_of(model, size, device, dtype)
        for side in sides:
            rows.append(compare(name, model, hub, endless(codec), [problems_of(8, side)], times))
    return rows


# ---- How the cost grows

def prefix_sharing(model, codec, group: int = 8) -> list[dict]:
    """A training forward and backward pass of 2 prompts x `group` rows, the prompt computed once a row over
    once a group, by the lengths of prompts and completions."""
    rows = []
    for side, tokens in ((56, 256), (224, 256), (224, 64), (448, 64)):
        shared, separate = [], []
        for problem in problems_of(2, side):
            prompt = rollout.encode_prompt(problem, codec)
            shared += [prompt] * group
            separate += [replace(prompt) for _ in range(group)]     # other objects are other prompts

        def update(prompts):
            logps, _, _ = rollout.completion_logps(model, codec, prompts, [[7] * tokens] * len(prompts))
            logps.sum().backward()
            model.zero_grad()

        once, each = timed([lambda: update(shared), lambda: update(separate)])
        rows.append({"prompt": len(prompt.ids), "completion": tokens, "ratio": each / once})
        print(f"prompt {len(prompt.ids)}, completion {tokens}: {each / once:.2f} x as fast", flush=True)
    return rows


def growth(codec, device, dtype) -> dict:
    """Seconds of a rollout by group size, completion length, image side and model width, the others fixed."""
    curves = {}
    for name, values in SWEEPS.items():
        calls = []
        for value in values:
            case = {**BASE, name: value}
            width, heads = case["width"], case["width"] // 32
            size = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": heads,
                    "num_key_value_heads": max(1, heads // 2)}
            model = random_model(size, device, dtype)
            calls.append(ours(model, codec, problems_of(4, case["side"]), case["group"], case["tokens"]))
        curves[name] = list(zip(values, timed(calls)))
        print(name, ", ".join(f"{value}: {seconds:.3f} s" for value, seconds in curves[name]), flush=True)
    return curves


def plot(curves: dict, file: Path, width: int = 260, height: int = 220):
    """One panel a sweep: time over the swept number, both from zero."""
    image = Image.new("RGB", (width * len(curves), height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=11)
    for n, (name, points) in enumerate(curves.items()):
        end, top = points[-1][0], max(seconds for _, seconds in points)
        left, upper, right, lower = n * width + 44, 24, (n + 1) * width - 16, height - 32
        pen.rectangle((left, upper, right, lower), outline=(180, 180, 180))
        place = []
        for value, seconds in points:
            place.append((left + (right - left) * value / end, lower - (lower - upper) * seconds / top))
        pen.line(place, fill=(40, 90, 200), width=2)
        for x, y in place:
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(40, 90, 200))
        pen.text((left - 4, upper), f"{top:.2f} s", fill="black", font=font, anchor="rm")
        pen.text((right, lower + 4), f"{end}", fill="black", font=font, anchor="rt")
        pen.text(((left + right) / 2, upper - 12), name, fill="black", font=font, anchor="mm")
    image.save(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--results", default=ROOT / "experiments" / "results", type=Path,
                        help="folder of speed.json and speed.png")
    args = parser.parse_args()
    place = train.device_and_dtype(args.device, args.dtype)
    codec = rollout.load_codec(str(TINY))
    torch.manual_seed(0)
    found = {"threads": torch.get_num_threads(), "device": str(place[0])}
    found["generate"] = against_generate(codec, *place)
    codec = endless(codec)
    found["prefix_sharing"] = prefix_sharing(random_model({}, *place), codec)
    found["growth"] = growth(codec, *place)
    train.write_text(args.results / "speed.json", json.dumps(found, indent=1) + "\n")
    plot(found["growth"], args.results / "speed.png")


if __name__ == "__main__":
    main()

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
from data.codec import load_codec  # noqa: E402
from model import Config, init_model, load_model, save_model  # noqa: E402
from runtime.files import read_json  # noqa: E402
from runtime.process import device_and_dtype  # noqa: E402
from tiny import shapes  # noqa: E402

SIZES = {"tiny (1.4 M)": {}, "100 M": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                          num_attention_heads=12, num_key_value_heads=4,
                                          mrope_section=[8, 12, 12])}


def model_of(size: dict, device, dtype):
    """The tiny architecture with other numbers and random weights."""
    raw = read_json(ROOT / "tiny" / "config.json")
    if size:
        raw = {**raw, **{k: v for k, v in size.items() if k != "mrope_section"}}
        raw["rope_scaling"] = {"type": "mrope", "mrope_section": size["mrope_section"]}
        raw["vision_config"] = {**raw["vision_config"], "out_hidden_size": size["hidden_size"]}
    return init_model(Config.from_dict(raw, "config")).eval().to(device, dtype), raw


def endless(codec):
    """The codec without an end of sequence, and for images as large as real ones."""
    mask = codec.logit_mask.clone()
    mask[list(codec.eos_ids)] = -torch.inf
    return replace(codec, logit_mask=mask, image_config=replace(codec.image_config, max_pixels=1 << 20))


def timed(functions: list, times: int = 3) -> list[float]:
    """Seconds of each function: the best of `times` rounds in which they take turns."""
    best = [float("inf")] * len(functions)
    for _ in range(times):
        for n, function in enumerate(functions):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best[n] = min(best[n], time.perf_counter() - start)
    return best


def problems_of(count: int, side: int = 0) -> list:
    """Tiny problems of five steps; side > 0: their images scaled to side x side."""
    problems = [shapes.make_problem("tiles", 5, index=n) for n in range(count)]
    return [replace(p, images=[p.images[0].resize((side, side))]) for p in problems] if side else problems


def ours(model, codec, problems, group: int, tokens: int):
    """A call of our sampler, the prompts encoded before; returns the number of tokens."""
    prompts = [rollout.encode_prompt(p, codec) for p in problems]
    return lambda: sum(len(t.ids) for g in rollout.sample(model, problems, codec, group, tokens,
                                                          prompts=prompts) for t in g)


def theirs(hub, codec, problems, group: int, tokens: int):
    """The same of transformers' `generate`: prompts of one batch, `group` returned sequences each, its own
    cache, scaled_dot_product_attention."""
    device, prompts = hub.device, [rollout.encode_prompt(p, codec) for p in problems]
    batch = {k: v for k, v in rollout.collate(prompts, codec.pad_id, device).items() if v is not None}
    ids, mask = rollout.pad([p.ids for p in prompts], codec.pad_id, left=True)
    batch.update(input_ids=ids.to(device), attention_mask=mask.long().to(device))
    batch["pixel_values"] = batch["pixel_values"].to(hub.dtype)
    kinds = torch.zeros_like(batch["input_ids"])
    kinds[batch["input_ids"] == codec.image_token_id] = 1
    batch["mm_token_type_ids"] = kinds
    ends = torch.tensor(codec.eos_ids, device=device)
    shortest = tokens if codec.logit_mask[list(codec.eos_ids)].isinf().all() else 1

    def call():
        with torch.no_grad():
            out = hub.generate(**batch, do_sample=True, num_return_sequences=group, min_new_tokens=shortest,
                               max_new_tokens=tokens, top_k=0, top_p=1.0, temperature=1.0,
                               eos_token_id=list(codec.eos_ids), pad_token_id=codec.pad_id)
        ended = torch.isin(out[:, ids.shape[1]:], ends).int().cumsum(1)     # the first end counts as a token
        return int(((ended - torch.isin(out[:, ids.shape[1]:], ends).int()) == 0).sum())

    return call


def by_mkl(call):
    """The same call without oneDNN (runtime/linear.py)."""
    def without():
        with torch.backends.mkldnn.flags(enabled=False):
            return call()

    return without


def hub_of(model, raw: dict, device, dtype):
    """The same weights in transformers."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder, ROOT / "tiny")
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval().to(device)


def against_generate(device, dtype) -> list[dict]:
    """Tokens a second of both, 8 prompts x 8 samples. First the shipped model on problems of the default job,
    ends where it ends; then 64 tokens each with random weights, by the length of the prompt."""
    rows, codec = [], load_codec(str(ROOT / "tiny"))

    def compare(name, model, hub, codec, batches, tokens, times):
        spent, count = [0.0] * 3, [0] * 3
        for problems in batches:
            calls = [ours(model, codec, problems, 8, tokens), theirs(hub, codec, problems, 8, tokens)]
            calls.append(by_mkl(calls[0]))
            count = [a + call() for a, call in zip(count, calls)]                    # and warm up
            spent = [a + b for a, b in zip(spent, timed(calls, times))]
        speeds = [n / s for n, s in zip(count, spent)]
        prompt = max(len(rollout.encode_prompt(p, codec, pixels=False).ids)
                     for problems in batches for p in problems)
        rows.append({"model": name, "prompt": prompt, "ours": speeds[0], "generate": speeds[1],
                     "ratio": speeds[0] / speeds[1], "ours without oneDNN": speeds[2]})
        print(f"{name}, prompts to {prompt} tokens: {speeds[0]:.0f} tokens/s, generate {speeds[1]:.0f}, "
              f"{speeds[0] / speeds[1]:.1f} x; without oneDNN {speeds[2] / speeds[1]:.1f} x", flush=True)

    stream = shapes.Stream("tiny", "train", 0)
    trained, raw = load_model(ROOT / "tiny", device, dtype).eval(), read_json(ROOT / "tiny" / "config.json")
    compare("tiny (1.4 M), default job", trained, hub_of(trained, raw, device, dtype), codec,
            [[stream[8 * n + i] for i in range(8)] for n in range(6)], 64, 2)
    for name, size in SIZES.items():
        model, raw = model_of(size, device, dtype)
        hub = hub_of(model, raw, device, dtype)
        for side in (0, 224) if size else (0, 224, 448, 672, 896):
            compare(f"{name}, 64 tokens", model, hub, endless(codec), [problems_of(8, side)], 64,
                    2 if size else 3)
    return rows


def prefill_and_decode(model, codec, problems, groups: list, tokens: int = 33) -> dict:
    """Seconds of the first token (prompts, vision, one sampled token) and of a decode step, by group size."""
    first = timed([ours(model, codec, problems, g, 1) for g in groups], 4)
    whole = timed([ours(model, codec, problems, g, tokens) for g in groups], 4)
    return {g: {"prefill": a, "step": (b - a) / (tokens - 1)} for g, a, b in zip(groups, first, whole)}


def prefix_sharing(model, codec, group: int = 8) -> list[dict]:
    """Seconds of a training forward and backward pass of 2 prompts x `group` rows, the prompt computed once a
    group and once a row, by the lengths of prompts and completions."""
    rows = []
    for side, tokens in ((56, 256), (224, 256), (224, 64), (448, 64)):
        prompts = [rollout.encode_prompt(p, codec) for p in problems_of(2, side)]
        completions = [[7] * tokens] * (2 * group)

        def update(prompts, prompt_of_row):
            logps, _, _ = rollout.completion_logps(model, prompts, prompt_of_row, completions, codec)
            logps.sum().backward()
            model.zero_grad()

        owner = [n // group for n in range(2 * group)]
        once, each = timed([lambda: update(prompts, owner),
                            lambda: update([prompts[n] for n in owner], list(range(2 * group)))], 3)
        rows.append({"prompt": len(prompts[0].ids), "completion": tokens, "ratio": each / once})
        print(f"prompt {rows[-1]['prompt']}, completion {tokens}: once a group {each / once:.2f} x as fast",
              flush=True)
    return rows


def growth(device, dtype, codec) -> dict:
    """Seconds of one rollout by group size, completion length, image side and model width, the others
    fixed."""
    base = dict(group=8, tokens=64, side=112, width=128)
    sweeps = {"group": [1, 2, 4, 8, 16, 32, 64], "tokens": [16, 32, 64, 128, 256],
              "side": [56, 112, 224, 448], "width": [64, 128, 256, 512]}
    out = {}
    for name, values in sweeps.items():
        calls = []
        for value in values:
            c = {**base, name: value}
            heads = c["width"] // 32
            size = dict(hidden_size=c["width"], intermediate_size=3 * c["width"], num_attention_heads=heads,
                        num_key_value_heads=max(1, heads // 2), mrope_section=[4, 6, 6])
            model, _ = model_of(size, device, dtype)
            calls.append(ours(model, codec, problems_of(4, c["side"]), c["group"], c["tokens"]))
        out[name] = list(zip(values, timed(calls, 3)))
        print(name, ", ".join(f"{v}: {s:.3f} s" for v, s in out[name]), flush=True)
    return out


def plot(curves: dict, file: Path, width: int = 260, height: int = 220):
    """One panel a sweep: time over the swept number, both from zero."""
    image = Image.new("RGB", (width * len(curves), height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=11)
    for n, (name, points) in enumerate(curves.items()):
        right, top = max(v for v, _ in points), max(s for _, s in points)
        x0, y0, w, h = n * width + 44, 24, width - 60, height - 56
        pen.rectangle((x0, y0, x0 + w, y0 + h), outline=(180, 180, 180))
        place = [(x0 + w * v / right, y0 + h * (1 - s / top)) for v, s in points]
        pen.line(place, fill=(40, 90, 200), width=2)
        for x, y in place:
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(40, 90, 200))
        pen.text((x0 - 4, y0), f"{top:.2f} s", fill="black", font=font, anchor="rm")
        pen.text((x0 + w, y0 + h + 4), f"{right}", fill="black", font=font, anchor="rt")
        pen.text((x0 + w / 2, y0 - 12), {"group": "group size", "tokens": "completion tokens", "side":
                 "image side, pixels", "width": "model width"}[name], fill="black", font=font, anchor="mm")
    image.save(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    args = parser.parse_args()
    device, dtype = device_and_dtype(args.device, args.dtype)
    codec = endless(load_codec(str(ROOT / "tiny")))
    torch.manual_seed(0)
    found = {"threads": torch.get_num_threads(), "device": str(device)}
    found["generate"] = against_generate(device, dtype)
    model, _ = model_of({}, device, dtype)
    by_group = prefill_and_decode(model, codec, problems_of(8), [8, 64])
    one = prefill_and_decode(model, codec, problems_of(1), [1, 64])
    found["prefill_64_over_8"] = by_group[64]["prefill"] / by_group[8]["prefill"]
    found["step_64_rows_over_1"] = one[64]["step"] / one[1]["step"]
    print(f"prefill of 8 prompts, G = 64 over G = 8: {found['prefill_64_over_8']:.2f} x; a decode step of 64 "
          f"rows over one row: {found['step_64_rows_over_1']:.2f} x", flush=True)
    found["prefix_sharing"] = prefix_sharing(model, codec)
    found["growth"] = growth(device, dtype, codec)
    folder = ROOT / "experiments" / "results"
    (folder / "speed.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(found["growth"], folder / "speed.png")


if __name__ == "__main__":
    main()

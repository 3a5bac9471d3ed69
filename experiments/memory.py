"""How much memory a run takes, reckoned, and the reckoning checked against what autograd keeps.

    python experiments/memory.py                # the table in README: 3B to 32B on one GPU and on eight
    python experiments/memory.py --check        # small models on CPU: kept tensors, reckoned and counted

`footprint` adds up what stands in memory at the peak of an update: weights, fp32 sums of gradients, the shard
of masters and moments, one transient gradient, what the forward keeps for the backward, the chunk of logits.
With --shard all gradients and weights are shards too, but for two layers and what is not in a layer.
The key-value cache of sampling is freed before the update, so it only counts where it is larger.
"""
import argparse
import inspect
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import grpo  # noqa: E402
import rollout  # noqa: E402
from data.codec import load_codec  # noqa: E402
from model import Config, Qwen25VL, init_model  # noqa: E402
from runtime.files import read_json  # noqa: E402
from tiny import shapes  # noqa: E402

GIB = 2 ** 30
CHUNK = inspect.signature(grpo.token_logps).parameters["chunk"].default
SHARED = {"model_type": "qwen2_5_vl", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
          "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "image_token_id": 151655,
          "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653}
VISION = {"model_type": "qwen2_5_vl", "depth": 32, "hidden_size": 1280, "intermediate_size": 3420,
          "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
          "window_size": 112, "in_channels": 3, "fullatt_block_indexes": [7, 15, 23, 31],
          "hidden_act": "silu"}
SIZES = {                                   # the published configurations
    "3B": {**SHARED, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
           "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936,
           "tie_word_embeddings": True, "vision_config": {**VISION, "out_hidden_size": 2048}},
    "7B": {**SHARED, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
           "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
           "tie_word_embeddings": False, "vision_config": {**VISION, "out_hidden_size": 3584}},
    "32B": {**SHARED, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
            "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064,
            "tie_word_embeddings": False, "vision_config": {**VISION, "intermediate_size": 3456,
                                                            "out_hidden_size": 5120}}}


def parameters(config: Config) -> dict:
    """Numbers of parameters: all, the vision tower's, the largest matrix, those of a decoder layer."""
    with torch.device("meta"):
        model = Qwen25VL(config)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    return {"all": sum(sizes.values()), "vision": sum(v for n, v in sizes.items() if n.startswith("visual")),
            "largest": max(sizes.values()),
            "layer": sum(v for n, v in sizes.items() if n.startswith("model.layers.0."))}


def kept(config: Config, prompts: int, prompt_tokens: int, rows: int, tokens: int, remat: bool,
         size: int) -> tuple[int, int]:
    """(bytes the decoder keeps from the forward to the backward pass, bytes of one layer made again there):
    prompts once, each row's tokens, and, for each row, its prompt's keys and values beside its own and the
    mask (attention wants them so). size: bytes a number."""
    c = config
    d, i, heads, kv = c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads
    head = d // heads
    alone, rowed = prompts * prompt_tokens, rows * tokens                       # tokens through the layers
    # a token in a layer: 2 norms (input in fp32, normed), q, k, v turned, attention out, gate, up, product
    token = size * (7 * d + 4 * i + 2 * kv * head) + 4 * (2 * d + 2)
    side = rows * (prompt_tokens + tokens) * 2 * d * size               # keys and values, heads repeated
    mask = rows * tokens * (prompt_tokens + tokens) * size
    layer, ends = (alone + rowed) * token + side + mask, 3 * (alone + rowed) * d * size
    if remat:
        return c.num_hidden_layers * (alone + rowed) * d * size + ends, layer
    return c.num_hidden_layers * layer + ends, 0


def footprint(config: Config, world: int = 1, prompts: int = 1, prompt_tokens: int = 1024, rows: int = 4,
              tokens: int = 1024, remat: bool = True, freeze_vision: bool = False, size: int = 2,
              shard_all: bool = False) -> dict:
    """Bytes on each of `world` ranks at the peak of an update of `rows` sequences of `tokens` completion
    tokens, by part. size: bytes a number of the model (2: bfloat16 with fp32 masters, 4: fp32)."""
    n = parameters(config)
    trained = n["all"] - n["vision"] * freeze_vision
    masters = 12 if size == 2 else 8                        # of fp32 weights no copy is kept
    chunk = CHUNK * config.vocab_size * 4 * 3               # logits, their softmax, its gradient
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * (
        config.hidden_size // config.num_attention_heads) * size * (prompts * prompt_tokens + rows * tokens)
    parts = {"weights": n["all"] * size, "gradients": trained * 4 + n["largest"] * size,
             "optimizer": trained * masters // world,
             "activations": sum(kept(config, prompts, prompt_tokens, rows, tokens, remat, size)),
             "logits": chunk}
    if shard_all:                           # fp32 shards; two layers and the rest of the model gathered
        rest = n["all"] - config.num_hidden_layers * n["layer"]
        parts.update(weights=(2 * n["layer"] + rest) * size, gradients=trained * 4 // world + rest * size,
                     optimizer=(trained * 8 + n["all"] * 4) // world)
    sampling = n["all"] * size + parts["optimizer"] + cache
    return {**parts, "total": max(sum(parts.values()), sampling), "while sampling": sampling}


def counted(config: Config, prompts: int, rows: int, tokens: int, remat: bool) -> tuple[int, int]:
    """(bytes reckoned, bytes counted) kept by a real forward on CPU: every tensor autograd keeps is seen
    once, parameters left out."""
    model = init_model(config)
    model.remat = remat
    codec = load_codec(str(ROOT / "tiny"))
    problems = [replace(shapes.make_problem("tiles", 9, index=0), images=[], question="red " * 100)] * prompts
    encoded = [rollout.encode_prompt(p, codec) for p in problems]
    own, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def see(tensor):
        store = tensor.untyped_storage()
        if store.data_ptr() not in own and tensor.is_floating_point():
            seen[store.data_ptr()] = store.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        hidden, _, _ = rollout.completion_hidden(model, encoded, [n * prompts // rows for n in range(rows)],
                                                 [[7] * tokens] * rows, codec.pad_id)
    length = len(encoded[0].ids)
    del hidden
    return kept(config, prompts, length, rows, tokens, remat, 4)[0], sum(seen.values())


def check():
    """Reckoned over counted, for a few shapes of the tiny model."""
    tiny = Config.from_dict(read_json(ROOT / "tiny" / "config.json"))
    print("| width | layers | prompts | rows | tokens | remat | reckoned | counted | ratio |\n|" + "---|" * 9)
    for width, layers in ((128, 4), (256, 4), (256, 12)):
        config = replace(tiny, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
                         num_attention_heads=width // 32, num_key_value_heads=width // 64)
        for prompts, rows, tokens in ((2, 2, 300), (1, 8, 100), (4, 4, 600)):
            for remat in (False, True):
                guess, real = counted(config, prompts, rows, tokens, remat)
                print(f"| {width} | {layers} | {prompts} | {rows} | {tokens} | {remat} | "
                      f"{guess / 1e6:.1f} MB | {real / 1e6:.1f} MB | {guess / real:.2f} |")


def table():
    """What fits where: the most rows of 1,024 completion tokens a forward-backward pass."""
    print("| model | GPUs | vision | --shard | weights | gradients | optimizer | logits | left for "
          "activations, GiB | rows a pass |\n|" + "---|" * 10)
    for name, raw in SIZES.items():
        config = Config.from_dict(raw, name)
        for (world, gpu), frozen, shard in itertools.product(
                ((8, 80), (8, 141)) if name == "32B" else ((1, 80), (1, 141), (8, 80)),
                (False, True), ("optimizer", "all")):
            if frozen and (shard == "all" or name == "32B") or shard == "all" and world == 1:
                continue
            room = 0.94 * gpu * 1e9                 # the rest: CUDA itself, fragments
            how = dict(freeze_vision=frozen, shard_all=shard == "all")
            fits = [rows for rows in range(1, 257) if footprint(config, world, 1 + rows // 8, rows=rows,
                                                                **how)["total"] <= room]
            f = footprint(config, world, rows=1, **how)
            cells = " | ".join(f"{f[k] / GIB:.1f}" for k in list(f)[:3] + ["logits"])
            held = sum(f[k] for k in ("weights", "gradients", "optimizer", "logits"))
            how = f"{'frozen' if frozen else 'trained'} | {shard}"
            print(f"| {name} | {world} x {gpu} GB | {how} | {cells} | "
                  f"{max(0, room - held) / GIB:.1f} | {max(fits, default=0) or 'does not fit'} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what autograd keeps")
    check() if parser.parse_args().check else table()


if __name__ == "__main__":
    main()

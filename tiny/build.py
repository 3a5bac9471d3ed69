"""Build the embedded default from nothing: tokenizer, config, and warm-started weights (about 25 minutes on 2
cores).

    python tiny/build.py --out tiny

Six stages, all on problems drawn afresh (a fixed pool of pictures is memorised, not learned):
  1. eyes     - the vision tower learns to name what each cell shows, in the decoder's own words;
  2. look up  - `train.py --stage sft` on right demonstrations: the decoder learns to look up, in order;
  3. longer   - the same with up to 20 look-ups;
  4. forms    - the same with multiple choice and yes/no;
  5. second look - to repeat or correct a single step: what attribute.py and rereason.py ask;
  6. erosion  - chains with planted erosion, whose chance grows with depth, among clean second looks:
                afterwards the policy can read, and in long chains mostly does not. From here reinforcement
                learning starts.
"""
import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import Config, ImageConfig, init_model, load_model, preprocess_image, save_model  # noqa: E402
from tiny import shapes  # noqa: E402

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
            "<|image_pad|>", "<|video_pad|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# Qwen's template without the default system turn
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
            "{% else %}{% for part in m.content %}{% if part.type == 'image' %}"
            "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
            "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def write_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """Byte-level BPE, so any text has tokens; words of the tasks are one token each."""
    rng = random.Random(0)
    texts = []
    for i in range(1500):
        p = shapes.make_problem(shapes.KINDS[i % 4], 1 + i % 20, shapes.FORMS[i // 4 % 3], "train", 7, i)
        texts += [p.question.replace("<image>", ""), shapes.demonstrate(p, (0.2, 0.2), rng)]
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIALS) - len(TAGS), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator([t for text in texts for t in text.replace("<think>", "").replace("</think>", " ")
                             .replace("<answer>", "").replace("</answer>", "").split("\n")], trainer)
    tok.add_special_tokens([AddedToken(s, special=True) for s in SPECIALS])
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAGS])
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False, "model_max_length": 32768, "chat_template": TEMPLATE},
        indent=1))
    return tok


def write_configs(folder: Path, tok: Tokenizer):
    """config.json, preprocessor_config.json and generation_config.json in the hub's form."""
    ident = tok.token_to_id
    config = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
              "vocab_size": tok.get_vocab_size(), "hidden_size": 128, "intermediate_size": 384,
              "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
              "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
              "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
              "max_position_embeddings": 4096, "tie_word_embeddings": True, "use_sliding_window": False,
              "initializer_range": 0.06,
              "bos_token_id": ident("<|endoftext|>"), "eos_token_id": ident("<|im_end|>"),
              "image_token_id": ident("<|image_pad|>"), "video_token_id": ident("<|video_pad|>"),
              "vision_start_token_id": ident("<|vision_start|>"),
              "vision_end_token_id": ident("<|vision_end|>"),
              "vision_config": {"model_type": "qwen2_5_vl", "depth": 3, "hidden_size": 96,
                                "intermediate_size": 192, "num_heads": 3, "in_channels": 3, "patch_size": 14,
                                "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
                                "out_hidden_size": 128,
                                "hidden_act": "silu", "fullatt_block_indexes": [2]}}
    base = ImageConfig()
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 28 * 28,
                 "max_pixels": 28 * 28 * 256, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
                 "image_mean": base.image_mean, "image_std": base.image_std}
    generation = {"eos_token_id": ident("<|im_end|>"), "pad_token_id": ident("<|endoftext|>")}
    for name, value in (("config", config), ("preprocessor_config", processor),
                        ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1))
    return Config.from_dict(config), ImageConfig.from_dict(processor)


@torch.no_grad()
def set_heads(model, gain: float = 0.09):
    """Some attention heads start as what the tasks call for; training goes on from there.

    Layer 0, first half: the token before. Query and key are constant (biases), turned against each other by
    one position; what is read there is written in directions of its own. Layer 1 and first half of layer 2:
    like to like. Queries and keys go through one matrix, so a token attends to tokens of like content. The
    first half passes on what it finds as it is; the second half of layer 1 learns in stage 1. Layer 2, second
    half: induction. Attends to tokens that follow what this token follows, and passes them on.

    With like to like, digits are read after 150 steps of stage 2; without, not yet after 600."""
    rng, c = torch.Generator().manual_seed(1), model.config
    group, width = c.num_attention_heads // c.num_key_value_heads, c.hidden_size
    d = width // c.num_attention_heads
    normal = lambda: torch.randn(d, width, generator=rng) * gain
    frame = lambda: torch.linalg.qr(torch.randn(width, d, generator=rng))[0].T           # (d, D), orthonormal

    def put(layer, kv, query=None, key=None, value=None, output=None):
        a, part = model.model.layers[layer].self_attn, slice(kv * d, (kv + 1) * d)
        for weight, rows in ((a.k_proj.weight, key), (a.v_proj.weight, value)):
            if rows is not None:
                weight[part] = rows
        for h in range(kv * group, (kv + 1) * group):
            if query is not None:
                a.q_proj.weight[h * d:(h + 1) * d] = query
            if output is not None:
                a.o_proj.weight[:, h * d:(h + 1) * d] = output.T / group

    read, write = frame(), frame()
    put(0, 0, 0.2 * normal(), 0.2 * normal(), read, write)
    a, half = model.model.layers[0].self_attn, d // 2
    turn = c.rope_theta ** (-torch.arange(half) / half)                                     # angle a position
    a.k_proj.bias[:half] = 5.0
    a.k_proj.bias[half:d] = 0.0
    for h in range(group):
        a.q_proj.bias[h * d:(h + 1) * d] = 5 * torch.cat((turn.cos(), -turn.sin()))
    for layer, kv in ((1, 0), (1, 1), (2, 0)):
        match, copy = normal(), frame()
        put(layer, kv, match, match, *((copy, copy) if kv == 0 else ()))
    match, copy = torch.linalg.qr(torch.randn(d, d, generator=rng))[0] * gain * width ** 0.5 @ write, frame()
    put(2, 1, match, match, copy, copy)


def train_eyes(model, image_config, tok, steps: int, seed: int = 0):
    """Stage 1: each merged image token is taught to name what its cell shows - colour, digit (or bar height),
    shape - by its dot product with the decoder's own word embeddings. The dot of a path tile first goes
    through the value and output matrices of a head of layer 1, as its colour must not be taken for the
    tile's. So image tokens start out close to words, and a decoder that learns to find a word again finds it
    in the image as well."""
    groups = {"colour": shapes.NAMES, "digit": "0123456789", "shape": shapes.SHAPES,
              "dot": (*shapes.NAMES, "end")}
    # at the start of a line a name has a token of its own, without the space
    forms = lambda g, w: (" " + w, w) if g in ("colour", "shape") else (" " + w,)
    ids = {g: torch.tensor([[tok.encode(f).ids[0] for f in forms(g, w)] for w in words])
           for g, words in groups.items()}
    a = model.model.layers[1].self_attn
    params = [*model.visual.parameters(), model.head_weight, a.v_proj.weight, a.o_proj.weight]
    optimizer = torch.optim.AdamW(params, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    rng = random.Random(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * max(0.05, 1 - step / steps)
        pixels, grids, cells = [], [], []
        for i in range(32):
            kind, length = rng.choice(shapes.KINDS), rng.choice((9, 12, 16, 20))
            p = shapes.make_problem(kind, length, "free", "train", seed, 32 * step + i)
            x, grid = preprocess_image(p.images[0], image_config)
            pixels.append(torch.from_numpy(x))
            grids.append(grid)
            cells += cell_facts(p.oracle, grid[1] // 2, grid[2] // 2)
        features = model.model.norm(model.visual(torch.cat(pixels), torch.tensor(grids)))           # (M, D)
        loss, right = 0.0, {}
        for g, words in groups.items():
            asked = [i for i, cell in enumerate(cells) if g in cell]
            labels = torch.tensor([words.index(cells[i][g]) for i in asked])
            seen = features[asked]
            if g == "dot":                          # the last head's part of the two matrices
                seen = model.model.norm(seen @ a.v_proj.weight[-a.d:].T @ a.o_proj.weight[:, -a.d:].T)
            logits = seen @ model.head_weight[ids[g]].mean(1).T                        # (cells, words)
            loss = loss + F.cross_entropy(logits, labels)
            right[g] = f"{(logits.argmax(1) == labels).float().mean():.3f}"
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"eyes step {step}/{steps}  loss {loss.item():.3f}  right {right}", flush=True)


def cell_facts(facts, rows, cols) -> list[dict]:
    """What each of the rows * cols cells shows."""
    out = {}
    for (y, x), thing in facts["cells"]:
        if facts["kind"] == "count":
            out[y, x] = {"colour": thing[0], "shape": thing[1]}
        else:
            out[y, x] = {"colour": thing, "digit": str(facts["show"][thing])}
        if facts["kind"] == "path":
            out[y, x]["dot"] = facts["next"][thing]
        if facts["kind"] == "bars":             # the bar stands on the lowest cell; all three know its height
            out[y + 2, x] = out[y, x]
            out[y, x] = out[y + 1, x] = {"digit": str(facts["show"][thing])}
    return [out.get((y, x), {}) for y in range(rows) for x in range(cols)]


STAGES = {      # stages 2 to 6 as flags of train.py
    "look up": "--data tiny:steps=8-12 --max_steps 500 --lr 1e-3 --lr_end 0.5 --warmup_steps 30",
    "longer": "--data tiny:steps=6-20 --max_steps 230 --lr 5e-4 --lr_end 0.5",
    "forms": "--data tiny:steps=3-8,forms=free+free+choice+yesno --max_steps 300 --lr 5e-4 --lr_end 0.2",
    "second look": "--data tiny:steps=2-20,forms=check+relook+relook+free --max_steps 280 --lr 5e-4 "
                   "--lr_end 0.3",
    "erosion": "--data tiny:steps=3-20,"
               "forms=free+check+free+relook+choice+free+relook+free+check+yesno+relook "
               "--max_steps 250 --lr 3e-4 --lr_end 0.2 --erosion_first 0.05 --erosion_ninth 0.4",
}
COMMON = ("--stage sft --batch 48 --max_new_tokens 256 --freeze_vision --eval_problems 0 --save_every 1000 "
          "--device cpu")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "tiny"), help="folder for the model")
    parser.add_argument("--eyes_steps", type=int, default=1000, help="optimiser steps of stage 1")
    args = parser.parse_args()
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        stage = Path(scratch) / "eyes"
        stage.mkdir()
        tok = write_tokenizer(stage, 640)
        config, image_config = write_configs(stage, tok)
        model = init_model(config)
        set_heads(model)
        size = sum(p.numel() for p in model.parameters())
        print(f"{size:,} parameters, vocabulary {config.vocab_size}", flush=True)
        train_eyes(model, image_config, tok, args.eyes_steps)
        save_model(model, stage, stage)
        for name, flags in STAGES.items():
            run = Path(scratch) / name.replace(" ", "-")
            subprocess.run([sys.executable, str(ROOT / "train.py"), "--model", str(stage), "--out", str(run),
                            *COMMON.split(), *flags.split()], check=True)
            stage = max(run.glob("checkpoint-*"))
        save_model(load_model(str(stage)), folder, stage)


if __name__ == "__main__":
    main()

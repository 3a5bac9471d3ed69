"""Build the embedded default from nothing: tokenizer, config, and warm-started weights (about 20 minutes on 2 cores).

    python tiny/build.py --out tiny

Three stages, all on problems drawn afresh (a fixed pool of pictures is memorised, not learned):
  1. eyes     - the vision tower alone names colour, value and extra mark of every cell, by a throw-away linear head;
  2. clean    - `train.py --stage sft` on right demonstrations: the decoder learns to look things up;
  3. eroded   - `train.py --stage sft` on demonstrations with planted erosion, whose chance grows with depth: afterwards
                the policy can read, and in long chains mostly does not. This is the warm start that RL begins from.
"""
import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import Config, ImageConfig, init_model, preprocess_image, save_model  # noqa: E402
from tiny import shapes  # noqa: E402

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# Qwen's template without the default system turn
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
            "{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
            "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
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
        "clean_up_tokenization_spaces": False, "model_max_length": 32768, "chat_template": TEMPLATE}, indent=1))
    return tok


def write_configs(folder: Path, tok: Tokenizer):
    """config.json, preprocessor_config.json and generation_config.json in the hub's form."""
    ident = tok.token_to_id
    config = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
              "vocab_size": tok.get_vocab_size(), "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
              "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-6,
              "rope_theta": 10000.0, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
              "max_position_embeddings": 4096, "tie_word_embeddings": True, "use_sliding_window": False,
              "initializer_range": 0.06, "bos_token_id": ident("<|endoftext|>"), "eos_token_id": ident("<|im_end|>"),
              "image_token_id": ident("<|image_pad|>"), "video_token_id": ident("<|video_pad|>"),
              "vision_start_token_id": ident("<|vision_start|>"), "vision_end_token_id": ident("<|vision_end|>"),
              "vision_config": {"model_type": "qwen2_5_vl", "depth": 3, "hidden_size": 96, "intermediate_size": 192,
                                "num_heads": 3, "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2,
                                "temporal_patch_size": 2, "window_size": 112, "out_hidden_size": 128,
                                "hidden_act": "silu", "fullatt_block_indexes": [2]}}
    base = ImageConfig()
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 28 * 28, "max_pixels": 28 * 28 * 256,
                 "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "image_mean": base.image_mean,
                 "image_std": base.image_std}
    generation = {"eos_token_id": ident("<|im_end|>"), "pad_token_id": ident("<|endoftext|>")}
    for name, value in (("config", config), ("preprocessor_config", processor), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1))
    return Config.from_dict(config), ImageConfig.from_dict(processor)


def train_eyes(model, image_config, minutes: float, seed: int = 0):
    """Stage 1. Each merged image token names what its cell shows: colour, value (digit or bar height), mark (the dot's
    colour or the object's shape). The head is thrown away."""
    marks = ("none", "end", *shapes.NAMES, *shapes.SHAPES)
    heads = nn.Linear(model.config.hidden_size, (len(shapes.NAMES) + 1) + 11 + len(marks))
    widths = (len(shapes.NAMES) + 1, 11, len(marks))
    params = [*model.visual.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(params, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    rng, started, step = random.Random(seed), time.time(), 0
    while (spent := (time.time() - started) / 60) < minutes:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * max(0.05, 1 - spent / minutes)
        pixels, grids, labels = [], [], []
        for i in range(32):
            p = shapes.make_problem(rng.choice(shapes.KINDS), rng.choice((9, 12, 16, 20)), "free", "train", seed, 32 * step + i)
            x, grid = preprocess_image(p.images[0], image_config)
            pixels.append(torch.from_numpy(x))
            grids.append(grid)
            labels.append(cell_labels(p.oracle, grid[1] // 2, grid[2] // 2, marks))
        labels = torch.cat(labels)                                                      # (M, 3)
        features = model.visual(torch.cat(pixels), torch.tensor(grids))
        parts = heads(features).split(widths, dim=1)
        loss = sum(F.cross_entropy(a, labels[:, i], ignore_index=-1) for i, a in enumerate(parts))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if step % 50 == 0:
            right = [f"{(a.argmax(1) == labels[:, i])[labels[:, i] > 0].float().mean():.3f}" for i, a in enumerate(parts)]
            print(f"eyes step {step} {spent:.1f} min loss {loss.item():.3f} colour/value/mark right {' '.join(right)}", flush=True)
        step += 1


def cell_labels(facts, rows, cols, marks):
    """(rows * cols, 3) labels of the cells: colour, value, mark; 0 = none, -1 = not asked."""
    out = torch.zeros(rows, cols, 3, dtype=torch.long)
    for (y, x), thing in facts["cells"]:
        if facts["kind"] == "count":
            out[y, x] = torch.tensor((shapes.NAMES.index(thing[0]) + 1, 0, marks.index(thing[1])))
        else:
            follow = facts.get("next", {}).get(thing)
            label = torch.tensor((shapes.NAMES.index(thing) + 1, facts["show"][thing] + 1, marks.index(follow or "none")))
            if facts["kind"] == "bars":             # the whole column knows the bar
                label[1] = facts["show"][thing] + 1
                out[y:y + 3, x] = label
                out[y:y + 3, x][:2, 0] = -1         # upper cells may be empty
            else:
                out[y, x] = label
    return out.reshape(-1, 3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "tiny"))
    parser.add_argument("--eyes_minutes", type=float, default=3.0)
    args = parser.parse_args()
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    tok = write_tokenizer(folder, 640)
    config, image_config = write_configs(folder, tok)
    torch.manual_seed(0)
    model = init_model(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {config.vocab_size}")
    train_eyes(model, image_config, args.eyes_minutes)
    save_model(model, folder, folder)


if __name__ == "__main__":
    main()

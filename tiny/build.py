"""Build the embedded tiny model: its tokenizer and its warm-started weights, from nothing.

    python tiny/build.py --out tiny         # about 25 minutes

Takes the four config files beside it, written by hand; gives a folder in the hub's form, for `--model`. First
the vision tower learns to name what each cell shows (`train_eyes`), then the decoder learns the tasks
(`STAGES`). All problems are drawn afresh: a fixed pool of pictures is memorised, not learned.

The paper trains no such model; all of this is our choice. Left out: pretrained weights, natural images.
Worked example: `--out runs/tiny` logs its stages and leaves tokenizer.json, model.safetensors and the configs
in runs/tiny. This policy can read, but in a long chain mostly does not: here reinforcement learning starts.
"""
import argparse
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model as m  # noqa: E402
from tiny import shapes  # noqa: E402

CONFIGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
            "<|image_pad|>", "<|video_pad|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
WORDS = {"colour": shapes.NAMES, "digit": tuple("0123456789"), "shape": shapes.SHAPES,
         "dot": (*shapes.NAMES, "end")}         # what a cell can show; a bar shows its height as a digit
COMMON = ("--stage sft --batch 48 --max_new_tokens 256 --freeze_vision --eval_problems 0 --save_every 1000 "
          "--warmup_steps 5 --device cpu")
KINDS = "kinds=" + "+".join(shapes.KINDS)
STAGES = {
    # right demonstrations: to look up, in order
    "look up": f"--data tiny:steps=8-12,{KINDS} --max_steps 500 --lr 1e-3 --lr_end 0.5 --warmup_steps 30",
    "longer": f"--data tiny:steps=6-20,{KINDS} --max_steps 300 --lr 5e-4 --lr_end 0.5",
    "forms": f"--data tiny:steps=1-9,{KINDS},forms=free+free+choice+yesno --max_steps 400 --lr 5e-4 "
             "--lr_end 0.2",
    # language takes over from the image, the more the deeper; the first two steps stay clean
    "erosion": f"--data tiny:steps=1-20,{KINDS},forms=free+free+free+choice+yesno --max_steps 400 --lr 3e-4 "
               "--lr_end 0.1 --erosion_first 0.0 --erosion_ninth 0.9",
}


def write_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json: byte-level BPE, so any text has tokens; words of the tasks are one token each."""
    rng, lines = random.Random(0), []
    for i in range(1500):
        kind, form = shapes.KINDS[i % 4], shapes.FORMS[i // 4 % 3]
        problem = shapes.make_problem(kind, 1 + i % 20, form, "train", 7, i)
        demonstration = shapes.demonstrate(problem, (0.2, 0.2), rng).replace("</think>", " ")
        lines += re.sub("<.*?>", "", problem.question + "\n" + demonstration).split("\n")
    tok = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(lines, trainers.BpeTrainer(show_progress=False, initial_alphabet=alphabet))
    tok.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    tok.add_tokens([AddedToken(text, special=False, normalized=False) for text in TAGS])
    tok.save(str(folder / "tokenizer.json"))
    return tok


@torch.no_grad()
def set_heads(model, gain: float = 0.09):
    """Some attention heads start as what the tasks call for; training continues from there.

    Layer 0, first half: the token before. Query and key are constant (biases), turned against each other by
    one position. Layer 1 and first half of layer 2: like to like. Queries and keys go through one matrix, so
    a token attends to tokens of like content; what the second half of layer 1 passes on is left to
    `train_eyes`. Layer 2, second half: induction. Attends to tokens that follow what this token follows.
    With like to like, digits are read after 150 steps of the first stage; without, not yet after 600."""
    c, rng = model.config, torch.Generator().manual_seed(1)
    group, width = c.num_attention_heads // c.num_key_value_heads, c.hidden_size
    d = width // c.num_attention_heads

    def normal():                                                                       # (d, D)
        return torch.randn(d, width, generator=rng) * gain

    def frame():                                                                        # (d, D), orthonormal
        return torch.linalg.qr(torch.randn(width, d, generator=rng))[0].T

    def put(layer, kv, query, key, value=None, output=None):
        """Fill key head `kv` and the query heads that share it."""
        attention = model.model.layers[layer].self_attn
        rows, q_rows = slice(kv * d, (kv + 1) * d), slice(kv * group * d, (kv + 1) * group * d)
        attention.k_proj.weight[rows] = key
        attention.q_proj.weight[q_rows] = query.repeat(group, 1)
        if value is not None:
            attention.v_proj.weight[rows] = value
            attention.o_proj.weight[:, q_rows] = output.T.repeat(1, group) / group

    read, write = frame(), frame()
    put(0, 0, 0.2 * normal(), 0.2 * normal(), read, write)
    first, half = model.model.layers[0].self_attn, d // 2
    turn = c.rope_theta ** (-torch.arange(half) / half)                                 # angle a position
    first.k_proj.bias[:half] = 5.0
    first.q_proj.bias[:group * d] = 5 * torch.cat((turn.cos(), -turn.sin())).repeat(group)
    for layer, kv in ((1, 0), (1, 1), (2, 0)):
        match, copy = normal(), frame()
        put(layer, kv, match, match, *((copy, copy) if kv == 0 else ()))
    turned = torch.linalg.qr(torch.randn(d, d, generator=rng))[0]
    match, copy = turned * gain * width ** 0.5 @ write, frame()
    put(2, 1, match, match, copy, copy)


def train_eyes(model, image_config, tok, steps: int = 1500, seed: int = 0):
    """The vision tower: each merged image token is taught to name what its cell shows by its dot product with
    the decoder's own word embeddings. So image tokens start out close to words, and a decoder that learns to
    find a word again finds it in the image as well. The dot of a path tile first goes through the value and
    output matrices of a head of layer 1, as its colour must not be taken for the tile's."""
    word_ids = {}
    for group, words in WORDS.items():
        word_ids[group] = torch.tensor([tok.encode(" " + word).ids[:1] for word in words])      # (words, 1)
        if group in ("colour", "shape"):        # at the start of a line a name has a token without the space
            alone = torch.tensor([tok.encode(word).ids[:1] for word in words])
            word_ids[group] = torch.cat((word_ids[group], alone), dim=1)                        # (words, 2)
    head = model.model.layers[1].self_attn
    params = [*model.visual.parameters(), model.head_weight, head.v_proj.weight, head.o_proj.weight]
    optimizer = torch.optim.AdamW(params, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    rng = random.Random(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * max(0.05, 1 - step / steps)
        pixels, grids, cells = [], [], []
        for i in range(32):
            kind, length = rng.choice(shapes.KINDS), rng.choice((9, 12, 16, 20))
            problem = shapes.make_problem(kind, length, "free", "train", seed, 32 * step + i)
            patches, grid = m.preprocess_image(problem.images[0], image_config)
            pixels.append(torch.from_numpy(patches))
            grids.append(grid)
            cells += cell_facts(problem.oracle, grid[1] // 2, grid[2] // 2)
        features = model.model.norm(model.visual(torch.cat(pixels), torch.tensor(grids)))       # (M, D)
        loss, right = 0.0, {}
        for group, words in WORDS.items():
            asked = [place for place, cell in enumerate(cells) if group in cell]
            labels = torch.tensor([words.index(cells[place][group]) for place in asked])
            seen = features[asked]
            if group == "dot":                  # the last head's part of the two matrices
                seen = seen @ head.v_proj.weight[-head.d:].T @ head.o_proj.weight[:, -head.d:].T
                seen = model.model.norm(seen)
            logits = seen @ model.head_weight[word_ids[group]].mean(1).T                     # (cells, words)
            loss = loss + F.cross_entropy(logits, labels)
            right[group] = round((logits.argmax(1) == labels).float().mean().item(), 3)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"eyes step {step}/{steps}  loss {loss.item():.3f}  right {right}", flush=True)


def cell_facts(facts: dict, rows: int, cols: int) -> list[dict]:
    """What each of the rows * cols cells shows, row by row."""
    cells = {}
    for place, thing in facts["cells"]:
        if facts["kind"] == "count":
            cells[place] = {"colour": thing[0], "shape": thing[1]}
        else:
            cells[place] = {"colour": thing, "digit": str(facts["show"][thing])}
        if facts["kind"] == "path":
            cells[place]["dot"] = facts["next"][thing]
        if facts["kind"] == "bars":             # the bar stands on the lowest cell; all three know its height
            row, col = place
            cells[row + 2, col] = cells[place]
            cells[place] = cells[row + 1, col] = {"digit": str(facts["show"][thing])}
    return [cells.get(divmod(place, cols), {}) for place in range(rows * cols)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "tiny"), help="folder for the model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        stage = Path(scratch)
        for name in CONFIGS:
            shutil.copy(ROOT / "tiny" / name, stage)
        tok = write_tokenizer(stage)
        config = m.Config.from_dict(m.read_json(stage / "config.json"))
        if tok.token_to_id("<|image_pad|>") != config.image_token_id:
            raise SystemExit("tiny/config.json: its token ids are not those of this tokenizer")
        model = m.init_model(config)
        set_heads(model)
        train_eyes(model, m.load_image_config(stage), tok)
        m.save_model(model, stage, stage)
        for name, flags in STAGES.items():
            run = Path(scratch) / name.replace(" ", "-")
            command = [sys.executable, ROOT / "train.py", "--model", stage, "--out", run]
            subprocess.run([*command, *COMMON.split(), *flags.split()], check=True)
            stage = max(run.glob("checkpoint-*"))
        m.save_model(m.load_model(str(stage)), args.out, stage)


if __name__ == "__main__":
    main()

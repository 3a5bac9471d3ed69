"""Build the embedded tiny model: its tokenizer and its warm-started weights, from nothing.

    python tiny/build.py --out tiny         # about 45 minutes on two cores

Takes the four config files beside it, written by hand; gives a folder in the hub's form, for `--model`. First
the vision tower learns to name what each cell shows (`train_eyes`), then the decoder learns the tasks
(`STAGES`). All problems are drawn afresh: a fixed pool of pictures is memorised, not learned.

The paper trains no such model; all of this is our choice. Left out: pretrained weights, natural images.
Worked example: `--out runs/tiny` logs its stages and leaves tokenizer.json, model.safetensors and the configs
in runs/tiny. This policy can read, but in a long chain mostly does not: here reinforcement learning starts.
"""
import argparse
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import attribute  # noqa: E402
import model as m  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402
from tiny import shapes  # noqa: E402

CONFIGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
            "<|image_pad|>", "<|video_pad|>")
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")                        # how Qwen2.5's tokenizer splits a text
WORDS = {"colour": shapes.NAMES, "digit": tuple("0123456789"),
         "dot": (*shapes.NAMES, "end")}         # what a cell can show; a bar shows its height as a digit
COMMON = ("--stage sft --batch 16 --max_new_tokens 400 --freeze_vision --eval_problems 48 --eval_samples 1 "
          "--show_every 0 --save_every 100 --keep 1 --device cpu")
KINDS = "kinds=" + "+".join(shapes.KINDS)
MIXED = KINDS + "+path+total,dialect=sentences+sentences+sentences+short"      # twice: they are harder
STAGES = {
    # right demonstrations, in few words: to look up, in order. Small batches: it takes many updates
    "look up": f"--data tiny:steps=4-8,{KINDS},dialect=short --max_steps 600 --lr 1e-3 --lr_end 0.5 "
               "--warmup_steps 20",
    "longer": f"--data tiny:steps=12-20,{KINDS},dialect=short --max_steps 480 --lr 1e-3 --lr_end 0.5 "
              "--warmup_steps 20",
    "speak": f"--data tiny:steps=1-8,{MIXED} --max_steps 2400 --lr 1e-3 --lr_end 0.05 --warmup_steps 5",
    "speak longer": f"--data tiny:steps=6-12,{MIXED} --max_steps 700 --lr 8e-4 --lr_end 0.1 "
                    "--warmup_steps 10",
    # language takes over from the image, the more the deeper; the first three steps stay clean
    "erosion": f"--data tiny:steps=1-10,{MIXED} --max_steps 1500 --lr 8e-4 --lr_end 0.02 --warmup_steps 5 "
               "--erosion_last 0.95",
}


def write_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json: byte-level BPE, so any text has tokens; words of the tasks are one token each."""
    rng, lines = random.Random(0), []
    for i in range(3000):
        dialect = shapes.DIALECTS[i % 16 == 0]
        problem = shapes.make_problem(shapes.KINDS[i % 4], 1 + i % 15, dialect, "train", 7, i)
        demonstration = shapes.demonstrate(problem, (0.2, 0.2), rng)
        lines.append(problem.question.replace("<image>", "") + "\n" + demonstration)
    tok = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(QWEN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(lines, trainers.BpeTrainer(show_progress=False, initial_alphabet=alphabet))
    tok.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    tok.save(str(folder / "tokenizer.json"))
    return tok


def name_ids(tok) -> torch.Tensor:
    """Tokens that spell a colour: after a space, at the start of a line, after a tag -> (names, 3)."""
    rows = []
    for name in shapes.NAMES:
        rows.append([tok.encode(text).ids[0] for text in (" " + name, name, ">" + name)])
    return torch.tensor(rows)


@torch.no_grad()
def set_heads(model, tok, seed: int, gain: float = 0.09):
    """Names share a direction in the embedding, and some attention heads start as what the tasks call for;
    training continues from there.

    Layer 0, first half: the tokens 1 and 2 before: query and key are constant (biases), turned against each
    other by so many positions. Second half: the last name: keys along the names' direction, constant queries,
    turned so that near ones count more. Layer 1 and first half of layer 2: like to like: of two heads one
    asks for tokens that are like its own, one for those that are like the last name. What the second half of
    layer 1 passes on is left to `train_eyes`. Layer 2, second half: what follows the last name elsewhere."""
    c, rng = model.config, torch.Generator().manual_seed(seed)
    group, width = c.num_attention_heads // c.num_key_value_heads, c.hidden_size
    d = width // c.num_attention_heads
    half = d // 2

    def normal():                                                                       # (d, D)
        return torch.randn(d, width, generator=rng) * gain

    def frame(size=d):                                                              # (size, D), orthonormal
        return torch.linalg.qr(torch.randn(width, size, generator=rng))[0].T

    def put(layer, kv, queries, key, copy=None, output=None):
        """Fill key head `kv` and the query heads that share it; without copy, what they pass on stays."""
        attention = model.model.layers[layer].self_attn
        rows, q_rows = slice(kv * d, (kv + 1) * d), slice(kv * group * d, (kv + 1) * group * d)
        attention.k_proj.weight[rows] = key
        attention.q_proj.weight[q_rows] = torch.cat(queries)
        if copy is not None:
            attention.v_proj.weight[rows] = copy
            attention.o_proj.weight[:, q_rows] = output.T.repeat(1, group) / group

    names, direction = name_ids(tok).unique(), frame(1)[0]
    model.head_weight[names] += 0.7 * direction
    first, read, write, write_name = model.model.layers[0].self_attn, frame(), frame(), frame()
    put(0, 0, [0.2 * normal()] * group, 0.2 * normal(), read, write)
    turn = c.rope_theta ** (-torch.arange(half) / half)                                 # angle a position
    first.k_proj.bias[:half] = 5.0
    for head in range(group):
        angle = (head + 1) * turn
        first.q_proj.bias[head * d:(head + 1) * d] = 5 * torch.cat((angle.cos(), -angle.sin()))
    key = 0.2 * normal()
    key[5:7] = direction                                # pairs that turn once in 112 and in 199 positions
    put(0, 1, [0.2 * normal()] * group, key, read, write_name)
    for head in range(group, 2 * group):
        first.q_proj.bias[head * d + 5:head * d + 7] = 12.0
    slow = torch.zeros(d, 1)                            # pairs that hardly turn from the chain to the image
    slow[10:half] = slow[half + 10:] = (half / (half - 10)) ** 0.5
    for layer, kv in ((1, 0), (1, 1), (2, 0)):
        match, copy = normal() * slow, frame() if kv == 0 else None
        put(layer, kv, [match, 12 * match @ read.T @ write_name], match, copy, copy)
    turned = torch.linalg.qr(torch.randn(d, d, generator=rng))[0] * gain * width ** 0.5 * slow
    copy = frame()
    put(2, 1, [2 * turned @ write_name] * group, turned @ write, copy, copy)


def train_eyes(model, image_config, tok, seed: int, steps: int = 1500):
    """The vision tower: each merged image token is taught to name what its cell shows by its dot product with
    the decoder's own word embeddings. So image tokens start out close to words, and a decoder that learns to
    find a word again finds it in the image as well. The dot of a path tile first goes through the value and
    output matrices of a head of layer 1, as its colour must not be taken for the tile's."""
    digits = [tok.encode(digit).ids[:1] for digit in WORDS["digit"]]
    ends = torch.tensor([tok.encode(" end").ids[:1] * 3])
    names = name_ids(tok)
    word_ids = {"colour": names, "digit": torch.tensor(digits), "dot": torch.cat((names, ends))}
    head = model.model.layers[1].self_attn
    params = [*model.visual.parameters(), model.head_weight, head.v_proj.weight, head.o_proj.weight]
    optimizer = torch.optim.AdamW(params, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    rng = random.Random(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * max(0.05, 1 - step / steps)
        pixels, grids, cells = [], [], []
        for i in range(24):
            kind, things = shapes.KINDS[i % 4], rng.choice((12, 16, 20))
            facts = shapes.fresh_facts(kind, things, "train", rng)
            grid = (2, 10) if kind == "bars" else (5, rng.randint(4, 6))        # small pictures are quick,
            image = shapes.draw(facts, rng, None if i < 4 else grid)            # some are as in the tasks
            patches, grid = m.preprocess_image(image, image_config)
            pixels.append(torch.from_numpy(patches))
            grids.append(grid)
            cells += cell_facts(facts, grid[1] // 2, grid[2] // 2)
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
        cells[place] = {"colour": thing, "digit": str(facts["show"][thing])}
        if facts["kind"] == "path":
            cells[place]["dot"] = facts["next"][thing]
        if facts["kind"] == "bars":             # the bar stands on the lowest cell; all three know its height
            row, col = place
            cells[row + 2, col] = cells[place]
            cells[place] = cells[row + 1, col] = {"digit": str(facts["show"][thing])}
    return [cells.get(divmod(place, cols), {}) for place in range(rows * cols)]


@torch.no_grad()
def figures(folder, seed: int = 3, count: int = 240, steps: int = 8) -> dict:
    """What a folder's policy can do with held-out problems: "alone": single steps that are right, by kind;
    "greedy", "sampled": right answers, and true steps by depth; "dependence": `say_of_digits`, in nats, by
    depth of greedy chains; "rank correlation" of the two."""
    model, codec, found = m.load_model(str(folder)).eval(), rollout.load_codec(str(folder)), {"alone": {}}
    single = [shapes.Stream(f"tiny:steps=1,{KINDS}", "heldout", seed)[i] for i in range(count)]
    for t, in rollout.sample(model, single, codec, 1, 64, 0.0):
        found["alone"].setdefault(t.problem.task, []).append(attribute.is_right(t))
    problems = [shapes.Stream(f"tiny:steps={steps},{KINDS}", "heldout", seed)[i] for i in range(count)]
    verifier, dependence = attribute.Verifier(model, codec, window=shapes.MAX_STEPS), {}
    for mode, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        rollouts, true = sum(rollout.sample(model, problems, codec, 1, 320, temperature), []), {}
        for t in rollouts:
            t.steps = attribute.split_steps(t.ids, codec)
        if mode == "greedy":
            verifier([t for t in rollouts if t.steps])
        for t in rollouts:
            said = [k for k, step in enumerate(t.steps) if step.text not in shapes.FILLERS]
            verdicts = shapes.verdicts(t)
            for depth, k in enumerate(said[:steps]):
                true.setdefault(depth, []).append(verdicts[k] == "true")
                if mode == "greedy" and not attribute.claims_nothing(t.steps[k].text):
                    dependence.setdefault(depth, []).append(say_of_digits(verifier, t, k))
        right = sum(map(attribute.is_right, rollouts)) / count
        found[mode] = {"right": round(right, 3), "true": means(true)}
    found["alone"] = means(found["alone"])
    found["dependence"] = means(dependence)
    ranks = np.argsort(np.argsort(list(found["dependence"].values())))
    found["rank correlation"] = round(float(np.corrcoef(ranks, range(len(ranks)))[0, 1]), 2)
    return found


def say_of_digits(verifier, t, k: int) -> float:
    """KL of the predictions with the image from those without, summed over the digits of step k."""
    total, ids = 0.0, t.ids[t.steps[k].start:t.steps[k].stop]
    for token, (_, _, say) in zip(ids, verifier.known[verifier.claim(t, k)]):
        if verifier.codec.tokenizer.decode([token]).isdigit():
            total += say
    return total


def means(values: dict) -> dict:
    return {key: round(sum(row) / len(row), 3) for key, row in sorted(values.items())}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "tiny"), help="folder for the model")
    parser.add_argument("--seed", type=int, default=0, help="of weights and problems")
    parser.add_argument("--erosion_first", type=float, default=0.0,
                        help="chance that steps 1 to 3 are read from language: the reader's (1: blind)")
    parser.add_argument("--stages", type=Path, help="folder of the stages [runs/build-SEED]; those done stay")
    parser.add_argument("--figures", action="store_true", help="only print the figures of --out")
    parser.add_argument("--results", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    if not args.figures:
        build(args.stages or ROOT / "runs" / f"build-{args.seed}", args)
    found = figures(args.out)
    for name, value in found.items():
        print(f"{name}: {value}")
    if args.results:
        train.write_text(args.results, json.dumps(found, indent=1) + "\n")


class KeepsFirst(train.Trainer):
    """Leaves the first layer's attention as `set_heads` made it: while chains are short it would come to look
    for the last name at short distances only."""

    def load_policy(self, *given):
        model = super().load_policy(*given)
        model.model.layers[0].self_attn.requires_grad_(False)
        return model


def build(folder: Path, args):
    """All stages, each from the one before; what `folder` holds of an earlier build is continued."""
    stage = folder / "eyes"
    if not (stage / "model.safetensors").exists():
        stage.mkdir(parents=True, exist_ok=True)
        for name in CONFIGS:
            shutil.copy(ROOT / "tiny" / name, stage)
        tok = write_tokenizer(stage)
        config = m.Config.from_dict(m.read_json(stage / "config.json"))
        if tok.token_to_id("<|image_pad|>") != config.image_token_id:
            raise SystemExit("tiny/config.json: its token ids are not those of this tokenizer")
        model = m.init_model(config, args.seed)
        set_heads(model, tok, args.seed + 1)
        train_eyes(model, m.load_image_config(stage), tok, args.seed)
        m.save_model(model, stage, stage)
    for name, flags in STAGES.items():
        run, given = folder / name.replace(" ", "-"), ["--model", stage, "--seed", args.seed]
        if name == "erosion":
            run = folder / f"erosion-{args.erosion_first}"
            given += ["--erosion_first", args.erosion_first]
        if list(run.glob("checkpoint-*")):
            train.start(["--resume", str(run)], KeepsFirst)
        else:
            train.start([*map(str, given), "--out", str(run), *COMMON.split(), *flags.split()], KeepsFirst)
        stage = max(run.glob("checkpoint-*"))
    m.save_model(m.load_model(str(stage)), args.out, stage)


if __name__ == "__main__":
    main()

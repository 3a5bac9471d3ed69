"""Problems in, trajectories out: prompt building, and the KV-cached batch sampler.

Place in the pipeline: first. `train.py` and `eval.py` sample G completions of each problem with `sample`, and
recompute them with `completion_hidden` for the update. Reads from model.py, grpo.py (log-probs in
chunks), data/codec.py and data/reading.py.

What matters here (ours; the paper says nothing of its sampler):
  1. Vision and prompt run once a prompt, whatever G is; finished rows leave the batch.
  2. Temperature is the only knob, and the stored log-probs are the policy's own at that temperature, so on
     the first update the ratio of new to old probability is 1 (in bfloat16: up to rounding, which the logged
     `kl_old` shows). Tokens that may not be generated (image pads, control tokens) get probability zero here
     and in the trainer alike, through the same `logit_mask`.
  3. Token ids are never decoded and encoded again, and masks come from lengths, never from `ids == pad`.

Worked example: inverse-CDF sampling with probabilities (0.2, 0.5, 0.3) and the uniform number 0.65 picks
token 1, since 0.2 <= 0.65 < 0.7; its log-prob is ln 0.5 = -0.693. A row's numbers are its own, so a row
sampled in a batch equals the row sampled alone.
"""
import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch

import grpo
from data.codec import Codec
from data.reading import DataError, Problem, image_file, open_image
from model import ImageConfig, Qwen25VL, Rows, preprocess_image, smart_resize
from runtime.graphs import Graphed
from runtime.linear import linear


@dataclass
class Trajectory:
    """One completion of one problem, as the update needs it. All lists have one entry a completion token."""
    problem: Problem
    ids: list                           # forced prefix first; EOS included when it was reached
    sampled: list                       # 1 = sampled by the policy (EOS too), 0 = forced
    logps: list                         # behaviour log-prob of a sampled token in its context; 0.0 if forced
    finished: bool                      # ended by EOS (False: cut off at the length limit)
    text: str                           # decoded once, for rewards and people; never encoded again
    provenance: str = "policy"
    rewards: dict = field(default_factory=dict)         # reward parts by name, "total" among them
    advantage: float = 0.0
    weights: list | None = None         # per-token loss weights; None = 1 everywhere
    parent: object = None               # rectified: the Trajectory it was made of
    steps: list | None = None           # attribute.Step: its steps as token ranges
    checks: list | None = None          # attribute.Check of each step, where it was asked
    kept: int = 0                       # rectified: its first so many tokens are its parent's


# ------------------------------------------------------------------------------------------------------------
# Between problems and tensors


@dataclass
class Prompt:
    """One encoded prompt."""
    ids: list
    pixel_values: torch.Tensor | None   # (N, features)
    grids: list                         # (1, rows, cols) per image


def image_grid(image, config: ImageConfig) -> tuple[int, int, int]:
    """(1, rows, cols) in patches of an image after resizing, from the file's header alone."""
    image = image_file(image)
    sideways = image.getexif().get(0x0112, 1) in (5, 6, 7, 8) and image.format != "TIFF"    # Pillow turns it
    width, height = image.size[::-1] if sideways else image.size
    p, m = config.patch_size, config.merge_size
    height, width = smart_resize(height, width, p * m, config.min_pixels, config.max_pixels)
    return 1, height // p, width // p


def plain(text: str, codec: Codec) -> str:
    """`text` with control tokens spelled out: what a user or a model writes must not turn into them."""
    for special in codec.specials:
        text = text.replace(special, special[0] + " " + special[1:])
    return text


def token_ids(text: str, codec: Codec) -> list[int]:
    """The tokens of a text as it stands, nothing added."""
    return codec.tokenizer(text, add_special_tokens=False)["input_ids"]


def render(problem: Problem, codec: Codec) -> str:
    """Chat template around the turns of the question, up to where the assistant begins to write. Each <image>
    is one image token yet."""
    messages, turns = [], [problem.question] if isinstance(problem.question, str) else problem.question
    for turn, text in enumerate(turns):
        content = []
        for i, piece in enumerate(text.split("<image>")):
            content += [{"type": "image"}] * (i > 0)
            content += [{"type": "text", "text": plain(piece, codec)}] * bool(piece)
        messages.append({"role": ("user", "assistant")[turn % 2], "content": content})
    return codec.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode_prompt(problem: Problem, codec: Codec, max_tokens: int | None = None, pixels: bool = True,
                  text: str | None = None) -> Prompt:
    """Token ids of the rendered problem (or of `text`, a part of it that holds all its images), each <image>
    replaced by its image tokens. DataError where the prompt is longer than `max_tokens` (it is never cut: a
    cut image would not match its features). pixels False: the ids and grids alone, without reading the
    images' content."""
    text = render(problem, codec) if text is None else text
    where = problem.where or f"problem {problem.id}"
    try:
        grids = [image_grid(image, codec.image_config) for image in problem.images]
    except ValueError as e:
        raise DataError(f"{where}: field 'images': {e}") from None
    ids, image = [], 0
    for token in token_ids(text, codec):
        if token == codec.image_token_id and image < len(grids):
            ids += [token] * (grids[image][1] * grids[image][2] // codec.image_config.merge_size ** 2)
        else:
            ids.append(token)
        image += token == codec.image_token_id
    if image != len(grids):
        raise DataError(f"{where}: the chat template placed {image} of {len(grids)} images")
    if max_tokens and len(ids) > max_tokens:
        raise DataError(f"{where}: field 'problem': the prompt has {len(ids)} tokens, "
                        f"--max_prompt_tokens is {max_tokens}")
    if not (pixels and grids):
        return Prompt(ids, None, grids)
    patches, found = zip(*(preprocess_image(open_image(i), codec.image_config) for i in problem.images))
    if list(found) != grids:
        raise DataError(f"{where}: field 'images': an image's header tells another size than its content")
    return Prompt(ids, torch.from_numpy(np.concatenate(patches)), grids)


def collate(prompts: list[Prompt], pad_id: int, device) -> dict:
    """Right-padded batch: input_ids, attention_mask (B, P), pixel_values (N, ...), image_grid_thw
    (images, 3)."""
    ids, mask = pad([p.ids for p in prompts], pad_id)
    pixels = [p.pixel_values.to(device, non_blocking=True) for p in prompts if p.pixel_values is not None]
    grids = [g for p in prompts for g in p.grids]
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device),
            "pixel_values": torch.cat(pixels) if pixels else None,
            "image_grid_thw": torch.tensor(grids, device=device) if grids else None}


def pad(rows: list[list], value, left: bool = False):
    """Ragged lists -> (tensor (R, T), bool mask (R, T)), padded on the right (or left)."""
    lengths, width = [len(r) for r in rows], max(map(len, rows), default=0)
    fill = [[value] * (width - n) for n in lengths]
    data = torch.tensor([f + list(r) if left else list(r) + f for r, f in zip(rows, fill)])
    columns = torch.arange(width).expand(len(rows), -1)
    lengths = torch.tensor(lengths)[:, None]
    return data.reshape(len(rows), width), columns >= width - lengths if left else columns < lengths


def chunks(lengths: list[int], budget: int):
    """Index ranges, in order, of rows that go through the model together: padded to the longest they hold at
    most `budget` tokens (a longer row goes alone)."""
    start = longest = 0
    for n, length in enumerate(lengths):
        longest = max(longest, length)
        if n > start and longest * (n + 1 - start) > budget:
            yield range(start, n)
            start, longest = n, length
    if lengths:
        yield range(start, len(lengths))


# ------------------------------------------------------------------------------------------------------------
# The sampler


@torch.no_grad()
def sample(model: Qwen25VL, problems: list[Problem], codec: Codec, group_size: int = 1,
           max_new_tokens: int = 128, temperature: float = 1.0, uniforms: torch.Tensor | None = None,
           prefix_ids: list | None = None, prompts: list[Prompt] | None = None,
           stop_ids: tuple = (), limits: list | None = None) -> list[list[Trajectory]]:
    """Sample `group_size` completions of each problem. Returns B lists of G trajectories.

    temperature 0 is greedy; otherwise uniforms (B x G, max_new_tokens) in [0, 1) are the random numbers, one
    row a completion, one column a token (None: from torch's global generator).
    prefix_ids: for each of the B x G rows (problem-major) the completion tokens it continues from; these are
    forced, count towards max_new_tokens and are marked sampled = 0. prompts: the problems encoded already.
    stop_ids: tokens that end a completion besides EOS (it does not count as finished then).
    limits: for each row the length at which it ends, at most max_new_tokens (None: that for all).
    ValueError where the prefixes do not fit."""
    device = model.head_weight.device
    prompts = prompts or [encode_prompt(p, codec) for p in problems]
    rows = len(problems) * group_size
    prefixes, limits = prefix_ids or [[]] * rows, limits or [max_new_tokens] * rows
    if len(prefixes) != rows or any(len(p) >= min(n, max_new_tokens) for p, n in zip(prefixes, limits)):
        raise ValueError(f"prefix_ids must hold {rows} lists shorter than max_new_tokens {max_new_tokens} "
                         "and than their limits")

    prompt = torch.arange(len(problems), device=device).repeat_interleave(group_size)   # (R,)
    last, cache, position, length = prefill(model, prompts, prompt, prefixes, codec.pad_id)
    left = torch.tensor(limits, device=device) - length                                 # tokens to be sampled
    if temperature > 0:                                                 # those of the first new token first
        uniforms = torch.rand(rows, max_new_tokens) if uniforms is None else uniforms
        columns = length[:, None] + torch.arange(max_new_tokens, device=device)
        uniforms = uniforms.clamp(max=1 - 1e-6).to(device).gather(1, columns.clamp(max=max_new_tokens - 1))
    tokens = torch.full((rows, max_new_tokens), codec.pad_id, device=device)
    logps = torch.zeros(rows, max_new_tokens, device=device)
    ends, mask = (*codec.eos_ids, *stop_ids), codec.logit_mask.to(device)
    eos = torch.tensor(ends, device=device)
    alive = torch.arange(rows, device=device)                                           # original row of each
    position = position + length                                                        # of the first new one
    decode = Graphed(model) if model.graphs else model.next_hidden
    for step in range(max_new_tokens):
        token, logp = next_token(linear(last, model.head_weight), mask, temperature,
                                 None if temperature == 0 else uniforms[alive, step])
        tokens[alive, step], logps[alive, step] = token, logp       # behind a row's end: without meaning
        left = left.masked_fill(torch.isin(token, eos), 0)
        if device.type == "cpu" or step % 4 == 3 or step == max_new_tokens - 1:     # on a GPU it costs a sync
            keep = (left > step + 1).nonzero()[:, 0]
            if len(keep) == 0:
                break
            if len(keep) <= 0.9 * len(alive):
                cache.select(keep)
                alive, left, token, position = (a[keep] for a in (alive, left, token, position))
        last = decode(token[:, None], (position + step)[:, None], cache)[:, 0]

    out = []
    for r, (new, mu) in enumerate(zip(tokens.tolist(), logps.tolist())):
        most = limits[r] - len(prefixes[r])
        n = next((i + 1 for i, t in enumerate(new[:most]) if t in ends), most)
        out.append(trajectory(problems[r // group_size], prefixes[r], new[:n], mu[:n], codec))
    return [out[i:i + group_size] for i in range(0, rows, group_size)]


def prefill(model: Qwen25VL, prompts: list[Prompt], prompt, prefixes: list, pad_id: int):
    """Prompt and vision once a prompt; then the forced prefixes, left-padded so that all rows write the same
    column. prompt (R,): which one each row continues. Returns the last hidden state (R, D), the rows'
    context, the first position behind each prompt (R,) and the completions' lengths so far (R,)."""
    last, cache, start = prompt_rows(model, prompts, prompt, pad_id)
    length = torch.tensor([len(p) for p in prefixes], device=prompt.device)
    if int(length.max()):
        ids, mask = (a.to(prompt.device) for a in pad(prefixes, pad_id, left=True))
        positions = start[:, None] + (torch.arange(ids.shape[1], device=prompt.device)
                                      - ids.shape[1] + length[:, None]).clamp(min=0)
        cache.extend(mask)
        h = model.rows_hidden(ids, positions, cache)[:, -1]
        last = torch.where((length > 0)[:, None], h, last)
    return last, cache, start, length


def trajectory(problem: Problem, forced: list, new: list, logps: list, codec: Codec) -> Trajectory:
    """A row of forced tokens and the new ones, of which logps are."""
    at, ids = len(forced), list(forced) + new
    finished = ids[-1] in codec.eos_ids
    text = codec.tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=False)
    return Trajectory(problem, ids, [0] * at + [1] * len(new), [0.0] * at + logps, finished, text)


def prompt_rows(model: Qwen25VL, prompts: list[Prompt], prompt, pad_id: int, grow: bool = True):
    """Vision and prompts, each computed once, for rows that continue them. prompt (R,): which one each row
    continues. Returns the last hidden state (R, D), the rows' context and the first free positions (R,)."""
    batch = collate(prompts, pad_id, prompt.device)
    hidden, context, following = model.prompt_hidden(**batch, keep=True)
    ends = batch["attention_mask"].sum(1) - 1
    last = hidden[torch.arange(len(prompts), device=prompt.device), ends][prompt]
    return last, Rows(context.kv, batch["attention_mask"], prompt, grow), following[prompt]


def next_token(logits, logit_mask, temperature: float, uniform=None):
    """logits (R, V) -> token (R,) and its log-prob (R,) under softmax(logits / temperature) without banned
    tokens. Greedy (temperature 0) reports the log-prob at temperature 1. Inverse CDF: the first token whose
    cumulative probability exceeds `uniform` (R,)."""
    logits = logits.float() + logit_mask
    logp = (logits / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token = logp.argmax(-1)
    else:
        cumulative = logp.exp().double().cumsum(-1)     # fp32 sums over a large vocabulary drift
        token = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)
    return token, logp.gather(1, token[:, None])[:, 0]


def uniforms(key: str, rows: int, columns: int) -> torch.Tensor:
    """Random numbers (rows, columns) in [0, 1) that depend on `key` alone: whatever is sampled beside
    a problem, on however many ranks and after whatever interruption, its own numbers stay the same."""
    rng = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
    return torch.rand(rows, columns, generator=rng)


def completion_hidden(model: Qwen25VL, prompts: list[Prompt], prompt_of_row: list[int],
                      completions: list[list], pad_id: int):
    """The training forward: hidden states that predict each completion token, the prompt computed once a
    prompt.

    prompts: B; prompt_of_row (R,): which one each row continues; completions: R lists of token ids.
    Returns hidden (R, T, D), targets (R, T) and the completion_mask (R, T) from lengths. Gradients flow
    through both the prompt and the rows."""
    device = model.head_weight.device
    last, rows, start = prompt_rows(model, prompts, torch.tensor(prompt_of_row, device=device), pad_id, False)
    targets, mask = (a.to(device) for a in pad(completions, pad_id))
    fed = targets[:, :max(1, targets.shape[1] - 1)]     # one too many where all end at once: every pass alike
    rows.extend(mask[:, :fed.shape[1]])                 # (--shard all needs that)
    positions = start[:, None] + torch.arange(fed.shape[1], device=device)
    hidden = torch.cat((last[:, None], model.rows_hidden(fed, positions, rows)), dim=1)
    return hidden[:, :targets.shape[1]], targets, mask


def completion_logps(model: Qwen25VL, prompts: list[Prompt], prompt_of_row: list[int],
                     completions: list[list], codec: Codec, entropy: bool = False):
    """Log-probs of completions as the sampler would have given them, arguments as for `completion_hidden`
    -> logps, entropies (zeros unless asked for) and completion_mask, all (R, T)."""
    hidden, targets, mask = completion_hidden(model, prompts, prompt_of_row, completions, codec.pad_id)
    found, spread = grpo.token_logps(hidden[mask], model.head_weight, targets[mask],
                                     codec.logit_mask.to(hidden.device), entropy=entropy)
    fill = lambda values: torch.zeros_like(mask, dtype=torch.float32).masked_scatter(mask, values)
    return fill(found), fill(spread), mask

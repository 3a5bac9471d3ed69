r"""Problems in, trajectories out: reading data, encoding prompts, the KV-cached batch sampler, log-probs.

Takes: a file of problems (or problems made elsewhere), a checkpoint's tokenizer, the policy (model.py).
Gives: `Trajectory` objects, G for each problem, which reward.py scores, attribute.py and rereason.py repair
and grpo.py learns from; and `completion_logps`, the same log-probs with gradients.

The paper says nothing of its sampler or its data. We chose:
  1. Vision and prompt are computed once for each prompt; a group leaves when all its rows have ended.
  2. Temperature is the only knob, and log-probs are the policy's own at it: the first update's ratio is 1.
     Image pads and control tokens get probability zero here and in the trainer, through one `logit_mask`.
  3. Token ids are never decoded and encoded again, and masks come from lengths, never from `ids == pad`.
  4. A file is read as a whole and all its bad rows are named at once, before anything is computed.
Left out: video, top-k and top-p (they would bias the ratio), several turns by the policy.

B prompts, G samples of each, R = B * G rows, T completion tokens, P prompt tokens, V vocabulary, D width.

Worked example: inverse-CDF sampling with probabilities (0.2, 0.5, 0.3) and the number 0.65 picks token 1,
since 0.2 <= 0.65 < 0.7; its log-prob is ln 0.5 = -0.693. The row {"problem": "How many?", "image": "a.png",
"answer": "<answer>3</answer>"} has the answer "3"; a.png lies beside its file.
"""
import base64
import hashlib
import io
import json
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import reward
from model import (Config, ImageConfig, InputError, KVCache, Qwen25VL, SharedPrompt, load_image_config,
                   preprocess_image, read_json, reading, require, resolve, run_layer, smart_resize)

INSTRUCTION = ("First think inside <think> </think>, one step a line, checking each step against the image. "
               "Then give only the final answer inside <answer> </answer>.")

# ---- Problems

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")   # others may start programs (EPS)
MAX_PIXELS, TEMPLATE_SECONDS = 2 ** 26, 5               # of one image file; for one chat to be rendered


def escaped(text: str, keep: str = "") -> str:
    """A text of others for terminal and table: control characters by their numbers, but for those to keep."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in str(text))


@dataclass
class Problem:
    """One question about zero or more images."""
    id: str
    question: str                       # text with an <image> tag per image
    answer: str                         # gold answer, unwrapped
    images: list                        # PIL images, or paths or bytes of files, opened for the prompt
    choices: list | None = None         # option texts; `answer` is then a letter (or an option's text)
    key_steps: list | None = None       # phrases a right chain contains (for step rewards)
    task: str = ""                      # what results are grouped by
    where: str = ""                     # file:line it was read from
    demonstration: str | None = None    # a whole completion to imitate (`train.py --stage sft`)
    oracle: dict | None = None          # embedded tasks only: what the image really shows


# Field names of Geometry3K/EasyR1, verl, VLM-R1, TRL and open-r1, MM-Eureka and MMK12, R1-VL-10K, ViRL39K
ALIASES = {"id": ("id", "qid"),
           "images": ("images", "image", "image_path", "img"),
           "problem": ("problem", "question", "query", "prompt", "message", "conversations"),
           "answer": ("answer", "solution", "ground_truth", "reward_model", "conversations"),
           "demonstration": ("demonstration", "response", "completion", "solution"),
           "task": ("task", "category", "subject", "source", "data_source")}


def first_field(row: dict, kind: str, default=None):
    """The first alias of a field that is there; InputError where there is neither one nor a default."""
    for name in ALIASES[kind]:
        if row.get(name) is not None and row[name] != "":
            return row[name]
    if default is None:
        raise InputError(f"field '{kind}' is missing (looked for {', '.join(ALIASES[kind])})")
    return default


def last_turn(chat: list, roles: tuple):
    """What one of `roles` wrote last in a chat of {"role", "content"} or {"from", "value"}; or None."""
    for message in reversed(chat):
        if isinstance(message, dict) and message.get("role", message.get("from")) in roles:
            return message.get("content", message.get("value"))


def read_question(value, images: list) -> tuple[str, list]:
    """A text, chat (also as JSON in a string) or a turn's parts -> text with a tag for each image, images."""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        with suppress(ValueError, RecursionError):          # a text may begin like a chat
            value = json.loads(value)
    if isinstance(value, list):
        value = last_turn(value, ("user", "human"))
    if isinstance(value, list):
        text, named = "", []
        for part in value:
            part = part if isinstance(part, dict) else {"type": "text", "text": part}
            if part.get("type") not in ("text", "image"):
                raise InputError(f"field 'problem': a part of type {part.get('type')!r} is not text or image")
            text += "<image>" if part["type"] == "image" else str(part.get("text") or "")
            if part.get("image") is not None:
                named.append(part["image"])
        value, images = text, images or named
    if not isinstance(value, str) or not value.replace("<image>", "").strip():
        raise InputError("field 'problem' is empty or not text")
    tags = value.count("<image>")
    if tags and not images:
        return value.replace("<image>", ""), images         # a stray tag of a text-only row
    if tags not in (0, len(images)):
        raise InputError(f"field 'problem' has {tags} <image> tags, field 'images' has {len(images)} images")
    return value if tags else "<image>" * len(images) + value, images


def read_gold(value) -> str:
    """The bare gold answer of a text, number, chat or {"ground_truth"}, out of its tags, box or last line."""
    if isinstance(value, list):
        value = last_turn(value, ("assistant", "gpt"))
    elif isinstance(value, dict):
        value = value.get("ground_truth")
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        value = str(value)
    rest, declared = reward.declared_answer(value) if isinstance(value, str) else ("", None)
    gold = declared or rest.rpartition("### The final answer is:")[2].strip()
    if not gold:
        raise InputError("field 'answer' is empty or not text")
    return gold


def read_choices(value, question: str) -> tuple[list | None, str]:
    """Options as texts, and the question, with them below it where it does not spell them out: "(B) red"."""
    if isinstance(value, dict):
        value = [value[letter] for letter in sorted(value)]
    if value is not None and not isinstance(value, list):
        raise InputError("field 'choices' must be a list")
    choices, lines, spelled_out = [], "", True
    for n, choice in enumerate(value or []):
        letter = chr(ord("A") + n)
        choices.append(str(choice))
        lines += f"\n{letter}. {choice}"
        spelled_out &= any(f"{letter}{sign} {choice}" in question for sign in ".):")
    return choices or None, question if spelled_out else question + lines


def parse_row(row: dict, where: str, folder: Path, instruction: str = "") -> Problem:
    """One JSON object -> Problem, its image paths within `folder`. InputError names `where` and the field."""
    with reading(where):
        if not isinstance(row, dict):
            raise InputError(f"a JSON object is expected, found {type(row).__name__}")
        images = first_field(row, "images", default=[])
        images = images if isinstance(images, list) else [images]
        question, images = read_question(first_field(row, "problem"), images)
        choices, question = read_choices(row.get("choices"), question)
        if instruction:
            question += "\n" + instruction
        gold = read_gold(first_field(row, "answer"))
        if not reward.answers_match(gold, gold, choices):
            raise InputError(f"field 'answer': {gold[:40]!r} can never be right: no option, or not readable")
        key_steps = row.get("key_steps")
        key_steps = key_steps.get("Steps") if isinstance(key_steps, dict) else key_steps
        if key_steps is not None and not isinstance(key_steps, list):
            raise InputError("field 'key_steps' must be a list")
        name, task = str(first_field(row, "id", where)), str(first_field(row, "task", default=""))
        demonstration = first_field(row, "demonstration", default="")
        json.dumps(row, ensure_ascii=False, default=lambda _: "").encode("utf-8")   # fails on lone surrogates
        images = [image_source(image, folder) for image in images]
        return Problem(name, question, gold, images, choices, key_steps, task, where, demonstration or None)


def image_source(image, folder: Path):
    """A path within `folder`, or the bytes of an image file: a data: url's, base64 or a parquet file's."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or image.get("image")
    if not isinstance(image, (str, bytes)) or not image:
        raise InputError("field 'images' must hold file names or data: urls")
    if isinstance(image, bytes):
        return image
    if image.startswith("data:") or len(image) > 1000:      # no name is that long
        with reading("field 'images': the data: image can not be decoded"):
            return base64.b64decode(image.split(",", 1)[-1], validate=True)
    path = folder / image.removeprefix("file://")
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):       # links followed
        raise InputError(f"field 'images': {image} lies outside {folder}; allow it with --image_dir")
    return path


def open_image(image, decode: bool = True) -> Image.Image:
    """A path, the bytes of a file or a PIL image -> upright RGB image. decode False: as it is, not read.
    InputError where there is none, or not of a format and size we open."""
    is_path = not isinstance(image, (bytes, Image.Image))
    if is_path and not Path(image).is_file():               # a fifo would be waited for
        raise InputError(f"{image}: no such file")
    with reading(f"{image}: not readable" if is_path else "not readable"):
        if not isinstance(image, Image.Image):
            file = io.BytesIO(image) if isinstance(image, bytes) else image
            image = Image.open(file, formats=IMAGE_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels are too many")
        if not decode:
            return image
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):                      # 16-bit grey: Pillow would clip it at 255
            grey = np.asarray(image)
            grey = grey >> 8 if grey.max() > 255 else grey
            image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
        return image.convert("RGB")


def read_rows(path: Path):
    """(where, row or the InputError in reading it) of each row: a JSON object a line; in a .json file a list
    of them, or an object of them by id; in a .parquet file, with pyarrow."""
    if path.suffix == ".parquet":
        with reading(f"--data {path}: not a readable parquet file (it needs: pip install pyarrow)"):
            import pyarrow.parquet
            rows = pyarrow.parquet.read_table(path).to_pylist()
    else:
        data = path.read_bytes()
        is_list = data.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"[")
        if path.suffix != ".json" or (b"\n{" in data and not is_list):     # lines, whatever the name
            for n, line in enumerate(data.split(b"\n"), start=1):
                if line.strip():
                    yield f"{path}:{n}", parse_json(line, path, n)
            return
        rows = parse_json(data, path)
    if isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values()):
        rows = [{"id": key, **row} for key, row in rows.items()]
    for n, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        yield f"{path}: row {n}", row


def parse_json(data: bytes, path: Path, line: int = 1):
    """The value, or the InputError in reading it. line: where the data begin in the file."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as e:
        return InputError(f"{path}:{line + e.lineno - 1}: not JSON: {e.msg} at column {e.colno}")
    except (ValueError, RecursionError) as e:               # not UTF-8, 5,000 digits, 10,000 brackets
        return InputError(f"{path}:{line}: not readable: {e}")


def load_problems(path, image_dir=None, instruction: str = "", check=None, show=20, rank: int = 0,
                  world: int = 1) -> list[Problem]:
    """Read and check a file; of several ranks each opens the images and does check(problem) of its own rows.
    InputError: a line for each bad row, at most `show`."""
    path, problems, errors = Path(path), {}, []
    if not path.is_file():
        raise InputError(f"--data {path}: no such file")

    def load(n, where, row):
        if isinstance(row, InputError):
            raise row
        problem = parse_row(row, where, Path(image_dir or path.parent), instruction)
        if n % world == rank:
            for image in problem.images:
                with reading(f"{where}: field 'images'"):
                    open_image(image)
            if check:
                check(problem)
        return problem

    with ThreadPoolExecutor() as pool:                      # images are decoded in parallel
        work = [pool.submit(load, n, *row) for n, row in enumerate(read_rows(path))]
        for loading in tqdm(work, desc="checking rows", leave=False, disable=None):
            try:
                p = loading.result()
                if p.id in problems:
                    raise InputError(f"{p.where}: field 'id': {p.id} is taken by {problems[p.id].where}")
                problems[p.id] = p
            except InputError as e:
                errors.append(escaped(e))
    more = [f"... and {len(errors) - show} more"] if show and len(errors) > show else []
    if errors or not problems:
        raise InputError("\n".join(errors[:show] + more) or f"--data {path}: the file has no rows")
    return list(problems.values())


# ---- Codec and prompts: what turns text and images into tokens

@dataclass
class Codec:
    """Tokenizer, image settings and token rules of one checkpoint."""
    tokenizer: object
    image_config: ImageConfig
    image_token_id: int
    eos_ids: tuple
    pad_id: int
    logit_mask: torch.Tensor            # (V,) float, 0 where a token may be generated, -inf where not
    specials: tuple                     # control tokens as text
    newline_ids: tuple                  # tokens that hold a line break


def load_codec(path_or_id: str, max_pixels: int = 0) -> Codec:
    """From a checkpoint's files; max_pixels > 0 replaces its own. ValueError names what is missing."""
    from transformers import AutoTokenizer                  # takes seconds
    folder = resolve(path_or_id)
    config, image_config = read_json(folder / "config.json", Config.from_dict), load_image_config(folder)
    sizes = image_config.patch_size, image_config.temporal_patch_size, image_config.merge_size
    if sizes != (config.v_patch_size, config.v_temporal_patch_size, config.v_spatial_merge_size):
        raise ValueError(f"{folder}: sizes in preprocessor_config.json are not those of config.json: {sizes}")
    image_config = replace(image_config, max_pixels=max_pixels or image_config.max_pixels)
    with reading(f"{folder}: no readable tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        size = len(tokenizer)
    if (folder / "chat_template.json").is_file():           # where Qwen2.5-VL keeps the one that knows images
        tokenizer.chat_template = read_json(folder / "chat_template.json").get("chat_template")
    template = tokenizer.chat_template
    if not template or not isinstance(template, str) or len(template) > 100_000:
        raise ValueError(f"{folder}: chat_template.json and tokenizer have no chat template, or a long one")
    for piece in re.split(r"\{[{%]", template)[1:]:         # 9 ** 9 ** 9 could not be interrupted
        if re.search(r"\*|\d{6}", re.split(r"[%}]\}", piece, maxsplit=1)[0]):
            raise ValueError(f"{folder}: the chat template multiplies, or has numbers of six digits")
    if tokenizer.convert_tokens_to_ids("<|image_pad|>") != config.image_token_id:
        raise ValueError(f"{folder}: the tokenizer's <|image_pad|> is not image_token_id of config.json")
    if size > config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {size} tokens, vocab_size of config.json is smaller")
    eos = tokenizer.eos_token_id
    if (folder / "generation_config.json").is_file():
        eos = read_json(folder / "generation_config.json").get("eos_token_id") or eos
    eos = tuple(eos) if isinstance(eos, list) else (eos,)
    require(f"{folder}: eos token of generation_config.json or tokenizer", eos, tuple[int, ...], 0, size - 1)
    pad_id = eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    specials = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    mask = torch.zeros(config.vocab_size)
    mask[len(tokenizer):] = -torch.inf                      # rows of the embedding that no token owns
    mask[sorted({*tokenizer.all_special_ids, *specials} - set(eos))] = -torch.inf
    newlines = tuple(i for text, i in tokenizer.get_vocab().items() if "\n" in text or "\u010a" in text)
    codec = Codec(tokenizer, image_config, config.image_token_id, eos, pad_id, mask, tuple(specials.values()),
                  newlines)
    try_template(codec, folder)
    return codec


def try_template(codec: Codec, folder: Path):
    """InputError where the chat template, a program in a sandbox, fails or does not end."""
    problem = Problem("", "<image>", "", [Image.new("RGB", (28, 28))], where=f"{folder}: chat template")

    def render():
        with suppress(Exception):                           # raised again below, where it is caught
            encode_prompt(problem, codec, pixels=False)

    trial = Thread(target=render, daemon=True)              # one without end does not keep the process
    trial.start()
    trial.join(TEMPLATE_SECONDS)
    if trial.is_alive():
        raise InputError(f"{folder}: the chat template does not end")
    with reading(folder):
        encode_prompt(problem, codec, pixels=False)


def escape_special(text: str, codec: Codec) -> str:
    """`text` with control tokens spelled out: what a user or a model writes must not turn into them."""
    for special in codec.specials:
        text = text.replace(special, special[0] + " " + special[1:])
    return text


def token_ids(text: str, codec: Codec) -> list[int]:
    """The tokens of a text as it stands, nothing added."""
    return codec.tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass(eq=False)
class Prompt:
    """One encoded prompt."""
    ids: list
    pixel_values: torch.Tensor | None   # (N, features)
    grids: list                         # (1, rows, cols) in patches of each image
    kept: dict | None = None            # {}: what models compute of it is kept, while no weight changes


def image_grid(image, config: ImageConfig) -> tuple[int, int, int]:
    """(1, rows, cols) in patches of an image after resizing, from the file's header alone."""
    image = open_image(image, decode=False)
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8) and image.format != "TIFF"    # Pillow turns these
    width, height = image.size[::-1] if turned else image.size
    height, width = smart_resize(height, width, config)
    return 1, height // config.patch_size, width // config.patch_size


def render_chat(problem: Problem, codec: Codec) -> str:
    """The question as a chat, up to where the assistant writes; an <image> is still one token."""
    content = []
    for piece in re.split("(<image>)", problem.question):
        if piece == "<image>":
            content.append({"type": "image"})
        elif piece:
            content.append({"type": "text", "text": escape_special(piece, codec)})
    messages = [{"role": "user", "content": content}]
    return codec.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode_prompt(problem: Problem, codec: Codec, max_tokens: int | None = None, pixels=True) -> Prompt:
    """Decode a problem's images and tokenise its question. InputError where that is longer than `max_tokens`:
    it is never cut, a cut image would not match its features. pixels False: nothing is decoded."""
    where, patches, grids = problem.where or f"problem {problem.id}", [], []
    for image in problem.images:
        with reading(f"{where}: field 'images'"):           # it may have changed
            if pixels:
                values, grid = preprocess_image(open_image(image), codec.image_config)
                patches.append(torch.from_numpy(values))
            else:
                grid = image_grid(image, codec.image_config)
            grids.append(grid)
    with reading(where):
        text, *pieces = render_chat(problem, codec).split("<|image_pad|>")
    if len(pieces) != len(grids):
        raise InputError(f"{where}: the chat has {len(pieces)} of {len(grids)} images")
    for (_, rows, cols), piece in zip(grids, pieces):           # a token for each merged patch
        text += "<|image_pad|>" * (rows * cols // codec.image_config.merge_size ** 2) + piece
    ids = token_ids(text, codec)
    if max_tokens and len(ids) > max_tokens:
        raise InputError(f"{where}: field 'problem': {len(ids)} tokens, --max_prompt_tokens is {max_tokens}")
    return Prompt(ids, torch.cat(patches) if patches else None, grids)


def encode_prompts(problems: list, codec: Codec, max_tokens: int | None = None, pixels=True) -> tuple:
    """Problems and their prompts; one whose image has changed or gone is left out with a warning."""
    kept, prompts = [], []
    for problem in problems:
        try:
            prompts.append(encode_prompt(problem, codec, max_tokens, pixels))
            kept.append(problem)
        except InputError as e:
            print(f"warning: {escaped(e)}; the problem is skipped", file=sys.stderr)
    return kept, prompts


def mask_image(prompt: Prompt) -> Prompt:
    """The same prompt, its images all of the mean colour: what language alone says."""
    if prompt.pixel_values is None:
        return prompt
    kept = None if prompt.kept is None else {}
    return Prompt(prompt.ids, torch.zeros_like(prompt.pixel_values), prompt.grids, kept)


def pad(rows: list[list], value, left: bool = False, device="cpu"):
    """Ragged lists -> (tensor (R, T), bool mask (R, T)), padded on the right (or left)."""
    width = max(map(len, rows), default=0)
    padded = torch.full((len(rows), width), value)
    mask = torch.zeros_like(padded, dtype=torch.bool)
    for n, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(len(row))
        padded[n, place] = torch.tensor(row)
        mask[n, place] = True
    return padded.to(device), mask.to(device)


def token_batches(lengths: list[int], budget: int):
    """Ranges of rows, in order: padded, each holds at most `budget` tokens (a longer row goes alone)."""
    start = longest = 0
    for n, length in enumerate(lengths):
        longest = max(longest, length)
        if n > start and longest * (n + 1 - start) > budget:
            yield range(start, n)
            start, longest = n, length
    if lengths:
        yield range(start, len(lengths))


# ---- The sampler

@dataclass(eq=False)
class Trajectory:
    """One completion of one problem, as the update needs it; its lists have one entry a token."""
    problem: Problem
    prompt: Prompt                      # what it was sampled from, encoded once for all its uses
    ids: list                           # forced prefix first; EOS included when it was reached
    sampled: list                       # 1 = sampled by the policy (EOS too), 0 = forced
    logps: list                         # log mu: what a token was sampled with, in its context; 0.0 if forced
    finished: bool                      # ended by EOS (False: cut off at the length limit)
    text: str                           # decoded once, for rewards and people; never encoded again
    provenance: str = "policy"
    rewards: dict = field(default_factory=dict)         # reward parts by name, "total" among them
    advantage: float = 0.0
    weights: list | None = None         # omega: loss weights by token; None = 1 everywhere
    source: object = None               # rectified: the failed Trajectory it was made of
    steps: list | None = None           # attribute.Step: its steps as token ranges
    checks: list | None = None          # attribute.Check of each step, where it was asked


def uniforms(key: str, rows: int, columns: int) -> torch.Tensor:
    """Random numbers (rows, columns) in [0, 1) of `key` alone: the same in any batch and on any ranks."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)).clamp(max=1 - 1e-6)


@torch.no_grad()
def sample(model: Qwen25VL, problems: list[Problem], codec: Codec, group_size: int = 1,
           max_new_tokens: int = 128, temperature=1.0, keys=None, prefixes=None, prompts=None, stop_ids=None,
           limits=None) -> list[list[Trajectory]]:
    """Sample G = `group_size` completions of each of B problems -> B lists of G trajectories.

    temperature: one for all or a list (B); 0 is greedy. keys (B): of each problem's random numbers, see
    `uniforms` (None: its id). prefixes (B): forced tokens that a problem's rows continue from; they count
    towards max_new_tokens. prompts (B): the problems, encoded before. stop_ids (B): tokens that end a
    problem's completions, unfinished. limits (B): where they end, at most max_new_tokens. ValueError: unfit
    prefixes."""
    device, B, R = model.head_weight.device, len(problems), len(problems) * group_size
    if not problems:
        return []
    prompts = prompts or [encode_prompt(problem, codec) for problem in problems]
    keys = keys or [problem.id for problem in problems]
    prefixes, limits = prefixes or [[]] * B, limits or [max_new_tokens] * B
    if len(prefixes) != B or any(len(p) >= min(n, max_new_tokens) for p, n in zip(prefixes, limits)):
        raise ValueError(f"prefixes must hold {B} lists, each shorter than its limit and max_new_tokens")
    last, cache, position, length = prefill(model, prompts, group_size, prefixes, max_new_tokens, codec)
    numbers = torch.cat([uniforms(key, group_size, max_new_tokens) for key in keys]).to(device)
    columns = length[:, None] + torch.arange(max_new_tokens, device=device)     # a prefix used up its own
    numbers = numbers.gather(1, columns.clamp(max=max_new_tokens - 1))
    logit_mask = codec.logit_mask.to(device)
    temperature = torch.tensor(temperature).expand(B).repeat_interleave(group_size)                     # (R,)
    is_greedy, temperature = not temperature.any(), temperature.to(device)
    is_end = torch.zeros(B, len(logit_mask), dtype=torch.bool)
    is_end[:, codec.eos_ids] = True
    for b, ids in enumerate(stop_ids or ()):
        is_end[b, ids] = True
    is_end = is_end.to(device)
    tokens = torch.full((R, max_new_tokens), codec.pad_id, device=device)
    logps = torch.zeros_like(tokens, dtype=torch.float32)
    counts = torch.zeros_like(length)                           # of the tokens a row got, its end included
    room = torch.tensor(limits, device=device).repeat_interleave(group_size) - length   # 0 after an end
    alive = torch.arange(R, device=device)                      # the row each row of the cache belongs to
    for step in range(max_new_tokens):
        logits = F.linear(last, model.head_weight)
        uniform = None if is_greedy else numbers[alive, step]
        token, logp = next_token(logits, logit_mask, temperature[alive], uniform)
        tokens[alive, step], logps[alive, step] = token, logp   # after a row's end: without meaning
        counts[alive] += room > step
        room = room.masked_fill(is_end[alive // group_size, token], 0)
        if device.type == "cpu" or step % 4 == 3:               # on a GPU the question costs a sync
            active = (room > step + 1).view(-1, group_size).any(1).tolist()     # by prompt in the cache
            kept = [n for n, is_active in enumerate(active) if is_active]
            if not kept:
                break
            if len(kept) <= 0.9 * len(active):                  # groups that ended leave
                kept = torch.tensor(kept, device=device)
                cache.keep_prompts(kept)
                rows = (kept[:, None] * group_size + torch.arange(group_size, device=device)).flatten()
                alive, room, token, position = alive[rows], room[rows], token[rows], position[rows]
        last = model.next_hidden(token[:, None], (position + step)[:, None], cache)[:, 0]
    groups = [[] for _ in problems]
    for r, (new, new_logps, n) in enumerate(zip(tokens.tolist(), logps.tolist(), counts.tolist())):
        b = r // group_size
        groups[b].append(make_trajectory(problems[b], prompts[b], prefixes[b], new[:n], new_logps[:n], codec))
    return groups


def make_trajectory(problem: Problem, prompt: Prompt, forced: list, new: list, logps: list, codec: Codec):
    """The Trajectory of forced tokens and new ones, of which logps are."""
    ids = list(forced) + new
    finished = ids[-1] in codec.eos_ids
    text = codec.tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=False)
    sampled = [0] * len(forced) + [1] * len(new)
    return Trajectory(problem, prompt, ids, sampled, [0.0] * len(forced) + logps, finished, text)


def next_token(logits, logit_mask, temperature, uniform):
    """logits (R, V), temperature (R,) -> token (R,), its log-prob (R,) under softmax(logits / temperature);
    at temperature 0 the likeliest, under softmax(logits). Inverse CDF: the first token whose cumulative
    probability is > uniform (R,); None: all temperatures are 0."""
    scale = torch.where(temperature > 0, temperature, 1.0)[:, None]
    logps = ((logits.float() + logit_mask) / scale).log_softmax(-1)
    token = logps.argmax(-1)
    if uniform is not None:
        cumulative = logps.exp().double().cumsum(-1)            # fp32 sums over a large vocabulary drift
        drawn = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)
        token = torch.where(temperature > 0, drawn, token)
    return token, logps.gather(1, token[:, None])[:, 0]


PREFILL_TOKENS = 32768                  # of prompts that go through a model together, padded


def prefill_prompts(model: Qwen25VL, prompts: list[Prompt], pad_id: int):
    """As `compute_prompts`; those that keep what is computed of them go through each model once, some at a
    time."""
    if any(prompt.kept is None for prompt in prompts):
        return compute_prompts(model, prompts, pad_id)
    new = [prompt for prompt in dict.fromkeys(prompts) if model not in prompt.kept]
    for batch in token_batches([len(prompt.ids) for prompt in new], PREFILL_TOKENS):
        part = new[batch.start:batch.stop]
        last, kv, _, position = compute_prompts(model, part, pad_id)
        for n, prompt in enumerate(part):
            own = {}
            for layer, (k, v) in kv.items():
                own[layer] = torch.stack((k[n], v[n]), dim=2)[:, :len(prompt.ids)].transpose(0, 1)
            prompt.kept[model] = last[n], own, position[n]                  # own: (P, K, 2, d) by layer
    last, kvs, position = zip(*[prompt.kept[model] for prompt in prompts])
    _, mask = pad([prompt.ids for prompt in prompts], pad_id, device=last[0].device)        # (B, P)
    kv = {}
    for layer in kvs[0]:
        padded = pad_sequence([own[layer] for own in kvs], batch_first=True)                # (B, P, K, 2, d)
        kv[layer] = padded[..., 0, :].transpose(1, 2), padded[..., 1, :].transpose(1, 2)
    return torch.stack(last), kv, mask, torch.stack(position)


def compute_prompts(model: Qwen25VL, prompts: list[Prompt], pad_id: int):
    """Vision and prompts -> last hidden (B, D), keys and values by layer, mask (B, P), next position (B,)."""
    ids, mask = pad([prompt.ids for prompt in prompts], pad_id)                             # (B, P)
    pixels = [prompt.pixel_values for prompt in prompts if prompt.grids]
    grids = sum([prompt.grids for prompt in prompts], [])
    pixels = torch.cat(pixels) if pixels else None                                          # (N, features)
    grids = torch.tensor(grids) if grids else None                                          # (images, 3)
    hidden, kv, next_position = model.prompt_hidden(ids, mask, pixels, grids)
    last = hidden[torch.arange(len(prompts)), mask.sum(1) - 1]
    return last, kv, mask.to(last.device), next_position


def prefill(model, prompts: list[Prompt], group_size: int, prefixes: list, max_new_tokens: int, codec):
    """Prompts once, then the forced prefixes, padded on the left so that all rows write the same column ->
    last hidden (R, D), cache, next position (R,), prefix lengths (R,)."""
    last, prompt_kv, prompt_mask, start = prefill_prompts(model, prompts, codec.pad_id)
    ids, mask = pad(prefixes, codec.pad_id, left=True, device=last.device)
    last, start = last.repeat_interleave(group_size, 0), start.repeat_interleave(group_size)        # (R, ...)
    ids, mask = ids.repeat_interleave(group_size, 0), mask.repeat_interleave(group_size, 0)
    length, width = mask.sum(1), ids.shape[1]
    cache = KVCache(prompt_kv, prompt_mask, group_size, width + max_new_tokens)
    if width:
        cache.extend(mask)
        positions = start[:, None] + (mask.cumsum(1) - 1).clamp(min=0)
        hidden = model.rows_hidden(ids, positions, cache)[:, -1]
        last = torch.where((length > 0)[:, None], hidden, last)
    return last, cache, start + length, length


# ---- The training forward

class PromptPass:
    """Distinct prompts, computed once for the rows that continue them."""

    def __init__(self, model: Qwen25VL, prompts: list[Prompt], pad_id: int):
        self.place = {prompt: n for n, prompt in enumerate(prompts)}            # by identity
        self.last, self.kv, self.mask, self.start = prefill_prompts(model, prompts, pad_id)
        self.of_reference = None        # the same prompts under the KL's reference, where it is asked

    def cut(self):
        """From now on backward passes of rows end here, at leaves that gather their gradients."""
        self.computed = [self.last, *sum(self.kv.values(), ())]
        self.leaves = [tensor.detach().requires_grad_() for tensor in self.computed]
        self.last, *rest = self.leaves
        self.kv = dict(zip(self.kv, zip(rest[::2], rest[1::2])))

    def backward(self):
        """What has gathered goes on through the prompts, when no graph of rows is in memory any more."""
        reached = [n for n, leaf in enumerate(self.leaves) if leaf.grad is not None]
        torch.autograd.backward([self.computed[n] for n in reached], [self.leaves[n].grad for n in reached])


def micro_batches(model: Qwen25VL, codec: Codec, prompts: list[Prompt], completions: list[list], budget: int):
    """For training: yields (indices of some rows, the pass of their prompts), both of at most `budget` padded
    tokens (a row counts with the prompt, whose keys it reads), rows of like length together. The caller does
    the rows' backward pass; after the last rows of some prompts these prompts' own follows."""
    unique = list(dict.fromkeys(prompts))
    for chunk in token_batches([len(prompt.ids) for prompt in unique], budget):
        prompt_pass = PromptPass(model, [unique[n] for n in chunk], codec.pad_id)
        prompt_pass.cut()
        P = prompt_pass.mask.shape[1]
        rows = [n for n, prompt in enumerate(prompts) if prompt in prompt_pass.place]
        rows.sort(key=lambda n: len(completions[n]))
        for part in token_batches([P + len(completions[n]) for n in rows], budget):
            yield [rows[n] for n in part], prompt_pass
        prompt_pass.backward()


def completion_hidden(model: Qwen25VL, prompts: list[Prompt], completions: list[list], pad_id: int,
                      prompt_pass: PromptPass | None = None):
    """R lists of tokens and the prompt each continues -> what predicts them, hidden (R, T, D), targets
    (R, T), completion_mask (R, T), with gradients. Rows share prompts, computed here or in prompt_pass."""
    prompt_pass = prompt_pass or PromptPass(model, list(dict.fromkeys(prompts)), pad_id)
    last, start = prompt_pass.last, prompt_pass.start
    prompt_of_row = torch.tensor([prompt_pass.place[prompt] for prompt in prompts], device=last.device)
    targets, mask = pad(completions, pad_id, device=last.device)
    inputs = targets[:, :-1]                                    # the last token predicts nothing
    hidden = last.index_select(0, prompt_of_row)[:, None]       # (R, 1, D) predicts the first token
    if inputs.shape[1]:
        context = SharedPrompt(prompt_pass.kv, prompt_pass.mask, prompt_of_row, mask[:, :-1])
        positions = start[prompt_of_row][:, None] + torch.arange(inputs.shape[1], device=last.device)
        hidden = torch.cat((hidden, model.rows_hidden(inputs, positions, context)), dim=1)
    return hidden, targets, mask


def token_logps(hidden, head_weight, targets, logit_mask, temperature=1.0, chunk=1024, entropy=False):
    """Log-probs (N,) of targets (N,) under softmax(logits / temperature), entropies (N,) (zeros unless asked
    for; no gradient). hidden (N, D), head_weight (V, D), logit_mask (V,) of 0 and -inf. A chunk's logits are
    computed again in the backward pass, so no more than (chunk, V) of them ever exist."""
    def logps_of_chunk(hidden, targets):
        logits = (F.linear(hidden, head_weight).float() + logit_mask) / temperature     # (chunk, V)
        logps = logits.log_softmax(-1)
        spread = logps.new_zeros(len(targets))
        if entropy:
            spread = -(logps.detach().exp() * logps.detach().clamp(min=-1e4)).sum(-1)
        return logps.gather(1, targets[:, None])[:, 0], spread

    chunks = zip(hidden.split(chunk), targets.split(chunk))
    logps, entropies = zip(*[run_layer(logps_of_chunk, True, *inputs) for inputs in chunks])
    return torch.cat(logps), torch.cat(entropies)


def next_logps(model, codec: Codec, hidden):
    """Log-probs (N, V) of all next tokens after hidden (N, D); those that are never sampled have -10^4."""
    logits = F.linear(hidden, model.head_weight).float() + codec.logit_mask.to(hidden.device)
    return logits.log_softmax(-1).clamp(min=-1e4)


def completion_logps(model: Qwen25VL, codec: Codec, prompts: list, completions: list, entropy: bool = False,
                     prompt_pass: PromptPass | None = None):
    """As `completion_hidden` -> logps, entropies (zeros unless asked for), completion_mask, all (R, T)."""
    hidden, targets, mask = completion_hidden(model, prompts, completions, codec.pad_id, prompt_pass)
    logit_mask = codec.logit_mask.to(hidden.device)
    found, spread = token_logps(hidden[mask], model.head_weight, targets[mask], logit_mask, entropy=entropy)
    zeros = torch.zeros_like(mask, dtype=torch.float32)
    return zeros.masked_scatter(mask, found), zeros.masked_scatter(mask, spread), mask

r"""Problems in, trajectories out: reading data, encoding prompts, the KV-cached batch sampler, log-probs.

Takes: a JSONL file (or problems made elsewhere), a checkpoint's tokenizer, the policy (model.py).
Gives: `Trajectory` objects, G for each problem, which reward.py scores, attribute.py and rereason.py repair
and grpo.py learns from; and `completion_logps`, the same log-probs with gradients.

The paper says nothing of its sampler or its data. We chose:
  1. Vision and prompt are computed once for each prompt, whatever G is; a group leaves when all its rows
     ended.
  2. Temperature is the only knob, and the stored log-probs are the policy's own at that temperature, so on
     the first update the ratio of new to old probability is 1. Tokens that must not be generated (image
     pads, control tokens) get probability zero here and in the trainer alike, through the same `logit_mask`.
  3. Token ids are never decoded and encoded again, and masks come from lengths, never from `ids == pad`.
  4. A file is read as a whole and all its bad rows are named at once, before anything is computed.
Left out: video, top-k and top-p (they would bias the ratio), several turns by the policy.

Shapes: B prompts, G samples of each, R rows (B * G), T completion tokens, P prompt tokens, V vocabulary, D
width.

Worked example: inverse-CDF sampling with probabilities (0.2, 0.5, 0.3) and the uniform number 0.65 picks
token 1, since 0.2 <= 0.65 < 0.7; its log-prob is ln 0.5 = -0.693. A row's numbers are its own, so a row
sampled in a batch equals the row sampled alone. {"problem": "<image>How many dogs?", "images": ["a.png"],
"answer": "<answer>3</answer>"} is read as a problem with the answer "3" and the image a.png of the file's
own folder.
"""
import base64
import hashlib
import io
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import reward
from model import (Config, ImageConfig, KVCache, Qwen25VL, SharedPrompt, load_image_config, preprocess_image,
                   read_json, resolve, smart_resize)

INSTRUCTION = ("First think inside <think> </think>, one step a line, checking each step against the image. "
               "Then give only the final answer inside <answer> </answer>.")

# ---- Problems

class DataError(ValueError):
    """Bad input data; the message names file, line and field."""


@dataclass
class Problem:
    """One question about zero or more images."""
    id: str
    question: str | list                # text with an <image> tag per image; or turns: user, assistant
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
    """The first present alias of a field; DataError where there is neither one nor a default."""
    for name in ALIASES[kind]:
        if row.get(name) is not None and row[name] != "":
            return row[name]
    if default is None:
        raise DataError(f"field '{kind}' is missing (looked for {', '.join(ALIASES[kind])})")
    return default


def last_turn(chat: list, roles: tuple):
    """What one of `roles` wrote last in a chat of {"role", "content"} or {"from", "value"}; None for
    nothing."""
    for message in reversed(chat):
        if isinstance(message, dict) and message.get("role", message.get("from")) in roles:
            return message.get("content", message.get("value"))
    return None


def read_question(value, images: list) -> tuple[str, list]:
    """Question text with one <image> tag an image, and the images: from a text, a chat (also as JSON in a
    string), or a turn's parts. Images named in the parts count where the row names none."""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            pass                                            # a text that begins like a chat
    if isinstance(value, list):
        value = last_turn(value, ("user", "human"))
    if isinstance(value, list):
        text, named = "", []
        for part in value:
            part = part if isinstance(part, dict) else {"type": "text", "text": part}
            if part.get("type") not in ("text", "image"):
                raise DataError(f"field 'problem': a part of type {part.get('type')!r}; known are text and image")
            text += "<image>" if part["type"] == "image" else str(part.get("text") or "")
            if part.get("image") is not None:
                named.append(part["image"])
        value, images = text, images or named
    if not isinstance(value, str) or not value.replace("<image>", "").strip():
        raise DataError("field 'problem' is empty or not text")
    tags = value.count("<image>")
    if tags and not images:
        return value.replace("<image>", ""), images         # a stray tag of a text-only row
    if tags not in (0, len(images)):
        raise DataError(f"field 'problem' has {tags} <image> tags, field 'images' has {len(images)} images")
    return value if tags else "<image>" * len(images) + value, images


def read_gold(value) -> str:
    """The bare gold answer: of a text, number, chat or {"ground_truth"}, out of <answer>x</answer>,
    '### The final answer is: x' or \\boxed{x}. DataError where there is none."""
    if isinstance(value, list):
        value = last_turn(value, ("assistant", "gpt"))
    elif isinstance(value, dict):
        value = value.get("ground_truth")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    rest, declared = reward.declared_answer(value) if isinstance(value, str) else ("", None)
    gold = declared or rest.rpartition("### The final answer is:")[2].strip()
    if not gold:
        raise DataError("field 'answer' is empty or not text")
    return gold


def read_choices(value, question: str) -> tuple[list | None, str]:
    """Options as a list of texts ({"A": "red", "B": "blue"} is one as well), and the question, with the
    options below it where it does not spell them out itself: "(B) red"."""
    if value is not None and not isinstance(value, (list, dict)):
        raise DataError("field 'choices' must be a list")
    if isinstance(value, dict):
        value = [value[letter] for letter in sorted(value)]
    lines, spelled_out = "", True
    for n, choice in enumerate(value or []):
        letter = chr(65 + n)
        lines += f"\n{letter}. {choice}"
        spelled_out &= any(f"{letter}{sign} {choice}" in question for sign in ".):")
    return [str(choice) for choice in value] if value else None, question if spelled_out else question + lines


def parse_row(row: dict, where: str, folder: Path, instruction: str = "") -> Problem:
    """One JSON object -> Problem, with image paths resolved against `folder` and within it. DataError names
    `where` and the field."""
    try:
        if not isinstance(row, dict):
            raise DataError(f"a JSON object is expected, found {type(row).__name__}")
        images = first_field(row, "images", default=[])
        images = images if isinstance(images, list) else [images]
        question, images = read_question(first_field(row, "problem"), images)
        choices, question = read_choices(row.get("choices"), question)
        if instruction:
            question += "\n" + instruction
        gold = read_gold(first_field(row, "answer"))
        if not reward.answers_match(gold, gold, choices):
            raise DataError(f"field 'answer': {gold[:40]!r} can never be right: too long, or no option")
        key_steps = row.get("key_steps")
        key_steps = key_steps.get("Steps") if isinstance(key_steps, dict) else key_steps
        if key_steps is not None and not isinstance(key_steps, list):
            raise DataError("field 'key_steps' must be a list")
        name, task = str(first_field(row, "id", where)), str(first_field(row, "task", default=""))
        demonstration = first_field(row, "demonstration", default="")
        "\n".join([name, question, gold, str(demonstration)]).encode("utf-8")   # a lone surrogate: ValueError
        images = [image_source(image, folder) for image in images]
        return Problem(name, question, gold, images, choices, key_steps, task, where, demonstration or None)
    except ValueError as e:
        raise DataError(f"{where}: {e}") from None


def image_source(image, folder: Path):
    """A path within `folder`, or the bytes of an image file: from a data: url or base64, or as parquet files
    hold them."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or image.get("image")
    if isinstance(image, str) and (image.startswith("data:") or len(image) > 1000):     # no name is that long
        try:
            return base64.b64decode(image.split(",", 1)[-1], validate=True)
        except ValueError as e:
            raise DataError(f"field 'images': the data: image can not be decoded ({e})") from None
    if not isinstance(image, (str, bytes)) or not image:
        raise DataError("field 'images' must hold file names or data: urls")
    if isinstance(image, bytes):
        return image
    path = folder / image.removeprefix("file://")
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        raise DataError(f"field 'images': {image} lies outside {folder}; allow it with --image_dir")
    return path


def open_image(image, decode: bool = True) -> Image.Image:
    """A path, the bytes of an image file, or a PIL image -> upright RGB image, fully decoded (OSError if it
    is truncated). Of an animation the first frame; 16-bit grey keeps its upper 8 bits; what is transparent
    keeps its colour. decode False: as it is, from its header alone."""
    if not isinstance(image, Image.Image):
        image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    if not decode:
        return image
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                          # Pillow would clip it at 255
        grey = np.asarray(image)
        grey = grey >> 8 if grey.max() > 255 else grey
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


# ---- Files of problems

def read_rows(path: Path):
    """(where, row or the DataError in reading it) of each row: a JSON object a line; in a .json file a list
    of them, or an object of them by id; in a .parquet file, with pyarrow."""
    if path.suffix == ".parquet":
        yield from read_parquet(path)
        return
    data = path.read_bytes()
    is_list = data.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"[")
    if path.suffix != ".json" or (b"\n{" in data and not is_list):         # lines, whatever the name
        for n, line in enumerate(data.split(b"\n"), start=1):
            if line.strip():
                yield f"{path}:{n}", parse_json(line, f"{path}:{n}")
        return
    value = parse_json(data, f"{path}:1")
    if isinstance(value, dict) and all(isinstance(row, dict) for row in value.values()):
        value = [{"id": key, **row} for key, row in value.items()]
    for n, row in enumerate(value if isinstance(value, list) else [value], start=1):
        yield f"{path}: row {n}", row


def parse_json(data: bytes, where: str):
    """The value, or the DataError in reading it."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as e:
        return DataError(f"{where}: not JSON: {e.msg} at column {e.colno}")
    except (ValueError, RecursionError) as e:               # not UTF-8, 5,000 digits, 10,000 brackets
        return DataError(f"{where}: not readable: {e}")


def read_parquet(path: Path):
    try:
        import pyarrow.parquet
        for n, row in enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1):
            yield f"{path}: row {n}", row
    except ImportError:
        raise DataError(f"--data {path}: parquet files need one more package: pip install pyarrow") from None
    except (OSError, ValueError, pyarrow.lib.ArrowException) as e:
        raise DataError(f"--data {path}: not a readable parquet file: {e}") from None


def load_problems(path, image_dir=None, instruction: str = "", check=None, show=20) -> list[Problem]:
    """Read and check a whole file: every row, every image, and what check(problem) raises as a DataError.
    DataError with one line for each bad row (the first `show`; None: all), so nothing is trained on or
    scored before all of it is known to be good."""
    path, problems, errors = Path(path), {}, []
    if not path.is_file():
        raise DataError(f"--data {path}: no such file")
    for where, row in read_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            problem = parse_row(row, where, Path(image_dir or path.parent), instruction)
            if problem.id in problems:
                raise DataError(f"{where}: field 'id': {problem.id} is taken by {problems[problem.id].where}")
            problems[problem.id] = problem
        except DataError as e:
            errors.append(str(e))
    with ThreadPoolExecutor() as pool:                      # images are decoded in parallel
        found = pool.map(lambda problem: problem_error(problem, check), problems.values())
        quiet = None if len(problems) >= 1000 else True
        for error in tqdm(found, total=len(problems), desc="checking rows", leave=False, disable=quiet):
            if error:
                errors.append(error)
    if errors:
        more = [f"... and {len(errors) - show} more"] if show and len(errors) > show else []
        raise DataError("\n".join(errors[:show] + more))
    if not problems:
        raise DataError(f"--data {path}: the file has no rows")
    return list(problems.values())


def problem_error(problem: Problem, check=None) -> str:
    """What is wrong with a problem's images, or by check(problem); "" for nothing."""
    for image in problem.images:
        try:
            open_image(image)
        except Exception as e:      # Pillow raises OSError, SyntaxError, DecompressionBombError, ...
            reason = "no such file" if isinstance(e, FileNotFoundError) else f"not readable: {e}"
            name = f"{image}: " if isinstance(image, (str, Path)) else ""
            return f"{problem.where}: field 'images': {name}{reason}"
    try:
        if check:
            check(problem)
    except DataError as e:
        return str(e)
    return ""


# ---- Codec: what turns text and images into tokens

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
    """Read tokenizer and processor files of a checkpoint; `max_pixels` > 0 bounds images more tightly than
    the checkpoint does. ValueError names what is missing."""
    from transformers import AutoTokenizer                  # takes seconds
    folder = resolve(path_or_id)
    config = Config.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as e:
        raise ValueError(f"{folder}: no readable tokenizer: {str(e).splitlines()[0]}") from None
    if (folder / "chat_template.json").is_file():           # where Qwen2.5-VL keeps the one that knows images
        tokenizer.chat_template = read_json(folder / "chat_template.json")["chat_template"]
    if not tokenizer.chat_template:
        raise ValueError(f"{folder}: neither chat_template.json nor the tokenizer has a chat template")
    image_id = config.image_token_id
    if tokenizer.convert_tokens_to_ids("<|image_pad|>") != image_id:
        raise ValueError(f"{folder}: the tokenizer's <|image_pad|> is not image_token_id {image_id} of "
                         "config.json")
    eos = tokenizer.eos_token_id
    if (folder / "generation_config.json").is_file():
        eos = read_json(folder / "generation_config.json").get("eos_token_id") or eos
    eos = tuple(eos) if isinstance(eos, list) else (eos,)
    if None in eos:
        raise ValueError(f"{folder}: neither generation_config.json nor the tokenizer names an eos token")
    specials = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    mask = torch.zeros(config.vocab_size)
    mask[len(tokenizer):] = -torch.inf                      # rows of the embedding that no token owns
    mask[sorted({*tokenizer.all_special_ids, *specials} - set(eos))] = -torch.inf
    pad = eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    image_config = load_image_config(folder)
    if max_pixels:
        image_config = replace(image_config, max_pixels=max_pixels)
    newlines = tuple(i for t, i in tokenizer.get_vocab().items() if "\n" in t or "\u010a" in t)
    return Codec(tokenizer, image_config, image_id, eos, pad, mask, tuple(specials.values()), newlines)


def escape_special(text: str, codec: Codec) -> str:
    """`text` with control tokens spelled out: what a user or a model writes must not turn into them."""
    for special in codec.specials:
        text = text.replace(special, special[0] + " " + special[1:])
    return text


def token_ids(text: str, codec: Codec) -> list[int]:
    """The tokens of a text as it stands, nothing added."""
    return codec.tokenizer(text, add_special_tokens=False)["input_ids"]


# ---- Prompts

@dataclass(eq=False)
class Prompt:
    """One encoded prompt."""
    ids: list
    pixel_values: torch.Tensor | None   # (N, features)
    grids: list                         # (1, rows, cols) in patches of each image


def image_grid(image, config: ImageConfig) -> tuple[int, int, int]:
    """(1, rows, cols) in patches of an image after resizing, from the file's header alone."""
    image = open_image(image, decode=False)
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8) and image.format != "TIFF"    # Pillow turns these
    width, height = image.size[::-1] if turned else image.size
    p, m = config.patch_size, config.merge_size
    height, width = smart_resize(height, width, p * m, config.min_pixels, config.max_pixels)
    return 1, height // p, width // p


def render_chat(problem: Problem, codec: Codec) -> str:
    """Chat template around the turns of the question, up to where the assistant begins to write. Each
    <image> is a single image token yet."""
    turns = [problem.question] if isinstance(problem.question, str) else problem.question
    messages = []
    for n, turn in enumerate(turns):
        content = []
        for k, piece in enumerate(turn.split("<image>")):
            if k > 0:
                content.append({"type": "image"})
            if piece:
                content.append({"type": "text", "text": escape_special(piece, codec)})
        messages.append({"role": "assistant" if n % 2 else "user", "content": content})
    return codec.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def tokens_with_images(text: str, grids: list, codec: Codec, where: str) -> list[int]:
    """The tokens of a rendered chat, each image token repeated for the merged patches of its image."""
    ids, image = [], 0
    for token in token_ids(text, codec):
        repeat = 1
        if token == codec.image_token_id:
            if image < len(grids):
                repeat = grids[image][1] * grids[image][2] // codec.image_config.merge_size ** 2
            image += 1
        ids += [token] * repeat
    if image != len(grids):
        raise DataError(f"{where}: the chat template placed {image} of {len(grids)} images")
    return ids


def encode_prompt(problem: Problem, codec: Codec, max_tokens: int | None = None,
                  pixels: bool = True) -> Prompt:
    """Decode a problem's images and tokenise its question: the costly part, done once a problem. DataError
    where the prompt is longer than `max_tokens` (it is never cut: a cut image would not match its features).
    pixels False: ids and grids alone, without reading the images' content."""
    where, patches, grids = problem.where or f"problem {problem.id}", [], []
    for image in problem.images:
        try:
            if pixels:
                values, grid = preprocess_image(open_image(image), codec.image_config)
                patches.append(torch.from_numpy(values))
            else:
                grid = image_grid(image, codec.image_config)
        except ValueError as e:
            raise DataError(f"{where}: field 'images': {e}") from None
        grids.append(grid)
    ids = tokens_with_images(render_chat(problem, codec), grids, codec, where)
    if max_tokens and len(ids) > max_tokens:
        raise DataError(f"{where}: field 'problem': the prompt has {len(ids)} tokens, --max_prompt_tokens is "
                        f"{max_tokens}")
    return Prompt(ids, torch.cat(patches) if patches else None, grids)


def with_images_of(prompt: Prompt, problem: Problem, codec: Codec, text: str | None = None) -> Prompt:
    """The prompt of another question about the same images (as often as it shows them), or of `text`, a
    rendered chat; nothing is decoded again."""
    text = render_chat(problem, codec) if text is None else text
    copies = len(problem.images) // max(1, len(prompt.grids))
    pixels = torch.cat([prompt.pixel_values] * copies) if copies else None
    grids = prompt.grids * copies
    return Prompt(tokens_with_images(text, grids, codec, f"problem {problem.id}"), pixels, grids)


def collate_prompts(prompts: list[Prompt], pad_id: int, device) -> dict:
    """Right-padded batch: input_ids, attention_mask (B, P), pixel_values (N, ...), image_grid_thw (images,
    3)."""
    ids, mask = pad([p.ids for p in prompts], pad_id)
    pixels, grids = [], []
    for p in prompts:
        grids += p.grids
        if p.pixel_values is not None:
            pixels.append(p.pixel_values.to(device, non_blocking=True))
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device),
            "pixel_values": torch.cat(pixels) if pixels else None,
            "image_grid_thw": torch.tensor(grids, device=device) if grids else None}


def pad(rows: list[list], value, left: bool = False):
    """Ragged lists -> (tensor (R, T), bool mask (R, T)), padded on the right (or left)."""
    width = max(map(len, rows), default=0)
    padded, mask = [], []
    for row in rows:
        fill, real = [value] * (width - len(row)), [True] * len(row)
        gap = [False] * len(fill)
        padded.append(fill + list(row) if left else list(row) + fill)
        mask.append(gap + real if left else real + gap)
    return torch.tensor(padded).reshape(len(rows), width), torch.tensor(mask).reshape(len(rows), width).bool()


def token_batches(lengths: list[int], budget: int):
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


# ---- The sampler

@dataclass(eq=False)
class Trajectory:
    """One completion of one problem, as the update needs it. Lists of tokens have one entry a completion
    token."""
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
    shared_prefix_len: int = 0          # rectified: its first so many tokens are its source's


def uniforms(key: str, rows: int, columns: int) -> torch.Tensor:
    """Random numbers (rows, columns) in [0, 1) that depend on `key` alone: whatever is sampled beside a
    problem, on however many ranks and after whatever interruption, its own numbers stay the same."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)).clamp(max=1 - 1e-6)


@torch.no_grad()
def sample(model: Qwen25VL, problems: list[Problem], codec: Codec, group_size: int = 1,
           max_new_tokens: int = 128, temperature: float = 1.0, keys: list | None = None,
           prefixes: list | None = None, prompts: list | None = None, stop_ids: tuple = (),
           limits: list | None = None) -> list[list[Trajectory]]:
    """Sample G = `group_size` completions of each of B problems -> B lists of G trajectories.

    temperature 0 is greedy; otherwise keys (B) name each problem's random numbers (None: its id), see
    `uniforms`. prefixes: for each of the R = B * G rows (problem-major) the completion tokens it continues
    from; these are forced, count towards max_new_tokens and are marked sampled = 0. prompts (B): the
    problems encoded already. stop_ids: tokens that end a completion besides EOS (it does not count as
    finished then). limits: for each row the length at which it ends, at most max_new_tokens. ValueError
    where the prefixes do not fit."""
    device, R = model.head_weight.device, len(problems) * group_size
    prompts = prompts or [encode_prompt(problem, codec) for problem in problems]
    prefixes, limits = prefixes or [[]] * R, limits or [max_new_tokens] * R
    if len(prefixes) != R or any(len(p) >= min(n, max_new_tokens) for p, n in zip(prefixes, limits)):
        raise ValueError(f"prefixes must hold {R} lists shorter than their limits and max_new_tokens "
                         f"{max_new_tokens}")
    last, cache, start, length = prefill(model, prompts, group_size, prefixes, max_new_tokens, codec.pad_id)
    if temperature > 0:
        keys = keys or [problem.id for problem in problems]
        numbers = torch.cat([uniforms(key, group_size, max_new_tokens) for key in keys]).to(device)
        columns = length[:, None] + torch.arange(max_new_tokens, device=device)     # a prefix used up its own
        numbers = numbers.gather(1, columns.clamp(max=max_new_tokens - 1))
    tokens = torch.full((R, max_new_tokens), codec.pad_id, device=device)
    logps = torch.zeros_like(tokens, dtype=torch.float32)
    ends, logit_mask = (*codec.eos_ids, *stop_ids), codec.logit_mask.to(device)
    end_ids = torch.tensor(ends, device=device)
    room = torch.tensor(limits, device=device) - length         # tokens still to be sampled; 0 after an end
    alive = torch.arange(R, device=device)                      # the row each row of the cache belongs to
    position = start + length                                   # of the first new token
    for step in range(max_new_tokens):
        number = numbers[alive, step] if temperature > 0 else None
        token, logp = next_token(F.linear(last, model.head_weight), logit_mask, temperature, number)
        tokens[alive, step], logps[alive, step] = token, logp   # after a row's end: without meaning
        room = room.masked_fill(torch.isin(token, end_ids), 0)
        if device.type == "cpu" or step % 4 == 3:               # on a GPU the question costs a sync
            active = (room > step + 1).view(-1, group_size).any(1)      # (prompts in the cache,)
            if not active.any():
                break
            if active.sum() <= 0.9 * len(active):               # groups that ended leave
                cache.keep_prompts(active.nonzero()[:, 0])
                rows = active.repeat_interleave(group_size)
                alive, room, token, position = alive[rows], room[rows], token[rows], position[rows]
        last = model.next_hidden(token[:, None], (position + step)[:, None], cache)[:, 0]
    groups = [[] for _ in problems]
    for r, (row_tokens, row_logps) in enumerate(zip(tokens.tolist(), logps.tolist())):
        b, new = r // group_size, until_end(row_tokens[:limits[r] - len(prefixes[r])], ends)
        t = make_trajectory(problems[b], prompts[b], prefixes[r], new, row_logps[:len(new)], codec)
        groups[b].append(t)
    return groups


def until_end(tokens: list, ends: tuple) -> list:
    """Tokens up to the first end, which is kept."""
    for n, token in enumerate(tokens):
        if token in ends:
            return tokens[:n + 1]
    return tokens


def make_trajectory(problem: Problem, prompt: Prompt, forced: list, new: list, logps: list,
                    codec: Codec) -> Trajectory:
    """A row of forced tokens and the new ones, of which logps are."""
    ids = list(forced) + new
    finished = ids[-1] in codec.eos_ids
    text = codec.tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=False)
    sampled = [0] * len(forced) + [1] * len(new)
    return Trajectory(problem, prompt, ids, sampled, [0.0] * len(forced) + logps, finished, text)


def next_token(logits, logit_mask, temperature: float, uniform=None):
    """logits (R, V) -> token (R,) and its log-prob (R,) under softmax(logits / temperature) without banned
    tokens. Greedy (temperature 0) reports the log-prob at temperature 1. Inverse CDF: the first token whose
    cumulative probability exceeds `uniform` (R,)."""
    logps = ((logits.float() + logit_mask) / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token = logps.argmax(-1)
    else:
        cumulative = logps.exp().double().cumsum(-1)            # fp32 sums over a large vocabulary drift
        token = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)
    return token, logps.gather(1, token[:, None])[:, 0]


def prefill_prompts(model: Qwen25VL, prompts: list[Prompt], pad_id: int):
    """Vision and prompts, each computed once -> the last hidden state (B, D), keys and values by layer, the
    attention mask (B, P) and the first free position (B,)."""
    batch = collate_prompts(prompts, pad_id, model.head_weight.device)
    hidden, context, next_position = model.prompt_hidden(**batch, keep_kv=True)
    last = hidden[torch.arange(len(prompts), device=hidden.device), batch["attention_mask"].sum(1) - 1]
    return last, context.kv, batch["attention_mask"], next_position


def prefill(model: Qwen25VL, prompts: list[Prompt], group_size: int, prefixes: list, max_new_tokens: int,
            pad_id: int):
    """Prompts once, then the forced prefixes, padded on the left so that all rows write the same column ->
    the last hidden state (R, D), the cache, the first position after each prompt (R,) and the prefix lengths
    (R,)."""
    last, prompt_kv, prompt_mask, start = prefill_prompts(model, prompts, pad_id)
    last, start = last.repeat_interleave(group_size, 0), start.repeat_interleave(group_size)
    length = torch.tensor([len(prefix) for prefix in prefixes], device=last.device)
    width = int(length.max())
    cache = KVCache(prompt_kv, prompt_mask, group_size, width + max_new_tokens)
    if width:
        ids, mask = pad(prefixes, pad_id, left=True)
        ids, mask = ids.to(last.device), mask.to(last.device)
        offsets = torch.arange(width, device=last.device) - (width - length[:, None])
        cache.extend(mask)
        hidden = model.rows_hidden(ids, start[:, None] + offsets.clamp(min=0), cache)[:, -1]
        last = torch.where((length > 0)[:, None], hidden, last)
    return last, cache, start, length


# ---- The training forward

def completion_hidden(model: Qwen25VL, prompts: list[Prompt], completions: list[list], pad_id: int):
    """Hidden states that predict each completion token. prompts (R): the one each row continues; a prompt
    that several rows share is computed once. completions: R lists of token ids.

    Returns hidden (R, T, D), targets (R, T) and the completion_mask (R, T) from lengths. Gradients flow
    through both the prompts and the rows."""
    unique = list({id(prompt): prompt for prompt in prompts}.values())
    place = {id(prompt): n for n, prompt in enumerate(unique)}
    last, prompt_kv, prompt_mask, start = prefill_prompts(model, unique, pad_id)
    prompt_of_row = torch.tensor([place[id(prompt)] for prompt in prompts], device=last.device)
    targets, mask = pad(completions, pad_id)
    targets, mask = targets.to(last.device), mask.to(last.device)
    inputs = targets[:, :-1]                                    # the last token predicts nothing
    hidden = last[prompt_of_row][:, None]                       # (R, 1, D) predicts the first token
    if inputs.shape[1]:
        context = SharedPrompt(prompt_kv, prompt_mask, prompt_of_row, mask[:, :-1])
        positions = start[prompt_of_row][:, None] + torch.arange(inputs.shape[1], device=last.device)
        hidden = torch.cat((hidden, model.rows_hidden(inputs, positions, context)), dim=1)
    return hidden, targets, mask


def token_logps(hidden, head_weight, targets, logit_mask, temperature: float = 1.0, chunk: int = 1024,
                entropy: bool = False):
    """Log-probs of the targets under softmax(logits / temperature) without banned tokens, in fp32.

    hidden (N, D), head_weight (V, D), targets (N,), logit_mask (V,) of 0 and -inf -> logps (N,), entropies
    (N,) (zeros unless asked for; no gradient). The logits of a chunk of tokens are computed again in the
    backward pass, so no more than (chunk, V) of them ever exist."""
    def logps_of_chunk(hidden, targets):
        logits = (F.linear(hidden, head_weight).float() + logit_mask) / temperature     # (chunk, V)
        logps = logits.log_softmax(-1)
        spread = logps.new_zeros(len(targets))
        if entropy:
            spread = -(logps.exp() * logps.clamp(min=-1e4)).sum(-1).detach()
        return logps.gather(1, targets[:, None])[:, 0], spread

    if len(targets) == 0:
        return hidden.sum(-1).float(), hidden.new_zeros(0).float()
    logps, entropies = [], []
    for inputs in zip(hidden.split(chunk), targets.split(chunk)):
        if torch.is_grad_enabled():
            part = checkpoint(logps_of_chunk, *inputs, use_reentrant=False)
        else:
            part = logps_of_chunk(*inputs)
        logps.append(part[0])
        entropies.append(part[1])
    return torch.cat(logps), torch.cat(entropies)


def completion_logps(model: Qwen25VL, codec: Codec, prompts: list[Prompt], completions: list[list],
                     entropy: bool = False):
    """Log-probs of completions as the sampler would have given them, arguments as for `completion_hidden` ->
    logps, entropies (zeros unless asked for) and completion_mask, all (R, T)."""
    hidden, targets, mask = completion_hidden(model, prompts, completions, codec.pad_id)
    logit_mask = codec.logit_mask.to(hidden.device)
    found, spread = token_logps(hidden[mask], model.head_weight, targets[mask], logit_mask, entropy=entropy)
    zeros = torch.zeros_like(mask, dtype=torch.float32)
    return zeros.masked_scatter(mask, found), zeros.masked_scatter(mask, spread), mask

"""Problems out of files: rows of JSON, JSONL and parquet as many projects write them, images of every kind.

Place in the pipeline: before the rollout; train.py, eval.py and benchmarks/ read their data here. A whole
file is read, and all its bad rows are named at once, before anything is computed. Ours; the field names are
those of the projects named in README.

Worked example: {"problem": "<image>How many dogs?", "images": ["a.png"], "answer": "<answer>3</answer>"}
becomes a Problem with the answer "3" and the image a.png of the file's own folder.
"""
import base64
import io
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

import reward

INSTRUCTION = ("First think inside <think> </think>, one step a line, checking each step against the image. "
               "Then give only the final answer inside <answer> </answer>.")


@dataclass
class Problem:
    """One question about zero or more images."""
    id: str
    question: str | list                # text with an <image> tag where each image goes; or turns of such
                                        # texts: user, assistant, user, ...
    answer: str                         # gold answer, unwrapped
    images: list                        # PIL images, or paths or bytes of files, opened for the prompt
    choices: list | None = None         # option texts; `answer` is then a letter (or an option's text)
    key_steps: list | None = None       # phrases a right chain contains (StepGRPO's rewards)
    task: str = ""                      # what results are grouped by
    where: str = ""                     # file:line it was read from
    demonstration: str | None = None    # a whole completion to imitate (`train.py --stage sft`)
    oracle: dict | None = None          # tiny only: what the image really shows


class DataError(ValueError):
    """Bad input data; the message names file, line and field."""


# Field names of Geometry3K/EasyR1, verl, VLM-R1, TRL and open-r1, MM-Eureka and MMK12, R1-VL-10K, ViRL39K
ALIASES = {"id": ("id", "qid"),
           "images": ("images", "image", "image_path", "img"),
           "problem": ("problem", "question", "query", "prompt", "message", "conversations"),
           "answer": ("answer", "solution", "ground_truth", "reward_model", "conversations"),
           "demonstration": ("demonstration", "response", "completion", "solution"),
           "task": ("task", "category", "subject", "source", "data_source")}


def _first(row: dict, kind: str, where: str = "", default=None):
    """The first present alias of a field; DataError where there is neither one nor a default."""
    for name in ALIASES[kind]:
        if row.get(name) is not None and row[name] != "":
            return row[name]
    if default is None:
        raise DataError(f"{where}: field '{kind}' is missing (looked for {', '.join(ALIASES[kind])})")
    return default


def unwrap_gold(text: str) -> str:
    """The bare answer out of a worked solution: <answer>x</answer>, '### The final answer is: x'
    or \\boxed{x}."""
    rest, declared = reward.declared_answer(text)
    return declared or rest.rpartition("### The final answer is:")[2].strip()


def _turn(chat, roles: tuple):
    """The content of the last turn of a chat, [{"role", "content"}] or [{"from", "value"}], that one of
    `roles` wrote; None where there is none."""
    turns = [m.get("content", m.get("value")) for m in chat
             if isinstance(m, dict) and m.get("role", m.get("from")) in roles]
    return turns[-1] if turns else None


def _question(value, images: list, where: str) -> tuple:
    """The text of a question, with <image> tags, and its images: from a text, from a chat (also one written
    as JSON in a string), or from a turn's parts; images named in the parts come before none given."""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value, images
    value = _turn(value, ("user", "human")) if isinstance(value, list) else value
    if isinstance(value, list):                                     # parts of a turn
        parts = [p if isinstance(p, dict) else {"type": "text", "text": p} for p in value]
        for p in parts:
            if p.get("type") not in ("text", "image"):
                raise DataError(f"{where}: field 'problem': a part of type {p.get('type')!r}; known are text "
                                "and image")
        named = [p["image"] for p in parts if p.get("image") is not None]
        value = "".join("<image>" if p.get("type") == "image" else str(p.get("text") or "") for p in parts)
        return value, images or named
    return value, images


def parse_row(row: dict, where: str, folder: Path, instruction: str = "", outside: bool = False) -> Problem:
    """One JSON object -> Problem with image paths resolved against `folder`, and within it unless `outside`.
    DataError names `where` and the field."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object is expected, found {type(row).__name__}")
    images = _first(row, "images", default=[])
    images = images if isinstance(images, list) else [images]
    question, images = _question(_first(row, "problem", where), images, where)
    if not isinstance(question, str) or not question.replace("<image>", "").strip():
        raise DataError(f"{where}: field 'problem' is empty or not text")
    gold = _first(row, "answer", where)
    if isinstance(gold, list):
        gold = _turn(gold, ("assistant", "gpt"))
    elif isinstance(gold, dict):
        gold = gold.get("ground_truth")
    number = isinstance(gold, (int, float)) and not isinstance(gold, bool) and math.isfinite(gold)
    gold = unwrap_gold(str(gold)) if number or isinstance(gold, str) else ""
    if not gold:
        raise DataError(f"{where}: field 'answer' is empty or not text")
    tags = question.count("<image>")
    if tags and not images:                                         # a stray tag in a text-only row
        question = question.replace("<image>", "")
    elif tags == 0:
        question = "<image>" * len(images) + question
    elif tags != len(images):
        raise DataError(f"{where}: field 'problem' has {tags} <image> tags, "
                        f"field 'images' has {len(images)} images")
    for name in ("choices", "key_steps"):
        if row.get(name) is not None and not isinstance(row[name], (list, dict)):
            raise DataError(f"{where}: field '{name}' must be a list")
    choices, key_steps = row.get("choices"), row.get("key_steps")
    if isinstance(choices, dict):                                   # {"A": "red", "B": "blue"}
        choices = [choices[letter] for letter in sorted(choices)]
    choices = [str(c) for c in choices] if choices else None
    if isinstance(key_steps, dict):
        key_steps = key_steps.get("Steps")
    labels = [(chr(65 + i), c) for i, c in enumerate(choices or [])]
    if not all(any(f"{a}{sign} {c}" in question for sign in ".):") for a, c in labels):     # "(B) red"
        question += "".join(f"\n{a}. {c}" for a, c in labels)
    if instruction:
        question += "\n" + instruction
    if not reward.answers_match(gold, gold, choices):
        raise DataError(f"{where}: field 'answer': {gold[:40]!r} can never be right: too long, or no option")
    name, demonstration = str(_first(row, "id", default=where)), _first(row, "demonstration", default="")
    "\n".join([name, question, gold, str(demonstration)]).encode("utf-8")   # ValueError for a lone surrogate
    return Problem(id=name, question=question, answer=gold, choices=choices, key_steps=key_steps,
                   task=str(_first(row, "task", default="")), where=where,
                   demonstration=demonstration or None,
                   images=[image_source(im, folder, where, outside) for im in images])


def image_source(image, folder: Path, where: str, outside: bool):
    """A path under `folder` (anywhere, if `outside`), or the bytes of an image: from a data: url or base64,
    or as parquet files hold them."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or image.get("image")
    if isinstance(image, str) and (image.startswith("data:") or len(image) > 1000):     # no name is that long
        try:
            return base64.b64decode(image.split(",", 1)[-1], validate=True)
        except ValueError as e:
            raise DataError(f"{where}: field 'images': the data: image can not be decoded ({e})") from None
    if not isinstance(image, (str, bytes)) or not image:
        raise DataError(f"{where}: field 'images' must hold file names or data: urls")
    if isinstance(image, bytes):
        return image
    path = folder / image.removeprefix("file://")
    if not outside and not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        raise DataError(f"{where}: field 'images': {image} lies outside {folder}; give --image_dir, or allow "
                        "it with --outside_images")
    return path


def image_file(image) -> Image.Image:
    """A path, the bytes of an image file, or a PIL image -> PIL image, perhaps not decoded yet."""
    image = io.BytesIO(image) if isinstance(image, bytes) else image
    return image if isinstance(image, Image.Image) else Image.open(image)


def open_image(image) -> Image.Image:
    """As `image_file` -> upright RGB image, fully decoded (OSError if it is truncated). Of an animation the
    first frame; 16-bit grey keeps its upper 8 bits; what is transparent keeps its colour."""
    image = image_file(image)
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                          # Pillow would clip it at 255
        grey = np.asarray(image)
        image = Image.fromarray((grey >> 8 if grey.max() > 255 else grey).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _parquet_rows(path: Path):
    """The rows of a parquet file, one after the other."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"--data {path}: parquet files need one more package: pip install pyarrow") from None
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256):
            yield from batch.to_pylist()
    except (OSError, ValueError, pyarrow.lib.ArrowException) as e:
        raise DataError(f"--data {path}: not a readable parquet file: {e}") from None


def read_rows(path: Path):
    """(where, row or the error in reading it) of each row: a JSON object a line; in a .json file, a list of
    them or an object of them by id; in a .parquet file, with pyarrow."""
    if path.suffix == ".parquet":
        yield from ((f"{path}: row {n}", row) for n, row in enumerate(_parquet_rows(path), start=1))
        return
    data, whole = path.read_bytes(), False
    if path.suffix == ".json":                              # else lines of objects, whatever it is called
        whole = len(data.split(b"\n{", 1)) == 1 or data.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"[")
    for n, line in enumerate([data] if whole else data.split(b"\n"), start=1):
        where = f"{path}:{n}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except json.JSONDecodeError as e:
            row = DataError(f"{where}: not JSON: {e.msg} at column {e.colno}")
        except (ValueError, RecursionError) as e:       # not UTF-8, a number of 5000 digits, 10,000 brackets
            row = DataError(f"{where}: not readable: {e}")
        if whole and isinstance(row, dict) and all(isinstance(v, dict) for v in row.values()):
            row = [{"id": key, **part} for key, part in row.items()]
        if whole and isinstance(row, list):
            yield from ((f"{path}: row {k}", part) for k, part in enumerate(row, start=1))
        else:
            yield where, row


def check_problems(problems: list[Problem], measure=None) -> tuple[list, list[str]]:
    """Open every image of every problem, in parallel -> (measure(problem) of the good ones, one line a bad
    one)."""
    def check(problem):
        for image in problem.images:
            try:
                open_image(image)
            except Exception as e:    # Pillow raises many kinds: OSError, SyntaxError, DecompressionBombError
                reason = "no such file" if isinstance(e, FileNotFoundError) else f"not readable: {e}"
                name = f"{image}: " if isinstance(image, (str, Path)) else ""
                return None, f"{problem.where}: field 'images': {name}{reason}"
        try:
            return measure(problem) if measure else None, None
        except DataError as e:
            return None, str(e)

    with ThreadPoolExecutor() as pool:
        found = list(tqdm(pool.map(check, problems), total=len(problems), desc="checking rows", leave=False,
                          disable=None if measure or len(problems) >= 1000 else True))
    return [value for value, error in found if not error], [error for _, error in found if error]


def read_problems(path, image_dir=None, instruction: str = "",
                  outside: bool = False) -> tuple[list[Problem], list[str]]:
    """The good rows of a whole file, and one line a bad one. Images are not opened yet. DataError where there
    is no such file."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"--data {path}: no such file")
    folder, problems, errors = Path(image_dir or path.parent), {}, []
    for where, row in read_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            problem = parse_row(row, where, folder, instruction, outside)
            if problem.id in problems:
                raise DataError(f"{where}: field 'id': {problem.id} is taken by {problems[problem.id].where}")
            problems[problem.id] = problem
        except DataError as e:
            errors.append(str(e))
        except ValueError as e:                                         # a lone surrogate
            errors.append(f"{where}: not readable: {e}")
    if not problems and not errors:
        raise DataError(f"--data {path}: the file has no rows")
    return list(problems.values()), errors


def load_problems(path, image_dir=None, instruction: str = "", outside: bool = False) -> list[Problem]:
    """Read and check a whole file: every row, every image. Raises DataError with one line a bad row (the
    first 20), so nothing is trained on or scored before all of it is known to be good."""
    problems, errors = read_problems(path, image_dir, instruction, outside)
    errors += check_problems(problems)[1]
    if errors:
        more = f"\n... and {len(errors) - 20} more" if len(errors) > 20 else ""
        raise DataError("\n".join(errors[:20]) + more)
    return problems


def is_tiny(data: str) -> bool:
    """Whether a data argument names the embedded tasks rather than a file."""
    return data.partition(":")[0] == "tiny"

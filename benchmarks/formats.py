"""Benchmark files -> problems: MathVista, MathVerse, MathVision, MMMU, MMMU-Pro, MMStar.

Place in the pipeline: `eval.py --bench FILE` reads here and scores with rules.py. Read are VLMEvalKit's TSV
files (base64 images, list literals of them, references to another row's image, or paths) and, where they
exist, the official JSON and JSONL files beside their image folder. Which benchmark a file holds is told from
its name, else from its columns.

Three wordings (`--prompt`): "own" is the bare question with its options, "A. red", for our --instruction to
follow; "direct" and "cot" are the benchmark's own words, as VLMEvalKit sends them (one and the same where it
knows no other). Images stand where <image 1> does in MMMU and MMMU-Pro, else before the text.

Worked example: an MMStar row {question: "Which?", A: "red", B: "blue", answer: "B"} becomes, in our wording,
the question "<image>Which?\\nA. red\\nB. blue" with choices ["red", "blue"] and answer "B".
"""
import ast
import base64
import csv
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data.reading import DataError, Problem, check_problems, image_source, read_rows

PROMPTS = ("own", "direct", "cot")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NAMES = {"mathvista": "MathVista", "mathverse": "MathVerse", "mathvision": "MathVision",
         "mmmupro": "MMMU-Pro", "mmmu": "MMMU", "mmstar": "MMStar"}     # what a file's name holds, in order
TAG = re.compile(r"<image ?(\d{1,2})>")
HINT = re.compile(r"(?s)^Hint:.*?\nQuestion:\s*")
ASK = re.compile(r"(?s)^Please (?:directly|first).*?\nQuestion:\s*")
INLINE = re.compile(r"(?m)(?:^|(?<=, )|(?<=Options: ))\(?([A-Z])(?:\)|[:.])\s*(.*?)"
                    r"(?=,? \(?[A-Z](?:\)|:)\s|$)")
COT = ("The last line of your response should be of the following format: 'Answer: $LETTER' (without quotes) "
       "where LETTER is one of the options. Think step by step before answering. ")
BOX = ('Please solve the problem step by step and put your answer in one "\\boxed{}". If it is a multiple '
       'choice question, only one letter is allowed in the "\\boxed{}".\n')


@dataclass
class Item(Problem):
    """A problem of a benchmark, with what its scoring rules need."""
    benchmark: str = ""                 # a value of NAMES
    split: str = ""
    golds: list = field(default_factory=list)           # every answer that counts as right
    answer_type: str = "text"           # MathVista: text, integer, float, list
    precision: int = 0                  # MathVista: decimals of a float
    groups: dict = field(default_factory=dict)          # what results are grouped by -> value, or list
    prompt: str = "own"                 # the wording: one of PROMPTS


# ------------------------------------------------------------------------------------------------------------
# Files


def read_table(path: Path) -> list[tuple[str, dict]]:
    """(where, row) of each row of a .tsv file (text cells) or whatever `reading.read_rows` reads. DataError
    names file and row."""
    if path.suffix == ".tsv":
        csv.field_size_limit(2 ** 31 - 1)                          # images are longer than 131,072 characters
        try:
            with open(path, encoding="utf-8-sig", newline="") as f:
                return [(f"{path}: row {n}", row)
                        for n, row in enumerate(csv.DictReader(f, delimiter="\t"), start=1)]
        except (csv.Error, ValueError) as e:
            raise DataError(f"{path}: not a readable TSV file: {e}") from None
    rows = list(read_rows(path))
    for where, row in rows:
        if not isinstance(row, dict):
            raise row if isinstance(row, DataError) else DataError(f"{where}: a JSON object is expected")
    return rows


def literal(value, kind=list):
    """A list (or dict) as it is, or written as a Python literal in a text; empty where it is neither."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return kind()
    return value if isinstance(value, kind) else kind()


def benchmark_of(path: Path, row: dict) -> str:
    """The benchmark a file holds, by its name, else by its columns. DataError where neither tells."""
    name = re.sub(r"[^a-z]", "", path.stem.lower())
    for key, benchmark in NAMES.items():
        if key in name:
            return benchmark
    signs = {"MathVerse": ("problem_version",), "MathVista": ("answer_type", "question_type"),
             "MathVision": ("level", "subject", "options"), "MMMU": ("topic_difficulty",),
             "MMStar": ("bench", "l2_category")}
    for benchmark, columns in signs.items():
        if all(c in row for c in columns):
            return benchmark
    raise DataError(f"--bench {path}: neither its name nor its columns tell which benchmark it is; name it "
                    f"like one of {', '.join(NAMES.values())}")


def image_sources(row: dict, by_index: dict, folder: Path, where: str, outside: bool) -> list:
    """The images of a row: bytes, or paths under `folder` (anywhere, if `outside`). Paths in `image_path`
    count where there is no column `image`."""
    cell = row.get("image") if "image" in row else row.get("image_path")
    if isinstance(cell, str) and 0 < len(cell) <= 64 and cell in by_index:      # another row's image
        cell = by_index[cell].get("image")
    cells = literal(cell) or ([cell] if cell else [])
    if not cells or (isinstance(cells[0], str) and len(cells[0]) <= 255 and "." in cells[0]):  # files' names
        return [image_source(c, folder, where, outside) for c in cells]
    try:
        return [base64.b64decode(c) for c in cells]
    except (ValueError, TypeError) as e:
        raise DataError(f"{where}: field 'image': not base64: {e}") from None


# ------------------------------------------------------------------------------------------------------------
# Rows -> items. Each builder: row, wording -> the fields of an Item; <image k> tags of MMMU are placed later.


def lettered(row: dict) -> list[str]:
    """The option cells A, B, ...: up to the last one that is not empty."""
    cells = [str(row.get(a) if row.get(a) is not None else "").strip() for a in LETTERS]
    last = max((i for i, c in enumerate(cells) if c), default=-1)
    return cells[:last + 1]


def option_lines(choices) -> str:
    return "".join(f"\n{a}. {c}" for a, c in zip(LETTERS, choices or []) if c)


def options_in(text: str) -> list[str]:
    """Options that a question lists in its text ("A:40°" lines, "Options: A: x, B: y", "(A) x"), if they are
    lettered A, B, ... without a gap."""
    start = max(text.rfind("Choices:"), text.rfind("Options:"))
    found = INLINE.findall(text[start:] if start >= 0 else text)
    letters = "".join(a for a, _ in found)
    return [c.strip() for _, c in found] if len(found) > 1 and LETTERS.startswith(letters) else []


def mathvista(row, prompt):
    metadata = literal(row.get("metadata"), dict)
    choices = [str(c) for c in literal(row.get("choices"))]
    query = str(row.get("query") or row.get("question") or "")
    query = HINT.sub("", query) if prompt == "own" else query
    answer, kind = str(row.get("answer") or "").strip(), str(row.get("answer_type") or "text")
    if choices:
        letter = str(row.get("answer_option") or "").strip()
        answer = letter or next((LETTERS[i] for i, c in enumerate(choices) if c == answer), answer)
    decimals = len(answer.partition(".")[2]) if kind == "float" else 0
    hinted = re.search(r"with (one|two) decimal", str(row.get("question")))
    precision = int(float(row.get("precision") or 0)) or (1 + (hinted[1] == "two") if hinted else decimals)
    skills = literal(row.get("skills")) or metadata.get("skills") or []
    return {"question": query, "choices": choices or None, "golds": [answer], "answer_type": kind,
            "precision": precision, "split": str(metadata.get("split") or "testmini"),
            "groups": {"task": row.get("task") or metadata.get("task") or "", "skill": list(skills)}}


def mathverse(row, prompt):
    metadata = literal(row.get("metadata"), dict)
    version = str(row.get("problem_version") or "")
    question = str(row.get("question") or "")
    multiple = row.get("question_type") == "multi-choice"
    bare = ASK.sub("", question)
    if version == "Vision Only":
        bare = "Answer the question that the image shows." + (" Give the option letter." if multiple else "")
    text = {"own": bare, "direct": str(row.get("query_wo") or question),
            "cot": str(row.get("query_cot") or question)}[prompt]
    gold = str(row.get("answer") or "").strip()
    letter = re.fullmatch(r"\(?([A-Z])\)?", gold)
    choices, golds = None, [gold.replace("\n", ",")]
    if multiple and letter:
        listed = options_in(str(row.get("question_for_eval") or "")) or options_in(question)
        choices, golds = listed or [""] * 5, [letter[1]]
    return {"question": text, "choices": choices, "golds": golds, "split": "testmini",
            "groups": {"version": version, "subject": metadata.get("subject", "")}}


def mathvision(row, prompt):
    choices = [str(c) for c in literal(row.get("choices")) or literal(row.get("options"))]
    drawn = "".join(choices) == LETTERS[:len(choices)]              # the options are drawn in the image
    question = TAG.sub(r"[image \1]", str(row.get("question") or ""))
    shown = choices and not drawn and not options_in(question)      # the question may list them already
    if prompt == "own":
        question += option_lines(choices) if shown else ""
    else:
        lines = "".join(f"({a}) {c}\n" for a, c in zip(LETTERS, choices)) if shown else ""
        question = (f"{BOX}{question}\n{lines}" if prompt == "cot" else
                    f"{question}\n{lines}\nAnswer the question using a single word or phrase.")
    gold = str(row.get("answer") or "").replace("\x0c", "\\f").strip()        # "\frac" read as an escape
    return {"question": question, "choices": choices or None, "golds": [gold],
            "split": "", "groups": {"subject": row.get("category") or row.get("subject") or "",
                                    "level": str(row.get("level") or "")}}


def mmmu(row, prompt):
    choices = lettered(row) or [str(c) for c in literal(row.get("options"))]
    hint, question = str(row.get("hint") or ""), str(row.get("question") or "")
    if prompt == "own":
        text = (f"{hint}\n" if hint else "") + question + option_lines(choices)
    else:
        text = (f"Hint: {hint}\n" if hint else "") + f"Question: {question}\n"
        if choices:
            text += "Options:" + option_lines(choices)
            text += "\nPlease select the correct answer from the options above. \n"
    golds = [str(g) for g in literal(row.get("answer"))] or [str(row.get("answer") or "").strip()]
    split = str(row.get("split") or str(row.get("id") or "validation").partition("_")[0])
    return {"question": text, "choices": choices or None, "golds": golds, "split": split,
            "groups": {"category": row.get("category") or "", "l2-category": row.get("l2-category") or ""}}


def mmmu_pro(row, prompt, vision: bool = False):
    choices = lettered(row) or [str(c) for c in literal(row.get("options"))]
    direct = "Answer directly with the option letter from the given choices. "
    if vision:
        text = "Answer the following multiple-choice question in the image. "
        text += {"own": "", "direct": direct, "cot": COT}[prompt]
    elif prompt == "own":
        text = str(row.get("question") or "") + option_lines(choices)
    else:
        text = f"Question: {row.get('question') or ''}\nOptions:{option_lines(choices)}\n"
        text += direct if prompt == "direct" else f"Answer the following multiple-choice question. {COT}"
    return {"question": text, "choices": choices, "golds": [str(row.get("answer") or "").strip()],
            "split": "vision" if vision else "standard (10 options)",
            "groups": {"category": row.get("category") or row.get("subject") or ""}}


def mmstar(row, prompt):
    fields = mmmu(row, prompt)
    if not fields["choices"]:                                   # the official file: options in the question
        question = str(row.get("question") or "")
        fields["choices"] = options_in(question) or [""] * 4
        fields["question"] = HINT.sub("", question) if prompt == "own" else fields["question"]
    return {**fields, "split": "val", "groups": {"category": row.get("category") or ""}}


BUILDERS = {"MathVista": mathvista, "MathVerse": mathverse, "MathVision": mathvision, "MMMU": mmmu,
            "MMMU-Pro": mmmu_pro, "MMStar": mmstar}


def placed(question: str, images: list, interleave: bool, where: str) -> tuple[str, list]:
    """The question with an <image> for each image it shows, and these images in that order."""
    question = question.replace("<image>", "< image>")
    numbers = [int(n) for n in TAG.findall(question)] if interleave else []
    if not numbers:
        return "<image>" * len(images) + question, images
    if max(numbers) > len(images) or min(numbers) < 1:
        raise DataError(f"{where}: field 'question': <image {max(numbers)}>, but {len(images)} images")
    return TAG.sub("<image>", question), [images[n - 1] for n in numbers]


def row_id(row: dict) -> str:
    """The name of a row, "" where it has none."""
    names = [str(row[k]) for k in ("index", "id", "pid", "sample_index") if row.get(k) not in (None, "")]
    return names[0] if names else ""


def load_benchmark(path, prompt: str = "own", instruction: str = "", image_dir: str = "",
                   outside: bool = False) -> tuple[list, str]:
    """Read and check a whole benchmark file -> (items, a line that says what was left out). `instruction` is
    appended in our own wording only. DataError names file and row."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"--bench {path}: no such file")
    rows = read_table(path)
    if not rows:
        raise DataError(f"--bench {path}: the file has no rows")
    benchmark, folder = benchmark_of(path, rows[0][1]), Path(image_dir or path.parent)
    by_index = {str(r.get("index")): r for _, r in rows if "index" in r}
    build, items, errors, dropped, others = BUILDERS[benchmark], [], [], 0, 0
    vision = re.search(r"(?i)pro[-_]?v(?![a-z])|vision", path.stem) and benchmark == "MMMU-Pro"
    for where, row in rows:
        try:
            try:
                fields = build(row, prompt, vision=True) if vision else build(row, prompt)
            except (ValueError, TypeError, AttributeError) as e:
                raise DataError(f"{where}: not a row of {benchmark}: {e}") from None
            images = image_sources(row, by_index, folder, where, outside)
            if not images and path.suffix == ".tsv":                # VLMEvalKit leaves such rows out
                dropped += 1
                continue
            if benchmark == "MMMU" and fields["split"] == "dev":
                others += 1
                continue
            if not fields["question"].strip() or not any(fields["golds"]):
                raise DataError(f"{where}: fields 'question' and 'answer' must not be empty")
            interleave = benchmark in ("MMMU", "MMMU-Pro")
            question, images = placed(fields.pop("question"), images, interleave, where)
            question += "\n" + instruction if instruction and prompt == "own" else ""
            fields["split"] = fields["split"] or ("testmini" if "mini" in path.stem.lower() else "test")
            items.append(Item(id=row_id(row) or where, question=question, images=images, where=where,
                              answer=fields["golds"][0], benchmark=benchmark, prompt=prompt, **fields))
        except DataError as e:
            errors.append(str(e))
    if benchmark == "MathVerse":
        borrow_options(items, [row for _, row in rows])
    counts = Counter(i.id for i in items)
    errors += [f"{path}: the id {name} stands twice" for name, n in counts.items() if n > 1]
    errors += check_problems(items)[1]
    if errors or not items:
        raise DataError("\n".join(errors[:20] or [f"--bench {path}: no row is left"]))
    notes = [f"{dropped} rows without an image"] * (dropped > 0) + [f"{others} dev rows"] * (others > 0)
    return items, "left out: " + ", ".join(notes) if notes else ""


def borrow_options(items: list[Item], rows: list[dict]):
    """MathVerse: the texts of options that only another version of a problem spells out."""
    problem = {row_id(r): r["problem_index"] for r in rows if r.get("problem_index") not in (None, "")}
    known = {problem[i.id]: i.choices for i in items if i.id in problem and i.choices and any(i.choices)}
    for i in items:
        if i.choices and not any(i.choices):
            i.choices = known.get(problem.get(i.id), i.choices)

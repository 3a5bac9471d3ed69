r"""MathVista, MathVerse, MathVision, MMMU, MMMU-Pro, MMStar: files into our JSONL, completions into scores.

    python experiments/benchmarks.py convert MMStar.tsv --out star
    torchrun --nproc_per_node 8 eval.py --model M --data star/problems.jsonl --greedy --out star/rows.jsonl
    python experiments/benchmarks.py score star/rows.jsonl --data star/problems.jsonl
    python experiments/benchmarks.py export star/rows.jsonl --data star/problems.jsonl --tsv MMStar.tsv \
        --out M_MMStar.tsv
    PRED_FORMAT=tsv python -c "from vlmeval.dataset import build_dataset as b; \
        print(b('MMStar').evaluate('M_MMStar.tsv', model='exact_matching'))"

convert takes VLMEvalKit's .tsv (base64 images, lists of them, another row's index, paths) and the benchmarks'
own .json and .jsonl; the file's name must hold the benchmark's. --prompt: "own" is the bare question with its
options, to which eval.py appends --instruction; "direct" and "cot" are what VLMEvalKit sends (give eval.py an
empty --instruction). Left out: MMMU's dev rows, rows of a .tsv without an image.
score reads with reward.py's matcher and each benchmark's number format, not with the official scripts' rules.
What can not be read is wrong ("parse fail"): nothing is drawn at random, no judge is asked. The table of
eval.py lacks the number formats and the options that only an image shows.
export writes the answered rows and a column `prediction`: what follows </think>, of that what the last tag or
box holds, for other scorers know no tags. VLMEvalKit's `evaluate` of these six takes .tsv and .xlsx, by the
suffix (a .json it loads as a list and fails); three of them (Math..) need its judge model.
Sources: the scripts of VLMEvalKit and of the six, 2024 to 2026. Figures of two scorers can not be compared.

Worked example: the MMStar row {index: 7, question: "Which?", A: "red", B: "blue", answer: "B", ..} becomes
{"id": "7", "images": ["images/0f.png"], "problem": "<image>Which?\nA. red\nB. blue", "answer": "B", ..}; the
completion "<think>..</think><answer>blue</answer>" is right, and its prediction is "blue".
"""
import argparse
import ast
import base64
import csv
import hashlib
import io
import json
import re
import sys
from collections import Counter
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as evaluation  # noqa: E402
import reward  # noqa: E402
import rollout  # noqa: E402
from model import InputError, reading  # noqa: E402

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
IDS = ("index", "id", "pid", "sample_index")                    # columns that name a row
IMAGE_TAG = re.compile(r"<image ?(\d{1,2})>")
ASK = re.compile(r"(?s)^(?:Hint:|Please directly|Please first).*?\nQuestion:\s*")
OPTION = re.compile(r"(?m)(?:^|(?<=, )|(?<=Options: ))\(?([A-Z])(?:\)|[:.])\s*(.*?)"
                    r"(?=,? \(?[A-Z](?:\)|:)\s|$)")
LETTER_ONLY = "Answer directly with the option letter from the given choices. "
LAST_LINE = ("The last line of your response should be of the following format: 'Answer: $LETTER' (without "
             "quotes) where LETTER is one of the options. Think step by step before answering. ")
BOX = ('Please solve the problem step by step and put your answer in one "\\boxed{}". If it is a multiple '
       'choice question, only one letter is allowed in the "\\boxed{}".\n')


def read_tsv(path: Path):
    """(where, row) of each row, cells as text. An open quote swallows the rows after it: then cells are
    missing, or one cell holds a whole row's tabs."""
    csv.field_size_limit(2 ** 31 - 1)                           # images are longer than 131,072 characters
    where = f"{path}: header"
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t", strict=True)
        try:
            header = next(reader, [])
            if not {"question", "answer"} <= set(header):
                raise InputError(f"{where}: columns 'question' and 'answer' are needed")
            for number, cells in enumerate(filter(None, reader), start=1):
                where = f"{path}: row {number}"
                swallowed = any("\n" in cell and cell.count("\t") >= len(header) - 1 for cell in cells)
                if len(cells) != len(header) or swallowed:
                    raise InputError(f"{where}: {len(cells)} cells of {len(header)}; is a quote left open?")
                yield where, dict(zip(header, cells))
        except (csv.Error, UnicodeDecodeError) as e:
            raise InputError(f"{where} or after it: not a readable TSV file: {e}") from None


def read_table(path: Path) -> list[tuple[str, dict]]:
    """(where, row) of each row of a .tsv, .json or .jsonl. InputError names file and row."""
    rows = list(read_tsv(path) if path.suffix == ".tsv" else rollout.read_rows(path))
    for where, row in rows:
        if not isinstance(row, dict):
            raise row if isinstance(row, InputError) else InputError(f"{where}: a JSON object is expected")
    if not rows:
        raise InputError(f"{path}: the file has no rows")
    return rows


def text_of(row: dict, *names) -> str:
    """The first of these cells that is not empty, as text; "" without one."""
    for name in names:
        if row.get(name) not in (None, ""):
            return str(row[name])
    return ""


def literal(value):
    """A list (of texts) or dict, as it is or written as a Python literal in a text; else []."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return []
    if isinstance(value, list):
        return list(map(str, value))
    return value if isinstance(value, dict) else []


# ---- The six. Each builder: row, wording -> question, choices, golds, groups; MathVista also answer_type and
# precision. Choices are empty texts where only the image shows them, so that letters count.
def lettered(row: dict) -> list[str]:
    """The option cells A, B, ..., up to the last one that is not empty; without any, the column `options`."""
    cells = [text_of(row, letter).strip() for letter in LETTERS]
    while cells and not cells[-1]:
        cells.pop()
    return cells or literal(row.get("options"))


def option_lines(choices: list[str]) -> str:
    return "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices) if choice)


def options_in(text: str) -> list[str]:
    """Options that a question lists in its text ("A:40°" lines, "Options: A: x, B: y", "(A) x"), if they are
    lettered A, B, ... without a gap."""
    found = OPTION.findall(text[max(text.rfind("Choices:"), text.rfind("Options:"), 0):])
    in_order = LETTERS.startswith("".join(letter for letter, _ in found))
    return [choice.strip() for _, choice in found] if len(found) > 1 and in_order else []


def mathvista(row: dict, prompt: str) -> dict:
    row = {**(literal(row.get("metadata")) or {}), **row}       # the official file has task and skills there
    choices = literal(row.get("choices"))
    question, gold = text_of(row, "query", "question"), text_of(row, "answer").strip()
    asked = re.search(r"with (one|two) decimal", question)
    decimals = {"one": 1, "two": 2}[asked[1]] if asked else len(gold.partition(".")[2])
    decimals = int(float(row.get("precision") or 0)) or decimals
    if gold in choices:                                         # the column holds the option's text
        gold = LETTERS[choices.index(gold)]
    if choices:
        gold = text_of(row, "answer_option").strip() or gold
    return {"question": ASK.sub("", question) if prompt == "own" else question, "choices": choices,
            "golds": [gold], "answer_type": text_of(row, "answer_type"), "precision": decimals,
            "groups": {"task": text_of(row, "task"), "skill": literal(row.get("skills"))}}


def mathverse(row: dict, prompt: str) -> dict:
    version, question = text_of(row, "problem_version"), text_of(row, "question")
    choose = row.get("question_type") == "multi-choice"
    own = ASK.sub("", question)
    if version == "Vision Only":                                # the question is in the image
        own = "Answer the question that the image shows." + (" Give the option letter." if choose else "")
    wordings = {"own": own, "direct": text_of(row, "query_wo", "question"),
                "cot": text_of(row, "query_cot", "question")}
    gold, choices = text_of(row, "answer").strip(), []
    letter = re.fullmatch(r"\(?([A-Z])\)?", gold)
    if choose and letter:
        gold = letter[1]
        choices = options_in(text_of(row, "question_for_eval")) or options_in(question) or [""] * 5
    return {"question": wordings[prompt], "choices": choices, "golds": [gold.replace("\n", ",")],
            "groups": {"version": version, "subject": text_of(literal(row.get("metadata")) or {}, "subject")}}


def mathvision(row: dict, prompt: str) -> dict:
    choices = literal(row.get("choices")) or literal(row.get("options"))
    question = IMAGE_TAG.sub(r"[image \1]", text_of(row, "question"))       # one image holds them all
    drawn = "".join(choices) == LETTERS[:len(choices)]                      # the options are in the image
    shown = [] if drawn or options_in(question) else choices
    lines = "".join(f"({letter}) {choice}\n" for letter, choice in zip(LETTERS, shown))
    wordings = {"own": question + option_lines(shown), "cot": f"{BOX}{question}\n{lines}",
                "direct": f"{question}\n{lines}\nAnswer the question using a single word or phrase."}
    gold = text_of(row, "answer").replace("\x0c", "\\f").strip()            # "\frac" read as an escape
    return {"question": wordings[prompt], "choices": choices, "golds": [gold],
            "groups": {"subject": text_of(row, "category", "subject"), "level": text_of(row, "level")}}


def mmmu(row: dict, prompt: str, ending="Please select the correct answer from the options above. \n"):
    choices, hint, question = lettered(row), text_of(row, "hint"), text_of(row, "question")
    if prompt == "own":
        question = (f"{hint}\n" if hint else "") + question + option_lines(choices)
    else:
        question = (f"Hint: {hint}\n" if hint else "") + f"Question: {question}\n"
        if choices:
            question += f"Options:{option_lines(choices)}\n{ending}"
    groups = {"category": text_of(row, "category", "subject"), "l2-category": text_of(row, "l2-category")}
    golds = literal(row.get("answer")) or [text_of(row, "answer").strip()]
    return {"question": question, "choices": choices, "golds": golds, "groups": groups}


def mmmu_pro(row: dict, prompt: str) -> dict:
    ending = f"Answer the following multiple-choice question. {LAST_LINE}"
    return mmmu(row, prompt, ending if prompt == "cot" else LETTER_ONLY)


def mmmu_pro_vision(row: dict, prompt: str) -> dict:
    ending = {"own": "", "direct": LETTER_ONLY, "cot": LAST_LINE}[prompt]
    question = f"Answer the following multiple-choice question in the image. {ending}"
    return {**mmmu(row, prompt), "question": question}


def mmstar(row: dict, prompt: str) -> dict:
    made = mmmu(row, prompt)
    if not made["choices"]:                                     # the official file: options in the question
        made["choices"] = options_in(text_of(row, "question")) or [""] * 4
        made["question"] = ASK.sub("", made["question"])
    return made


BUILDERS = {"MathVista": mathvista, "MathVerse": mathverse, "MathVision": mathvision, "MMStar": mmstar,
            "MMMUProV": mmmu_pro_vision, "MMMUPro": mmmu_pro, "MMMU": mmmu}         # longer names first


def borrow_options(versions: list[tuple]):
    """MathVerse: option texts that only another version of a problem has. versions: (its index, bench)."""
    known = {index: bench["choices"] for index, bench in versions if any(bench["choices"])}
    for index, bench in versions:
        if index and bench["choices"] and not any(bench["choices"]):
            bench["choices"] = known.get(index, bench["choices"])


# ---- convert
def images_of(row: dict, by_index: dict) -> list:
    """The images of a row, bytes or file names. `image_path` counts where there is no column `image`."""
    cell = row["image"] if "image" in row else row.get("image_path")
    if isinstance(cell, str) and 0 < len(cell) <= 64 and cell in by_index:      # another row's image
        cell = by_index[cell].get("image")
    cells = literal(cell) or ([cell] if cell else [])
    if cells and isinstance(cells[0], str) and len(cells[0]) <= 255 and "." in cells[0]:
        return cells
    return [base64.b64decode(cell) for cell in cells]


def make_row(row: dict, images: list, where: str, benchmark: str, prompt: str) -> dict:
    """Our row; its images are bytes or file names."""
    made = BUILDERS[benchmark](row, prompt)
    question = made.pop("question").replace("<image>", "< image>")
    places = IMAGE_TAG.findall(question) if benchmark.startswith("MMMU") else []
    for place in places:
        if not 1 <= int(place) <= len(images):
            raise ValueError(f"field 'question': <image {place}>, but {len(images)} images")
    if places:                                                  # where and in which order images go
        question, images = IMAGE_TAG.sub("<image>", question), [images[int(place) - 1] for place in places]
    else:
        question = "<image>" * len(images) + question
    choices, gold = made["choices"], made["golds"][0]
    task, bench = next(iter(made["groups"].values())), {"name": benchmark, "prompt": prompt, **made}
    ours = {"id": text_of(row, *IDS) or where, "images": images, "problem": question, "answer": gold,
            "task": task, "benchmark": bench}
    if choices and reward.answers_match(gold, gold, choices):
        ours["choices"] = choices
    return ours


def convert(file: Path, out: Path, prompt: str = "own", image_dir: str = "") -> str:
    """Read and check a whole file, then write OUT/problems.jsonl and OUT/images -> what was done. InputError
    has one line for each bad row, the first 20."""
    names = [name for name in BUILDERS if name.lower() in re.sub("[^a-z]", "", file.stem.lower())]
    if not names:
        raise InputError(f"{file}: which benchmark is it? The name must hold one of {', '.join(BUILDERS)}")
    rows, benchmark, folder = read_table(file), names[0], Path(image_dir or file.parent)
    by_index, made, ids, errors = {text_of(row, "index"): row for _, row in rows}, [], {}, []
    for where, row in rows:
        try:
            images = images_of(row, by_index)
            no_image = file.suffix == ".tsv" and not images
            if no_image or (benchmark == "MMMU" and text_of(row, "split", "id").startswith("dev")):
                continue
            ours = make_row(row, images, where, benchmark, prompt)
            if rollout.parse_row(ours, where, folder).question != ours["problem"]:
                ours.pop("choices", None)       # it would spell out options that only the image shows
            problem = rollout.parse_row(ours, where, folder)
            made.append((row, ours, problem))
            for image in problem.images:
                with reading(where):
                    rollout.open_image(image)
            if ids.setdefault(ours["id"], where) != where:
                raise InputError(f"{where}: the id {ours['id']} is taken by {ids[ours['id']]}")
        except Exception as e:                  # whatever a row may hold; and Pillow raises many kinds
            errors.append(str(e) if isinstance(e, InputError) else f"{where}: not a row of {benchmark}: {e}")
    if errors or not made:
        raise InputError("\n".join(errors[:20] or [f"{file}: no row is left"]))
    borrow_options([(row.get("problem_index"), ours["benchmark"]) for row, ours, _ in made])
    (out / "images").mkdir(parents=True, exist_ok=True)
    with open(out / "problems.jsonl", "w", encoding="utf-8") as target:
        for _, ours, problem in made:
            ours["images"] = []
            for image in problem.images:
                data = image if isinstance(image, bytes) else image.read_bytes()
                suffix = Image.open(io.BytesIO(data)).format.lower()
                name = f"images/{hashlib.sha256(data).hexdigest()[:16]}.{suffix}"   # rows may share an image
                (out / name).write_bytes(data)
                ours["images"].append(name)
            target.write(json.dumps(ours) + "\n")
    return f"{target.name}: {benchmark}, prompt {prompt}, {len(made)} questions of {len(rows)} rows"


# ---- score and export
def read_results(rows: Path, data: Path) -> tuple[dict, list[dict]]:
    """({id: `benchmark` field} of a converted file, the rows that eval.py --out wrote for it)."""
    benches, found = {}, []
    for where, row in read_table(data):
        bench = row.get("benchmark")
        if not isinstance(bench, dict) or not {"name", "prompt", "choices", "golds", "groups"} <= set(bench):
            raise InputError(f"{where}: field 'benchmark' is missing or not as `convert` writes it")
        benches[str(row.get("id"))] = bench
    for where, row in read_table(rows):
        if not isinstance(row.get("completion"), str) or row.get("mode") not in ("greedy", "sample"):
            raise InputError(f"{where}: fields 'completion' and 'mode' (greedy or sample) are needed")
        if str(row.get("id")) not in benches:
            raise InputError(f"{where}: field 'id': {row.get('id')!r} is no question of {data}")
        found.append({**row, "id": str(row["id"])})
    sizes = Counter((row["mode"], row["id"]) for row in found)
    if len({(mode, size) for (mode, _), size in sizes.items()}) > len({mode for mode, _ in sizes}):
        raise InputError(f"{rows}: some questions have more completions than others: has eval.py finished?")
    return benches, found


def number(text: str):
    r"""The value of an answer without variables ("\frac{3}{4}" is 3/4), or None."""
    text = reward.normalise(text) if len(text) <= reward.MAX_LENGTH else ""
    found = reward.value_of(text, 0) if reward.is_small(text) else None
    return found[0] if found and not found[1] else None


def same_rounded(text: str, gold: str, digits: int) -> bool:
    a, b = number(text), number(gold)
    return None not in (a, b) and round(float(a), digits) == round(float(b), digits)


def grade(bench: dict, completion: str) -> tuple[str | None, bool]:
    """(the answer found or None, whether it is right). MathVista's floats are compared at the precision asked
    for; MMMU's open answers may also agree to two decimals."""
    choices, golds = bench["choices"] or None, bench["golds"]
    found = reward.extract_answer(completion, choices)
    if not found:
        return None, False
    right = any(reward.answers_match(found, gold, choices) for gold in golds)
    if not choices and bench["name"] == "MMMU":
        right = right or any(same_rounded(found, gold, 2) for gold in golds)
    elif not choices and bench.get("answer_type") == "float" and bench["precision"]:
        right = same_rounded(found, golds[0], bench["precision"])
    return found, right


def score(rows: Path, data: Path) -> str:
    """The table people read: all questions, then by group, with intervals."""
    benches, records = read_results(rows, data)
    for record in records:
        bench = benches[record["id"]]
        with reading(f"{data}: field 'benchmark' of {record['id']!r}"):
            record["extracted"], record["correct"] = grade(bench, record["completion"])
        record["format"] = bool(record.get("finished")) and reward.format_ok(record["completion"])
        record["groups"] = bench["groups"]
    title = f"{bench['name']}, prompt {bench['prompt']}, {len(benches)} questions in the file"
    with reading(f"{data}: field 'benchmark'"):
        return f"{rollout.escaped(title)}\n\n{evaluation.report(records)}"


def export(rows: Path, data: Path, tsv: Path, out: Path) -> str:
    """Write the answered rows of a .tsv, without images, with what the greedy completion (else the first
    sample) says -> what was done."""
    benches, completions = read_results(rows, data)
    predictions = {}
    for row in completions:
        if row["mode"] == "greedy" or row["id"] not in predictions:
            rest, declared = reward.declared_answer(row["completion"])
            said = rest if declared is None else declared
            predictions[row["id"]] = said.replace("\0", "").strip()[-20000:]    # .xlsx cells hold 32,767
    answered = [row for _, row in read_table(tsv) if text_of(row, *IDS) in predictions]
    if len(answered) != len(predictions):
        raise InputError(f"--tsv {tsv}: {len(answered)} rows for {len(predictions)} predictions")
    if out.suffix != ".tsv" or out.resolve() == tsv.resolve():
        raise InputError(f"--out {out}: must be another .tsv file")
    for row in answered:
        row.pop("image", None)
        row["prediction"] = predictions[text_of(row, *IDS)]
    with open(out, "w", encoding="utf-8", errors="replace", newline="") as file:
        writer = csv.DictWriter(file, answered[0], delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writeheader()
        writer.writerows(answered)
    return f"{out}: {len(answered)} of {len(benches)} questions"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("convert")
    command.add_argument("file", type=Path)
    command.add_argument("--out", type=Path, required=True, help="folder")
    command.add_argument("--prompt", choices=("own", "direct", "cot"), default="own", help="the wording")
    command.add_argument("--image_dir", default="", help="folder that holds the images (the file's own)")
    for name in ("score", "export"):
        command = commands.add_parser(name)
        command.add_argument("rows", type=Path, help="what eval.py --out wrote")
        command.add_argument("--data", type=Path, required=True, help="the problems.jsonl")
    command.add_argument("--tsv", type=Path, required=True, help="the file that was converted")
    command.add_argument("--out", type=Path, required=True, help="MODEL_DATASET.tsv")
    flags = vars(parser.parse_args(argv))
    try:
        print({"convert": convert, "score": score, "export": export}[flags.pop("command")](**flags))
    except (ValueError, OSError) as e:
        sys.exit(f"error: {rollout.escaped(e, chr(10))}")


if __name__ == "__main__":
    main()

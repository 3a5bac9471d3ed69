"""`train.py --check`: a data file read from end to end before anything is trained on it.

Place in the pipeline: before it. Every row is read, every image decoded, every prompt and demonstration
tokenised.
"""
import sys

import rollout
from data.codec import load_codec
from data.reading import DataError, check_problems, read_problems


def demonstration_ids(problem, codec, max_new_tokens: int) -> list:
    """A problem's demonstration as completion tokens, EOS included. DataError where it is missing, or too
    long (cut, it would teach to stop midway)."""
    where = f"{problem.where or problem.id}: field 'demonstration'"
    if not isinstance(problem.demonstration, str):
        raise DataError(f"{where} is missing or not text, --stage sft needs it")
    ids = rollout.token_ids(problem.demonstration, codec) + [codec.eos_ids[0]]
    if len(ids) > max_new_tokens:
        raise DataError(f"{where} has {len(ids)} tokens, --max_new_tokens is {max_new_tokens}")
    return ids


def check_data(config) -> tuple[str, list[str]]:
    """--check: (what a data file holds, one line a bad row)."""
    problems, errors = read_problems(config.data, config.image_dir, config.instruction, config.outside_images)
    codec = load_codec(config.model, config.max_pixels)

    def measure(p):
        prompt = rollout.encode_prompt(p, codec, config.max_prompt_tokens, pixels=False)
        shown = isinstance(p.demonstration, str) or config.stage == "sft"
        limit = config.max_new_tokens if config.stage == "sft" else sys.maxsize
        tokens = len(demonstration_ids(p, codec, limit)) if shown else 0
        return (len(prompt.ids), prompt.ids.count(codec.image_token_id), len(prompt.grids), tokens,
                len(p.choices or []))

    rows, bad = check_problems(problems, measure)
    names = ("prompt tokens", "of these image tokens", "images", "demonstration tokens", "options")
    lines = [f"{config.data}: {len(rows)} good rows, {len(errors + bad)} bad ones",
             f"| {'a row':21} | least | median | 95 % | most |", "|---" * 5 + "|"]
    for name, values in zip(names, map(sorted, zip(*rows))):
        cells = [values[round(q * (len(values) - 1))] for q in (0, 0.5, 0.95, 1)]
        lines.append(f"| {name:21} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines), errors + bad

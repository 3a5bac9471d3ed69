"""Problems by the name of their data: a JSONL file, or a spec of the embedded tasks such as "tiny:steps=5".

Place in the pipeline: before it; train.py and eval.py ask here.
"""
import random
from dataclasses import replace

import rollout
from data.checking import demonstration_ids
from data.reading import Problem, is_tiny, load_problems
from tiny.shapes import Stream, demonstrate


def load_data(data: str, split: str, count: int = 0, image_dir: str = "", instruction: str = "",
              outside: bool = False) -> list[Problem]:
    """The first `count` problems of a file (0 = all), or of a tiny spec (0 = 256)."""
    if is_tiny(data):
        stream = Stream(data, split)
        return [stream[i] for i in range(count or 256)]
    return load_problems(data, image_dir, instruction, outside)[:count or None]


def training_data(c, codec) -> tuple:
    """Training data (a Stream or a list) and held-out problems of a TrainConfig, checked before anything is
    computed."""
    if is_tiny(c.data):
        data = Stream(c.data, "train", c.seed, run=c.batch)
    else:
        data = load_problems(c.data, c.image_dir, c.instruction, c.outside_images)
    name = c.eval_data or (c.data if is_tiny(c.data) else "")
    held_out = []
    if name and c.eval_problems:
        held_out = load_data(name, "heldout", c.eval_problems, c.image_dir, c.instruction, c.outside_images)
    first = data if isinstance(data, list) else [data[0]]
    for p in first + held_out:
        rollout.encode_prompt(p, codec, c.max_prompt_tokens, pixels=False)
    for p in first if c.stage == "sft" else ():
        demonstration(p, c, codec)
    return data, held_out


def demonstration(problem: Problem, c, codec) -> list:
    """A problem's demonstration as completion tokens; on tiny it is made here, eroded or not."""
    if is_tiny(c.data):
        rng = random.Random(f"erosion/{c.seed}/{problem.id}")
        text = demonstrate(problem, (c.erosion_first, c.erosion_ninth), rng)
        problem = replace(problem, demonstration=text)
    return demonstration_ids(problem, codec, c.max_new_tokens)

"""Files: checkpoints on disk and on the hub; whole or not there, written beside and renamed, with checksums.

Place in the pipeline: under everything that writes. Ours.
"""
import contextlib
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file


COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
              "special_tokens_map.json", "added_tokens.json", "chat_template.json", "chat_template.jinja",
              "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
              "generation_config.json", "config.json")


def resolve(path_or_id: str) -> Path:
    """A local folder as it is; otherwise a hub id, fetched with huggingface_hub. FileNotFoundError where
    neither."""
    path = Path(path_or_id)
    if path.is_dir():
        return path
    if path_or_id.count("/") != 1 or path_or_id.startswith((".", "/")):
        raise FileNotFoundError(f"--model {path_or_id}: no such folder, "
                                "and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    return Path(snapshot_download(path_or_id,
                                  allow_patterns=["*.safetensors", "*.safetensors.index.json", *COMPANIONS]))


def read_json(path: Path) -> dict:
    """A JSON object from a file; ValueError names the file (and the line, where it is not JSON)."""
    if not path.is_file():
        raise ValueError(f"{path}: file is missing")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: not JSON: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected")
    return value


def rewrite(file: Path, text: str):
    """Give a file this content, or leave it as it was: written beside, flushed, renamed."""
    part = file.with_name(file.name + ".new")
    with open(part, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    part.replace(file)


def checksum(file: Path, flush: bool = False) -> str:
    """SHA-256 of a file; `flush`: and it is on the disk afterwards, not only in memory."""
    digest = hashlib.sha256()
    with open(file, "rb+" if flush else "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
        if flush:
            os.fsync(f.fileno())
    return digest.hexdigest()


def rows_of(file: Path) -> list[dict]:
    """The rows of a JSONL file of ours, without one that was cut off when its writer was killed; [] where
    there is no file."""
    rows = []
    for line in file.read_text(encoding="utf-8").split("\n") if file.is_file() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint: a missing, cut or changed file; "" for nothing."""
    try:
        sums = json.loads((checkpoint / "trainer.json").read_text())["sha256"]
    except (OSError, ValueError, KeyError) as e:
        return f"trainer.json is not readable ({e})"
    for name, wanted in sums.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if checksum(checkpoint / name) != wanted:
            return f"{name} is damaged: its checksum is another"
    return ""


def intact(checkpoints: list[Path]) -> Path:
    """The last checkpoint without damage; the later ones are named. ValueError where there is none."""
    for checkpoint in reversed(checkpoints):
        if not (problem := damage(checkpoint)):
            return checkpoint
        print(f"warning: {checkpoint}: {problem}", file=sys.stderr)
    raise ValueError(f"--resume: no whole checkpoint among {', '.join(c.name for c in checkpoints)}")


def write_checkpoint(out: Path, step: int, keep: int, ranks, state: dict, tensors: dict, write_model):
    """out/checkpoint-<step>: the model (write_model(folder), by rank 0), each rank's `tensors` as
    optimizer-*.safetensors, and trainer.json with `state` and a checksum of every file. Written beside,
    flushed to disk, then renamed, so that a checkpoint is whole or not there; the oldest beyond `keep` are
    removed. OSError where the disk is full: what was saved before is untouched. (All ranks write to one file
    system.)"""
    target, part = out / f"checkpoint-{step:06d}", out / "unfinished-checkpoint"
    try:
        if ranks.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            write_model(part)
        ranks.gather([])                                        # the folder is there
        name = f"optimizer-{ranks.rank + 1:05d}-of-{ranks.world:05d}.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, part / name)
        ranks.gather([])                                        # all have written
        if ranks.rank:
            return
        sums = {f.name: checksum(f, flush=True) for f in sorted(part.iterdir())}
        (part / "trainer.json").write_text(json.dumps({**state, "sha256": sums}))
        checksum(part / "trainer.json", flush=True)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"{target}: the checkpoint could not be written: {e}") from None
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    others = [c for c in sorted(out.glob("checkpoint-*")) if c != target]
    for old in others[:max(0, len(others) - keep + 1)]:
        shutil.rmtree(old)

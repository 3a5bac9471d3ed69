"""Results on disk: FILE, while it grows one FILE.part<rank> a rank, and FILE.config.json.

Place in the pipeline: under eval.py, which writes rows as they come and reads back what a stopped run left.
"""
import hashlib
import json
import re
from pathlib import Path

from runtime.files import checksum, resolve, rows_of


def settings_of(config) -> dict:
    """What the completions depend on: rows of other settings must not be mixed with them."""
    files = sorted(resolve(config.model).glob("*.safetensors"))
    stamps = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    names = ("model", "data", "bench", "prompt", "image_dir", "instruction", "samples", "max_new_tokens",
             "max_pixels", "seed", "dtype")
    file = Path(config.bench or config.data)
    return {**{n: getattr(config, n) for n in names}, "file": checksum(file)[:16] if file.is_file() else "",
            "weights": hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]}


def rows_on_disk(out: Path) -> dict:
    """All rows of an evaluation, finished or not, by (id, mode, sample)."""
    return {(r["id"], r["mode"], r["sample"]): r for file in (out, *parts_of(out)) for r in rows_of(file)}


def parts_of(out: Path) -> list[Path]:
    """The files that ranks write while an evaluation runs."""
    return sorted(f for f in out.parent.iterdir() if re.fullmatch(re.escape(out.name) + r"\.part\d+", f.name))


def usable_rows(out: Path, settings: dict, problems: list, config, judge) -> list[dict]:
    """The records an evaluation need not make again, judged anew by judge(problem, completion, finished,
    rules): the rules may be others. ValueError where the file holds those of other settings."""
    saved = Path(f"{out}.config.json")
    if not saved.is_file():
        if out.exists() and out.stat().st_size:
            raise ValueError(f"--out {out}: is there already, and was not written by an evaluation")
        return []
    found, before = rows_on_disk(out), json.loads(saved.read_text())
    if found and (other := [n for n in settings if before.get(n) != settings[n]]):
        raise ValueError(f"--out {out}: holds rows made with other settings ({', '.join(other)}); "
                         "choose another file, or delete it")
    by_id, need = {p.id: p for p in problems}, {"greedy": int(config.greedy), "sample": config.samples}
    whole = {(i, mode) for i, mode, _ in found if i in by_id and need[mode]
             and all((i, mode, k) in found for k in range(need[mode]))}
    return [{**r, **judge(by_id[i], r["completion"], r["finished"], config.rules)}
            for (i, mode, _), r in found.items() if (i, mode) in whole]

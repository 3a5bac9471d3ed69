"""The model card: README.md in each checkpoint, what the weights are and where they come from.

Place in the pipeline: beside it; train.py writes one with each checkpoint.
"""
import dataclasses
from pathlib import Path

from runtime.files import rows_of

HEAD = """---
library_name: transformers
pipeline_tag: image-text-to-text
base_model: {model}
tags: [{tags}]
---

# {name}, step {step}

Made from `{model}` by {how} on `{data}`. Opens with transformers (`from_pretrained` of
`Qwen2_5_VLForConditionalGeneration` and `AutoProcessor` on this folder); the files are those vLLM looks for.
"""
LOCAL = ("model", "data", "eval_data", "image_dir", "out", "resume", "check", "explain", "report_to",
         "device")                      # settings that say nothing to others


def card(config, step: int) -> str:
    """Markdown: base model, data, held-out figures, provenance of the trajectories trained on, all settings.
    config: a TrainConfig; its run folder's metrics.jsonl holds the figures."""
    rows = [r for r in rows_of(Path(config.out) / "metrics.jsonl") if r["step"] <= step]
    how = "supervised imitation" if config.stage == "sft" else f"reinforcement learning ({config.algo})"
    tags = ["ivr-r1", config.stage] + [config.algo] * (config.stage == "rl")
    base = Path(config.model).name if Path(config.model).is_dir() else config.model
    text = HEAD.format(model=base, tags=", ".join(tags), step=step, how=how, data=Path(config.data).name,
                       name=Path(config.out).resolve().name)
    if rows and config.stage == "rl":
        total = lambda key: sum(r.get(key, 0) for r in rows)
        seen = len(rows) * config.batch * config.group_size
        text += ("\n## Trajectories\n\n| of | number |\n|---|---|\n"
                 f"| the policy's own rollouts | {seen - total('repaired'):,} |\n"
                 f"| rectified in the Re-Reasoning Loop, verified by the reward | {total('repaired'):,} of "
                 f"{total('parents'):,} tried |\n"
                 f"| generated tokens, everything counted | {rows[-1]['generated_tokens']:,} |\n")
        text += ("\n## Training figures, first and last step\n\n| figure | first | last |\n|---|---|---|\n"
                 + "".join(f"| {name} | {rows[0][name]:.3f} | {rows[-1][name]:.3f} |\n"
                           for name in ("reward", "accuracy", "format", "length")))
    held = [(r["step"], r["heldout"]) for r in rows if "heldout" in r]
    if held:
        text += "\n## Held-out accuracy along the run\n\n" + "".join(
            f"- step {n}: " + ", ".join(f"{k} {100 * v['mean']:.1f} %" for k, v in found.items()
                                        if isinstance(v, dict) and "mean" in v) + "\n" for n, found in held)
    settings = {n: v for n, v in dataclasses.asdict(config).items() if v != "" and n not in LOCAL}
    return text + "\n## Settings\n\n" + "".join(f"- {name}: `{value}`\n" for name, value in settings.items())

"""Figures of a run for TensorBoard and Weights & Biases, where they are installed and asked for.

Place in the pipeline: beside it; viewer/log.py hands over each step's figures. Names are those that users of
TRL know.

Worked example: {"step": 3, "accuracy": 0.5, "lr": 3e-5} is written at step 3 as train/rewards/accuracy/mean
0.5 and train/learning_rate 3e-5.
"""
import dataclasses
import hashlib
from importlib.util import find_spec
from pathlib import Path

REPORTS = ("none", "tensorboard", "wandb")
NAMES = {"accuracy": "rewards/accuracy/mean", "format": "rewards/format/mean", "reward": "reward",
         "length": "completions/mean_length", "generated_tokens": "num_tokens", "lr": "learning_rate",
         "clip_fraction": "clip_ratio/region_mean", "kl_ref": "kl", "kl_old": "approx_kl",
         "seconds": "step_time"}


def scalars(m: dict) -> dict:
    """A step's figures as flat names and numbers."""
    out = {f"train/{NAMES.get(k, k)}": v for k, v in m.items()
           if isinstance(v, (int, float)) and not isinstance(v, bool) and k != "step"}
    if "mixed" in m:
        out["train/frac_reward_zero_std"] = 1 - m["mixed"]
    out.update({f"train/repaired_by_looks/{n}": v for n, v in enumerate(m.get("repaired_by_looks", []))})
    out.update({f"eval/{k}": v["mean"] for k, v in m.get("heldout", {}).items() if isinstance(v, dict)})
    return out


def check_report(report_to: str):
    """ValueError where a service is unknown or not installed."""
    for name in report_to.split("+"):
        if name not in REPORTS:
            raise ValueError(f"--report_to {report_to}: must be of {', '.join(REPORTS)}, joined by +")
        if name != "none" and find_spec(name) is None:
            raise ValueError(f"--report_to {name}: needs one more package: pip install {name}")


class Report:
    """Writes each step's figures to the services named in `config.report_to`, from behind `step` on."""

    def __init__(self, config, step: int):
        names, out, self.board, self.wandb = config.report_to.split("+"), Path(config.out), None, None
        if "tensorboard" in names:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        if "wandb" in names:
            import wandb
            name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]     # one a run folder
            self.wandb = wandb.init(project="ivr-r1", name=out.resolve().name, id=name, dir=str(out),
                                    resume="allow", config=dataclasses.asdict(config))

    def write(self, m: dict):
        if self.board:
            for name, value in scalars(m).items():
                self.board.add_scalar(name, value, m["step"])
            self.board.flush()
        if self.wandb:
            self.wandb.log(scalars(m), step=m["step"])

    def close(self):
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()

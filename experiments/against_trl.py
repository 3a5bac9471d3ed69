"""A training step against that of TRL's `GRPOTrainer`: the same tiny vision-language model, problems,
rewards, group size and length limit, plain GRPO on both sides.

    pip install trl==1.16.0
    python experiments/against_trl.py                   # both by turns, a process each; some minutes on CPU
    python experiments/against_trl.py --side ours --profile     # where a step's time goes

Seconds a step are the median of those after two warm-up steps; memory is the peak of a step above what the
process held before the first (model and libraries in memory). Both run without activation checkpointing,
with a whole step in one forward-backward pass, in float32. Needs Linux's /proc.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import reward  # noqa: E402
import train  # noqa: E402
from runtime.flags import parse_flags  # noqa: E402
from tiny import shapes  # noqa: E402

SPEC = "tiny:steps=9"
PROMPTS, GROUP, LENGTH, STEPS = 16, 8, 64, 8


def resident(field: str) -> float:
    """VmRSS or VmHWM (its peak) of this process, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1e3
    raise ValueError(f"/proc/self/status has no {field}")


class Watch:
    """Seconds of each step, and memory from the first on."""

    def __init__(self):
        self.marks = []

    def mark(self):
        if not self.marks:
            self.before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")               # the peak starts anew
        self.marks.append(time.perf_counter())

    def found(self) -> dict:
        spent = [b - a for a, b in zip(self.marks, self.marks[1:])][2:]
        return {"seconds": statistics.median(spent), "megabytes": resident("VmHWM") - self.before,
                "process": resident("VmHWM")}


def ours(profile: bool) -> dict:
    """Steps of train.py, nothing beside them."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = train.Trainer(parse_flags(train.TrainConfig, [
            "--algo", "grpo", "--data", SPEC, "--batch", str(PROMPTS), "--group_size", str(GROUP),
            "--max_new_tokens", str(LENGTH), "--eval_problems", "0", "--device", "cpu", "--out", folder]))
        for step in range(STEPS):
            watch.mark()
            if profile and step == STEPS - 1:
                with torch.profiler.profile() as tool:
                    trainer.rl_step()
                rows = tool.key_averages()
                print(rows.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))
                total = sum(r.self_cpu_time_total for r in rows)
                floor = sum(r.self_cpu_time_total for r in rows
                            if r.key in ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise"))
                print(f"matrix products: {floor / total:.0%} of the time within torch's operations")
            else:
                trainer.rl_step()
            trainer.step += 1
        watch.mark()
    return watch.found()


def theirs() -> dict:
    """Steps of GRPOTrainer."""
    from datasets import Dataset
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, TrainerCallback
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.processing_utils import ProcessorMixin
    from trl import GRPOConfig, GRPOTrainer

    class Processor(Qwen2_5_VLProcessor):
        """Without videos, for which torchvision would be needed."""
        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

        def __init__(self, image_processor, tokenizer, chat_template=None):
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(self.image_token), -1
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    stream, watch = shapes.Stream(SPEC, "train", 0), Watch()
    problems = [stream[n] for n in range(PROMPTS * STEPS)]
    rows = Dataset.from_dict({
        "prompt": [[{"role": "user", "content": p.question.replace("<image>", "")}] for p in problems],
        "image": [p.images[0] for p in problems], "gold": [p.answer for p in problems]})

    def score(completions, gold, **_):
        return [reward.reward_parts(c[0]["content"], g)["total"] for c, g in zip(completions, gold)]

    class Marks(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            watch.mark()

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny", padding_side="left")
    processor = Processor(Qwen2VLImageProcessorPil.from_pretrained(ROOT / "tiny"), tokenizer,
                          chat_template=tokenizer.chat_template)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP,
            max_completion_length=LENGTH, max_steps=STEPS, learning_rate=3e-5, beta=0.0, temperature=1.0,
            loss_type="dr_grpo", scale_rewards="none", use_cpu=True, bf16=False, report_to="none",
            gradient_checkpointing=False, save_strategy="no", logging_strategy="no", disable_tqdm=True)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(ROOT / "tiny", dtype=torch.float32)
        trainer = GRPOTrainer(model, reward_funcs=score, args=config, train_dataset=rows,
                              processing_class=processor, callbacks=[Marks()])
        trainer.train()
    watch.mark()
    return watch.found()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=("ours", "trl"), help="one side alone, in this process")
    parser.add_argument("--profile", action="store_true", help="with --side ours: torch's profile of a step")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side, by turns")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(ours(args.profile) if args.side == "ours" else theirs()))
        return
    found = {"ours": [], "trl": []}
    for _ in tqdm(range(args.rounds)):
        for side, rows in found.items():
            done = subprocess.run([sys.executable, __file__, "--side", side], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    best = {side: {k: min(r[k] for r in rows) for k in rows[0]} for side, rows in found.items()}
    for side, figures in best.items():
        print(f"{side:5} {figures['seconds']:.2f} s a step, {figures['megabytes']:.0f} MB above what was "
              f"held before, {figures['process']:.0f} MB in all")
    for name in ("seconds", "megabytes", "process"):
        print(f"{name}: trl / ours = {best['trl'][name] / best['ours'][name]:.2f}")
    best["threads"] = torch.get_num_threads()
    (ROOT / "experiments" / "results" / "against_trl.json").write_text(json.dumps(best, indent=1) + "\n")


if __name__ == "__main__":
    main()

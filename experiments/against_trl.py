"""A training step against that of TRL's `GRPOTrainer`: the same tiny vision-language model, problems,
rewards, group size and length limit, plain GRPO on both sides.

    pip install trl==1.16.0
    python experiments/against_trl.py                   # both by turns, a process each; some minutes on CPU
    python experiments/against_trl.py --side ours       # one side alone, in this process

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
import train  # noqa: E402
from reward import reward_parts  # noqa: E402
from tiny import shapes  # noqa: E402

SPEC = "tiny:steps=9"
PROMPTS, GROUP, LENGTH = 16, 8, 64
RESULTS = ROOT / "experiments" / "results" / "against_trl.json"


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
            Path("/proc/self/clear_refs").write_text("5")               # the peak starts again from here
        self.marks.append(time.perf_counter())

    def found(self) -> dict:
        spent = [stop - start for start, stop in zip(self.marks, self.marks[1:])]
        return {"seconds": statistics.median(spent[2:]), "megabytes": resident("VmHWM") - self.before,
                "process": resident("VmHWM")}


def ours(steps: int) -> dict:
    """Steps of train.py, nothing beside them."""
    watch = Watch()
    trainer = train.Trainer(train.TrainConfig(
        algo="grpo", model=str(ROOT / "tiny"), data=SPEC, batch=PROMPTS, group_size=GROUP,
        max_new_tokens=LENGTH, eval_problems=0, device="cpu"))
    for _ in range(steps):
        watch.mark()
        trainer.rl_step()
        trainer.step += 1
    watch.mark()
    return watch.found()


def make_processor():
    """transformers' processor of the tiny model without videos, for which torchvision would be needed."""
    from transformers import AutoTokenizer
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.processing_utils import ProcessorMixin

    class Processor(Qwen2_5_VLProcessor):
        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

        def __init__(self, image_processor, tokenizer, chat_template=None):
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(self.image_token), -1
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny", padding_side="left")
    images = Qwen2VLImageProcessorPil.from_pretrained(ROOT / "tiny")
    return Processor(images, tokenizer, chat_template=tokenizer.chat_template)


def theirs(steps: int) -> dict:
    """Steps of GRPOTrainer."""
    from datasets import Dataset
    from transformers import Qwen2_5_VLForConditionalGeneration, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    stream, watch = shapes.Stream(SPEC, "train", 0), Watch()
    columns = {"prompt": [], "image": [], "gold": []}
    for n in range(PROMPTS * steps):
        question = stream[n].question.replace("<image>", "")
        columns["prompt"].append([{"role": "user", "content": question}])
        columns["image"].append(stream[n].images[0])
        columns["gold"].append(stream[n].answer)

    def score(completions, gold, **_):
        return [reward_parts(c[0]["content"], answer)["total"] for c, answer in zip(completions, gold)]

    class Marks(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            watch.mark()

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP,
            max_completion_length=LENGTH, max_steps=steps, learning_rate=3e-5, beta=0.0, temperature=1.0,
            loss_type="dr_grpo", scale_rewards="none", use_cpu=True, bf16=False, report_to="none",
            gradient_checkpointing=False, save_strategy="no", logging_strategy="no", disable_tqdm=True)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(ROOT / "tiny", dtype=torch.float32)
        trainer = GRPOTrainer(model, reward_funcs=score, args=config, processing_class=make_processor(),
                              train_dataset=Dataset.from_dict(columns), callbacks=[Marks()])
        trainer.train()
    watch.mark()
    return watch.found()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=("ours", "trl"), help="one side alone, in this process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side, by turns")
    parser.add_argument("--steps", type=int, default=8, help="steps of a process, two to warm up included")
    parser.add_argument("--results", default=RESULTS, type=Path, help="JSON file of the figures")
    args = parser.parse_args()
    if args.side:
        return print(json.dumps(ours(args.steps) if args.side == "ours" else theirs(args.steps)))
    best = {"ours": {}, "trl": {}}
    for _ in tqdm(range(args.rounds)):
        for side, figures in best.items():
            command = [sys.executable, __file__, "--side", side, "--steps", str(args.steps)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                figures[name] = min(value, figures.get(name, value))
    for side, figures in best.items():
        print(f"{side:5} {figures['seconds']:.2f} s a step, {figures['megabytes']:.0f} MB above what was "
              f"held before, {figures['process']:.0f} MB in all")
    for name, value in best["trl"].items():
        print(f"{name}: trl / ours = {value / best['ours'][name]:.2f}")
    train.write_text(args.results, json.dumps({**best, "threads": torch.get_num_threads()}, indent=1) + "\n")


if __name__ == "__main__":
    main()

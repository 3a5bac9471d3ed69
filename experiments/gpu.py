"""The CUDA path without a GPU: a pretended cuda device on the CPU, and what a GPU would have to hold and do.

    python experiments/gpu.py           # memory and work at real sizes, and a run of the tiny model: minutes

A guard of a few lines of C++ tells torch that there is a cuda device; its tensors are wrappers here. With
data, each holds a CPU tensor: real runs, in which an operation on tensors of both devices raises, and each
question that would halt the GPU is counted by file and line. With sizes only, floating-point tensors hold
nothing (meta), so a model of 7 B parameters fits: live bytes and their peak, kernels, bytes moved and FLOPs
are counted, and a time is reckoned: the larger of bytes / 2.8 TB/s and FLOPs / 600 T/s, and 2 us a kernel.

Not covered: what the fused attention kernels really take, nccl, fragmentation, real speed. The context and
nccl's buffers, 1 to 2 GiB, come on top. Nothing of it is from the paper. Results: results/gpu.json.
"""
import argparse
import atexit
import collections
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

if "PRETENDED_CUDA" in os.environ:      # the compiled guard has to be there before torch
    GUARD_LIBRARY = ctypes.CDLL(os.environ["PRETENDED_CUDA"])
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results" / "gpu.json"
GIB = 2 ** 30
GUARD = """
#include <c10/core/impl/FakeGuardImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
struct CUDAHooks : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::DeviceIndex deviceCount() const override { return 1; }
  at::DeviceIndex getCurrentDevice() const override { return 0; }
};
using namespace at;
REGISTER_CUDA_HOOKS(CUDAHooks);
static c10::impl::FakeGuardImpl<c10::DeviceType::CUDA> guard;
extern "C" void install() { c10::impl::registerDeviceGuard(c10::DeviceType::CUDA, &guard); }
"""
SYNCS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "unique_dim",
         "unique_consecutive"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
NO_KERNEL = {"detach", "alias", "lift_fresh", "_unsafe_view", "_reshape_alias", "empty", "new_empty",
             "empty_like", "empty_strided", "new_empty_strided"}


# ---- The device

class Mismatch(RuntimeError):
    """An operation on tensors of both devices."""


class Pretended(torch.Tensor):
    """A tensor that says it is on cuda:0; `held` is a CPU tensor, or a meta tensor."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device("cuda:0"))
        made.held = held
        METER.see(held)
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return METER.__torch_dispatch__(func, types, args, kwargs)

    def tolist(self):
        METER.sync("tolist")
        return with_data(self.held).tolist()

    def __repr__(self):
        return f"Pretended({tuple(self.shape)}, {self.dtype})"


def with_data(value):
    """Of a tensor that holds nothing, zeros of its shape; all else as it is."""
    if isinstance(value, torch.Tensor) and value.device.type == "meta":
        return torch.zeros(value.shape, dtype=value.dtype)
    return value


def bare(tensor):
    return tensor.held if isinstance(tensor, Pretended) else tensor


def size_of(tensor) -> int:
    """Bytes that a kernel reads or writes of it: what is expanded counts once."""
    count = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride()):
        count *= length if stride else 1
    return count


class Meter(TorchDispatchMode):
    """Sees every operation: runs it, and counts."""

    def __init__(self):
        super().__init__()
        self.sizes_only, self.live, self.peak, self.known = False, 0, 0, {}
        self.reset()

    def reset(self):
        self.syncs, self.kernels, self.peak = collections.Counter(), 0, self.live
        self.seconds = self.matmul_seconds = 0.0

    def where(self) -> str:
        """The line of ours that is being executed."""
        frame = sys._getframe()
        while frame:
            file = frame.f_code.co_filename
            if file.startswith(str(ROOT)) and file != __file__:
                return f"{Path(file).name}:{frame.f_lineno}"
            frame = frame.f_back
        return "backward"

    def sync(self, what: str):
        self.syncs[f"{self.where()} {what}"] += 1

    def see(self, tensor):
        """A storage counts from its first tensor to its end."""
        storage = tensor.untyped_storage()
        if tensor.device.type == "meta" and storage._cdata not in self.known:
            self.known[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key):
        self.live -= self.known.pop(key, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name.split("::")[1]
        tensors = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, torch.Tensor)]
        ours, others = [], []
        for tensor in tensors:
            (ours if isinstance(tensor, Pretended) else others).append(tensor)
        device = kwargs.get("device")
        if name == "copy_":
            to_cuda = isinstance(args[0], Pretended)
        else:
            to_cuda = torch.device(device).type == "cuda" if device is not None else bool(ours)
        if ours and others and device is None and name != "copy_":
            for tensor in others:
                index = name in INDEXING and isinstance(args[0], Pretended) and not tensor.is_floating_point()
                if tensor.dim() and not index and name != "lift_fresh":
                    shape = tuple(tensor.shape)
                    raise Mismatch(f"{func}: a CPU tensor {shape} among cuda ones, {self.where()}")
        if ours and (name in SYNCS or (not to_cuda and name in ("_to_copy", "copy_"))):
            self.sync(name if to_cuda or name in SYNCS else "to the CPU")
        if ours and name in INDEXING and any(
                isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1]):
            self.sync("bool index")
        if ours and name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.sync(name)
        if name == "_pin_memory":
            return args[0]
        if device is not None and to_cuda:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        if self.sizes_only and (ours or to_cuda):
            return self.run_sizes(func, name, args, kwargs, to_cuda, device is not None)
        return self.run_data(func, args, kwargs, to_cuda)

    def run_data(self, func, args, kwargs, to_cuda):
        """Run it on what the tensors hold."""
        plain, options = tree_map(bare, (args, kwargs))
        out = func(*plain, **options)
        return self.result(func, args, kwargs, out, to_cuda)

    def run_sizes(self, func, name, args, kwargs, to_cuda, has_device):
        """Run it on meta tensors where a floating-point one is involved; whole numbers keep their data."""
        plain, options = tree_map(bare, (args, kwargs))
        tensors = [a for a in tree_flatten((plain, options))[0] if isinstance(a, torch.Tensor)]
        if name == "_local_scalar_dense" and tensors[0].device.type == "meta":
            return 0.01
        if not to_cuda:                                     # something comes back to the CPU
            if name == "copy_":
                return args[0]
            return func(*tree_map(with_data, plain), **options)
        if name in INDEXING:
            plain = plain[0], self.indices(plain[1]), *plain[2:]
        written = [x for x, s in zip(args, func._schema.arguments) if s.alias_info and s.alias_info.is_write]
        any_meta = any(tensor.device.type == "meta" for tensor in tensors)
        if has_device:
            dtype = options.get("dtype") or (tensors[0].dtype if tensors else None)
            if dtype is None:                               # what it would be by itself
                dtype = func(*tree_map(to_meta, plain), **{**options, "device": torch.device("meta")}).dtype
            any_meta = dtype.is_floating_point
            options["device"] = torch.device("meta" if any_meta else "cpu")
            if not any_meta:
                plain = tree_map(with_data, plain)
        elif written and isinstance(written[0], Pretended) and any_meta:
            if written[0].held.device.type == "cpu":        # whole numbers made of floats: left as they are
                return written[0]
        if any_meta:
            plain, options = tree_map(to_meta, (plain, options))
        out = func(*plain, **options)
        if not func.is_view and name not in NO_KERNEL:
            self.count(func, name, plain, options, tensors, out)
        return self.result(func, args, kwargs, out, to_cuda)

    def indices(self, given):
        """Bool indices as what they select: their number decides the shape."""
        found = []
        for index in given:
            if index is not None and index.dtype == torch.bool:
                found += with_data(index).nonzero().unbind(1)
            else:
                found.append(index)
        return found

    def result(self, func, args, kwargs, out, to_cuda):
        """Wrap what is new; what was written to is returned as it was given."""
        if func._schema.is_mutable:
            for value, argument in zip((*args, *kwargs.values()), func._schema.arguments):
                if argument.alias_info and argument.alias_info.is_write and len(func._schema.returns) == 1:
                    return value
            if not func._schema.returns:
                return None

        def wrap(value):
            if not isinstance(value, torch.Tensor) or isinstance(value, Pretended) or not to_cuda:
                return value
            return Pretended(value if value.is_floating_point() else with_data(value))

        return tree_map(wrap, out)

    def count(self, func, name, args, kwargs, tensors, out):
        """One kernel: bytes read and written, FLOPs, seconds."""
        made = [value for value in tree_flatten(out)[0] if isinstance(value, torch.Tensor)]
        moved = sum(map(size_of, tensors + made))
        if name in ("embedding", "index", "index_select"):
            moved = 2 * sum(map(size_of, made))
        elif name in ("copy_", "index_copy_"):
            moved = 2 * size_of(tensors[-1])
        flops = 0
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        self.add(moved, flops, 600e12)

    def add(self, moved: float, flops: float, speed: float):
        seconds = max(moved / 2.8e12, flops / speed)
        self.kernels += 1
        self.seconds += seconds + 2e-6
        self.matmul_seconds += seconds if flops else 0


def to_meta(value):
    return value.to("meta") if isinstance(value, torch.Tensor) else value


METER = Meter()


class Attention(torch.autograd.Function):
    """A fused kernel, by size: no scores in memory. With a mask kernels are slower."""

    @staticmethod
    def forward(ctx, q, k, v, causal, bias):
        ctx.save_for_backward(q, k, v)
        ctx.flops = 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3] / (2 if causal else 1)
        ctx.bias = bias                                     # kept for the backward pass
        METER.add(0, ctx.flops, 200e12 if bias is not None else 500e12)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx, grad):
        METER.add(0, 2.5 * ctx.flops, 120e12 if ctx.bias is not None else 400e12)
        return *map(torch.empty_like, ctx.saved_tensors), None, None


def compile_guard(folder: str) -> str:
    """The library for `pretend`, for the environment variable PRETENDED_CUDA of a process to come."""
    source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
    torch_dir = Path(torch.__file__).parent
    source.write_text(GUARD)
    include = [f"-I{torch_dir}/include", f"-I{torch_dir}/include/torch/csrc/api/include"]
    subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", source, "-o", library, *include,
                    f"-L{torch_dir}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_dir}/lib"], check=True)
    return str(library)


def start_job(name: str, library: str, *more) -> dict:
    """One job in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--job", name, *more], text=True, stdout=subprocess.PIPE,
                          check=True, env={**os.environ, "PRETENDED_CUDA": library})
    return json.loads(done.stdout.splitlines()[-1])


def pretend(sizes_only: bool):
    """From here on this process has a cuda device. It is not for processes that do other things as well."""
    METER.sizes_only = sizes_only
    GUARD_LIBRARY.install()
    # else torch would ask the device something in the end
    atexit.register(lambda: (sys.stdout.flush(), sys.stderr.flush(), os._exit(0)))
    torch.cuda._lazy_init = lambda: None
    torch._C._set_only_lift_cpu_tensors(True)
    torch.cuda.is_available = lambda: True
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(total_memory=80 * GIB)
    plain = F.scaled_dot_product_attention

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if q.device.type != "cuda":
            return plain(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if sizes_only:
            bias = None if attn_mask is None else attn_mask.to(q.dtype)     # as kernels want it: takes memory
            return Attention.apply(q, k, v, is_causal, bias)
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1, output_size=q.shape[1]) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if is_causal:
            attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        return scores.softmax(-1) @ v

    F.scaled_dot_product_attention = attention
    METER.__enter__()


# ---- What is tried

SHARED = {"model_type": "qwen2_5_vl", "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
          "rope_theta": 1e6, "image_token_id": 151655}
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
          "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
SIZES = {"3B": {**SHARED, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
                "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936,
                "tie_word_embeddings": True, "vision_config": VISION},
         "7B": {**SHARED, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
                "vision_config": VISION}}
SIZES["3B in small"] = {**SIZES["3B"], "num_hidden_layers": 4, "vision_config": {**VISION, "depth": 8}}
GRID = (48, 86)                         # patches of the image: 1,032 tokens; the prompt has 1,112
TOKENS = 1024                           # of a row
# name: size, GPUs, rank of LoRA, prompts of an update (8 rows each), the limit in GiB
UPDATES = {"7B, all weights, 8 x 80 GB": ("7B", 8, 0, 1, 66),
           "7B, all weights, 8 x 80 GB, 16 rows": ("7B", 8, 0, 2, 72),
           "3B, all weights, 1 x 80 GB": ("3B", 1, 0, 1, 66),
           "3B, LoRA, 1 x 24 GB": ("3B", 1, 16, 1, 20),
           "7B, LoRA, 1 x 40 GB": ("7B", 1, 16, 1, 34)}
TEST = {"for the test": ("3B in small", 1, 0, 1, 18)}
SAMPLES = {"3B, 8 prompts x 8, 24 GB": ("3B", 20), "7B, 8 prompts x 8": ("7B", 66)}     # size, limit


def parts_of(size: str):
    """A model of this size on the pretended device, and a codec for it."""
    import model as m
    import rollout
    config = m.Config.from_dict(SIZES[size])
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        net = m.Qwen25VL(config)
    torch.set_default_dtype(torch.float32)
    codec = replace(rollout.load_codec(str(ROOT / "tiny")), image_token_id=config.image_token_id,
                    logit_mask=torch.zeros(config.vocab_size))
    return net, codec


def prompt_of(net):
    """A prompt with one image."""
    import rollout
    rows, cols = GRID
    ids = [5] * 40 + [net.config.image_token_id] * (rows * cols // 4) + [6] * 40
    return rollout.Prompt(ids, torch.zeros(rows * cols, 1176), [(1, rows, cols)])


def update(name: str) -> dict:
    """One update at real size: peaks of the backward passes and of the optimiser's step."""
    size, world, lora, prompts, limit = {**UPDATES, **TEST}[name]
    pretend(sizes_only=True)
    net, codec = parts_of(size)
    import model as m
    import rollout
    import train
    config = train.TrainConfig(lora=lora, activation_checkpointing="yes", micro_tokens=8192, lr=1e-6, batch=8,
                               max_new_tokens=TOKENS, device="cuda", reader="policy")
    reckoned = train.memory_needed(net.config, config, world, 2)["in all"]
    net.activation_checkpointing = True
    if lora:
        m.add_lora(net, lora, config.lora_alpha)
    train.all_sum = lambda values: values                   # one rank of `world`, alone
    train.dist.reduce = train.dist.broadcast = lambda *given: None
    torch.Tensor.isfinite = lambda tensor: torch.ones(1, dtype=torch.bool)
    trainer = object.__new__(train.Trainer)
    trainer.config, trainer.model, trainer.codec, trainer.world = config, net, codec, world
    trainer.device, trainer.reference = torch.device("cuda:0"), None
    trainer.optimizer = train.Optimizer(net, config, 0, world)
    for master in trainer.optimizer.masters.values():       # as after a first step
        moments = {name: torch.zeros_like(master.detach()) for name in ("exp_avg", "exp_avg_sq")}
        trainer.optimizer.adamw.state[master] = {"step": torch.ones(()), **moments}
    found, groups, step = {"static": METER.live / GIB}, [], trainer.optimizer.step
    for _ in range(prompts):
        prompt = prompt_of(net)
        groups.append([rollout.Trajectory(None, prompt, [7] * TOKENS, [1] * TOKENS, [-0.5] * TOKENS, True, "",
                                          advantage=0.5) for _ in range(8)])

    def measured_step(lr):
        found.update(backward=METER.peak / GIB, seconds=METER.seconds, kernels=METER.kernels,
                     matmul_share=METER.matmul_seconds / METER.seconds, syncs=sum(METER.syncs.values()))
        METER.reset()
        norm = step(lr)
        found.update(step=METER.peak / GIB, step_syncs=sum(METER.syncs.values()))
        return norm

    trainer.optimizer.step = measured_step
    METER.reset()
    trainer.update(groups, 1e-6)
    return {**found, "peak": max(found["backward"], found["step"]), "limit": limit, "reckoned": reckoned}


def sample(name: str) -> dict:
    """64 rows with room for 1,024 tokens: the peak, and what a decode step is, early on."""
    size, limit = SAMPLES[name]
    pretend(sizes_only=True)
    net, codec = parts_of(size)
    import rollout
    weights, found, steps = METER.live, {}, []
    problems = [rollout.Problem(f"{n}", "q", "a", []) for n in range(8)]
    encoded, next_hidden = [prompt_of(net) for _ in problems], net.next_hidden
    METER.reset()

    def measured(token, position, cache):
        steps.append((METER.kernels, METER.seconds, sum(METER.syncs.values())))
        if len(steps) == 1:
            found["prefill"] = METER.peak / GIB
        return next_hidden(token, position, cache)

    net.next_hidden = measured
    rollout.sample(net.eval(), problems, codec, 8, TOKENS, prompts=encoded, limits=[20] * 8)
    middle, after = steps[10], steps[18]
    return {**found, "weights": weights / GIB, "peak": METER.peak / GIB, "limit": limit,
            "kernels": (after[0] - middle[0]) / 8, "seconds": (after[1] - middle[1]) / 8,
            "weights_read_seconds": weights / 2.8e12, "syncs": (after[2] - middle[2]) / 8}


def run(name: str) -> dict:
    """A step of RL with the tiny model, with data: where the GPU would halt; images encoded."""
    pretend(sizes_only=False)
    import rollout
    import train
    calls, encode, sample_all, decode = collections.Counter(), rollout.encode_prompt, rollout.sample, []

    def counted_encode(problem, codec, *rest, **options):
        calls["encoded"] += options.get("pixels", True)
        return encode(problem, codec, *rest, **options)

    def counted_sample(*args, **options):
        before, steps = METER.syncs.copy(), []
        forward = args[0].next_hidden
        args[0].next_hidden = lambda *given: steps.append(METER.syncs.copy()) or forward(*given)
        groups = sample_all(*args, **options)
        del args[0].next_hidden                             # the class's own again
        within = sum((steps[-1] - steps[0]).values()) if len(steps) > 1 else 0
        decode.append((within, len(steps), sum((METER.syncs - before).values()) - within))
        return groups

    def counted_compute(model, prompts, pad_id):
        calls["computed"] += 0 if torch.is_grad_enabled() else len(prompts)
        return compute(model, prompts, pad_id)

    compute, rollout.compute_prompts = rollout.compute_prompts, counted_compute
    rollout.encode_prompt, rollout.sample, save = counted_encode, counted_sample, train.save_file
    train.save_file = lambda tensors, file: save({name: bare(t) for name, t in tensors.items()}, file)
    with tempfile.TemporaryDirectory() as folder:
        config = train.TrainConfig(model=str(ROOT / "tiny"), out=folder + "/run", max_steps=1, batch=4,
                                   group_size=4, max_new_tokens=90, eval_problems=0, device="cuda",
                                   dtype="float32", data="tiny:steps=6,dialect=short", rectify_below=1.0,
                                   save_every=0)
        trainer = train.Trainer(config)
        calls.clear()
        train.train(trainer)
    within, steps, around = map(sum, zip(*decode))
    return {"encoded a problem and step": calls["encoded"] / 4, "computed": calls["computed"] / 4,
            "samplings": len(decode), "checkpointing": config.activation_checkpointing,
            "max_pixels": config.max_pixels, "cuDNN attention": torch.backends.cuda.cudnn_sdp_enabled(),
            "halts a decode step": within / steps, "other halts a sampling": around / len(decode),
            "halts": METER.syncs.most_common(12)}


def to_cpu_in_the_loop():
    """Sampling asks for the logits on the CPU."""
    import rollout
    plain = rollout.next_token
    rollout.next_token = lambda logits, *rest: plain(logits.cpu().to(logits.device), *rest)


def item_in_the_loop():
    """Sampling asks for a number at each token."""
    import rollout
    plain = rollout.next_token

    def next_token(logits, *rest):
        logits.max().item()
        return plain(logits, *rest)

    rollout.next_token = next_token


def left_on_the_cpu():
    """The forced tokens' mask is not moved to the device."""
    import rollout
    plain = rollout.pad
    rollout.pad = lambda *given, device="cpu", **options: (plain(*given, device=device, **options)[0],
                                                           plain(*given, **options)[1])


def kept_activations():
    """Layers keep what they compute."""
    import model
    model.run_layer = lambda layer, checkpointing, *args: layer(*args)


FAULTS = {"to the CPU": to_cpu_in_the_loop, "a number a token": item_in_the_loop,
          "left on the CPU": left_on_the_cpu, "all kept": kept_activations}
JOBS = {**dict.fromkeys({**UPDATES, **TEST}, update), **dict.fromkeys(SAMPLES, sample),
        "a step of the tiny model": run}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--job", choices=JOBS, help="one of them, in this process; its figures as JSON")
    parser.add_argument("--fault", choices=FAULTS, help="plant this first: the figures should tell")
    parser.add_argument("--results", default=RESULTS, type=Path, help="JSON file of the figures")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    if args.fault:
        FAULTS[args.fault]()
    if args.job:
        try:
            print("\n" + json.dumps(JOBS[args.job](args.job)))
        except Exception:
            traceback.print_exc()
            os._exit(1)                                     # (what atexit does would end it with 0)
        return
    if not shutil.which("g++"):
        sys.exit("error: no g++ here, which the guard is compiled with")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        library = compile_guard(folder)
        for job in [job for job in JOBS if job not in TEST]:
            rows[job] = start_job(job, library)
            print(job, rows[job], flush=True)
    from train import write_text                            # here: a job pretends before it is imported
    figures = {"command": "python experiments/gpu.py", "rows": rows}
    write_text(args.results, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Every test, in file order: python test_all.py [-k WORD]

Each compares a component with a slow, obvious reference: transformers' own model, a for-loop, torch.autograd,
one rank, an uninterrupted run. No network, no GPU.
"""
import argparse
import base64
import collections
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import attribute
import eval as evaluation
import grpo
import model as m
import rereason
import reward
import rollout
import train
from reward import answers_match, extract_answer, format_ok, reward_parts
from tiny import shapes

ROOT = Path(__file__).resolve().parent
TINY = str(ROOT / "tiny")


def raises(kind, text, f, *args, **kwargs):
    """Assert that f(...) raises `kind` with `text` (a string or several) in the message; return it."""
    try:
        f(*args, **kwargs)
    except kind as e:
        for words in [text] if isinstance(text, str) else text:
            assert words in str(e), f"{words!r} is not in {str(e)!r}"
        return str(e)
    raise AssertionError(f"{kind.__name__} expected")


@contextlib.contextmanager
def scratch():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@contextlib.contextmanager
def swapped(holder, name, value):
    """Another value in the place of one, for a while."""
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


def close(a, b, tolerance=1e-4):
    a, b = torch.as_tensor(a, dtype=torch.double), torch.as_tensor(b, dtype=torch.double)
    difference = (a - b).abs().max().item()
    assert difference <= tolerance, f"differ by {difference:.2e}, allowed {tolerance:.0e}"


@functools.lru_cache
def tiny_codec():
    return rollout.load_codec(TINY)


@functools.lru_cache
def tiny_model():
    """The embedded checkpoint, shared by all tests: none may change it."""
    return m.load_model(TINY).eval()


def random_model(seed=0, spread=0.25):
    """The tiny architecture with random weights so large that little is nearly uniform or certain."""
    config = m.Config.from_dict(m.read_json(Path(TINY) / "config.json"))
    return m.init_model(replace(config, initializer_range=spread), seed).eval()


def mixed_problems(count=4, steps=3):
    """Problems with one image, two images and none, so prompts differ in length."""
    problems = []
    for i in range(count):
        problems.append(shapes.make_problem(shapes.KINDS[i % 4], steps + i % 3, "short", "train", 5, i))
    one, two, none = problems[:3]
    problems[1] = replace(two, question="<image> and " + two.question, images=two.images + one.images)
    problems[2] = replace(none, question=none.question.replace("<image>", ""), images=[])
    return problems


# ---- model.py

@functools.lru_cache
def qwen_like_tokenizer():
    """A small vocabulary behind Qwen's own pre-tokenizer: ".\\n\\n", ".</" and "><" become single tokens,
    tags fall into several."""
    tokenizer = Tokenizer(models.BPE())
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for text, _ in STEPS] + [f"The red tile shows 4{end}The" for end in SEAM_ENDS] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(show_progress=False, initial_alphabet=alphabet,
                                                             vocab_size=900))
    for name in "endoftext im_start im_end vision_start vision_end image_pad video_pad".split():
        tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False)])
    tokenizer.add_special_tokens([AddedToken("</>", special=True, normalized=False)])
    return tokenizer


def hub_folder(folder, tied=True, seed=1):
    """A folder laid out like Qwen2.5-VL-3B-Instruct (tied) or 7B (not): bf16 shards with an index, spare rows
    in the embedding, two end tokens, a flat config.json (every third time a nested one), random weights."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.py", "*.safetensors", "__pycache__"))
    qwen_like_tokenizer().save(str(folder / "tokenizer.json"))
    qwen_like_tokenizer().model.save(str(folder))                       # vocab.json and merges.txt
    settings = m.read_json(folder / "tokenizer_config.json")
    template = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + settings["chat_template"]
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    settings |= {"tokenizer_class": "Qwen2Tokenizer", "chat_template": "a template that knows no images"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ids, r, file = qwen_like_tokenizer().get_vocab(), random.Random(seed), folder / "config.json"
    heads, size, v_heads, depth = r.choice([2, 4]), r.choice([16, 32]), r.choice([2, 4]), r.randint(1, 4)
    section = r.choice([[4, 2, 2], [2, 3, 3]] if size == 16 else [[8, 4, 4], [4, 6, 6]])
    config = m.read_json(file) | {
        "vocab_size": len(ids) + 39, "hidden_size": heads * size, "num_attention_heads": heads,
        "num_key_value_heads": r.choice([1, 2, heads]), "num_hidden_layers": r.randint(1, 3),
        "intermediate_size": 96, "rope_theta": r.choice([1e4, 1e6]), "tie_word_embeddings": tied,
        "rope_scaling": {"type": "mrope", "mrope_section": section}, "torch_dtype": "bfloat16",
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    for name in ("image_pad", "video_pad", "vision_start", "vision_end"):
        config[name.removesuffix("_pad") + "_token_id"] = ids[f"<|{name}|>"]
    config["vision_config"] |= {
        "depth": depth, "hidden_size": v_heads * 16, "num_heads": v_heads, "intermediate_size": 48,
        "out_hidden_size": heads * size, "window_size": r.choice([56, 84, 112]),
        "fullatt_block_indexes": r.sample(range(depth), r.randint(0, depth))}
    file.write_text(json.dumps(config))
    torch.manual_seed(seed)
    net = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(folder))
    for p in net.parameters():
        torch.nn.init.normal_(p, *((0, 0.15) if p.dim() > 1 else (0.5, 0.3)))
    net.to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
    if seed % 3:
        file.write_text(json.dumps(config))
    ends = {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


@functools.lru_cache
def qwen_like_codec():
    with scratch() as folder:
        return rollout.load_codec(str(hub_folder(folder / "hub")))


def reference_model(folder):
    """transformers' own model of a folder, in fp32: it must find all its tensors there, and no other."""
    from transformers import Qwen2_5_VLForConditionalGeneration as Reference
    net, info = Reference.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return net.eval()


@torch.no_grad()
def test_parity_with_transformers():
    """12 random configurations, rows with 1, 2, 0 and 1 images: logits and image patches to 1e-4."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    for seed in range(12):
        with scratch() as scratched:
            folder = hub_folder(scratched / "hub", seed % 2 == 0, seed)
            ours, reference = m.load_model(folder), reference_model(folder)
        r, noise, rows, pixels, grids = random.Random(seed), np.random.default_rng(seed), [], [], []
        bounds = {"min_pixels": 3136, "max_pixels": r.choice((20_000, 10 ** 6))}
        for count in (1, 2, 0, 1):
            text = r.sample(range(256), 8)
            row = text[:r.randint(1, 8)]
            for _ in range(count):
                shape = (r.randrange(28, 200), r.randrange(28, 260), 3)
                image = Image.fromarray(noise.integers(0, 256, shape, dtype=np.uint8))
                patches, grid = m.preprocess_image(image, m.ImageConfig(**bounds))
                expected = Qwen2VLImageProcessorPil(**bounds)(images=[image], return_tensors="pt")
                assert tuple(expected.image_grid_thw[0].tolist()) == grid
                close(expected.pixel_values, patches)
                pixels.append(torch.from_numpy(patches))
                grids.append(grid)
                row += [ours.config.image_token_id] * (grid[1] * grid[2] // 4) + text[-r.randint(1, 8):]
            rows.append(row)
        ids, mask = rollout.pad(rows, 0, left=seed % 3 == 0)
        images = {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids)}
        expected = reference(input_ids=ids, attention_mask=mask.long(), **images,
                             mm_token_type_ids=(ids == ours.config.image_token_id).int()).logits[mask]
        assert expected.abs().max() > 1, "a reference near zero would agree with anything"
        close(ours(ids, mask.long(), *images.values())[mask], expected)
        text = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(seed))
        close(ours(text), reference(input_ids=text).logits)


def test_bad_checkpoints_are_named():
    from safetensors.torch import save
    with scratch() as scratched:
        source, bad = hub_folder(scratched / "hub", seed=3), scratched / "bad"
        m.save_model(m.load_model(source), bad, source)                 # one file, not shards
        config, tensors = m.read_json(bad / "config.json"), load_file(bad / "model.safetensors")
        name, head = "model.layers.0.self_attn.q_proj.weight", tensors["model.embed_tokens.weight"].clone()
        fewer = {other: tensor for other, tensor in tensors.items() if other != name}
        cases = [(b"not tensors at all", "not a readable"), ("{broken", "not JSON"), ("[]", "JSON object"),
                 (save(fewer), f'Missing key(s) in state_dict: "{name}"'),
                 (save({**tensors, "stray": head}), 'Unexpected key(s) in state_dict: "stray"'),
                 (save({**tensors, name: head}), f"size mismatch for {name}: copying a param with shape"),
                 (save({**tensors, "lm_head.weight": head + 1}), "lm_head.weight differs"),
                 (json.dumps({**config, "model_type": "qwen2_vl"}), "config.json: model_type is 'qwen2_vl'")]
        for part, field, value, words in (
                ("text", "use_sliding_window", True, "window is True"), ("text", "hidden_act", "gelu", "act"),
                ("text", "rope_parameters", {"type": "yarn"}, "is 'yarn'"),
                ("text", "hidden_size", None, "'hidden_size' is missing"),
                ("text", "num_attention_heads", 1, "must sum to half"),
                ("vision", "depth", None, "'vision_config.depth' is missing"),
                ("vision", "out_hidden_size", 9, "must be the hidden_size")):
            changed = {**config, f"{part}_config": {**config[f"{part}_config"], field: value}}
            cases.append((json.dumps(changed), words))
        for content, words in cases:
            file = bad / ("config.json" if isinstance(content, str) else "model.safetensors")
            good = file.read_bytes()
            file.write_bytes(content.encode() if isinstance(content, str) else content)
            raises(ValueError, [str(bad), words], m.load_model, bad)
            file.write_bytes(good)
        (bad / "model.safetensors").write_bytes(save({**tensors, "lm_head.weight": head}))
        assert torch.equal(m.load_model(bad).head_weight, head)         # a tied head may be stored as well
        (bad / "model.safetensors").unlink()
        raises(ValueError, ["model.safetensors", "missing"], m.load_model, bad)


def test_image_tokens_must_match_images():
    net = random_model()
    image = net.config.image_token_id
    ids, pixels = torch.tensor([[1, image, image, 2]]), torch.zeros(16, 1176)
    raises(ValueError, "image 0 needs 4 image tokens", net, ids, None, pixels, torch.tensor([[1, 4, 4]]))
    raises(ValueError, "more image tokens", net, ids)
    raises(ValueError, "1 images given", net, ids[:, :1], None, pixels[:4], torch.tensor([[1, 2, 2]]))


# ---- rollout.py: the sampler and the training forward

def uncached(net, codec, problem, ids):
    """The slow, obvious log-probs (T, V) at each place of a completion: one forward of all tokens."""
    prompt = rollout.encode_prompt(problem, codec)
    grids = torch.tensor(prompt.grids) if prompt.grids else None
    with torch.no_grad():
        logits = net(torch.tensor([prompt.ids + list(ids)]), None, prompt.pixel_values, grids)[0]
    return (logits[len(prompt.ids) - 1:-1] + codec.logit_mask).log_softmax(-1)


def uncached_logps(net, codec, problem, ids):
    return uncached(net, codec, problem, ids)[torch.arange(len(ids)), torch.tensor(ids)].tolist()


@functools.lru_cache
def random_rollouts(length=14):
    """A model with random weights, mixed problems and three completions of each; no test may change them."""
    net, problems = random_model(), mixed_problems()
    groups = rollout.sample(net, problems, tiny_codec(), 3, length)
    return net, tiny_codec(), problems, groups, sum(groups, [])


def same_rows(found, expected):
    """Same tokens, log-probs to 1e-4."""
    for a, b in zip(found, expected, strict=True):
        assert (a.ids, a.finished) == (b.ids, b.finished)
        close(a.logps, b.logps)


def test_rows_in_a_batch_are_what_they_are_alone():
    """Cached sampling of a ragged batch against the plain forward, whatever is sampled beside a row, and
    where groups end early and leave: a group, and a row of it. Greedy takes the likeliest tokens."""
    net, codec, problems, plain, rows = random_rollouts()
    assert len({len(t.prompt.ids) for t in rows}) == len(problems)
    same_rows(rollout.sample(net, problems[1:2], codec, 3, 14, keys=[problems[1].id])[0], plain[1])
    greedy = rollout.sample(net, problems, codec, 1, 6, temperature=0.0)
    for t, in greedy:
        highest, token = uncached(net, codec, t.problem, t.ids).max(-1)
        assert t.ids == token.tolist()
        close(t.logps, highest)
    some = rollout.sample(net, problems, codec, 3, 14, temperature=[1.0, 0.0, 1.0, 0.0])
    same_rows(some[0] + some[2], plain[0] + plain[2])
    for n in (1, 3):                                        # in one batch with what is sampled
        assert all(t.ids[:6] == greedy[n][0].ids for t in some[n])
    codec = replace(codec, logit_mask=codec.logit_mask.clone())
    codec.logit_mask[codec.eos_ids[0]] += 6                             # each row may end at any moment
    keys, sizes, forward = ["x", "y", "x", "train/3"], [], net.next_hidden
    with swapped(net, "next_hidden", lambda token, *rest: sizes.append(len(token)) or forward(token, *rest)):
        groups = rollout.sample(net, problems, codec, 3, 40, keys=keys)
    assert sizes[0] == 12 and sizes[-1] < 12 and len(set(sizes)) > 2, sizes
    for problem, key, group in zip(problems, keys, groups):
        same_rows(rollout.sample(net, [problem], codec, 3, 40, keys=[key])[0], group)
        numbers = rollout.uniforms(key, 3, 40)
        for n, t in enumerate(group):
            with swapped(rollout, "uniforms", lambda *_: numbers[n:n + 1]):
                same_rows(rollout.sample(net, [problem], codec, 1, 40)[0], [t])
            assert t.finished == (t.ids[-1] in codec.eos_ids) and not set(t.ids[:-1]) & set(codec.eos_ids)
            assert (t.finished or len(t.ids) == 40) and t.sampled == [1] * len(t.ids)
            close(t.logps, uncached_logps(net, codec, t.problem, t.ids))
    for length in (40, 1):                                  # the training forward says the same
        rows = [t for group in groups for t in group]
        logps, _, mask = rollout.completion_logps(net, codec, [t.prompt for t in rows],
                                                  [t.ids[:length] for t in rows])
        close(logps[mask].detach(), sum([t.logps[:length] for t in rows], []))


def test_rows_start_from_prefixes_and_end_at_limits_and_stop_tokens():
    """Forced tokens are marked, and what follows is what would have followed; no input changes."""
    net, codec, problems, groups, rows = random_rollouts()
    prompts, prefixes = [group[0].prompt for group in groups], []
    for n, cut in enumerate((0, 9, 5, 1)):                      # of the n-th problem's (n % 3)-th sample
        ids = groups[n][n % 3].ids
        prefixes.append(ids[:min(cut, len(ids) - 1)])
    before, limits, stop = repr((prompts, prefixes)), [3, 14, 1, 7], rows[1].ids[4]
    forced = rollout.sample(net, problems, codec, 3, 14, prefixes=prefixes, prompts=prompts)
    assert before == repr((prompts, prefixes))
    for n, prefix in enumerate(prefixes):
        t, new, start = groups[n][n % 3], forced[n][n % 3], len(prefix)
        assert new.ids == t.ids and new.prompt is t.prompt      # by the same random numbers
        assert new.sampled == [0] * start + [1] * (len(t.ids) - start)
        close(new.logps, [0.0] * start + t.logps[start:])
        assert all(other.ids[:start] == prefix and not any(other.sampled[:start]) for other in forced[n])
    limited = sum(rollout.sample(net, problems, codec, 3, 14, limits=limits), [])
    stop_ids = [(stop,)] * 3 + [()]
    stopped = sum(rollout.sample(net, problems, codec, 3, 14, stop_ids=stop_ids), [])
    for n, t in enumerate(rows):
        limit, end = limits[n // 3], t.ids.index(stop) + 1 if stop in t.ids and n < 9 else len(t.ids)
        assert limited[n].ids == t.ids[:limit]
        assert limited[n].finished == (t.finished and len(t.ids) <= limit)
        assert stopped[n].ids == t.ids[:end] and stopped[n].finished == (t.finished and end == len(t.ids))
    for bad, limits in (([[1]], None), ([[9] * 14] + [[]] * 3, None), ([[9] * 3] + [[]] * 3, [3] * 4)):
        raises(ValueError, "prefixes must hold 4", rollout.sample, net, problems, codec, 3, 14,
               prefixes=bad, limits=limits)


def test_prompts_and_images_are_computed_once():
    """Whatever the group in sampling; for all rows that share a Prompt object in training."""
    net, codec, problems, groups, _ = random_rollouts()
    prompts, patches, tokens = [group[0].prompt for group in groups], [], []
    visual, decoder = net.visual.forward, net.model.forward
    with (swapped(net.visual, "forward", lambda x, *rest: patches.append(len(x)) or visual(x, *rest)),
          swapped(net.model, "forward", lambda x, *rest: tokens.append(x.shape[:2]) or decoder(x, *rest))):
        rollout.sample(net, problems, codec, 1, 1)
        rollout.sample(net, problems, codec, 16, 2)
        rollout.completion_logps(net, codec, prompts * 2, [[5, 6, 7]] * 8)
    once = sum(len(p.pixel_values) for p in prompts if p.grids)
    whole = (4, max(len(p.ids) for p in prompts))
    assert patches == [once] * 3 and tokens == [whole, whole, (64, 1), whole, (8, 2)]


@torch.no_grad()
def test_prompts_that_keep_what_is_computed_of_them():
    """In other batches, orders and numbers than those they were computed in: as without; nothing twice."""
    net, codec, problems, groups, _ = random_rollouts()
    plain, computed, compute = [group[0].prompt for group in groups], [], rollout.compute_prompts
    keeping = [replace(prompt, kept={}) for prompt in plain]

    def noted(model, prompts, pad_id):
        computed.append(prompts)
        return compute(model, prompts, pad_id)

    with swapped(rollout, "compute_prompts", noted):
        for places in ([2], [3, 0, 3], [0, 1, 2, 3], [1, 1]):
            last, kv, mask, position = rollout.prefill_prompts(net, [plain[n] for n in places], codec.pad_id)
            found = rollout.prefill_prompts(net, [keeping[n] for n in places], codec.pad_id)
            close(found[0], last, 1e-4)
            assert torch.equal(found[2], mask) and torch.equal(found[3], position)
            for layer in kv:                                # past the end of a prompt nothing is promised
                for ours, want in zip(found[1][layer], kv[layer]):
                    close(ours.transpose(1, 2)[mask], want.transpose(1, 2)[mask], 1e-4)
        other, before = copy.deepcopy(net), len(computed)
        rollout.prefill_prompts(other, keeping, codec.pad_id)       # another model has its own
        assert len(computed) == before + 1
        with swapped(rollout, "PREFILL_TOKENS", len(keeping[0].ids)):       # few at a time
            last, *_ = rollout.prefill_prompts(copy.deepcopy(net), keeping, codec.pad_id)
        close(last, rollout.prefill_prompts(net, keeping, codec.pad_id)[0], 1e-4)
    own = [[keeping.index(prompt) for prompt in part] for part in computed if part[0] in keeping]
    assert own[:4] == [[2], [3, 0], [1], [0, 1, 2, 3]] and own[4] == [0] and sum(own[4:], []) == [0, 1, 2, 3]


def test_micro_batches_hold_what_fits_and_prompts_once():
    """Whatever the budget: the gradient of one plain backward pass, each row once, each prompt once."""
    net, codec, _, groups, rows = random_rollouts()
    net, prompts, ids = copy.deepcopy(net), [t.prompt for t in rows], [t.ids[:3 + n] for n, t in enumerate(rows)]
    rollout.completion_logps(net, codec, prompts, ids)[0].sum().backward()
    plain = {name: p.grad for name, p in net.named_parameters()}
    longest, decoder = max(len(prompt.ids) for prompt in prompts), net.model.forward
    for budget, passes in ((9999, 1), (2 * longest, None), (30, 4)):
        net.zero_grad()
        seen, sizes = [], []
        with swapped(net.model, "forward", lambda x, *rest: sizes.append(x.shape[:2]) or decoder(x, *rest)):
            for part, prompt_pass in rollout.micro_batches(net, codec, prompts, ids, budget):
                some = [prompts[n] for n in part], [ids[n] for n in part]
                rollout.completion_logps(net, codec, *some, prompt_pass=prompt_pass)[0].sum().backward()
                seen += part
                widest = max(len(ids[n]) + len(prompts[n].ids) for n in part)
                assert len(part) * widest <= budget or len(part) == 1
        assert sorted(seen) == list(range(len(rows)))
        computed = [size for size in sizes if size[1] > 20]
        assert sum(size[0] for size in computed) == len(groups) and passes in (None, len(computed))
        for name, p in net.named_parameters():
            close(p.grad, plain[name], 1e-4 * max(1.0, plain[name].abs().max().item()))


def test_next_token_follows_the_distribution():
    logits, free = torch.tensor([[0.2, 0.5, 0.3, 0.0]]).log().clamp(min=-1e9), torch.zeros(4)
    one = torch.ones(1)
    token, logp = rollout.next_token(logits, free, one, torch.tensor([0.65]))
    assert token.item() == 1 and abs(logp.item() - math.log(0.5)) < 1e-6         # the header's worked example
    banned = torch.tensor([-torch.inf, 0.0, 0.0, 0.0])              # its probability 0 is not above 0
    assert rollout.next_token(logits, banned, one, torch.tensor([0.0]))[0].item() == 1
    grid, banned = (torch.arange(10_000) + 0.5) / 10_000, torch.tensor([0.0, 0.0, -torch.inf, 0.0])
    for temperature in (1.0, 0.5):
        temperatures = torch.full((10_000,), temperature)
        token, logp = rollout.next_token(logits.expand(10_000, -1), banned, temperatures, grid)
        want = torch.tensor([0.2, 0.5, 0.0, 0.0]) ** (1 / temperature)
        close(torch.bincount(token, minlength=4) / 10_000, want / want.sum(), 2e-4)
        close(logp.exp(), (want / want.sum())[token])


def test_forbidden_tokens_never_come():
    net, codec, problems = random_model(), tiny_codec(), mixed_problems()
    banned = torch.nonzero(codec.logit_mask < 0)[:, 0].tolist()
    assert {codec.image_token_id, codec.pad_id} < {*banned} and not {*banned} & {*codec.eos_ids}
    with torch.no_grad():
        net.head_weight[banned] *= 20                   # without the mask they would come all the time
    rows = sum(rollout.sample(net, problems, codec, 8, 20), [])
    with swapped(torch, "rand", lambda *shape, **_: torch.ones(shape)):         # the edge of the distribution
        rows += sum(rollout.sample(net, problems, codec, 2, 4), [])
    assert not any({*banned} & {*t.ids} for t in rows)


def test_uniforms_belong_to_their_key():
    a, b = rollout.uniforms("a", 100, 1000), rollout.uniforms("b", 100, 1000)
    assert torch.equal(a, rollout.uniforms("a", 100, 1000)) and (a == b).float().mean() < 0.01
    assert a.min() >= 0 and a.max() < 1 and abs(a.mean() - 0.5) < 0.01
    for longer, shorter in itertools.combinations((1000, 64, 17, 16, 15, 2, 1), 2):
        row = rollout.uniforms("a", 1, longer)          # a longer limit changes no number of a single row
        assert torch.equal(row[:, :shorter], rollout.uniforms("a", 1, shorter))


def test_token_logps_in_chunks_equal_plain():
    """Values and gradients; and the largest tensor made, forward and backward, is chunk x V."""
    from torch.utils._python_dispatch import TorchDispatchMode
    sizes, rng = [], torch.Generator().manual_seed(0)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x))
            return out

    hidden, head = torch.randn(64, 8, generator=rng), torch.randn(100, 8, generator=rng)
    targets, places = torch.randint(0, 90, (64,), generator=rng), torch.arange(64)
    banned = torch.zeros(100).masked_fill(torch.arange(100) >= 90, -torch.inf)
    for temperature, chunk in itertools.product((1.0, 0.7), (16, 60, 64, 1000)):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        full = ((h @ w.T)[:, :90] / temperature).softmax(-1)                            # (64, V - 10)
        expected = [full[places, targets].log(), -(full * full.log()).sum(-1)]
        expected += torch.autograd.grad((expected[0] * places).sum(), (h, w))
        sizes.clear()
        with Watch():
            found = list(rollout.token_logps(h, w, targets, banned, temperature, chunk, entropy=True))
            found += torch.autograd.grad((found[0] * places).sum(), (h, w))
        assert max(sizes) == 100 * min(chunk, 64), max(sizes)
        for a, b in zip(found, expected):
            close(a.detach(), b.detach(), 5e-4)
    assert not rollout.token_logps(hidden, head, targets, banned)[1].any()
    assert len(rollout.token_logps(hidden[:0], head, targets[:0], banned)[0]) == 0


# ---- rollout.py: files of problems, codec, prompts

GOOD_ROW = {"images": ["a.png"], "problem": "<image>Find x.", "answer": "48"}
BAD_ROWS = [        # what differs from GOOD_ROW, or a whole row, or the text of its line; words of the error
    ({"images": "none.png"}, "none.png: no such file"), ({"images": "cut.png"}, "cut.png: not readable"),
    ({"images": "text.png"}, "text.png: not readable"), ({"images": "bomb.png"}, "bomb.png: not readable"),
    ({"images": "../a.png"}, "../a.png lies outside"), ({"images": "x/../../a.png"}, "--image_dir"),
    ({"images": "file:///a.png"}, "file:///a.png lies outside"), ({"images": "A" * 2001}, "data: image"),
    ({"images": [3]}, "'images' must hold"), ({"images": {"path": ""}}, "'images' must hold"),
    ({"problem": "<image><image>x"}, "2 <image> tags, field 'images' has 1 images"),
    ({"problem": "<image> "}, "'problem' is empty"), ({"problem": None}, "'problem' is missing"),
    ({"problem": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type 'image_url'"),
    ({"problem": [{"role": "system", "content": "x"}]}, "'problem' is empty"),
    ({"answer": None}, "'answer' is missing"), ({"answer": math.nan}, "'answer' is empty"),
    ({"answer": {"style": "rule"}}, "'answer' is empty"), ({"choices": ["1", "2"]}, "no option"),
    ({"answer": None, "conversations": [{"from": "human", "value": "x"}]}, "'answer' is empty"),
    ({"choices": "AB"}, "'choices' must be a list"), ({"key_steps": "one"}, "'key_steps' must be a list"),
    ({"id": "row 5"}, "'id': row 5 is taken by"), ([1, 2], "a JSON object is expected, found list"),
    ('{"problem": "half', "not JSON: "), ('{"problem": "\\ud800", "answer": "1"}', "'utf-8' codec"),
    ("[" * 100_000, "not readable"), ('{"problem": "x", "answer": ' + "9" * 5000 + "}", "not readable")]


def write_rows(folder, rows):
    """data.jsonl of rows (objects, or lines as they stand) beside an image a.png of 40 x 30 pixels."""
    Image.new("RGB", (40, 30), "red").save(folder / "a.png")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data.jsonl"


def test_bad_rows_among_ten_thousand():
    """All are named at once, with file and line, by --check; a run names 20 of them and writes nothing."""
    with scratch() as folder:
        Image.effect_noise((90, 90), 90).save(folder / "cut.png")
        (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:-400])
        Image.new("1", (15_000, 15_000)).save(folder / "bomb.png")      # a small file of 225 million pixels
        (folder / "text.png").write_text("no image")
        rows = [{**GOOD_ROW, "id": f"row {n}"} for n in range(10_000)]
        for n, (row, _) in enumerate(BAD_ROWS):
            rows.insert(300 * n + 10, {**GOOD_ROW, **row} if isinstance(row, dict) else row)
        path = write_rows(folder, rows)
        flags = ["--data", str(path), "--model", TINY, "--device", "cpu", "--out", str(folder / "run")]
        said = raises(SystemExit, "error: ", train.start, [*flags, "--check"])[7:].splitlines()
        assert len(said) == len(BAD_ROWS), said
        for n, (_, words) in enumerate(BAD_ROWS):
            line, = [line for line in said if line.startswith(f"{path}:{300 * n + 11}: ")]
            assert words in line, (words, line)
        write_rows(folder, rows[:10] + ["{"] * 30)
        assert len(raises(SystemExit, f"{path}:11: ", train.start, flags).splitlines()) == 21
        write_rows(folder, [GOOD_ROW, {**GOOD_ROW, "problem": "x " * 400}])     # good to read, but too long
        raises(SystemExit, [f"{path}:2: ", "--max_prompt_tokens is 300"], train.start,
               [*flags, "--check", "--max_prompt_tokens", "300"])
        raises(SystemExit, f"{path}:1: field 'demon", train.start, [*flags, "--check", "--stage", "sft"])
        with contextlib.redirect_stdout(io.StringIO()) as out:
            train.start([*flags, "--check"])
        assert "all rows are good" in out.getvalue() and not (folder / "run").exists()
        write_rows(folder, [{**GOOD_ROW, "id": f"row {n}", "images": ["text.png"]} for n in range(9)])
        for rank in range(3):                               # each of three ranks looks into its share
            said = raises(rollout.InputError, "text.png", rollout.load_problems, path, rank=rank, world=3)
            assert re.findall(r"jsonl:(\d)", said) == [str(n) for n in range(1 + rank, 10, 3)], said


def test_other_files_than_lines():
    """Lists, objects by id, parquet, byte order marks, other encodings, nothing at all."""
    with scratch() as folder:
        rows = [{**GOOD_ROW, "id": f"row {n}", "answer": n} for n in range(3)]
        expected = rollout.load_problems(write_rows(folder, rows))
        for name, text in (("list.json", json.dumps(rows, indent=1)),
                           ("ids.json", json.dumps({row["id"]: row for row in rows})),
                           ("lines.json", "\n".join(map(json.dumps, rows))),
                           ("mark.jsonl", "\ufeff" + "\r\n\r\n".join(map(json.dumps, rows)))):
            (folder / name).write_bytes(text.encode())
            for a, b in zip(rollout.load_problems(folder / name), expected, strict=True):
                assert replace(a, where="") == replace(b, where=""), name
        for name, text, words in (("a.json", '[{"answer": 1}]', "a.json: row 1: "), ("a.json", "3", "object"),
                                  ("a.jsonl", '{"\xb0": 1}', "a.jsonl:1: "), ("a.jsonl", "\n\n", "no rows")):
            (folder / name).write_bytes(text.encode("latin-1"))
            raises(rollout.InputError, words, rollout.load_problems, folder / name)
        (folder / "elsewhere").mkdir()
        path = write_rows(folder / "elsewhere", [{**GOOD_ROW, "images": str(folder / "a.png")}])
        raises(rollout.InputError, "outside", rollout.load_problems, path)
        assert rollout.load_problems(path, image_dir=folder)
        table, png = folder / "table.parquet", (folder / "a.png").read_bytes()
        table.write_bytes(b"PAR1")
        try:
            import pyarrow.parquet
        except ImportError:
            raises(rollout.InputError, "pip install pyarrow", rollout.load_problems, table)
            return print("skipped: parquet files (pyarrow is not installed)")
        raises(rollout.InputError, "not a readable parquet", rollout.load_problems, table)
        rows = [{**row, "images": [{"bytes": png, "path": None}]} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
        for a, b in zip(rollout.load_problems(table), expected, strict=True):
            assert (a.id, a.question, a.answer, a.images) == (b.id, b.question, b.answer, [png])


def test_images_of_every_kind():
    """They become the RGB picture a viewer shows, and their headers tell the size it has."""
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (28, 1))                   # (H 28, W 64)
    colour = Image.fromarray(np.stack((ramp, ramp[:, ::-1], 255 - ramp), axis=-1))
    grey, red = Image.fromarray(ramp).convert("RGB"), Image.new("RGB", (64, 28), "red")
    deep, clear = Image.fromarray(ramp.astype(np.uint16) * 257), colour.copy()
    clear.putalpha(0)
    frames = {"save_all": True, "append_images": [colour]}
    cases = [(colour, "JPEG", {"quality": 95}, colour, 8), (Image.fromarray(ramp), "PNG", {}, grey, 0),
             (deep, "PNG", {}, grey, 1), (Image.fromarray(ramp.astype(np.int32)), "TIFF", {}, grey, 0),
             (colour.convert("CMYK"), "TIFF", {}, colour, 2), (colour.quantize(64), "PNG", {}, colour, 60),
             (clear, "PNG", {}, colour, 0), (red, "GIF", frames, red, 0)]
    turns = {1: colour, 3: colour.rotate(180), 6: colour.rotate(-90, expand=True),
             8: colour.rotate(90, expand=True), 9: colour}
    for (orientation, turned), kind in itertools.product(turns.items(), ("PNG", "TIFF")):
        exif = Image.Exif()
        exif[0x0112] = orientation
        cases.append((colour, kind, {"exif": exif}, turned, 0))
    for image, kind, options, expected, tolerance in cases:
        out, config = io.BytesIO(), replace(m.ImageConfig(), min_pixels=784)
        image.save(out, kind, **options)
        found = rollout.open_image(out.getvalue())
        close(np.array(found), np.array(expected), tolerance)
        assert rollout.image_grid(out.getvalue(), config) == m.preprocess_image(found, config)[1]


def rows_of_other_projects(png):
    """source -> a row as its data set is laid out, the number of images, the fields that differ."""
    image, encoded = {"bytes": png, "path": None}, base64.b64encode(png).decode()
    parts = [{"type": "image", "image": "file://a.png"}, {"type": "text", "text": "How many?"}]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>How many?"}]
    human = [{"from": "human", "value": "<image>How many?"}, {"from": "gpt", "value": "3"}]
    asked, chat = {"problem": "How many?", "answer": 3}, [{"role": "user", "content": parts}]
    steps = "### Rationales: count. ### Step 1: two and one. ### The final answer is: 3"
    thoughts, key_steps = "<think>One, two.</think>\n\n<answer>3</answer>", ["two", ["3 dots", "three"]]
    return {
        "EasyR1": ({**asked, "images": [image], "choices": None, "ground_truth": "A", "id": None}, 1,
                   {"id": "here"}),
        "EasyR1, text": ({**asked, "images": [], "problem": "<image>How many?"}, 0, {}),
        "verl": ({"data_source": "geometry3k", "images": [image], "prompt": turns, "ability": "math",
                  "reward_model": {"style": "rule", "ground_truth": "3"}}, 1, {"task": "geometry3k"}),
        "VLM-R1": ({"id": 1, "image": "a.png", "conversations": human}, 1, {"id": "1"}),
        "TRL": ({"prompt": turns[1:], "image": image, "solution": "$3$"}, 1, {"answer": "$3$"}),
        "TRL, parts": ({"prompt": [{"role": "user", "content": [{"type": "image"}, "How many?"]}],
                        "images": [image], "solution": "\\boxed{3}"}, 1, {}),
        "open-r1": ({**asked, "answer": None, "image": image, "solution": thoughts}, 1,
                    {"demonstration": thoughts}),
        "MM-Eureka": ({"id": "0", "message": json.dumps(chat, indent=1), "answer": "3"}, 1, {"id": "0"}),
        "no chat": ({"message": "[{How many?", "answer": "3"}, 0, {"question": "[{How many?\nThink."}),
        "R1-VL-10K": ({**asked, "answer": None, "image_path": "a.png", "solution": steps,
                       "key_steps": {"Steps": key_steps}}, 1,
                      {"demonstration": steps, "key_steps": key_steps}),
        "ViRL39K": ({"qid": "q1", "question": "<image><image>How many?", "answer": "\\boxed{3}",
                     "image": ["a.png", "a.png"], "category": "charts", "source": "x"}, 2,
                    {"id": "q1", "task": "charts"}),
        "a dict of a path": ({**asked, "images": [{"image": "a.png"}]}, 1, {}),
        "a data url": ({**asked, "image": f"data:image/png;base64,{encoded}"}, 1, {}),
        "base64": ({**asked, "image": encoded}, 1, {}),
        "worked": ({"problem": "How many?", "solution": "3+4=7, so 7-4 is \\boxed{3}."}, 0, {}),
        "options": ({**asked, "answer": "B", "choices": {"B": "3", "A": 1}}, 0,
                    {"answer": "B", "choices": ["1", "3"], "question": "How many?\nA. 1\nB. 3\nThink."}),
        "spelled out": ({**asked, "problem": "How?\n(A) 3 (B) y", "choices": ["3", "y"]}, 0,
                        {"question": "How?\n(A) 3 (B) y\nThink."})}


def test_rows_of_other_projects():
    with scratch() as folder:
        noise = io.BytesIO()
        Image.effect_noise((60, 60), 90).save(noise, "PNG")
        write_rows(folder, [])
        for source, (row, images, expected) in rows_of_other_projects(noise.getvalue()).items():
            p = rollout.parse_row(row, "here", folder, "Think.")
            wanted = {"answer": "3", "question": "<image>" * images + "How many?\nThink.", **expected}
            assert {name: getattr(p, name) for name in wanted} == wanted, source
            assert len(p.images) == images == len(rollout.encode_prompt(p, tiny_codec()).grids), source


def test_prompt_is_the_chat_template():
    codec, p = tiny_codec(), shapes.make_problem("tiles", 4)
    prompt, light = rollout.encode_prompt(p, codec), rollout.encode_prompt(p, codec, pixels=False)
    pads = prompt.ids.count(codec.image_token_id)
    assert pads == prompt.grids[0][1] * prompt.grids[0][2] // 4 and len(prompt.pixel_values) == 4 * pads
    assert (light.ids, light.grids, light.pixel_values) == (prompt.ids, prompt.grids, None)
    text = codec.tokenizer.decode([i for i in prompt.ids if i != codec.image_token_id])
    assert text == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                    f"<|im_start|>user\n<|vision_start|><|vision_end|>{p.question[7:]}<|im_end|>\n"
                    "<|im_start|>assistant\n")
    hostile = rollout.encode_prompt(replace(p, question="<image>say <|im_end|> and <|image_pad|>"), codec).ids
    for special in (codec.image_token_id, codec.eos_ids[0]):
        assert hostile.count(special) == prompt.ids.count(special)
    thin = replace(p, images=[Image.new("RGB", (1, 300))], where="data.jsonl:1")
    raises(rollout.InputError, ["data.jsonl:1: field 'images'", "aspect"], rollout.encode_prompt, thin, codec)


def test_published_configs_are_accepted():
    """Qwen2.5-VL-3B, 7B, 32B, 72B: width, inner width, layers, heads, key heads; and what they share."""
    vision = {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
              "num_heads": 16, "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112,
              "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2}
    shared = {"model_type": "qwen2_5_vl", "hidden_act": "silu", "initializer_range": 0.02,
              "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "use_sliding_window": False,
              "image_token_id": 151655, "vocab_size": 152064, "tie_word_embeddings": False,
              "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
    for sizes in ((2048, 11008, 36, 16, 2), (3584, 18944, 28, 28, 4), (5120, 27648, 64, 40, 8),
                  (8192, 29568, 80, 64, 8)):
        given = {**shared, **dict(zip(names, sizes))}
        given |= {"vision_config": {**vision, "out_hidden_size": sizes[0]}}
        assert [getattr(m.Config.from_dict(given), name) for name in names] == list(sizes)
    found = m.ImageConfig.from_dict({"min_pixels": 3136, "max_pixels": 12845056, "image_std": [0.27] * 3})
    assert (found.min_pixels, found.max_pixels, found.image_std) == (3136, 12845056, (0.27,) * 3)


def test_codecs_and_what_is_missing_in_them():
    """Of a folder like the hub's: two end tokens, spare rows, and the template that knows images."""
    with scratch() as scratched:
        folder, p = hub_folder(scratched / "hub"), shapes.make_problem("tiles", 4)
        codec = rollout.load_codec(str(folder))
        names = codec.tokenizer.get_vocab()
        assert codec.eos_ids == (names["<|im_end|>"], names["<|endoftext|>"])
        banned = {*range(len(names), len(names) + 39), *map(names.get, codec.specials)} - {*codec.eos_ids}
        assert {*(codec.logit_mask < 0).nonzero()[:, 0].tolist()} == banned and len(banned) == 39 + 6
        assert rollout.token_ids("\n", codec)[0] in codec.newline_ids
        assert rollout.render_chat(p, codec).startswith("<|im_start|>system\nYou are a helpful")
        small = rollout.load_codec(str(folder), max_pixels=28 * 28 * 4)
        few, many = (len(rollout.encode_prompt(p, c).pixel_values) for c in (small, codec))
        assert few <= 16 < many
        for name, text, words in (("config.json", None, "config.json: file is missing"),
                                  ("tokenizer.json", "{", "no readable tokenizer"),
                                  ("config.json", {"image_token_id": 3}, "<|image_pad|> is not image_t"),
                                  ("chat_template.json", {"chat_template": ""}, "no chat template")):
            whole = (folder / name).read_text()
            text = json.dumps(json.loads(whole) | text) if isinstance(text, dict) else text
            (folder / name).write_text(text) if text else (folder / name).unlink()
            raises(ValueError, [str(folder), words], rollout.load_codec, str(folder))
            (folder / name).write_text(whole)


def test_token_batches_hold_what_fits():
    assert rollout.pad([], 0)[0].shape == (0, 0)
    for lengths in ([], [5], [3, 3, 3, 3], [1, 9, 1, 1], [50, 1, 1], [5, 5, 1, 10, 4, 4], list(range(20))):
        found = list(rollout.token_batches(lengths, 10))
        assert sum(map(list, found), []) == list(range(len(lengths)))
        for batch, after in zip(found, [*found[1:], []]):
            longest = max(lengths[n] for n in batch)
            assert len(batch) == 1 or len(batch) * longest <= 10
            assert not after or (len(batch) + 1) * max(longest, lengths[after[0]]) > 10     # none ends early


# ---- reward.py

COLOURS, NUMBERS = ["red", "green", "blue", "yellow"], ["1", "12", "2", "21"]
MATCH = r"""
# numbers
0.5 == 1/2   \frac12 == 0.5   \frac{3}4 == 0.75   \dfrac{6}{8} == 3/4   1,234 == 1234   12,345,678 == 12345678
12,34 != 1234   1{,}234 == 1234   (1,234) != 1234   3.0 == 3   -0 == 0   2e3 == 2000   2.5E-3 == 0.0025
4 \times 10^{-2} == 0.04   6.02 x 10^23 == 6.02*10^{23}   3 != 30   3 != -3   - 3 == -3   1 3/4 == 1.75
2\frac{1}{3} == 7/3   2½ == 5/2   -1 1/2 == -1.5   2\frac{3}{2} == 3   1000000 1/3 != 1000000
0.3333333 != 0.33333333   12345678901234/2 == 6172839450617   0.3333333 == 1/3   0.333 != 1/3
1000000 != 1000001   1234567.1 != 1234567   22/7 != \pi   25% == 25 \%   25% == 0.25   25 percent == 25%
25% != 75%   ５７ == 57   \$3.20 == 3.2   $17$ == 17
# expressions
16-8\pi != 8   16-8\pi == -8π+16   3π == 9.42477796   3 pi == 3*\pi   √50 == 5\sqrt{2}   \sqrt[3]{27} == 3
\frac{2}{\sqrt{2}} == sqrt(2)   3**2 == 9   x² == x^2   x^2 != x2   x_1 == x_{1}   x₁ == x_1
blue+1 != lueb+1   2^3^2 == 512   2^3^2 != 64   |x| != x   \sqrt[3]{-8} == -2   2^{10} == 1024   2^-2 == 0.25
-2^2 == -4   (-2)^2 == 4   -2^2 != 4   2(3+4) == 14   |-7| == 7   \sin 30° == 0.5   \sin 2x == \sin(2x)
\sin 2x != 2\sin x   \sin 2x != x\sin 2   \cos 2(x+1) == \cos(2x+2)   \sin x == \sin(x)
3\sin x \cos x == 1.5\sin 2x   \sin^2 x == (\sin x)^2   \sin^{2}(x) == 1-\cos² x   \sin^2 30° == 1/4
\sin^2 x != \sin x^2   \sin^{-1} x != 1/\sin x   \ln 2x == \ln 2 + \ln x   \log_2 8 == 3   \ln e == 1
(x+1)(x-1) == x^2-1   (a+b)^2 != a^2+b^2   2xy == 2yx   \frac{x}{y} != \frac{y}{x}   1/0 != 1/0+1   6/2/3 == 1
5-3-1 != 3
# units and labels
70° == 70   70^\circ == 70 degrees   8 cm == 8   8\text{ cm}^2 == 8 square centimetres   8 cm != 8 m
8 cm != 9 cm   8 N == 8   8 n != 8   25 °C == 25   25°C == 25 ℃   30 km/h == 30   x = 8 == 8   8 = x == 8
x = 8 != y = 8   Area = 8 == 8   x = 16/2 = 8 == 8   7 = 8 != 8   3 + 5 = 8 == 8   x + 1 = 8 != 8
2x = 8 != 8
# relations
y = 3x - 1 == y=-1+3x   2x + 4y = 6 == x + 2y = 3   x > 3 == 3 < x   x > 3 != x < 3   x > 3 != x \ge 3
-2x < 4 == x > -2   -2x < 4 != x < -2   1 < x \leq 5 == 5 \geq x > 1
# sequences
(1,2) == (1, 2)   (1,2) != (2,1)   x \in [0, 2) == [0,2)   square 5 != 25   [1,2) != (1,2)   (1,2] == (1,2]
(1,\frac12) == (1.0, 0.5)   {3, 1, 2} == \{1,2,3\}   {1, 1, 2} != {1, 2, 2}   1, 2, 3 != 3, 2, 1
1 and 2 == 1, 2   1, 2 != 1   [5] != 5   1 < 2 != 3 < 5   2x = 4y != x = 3z   x=1, y=2 == y=2, x=1
\pm 4 == 4, -4   \pm 4 != 4   (-\infty, 1) \cup (3, ∞) == (3,\infty)∪(-∞,1)
# words
Blue. == blue   "Blue" == blue   \text{blue} == blue   **blue** == blue   redblue != red blue   red != blue
yes != no   not != no   on != no   der != red   A B C != C B A   two != 2   red 7 0 != red 70
red 4 blue != red 4 blue 5   red 4 blue 5 != blue 5 red 4   red 0 blue 5 != red 0 blue 6
4 red 5 dog != 4 dog 5 red   a 1 b 2 != b 2 a 1   5 A != A   \boxed{5} == 5   The answer is \boxed{5}. == 5
2\boxed{5} != 5   The answer is 5 == 5   5 or 6 != 5   5; 6 != 6
# small print: up to three letters are a product, a minus comes before a power, roots are powers
2abc == 2cab   2abcd != 2dcba   2abc != 2ac   -x^2 == 0-x^2   -x^2 != (-x)^2   -2x == 0-2x   4^(1/2) == 2
4^(1/2) != 1   2^64 == 18446744073709551616   x-x=0 != y=2   x-x=y-y != x-x=2   2x<4 != -2x<-4
sqrt(2)/10^13 != sqrt(3)/10^13   sin(π) == 0   3^64 != 3433683820292512484657849089280   \log_{2}8 == 3
\tfrac12 == 0.5   \cfrac{1}{2} == 0.5   6 \div 3 == 2   \lvert x\rvert == |x|   \vert x\vert == |x|
\(5\) == 5   \displaystyle 5 == 5   x = **5** == 5   blue! == blue   5! != 5   70º == 70   70\degree == 70
69{degrees} == 69   8\text{m} == 8 m   8 cubic cm == 8 cm^3   x <= 5 == 5 >= x   x \le 5 == 5 \ge x
x \leqslant 5 == 5 \geqslant x   x \lt 5 == 5 \gt x   x != 5 == x \ne 5   x \neq 5 == x ≠ 5   x ≈ 5 == 5
x \approx 5 == 5   x ∈ [0,2) == [0,2)   \angle A == ∠ A   \triangle ABC == △ ABC   \alpha+\beta == α+β
\theta == θ   x=1, 2 != 2, x=1
"""
EXTRACT = [                                             # <t> is <think>, <a> is <answer>
    ("<t>a</t><a> 7 </a>", "7"), ("<a>6</a> no: <a>7</a>", "7"), ("<t>It is 6", None),
    ("<t>a</t><t><a>7</a>", None), ("<a></a>", None), ("<a>7", None), ("7</a>", None),
    ("<a>6</a> or <a>7", None), ("<a><a>7</a></a>", None), ("<a><t>a</t>7</a>", None), ("<a><t>7</a>", None),
    ("<t><a>7</a></t>", None), ("", None), ("<t>\\boxed{6}</t> it is \\boxed{7}", "7"),
    ("\\boxed{6}, rather \\boxed{7}", "7"), ("\\boxed{7", None), ("\\boxed{\\frac{1}{2}} cm", "\\frac{1}{2}"),
    ("\\boxed{}", None), ("\\boxed{\\{1\\}}", "\\{1\\}"), ("It is \\boxed{16-8\\pi}.", "16-8\\pi"),
    ("The answer is 7.", "7"), ("Answer: blue", "blue"), ("1+1\n#### 2", "2"),
    ("The answer is 7, since 3 + 4 = 7, not 9.", "7"), ("6 + 2 = 8 cm", "8"), ("Of 4 and 3 it has 3", "3"),
    ("It costs $2.50 today.", "2.50"), ("Hence $x = 4$ and so on", "x = 4"),
    ("It is 1,250 altogether", "1,250"), ("The final answer is:\n7", "7"), ("**Answer:** 7", "7"),
    ("<a>5 and 7</a>", "5 and 7"), ("blue", "blue"),
    ("The area is 16-8\\pi here", "The area is 16-8\\pi here"), ("mm " * 100, None), ("a</t>7", "7"),
    ("The answer is (1, 2).", "(1, 2)"), ("It is $5 and $6", "6"),
    ("So \\(\\frac{3}{4}\\) is it", "\\(\\frac{3}{4}\\)"), ("The answer is y > 3.", "y > 3"),
    ("<t>a</t><t>b</t>7", "7"), ("<a>5</a><a><a>7</a>", None), ("\\boxed{ 7 }", "7"), ("so\n7\n", "7"),
    ("The answer is 7. It has 3 sides.", "7"), ("The answer is the sum of 3 and 4, so 7 dots", "7"),
    ("4 dots and then 3 dots", "3"), ("The answer is 7\nas it has 3 sides", "7")]
CHOOSE = [                                              # of COLOURS
    ("B", "B"), ("(B)", "B"), ("B.", "B"), ("B) green", "B"), ("**B**", "B"), ("Option B", "B"),
    ("The answer is (C).", "C"), ("<a>b</a>", "B"), ("<a>green</a>", "B"), ("<a>Green.</a>", "B"), ("Ｂ", "B"),
    ("<a>E</a>", None), ("<a>A. red B. green</a>", None), ("<a>A, B</a>", None), ("<a>A or B</a>", None),
    ("red or green", None), ("It is the green one.", "B"), ("<a>B. red</a>", None), ("I do not know.", None),
    ("A red car", "A"), ("A car", None), ("greenish", None), ("Answer: C since A is too dark.", "C"),
    ("<t>B</t>C", "C"), ("\\boxed{\\text{D}}", "D"), ("purple", None), ("$\\boxed{(D)}$", "D"), ("5 A", None),
    ("B. It is that one", "B"), ("Neither A nor B", None), ("A is out, B is out\nSo D.", "D"),
    ("The answer is A or B.", None), ("A is wrong. B is right.", "B"), ("(A) is not right, so (B).", "B"),
    ("A and B are wrong. So C", "C"), ("B is right. A is wrong.", "B"), ("A is incorrect.", None)]
REWARD = [                                              # the gold is 7: accuracy, format
    ("<t>a</t><a>7</a>", 1, 1), ("<t>a</t><a>8</a>", 0, 1), ("<a>7</a>", 1, 0), ("<t>a</t>\\boxed{7}", 1, 0),
    ("<t>a</t><a>\\boxed{7}</a>", 1, 1), ("<t>a</t><a>6</a><a>7</a>", 0, 0),
    ("<t><a>6</a></t><a>7</a>", 0, 0), ("<t><a>7</a></t>", 0, 0), ("<t>7</t>", 0, 0),
    ("<t>\\boxed{7}</t>", 0, 0), ("The answer is 7", 0, 0), ("<t>a</t>\\boxed{6}\\boxed{7}", 0, 0),
    ("<t>a</t><a>\\boxed{6} \\boxed{7}</a>", 0, 1), ("<t>a</t><a>6, 7</a>", 0, 1),
    ("<t>a</t><a>6 or 7</a>", 0, 1), ("<t>a</t><a>How many? 6 7 8</a>", 0, 1), ("<t>a</t><a>6 = 7</a>", 0, 1),
    ("", 0, 0), ("a</t><a>7</a>", 1, 0), ("<t>a<a>7</a>", 0, 0), ("<a>7</a></a>", 0, 0)]
REWARD_CHOICES = [                                      # the gold is B of COLOURS
    ("<t>a</t><a>(B)</a>", 1, 1), ("<t>a</t><a>green</a>", 1, 1), ("<t>a</t><a>B. red</a>", 0, 1),
    ("<t>a</t><a>Which colour? A. red B. green C. blue D. yellow</a>", 0, 1),
    ("<t>a</t><a>A B C D</a>", 0, 1), ("<t>a</t><a>B or green or blue</a>", 0, 1), ("<t>B</t>", 0, 0),
    ("<a>B. It is that one</a>", 0, 0), ("<t>a</t>\\boxed{B}", 1, 0), ("<a>\\boxed{A} \\boxed{B}</a>", 0, 0),
    ("<a>A</a><a>B</a>", 0, 0)]
WELL_FORMED = ["<t>a</t><a>b</a>", "<t>a\nb</t>\n\n<a>c</a>"]
MALFORMED = [
    "<t></t><a>b</a>", "<t>a</t><a> </a>", "x<t>a</t><a>b</a>", "<t>a</t><a>b</a>x", "<t>a</t>x<a>b</a>",
    "<a>b</a><t>a</t>", "<t>a<a>b</a></t>", "<t>a</t><a>b</a><a>b</a>", "<t><t>a</t><a>b</a>", "<t>a</t><a>b",
    "", "<t>a<a></t>b</a>", "<t>a</a></t><a>b</a>"]
HOSTILE = ["9^9^9^9^9", "3^6400000", "(" * 90 + "7" + ")" * 90, "2^(10^9)", "10^{400}",
           "(" * 900 + "7" + ")" * 900, "(" * 10 ** 6, "{" * 1999, "-" * 1999 + "7", "|" * 1500,
           "\\frac" * 400, "\\sqrt{" * 300 + "7" + "}" * 300, "7" * 1900, "1" * 10 ** 6, "7\0", "\0",
           "7\ud800", "9!!!!!", "nan", "inf", "__import__('os')", "0x7", "[7][0]", "7 if 1 else 0",
           "x=" * 900, "1," * 999, "^" * 1999, "0/0", "log(0)", "log(-1)", "log_1 7", "\\sqrt[0]{7}", "1e999",
           "0^-1", "tan(90°)", "(-8)^(1/3)", "±" * 1999, "\\text{" * 330, "\\boxed{" * 250, "<" * 1999,
           "∪" * 1999, "7 " * 999, "٧٧", "²" * 1999, "½" * 1999, "$" * 1999, "1e400*1e400", "9^64^64",
           "((((9^64)^64)^64)^64)^64", "\\", "%", "!", "°", ".", "=", ",", "7.7.7", "²", "e^(e^(e^e^e))",
           "a" * 1999, "a," * 999, "ﷺ" * 1999, "'", "7_0", "7e", "\\text", "x_", "|7", "sin", "√",
           "\\frac{7}", "A," * 999 + "C", "(A)," * 499, "sin 2x" * 99, "sin^2" * 99, "sin^9^9^9 x"]
def tags(text):
    return text.replace("t>", "think>").replace("a>", "answer>")


def match_rows():
    """(prediction, gold, whether they match): MATCH holds prediction == gold or !=, three spaces apart."""
    lines = [line for line in MATCH.strip("\n").split("\n") if not line.startswith("# ")]
    return [(*pair.split(" == " if " == " in pair else " != "), " == " in pair)
            for pair in "   ".join(lines).split("   ")]


def test_reward_match():
    for prediction, gold, want in match_rows() + [("red 4   blue\t5", "red 4 blue 5", True)]:
        assert answers_match(prediction, gold) is want, (prediction, gold)
        assert answers_match(gold, prediction) is want, (gold, prediction)
    for nothing in ("", None, " ", "\n"):
        assert not any(answers_match(*p) for p in ((nothing, "7"), (nothing, nothing or ""), ("7", nothing)))


def test_reward_long_texts():
    """They match verbatim; an answer is looked for in the last 4,000 characters, in passing in 300."""
    text = "It has 3 red dots (and 4 blue ones). " * 150
    assert answers_match(f"  {text}\n", text) and reward_parts(f"<answer>{text}</answer>", text)["accuracy"]
    for other in (text[:-5], text.replace("3", "5", 1), text.upper(), "a" * 10 ** 6):
        assert not answers_match(text, other) and not answers_match(other, text)
    assert answers_match("1 " * 400, "1 " * 400) and not answers_match("1 " * 400, "1 " * 401)
    assert answers_match("+", "+") and answers_match("°", "°") and not answers_match(" " * 3000, " " * 3000)
    for padding, want in ((297, "B"), (298, None)):
        assert extract_answer("So B,\n" + "z" * padding, ["red", "blue", "teal"]) == want
    for padding, found in ((3998, True), (3999, False)):
        text = "The answer is 7\n" + "so it goes\n" * (padding // 11) + "z" * (padding % 11)
        assert (extract_answer(text) == "7") is found
    words = [f"word{a}{b}" for a in "ab" for b in map(chr, range(97, 123))][:30]
    for place, letter in ((0, "A"), (25, "Z"), (26, None)):                 # letters end at Z
        assert extract_answer(f"<answer>{words[place]}</answer>", words) == letter


def test_reward_extract_and_choose():
    for table, choices in ((EXTRACT, None), (CHOOSE, COLOURS)):
        for text, want in table:
            assert extract_answer(tags(text), choices) == want, (text, want)
    for text, choices, want in (
            ("12.0", NUMBERS, "B"), ("so 21 of them", NUMBERS, "D"), ("120", NUMBERS, None),
            ("<answer>$\\frac{24}{2}$</answer>", NUMBERS, "B"), ("C. D", ["A", "B", "D", "E"], "C"),
            ("E", ["A", "B", "D", "E"], "D"), ("a dog", ["A", "B"], None), ("5", ["5 cm", "5 m"], None),
            ("I think it is J", NUMBERS + NUMBERS + NUMBERS[:2], "J"), ("12", ["(A) 11", "(B) 12"], "B"),
            ("a dark red one", ["red", "dark red"], "B"), ("12", ["12", "9", "12"], "A")):
        assert extract_answer(text, choices) == want, (text, choices)


def test_reward_match_choices():
    right = [("B", "B"), ("(b)", "B"), ("green", "B"), ("B", "green"), ("B) green", "green")]
    wrong = [("A", "B"), ("red", "B"), (None, "B"), ("", "B"), ("5 A", "A"), ("A or B", "B"), ("E", "B"),
             ("E", "E"), ("AB", "B"), ("green red", "B"), ("purple", "purple")]
    for pair in right + wrong:
        assert answers_match(*pair, COLOURS) is (pair in right), pair
    twice = ["same", "other", "same", "", ""]
    assert answers_match("C", "A", twice) and not answers_match("B", "A", twice)
    assert not answers_match("D", "E", twice)           # empty texts are not one text


def test_reward_hostile_text():
    """Whatever a completion holds: no exception, an answer of the right kind, little time."""
    start, rng = time.perf_counter(), random.Random(time.time_ns())
    pool = [tags(row[0]) for row in match_rows() + EXTRACT + CHOOSE + REWARD] + [t[:3000] for t in HOSTILE]
    texts = [rng.choice(pool) + rng.choice(pool) + rng.choice(pool) for _ in range(600)]
    for text in ("<think>", "<answer>", "\\boxed{", "answer is ", " ", "1", "1,111", "a ", "\n"):
        texts.append(text * (10 ** 6 // len(text)) + "</think><answer>7</answer>" * (text == "a "))
    for text in HOSTILE:
        texts += [text, f"<answer>{text}</answer>", f"\\boxed{{{text}}}", "The answer is " + text]
        assert answers_match(text, "7") is False and answers_match("7", text) is False, text[:50]
        assert not answers_match(text, "B", COLOURS), text[:50]
    for text in texts:
        other, parts = rng.choice(pool)[:500], reward_parts(text, "7")
        matches = {answers_match(text, other), answers_match(other, text, COLOURS), format_ok(text),
                   answers_match(text, text + "7"), answers_match(text, text[:-1] + "z")}
        assert extract_answer(text) != "" and extract_answer(text, COLOURS) in [*"ABCD", None], text[:50]
        assert matches | {*parts.values()} <= {0, 1, 0.1, 0.9}, (text[:50], parts)
    assert not answers_match("y=1e99*1e99*1e99*1e99*x", "y=πx")
    numbers = [str(n) for n in range(140)]                                  # 140 * 140 / 2 comparisons
    assert answers_match("{" + ",".join(numbers) + "}", "{" + ",".join(numbers[::-1]) + "}")
    assert time.perf_counter() - start < 60                                 # a hang, on any machine


def test_reward_parts_and_hacks():
    cases = [(text, "7", None, accuracy, form) for text, accuracy, form in REWARD]
    cases += [(text, "B", COLOURS, accuracy, form) for text, accuracy, form in REWARD_CHOICES]
    cases += [("<t>a</t><a>red 70</a>", "red 7 0", None, 0, 1), ("<t>a</t><a>ABCD</a>", "A", COLOURS, 0, 1),
              ("<t>a</t><a>B. green</a>", "green", COLOURS, 1, 1),
              ("<t>a</t><a>A. red B. green C. blue D. yellow</a>", "A", COLOURS, 0, 1)]
    for text, gold, choices, accuracy, form in cases:
        parts = reward_parts(tags(text), gold, choices)
        assert parts == {"accuracy": accuracy, "format": form, "total": parts["total"]}, (text, parts)
        assert abs(parts["total"] - (0.9 * accuracy + 0.1 * form)) < 1e-12
    good = tags("<t>a</t><a>7</a>")
    assert reward_parts(good, "7", finished=False) == {"accuracy": 0.0, "format": 0.0, "total": 0.0}
    assert reward_parts(good, "7", format_weight=0.0)["total"] == 1.0
    assert abs(reward_parts(good, "8", format_weight=0.3)["total"] - 0.3) < 1e-12
    for text in WELL_FORMED + MALFORMED:
        assert format_ok(tags(text)) is (text in WELL_FORMED), text


# ---- attribute.py

def chain(problem, steps, answer="none", text=None):
    """A finished, wrong rollout of the given steps (or of a whole text)."""
    codec = tiny_codec()
    text = text or "<think>" + "\n".join(steps) + f"</think><answer>{answer}</answer>"
    ids = rollout.token_ids(rollout.escape_special(text, codec), codec) + [codec.eos_ids[0]]
    prompt = rollout.encode_prompt(problem, codec)
    return replace(split_trajectory(ids, codec, problem, prompt), text=text, rewards={"accuracy": 0.0})


def split_trajectory(ids, codec, problem=None, prompt=None):
    """The rollout of these tokens, with its steps."""
    t = rollout.make_trajectory(problem, prompt, [], ids, [-0.5] * len(ids), codec)
    t.steps = attribute.split_steps(ids, codec)
    return t


TABLE = "$$\n\\begin{aligned} a &= b \\\\[4pt]\n\nc &= d \\end{aligned}\n$$"
ANGLE = "1. The angle at A is 40°:\n   - it is marked in the figure\n   - its arc is red"
STEPS = [               # a completion, its steps; first in the ways of Qwen2.5-VL: lists, headers, formulas
    ("To find the total, look at each shelf.\n\n1. **Top shelf**: There are 3 books.\n2. **Middle shelf**: "
     "There are 5 books.\n3. **Bottom shelf**: 4 books.\n\nAdding them gives 3 + 5 + 4 = 12.\n\n"
     "The answer is 12.",
     ["To find the total, look at each shelf.", "1. **Top shelf**: There are 3 books.",
      "2. **Middle shelf**: There are 5 books.", "3. **Bottom shelf**: 4 books.",
      "Adding them gives 3 + 5 + 4 = 12."]),
    (ANGLE + "\n\n2) The angle at B is 60°.\n3) So the angle at C is 80°.\n\nThus the answer is \\boxed{80}",
     [ANGLE, "2) The angle at B is 60°.", "3) So the angle at C is 80°."]),
    ("### Step 1: Read the legend\nBlue stands for rain.\n\n### Step 2: Read the bar\nIt is 12 mm high.\n\n"
     "### Final Answer\n\\boxed{12}",
     ["### Step 1: Read the legend\nBlue stands for rain.", "### Step 2: Read the bar\nIt is 12 mm high."]),
    ("**Triangle ABC**\nAB = 5 and BC = 12.\n\n**Pythagoras**\n\\[\nAC = \\sqrt{5^2 + 12^2}\n= 13\n\\]\n",
     ["**Triangle ABC**\nAB = 5 and BC = 12.", "**Pythagoras**\n\\[\nAC = \\sqrt{5^2 + 12^2}\n= 13\n\\]"]),
    # R1-VL: a description, then headers
    ("### Image Description:\nA pie chart with 4 parts.\n### Rationales:\nThe parts add up to 100 %.\n"
     "### Let's think step by step.\n\n### Step 1:\nRed is 40 %.\n\n### Step 2:\nBlue is 25 %.\n\n"
     "### The final answer is: 35 %",
     ["### Image Description:\nA pie chart with 4 parts.", "### Rationales:\nThe parts add up to 100 %.",
      "### Let's think step by step.", "### Step 1:\nRed is 40 %.", "### Step 2:\nBlue is 25 %."]),
    ("<think>\nSee.\n**Step 1:** look\n3.\n\nStepping on.\n  STEP 2 -\n$$\n3 + 4\n$$\n## step 10."
     "\n\nAnswer: 7</think>",
     ["See.", "**Step 1:** look\n3.\n\nStepping on.", "STEP 2 -\n$$\n3 + 4\n$$", "## step 10."]),
    # Vision-R1: one long paragraph that talks to itself
    ("<think>Okay, let's see. The triangle has a right angle at B. Wait, is it B? Yes, the little square is "
     "at B. So AC is the hypotenuse. Hmm, AB is 6 and BC is 8. Then AC = 10.</think>\n<answer>10</answer>",
     ["Okay, let's see.", "The triangle has a right angle at B.", "Wait, is it B?",
      "Yes, the little square is at B.", "So AC is the hypotenuse.", "Hmm, AB is 6 and BC is 8.",
      "Then AC = 10."]),
    ("<think>\nOkay, so I need to find x. The side is 3.5 cm, as Fig. 2 shows, i.e. 35 mm. Then $x = 1. 5$ "
     "holds.\n</think>\n\n**Final Answer**\n\\boxed{5}",
     ["Okay, so I need to find x.", "The side is 3.5 cm, as Fig. 2 shows, i.e. 35 mm.",
      "Then $x = 1. 5$ holds."]),
    ("<think>Let me check! \"It is red.\" That is what the sign says. But (by the key) red means hot. "
     "Right?</think>",
     ["Let me check!", "\"It is red.\"", "That is what the sign says.", "But (by the key) red means hot.",
      "Right?"]),
    ("<think>The radius is \\(r = 2. 0\\). So the area is \\(4\\pi\\). The answer is 4π.</think>",
     ["The radius is \\(r = 2. 0\\).", "So the area is \\(4\\pi\\)."]),
    ("<think>1. Count the red ones. 2. Count the blue ones. There are 7.</think>",
     ["1. Count the red ones.", "2. Count the blue ones.", "There are 7."]),
    ("<think>图中有三只猫。左边的是黑色的！所以答案是三。</think>", ["图中有三只猫。", "左边的是黑色的！", "所以答案是三。"]),
    ("<think>Dr. Lee stands left of Eq. 3 vs. The others sit... So two stand.</think>",
     ["Dr. Lee stands left of Eq. 3 vs. The others sit...", "So two stand."]),
    # OpenVLThinker: paragraphs
    ("<think>\nThe graph rises until 2014. It then falls.\n\nThe peak is 80.\n\nThe lowest point is 2018. It "
     "has 30 units.\n\nSo the difference is 50.\n\nThe final answer is 50.\n</think>\n<answer>50</answer>",
     ["The graph rises until 2014. It then falls.", "The peak is 80.",
      "The lowest point is 2018. It has 30 units.", "So the difference is 50."]),
    (f"<think>See:\n{TABLE}\n\\[\n3\n\\]\nSo\n\\[ x \\]\nand \\[ y\n= 2 \\].\nEnd.</think>",
     ["See:", TABLE, "\\[\n3\n\\]", "So", "\\[ x \\]", "and \\[ y\n= 2 \\].", "End."]),
    # the tiny model, open and closing tags alone, and what is hardly a chain
    ("<think>red 4 6\nblue 3 5</think><answer>red 6 blue 5</answer>", ["red 4 6", "blue 3 5"]),
    ("<think>So the answer is 7.</think><answer>7</answer>", []),
    ("<think>The correct answer: 7\n</think>", []), ("Answer: B", []),
    ("<think>The answer depends on the height.\nIt is 5.</think>",
     ["The answer depends on the height.", "It is 5."]),
    ("well\n<think>red 4\nblue", ["red 4", "blue"]),
    ("red 4\nblue 5\n</think><answer>7</answer>", ["red 4", "blue 5"]),
    ("<think>red 4\nblue 5<answer>7</answer></think>", ["red 4", "blue 5"]),
    ("</think> so <think>red 4\nblue 5", ["red 4", "blue 5"]),
    ("<think>∠ABC = 60°\n√2, é🙂👩\u200d👧\n\u202e\u05d0 a\u2028b</think><answer>5</answer>",
     ["∠ABC = 60°", "√2, é🙂👩\u200d👧", "\u202e\u05d0 a\u2028b"]),
    ("<think></think><answer>7</answer>", []), ("<think>\n \n\t\n</think>", []), ("", []), ("\n", []),
    ("<think>", []), ("<answer>7</answer>", [])]


def segmentation(codec):
    """Texts and their steps, of whose tokens each has its own; an end token is no part of the last one."""
    for text, want in STEPS:
        ids = rollout.token_ids(text, codec)
        steps = attribute.split_steps(ids, codec)
        assert [step.text for step in steps] == want, (text, steps)
        assert attribute.split_steps(ids + [codec.eos_ids[0]], codec) == steps
        for step, following in zip(steps, steps[1:] + steps[-1:]):
            assert step.stop == following.start or step is following        # nothing between them is lost


def test_segmentation_table():
    segmentation(tiny_codec())
    segmentation(qwen_like_codec())


def test_segmentation_knows_what_claims_nothing():
    for text in ("Let me check.", "Okay, let's see.", "Hmm.", "So, let's look at the figure again.", "Wait,",
                 "### Let's think step by step.", "I need to look at the image.", "Well, let me think"):
        assert attribute.claims_nothing(text), text
    for text in ("Let me see: it is red.", "So the cat sleeps.", "Wait, is it B?", "First look.", "Now 4 + 3",
                 "Let me count: 4", "red 4", "The cat", "To find x, use $y$", "So AC is long."):
        assert not attribute.claims_nothing(text), text


def test_segmentation_of_hostile_texts():
    """In time whatever a policy may sample, control tokens and broken characters among it."""
    codec, rng, cases = tiny_codec(), random.Random(0), []
    for text, count in (("x" * 9000, 1), ("\n" * 3000, 0), ("a\n" * 3000, 3000), ("\t\n " * 5000, 0),
                        ("é中\u202e\U0001f642\x00\r\u2028\ud7ff" * 1500, 1), ("<think>" * 3000, 1),
                        ("$$\n" * 3000, 1500), ("\\[" * 5000, 1), ("Step 1\n" * 3000, 3000),
                        ("### Step " * 2000, 1), ("</think>" * 3000, 0), ("A. " * 3000, 3000),
                        ("1. a\n" * 2000, 2000), ("answer\n" * 2000, 0), ("\\(" * 4000, 1),
                        ("\\boxed{ " * 3000, 0), ("$a. " * 3000, 1)):
        cases.append((rollout.token_ids(text, codec), count))
    for _ in range(50):
        some = rng.choices(range(len(codec.tokenizer)), k=150) + rollout.token_ids("\n" * 50, codec)
        cases.append((rng.choices(some, k=200), None))
    for ids, count in cases:
        started, end, begins = time.process_time(), 0, codec.tokenizer.decode(ids[:10])
        steps = attribute.split_steps(ids, codec)
        assert time.process_time() - started < 3 and count in (None, len(steps)), (begins, len(steps))
        for step in steps:
            assert end <= step.start < step.stop <= len(ids) and step.text
            end = step.stop


def test_segmentation_gives_a_token_to_the_step_of_its_first_character():
    """Tokens that reach over a line break or a tag, and characters of several tokens."""
    for tokens, want in (
            (b"<think|>\n|a| b.\n|c d|.\n\n|e|.</|think>|f", [(2, 4, "a b."), (4, 6, "c d."), (6, 8, "e.")]),
            (b"<think>a|b.\nc| d|\n|e|</think>", [(1, 2, "ab."), (2, 4, "c d"), (4, 5, "e")]),
            (b"a|\nb\nc|\nd|e", [(0, 2, "a"), (2, 3, "c"), (3, 4, "de")]),                  # b has no token
            (b"<think>|\xe8\xa7|\x92 9.</|think>", [(1, 3, "角 9.")]),
            (b"\xe8\xa7|\x92|.\nb| c", [(0, 3, "角."), (3, 4, "b c")])):
        pieces = tokens.split(b"|")

        def decode(ids):
            return b"".join(pieces[i] for i in ids).decode("utf-8", "replace")

        codec = SimpleNamespace(tokenizer=SimpleNamespace(decode=decode), eos_ids=(-1,))
        ids = list(range(len(pieces)))
        steps = attribute.split_steps(ids, codec)
        assert [(step.start, step.stop, step.text) for step in steps] == want, steps
        for step in steps:                                  # the tokens that lie in the text as a whole
            inner, rest, after = attribute.parts_of(step, ids, codec)
            assert step.text.endswith((decode(range(step.start, step.start + inner)) + rest).lstrip())
            assert decode(range(step.start + inner, step.stop)) == rest + after


def test_screening_leaves_out_what_cannot_be_located():
    p = mixed_problems()[0]
    good = chain(p, ["red 4", "blue 5"], "red 4")
    choice = replace(p, choices=["cat", "dog", "cow"], answer="A")
    kept = replace(good, problem=choice, text="<think>red 4\nblue 5</think><answer>B</answer>")
    for t in (replace(good, rewards={"accuracy": 1.0}), replace(good, finished=False), chain(p, ["red 4"]),
              chain(p, []), replace(good, text="<think>red 4\nblue 5</think><answer></answer>"),
              replace(good, text="<think>red 4\nblue 5"), replace(kept, text="<answer>F</answer>")):
        assert attribute.locatable_failures([good, t, kept]) == [good, kept], t.text
    right = chain(p, ["red 4"], p.answer)
    assert attribute.is_right(right) and not attribute.is_right(replace(right, finished=False))
    assert not attribute.is_right(replace(right, text=right.text + "<answer>no</answer>"))


def test_reader_check_is_a_difference():
    """Suspect is what policy or language found easy and the reader does not, where the image has a say."""
    easy, hard, rare = -0.1, -3.1, -4.0
    for mu, seen, masked, say, sampled, gap, token in (
            ([easy] * 3, [-0.2, hard, -2.1], [easy, hard, -5.0], [9, 9, 9], [1, 1, 1], 3.0, 1),
            ([rare] * 3, [rare, -4.2, rare], [rare, -9.0, -0.5], [9, 9, 9], [1, 1, 1], 3.5, 2),
            ([rare, easy, easy], [rare, easy, easy], [rare, easy, easy], [9, 9, 9], [1, 1, 1], 0.0, None),
            ([easy] * 3, [-0.5, -0.59, -0.55], [-9.0] * 3, [9, 9, 9], [1, 1, 1], 0.49, None),
            ([easy] * 3, [hard, hard, -0.2], [hard] * 3, [0.4, 0.0, 0.6], [1, 1, 1], 0.1, None),    # a name
            ([0.0, 0.0, easy], [-9.0, -9.0, easy], [-1.0] * 3, [9, 9, 9], [0, 0, 1], 0.0, None)):   # forced
        t = four_steps()
        t.logps[4:7], t.sampled[4:7] = mu, sampled
        check = attribute.check_of(t.steps[1], t, list(zip(seen, masked, say)))
        close(check.gap, gap, 1e-6)
        assert check.token == token and check.is_suspect == (token is not None), (mu, seen)


def test_reader_reads_a_step_without_its_chain():
    """read_steps against a plain forward of context and step, with the image and with it masked, in any order
    and any number at once; the context is the opening and the last `window` steps."""
    net, codec, claims, want = random_model(spread=0.12), tiny_codec(), [], []

    def grey(image, config):
        values, grid = m.preprocess_image(image, config)
        return 0 * values, grid                             # the mean colour

    for p in mixed_problems():
        t = chain(p, ["red 4 6", "blue 1", *p.key_steps, "a longer step: red 4, so 12."])
        for k, window in ((0, 1), (2, 0), (2, 1), (3, 2), (3, 9)):
            before = t.ids[:t.steps[0].start] + t.ids[t.steps[max(0, k - window)].start:t.steps[k].start]
            assert attribute.Verifier(net, codec, window).context(t, k) == before
            step = t.ids[t.steps[k].start:t.steps[k].stop]
            claims.append((t.prompt, tuple(before), tuple(step)))
            seen = uncached(net, codec, p, before + step)[len(before):]                             # (T, V)
            with swapped(rollout, "preprocess_image", grey):
                masked = uncached(net, codec, p, before + step)[len(before):]
            own = torch.arange(len(step)), torch.tensor(step)
            say = F.kl_div(masked.clamp(min=-1e4), seen.clamp(min=-1e4), reduction="none", log_target=True)
            want.append(torch.stack((seen[own], masked[own], say.sum(-1)), dim=-1))                 # (T, 3)
    order = random.Random(0).sample(range(len(claims)), len(claims))
    for budget, part in ((16384, order), (60, order), (1, order[:5])):
        found = attribute.read_steps(net, codec, [claims[i] for i in part], {}, budget)
        assert set(found) == {claims[i] for i in part}
        for i in part:
            close(found[claims[i]], want[i], 1e-3)


def test_reader_reads_each_claim_once():
    net, codec, (a, _, _, b) = random_model(), tiny_codec(), mixed_problems()
    first = chain(a, ["red 4", "blue 5", "Let me check."])
    second = replace(chain(a, ["red 4", "lime 1"]), prompt=first.prompt)
    verifier, texts = attribute.Verifier(net, codec), [first, second, chain(b, []), chain(b, ["red 4"])]
    verifier(texts)
    assert verifier.tokens == 4 and texts[2].checks == []   # a: red, blue, lime; b: red; nothing is claimed
    assert first.checks[2] == attribute.Check(0.0)
    for t in texts:
        for k, step in enumerate(t.steps[:2]):
            stop = step.start + attribute.parts_of(step, t.ids, codec)[0]
            claim = t.prompt, tuple(verifier.context(t, k)), tuple(t.ids[step.start:stop])
            assert step.text.endswith(codec.tokenizer.decode(claim[2])) and verifier.claim(t, k) == claim
            readings = attribute.read_steps(net, codec, [claim], {})[claim]
            close(t.checks[k].gap, attribute.check_of(step, t, readings).gap, 1e-4)
    known, verifier.reader = [list(t.checks) for t in texts], None      # from here on nothing can be read
    verifier(texts[::-1])
    assert [t.checks for t in texts] == known and verifier.tokens == 4


def test_reader_is_the_frozen_start():
    """start: the weights the run began with, whatever the policy learns, shared with the KL's reference;
    policy: the policy itself; a folder: that checkpoint, if its tokenizer is the same."""
    with scratch() as folder:
        for beta in (0.0, 0.1):
            trainer = small_trainer(folder / "a", beta=beta, rectify_below=1.0, lr=1e-3)
            before = [p.clone() for p in trainer.model.parameters()]
            for _ in range(2):
                trainer.rl_step()
            assert all(map(torch.equal, trainer.reader.parameters(), before))
            assert not all(map(torch.equal, trainer.model.parameters(), before))
            assert (trainer.reader is trainer.reference) == (beta > 0)
            assert not any(p.requires_grad for p in trainer.reader.parameters())
        trainer = small_trainer(folder / "b", reader="policy")
        assert trainer.reader is trainer.model and small_trainer(folder / "c", algo="grpo").reader is None
        other = folder / "other"
        shutil.copytree(TINY, other)
        assert small_trainer(folder / "d", reader=str(other)).reader is not None
        words = json.loads((other / "tokenizer.json").read_text())
        words["added_tokens"][-1]["content"] = "<other>"
        (other / "tokenizer.json").write_text(json.dumps(words))
        raises(ValueError, ["--reader", "tokenizer"], small_trainer, folder / "e", reader=str(other))


# ---- rereason.py

GOOD = attribute.Check(0.5)               # a larger gap is suspect
BAD = attribute.Check(2.0, 1)


def planted(kind="tiles", steps=6, wrong=(1, 4), index=0):
    """A failed rollout with wrong readings at the given steps, written with ease."""
    p, readings = shapes.make_problem(kind, steps, "short", "heldout", 11, index), {}
    for k in wrong:
        others = [value for value in shapes.wrong_values(p.oracle, p.oracle["ask"][k]) if value]
        readings[k] = others[k % len(others)]
    lines = shapes.chain(p.oracle, readings)
    return replace(chain(p, lines, shapes.answer_from_steps(p.oracle, lines)), checks=[GOOD] * steps)


def four_steps(**changes):
    """A trajectory with a step at 1-4, 4-7, 7-10 and 10-13, and an answer."""
    steps = [attribute.Step(n, n + 3, f"red {n}") for n in (1, 4, 7, 10)]
    t = rollout.Trajectory(rollout.Problem("p", "q", "99 9", []), None, list(range(17)), [1] * 17, [0.0] * 17,
                           True, "<think>red</think><answer>77</answer>", steps=steps, checks=[GOOD] * 4)
    return replace(t, **changes)


def repair(t, **changes):
    return rereason.Repair(**{"source": t, "trajectory": t, "key": "key", "median_length": 50.0, **changes})


def rectified(sources, policy=None, window=1, **rules):
    verifier, repairs = attribute.Verifier(tiny_model(), tiny_codec(), window), []
    for t in sources:
        repairs.append(repair(replace(t, checks=None), key=str(t.ids), median_length=len(t.ids)))
    verifier([r.trajectory for r in repairs])
    rereason.rectify(policy or tiny_model(), tiny_codec(), repairs, verifier, 120, rereason.Rules(**rules))
    return repairs


@functools.lru_cache
def loop_results():
    """A dozen planted failures, another policy than the reader, and what the loop made of them."""
    policy, sources = m.load_model(TINY).eval(), []
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.model.layers[-1].parameters():
            p.add_(0.2 * p.abs().mean() * torch.randn(p.shape, generator=noise))
    for kind, index, wrong in itertools.product(("tiles", "bars"), range(2), ((1,), (0, 3), (2, 4))):
        t = planted(kind, 5, wrong, index)
        t.logps = uncached_logps(policy, tiny_codec(), t.problem, t.ids)        # as if sampled ...
        for k in wrong:                                                         # ... and the errors with ease
            for n in range(t.steps[k].start + 1, t.steps[k].stop):
                t.logps[n] = -0.1
        sources.append(t)
    return sources, rectified(sources, policy), policy


def test_revision_repairs_planted_errors_one_by_one():
    sources, repairs, _ = loop_results()
    codec, two, done = tiny_codec(), [], [r for r in repairs if r.outcome == "repaired"]
    assert len(done) >= 8, [r.outcome for r in repairs]
    for r in done:
        t, source = r.trajectory, r.source
        assert attribute.is_right(t) and t.finished and codec.tokenizer.decode(t.ids[:-1]) == t.text
        assert len(t.ids) == len(t.logps) == len(t.sampled) and t.steps == attribute.split_steps(t.ids, codec)
        assert shapes.verdicts(t) == ["true"] * 5
        assert len(source.logps) == len(source.ids) and not attribute.is_right(source), "it stays what it was"
        if len(r.edited_steps) == 2 == r.num_revisions and r.failures == 0:
            two.append(r.tokens)
    assert min(two) < 0.9 * len(done[0].source.ids), "later steps are kept"


def test_revision_logps_are_those_of_the_model_and_context_a_token_came_from():
    """The stem's stay the policy's; the new tokens' are the reader's, without the chain."""
    (_, repairs, policy), codec, revised, differ = loop_results(), tiny_codec(), 0, 0.0
    for r in repairs:
        if r.outcome == "repaired" and len(r.edited_steps) == r.num_revisions == 1:
            t, source, k = r.trajectory, r.source, r.edited_steps[0]
            first = next(n for n, (a, b) in enumerate(zip(t.ids, source.ids)) if a != b)
            revised += 1
            assert t.steps[k].start < first < t.steps[k].stop and t.logps[:first] == source.logps[:first]
            before = attribute.Verifier(tiny_model(), codec).context(t, k)
            stop = t.steps[k].stop - 1                      # the line break may be the old one
            words = before + t.ids[t.steps[k].start:stop]
            want = uncached_logps(tiny_model(), codec, t.problem, words)[first - stop:]
            close(t.logps[first:stop], want)
            clean, tail = uncached_logps(policy, codec, t.problem, t.ids), t.steps[-1].stop
            differ += sum(abs(a - b) for a, b in zip(want, clean[first:stop]))
            while t.ids[tail] == source.ids[tail]:
                tail += 1
            close(t.logps[tail:], clean[tail:])             # continued in the clean context
            close(rereason.log_weights(policy, codec, [t])[0], torch.tensor(clean) - torch.tensor(t.logps))
    assert revised and differ > 0.005, f"policy and reader would not be told apart: {differ}"


def test_revision_prompts_are_the_questions():
    """A prompt is the problem's own chat, a forced prefix a piece of the chain: no answer leaks."""
    seen, sample = [], rollout.sample

    def recording(model, problems, codec, *rest):
        seen.extend(zip(problems, rest[4], rest[5]))
        return sample(model, problems, codec, *rest)

    with swapped(rollout, "sample", recording):
        rectified(loop_results()[0][:3])
    assert len(seen) > 4
    for p, prefix, prompt in seen:
        text = tiny_codec().tokenizer.decode(prefix)
        assert prompt.ids == rollout.encode_prompt(p, tiny_codec()).ids
        assert text.startswith("<think>") or not text
        if p.task != "bars":                                # their answer is the chain itself
            assert "</think>" in text or p.answer not in " ".join(text.split())


def test_next_action_table():
    some = {"finished": False}
    for check, edited, failures, options, *want in (
            # of the second step; then action, where, failures, edited steps
            (BAD, [], 0, {}, "revise", 1, 0, [1]), (BAD, [0], 0, {}, "revise", 1, 0, [0, 1]),
            (BAD, [1], 0, some, "revise", 1, 1, [1, 1]), (BAD, [2], 0, {}, "revise", 1, 1, [2, 1]),
            (GOOD, [2], 0, some, "continue", 17, 0, [2]), (GOOD, [], 0, some, "continue", 17, 0, []),
            (BAD, [], 4, {}, "revise", 1, 4, [1]), (BAD, [], 5, {}, "give up", 0, 5, []),
            (BAD, [1], 4, {}, "give up", 0, 5, [1]), (BAD, [], 0, {"steps": []}, "give up", 0, 0, []),
            (BAD, [], 0, {"tokens": 100}, "revise", 1, 0, [1]),
            (BAD, [], 0, {"tokens": 101}, "give up", 0, 0, []),
            (GOOD, [], 0, {}, "continue", 13, 0, [4]), (GOOD, [1], 0, {}, "continue", 13, 1, [1, 4]),
            (BAD, [], 0, {"revise": False}, "continue", 4, 0, [1]),
            (BAD, [], 0, {"confirmed": {(4, 5, 6)}}, "continue", 13, 0, [4])):
        t = four_steps(checks=[GOOD, check, GOOD, GOOD])
        t.finished, t.steps = options.get("finished", True), options.get("steps", t.steps)
        r = repair(t, failures=failures, tokens=options.get("tokens", 0), edited_steps=list(edited),
                   confirmed=options.get("confirmed", set()))
        found = rereason.next_action(r, rereason.Rules(revise=options.get("revise", True)))
        assert [*found, r.failures, r.edited_steps] == want, (check, edited, failures, options, found)


def replies(ids, asked):
    """Stands for rereason.sample_on: each request is continued by `ids`, up to its limit."""
    def sample_on(model, codec, requests, temperature=1.0, stop_ids=None):
        found = []
        for n, (problem, prompt, key, prefix, limit) in enumerate(requests):
            how = (temperature[n], stop_ids[n]) if stop_ids else (temperature, None)
            asked.append((key, prefix, limit, *how))
            new = ids[:limit - len(prefix)]
            found.append([rollout.make_trajectory(problem, prompt, prefix, new, [-0.2] * len(new), codec)])
        return found
    return sample_on


def test_revision_table():
    """What the reader is asked; a first choice that is what stands there confirms it; a reply that holds no
    whole step, or again the same, goes back one step."""
    codec, t = tiny_codec(), planted(steps=5)
    lines = [step.text for step in t.steps]
    for k, token, edited, text, want in (
            (3, 1, [3], " 3 2\n", "changed"), (3, None, [3], "red 3 2\n", "changed"),
            (3, 3, [1], " 1\n", "changed"), (4, 1, [4], " 3 2</think>", "changed"),
            (3, 1, [3, 3], " 3 2\n", "changed"),
            (3, 1, [3], "same\n", "confirmed"), (3, 1, [3, 3], "same\n", "nothing new"),
            (3, None, [3], "same\n", "confirmed"), (3, 1, [3], " 3 2", "nothing new"),
            (0, 1, [0], " 3 2 3", "nothing new")):
        check, step = attribute.Check(2.0, token), t.steps[k]
        stem = step.start + (token or 0)
        if text == "same\n":
            text = codec.tokenizer.decode(t.ids[stem:step.stop])
        r, asked, verified = repair(replace(t, checks=[GOOD] * k + [check] + [GOOD] * (4 - k))), [], []
        r.edited_steps, verifier = list(edited), attribute.Verifier(None, codec, 0)
        with (swapped(rereason, "sample_on", replies(rollout.token_ids(text, codec), asked)),
              swapped(attribute.Verifier, "__call__", lambda self, ts: verified.extend(ts)),
              swapped(rereason, "resume_points", lambda *args: args[2])):
            points = rereason.revise_steps(None, codec, [(r, k)], verifier, 7, rereason.Rules())
        prefix = t.ids[:t.steps[0].start] + t.ids[step.start:stem]
        temperature = 0.0 if edited == [k] else 1.0
        limit = len(prefix) + 16 + 2 * (step.stop - step.start)
        assert asked == [("key/revise/7", prefix, limit, temperature, codec.newline_ids)]
        new, back = r.trajectory, max(0, k - 1)
        if want == "changed":
            assert verified == [new] and points == [(r, k, stem)] and r.num_revisions == 1
            whole = codec.tokenizer.decode(t.ids[step.start:stem]) + text
            lines_now = lines[:k] + [whole.partition("\n")[0].partition("</")[0]] + lines[k + 1:]
            assert [s.text for s in new.steps] == lines_now and not r.answer_is_current
            assert len(new.ids) == len(new.logps) == len(new.sampled)
        else:
            assert new.ids == t.ids and not verified and r.num_revisions == 0
            assert points == ([(r, t.steps[back].start)] if want == "nothing new" else [])
            assert r.failures == (want == "nothing new") and len(r.confirmed) == (want == "confirmed")
            edited = edited[:-1] + [back] * (want == "nothing new")
        assert r.edited_steps == edited


SEAM_ENDS = ("\n", "\n\n", ".\n", ".\n\n", "!\n\n", ".</", "</", ")\n", ")</", " \n", " cm.\n", "°\n", "\n  ")


def seams(codec, count: int) -> int:
    """Of random chains a step is rewritten: the ids are those that the tokenizer gives the new text, what
    models wrote keeps its log-prob, the forced rest has none, other steps survive. Returns how many were."""
    done, token_ids, decode = 0, functools.partial(rollout.token_ids, codec=codec), codec.tokenizer.decode
    for seed in range(count):
        rng = random.Random(seed)
        between = rng.choice(("\n", "\n\n", "\n  ", "\n\n\n", " "))      # blank lines, indentation, sentences
        in_lines, lines = between != " ", []
        for _ in range(rng.randint(3, 6)):
            what = f"The {rng.choice(('red tile', 'blue bar', 'cat'))} {rng.choice(('shows', 'is'))} "
            what += f"{rng.randint(0, 120)}" + rng.choice(("", " cm", ")", "°")) * in_lines
            lines.append(what + rng.choice((".", "!") + ("",) * in_lines))
        new_line = lines.pop()
        head, tail = rng.choice(("<think>", "<think>\n", "")), rng.choice(("</think>", "\n</think>\n\n"))
        ids = token_ids(head + between.join(lines) + tail + "<answer>7</answer>") + [codec.eos_ids[0]]
        t, k = split_trajectory(ids, codec), rng.randrange(len(lines))
        assert [step.text for step in t.steps] == lines
        inner, _, _ = attribute.parts_of(t.steps[k], ids, codec)    # suspect is a token of the text
        start, stop = t.steps[k].start, t.steps[k].stop
        stem, gap, whole = rng.randrange(start, start + inner), " so ", decode(ids[start:stop])
        if not decode(ids[start:stem]).strip():             # with the white space that the step begins with
            stem, gap = start, whole[:len(whole) - len(whole.lstrip())]
        ends = ("\n", "\n\n", "</think>", "</", " \n", "<|im_end|>") if in_lines else (" The cat", "</think>")
        end = rng.choice(ends)
        written = token_ids(decode(ids[:stem]) + gap + new_line + end)
        if written[:stem] != ids[:stem]:                    # a model would not have gone on like this
            continue
        new = attribute.replace_end(t, k, stem, written[stem:], [-0.75] * (len(written) - stem), codec)
        if new is None:
            continue
        done += 1
        assert new.ids == token_ids(new.text) + [codec.eos_ids[0]], (new.text, list(map(decode, new.ids)))
        for mu, is_sampled in zip(new.logps, new.sampled, strict=True):
            assert mu in ((-0.5, -0.75) if is_sampled else (0.0,))
        assert len(new.ids) == len(new.logps) and new.sampled.count(0) <= 8
        assert [step.text for step in new.steps] == lines[:k] + [new.steps[k].text] + lines[k + 1:]
        before, after = head + between.join(lines[:k] + [""]), between.join(["", *lines[k + 1:]])
        after = after if k + 1 < len(lines) else tail
        if end in ("\n", "\n\n", " \n") and after.startswith("\n"):
            after = end + after.lstrip("\n")                # the new step's own line break
        assert new.text.startswith(before + new.steps[k].text + after), (new.text, after)
    return done


def test_seams_are_the_tokenizers_own():
    assert seams(tiny_codec(), 300) > 100 and seams(qwen_like_codec(), 600) > 200


def test_seams_leave_what_a_model_sampled():
    """Unusual tokens elsewhere stay as they are; words that spell a control token stay words."""
    codec, ids = tiny_codec(), []
    for piece in "<think>|red 4 6|\n|b|lue| 3 5|\n|teal 9 1|</think>|<answer>7</answer>".split("|"):
        ids += rollout.token_ids(piece, codec)
    assert ids != rollout.token_ids(codec.tokenizer.decode(ids), codec)
    ids.append(codec.eos_ids[0])
    t, new_ids = split_trajectory(ids, codec), rollout.token_ids(" 2 4\n", codec)
    for k in (0, 2):
        stem = t.steps[k].start + 1
        new = attribute.replace_end(t, k, stem, new_ids, [-0.75] * len(new_ids), codec)
        count = len(new_ids) - (k == 2)                     # the last step has no line break of its own
        want = ids[:stem] + new_ids[:count] + ids[stem + count:]
        assert new.ids == want and new.logps.count(-0.75) == count and set(new.sampled) == {1}
    codec, ids = qwen_like_codec(), []
    for piece in ("red 4", "<", "/", ">", " 6"):
        ids += rollout.token_ids(piece, codec)
    control, = rollout.token_ids("</>", codec)
    for place in range(1, len(ids)):
        mended = list(ids)
        attribute.mend_seam(mended, [-0.1] * len(ids), [1] * len(ids), place, codec)
        assert control not in mended


def test_resume_points_table():
    """After step 0 was revised from token 1 on: what is likely stays until a check fails or a token is not."""
    for checks, unlikely, finished, want in (
            ([GOOD] * 4, {8: -3.0, 1: -9, 15: -3.0}, True, None), ([GOOD] * 4, {}, False, 17),
            ([GOOD] * 4, {2: -3.1, 8: -9}, True, 2), ([GOOD, GOOD, BAD, GOOD], {3: -4}, True, 3),
            ([GOOD, GOOD, BAD, GOOD], {}, True, "revise"), ([GOOD, BAD, GOOD, GOOD], {5: -4}, True, "revise"),
            ([BAD, GOOD, GOOD, GOOD], {}, True, "revise"), ([GOOD, GOOD, BAD, GOOD], {5: -4}, True, 4),
            ([GOOD] * 4, {8: -3.1}, True, 7), ([GOOD] * 4, {15: -3.1}, True, 15)):
        r, log_w = repair(four_steps(checks=checks, finished=finished)), [0.0] * 17
        for n, value in unlikely.items():
            log_w[n] = value
        with swapped(rereason, "log_weights", lambda *args: [log_w]):
            points = rereason.resume_points(None, None, [(r, 0, 1)], rereason.Rules())
        assert points == ([(r, want)] if isinstance(want, int) else []), (checks, unlikely)
        assert r.answer_is_current == (want is None)


def test_rejection_reason_table():
    """Of a trajectory whose first new token is 4."""
    bad, ids = {"text": "no"}, {"ids": [0, 1, 2, 3, *range(104, 117)]}
    forced = {"sampled": [1] * 5 + [0] * 12}
    for changes, source, median, log_w, want in (
            ({}, {}, 17, {}, ""), ({}, {}, 16, {}, "too long"), (bad, {}, 17, {}, "not well-formed"),
            (bad, bad, 17, {}, ""), ({}, {}, 17, {5: -4.6}, "too unlikely"),
            ({}, {}, 17, {2: -9, 5: -4.5, 9: -4.5}, ""), ({}, {}, 17, {15: -6.1}, "too unlikely"),
            (forced, {}, 17, {4: -1.4, 5: -9}, ""), (forced, {}, 17, {4: -1.6}, "too unlikely"),
            ({"steps": []}, {}, 17, {0: -30}, "too unlikely")):
        r = repair(four_steps(**source), trajectory=four_steps(**changes, **ids), median_length=median)
        found = rereason.rejection_reason(r, [log_w.get(n, 0.0) for n in range(17)], rereason.Rules())
        assert found == want, (changes, source, median, log_w, found)
    r.trajectory, r.median_length = four_steps(**ids), 16
    assert not rereason.rejection_reason(r, [0.0] * 17, rereason.Rules(max_length_ratio=17 / 16))


def test_accept_asks_again_where_an_answer_can_be_guessed():
    for answer, options, want in (
            ("48", "", False), ("A", "ab", True), ("yes", "", True), ("20", "", True), ("21", "", False),
            ("cat", "", True), ("red 4", "", False), ("0.5", "", False), ("x^2", "", False)):
        assert reward.is_guessable(answer, list(options)) == want, answer
    for answer, votes, revisions, want in (
            ("A 1", 0, 1, "revised 1"), ("A", 2, 0, "restart"), ("A", 1, 1, "policy")):
        asked, text = [], f"<think>red</think><answer>{answer}</answer>"
        t = four_steps(problem=rollout.Problem("p", "q", answer, []), text=text,
                       ids=[0, 1, 2, 3, *range(104, 117)])

        def sample(model, problems, codec, *rest):
            asked.append(rest)
            return [[t] * votes + [four_steps()] * (3 - votes)]

        r = repair(four_steps(), trajectory=t, num_revisions=revisions, answer_is_current=True)
        with swapped(rollout, "sample", sample), swapped(rereason, "log_weights", lambda *args: [[0.0] * 17]):
            rereason.accept(None, None, [r], 99, rereason.Rules())
        assert t.provenance == want and r.outcome == ("a lucky guess" if want == "policy" else "repaired")
        assert want == "policy" or t.source is r.source
        assert asked == [(3, 99, 1.0, ["key/votes"], [t.ids[:13]], [None], None, [99])] * (answer == "A")
        assert r.tokens == 51 * len(asked)


def test_how_far_continue_sampling_samples():
    """So many steps ahead, or 8 tokens, within the limit."""
    codec, t = tiny_codec(), planted(steps=5)
    for k, most, ahead in ((2, 200, 3), (1, 200, 1), (2, 12, 2), (1, t.steps[1].start, 2)):
        r, asked, start = repair(t), [], t.steps[k].start
        with swapped(rereason, "sample_on", replies(t.ids[start:], asked)):
            rereason.continue_sampling(None, codec, [(r, start)], most, 3, rereason.Rules(ahead=ahead))
        if start >= most:
            assert r.outcome == "too long" and not asked
            continue
        limit = min(most, start + max(8, ahead * (t.steps[-1].stop // 5)))
        new, end = r.trajectory, min(limit, len(t.ids))
        assert asked == [("key/go on/3", t.ids[:start], limit, 1.0, None)] and r.tokens == end - start
        assert (new.steps[:k], new.ids, new.logps[:start]) == (t.steps[:k], t.ids[:end], t.logps[:start])
        assert r.answer_is_current == new.finished == (end == len(t.ids)) and r.turns[-1]["step"] == k


def test_hostile_chains_do_not_stop_the_loop():
    """Tags and control tokens in steps, steps without end, steps of several lines, options for an answer."""
    p, failures = planted().problem, []
    choice = replace(p, answer="A", choices=["x", "y", "z"])
    for problem, thoughts in ((p, "<image> 1 2\n<|im_end|> <image>\nred 4 6"), (p, "a b " * 30 + "\nred\n"),
                              (p, "Step 1: red\nis 4\nStep 2: blue\nis 5"), (choice, "red 4\nblue 5")):
        failures.append(chain(problem, [thoughts], "B"))
    assert attribute.locatable_failures(failures) == failures
    for window, revise in ((1, True), (0, True), (1, False)):
        assert all(r.outcome for r in rectified(failures, window=window, revise=revise))


def test_turns_and_company_of_a_repair():
    """What is not done after its turns is given up; what is repaired beside it changes nothing."""
    (sources, usual, policy), done = loop_results(), []
    for turns, some in ((0, (0, 1)), (3, range(6, 12)), (32, (11, 4, 7, 0))):
        repairs = rectified([sources[n] for n in some], policy, max_turns=turns)
        for r, n in zip(repairs, some):
            if r.outcome != "too many turns" or turns == 32:
                assert r.outcome == usual[n].outcome and r.trajectory.ids == usual[n].trajectory.ids
                assert r.tokens == usual[n].tokens
        done.append(sum(r.outcome == "repaired" for r in repairs))
    assert 0 == done[0] < done[1]


# ---- grpo.py, and which groups are rectified

def test_eq1_group_advantages():
    close(grpo.group_advantages(torch.tensor([[1.0, 0, 0, 0]])), [[0.75, -0.25, -0.25, -0.25]], 1e-6)
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    for row, plain, scaled in zip(rewards.tolist(), grpo.group_advantages(rewards),
                                  grpo.group_advantages(rewards, use_std=True)):
        mean = sum(row) / 8
        std = math.sqrt(sum((r - mean) ** 2 for r in row) / 7)
        close(plain, [r - mean for r in row], 1e-5)
        close(scaled, [(r - mean) / (std + 1e-4) for r in row], 1e-4)
    for shape in ((2, 4), (2, 1)):
        assert torch.equal(grpo.group_advantages(torch.ones(shape), True), torch.zeros(shape))


def loss_by_loops(logps, old, advantages, weights, normaliser, low, high, dual, beta, ref, rectified,
                  lambda_r, gamma):
    """Eq. (2) to (8), a token at a time."""
    total = 0.0
    for i, j in itertools.product(range(len(logps)), range(len(logps[0]))):
        a, omega = advantages[i, 0], weights[i, j]
        if omega == 0:
            continue
        ratio = (logps[i, j] - old[i, j]).exp()                                         # Eq. (2)
        if rectified[i, 0]:
            w = ratio if ratio < 10 else 10.0
            scale = (1 + gamma) ** 2 / gamma if gamma else 0
            f = scale * w / (w + gamma) - scale / (1 + gamma) + 1 if gamma else w       # Eq. (7)
            term = lambda_r * a * f
        else:
            clipped = max(1 - low, min(1 + high, ratio))
            term = min(ratio * a, clipped * a)                                          # Eq. (3)
            if a < 0:
                term = max(term, dual * a)                                              # Eq. (4)
        total = total - omega * term                                                    # Eq. (8)
        if beta:
            d = ref[i, j] - logps[i, j]
            total = total + beta * omega * (d.exp() - d - 1)                            # Eq. (5)
    return total / normaliser


def loss_inputs(seed=0):
    """logps, old, advantages, weights, ref (6, 9), rectified (6, 1). Some w of rectified rows are near the
    bound of 10 or above it; tokens without weight may have log-probs that are not finite."""
    g = torch.Generator().manual_seed(seed)
    logps = -torch.rand(6, 9, generator=g) * 3
    old = logps + torch.randn(6, 9, generator=g) * 0.7
    advantages = torch.tensor([[0.75], [-0.25], [-0.25], [0.5], [-2.0], [0.0]])
    weights = (torch.rand(6, 9, generator=g) > 0.3) * torch.rand(6, 9, generator=g).clamp(min=0.3)
    old[1, :4] = logps[1, :4] - torch.tensor([math.log(10.5), math.log(9.5), 3.0, -4.0])
    weights[1, :4] = torch.tensor([1.0, 1.0, 0.5, 0.7])
    old[2:5, 0], weights[2:5, 0] = -torch.inf, 0.0
    rectified = torch.tensor([[False], [True], [False], [True], [True], [False]])
    return logps, old, advantages, weights, logps + torch.randn(6, 9, generator=g) * 0.5, rectified


def same_as_loops(low=0.2, high=0.28, dual=3.0, beta=0.0, rectified=False, lambda_r=1.0, gamma=0.1):
    """Compare loss and gradient with the loops; returns the gradient."""
    logps, old, advantages, weights, ref, rows = loss_inputs()
    gradients = []
    for function in (grpo.policy_loss, loss_by_loops):
        x = logps.clone().requires_grad_()
        found = function(x, old, advantages, weights, 54, low, high, dual, beta, ref, rows & rectified,
                         lambda_r, gamma)
        loss = found[0] if isinstance(found, tuple) else found
        loss.backward()
        gradients.append(torch.cat([loss.detach().view(1), x.grad.flatten()]))
    close(*gradients, 1e-5)
    return x.grad


def loss_of_one(ratio, advantage, **kwargs):
    """Loss, diagnostics and gradient for one token."""
    x, one = torch.full((1, 1), float(ratio)).log().requires_grad_(), torch.ones(1, 1)
    loss, stats = grpo.policy_loss(x, 0 * one, advantage * one, one, 1.0, **kwargs)
    loss.backward()
    return loss.item(), stats, x.grad.item()


def test_eq2_to_eq4_policy_loss():
    for low, high, dual in ((0.2, 0.28, 3.0), (0.1, 0.5, 1.5), (0.2, 0.2, 100.0)):
        same_as_loops(low, high, dual)


def test_eq3_clip_higher():
    loss, stats, grad = loss_of_one(0.3 / 0.2, 0.75)                    # the header's worked example
    assert abs(loss + 0.96) < 1e-6 and grad == 0 and stats["clip_fraction"] == 1
    for ratio, advantage, limits, want in ((0.1, -1, {}, 1), (2, -1, {}, 0), (0.1, 1, {}, 0), (2, 0, {}, 0),
                                           (0.1, 0, {}, 0), (1, 1, {"clip_low": 0.0, "clip_high": 0.0}, 0),
                                           (1, -1, {"clip_low": 0.0, "clip_high": 0.0}, 0)):
        assert loss_of_one(ratio, advantage, **limits)[1]["clip_fraction"] == want, (ratio, advantage)


def test_eq4_dual_clip_bounds_the_push():
    loss, _, grad = loss_of_one(7.4, -1.0)
    assert loss == 3.0 and grad == 0


def test_eq5_k3_is_not_negative_unbiased_and_bounded():
    same_as_loops(beta=0.04)
    mean, p, q = 0.0, torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    for a, b in zip(p, q):
        k3 = loss_of_one(a, 0.0, beta=1.0, ref_logps=b.log().view(1, 1))[0]
        assert k3 >= 0
        mean += a.item() * k3
    close(mean, (p * (p / q).log()).sum(), 1e-5)
    for gap, want in ((30.0, math.exp(10) - 11), (-30.0, math.exp(-10) + 9)):
        loss, stats, _ = loss_of_one(1, 0.0, beta=1.0, ref_logps=torch.full((1, 1), gap))
        close([loss, stats["kl_ref"].item()], [want, want], 1e-2)


def test_eq6_step_credit():
    """The same in all, wherever the blame is put."""
    for faulty, want in (([(0, 2), (4, 5)], [1, 1, 0, 0, 1]), ([(2, 3)], [0, 0, 1, 0, 0]),
                         ([(0, 5)], [1] * 5)):
        weights = grpo.step_credit(5, faulty)
        close(weights, [1 + w * grpo.BLAME / sum(want) for w in want], 1e-9)
        close(sum(weights), 5 + grpo.BLAME, 1e-9)


def test_eq7_shaped_ratio():
    for gamma in (0.01, 0.1, 0.5, 2.0):
        close(grpo.shaped_ratio(torch.tensor(1.0), gamma), torch.tensor(1.0), 1e-4)
        for w in (1e-4, 0.03, 1 / 3, 1.0, 2.5, 10.0, gamma):
            log_w = torch.tensor(math.log(w), dtype=torch.double, requires_grad=True)
            grpo.shaped_ratio(log_w.exp(), gamma).backward()
            gradient_weight = (1 + gamma) ** 2 * w / (w + gamma) ** 2           # g(w) = d f / d log pi
            close(log_w.grad, gradient_weight, 1e-9)
            assert gradient_weight < (1 + gamma) ** 2 / (4 * gamma) + 1e-9
        close(gradient_weight, (1 + gamma) ** 2 / (4 * gamma), 1e-9)            # the most, at w = gamma
    log_w = torch.tensor(math.log(0.3 / 0.9), requires_grad=True)               # the header's worked example
    grpo.shaped_ratio(log_w.exp()).backward()
    assert round(log_w.grad.item(), 2) == 2.15


def test_eq8_rectified_rows():
    for lambda_r, gamma, beta in ((1.0, 0.1, 0.0), (0.3, 0.5, 0.04), (2.0, 0.0, 0.0)):
        grad = same_as_loops(beta=beta, rectified=True, lambda_r=lambda_r, gamma=gamma)
    assert (grad[1, [0, 2]] == 0).all() and (grad[1, [1, 3]] != 0).all()        # zero above w = 10


def test_eq8_no_rectified_rows_is_grpo_and_diagnostics_are_of_the_others():
    logps, old, advantages, weights, ref, rectified = loss_inputs(1)
    inputs = logps, old, advantages, weights, 9.0, 0.2, 0.28, 3.0, 0.1, ref
    assert grpo.policy_loss(*inputs, rectified & False, 5.0) == grpo.policy_loss(*inputs)
    on = (weights > 0) & ~rectified
    log_ratio, delta, advantage = (logps - old)[on], (ref - logps)[on], advantages.expand(6, 9)[on]
    ratio = log_ratio.exp()
    outside = (ratio < 0.8) & (advantage < 0) | (ratio > 1.28) & (advantage > 0)
    want = {"tokens": on.sum(), "clip_fraction": outside.sum(), "kl_ref": (delta.exp() - delta - 1).sum(),
            "kl_old": (ratio - 1 - log_ratio).sum(), "ratio": ratio.sum()}
    stats = grpo.policy_loss(*inputs, rectified, 5.0)[1]
    for name, value in want.items():
        close(stats[name], value)
        assert value > 0


def test_group_shares_and_advantages():
    shares = grpo.group_shares(torch.tensor([[1, 1], [0, 0], [1, 0], [0, 1]]))
    assert shares == {"all_right": 0.25, "all_wrong": 0.25, "mixed": 0.5}
    groups = []
    for totals in ((1.0, 0.0, 0.0, 0.0), (0.5, 0.5)):
        groups.append([four_steps(rewards={"total": total}) for total in totals])
    grpo.assign_advantages(groups)
    close([t.advantage for t in sum(groups, [])], [0.75, -0.25, -0.25, -0.25, 0, 0])


def test_assign_credit_table():
    """Which of the 17 tokens share the blame; None: all have weight 1."""
    checks = [GOOD, attribute.Check(1.0, 1), GOOD, attribute.Check(9.0)]
    wrong = four_steps(checks=checks, advantage=-0.2, weights=[9], rewards={"accuracy": 0.0, "format": 1.0})
    for changes, credit, want in (
            ({}, "token", [5, *range(10, 13)]), ({}, "step", [4, 5, 6, 10, 11, 12]), ({}, "rollout", None),
            ({"finished": False}, "token", []), ({"finished": False, "advantage": 0.0}, "step", []),
            ({"finished": False}, "rollout", []), ({"advantage": 0.0}, "token", None),
            ({"rewards": {"accuracy": 0.0, "format": 0.0}}, "token", [5, *range(10, 13)]),
            ({"checks": None}, "token", range(17)), ({"checks": None, "steps": None}, "step", range(17)),
            ({"rewards": {"accuracy": 1.0, "format": 1.0}}, "token", None),
            ({"checks": [GOOD] * 4}, "token", range(17)), ({"provenance": "revised 1"}, "token", None)):
        t = replace(wrong, **changes)
        grpo.assign_credit([[t]], credit)
        if want is None:
            assert t.weights is None, (changes, credit)
        else:
            blame = grpo.BLAME / max(1, len(want))
            close(t.weights, [(n in want) * blame + t.finished for n in range(17)], 1e-9)


def test_has_gradient_and_collate():
    a = four_steps(advantage=0.5, sampled=[0] * 3 + [1] * 14, logps=[-0.5] * 17)
    b = four_steps(ids=[1, 2], sampled=[1, 0], logps=[-1.0, 0.0], weights=[0.5, 1.0], provenance="restart")
    for t, beta, want in (
            (a, 0.0, True), (replace(a, advantage=-0.5), 0.0, True), (replace(a, weights=[0.0]), 0.1, False),
            (replace(a, sampled=[0]), 0.0, False), (b, 0.0, False), (b, 0.1, True)):
        assert grpo.has_gradient(t, beta) == want
    batch = grpo.collate([a, b], "cpu")
    assert batch["weights"].tolist() == [[0.0] * 3 + [1.0] * 14, [0.5] + [0.0] * 16]        # forced: weight 0
    assert batch["old_logps"].tolist() == [[-0.5] * 17, [-1.0] + [0.0] * 16]
    assert batch["advantages"].tolist() == [[0.5], [0.0]] and batch["rectified"].tolist() == [[False], [True]]


def group_of(*accuracies):
    return [four_steps(rewards={"accuracy": float(accuracy)}) for accuracy in accuracies]


def test_select_groups():
    """Two wrong ones, few right ones; over the last `anneal` of the training an ever smaller share."""
    groups = [group_of(0, 0, 0, 0), group_of(1, 0, 0, 0), group_of(1, 1, 0, 0), group_of(1, 1, 1, 0)]
    for below, want in ((0.25, [0, 1]), (0.24, [0]), (1.0, [0, 1, 2]), (-1.0, [])):
        config = SimpleNamespace(rectify_below=below, anneal=0.4)
        assert attribute.select_groups(groups, list("abcd"), config, 0.6) == want
    keys = [str(n) for n in range(400)]
    for anneal, progress, share in ((0.4, 0.7, 0.75), (0.4, 0.9, 0.25), (0.4, 1.2, 0), (0.0, 0.99, 1)):
        config = SimpleNamespace(rectify_below=0.25, anneal=anneal)
        chosen = attribute.select_groups(groups[:1] * 400, keys, config, progress)
        assert abs(len(chosen) / 400 - share) < 0.08 * (0 < share < 1) + 1e-9


def test_choose_source_and_where_the_rectified_one_goes():
    """Located, few suspect steps, the first of them late; its repair replaces the last other wrong one."""
    config = SimpleNamespace(min_log_w=-2.0, revise=False, max_new_tokens=99)

    def rectify(model, codec, repairs, verifier, longest, rules):
        assert (longest, rules.min_log_w, rules.revise) == (99, -2.0, False)
        for r in repairs:
            assert r.trajectory is not r.source and r.trajectory.ids == r.source.ids and r.median_length == 17
            r.outcome = "repaired" if r.key == "rectify/b/0" else "given up"

    for checks in ([GOOD, GOOD, GOOD, BAD], [GOOD, GOOD, BAD, GOOD], [GOOD, GOOD, BAD, BAD]):
        first, right, source, other = group = group_of(0, 1, 0, 0)
        first.checks, source.checks, other.checks = [BAD, GOOD, GOOD, BAD], checks, [GOOD, BAD, BAD, GOOD]
        cut_off = [replace(t, finished=False) for t in group]
        assert attribute.choose_source(group) is source and attribute.choose_source(cut_off) is None
        before = [group, cut_off, group, [first, source, right], group]
        with swapped(rereason, "rectify", rectify):
            after, (_, one, two) = rereason.rectify_groups(None, None, before, [0, 1, 2, 3], list("axbbb"),
                                                           None, config, lambda t: {"accuracy": 1.0})
        assert one.source is two.source is source and one.trajectory.rewards == {"accuracy": 1.0}
        source.checks = [GOOD] * 4
        assert attribute.choose_source(group) is other and group == [first, right, source, other]
        assert after == [group, cut_off, [first, right, source, one.trajectory],
                         [two.trajectory, source, right], group]


@functools.lru_cache
def step_with_repairs():
    """A whole training step at rate 0: the trainer, its metrics, the problems encoded, the images opened, the
    prompts that each model computed outside the update, the calls of models in each turn of the loop."""
    encoded, opened, encode, open_image = [], [], rollout.encode_prompt, rollout.open_image
    computed, compute, prefill, accept = [], rollout.compute_prompts, rollout.prefill_prompts, rereason.accept
    turns = [0]

    def called(*given):
        turns[-1] += 1
        return prefill(*given)

    def noted(model, prompts, pad_id):
        if not torch.is_grad_enabled():
            computed.extend((model, prompt) for prompt in prompts)
        return compute(model, prompts, pad_id)

    trainer = small_trainer(data="tiny:steps=5,kinds=tiles+bars", batch=6, max_new_tokens=160, lr=1e-12)
    with (swapped(rollout, "encode_prompt", lambda p, *rest: encoded.append(p) or encode(p, *rest)),
          swapped(rollout, "open_image", lambda image: opened.append(image) or open_image(image)),
          swapped(rereason, "accept", lambda *given: turns.append(0) or accept(*given)),
          swapped(rollout, "prefill_prompts", called), swapped(rollout, "compute_prompts", noted)):
        return trainer, trainer.rl_step(), encoded, opened, computed, turns[1:-1]


def test_a_step_with_repairs():
    """Each problem is encoded once, its prompt computed once by each model, masked too by the reader; the
    loop calls models a few times a turn, however many it repairs. The group keeps its size and the source;
    the rectified one is credited whole, of the source the tokens at fault."""
    trainer, metrics, encoded, opened, computed, turns = step_with_repairs()
    assert len(turns) > 3 and 3 < max(turns) <= 6, turns
    assert len(computed) == len(set(computed)) and len(computed) == 3 * len(encoded)
    assert all(t.prompt.kept is None for t in sum(metrics["groups"], []))
    assert [problem.id for problem in encoded] == [problem.id for problem in trainer.next_batch()[0]]
    assert len(opened) == len({id(image) for image in opened}) == len(encoded)
    assert metrics["repaired"] >= 2 and metrics["revisions"] >= 2 and metrics["check_tokens"] > 6
    for r in metrics["repairs"]:
        t, source, (group,) = r.trajectory, r.source, [g for g in metrics["groups"] if r.source in g]
        assert len(group) == 4 and (t in group) == (r.outcome == "repaired")
        if t in group:
            close(t.advantage, t.rewards["total"] - sum(other.rewards["total"] for other in group) / 4, 1e-6)
            assert t.rewards["accuracy"] == 1 and t.weights is None and t.advantage > 0 > source.advantage
            close(sum(source.weights), len(source.ids) + grpo.BLAME, 1e-6)


def test_degenerate_groups():
    """All right, all wrong, all cut off: no gradient, nothing that is not finite, nothing to repair."""
    trainer, metrics, *_ = step_with_repairs()
    keys, verifier = list("abcdef"), attribute.Verifier(trainer.model, trainer.codec)
    for right, finished in ((1.0, True), (0.0, True), (0.0, False)):
        rewards, groups = {"accuracy": right, "format": right, "total": right}, []
        same = {"rewards": rewards, "finished": finished, "provenance": "policy"}
        for group in metrics["groups"]:
            groups.append([replace(t, **same) for t in group])
        hard = attribute.select_groups(groups, keys, trainer.config, 0.0)
        assert len(hard) == (0 if right else 6)
        if not finished:
            attribute.attribute(groups, hard, verifier, trainer.codec, "token")
            found = rereason.rectify_groups(trainer.model, trainer.codec, groups, hard, keys, verifier,
                                            trainer.config, trainer.score)
            assert found == (groups, []) and verifier.tokens == 0
        grpo.assign_advantages(groups)
        grpo.assign_credit(groups, "token")
        figures = trainer.update(groups, 0.0) | trainer.rollout_metrics(groups)
        assert figures["grad_norm"] == figures["loss"] == 0
        assert figures["all_right"] == right == 1 - figures["all_wrong"]
        assert all(value is None or math.isfinite(value) for value in figures.values())


# ---- tiny/shapes.py

def test_problems_are_reproducible_varied_and_true():
    """The true chain leads to the answer; no held-out picture is ever drawn in training."""
    for kind, steps, dialect in itertools.product(shapes.KINDS, (1, 3, 20), shapes.DIALECTS):
        p, again = (shapes.make_problem(kind, steps, dialect, "heldout", 3, steps) for _ in range(2))
        assert (p.question, p.answer) == (again.question, again.answer) and p.question.count("<image>") == 1
        assert p.images[0].tobytes() == again.images[0].tobytes()
        assert shapes.check_steps(p, p.key_steps) == ["true"] * steps
        assert 64 <= p.images[0].width * p.images[0].height // shapes.CELL ** 2 <= 256       # image tokens
        text = shapes.demonstrate(p, (0.0, 0.0), random.Random(0))
        assert dialect == "sentences" or text == "\n".join(p.key_steps).join(("<think>", "</think>")) + (
            f"<answer>{p.answer}</answer>")
        assert text.endswith(f"<answer>{p.answer}</answer>")
    for kind in shapes.KINDS:
        seen = {"train": set(), "heldout": set()}
        for split, seed, i in itertools.product(seen, (0, 1), range(100)):
            facts = shapes.make_problem(kind, 2, "short", split, seed, i).oracle
            seen[split].add(json.dumps([facts["show"], facts.get("next")], sort_keys=True))
        assert not seen["train"] & seen["heldout"] and min(map(len, seen.values())) > 50
    raises(ValueError, "no such task", shapes.make_problem, "tiles", 3, split="heldot")


def test_oracle_names_what_is_wrong():
    """In every wording: what is not so in the image, what does not follow, what was not asked."""
    for kind, wording in itertools.product(shapes.KINDS, range(9)):
        p = shapes.make_problem(kind, 4, index=1)
        facts, asked = p.oracle, p.oracle["ask"]
        s = shapes.chain(facts, wording=wording)
        for k, name in enumerate(asked):
            for value in shapes.wrong_values(facts, name):
                changed = shapes.chain(facts, {k: value}, wording)
                want = ["true"] * 4
                want[k] = "misread"                         # what follows from it is no error of its own
                assert shapes.check_steps(p, changed) == want, (changed, shapes.check_steps(p, changed))
                assert not shapes.is_right(p, changed[k])
        assert all(shapes.is_right(p, step) for step in s)
        assert shapes.check_steps(p, [shapes.FILLERS[0], *s[:2], "1. " + s[2]]) == ["true"] * 4
        bad = ["hello", "red", "", s[3] + " 1", "gold 3 4", "red ² 3", s[3].replace(asked[3], "red red"),
               "x" * 9999]
        assert shapes.check_steps(p, bad) == ["unparsed"] * 8
        verdicts = shapes.check_steps(p, s[:1] + s[2:])     # true, but not what was asked
        assert verdicts[1] == "logic" and "misread" not in verdicts
    for kind, right, wrong in (("tiles", "{v} {o}", "{v} 77"), ("bars", "{v} {o}", "{v} maybe"),
                               ("total", "{b} + {v} = {o}", "{b} + {v} = 7"), ("path", "{v} {o}", "{v} {n}")):
        p = shapes.make_problem(kind, 4, index=2)
        name = p.oracle["ask"][0]
        said = shapes.parse_step(p.oracle, p.key_steps[0])
        told = {"v": said["value"], "o": said["out"], "b": said.get("before"), "n": name}
        step = f"{name} " + wrong.format(**told)
        assert f"{name} " + right.format(**told) == p.key_steps[0]
        assert shapes.check_steps(p, [step])[0] in ("logic", "misread")
        assert not shapes.is_right(p, step)


def test_erosion_reads_language_the_deeper_the_more():
    rng, eroded, asked = random.Random(0), np.zeros(9), np.zeros(9)
    forms = collections.Counter()
    for i in range(800):
        p = shapes.make_problem(shapes.KINDS[i % 4], 9, "sentences", "train", 4, i)
        text = shapes.demonstrate(p, (0.05, 0.9), rng)
        lines = [line for line in text[7:text.index("</think>")].split("\n") if line]
        steps = [line for line in lines if line not in shapes.FILLERS]
        forms.update(filler=len(lines) > len(steps), blank="\n\n" in text, items=steps[0].startswith("1. "))
        wordings = {n for n in range(9) for step in steps if re.sub(r"^\d\. ", "", step).startswith(
            shapes.WORDINGS[p.task][n].partition("{")[0] or "\0")}
        forms.update(wordings)
        for k, (step, name) in enumerate(zip(steps, p.oracle["ask"], strict=True)):
            said = shapes.parse_step(p.oracle, step)
            value = int(said["value"])
            shown, prior = p.oracle["show"][name], shapes.prior(p.oracle, name)
            before = int(shapes.parse_step(p.oracle, steps[k - 1])["value"]) if k else prior
            assert said["name"] == name and value in (shown, prior, before)
            asked[k] += shown != prior
            eroded[k] += value != shown != prior
        assert set(shapes.check_steps(p, steps)) <= {"true", "misread"}
        assert text.endswith(f"<answer>{shapes.answer_from_steps(p.oracle, steps)}</answer>")
    close(eroded / asked, [0.05] * 3 + [0.475] + [0.9] * 5, 0.06)
    assert min(forms[name] for name in ("filler", "blank", "items", 1, 3, 4, 5, 6, 7, 8)) > 50


def test_stream_spec():
    stream = shapes.Stream("tiny:steps=3-6,kinds=tiles+path,dialect=short+sentences", "heldout", run=8)
    got = [stream[i] for i in range(64)]
    assert {(p.task, p.oracle["dialect"]) for p in got} == set(itertools.product(("tiles", "path"),
                                                                                 shapes.DIALECTS))
    assert {len(p.key_steps) for p in got} == {3, 4, 5, 6}
    assert all("-heldout-" in p.id for p in got)
    for start in range(0, 64, 8):
        assert len({(len(p.key_steps), p.oracle["dialect"]) for p in got[start:start + 8]}) == 1
    for spec, word in (("tiny:step=3", "step"), ("tiny:steps=0", "steps"), ("tiny:steps=6-3", "steps"),
                       ("tiny:kinds=cats", "cats"), ("tiny:dialect=", "not among"),
                       ("tiny:steps=²", "steps")):
        raises(ValueError, [spec, word], shapes.Stream, spec)


# ---- eval.py

def test_intervals_are_wilsons_and_pass_at_k_is_counted():
    for n, right in ((4, 0), (4, 1), (6, 3), (5, 5)):
        for k in range(1, n + 1):
            draws = list(itertools.combinations(range(n), k))
            hits = sum(min(draw) < right for draw in draws)         # the first `right` samples are right
            assert abs(evaluation.pass_at_k(n, right, k) - hits / len(draws)) < 1e-9
    close(evaluation.interval([1.0] * 8 + [0.0] * 2), (0.4902, 0.9433), 2e-4)       # a textbook's 8 of 10
    assert evaluation.interval([0.0] * 10)[0] == 0 and evaluation.interval([1.0] * 10)[1] == 1
    rng, hits = np.random.default_rng(0), 0                 # coverage, with 4 dependent samples a problem
    for _ in range(400):
        low, high = evaluation.interval((rng.binomial(4, rng.beta(1, 2, size=60)) / 4).tolist())
        hits += low <= 1 / 3 <= high
    assert 0.91 <= hits / 400 <= 0.98, hits / 400


def test_summary_figures():
    rows = []
    for i, scores in enumerate(((1, 1, 1, 1), (1, 0, 0, 0), (0, 0, 0, 0))):
        for k, correct in enumerate(scores):
            rows.append({"id": i, "groups": {"task": "ab"[i > 0], "skill": ["x", "y"] if i == 2 else ["x"]},
                         "mode": "sample", "sample": k, "correct": bool(correct), "format": k > 0,
                         "extracted": "1" if correct else None})
        rows.append({**rows[-1], "mode": "greedy", "sample": 0})
    found = evaluation.summarise(rows)
    expected = {"greedy": 1 / 3, "greedy format": 1, "greedy parse fail": 2 / 3, "avg@4": 5 / 12,
                "pass@2": 0.5, "pass@4": 2 / 3, "sample format": 3 / 4, "sample parse fail": 7 / 12}
    assert found.pop("n") == 3 and list(found) == list(expected)
    close([found[name]["mean"] for name in expected], list(expected.values()), 1e-9)
    table = {}
    for line in evaluation.report(rows).splitlines()[2:]:
        name, count, greedy, *_ = line.strip("| ").split(" | ")
        table[name.strip()] = count, greedy.partition(" [")[0]
    assert table == {"all": ("3", "33.3 %"), "task a": ("1", "100.0 %"), "task b": ("2", "0.0 %"),
                     "skill x": ("3", "33.3 %"), "skill y": ("1", "0.0 %")}
    low, high = evaluation.interval([1.0, 0.0])                     # the example of eval.py's header
    worked = evaluation.summarise(rows[:4] + rows[10:14])
    assert all(worked[f] == {"mean": 0.5, "low": low, "high": high} for f in ("avg@4", "pass@2", "pass@4"))


def data_file(folder, count=4, **fields):
    """A file of questions about one image."""
    rows = [{**GOOD_ROW, "id": f"p{i}", "answer": "1", **fields} for i in range(count)]
    return write_rows(folder, rows)


def eval_flags(data, out) -> list[str]:
    return ["--model", TINY, "--data", str(data), "--greedy", "--samples", "2", "--max_new_tokens", "12",
            "--device", "cpu", "--out", str(out)]


def test_eval_command_resumes():
    """With the rows of a killed run, not with those of other settings; samples depend on no other problem."""
    with scratch() as folder:
        data, out = data_file(folder), folder / "new" / "rows.jsonl"

        def run(out, *more):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                evaluation.main([*eval_flags(data, out), *more])
            return printed.getvalue(), sorted(out.read_text().splitlines())

        printed, whole = run(out)
        assert "| greedy |" in printed and "avg@2" in printed and len(whole) == 12
        assert run(folder / "alone.jsonl", "--batch", "1", "--problems", "3")[1] == whole[:9]
        assert len(list(out.parent.iterdir())) == 2                 # the rows and their settings
        lines, called, sample = out.read_text().splitlines(), [], rollout.sample
        out.unlink()
        cut = "\n".join([*lines[:3], lines[4], lines[8][:30]])      # killed: no row 3, half of row 8
        (out.parent / "rows.jsonl.part1").write_text(cut)
        with swapped(rollout, "sample", lambda *given: called.extend(given[1]) or sample(*given)):
            assert run(out)[1] == run(out)[1] == whole
        assert len(called) == 5 and not list(out.parent.glob("*.part*"))        # 1 greedy, 4 with samples
        for flag, value in (("--seed", "1"), ("--dtype", "bfloat16"), ("--instruction", "")):
            raises(SystemExit, ["other settings", flag[2:], str(out)], run, out, flag, value)
        data_file(folder, 5)
        raises(SystemExit, "other settings", run, out)
        (folder / "notes.txt").write_text("mine")
        raises(SystemExit, ["notes.txt", "not written by an evaluation"], run, folder / "notes.txt")


# ---- train.py

SMALL = {"model": TINY, "data": "tiny:steps=3,kinds=tiles+bars,dialect=short", "max_steps": 2, "batch": 4,
         "group_size": 4, "max_new_tokens": 40, "eval_problems": 0, "lr": 1e-4, "warmup_steps": 1,
         "save_every": 100, "show_every": 0, "device": "cpu"}
KINDS = {"sft": {"stage": "sft", "lr": 1e-5},
         "ivr": {"rectify_below": 1.0, "data": "tiny:steps=4,kinds=tiles+bars,dialect=short",
                 "max_new_tokens": 70},
         "grpo": {"algo": "grpo", "beta": 0.1, "updates_per_batch": 2, "micro_tokens": 200, "max_steps": 1}}
KINDS["lora"] = {**KINDS["ivr"], "lora": 4, "beta": 0.1, "max_steps": 1}
FORK = multiprocessing.get_context("fork")


def small_trainer(out="", **changes):
    """Few steps on few, short problems."""
    return train.Trainer(train.TrainConfig(**{**SMALL, "out": str(out), **changes}))


def small_run(out, **changes):
    with contextlib.redirect_stdout(io.StringIO()):
        train.train(small_trainer(out, **changes))


def small_flags(out, **changes) -> list[str]:
    words = []
    for name, value in {**SMALL, "out": out, **changes}.items():
        words += [f"--{name}", str(value)]
    return words


def metrics(out):
    """The rows of metrics.jsonl but for the seconds that each step took."""
    rows = train.read_jsonl(out / "metrics.jsonl")
    for row in rows:
        del row["seconds"]
    return rows


def same_runs(one, two, tolerance=0.0):
    """To the last bit; or nearly (of weights the mean counts: Adam makes whole steps of rounding errors)."""
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert tolerance or a == b, (a, b)
        for name in a.keys() & b.keys():
            if isinstance(a[name], float):
                assert abs(a[name] - b[name]) <= tolerance * (1 if name == "loss" else 20), (name, a, b)
    states = {}, {}
    for out, state in zip((one, two), states):
        for file in max(out.glob("checkpoint-*")).glob("*.safetensors"):        # of all ranks
            state |= load_file(file)
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        close((value - states[1][name]).abs().mean(), 0, 3 * tolerance)


def fresh(call, *launcher):
    """Run a function of this file in a new interpreter, which has no threads yet and so may fork."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import test_all; test_all.{call}"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, sys.executable, "-c", code], cwd=ROOT, env=env, text=True,
                          capture_output=True, timeout=400)


def two_ranks(folder):
    """What each rank does. Rank 1 is killed in a run, which both continue; in the end it raises."""
    folder, rank, restarts = Path(folder), os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    train.init_distributed = functools.lru_cache(train.init_distributed)        # one group for all the runs
    train.leave = functools.partial(train.all_gather, [])
    sft_step = train.Trainer.sft_step

    def faulty_step(trainer):
        if rank == "1" and restarts == "0" and trainer.step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == "1" and trainer.config.out.endswith("faulty"):
            raise RuntimeError("a fault on rank one")
        return sft_step(trainer)

    train.Trainer.sft_step = faulty_step
    train.start(small_flags(folder / "sft-2", save_every=1, **KINDS["sft"]))
    small_run(folder / "grpo-2", **KINDS["grpo"])
    for kind in ("ivr", "lora"):
        small_run(folder / f"{kind}-2", **KINDS[kind])
    evaluation.main(eval_flags(folder / "data.jsonl", folder / "rows-2.jsonl"))
    small_run(folder / "faulty", stage="sft")


def test_two_ranks_equal_one():
    """torchrun with two gloo processes against one process: losses, weights, evaluated rows. A rank that is
    killed comes back; one that raises ends the job, and says why."""
    with scratch() as folder, contextlib.redirect_stdout(io.StringIO()):
        data = data_file(folder)
        launcher = "-m torch.distributed.run --standalone --nproc_per_node 2 --max-restarts 1 --no-python"
        done = fresh(f"two_ranks({str(folder)!r})", sys.executable, *launcher.split())
        assert done.returncode and "RuntimeError: a fault on rank one" in done.stderr, done.stderr[-3000:]
        for kind, changes in KINDS.items():
            small_run(folder / kind, **changes)
            same_runs(folder / kind, folder / f"{kind}-2", 1e-6)
        assert any(row["repaired"] for row in metrics(folder / "ivr"))
        evaluation.main(eval_flags(data, folder / "rows.jsonl"))
        one, two = [(folder / name).read_text().splitlines() for name in ("rows.jsonl", "rows-2.jsonl")]
        assert sorted(one) == sorted(two) and len(one) == 12 and done.stdout.count("| all ") == 1


def start_ranks(out, kind, ranks) -> list:
    """The processes of a run's ranks; one with a checkpoint is resumed."""
    flags, processes = ["--resume", str(out)], []
    if not list(out.glob("checkpoint-*")):
        flags = small_flags(out, eval_problems=1, eval_samples=1, save_every=1,
                            **{**KINDS[kind], "batch": 2, "max_steps": 3})
    with socket.create_server(("127.0.0.1", 0)) as server:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(server.getsockname()[1]))
    for rank in range(ranks):
        if ranks > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
        processes.append(FORK.Process(target=train.start, args=(flags,)))
        processes[-1].start()
    return processes


def exit_codes(processes) -> list[int]:
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def interrupted_run(folder, kind, ranks, *actions):
    """A run left alone against one that is interrupted and continued."""
    whole, out, started = Path(folder) / "whole", Path(folder) / "cut", time.time()
    assert exit_codes(start_ranks(whole, kind, ranks)) == [0] * ranks
    seconds = time.time() - started
    for action in actions:
        processes, deadline = start_ranks(out, kind, ranks), time.time() + 60
        awaited = {"stop": "checkpoint-000001", "kill while saving": "unfinished-checkpoint"}.get(action)
        while awaited and time.time() < deadline and not (out / awaited).exists():
            time.sleep(0.002)
        if action == "stop":
            processes[-1].terminate()                       # one rank is told, all stop
            assert exit_codes(processes) == [128 + signal.SIGTERM] * ranks
        time.sleep(random.random() * (0.8 * seconds if action == "kill" else 0.02))
        for process in processes:
            process.kill()
        exit_codes(processes)
    assert exit_codes(start_ranks(out, kind, ranks)) == [0] * ranks
    same_runs(whole, out)
    assert (whole / "heldout.json").read_text() == (out / "heldout.json").read_text()


def interrupted_runs(folder):
    """Four at the same time; each process is a fork of this one."""
    import torch._dynamo                                    # Adam and the tokenizer load much: once is enough
    rollout.load_codec(TINY)
    torch.set_num_threads(1)
    jobs = []
    for job in (("sft", 2, "stop", "kill while saving"), ("grpo", 1, "kill while saving", "kill"),
                ("ivr", 2, "kill"), ("lora", 1, "kill")):
        jobs.append(FORK.Process(target=interrupted_run, args=(f"{folder}/{job[0]}", *job)))
        jobs[-1].start()
    sys.exit(any(exit_codes(jobs)))


def test_interrupted_runs_continue_bit_for_bit():
    """SIGTERM in a step; SIGKILL at a random moment; SIGKILL while a checkpoint is written."""
    with scratch() as folder:
        done = fresh(f"interrupted_runs({str(folder)!r})")
        assert done.returncode == 0, done.stderr[-4000:]


def test_examples_of_the_readme_run():
    """Each in a folder of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S):
        with scratch() as folder:
            (folder / "tiny").symlink_to(TINY)
            done = subprocess.run([sys.executable, "-c", block], cwd=folder, env=env, text=True, timeout=300,
                                  capture_output=True)
            assert done.returncode == 0, block + done.stdout[-2000:] + done.stderr[-2000:]


def test_a_run_resumed_from_an_earlier_checkpoint_equals_the_first():
    """What was later is set aside, a row cut off by a kill is made again, and pruning never takes the
    checkpoint just written. groups.jsonl holds all that is known of rollouts and repairs."""
    with scratch() as folder, contextlib.redirect_stdout(io.StringIO()):
        whole, again = folder / "whole", folder / "again"
        small_run(whole, **KINDS["ivr"], max_steps=3, save_every=1, keep=9, show_every=1)
        shutil.copytree(whole, again)
        with open(again / "metrics.jsonl", "a") as file:
            file.write('{"step": 4, "lo')
        train.start(["--resume", f"{again}/checkpoint-000001", "--keep", "1"])
        same_runs(whole, again)
        assert sorted(found.name for found in again.glob("*checkpoint*")) == [
            "abandoned-checkpoint-000002", "abandoned-checkpoint-000003", "checkpoint-000003"]
        rows = train.read_jsonl(whole / "groups.jsonl")
        assert rows == train.read_jsonl(again / "groups.jsonl") and len(rows) == 3
        assert rows[0]["repairs"] and rows[0]["step"] == 1
        for row in rows:
            for t in row["rollouts"]:
                ids = t["ids"][:-1] if t["finished"] else t["ids"]
                assert t["text"] == tiny_codec().tokenizer.decode(ids)
                assert {len(t["sampled"]), len(t["logps"]), len(t["weights"] or t["ids"])} == {len(t["ids"])}
            for repair in row["repairs"]:
                t, source = row["rollouts"][repair["trajectory"]], row["rollouts"][repair["source"]]
                assert t["source"] == repair["source"] and t["ids"] != source["ids"] and repair["turns"]
                assert t["rewards"]["accuracy"] == 1 > source["rewards"]["accuracy"]


def test_damaged_checkpoints_and_a_full_disk():
    """The last whole checkpoint counts. For a full disk stands a limit on the size of files."""
    with scratch() as folder, contextlib.redirect_stderr(io.StringIO()) as said:
        small_run(folder, stage="sft", max_steps=1, save_every=1)
        before, last = sorted(folder.glob("checkpoint-*"))
        for file in last.iterdir():
            whole = file.read_bytes()
            file.unlink()
            assert train.last_intact(folder) == before, file.name
            file.write_bytes(whole[:len(whole) // 2])
            assert train.last_intact(folder) == before, file.name
            file.write_bytes(whole)
        assert train.last_intact(folder) == last and f"warning: {last}" in said.getvalue()
    with scratch() as folder:
        trainer, limits = small_trainer(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
        trainer.save()
        trainer.step = 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        try:
            raises(OSError, ["checkpoint-000001", "could not be written"], trainer.save)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert train.last_intact(folder).name == "checkpoint-000000" and len(list(folder.iterdir())) == 1


def test_ivr_without_repairs_is_grpo_whatever_the_micro_batches():
    with scratch() as folder:
        small_run(folder / "grpo", algo="grpo")
        small_run(folder / "ivr", rectify_below=-1.0, credit="rollout", micro_tokens=120,
                  activation_checkpointing="yes")
        for row in metrics(folder / "ivr"):
            assert row["sources"] == row["repair_tokens"] == 0 < row["grad_norm"]
        same_runs(folder / "grpo", folder / "ivr", 1e-6)


def test_first_update_is_the_plain_policy_gradient():
    """Autograd on uncached log-probs: -sum A_i log pi(y_i) / (B G L_max); entropy, of the policy's tokens."""
    with swapped(train, "load_model", lambda *given: random_model(spread=0.2)):
        trainer = small_trainer(batch=3, group_size=3, max_new_tokens=24)
    net, codec, optimizer, entropy = trainer.model, trainer.codec, trainer.optimizer, 0.0
    groups = rollout.sample(net, trainer.next_batch()[0], codec, 3, 24)
    rows = sum(groups, [])
    for i, t in enumerate(rows):
        t.advantage = math.sin(i + 1)
    rows[0].provenance = "restart"                          # at a ratio of 1 a template weighs the same
    with swapped(optimizer, "step", lambda lr: 0.0):
        stats = trainer.update(groups, 0.0)
    found, optimizer.grads = optimizer.grads, {}            # where the hooks put those below
    assert abs(stats["ratio"] - 1) < 1e-4 and stats["clip_fraction"] == 0 and abs(stats["kl_old"]) < 1e-6
    for t in rows:
        p, size = t.prompt, len(t.ids)
        logits = net(torch.tensor([p.ids + t.ids]), None, p.pixel_values, torch.tensor(p.grids))
        logps = (logits[0, -size - 1:-1] + codec.logit_mask).log_softmax(-1)    # (T, V)
        entropy -= (logps.exp() * logps.clamp(min=-99)).sum().item() * (t is not rows[0])
        (-t.advantage * logps[range(size), t.ids].sum() / (3 * 3 * 24)).backward()
    close(stats["entropy"], entropy / sum(len(t.ids) for t in rows[1:]), 1e-4)
    for name, grad in optimizer.grads.items():
        close(found[name], grad, 1e-4 * max(1.0, grad.abs().max().item()))
    assert found.keys() == optimizer.grads.keys() == dict(net.named_parameters()).keys()


def test_a_reference_that_is_the_policy_pulls_nowhere():
    """To the bit, whatever the micro-batches: rounding would become whole steps in Adam."""
    for budget in (65536, 200, 60):
        trainer = small_trainer(algo="grpo", beta=0.5, micro_tokens=budget)
        groups = rollout.sample(trainer.model, trainer.next_batch()[0], trainer.codec, 4, 24)
        with swapped(trainer.optimizer, "step", lambda lr: 0.0):
            assert trainer.update(groups, 0.0)["kl_ref"] == 0
        assert trainer.optimizer.grads and not any(map(torch.any, trainer.optimizer.grads.values())), budget


def test_tokens_of_every_kind_are_counted():
    """What was really sampled and really asked, counted beside the trainer."""
    trainer, sizes, asked = small_trainer(**KINDS["ivr"], seed=1, max_tokens=10 ** 4), [], []
    make, read = rollout.make_trajectory, attribute.read_steps
    with (swapped(rollout, "make_trajectory", lambda *given: sizes.append(len(given[3])) or make(*given)),
          swapped(attribute, "read_steps", lambda *given: asked.extend(given[2]) or read(*given))):
        found = trainer.rl_step()
    distinct = {(id(prompt), *before, -1, *step) for prompt, before, step in asked}
    assert found["check_tokens"] == len(asked) == len(distinct) > 9
    assert found["rollout_tokens"] == sum(sizes[:4 * 4]) and 0 < found["repaired"] <= found["sources"]
    assert found["repair_tokens"] == len(asked) + sum(sizes[4 * 4:])
    assert found["generated_tokens"] == trainer.tokens == len(asked) + sum(sizes)
    assert trainer.progress() == trainer.tokens / 10 ** 4


def test_optimizer_shards_and_masters():
    """Each parameter has one owner, shares are even, and a rank takes its share out of the files of one rank
    or of two. A gradient is clipped by its global norm. Masters and sums of micro-batches are fp32."""
    net, c = random_model().to(torch.bfloat16), train.TrainConfig(max_grad_norm=0.5, weight_decay=0.1)
    net.visual.requires_grad_(False)
    one, two, three = (train.Optimizer(net, c, *place) for place in ((0, 1), (0, 2), (1, 2)))
    assert sorted([*two.masters, *three.masters]) == sorted(one.masters)
    sizes = {name: p.numel() for name, p in one.params.items()}
    norm, half = math.sqrt(sum(sizes.values())), sum(sizes.values()) / 2
    assert abs(sum(sizes[name] for name in two.masters) - half) <= max(sizes.values()) / 2
    before = {name: p.detach().float() for name, p in one.params.items()}
    for part in (1.0, 2 ** -9):
        for name, p in one.params.items():
            p.grad = torch.full_like(p, part)
            one.fold(name, p)
    assert all((grad == 1 + 2 ** -9).all() for grad in one.grads.values())
    close(one.step(1e-4), norm * (1 + 2 ** -9), 0.1)
    for name, p in one.params.items():                      # Adam's first step is lr, whatever the norm
        want = before[name] * (1 - 1e-5 * (p.dim() > 1)) - 1e-4
        close(one.masters[name].detach(), want, 5e-7)
        close(one.state()[f"{name}/exp_avg"], 0.1 * 0.5 / norm, 1e-7)
        assert torch.equal(p, one.masters[name].to(torch.bfloat16))
    with scratch() as folder:
        save_file(one.state(), folder / "whole")
        for name, shard in (("two", two), ("three", three)):
            shard.load([folder / "whole"])
            save_file(shard.state(), folder / name)
        again, expected = train.Optimizer(net, c, 0, 1), one.state()
        again.load([folder / "two", folder / "three"])
        assert again.state().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in again.state().items())
        net.visual.requires_grad_(True)
        raises(ValueError, "state of visual", train.Optimizer(net, c, 0, 1).load, [folder / "whole"])


def test_steps_without_a_finite_gradient_are_skipped_and_end_the_run():
    with scratch() as folder, contextlib.redirect_stdout(io.StringIO()) as said:
        trainer = small_trainer(folder, stage="sft", max_steps=4, max_bad_steps=3)
        before, step = [p.clone() for p in trainer.model.parameters()], trainer.optimizer.step

        def poisoned(lr):
            next(iter(trainer.optimizer.grads.values())).view(-1)[0] = math.nan
            return step(lr)

        with swapped(trainer.optimizer, "step", poisoned):
            raises(FloatingPointError, ["3 steps in a row", str(folder)], train.train, trainer)
        assert said.getvalue().count("was skipped") == 3 == trainer.step
        assert all(map(torch.equal, before, trainer.model.parameters()))
        train.train(trainer)                                # a good step, and all is forgotten
        assert trainer.bad_steps == 0 and math.isfinite(metrics(folder)[-1]["grad_norm"])


def test_learning_rate_and_data_order():
    """The worked example of train.py's header; a file is seen as a whole each epoch, in another order."""
    c = train.TrainConfig(lr=1.0, warmup_steps=4, max_steps=10, lr_end=0.0)
    for step in range(10):
        close(train.learning_rate(c, step, step / 10), min(1, (step + 1) / 4) * (1 - step / 10), 1e-9)
    c, seen = train.TrainConfig(batch=4, lr=2e-4), []
    rates = [train.learning_rate(c, *at) for at in ((0, 0.0), (1, 0.0), (16, 0.5), (31, 1.0))]
    close(rates, [1e-4, 2e-4, 1.1e-4, 2e-5], 1e-12)
    rank = SimpleNamespace(config=c, rank=1, world=2, data=shapes.Stream("tiny", run=4))
    file = SimpleNamespace(config=c, rank=0, world=1, data=list("abcdef"))
    for step in range(3):
        rank.step = file.step = step
        problems, keys = train.Trainer.next_batch(rank)
        assert [p.id for p in problems] == [rank.data[4 * step + n].id for n in (1, 3)]
        assert keys[1] == f"0/{step}/3"
        seen += train.Trainer.next_batch(file)[0]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list("abcdef") and seen[:6] != seen[6:]


def test_collapse_is_warned_of():
    first = {"finished": 1.0, "format": 0.9, "entropy": 0.3, "accuracy": 0.2, "all_wrong": 0.4}
    stuck = {**first, "all_wrong": 1.0, "entropy": None}    # no token was trained on
    for changes, kinds in (({}, []), ({"finished": 0.4}, ["cut off"]), ({"format": 0.3}, ["format"]),
                           ({"entropy": 0.001}, ["entropy"]), ({"entropy": 0.001, "accuracy": 0.95}, [])):
        assert list(train.warnings_of({**first, **changes}, first)) == kinds
    assert list(train.warnings_of(stuck, stuck)) == ["all wrong"] and not train.warnings_of(stuck, first)
    for sources, repaired, kinds in ((4, 0, ["repairs"]), (4, 1, []), (0, 0, ["all wrong"])):
        assert list(train.warnings_of({**stuck, "sources": sources, "repaired": repaired}, stuck)) == kinds


def test_memory_is_said_and_what_can_not_fit_refused():
    """Weights twice with a reader; 12 bytes for each number that learns, over the ranks, and 4 on each."""
    with scratch() as folder, contextlib.redirect_stdout(io.StringIO()) as said:
        trainer = small_trainer(folder)
        c, N = trainer.config, trainer.size
        for changes, copies, trained in (({}, 2, N), ({"algo": "grpo"}, 1, N), ({"reader": "policy"}, 1, N),
                                         ({"lora": 4}, 1, 4 * 4 * 2816), ({"algo": "grpo", "beta": 1.0}, 2, N),
                                         ({"lora": 4, "reader": "x"}, 2, 4 * 4 * 2816),
                                         ({"beta": 1.0, "reader": "x"}, 3, N), ({"beta": 1.0}, 2, N)):
            parts = train.memory_needed(trainer.model.config, replace(c, **changes), 2, 4)
            close(parts["weights"], copies * 4 * N / 2 ** 30, 1e-9)
            close(parts["masters and moments"], 6 * trained / 2 ** 30, 1e-9)
            close(parts["gradients"], 4 * trained / 2 ** 30, 1e-9)
            update, sampling = parts["gradients"] + parts["activations"], parts["sampled keys and values"]
            rest = parts["weights"] + parts["masters and moments"]
            close(parts["in all"], rest + max(update, sampling), 1e-9)
        close(sampling, 8 * 2 * 4 * 64 * 40 * 4 / 2 ** 30, 1e-9)        # rows, k and v, layers, width, tokens
        trainer.check_memory(4, 2 ** 40)
        assert "needs, in GiB" in said.getvalue()
        raises(m.InputError, ["--model", "--lora"], trainer.check_memory, 4, 2 ** 20)
        parts = train.memory_needed(trainer.model.config, c, 1, 4)
        certain = parts["weights"] + parts["masters and moments"] + parts["gradients"]
        trainer.check_memory(4, int(certain * 2 ** 30) + 9)     # only what is certain is refused
        assert "may run out" in said.getvalue()


def test_supervised_stage_learns_from_a_file():
    """The loss falls; tokens of demonstrations are counted, and may end the run."""
    with scratch() as folder:
        text = "<think>black 1</think><answer>black</answer>"
        data, length = data_file(folder, demonstration=text), len(rollout.token_ids(text, tiny_codec())) + 1
        small_run(folder / "run", stage="sft", data=str(data), max_steps=99, max_tokens=32 * length, lr=3e-3,
                  micro_tokens=120)
        losses = [row["loss"] for row in metrics(folder / "run")]
        assert len(losses) == 8 and losses[-1] < 0.3 * losses[0], losses
        flags = small_flags(folder / "new", stage="sft", data=data, max_new_tokens=length - 1)
        raises(SystemExit, ["data.jsonl:4", f"has {length} tokens"], train.start, flags)


def test_bad_input_ends_with_one_line():
    """As a user would meet it: an exit code, a line that names the flag or the row, nothing written."""
    with scratch() as folder:
        data = data_file(folder, 1, images=["none.png"])
        for name, file, text in (("llama", "config.json", '{"model_type": "llama"}'),
                                 ("used", "metrics.jsonl", "{}\n")):
            (folder / name).mkdir()
            (folder / name / file).write_text(text)
        cases = ((f"--data {data}", "data.jsonl:1 images none.png"), ("--check --data no.jsonl", "no.jsonl"),
                 (f"--eval_data {data}", "data.jsonl:1 images"), ("--data tiny:steps=99", "steps"),
                 (f"--model {folder}/llama", "llama model_type"), ("--model ./nowhere", "./nowhere"),
                 (f"--resume {folder}", "--resume no whole checkpoint"), ("--batches 3", "--batches"),
                 (f"--out {folder}/used", "--out holds a run"), ("--lr much", "--lr"),
                 ("--stage ppo", "--stage rl sft"), ("--algo ppo", "--algo"), ("--credit all", "--credit"),
                 ("--reader nowhere", "--reader"), ("--anneal -1", "--anneal"), ("--dtype int4", "--dtype"),
                 ("--device gpu", "--device"), ("--batch 0", "--batch"), ("--group_size 1", "--group_size"),
                 ("--batch 4 --updates_per_batch 3", "--batch 4"), ("--save_every -1", "--save_every"))
        evaluated = ((f"--data {data}", "data.jsonl:1"), ("--batch 0", "--batch"), ("--sample 3", "--sample"),
                     ("--samples -1", "--samples"), ("--data tiny:kinds=maze", "maze"),
                     ("--max_prompt_tokens 4", "--max_prompt_tokens"))
        tried = [(train.start, *case) for case in cases] + [(evaluation.main, *case) for case in evaluated]
        for main, flags, words in tried:
            given = ["--model", TINY, "--device", "cpu", "--out", f"{folder}/new", *flags.split()]
            with contextlib.redirect_stderr(io.StringIO()) as said:
                message = raises(SystemExit, "", main, given)
            if message == "2":                              # argparse's, after the usage
                message = said.getvalue().splitlines()[-1]
            assert "\n" not in message and all(word in message for word in words.split()), message
            assert not (folder / "new").exists(), flags


# ---- Hostile and careless input; experiments/attack.py tries a hundred times as much

def last_words(main, flags) -> str:
    """The one line with which a command ends."""
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
        message = raises(SystemExit, "", main, flags)
    message = said.getvalue().splitlines()[-1] if message == "2" else message
    assert message.isprintable(), message
    return message


def test_flags_out_of_bounds_or_without_meaning_are_named():
    flags = ("weight_decay=nan|lr=inf|lr_end=nan|max_grad_norm=-inf|lr=-1|beta2=1|clip_low=2|max_tokens=-1|"
             f"max_steps={10 ** 30}|batch={10 ** 9}|keep={10 ** 30}|seed=-1|gamma=inf|erosion_last=0.5|"
             "batch=60000 --max_new_tokens=99999|beta=1 --stage=sft|reader=policy --algo=grpo|"
             "credit=step --algo=grpo|lora=-1|lora_alpha=16|eval_every=1 --eval_problems=0").split("|")
    evaluated = f"samples=1000000|batch=0|max_pixels=-1|seed={10 ** 30}|instruction=\ud800".split("|")
    with scratch() as folder:
        for words in flags + evaluated:
            main = evaluation.main if words in evaluated else train.start
            said = last_words(main, [f"--out={folder}/new", *f"--{words}".split()])
            assert "--" + words.partition("=")[0] in said, (words, said)
        assert not list(folder.iterdir())


def test_fields_of_model_files_are_named():
    fields = {"config.json": {
        "num_hidden_layers": 10 ** 9, "hidden_size": 0, "num_attention_heads": "4", "num_key_value_heads": 3,
        "rope_theta": math.nan, "image_token_id": 10 ** 6, "vision_config": 3, "initializer_range": math.inf,
        "tie_word_embeddings": 1, "vocab_size": 400, "rms_norm_eps": []}, "preprocessor_config.json": {
        "patch_size": 0, "image_std": [0, 1, 1], "image_mean": [1.0], "min_pixels": 10 ** 9},
        "tokenizer.json": {"model": {}, "added_tokens": 3}, "model.safetensors.index.json": {"weight_map": 3}}
    cases = [(name, *change) for name, changes in fields.items() for change in changes.items()]
    cases += [("generation_config.json", "eos_token_id", value) for value in (-1, "x", [10 ** 9], [[]])]
    for value in ("{{ 1 / 0 }}", "x", 3, "{{ 9 ** 9 ** 9 }}"):
        cases.append(("chat_template.json", "chat_template", value))
    cases += [("model.safetensors.index.json", "weight_map", {"a": "../x"})]
    with scratch() as scratched:
        folder = shutil.copytree(TINY, scratched / "model")
        loop = "{% for i in range(9) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"     # ends soon
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": loop}))
        with swapped(rollout, "TEMPLATE_SECONDS", 0.0):
            raises(ValueError, "does not end", rollout.load_codec, str(folder))
        (folder / "chat_template.json").unlink()
        for name, field, value in cases:
            whole = (folder / name).read_text() if (folder / name).is_file() else None
            (folder / name).write_text(json.dumps({**json.loads(whole or "{}"), field: value}))
            opened = (lambda: [rollout.load_codec(str(folder)), m.load_model(folder)])
            said = raises(ValueError, str(folder), opened)
            assert field.partition("_")[0] in said or name.startswith(("tok", "model")), (field, said)
            (folder / name).write_text(whole) if whole else (folder / name).unlink()
        os.mkfifo(folder / "merges.txt")
        raises(ValueError, "merges.txt: is not a regular file", rollout.load_codec, str(folder))


def test_nothing_foreign_is_overwritten():
    """Whatever is where a run, a checkpoint or results would be written stays as it is."""
    with scratch() as folder:
        mine, places = folder / "mine", ("config.json", "checkpoint-000000", "checkpoint-mine", "notes")
        runs = train.start, small_flags(folder / "run"), [folder / "run" / name for name in places]
        files = [folder / f"rows{suffix}" for suffix in ("", ".config.json", ".part0")]
        for main, flags, places in (runs, (evaluation.main, eval_flags(data_file(folder), files[0]), files)):
            for place, kind in itertools.product(places, ("file", "link", "fifo", "folder")):
                mine.write_text('{"model_type": "mine"}')
                place.parent.mkdir(exist_ok=True)
                {"file": lambda: shutil.copy(mine, place), "link": lambda: place.symlink_to(mine),
                 "fifo": lambda: os.mkfifo(place), "folder": place.mkdir}[kind]()
                before = os.lstat(place)
                assert str(folder) in last_words(main, flags), (place, kind)
                assert os.lstat(place)[:4] == before[:4] and mine.read_text() == '{"model_type": "mine"}'
                place.rmdir() if kind == "folder" else place.unlink()
        shutil.copytree(TINY, folder / "model")
        assert "--out" in last_words(train.start, small_flags(folder / "model", model=folder / "model"))
        assert m.read_json(folder / "model" / "config.json") == m.read_json(Path(TINY) / "config.json")


def test_a_run_folder_has_one_writer_and_edited_files_are_named():
    with scratch() as folder, contextlib.redirect_stdout(io.StringIO()):
        run, resume = folder / "run", ["--resume", f"{folder}/run"]
        trainer = small_trainer(run, stage="sft", max_steps=1)
        log = train.Log(trainer)
        assert f"process {os.getpid()} on " in last_words(train.start, small_flags(run))
        log.lock.close()
        train.train(trainer)
        assert "--out" in last_words(train.start, [*resume, "--out", "elsewhere"])
        for file, text in (("metrics.jsonl", '{"step": "x"}'), ("metrics.jsonl", "[]"), ("config.json", "{"),
                           ("heldout.json", '{"before": 3}'), ("config.json", '{"stage": 3, "algo": "x"}')):
            whole = (run / file).read_text()
            (run / file).write_text(text)
            assert re.search(file + "|--stage", last_words(train.start, resume)), (file, text)
            (run / file).write_text(whole)
        shard = run / "checkpoint-000001" / "optimizer-00001-of-00001.safetensors"
        state = load_file(shard)
        for key, change in (("exp_avg", math.nan), ("exp_avg_sq", -1), ("step", -1), ("master", math.inf)):
            changed = {name: value * change if name.endswith(key) else value for name, value in state.items()}
            save_file(changed, shard)
            assert re.search("--resume|optimizer", last_words(train.start, resume)), key


def test_no_weight_that_is_not_finite_is_loaded_or_saved():
    with scratch() as folder, contextlib.redirect_stdout(io.StringIO()):
        model, name = shutil.copytree(TINY, folder / "model"), "model.norm.weight"
        tensors = load_file(model / "model.safetensors")
        for change in (lambda value: value * math.nan, lambda value: value.to(torch.int8),
                       *(lambda value, dtype=dtype: (value * math.inf).to(dtype) for dtype in
                         (torch.bfloat16, torch.half, torch.float, torch.double)),
                       lambda value: value.double() * 1e300):
            save_file({**tensors, name: change(tensors[name])}, model / "model.safetensors")
            raises(m.InputError, [str(model), name], m.load_model, model)
        trainer = small_trainer(folder / "run", stage="sft", save_every=1, max_bad_steps=1)
        decay, before = trainer.optimizer.adamw.param_groups[1], trainer.model.model.norm.weight.clone()
        decay["weight_decay"] = math.nan                    # as a hook of one's own might
        raises(FloatingPointError, "without a finite gradient", train.train, trainer)
        assert torch.equal(before, trainer.model.model.norm.weight)
        decay["weight_decay"], trainer.optimizer.masters[name].data[0] = 0.0, math.nan
        raises(FloatingPointError, "weights that are not finite", trainer.sft_step)
        assert [file.name for file in folder.glob("run/*checkpoint*")] == ["checkpoint-000000"]
        trainer.model.model.norm.weight.data[0] = math.nan
        raises(m.InputError, name, trainer.save)


def test_images_that_are_refused_or_go_away():
    with scratch() as scratched, contextlib.redirect_stderr(io.StringIO()) as said:
        folder, noise = scratched / "data", Image.effect_noise((60, 60), 90).convert("RGB")
        folder.mkdir()
        noise.save(scratched / "secret.png")
        data, image = data_file(folder, 2, images=["x.png"]), folder / "x.png"
        for make, words in ((lambda: noise.save(image, "EPS"), "not readable"), (image.mkdir, "no such file"),
                            (lambda: noise.save(image, "PPM"), "not readable"),
                            (lambda: os.mkfifo(image), "no such"),
                            (lambda: image.symlink_to("../secret.png"), "outside"),
                            (lambda: Image.new("1", (9000, 9000)).save(image, "PNG"), "too many")):
            make()
            raises(rollout.InputError, ["data.jsonl:1: field 'images'", words], rollout.load_problems, data)
            image.rmdir() if image.is_dir() else image.unlink()
        noise.save(image)
        bad, good = rollout.load_problems(data), rollout.load_problems(data_file(folder))
        image.write_bytes(b"no image any more")
        records = evaluation.evaluate(tiny_model(), tiny_codec(), good[2:] + bad, 0, 4)
        assert [r["id"] for r in records] == ["p2", "p3"] and said.getvalue().count("is skipped") == 2
        trainer = small_trainer()
        assert [p.id for p in trainer.readable(bad + good[3:])[0]] == ["p3"] * 3
        raises(m.InputError, "--data", trainer.readable, bad)


def test_control_characters_are_shown_escaped():
    with scratch() as folder, contextlib.redirect_stdout(io.StringIO()) as said:
        data = data_file(folder, 1, task="t\x1b[31m\n")
        data.write_text(data.read_text() + data.read_text().replace("p0", "p1").replace("31m", "0m"))
        evaluation.main([*eval_flags(data, folder / "rows"), "--samples", "0"])
        assert "task t\\x1b[31m\\n" in said.getvalue() and "\x1b" not in said.getvalue()
        data.write_text('{"id": "\\u001b[2J", "problem": "x", "answer": "1"}\n' * 2)
        assert "\\x1b[2J is taken" in last_words(train.start, small_flags(folder / "run", data=data))


def test_folders_like_the_hubs_train_and_open_again():
    """transformers opens a checkpoint of such a run, in one file and in shards; its greedy answer is ours."""
    for tied in (True, False):
        with scratch() as folder:
            hub, data = hub_folder(folder / "Qwen2.5-VL-xB", tied), data_file(folder)
            small_run(folder / "run", model=str(hub), data=str(data), max_steps=1, max_new_tokens=8)
            saved, shards = folder / "run" / "checkpoint-000001", folder / "shards"
            m.save_model(m.load_model(saved), shards, saved, max_shard_bytes=40_000)
            assert (shards / "model.safetensors.index.json").is_file()
            for file in hub.iterdir():
                if not file.name.startswith(("model", "config")):
                    assert (shards / file.name).read_bytes() == file.read_bytes(), file.name
            for load in (m.load_model, reference_model):
                assert all(map(torch.equal, load(saved).parameters(), load(shards).parameters()))
            m.save_model(m.load_model(shards), shards, shards, torch.bfloat16)      # what was there is gone
            assert len(list(shards.glob("model*"))) == 1
            assert m.load_model(shards, dtype=torch.bfloat16).head_weight.dtype == torch.bfloat16
            problem, codec = rollout.load_problems(data)[0], rollout.load_codec(str(saved))
            t = rollout.sample(m.load_model(saved).eval(), [problem], codec, 1, 8, 0.0)[0][0]
            ids = torch.tensor([t.prompt.ids])
            found = reference_model(saved).generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=t.prompt.pixel_values,
                image_grid_thw=torch.tensor(t.prompt.grids), max_new_tokens=8, do_sample=False,
                mm_token_type_ids=(ids == codec.image_token_id).int(), repetition_penalty=1.0,
                suppress_tokens=(codec.logit_mask < 0).nonzero()[:, 0].tolist())
            assert found[0, ids.shape[1]:].tolist() == t.ids


def test_lora_is_a_product_added_to_frozen_matrices():
    """Against the sum written out; the frozen model under it shares its tensors and stays as it was."""
    with scratch() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = small_trainer(folder / "run", **KINDS["lora"])
        model, start, ids = trainer.model, tiny_model(), torch.arange(40)[None]
        assert torch.equal(model(ids), start(ids)) and len(trainer.optimizer.params) == 4 * 7 * 2
        assert trainer.reader is trainer.reference
        shared = dict(model.named_parameters())
        assert all(p is shared[name] for name, p in trainer.reader.named_parameters())
        train.train(trainer)
        assert torch.equal(trainer.reader(ids), start(ids)) and not torch.equal(model(ids), start(ids))
        summed = copy.deepcopy(start)
        for name, A in shared.items():
            if name.endswith("lora_A"):
                summed.get_parameter(name[:-6] + "weight").data += 32.0 / 4 * shared[name[:-1] + "B"] @ A
        saved, merged = folder / "run" / "checkpoint-000001", folder / "merged"
        train.start(["--model", str(saved), "--merge", str(merged)])
        for found in (summed, m.load_model(saved), m.load_model(merged), reference_model(merged)):
            logits = found(input_ids=ids)
            close(getattr(logits, "logits", logits), model(ids), 1e-4)
        assert "is there already" in last_words(train.start, ["--model", str(saved), "--merge", str(merged)])
        small_run(folder / "on", model=str(saved), stage="sft", max_steps=1)       # the adapter is merged
        assert (folder / "on/checkpoint-000001/model.safetensors").is_file()
        said = last_words(train.start, ["--resume", str(folder / "run"), "--merge", str(folder / "other")])
        assert "--merge" in said and "--model" in said and not (folder / "other").exists()
        bare = folder / "bare"                              # as PEFT itself writes one
        bare.mkdir()
        for name in m.ADAPTER_FILES:
            shutil.copy(saved / name, bare)
        train.start(["--model", str(bare), "--merge", str(folder / "whole")])
        close(m.load_model(folder / "whole")(ids), model(ids), 1e-4)
        rollout.load_codec(str(folder / "whole"))

        def full_disk(*given, **options):
            raise SafetensorError("File too large")

        with swapped(m, "save_torch_state_dict", full_disk):
            said = last_words(train.start, ["--model", str(saved), "--merge", str(folder / "full")])
        assert "--merge" in said and not list(folder.glob("full*")), said
        flags = small_flags(folder / "new", model=saved, lora=2)
        assert "is an adapter already" in last_words(train.start, flags)
        file = saved / "adapter_config.json"
        whole = json.loads(file.read_text())
        for name, value in (("r", 0), ("r", 5), ("lora_alpha", math.nan), ("base_model_name_or_path", None),
                            ("base_model_name_or_path", str(saved)), ("use_dora", True),
                            ("peft_type", "IA3"), ("alpha_pattern", {"q_proj": 1.0}),
                            ("rank_pattern", {"q_proj": 2}), ("init_lora_weights", "pissa"),
                            ("layer_replication", [[0, 2]]), ("modules_to_save", ["lm_head"])):
            file.write_text(json.dumps({**whole, name: value}))
            raises(ValueError, str(saved), m.load_model, saved)


def test_the_main_job_improves():
    """By default flags, but with shorter chains and few steps at a higher rate, held-out accuracy rises."""
    with scratch() as folder, contextlib.redirect_stdout(io.StringIO()) as printed:
        train.start(f"--out {folder} --data tiny:steps=7 --max_steps 3 --batch 8 --lr 3e-4 --warmup_steps 1 "
                    "--eval_problems 12 --eval_every 2 --device cpu".split())
        for words in ("held-out before: greedy", "held-out after:  greedy", "held-out at 2: avg@1", "pass@4",
                      "step 3/3", "question", "rectified", "| task bars"):
            assert words in printed.getvalue(), words
        before, after = m.read_json(folder / "heldout.json").values()
        assert before["n"] == after["n"] == 12 and metrics(folder)[1]["heldout"]["n"] == 6
        assert after["avg@4"]["mean"] > before["avg@4"]["mean"] + 0.05, (before, after)


def test_a_repair_is_shown_step_by_step():
    """Every step with its verdict and gap, and below the one that was revised what it became."""
    source = planted(steps=4, wrong=(2,))
    source.checks[2], source.rewards, true = BAD, {"accuracy": 0.0}, source.problem.key_steps
    steps = [attribute.Step(step.start, step.stop, text) for step, text in zip(source.steps, true)]
    rectified = replace(source, source=source, steps=steps, provenance="revised 1")
    lines = train.describe([source, rectified]).split("\n")
    assert [line.split()[0] for line in lines] == ["question", "gold", *["step"] * 3, "rectified", "step",
                                                   "sampled", "rectified", "reward"]
    for n, line in zip((1, 2, 3, 4), lines[2:5] + lines[6:7]):
        verdict, gap = ("misread", "2.0!") if n == 3 else ("true", "0.5")
        assert line.split()[1:4] == [str(n), verdict, gap] and repr(source.steps[n - 1].text) in line
    assert repr(true[2]) in lines[5] and "revised 1" in lines[-2]
    unsplit = train.describe([replace(source, steps=None, checks=None)])    # right ones are not split
    assert "step" not in unsplit and repr(source.text[-200:]) in unsplit


def test_the_main_job_names_the_other_algorithm():
    runs = m.read_json(ROOT / "experiments" / "results" / "seeds.json")["runs"]
    for algo, other in (("ivr", "grpo"), ("grpo", "ivr")):
        greedy = [run["after"]["greedy"]["mean"] for run in runs if run["algo"] == other]
        said = train.counterpart(train.TrainConfig(algo=algo))
        assert f"--algo {other}: greedy {100 * sum(greedy) / len(greedy):.1f} %" in said
        assert "seeds.json" in said
    assert train.counterpart(train.TrainConfig(data="tiny:steps=3")) == ""


def test_experiments():
    done = subprocess.run([sys.executable, ROOT / "experiments" / "tests.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


# ---- Running them

def main(tests: dict):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", help="run only tests whose name contains this")
    word = parser.parse_args().k
    os.environ["HF_HUB_OFFLINE"] = "1"                  # hermetic: a test that reaches for the network fails
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.chdir(ROOT)                                      # `--model tiny`, the default, is the folder here
    passed = failed = 0
    for name, test in list(tests.items()):
        if not name.startswith("test_") or word not in name:
            continue
        started = time.time()
        try:
            test()
            passed += 1
            print(f"ok    {name}  {time.time() - started:.1f} s", flush=True)
        except BaseException as e:
            failed += 1
            print(f"FAIL  {name}  {time.time() - started:.1f} s\n{traceback.format_exc()}", flush=True)
            if isinstance(e, KeyboardInterrupt):
                break
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main(globals())

"""Every test, in file order: python test_all.py [-k WORD]

Each compares a component with a slow, obvious reference: transformers' own model, a for-loop, torch.autograd,
one rank, an uninterrupted run. No network, no GPU.
"""
import argparse
import base64
import contextlib
import csv
import functools
import html
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import attribute
import eval as evaluation
import grpo
import model as m
import rereason
import rollout
import train
from answers import equal
from benchmarks import figures, formats, rules
from data import reading
from data.codec import load_codec
from experiments import kills
from reward import (answers_match, extract_answer, format_ok, reward_parts, step_rar, step_reward_parts,
                    step_rvr)
from runtime import balance, files
from runtime.flags import parse_flags
from runtime.optimizer import Optimizer, learning_rate
from runtime.process import Ranks
from tiny import shapes
from viewer import log, report, terminal, trace

ROOT = Path(__file__).resolve().parent
TINY = str(ROOT / "tiny")


def raises(kind, text, f, *args, **kwargs):
    """Assert that f(...) raises `kind` with every one of `text` (a string or several) in the message."""
    try:
        f(*args, **kwargs)
    except kind as e:
        for t in [text] if isinstance(text, str) else text:
            assert t in str(e), f"{t!r} is not in {str(e)!r}"
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
    difference = (torch.as_tensor(a, dtype=torch.double)
                  - torch.as_tensor(b, dtype=torch.double)).abs().max().item()
    assert difference <= tolerance, f"differ by {difference:.2e}, allowed {tolerance:.0e}"


def random_model(seed=0, spread=0.25):
    """The tiny architecture with random weights large enough that nothing is nearly uniform or nearly
    certain."""
    config = m.Config.from_dict(files.read_json(Path(TINY) / "config.json"))
    return m.init_model(replace(config, initializer_range=spread), seed).eval()


def mixed_problems(count=4, steps=3):
    """Problems with one image, two images and none, so prompts differ in length."""
    out = [shapes.make_problem(shapes.KINDS[i % 4], steps + i % 3, "free", "train", 5, i)
           for i in range(count)]
    out[1] = replace(out[1], question="<image> and <image>" + out[1].question.replace("<image>", ""),
                     images=out[1].images + out[0].images)
    out[2] = replace(out[2], question=out[2].question.replace("<image>", ""), images=[])
    return out


# ------------------------------------------------------------------------------------------------------------
# model.py


def hub_model(seed: int):
    """A random Qwen2.5-VL of transformers, small, every architectural knob turned by the seed."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    r = random.Random(seed)
    heads, size = r.choice([2, 4]), r.choice([16, 32])
    kv = r.choice([k for k in (1, 2, 4) if k <= heads])
    section = {16: [[4, 2, 2], [2, 3, 3]], 32: [[8, 4, 4], [4, 6, 6]]}[size][seed % 2]
    depth, v_heads = r.choice([1, 2, 3, 4]), r.choice([2, 4])
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=300, hidden_size=heads * size, intermediate_size=96,
                         num_attention_heads=heads, num_hidden_layers=r.choice([1, 2, 3]),
                         num_key_value_heads=kv, bos_token_id=1, eos_token_id=2,
                         rope_parameters=dict(rope_type="default", rope_theta=r.choice([1e4, 1e6]),
                                              mrope_section=section)),
        vision_config=dict(depth=depth, hidden_size=v_heads * 16, num_heads=v_heads, intermediate_size=48,
                           out_hidden_size=heads * size, window_size=r.choice([56, 84, 112]),
                           fullatt_block_indexes=[i for i in range(depth) if r.random() < 0.5]),
        image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8,
        tie_word_embeddings=seed % 2 == 0)
    torch.manual_seed(seed)
    reference = Qwen2_5_VLForConditionalGeneration(config).eval()
    for p in reference.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.dim() > 1 else torch.nn.init.normal_(p, mean=0.5, std=0.3)
    return reference


def hub_batch(seed: int, check_images=True):
    """Rows with 1, 2, 0 and 1 images of odd sizes, padded on the right or, every third seed, on the left."""
    r = random.Random(seed)
    noise = np.random.default_rng(seed)
    rows, pixels, grids = [], [], []
    for count in (1, 2, 0, 1):
        ids = [r.randrange(10, 300) for _ in range(r.randrange(1, 9))]
        for _ in range(count):
            image = Image.fromarray(noise.integers(0, 256, (r.randrange(30, 200), r.randrange(30, 260), 3),
                                                   dtype=np.uint8))
            patches, grid = m.preprocess_image(image, m.ImageConfig())
            if check_images:
                same_patches(image, patches, grid)
            pixels.append(torch.from_numpy(patches))
            grids.append(grid)
            ids += ([7] + [5] * (grid[1] * grid[2] // 4) + [8]
                    + [r.randrange(10, 300) for _ in range(r.randrange(9))])
        rows.append(ids)
    ids, mask = rollout.pad(rows, 0, left=seed % 3 == 0)
    return ids, mask.long(), torch.cat(pixels), torch.tensor(grids)


def same_patches(image, patches, grid):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    reference = Qwen2VLImageProcessorPil()(images=[image], return_tensors="pt")
    assert tuple(reference.image_grid_thw[0].tolist()) == grid
    close(reference.pixel_values, patches)


def reference_logits(reference, ids, mask, pixels, grids):
    with torch.no_grad():
        return reference(input_ids=ids, attention_mask=mask, pixel_values=pixels, image_grid_thw=grids,
                         mm_token_type_ids=(ids == 5).int()).logits


def test_parity_with_transformers():
    """12 random configurations, loaded from what transformers saved: logits to 1e-4, image patches to
    1e-4."""
    for seed in range(12):
        reference, batch = hub_model(seed), hub_batch(seed)
        with scratch() as folder:
            reference.save_pretrained(folder)
            ours = m.load_model(folder)
        with torch.no_grad():
            logits = ours(*batch)
        real = batch[1][..., None]
        expected = reference_logits(reference, *batch)
        assert expected.abs().max() > 1, "a reference near zero would agree with anything"
        close(logits * real, expected * real)


def test_parity_text_only_and_single_image():
    reference = hub_model(3)
    with scratch() as folder:
        reference.save_pretrained(folder)
        ours = m.load_model(folder)
    ids = torch.randint(10, 300, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        close(ours(ids), reference(input_ids=ids).logits)
    for size in ((28, 28), (280, 30), (37, 211), (500, 500)):
        image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8))
        patches, grid = m.preprocess_image(image, m.ImageConfig())
        same_patches(image, patches, grid)
        row = torch.tensor([[11, 7] + [5] * (grid[1] * grid[2] // 4) + [8, 12, 13]])
        batch = row, torch.ones_like(row), torch.from_numpy(patches), torch.tensor([grid])
        with torch.no_grad():
            close(ours(*batch), reference_logits(reference, *batch))


def test_smart_resize_like_transformers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
    r = random.Random(0)
    for _ in range(500):
        h, w = r.randrange(5, 900), r.randrange(5, 900)
        low, high = r.choice([(784, 12544), (3136, 1003520), (50176, 100352)])
        assert m.smart_resize(h, w, 28, low, high) == smart_resize(h, w, 28, low, high), (h, w, low, high)
    raises(ValueError, "aspect ratio", m.smart_resize, 1, 300, 28, 784, 10 ** 6)


def test_transformers_opens_what_we_save():
    """In one file and in shards, tied and untied; and we open it again, bit for bit."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    for seed, limit in ((1, 5 * 10 ** 9), (2, 40_000), (3, 40_000)):
        with scratch() as folder:
            hub_model(seed).save_pretrained(folder / "a")
            ours = m.load_model(folder / "a")
            m.save_model(ours, folder / "b", folder / "a", max_shard_bytes=limit)
            assert (folder / "b" / "model.safetensors.index.json").is_file() == (limit < 10 ** 9)
            reference, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                folder / "b", output_loading_info=True)
            assert not any(info.values()), info
            again, batch = m.load_model(folder / "b"), hub_batch(seed, check_images=False)
        with torch.no_grad():
            close(ours(*batch) * batch[1][..., None],
                  reference_logits(reference.eval(), *batch) * batch[1][..., None])
        for (name, a), (_, b) in zip(ours.named_parameters(), again.named_parameters()):
            assert torch.equal(a, b), name


def test_bad_checkpoints_are_named():
    with scratch() as folder:
        good = folder / "good"
        hub_model(1).save_pretrained(good)
        tensors, config = (load_file(good / "model.safetensors"),
                           json.loads((good / "config.json").read_text()))
        name = next(n for n in tensors if n.endswith("q_proj.weight"))

        def broken(change=None, config_change=None, write=True):
            bad = folder / "bad"
            bad.mkdir(exist_ok=True)
            (bad / "config.json").write_text(json.dumps({**config, **(config_change or {})}))
            (bad / "model.safetensors").unlink(missing_ok=True)
            if write:
                save_file({k: v.clone() for k, v in (change or tensors).items()}, bad / "model.safetensors")
            return bad

        raises(ValueError, ["missing", name], m.load_model,
               broken({k: v for k, v in tensors.items() if k != name}))
        raises(ValueError, ["unexpected", "stray"], m.load_model, broken({**tensors, "stray": torch.ones(2)}))
        raises(ValueError, [name, "shape (3, 3)"], m.load_model, broken({**tensors, name: torch.ones(3, 3)}))
        for other in ("llama", "qwen2_vl", "qwen3_vl"):
            raises(ValueError, ["config.json", "model_type", other], m.load_model,
                   broken(None, {"model_type": other}))
        raises(ValueError, ["model.safetensors", "missing"], m.load_model, broken(write=False))
        bad = broken()
        (bad / "model.safetensors").write_bytes(b"not tensors at all")
        raises(ValueError, ["model.safetensors", "not a readable"], m.load_model, bad)
        (bad / "config.json").write_text("{broken")
        raises(ValueError, ["config.json", "not JSON"], m.load_model, bad)
    raises(FileNotFoundError, "no such folder", m.load_model, "./no/such/folder")


def test_image_tokens_must_match_images():
    net = random_model()
    ids = torch.tensor([[1, net.config.image_token_id, net.config.image_token_id, 2]])
    pixels = torch.zeros(16, 1176)
    raises(ValueError, "image 0 needs 4 image tokens", net, ids, None, pixels, torch.tensor([[1, 4, 4]]))
    raises(ValueError, "more image tokens", net, ids)


def test_remat_changes_nothing():
    net, ps = random_model(), mixed_problems()
    codec = load_codec(TINY)
    prompts = [rollout.encode_prompt(p, codec) for p in ps]
    grads = []
    for net.remat in (False, True):
        hidden, _, mask = rollout.completion_hidden(net, prompts, [0, 1, 2, 3], [[5, 6, 7]] * 4, codec.pad_id)
        net.zero_grad()
        hidden[mask].square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    for a, b in zip(*grads):
        close(a, b, 1e-3 * max(1.0, a.abs().max().item()))


# ------------------------------------------------------------------------------------------------------------
# rollout.py


def uncached_logps(net, codec, problem, ids, temperature=1.0):
    """The slow, obvious log-probs: one whole uncached forward a token."""
    prompt, out = rollout.encode_prompt(problem, codec), []
    for t in range(len(ids)):
        row = torch.tensor([prompt.ids + list(ids[:t])])
        grids = torch.tensor(prompt.grids) if prompt.grids else None
        with torch.no_grad():
            logits = net(row, None, prompt.pixel_values, grids)[0, -1] + codec.logit_mask
        out.append((logits / temperature).log_softmax(-1)[ids[t]].item())
    return out


def rolled(net, codec, problems, group_size=3, length=14, key="test", **kwargs):
    numbers = torch.cat([rollout.uniforms(f"{key}/{p.id}", group_size, length) for p in problems])
    return rollout.sample(net, problems, codec, group_size, length, uniforms=numbers, **kwargs)


def test_sampled_logps_are_the_models():
    """Cached sampling of a ragged batch against one uncached forward a token."""
    net, codec, problems = random_model(), load_codec(TINY), mixed_problems()
    lengths = set()
    for group in rolled(net, codec, problems):
        for t in group:
            lengths.add(len(t.ids))
            assert t.sampled == [1] * len(t.ids) and len(t.logps) == len(t.ids) <= 14
            close(t.logps, uncached_logps(net, codec, t.problem, t.ids))
    assert len({len(rollout.encode_prompt(p, codec).ids) for p in problems}) == 4


def test_sampled_logps_equal_training_logps():
    """What the update recomputes (prompts shared, rows padded) is what the sampler stored, to 1e-4."""
    net, codec, problems = random_model(), load_codec(TINY), mixed_problems()
    flat = [(i, t) for i, group in enumerate(rolled(net, codec, problems)) for t in group]
    flat = flat[::2] + flat[1::3]                       # any order, any number a prompt
    hidden, targets, mask = rollout.completion_hidden(
        net, [rollout.encode_prompt(p, codec) for p in problems], [i for i, _ in flat],
        [t.ids for _, t in flat], codec.pad_id)
    logps, _ = grpo.token_logps(hidden[mask], net.head_weight, targets[mask], codec.logit_mask)
    assert mask.sum(1).tolist() == [len(t.ids) for _, t in flat]
    close(logps, torch.tensor([x for _, t in flat for x in t.logps]))


def test_row_in_batch_equals_row_alone():
    net, codec, problems = random_model(), load_codec(TINY), mixed_problems()
    together = rolled(net, codec, problems)
    assert len({tuple(t.ids) for t in together[0]}) > 1, "the rows of a group must differ"
    for problem, group in zip(problems, together):
        alone = rolled(net, codec, [problem])[0]
        assert [t.ids for t in alone] == [t.ids for t in group]
        close([x for t in alone for x in t.logps], [x for t in group for x in t.logps])


def eager_to_stop(net, codec, bias=6.0):
    """A model whose every row may end at any moment: the end token's embedding is made popular."""
    mask = codec.logit_mask.clone()
    mask[codec.eos_ids[0]] += bias
    return replace(codec, logit_mask=mask)


def test_finished_rows_leave_and_nothing_changes():
    """Rows end at different times, the batch shrinks, and still each row is what it is alone."""
    net, codec, problems = random_model(), load_codec(TINY), mixed_problems()
    codec = eager_to_stop(net, codec)
    sizes, forward = [], net.rows_hidden
    net.rows_hidden = lambda ids, *rest: sizes.append(len(ids)) or forward(ids, *rest)
    groups = rolled(net, codec, problems, group_size=8, length=40)
    del net.rows_hidden
    lengths = [len(t.ids) for g in groups for t in g]
    assert len(set(lengths)) > 3 and sizes[-1] < sizes[0] == 32, (lengths, sizes)
    for problem, group in zip(problems, groups):
        for t in group:
            assert t.finished == (t.ids[-1] in codec.eos_ids) and not set(t.ids[:-1]) & set(codec.eos_ids)
            assert t.finished or len(t.ids) == 40
            close(t.logps[:3], uncached_logps(net, codec, problem, t.ids[:3]))
            close(t.logps[-1:], uncached_logps(net, codec, problem, t.ids)[-1:])


def test_prefix_continues_like_the_uncached_forward():
    """Restart at any token: forced tokens are marked, and what follows is what would have followed."""
    net, codec, problems = random_model(), load_codec(TINY), mixed_problems()
    numbers = torch.cat([rollout.uniforms(p.id, 2, 12) for p in problems])
    whole = [t for g in rollout.sample(net, problems, codec, 2, 12, uniforms=numbers) for t in g]
    cuts = [0, 3, 5, 1, 2, 7, 4, 0]
    prefixes = [t.ids[:min(c, len(t.ids) - 1)] for t, c in zip(whole, cuts)]
    again = [t for g in rollout.sample(net, problems, codec, 2, 12, uniforms=numbers, prefix_ids=prefixes)
             for t in g]
    for t, prefix, original in zip(again, prefixes, whole):
        assert t.ids == original.ids                    # the same random numbers at the same token
        assert t.sampled == [0] * len(prefix) + [1] * (len(t.ids) - len(prefix))
        assert t.logps[:len(prefix)] == [0.0] * len(prefix)
        close(t.logps[len(prefix):], uncached_logps(net, codec, t.problem, t.ids)[len(prefix):])
    raises(ValueError, "prefix_ids", rollout.sample, net, problems, codec, 2, 12,
           uniforms=numbers, prefix_ids=[[1]])


def test_rows_end_at_limits_and_stop_tokens_of_their_own():
    net, codec, problems = random_model(), load_codec(TINY), mixed_problems()
    whole = [t for g in rolled(net, codec, problems, 2, 12) for t in g]
    limits = [3, 12, 1, 7, 12, 2, 5, 9]
    short = [t for g in rolled(net, codec, problems, 2, 12, limits=limits) for t in g]
    for t, cut, limit in zip(whole, short, limits):
        assert cut.ids == t.ids[:limit] and cut.finished == (t.finished and len(t.ids) <= limit)
    stop = whole[1].ids[4]
    for t, cut in zip(whole, [t for g in rolled(net, codec, problems, 2, 12, stop_ids=(stop,)) for t in g]):
        end = t.ids.index(stop) + 1 if stop in t.ids else len(t.ids)
        assert cut.ids == t.ids[:end] and cut.finished == (t.finished and end == len(t.ids))


def test_prompt_and_vision_once_whatever_the_group():
    net, codec, problems = random_model(), load_codec(TINY), mixed_problems()
    patches, prompt_tokens = [], []
    visual, decoder = net.visual.forward, net.model.forward
    net.visual.forward = lambda x, *rest: patches.append(len(x)) or visual(x, *rest)
    net.model.forward = lambda x, *rest: prompt_tokens.append(x.shape[0] * x.shape[1]) or decoder(x, *rest)
    for group_size in (1, 16):
        patches.clear(), prompt_tokens.clear()
        rolled(net, codec, problems, group_size, 5)
        counts = (sum(patches), prompt_tokens[0])
        first = counts if group_size == 1 else first
        assert counts == first


def test_shared_prompts_have_the_gradients_of_plain_ones():
    """A prompt computed once a group gives the gradients of one computed for each row."""
    net, codec, problems = random_model(), load_codec(TINY), mixed_problems()
    prompts = [rollout.encode_prompt(p, codec) for p in problems]
    rng, grads = random.Random(0), []
    owner = [0, 0, 0, 1, 1, 2, 3, 3]
    rows = [[rng.randrange(5, 400) for _ in range(rng.randint(1, 9))] for _ in owner]
    for given, of_row in ((prompts, owner), ([prompts[n] for n in owner], list(range(len(owner))))):
        net.zero_grad()
        logps, _, mask = rollout.completion_logps(net, given, of_row, rows, codec)
        weights = torch.linspace(-1, 1, logps.numel()).view_as(logps)
        (weights * logps * mask).sum().backward()
        grads.append({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for shared, plain in zip(*(g.values() for g in grads)):
        scale = plain.abs().max().clamp(min=1e-3)
        close(shared / scale, plain / scale, 1e-5)


def test_completions_of_one_token():
    """The shortest there are: the update's forward has no row tokens to run."""
    net, codec, problems = random_model(), load_codec(TINY), mixed_problems()
    groups = rolled(net, codec, problems, 2, 1)
    prompts = [rollout.encode_prompt(p, codec) for p in problems]
    ids = [t.ids for g in groups for t in g]
    hidden, targets, mask = rollout.completion_hidden(net, prompts, [0, 0, 1, 1, 2, 2, 3, 3], ids,
                                                      codec.pad_id)
    logps, _ = grpo.token_logps(hidden[mask], net.head_weight, targets[mask], codec.logit_mask)
    close(logps, torch.tensor([t.logps[0] for g in groups for t in g]))


def test_greedy_is_argmax():
    net, codec, problems = random_model(), load_codec(TINY), mixed_problems()
    for group in rollout.sample(net, problems, codec, 1, 6, temperature=0):
        t, prompt = group[0], rollout.encode_prompt(group[0].problem, codec)
        for k, token in enumerate(t.ids):
            grids = torch.tensor(prompt.grids) if prompt.grids else None
            with torch.no_grad():
                logits = net(torch.tensor([prompt.ids + t.ids[:k]]), None, prompt.pixel_values, grids)[0, -1]
            assert (logits + codec.logit_mask).argmax().item() == token


def test_next_token_follows_the_distribution():
    logits = torch.tensor([[0.2, 0.5, 0.3, 0.0]]).log().clamp(min=-1e9)
    banned = torch.zeros(4)
    token, logp = rollout.next_token(logits, banned, 1.0, torch.tensor([0.65]))
    assert token.item() == 1 and abs(logp.item() - math.log(0.5)) < 1e-6         # the header's worked example
    first_banned = torch.tensor([-torch.inf, 0.0, 0.0, 0.0])        # its probability 0 is not above 0
    assert rollout.next_token(logits, first_banned, 1.0, torch.tensor([0.0]))[0].item() == 1
    grid = (torch.arange(10_000) + 0.5) / 10_000
    for temperature in (1.0, 0.5):
        token, logp = rollout.next_token(logits.expand(10_000, -1),
                                         torch.tensor([0.0, 0.0, -torch.inf, 0.0]), temperature, grid)
        want = torch.tensor([0.2, 0.5, 0.0, 0.0]) ** (1 / temperature)
        want /= want.sum()
        close(torch.bincount(token, minlength=4) / 10_000, want, 2e-4)
        close(logp.exp(), want[token])


def test_forbidden_tokens_never_come():
    net, codec, problems = random_model(), load_codec(TINY), mixed_problems()
    banned = set(torch.nonzero(codec.logit_mask < 0)[:, 0].tolist())
    assert codec.image_token_id in banned and codec.pad_id in banned and not banned & set(codec.eos_ids)
    with torch.no_grad():
        net.head_weight[sorted(banned)] *= 20           # without the mask they would come all the time
    for group in rolled(net, codec, problems, 8, 20):
        assert not banned & {i for t in group for i in t.ids}


def test_uniforms_belong_to_their_key():
    a = rollout.uniforms("a", 3, 5)
    assert torch.equal(a, rollout.uniforms("a", 3, 5)) and not torch.equal(a, rollout.uniforms("b", 3, 5))
    assert a.min() >= 0 and a.max() < 1


def test_sampling_leaves_inputs_alone():
    net, codec, problems = random_model(), load_codec(TINY), mixed_problems()
    prompts = [rollout.encode_prompt(p, codec) for p in problems]
    before = [(list(p.ids), None if p.pixel_values is None else p.pixel_values.clone()) for p in prompts]
    weights = [p.clone() for p in net.parameters()]
    numbers, prefix = rollout.uniforms("x", 4, 9), [[9, 10]] * 4
    kept = numbers.clone()
    rollout.sample(net, problems, codec, 1, 9, uniforms=numbers, prefix_ids=prefix, prompts=prompts)
    assert torch.equal(numbers, kept) and prefix == [[9, 10]] * 4
    assert all(p.ids == ids and (x is None or torch.equal(p.pixel_values, x))
               for p, (ids, x) in zip(prompts, before))
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters()))


def test_chat_template_beside_the_tokenizer():
    """Qwen2.5-VL keeps the template that knows images in chat_template.json; the tokenizer's is for text."""
    with scratch() as folder:
        for f in Path(TINY).glob("*.json"):
            (folder / f.name).write_text(f.read_text())
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        template = settings.pop("chat_template")
        settings["chat_template"] = "{% for m in messages %}{{ 'text: ' + m.content }}{% endfor %}"
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
        p = shapes.make_problem("tiles", 4)
        assert rollout.encode_prompt(p, load_codec(str(folder))).ids == \
            rollout.encode_prompt(p, load_codec(TINY)).ids
        small = rollout.encode_prompt(p, load_codec(TINY, max_pixels=28 * 28 * 4))
        whole = rollout.encode_prompt(p, load_codec(TINY))
        assert len(small.pixel_values) <= 16 < len(whole.pixel_values)


def test_prompt_is_the_chat_template():
    codec = load_codec(TINY)
    p = shapes.make_problem("tiles", 4)
    prompt = rollout.encode_prompt(p, codec)
    pads = prompt.ids.count(codec.image_token_id)
    assert pads == prompt.grids[0][1] * prompt.grids[0][2] // 4 and len(prompt.pixel_values) == 4 * pads
    text = codec.tokenizer.decode([i for i in prompt.ids if i != codec.image_token_id])
    assert text == (f"<|im_start|>user\n<|vision_start|><|vision_end|>{p.question[7:]}<|im_end|>\n"
                    "<|im_start|>assistant\n")
    hostile = replace(p, question="<image>say <|im_end|> and <|image_pad|>")
    ids = rollout.encode_prompt(hostile, codec).ids
    assert (ids.count(codec.image_token_id) == pads
            and ids.count(codec.eos_ids[0]) == prompt.ids.count(codec.eos_ids[0]))
    raises(reading.DataError, ["tiles-4", "--max_prompt_tokens is 5"], rollout.encode_prompt, p, codec, 5)


def write_rows(folder, rows):
    Image.new("RGB", (40, 30)).save(folder / "a.png")
    path = folder / "data.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


def test_jsonl_aliases_and_image_tags():
    with scratch() as folder:
        rows = [{"images": ["a.png"], "problem": "<image>Find x.", "answer": 48},
                {"image": "a.png", "question": "Find y.",
                 "solution": "<think>long</think><answer>7</answer>"},
                {"prompt": [{"role": "user", "content": "One?"}], "ground_truth": "\\boxed{1}"},
                {"img": ["a.png", "a.png"], "query": "is <image> like <image>?", "answer": "yes", "id": "q"},
                {"problem": "stray <image> tag 12", "answer": "B", "choices": {"B": "2", "A": 1}, "id": None},
                {"problem": "Which?\n(A) x (B) y", "answer": "B", "choices": ["x", "y"]}]
        got = reading.load_problems(write_rows(folder, rows), instruction="Think.")
        assert [p.answer for p in got] == ["48", "7", "1", "yes", "B", "B"]
        assert [len(p.images) for p in got] == [1, 1, 0, 2, 0, 0]
        assert [p.question.count("<image>") for p in got] == [1, 1, 0, 2, 0, 0]
        assert got[4].choices == ["1", "2"] and len({p.id for p in got}) == 6
        assert got[5].question == "Which?\n(A) x (B) y\nThink."
        assert got[1].question == "<image>Find y.\nThink." and got[1].demonstration.startswith("<think>")
        assert got[3].id == "q" and "\nA. 1\nB. 2" in got[4].question
        codec = load_codec(TINY)
        for p in got:
            rollout.encode_prompt(p, codec)


def test_bad_rows_are_named_all_at_once():
    with scratch() as folder:
        (folder / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
        good = {"images": ["a.png"], "problem": "<image>Find x.", "answer": "48"}
        rows = [good, {**good, "images": ["none.png"]}, {**good, "images": ["cut.png"]}, '{"problem": "half',
                {**good, "answer": " "}, {**good, "problem": "<image><image>x"},
                {"images": ["a.png"], "answer": "1"}, {**good, "answer": None}, [1, 2],
                {**good, "images": ["data:image/png;base64,%%%"]}, {**good, "images": 5},
                {**good, "id": "twice"}, {**good, "id": "twice"}, '{"problem": "\\ud800", "answer": "1"}',
                '{"problem": "x", "answer": ' + "9" * 5000 + "}"]
        path = write_rows(folder, rows)
        message = raises(reading.DataError, [], reading.load_problems, path)
        for n, words in {2: ("none.png", "no such file"), 3: ("cut.png", "not readable"), 4: ("not JSON",),
                         5: ("'answer'", "empty"), 6: ("2 <image> tags", "1 images"), 7: ("'problem'",),
                         8: ("'answer'",), 9: ("JSON object",), 10: ("'images'", "data:"),
                         11: ("'images'",), 13: ("'id'", ":12"), 14: ("not readable",),
                         15: ("not readable",)}.items():
            lines = [x for x in message.splitlines() if x.startswith(f"{path}:{n}:")]
            assert len(lines) == 1 and all(w in lines[0] for w in words), (n, message)
        assert f"{path}:1:" not in message
        (folder / "empty.jsonl").write_text("\n\n")
        (folder / "latin.jsonl").write_bytes('{"problem": "30\xb0?", "answer": "1"}'.encode("latin-1"))
        raises(reading.DataError, "latin.jsonl:1", reading.load_problems, folder / "latin.jsonl")
        (folder / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"problem": "x", "answer": "1"}\r\n')
        assert reading.load_problems(folder / "bom.jsonl")[0].question == "x"
        Image.new("RGB", (1, 300)).save(folder / "a.png")
        codec, thin = load_codec(TINY), reading.load_problems(write_rows(folder, [good]))[0]
        Image.new("RGB", (1, 300)).save(folder / "a.png")
        raises(reading.DataError, ["data.jsonl:1", "images", "aspect"], rollout.encode_prompt, thin, codec)
        raises(reading.DataError, "no rows", reading.load_problems, folder / "empty.jsonl")
        raises(reading.DataError, "no such file", reading.load_problems, folder / "nothing.jsonl")


def test_images_of_every_kind():
    """16-bit, CMYK, palette, transparent, animated and turned images become the RGB picture a viewer shows;
    truncated and huge ones are errors that name the row."""
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    grey = np.tile(ramp, (48, 1))                                                       # (H 48, W 64)
    colour = Image.fromarray(np.stack((grey, grey[:, ::-1], 255 - grey), axis=-1))

    def through(image, kind, **options):
        out = io.BytesIO()
        image.save(out, kind, **options)
        return np.asarray(reading.open_image(out.getvalue())).astype(int)

    deep = through(Image.fromarray(grey.astype(np.uint16) * 257), "PNG")
    assert np.abs(deep - grey[..., None]).max() <= 1
    assert np.abs(through(colour.convert("CMYK"), "TIFF") - np.asarray(colour)).max() <= 2
    assert np.abs(through(colour.quantize(64), "PNG") - np.asarray(colour)).mean() < 12
    clear = colour.copy()
    clear.putalpha(0)
    assert (through(clear, "PNG") == np.asarray(colour)).all()
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    assert through(frames[0], "GIF", save_all=True, append_images=frames[1:])[0, 0].tolist() == [255, 0, 0]
    exif = Image.Exif()
    exif[0x0112] = 6                                                                    # turned by 90 degrees
    turned = through(colour, "PNG", exif=exif)
    assert turned.shape == (64, 48, 3) and (turned == np.asarray(colour.rotate(-90, expand=True))).all()
    config = replace(m.ImageConfig(), min_pixels=784)
    for image, kind in ((colour, "PNG"), (colour, "TIFF"), (colour, "JPEG"),
                        (Image.fromarray(grey.astype(np.uint16) * 257), "PNG")):
        for orientation in (1, 3, 6, 8, 9):             # the header tells the size that the content has
            exif[0x0112] = orientation
            out = io.BytesIO()
            image.resize((120, 60)).save(out, kind, exif=exif)
            picture = reading.open_image(out.getvalue())
            assert rollout.image_grid(out.getvalue(), config) == m.preprocess_image(picture, config)[1]
            assert (picture.height > picture.width) == (orientation in (6, 8)), (kind, orientation)
    with scratch() as folder:
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8))
        for name in ("cut.png", "cut.jpg"):
            noise.save(folder / name)
            (folder / name).write_bytes((folder / name).read_bytes()[:-400])
        Image.new("1", (15000, 15000)).save(folder / "bomb.png")
        rows = [{"image": n, "problem": "x?", "answer": "1"}
                for n in ("cut.png", "cut.jpg", "bomb.png", "a.png")]
        message = raises(reading.DataError, [], reading.load_problems, write_rows(folder, rows))
        assert len(message.splitlines()) == 3 and all(f"data.jsonl:{n}: " in message for n in (1, 2, 3))
        assert "bomb" in message.splitlines()[2]


def test_images_outside_the_folder_are_refused():
    with scratch() as folder:
        data = folder / "data"
        data.mkdir()
        Image.new("RGB", (40, 30)).save(folder / "b.png")
        for name in ("../b.png", str(folder / "b.png"), "file://" + str(folder / "b.png"), "x/../../b.png"):
            path = write_rows(data, [{"image": name, "problem": "x?", "answer": "1"}])
            raises(reading.DataError, ["data.jsonl:1", "outside", "--outside_images"],
                   reading.load_problems, path)
        (data / "x").mkdir()
        assert reading.load_problems(path, outside=True)
        path = write_rows(data, [{"image": "x/../a.png", "problem": "x?", "answer": "1"}])
        assert reading.load_problems(path) and reading.load_problems(path, image_dir=data)
        path = write_rows(data, [{"image": str(folder / "b.png"), "problem": "x?", "answer": "1"}])
        assert reading.load_problems(path, image_dir=folder)


def rows_of_other_projects(png, chat):
    """One row a source: a picture's bytes or its file a.png, and a chat about it."""
    tail = "You FIRST think about the reasoning process. The final answer MUST BE put in \\boxed{}."
    return {
        "EasyR1, Geometry3K": {"images": [{"bytes": png, "path": None}], "problem": "<image>Find x.",
                               "answer": "48", "choices": None, "ground_truth": "A"},
        "EasyR1, text only": {"images": [], "problem": "Find x.", "answer": "48"},
        "verl": {"data_source": "hiyouga/geometry3k", "images": [{"bytes": png}], "ability": "math",
                 "prompt": [{"role": "system", "content": "Be brief."},
                            {"role": "user", "content": f"<image>Find x. {tail}"}],
                 "reward_model": {"style": "rule", "ground_truth": "48"}, "extra_info": {"index": 3}},
        "VLM-R1": {"id": 1, "image": "a.png", "conversations": [
            {"from": "human", "value": "<image>How many?"}, {"from": "gpt", "value": "3"}]},
        "TRL": {"prompt": [{"role": "user", "content": "How many?"}], "image": {"bytes": png},
                "solution": "$3$"},
        "TRL with parts": {"prompt": [{"role": "user", "content": [
                               {"type": "image"}, {"type": "text", "text": "How many?"}]}],
                           "images": [{"bytes": png}], "solution": "3"},
        "open-r1-multimodal": {"image": {"bytes": png, "path": "x.png"}, "problem": "How many?",
                               "solution": "<think>One, two, three.</think>\n\n<answer>3</answer>",
                               "original_question": "How many?", "original_answer": "3"},
        "MM-Eureka": {"id": "0", "message": json.dumps(chat), "answer": "3"},
        "MMK12": {"id": "k", "question": "As shown ..", "answer": "60", "subject": "math",
                  "image": {"bytes": png, "path": None}},
        "R1-VL-10K": {"image_path": "a.png", "problem": "How many?",
                      "solution": "### Image Description: dots. ### Rationales: count. ### Step 1: two "
                                  "and one. ### The final answer is: 3",
                      "key_steps": {"Steps": ["two and one", ["3 dots", "three"]]}},
        "ViRL39K": {"qid": "q1", "question": "<image><image>Which ..", "answer": "\\boxed{A}",
                    "image": ["a.png", "a.png"], "category": "charts", "source": "x",
                    "PassRate_32BTrained": 0.5}}


def test_rows_of_other_projects():
    """One row a source, as the data sets people have are laid out."""
    with scratch() as folder:
        Image.new("RGB", (40, 30), "red").save(folder / "a.png")
        png, name = (folder / "a.png").read_bytes(), str(folder / "a.png")
        chat = [{"role": "user", "content": [{"type": "image", "image": f"file://{name}"},
                                             {"type": "text", "text": "How many?"}]}]
        sources = rows_of_other_projects(png, chat)
        codec = load_codec(TINY)
        for source, row in sources.items():
            p = reading.parse_row(row, source, folder, "Think.")
            assert p.answer in ("48", "3", "$3$", "60", "A"), (source, p.answer)
            images = {"EasyR1, text only": 0, "ViRL39K": 2}.get(source, 1)
            assert len(p.images) == p.question.count("<image>") == images, source
            assert p.question.endswith("\nThink.") and "Be brief" not in p.question
            prompt = rollout.encode_prompt(p, codec)
            assert images == 0 or prompt.pixel_values is not None, source
        named = lambda source: reading.parse_row(sources[source], "here", folder)
        assert named("ViRL39K").id == "q1" and named("TRL").id == "here" and named("VLM-R1").id == "1"
        assert named("ViRL39K").task == "charts" and named("verl").task == "hiyouga/geometry3k"
        assert named("R1-VL-10K").key_steps == ["two and one", ["3 dots", "three"]]
        assert named("R1-VL-10K").demonstration.startswith("### Image")
        assert named("MM-Eureka").question == "<image>How many?"
        more = {"image as a dict of a path": {"images": [{"image": "a.png"}], "problem": "x?", "answer": "3"},
                "base64": {"image": base64_png(size=(90, 90), noise=True), "problem": "x?", "answer": "3"},
                "a spaced chat": {"message": json.dumps(chat, indent=1), "answer": "3"},
                "a worked solution": {"problem": "x?", "image": "a.png",
                                      "solution": "We get 3+4=7, so 7-4 is \\boxed{3}."}}
        for name, row in more.items():
            p = reading.parse_row(row, name, folder)
            assert p.answer == "3" and len(p.images) == 1 and p.question.startswith("<image>"), name
            rollout.encode_prompt(p, codec)
        for row, words in ((dict(message="[{bad json", answer="1"), None),
                           (dict(problem="x", answer="48", choices=["1", "2"]), "can never be right"),
                           (dict(problem="x", answer="9" * 3000), "can never be right"),
                           (dict(problem="x", answer=math.nan), "'answer'"),
                           (dict(prompt=[{"role": "user", "content": [{"type": "image_url"}]}], answer="1"),
                            "image_url"),
                           (dict(problem="x", image="A" * 2001 + "!", answer="1"), "can not be decoded"),
                           (dict(prompt=[{"role": "system", "content": "x"}], answer="1"), "'problem'"),
                           (dict(conversations=[{"from": "human", "value": "x"}]), "'answer'"),
                           (dict(problem="x", reward_model={"style": "rule"}), "'answer'")):
            if words:
                raises(reading.DataError, ["here", words], reading.parse_row, row, "here", folder)
            else:
                assert reading.parse_row(row, "here", folder).question == "[{bad json"


def test_parquet_and_json_files():
    with scratch() as folder:
        rows = [{"images": ["a.png"], "problem": f"<image>Find {i}.", "answer": i} for i in range(3)]
        path = write_rows(folder, rows)
        whole = folder / "data.json"
        whole.write_text(json.dumps(rows))
        same = lambda a, b: [(p.question, p.answer) for p in a] == [(p.question, p.answer) for p in b]
        assert same(reading.load_problems(path), reading.load_problems(whole))
        whole.write_text(json.dumps(rows[:1] + [{"problem": "x"}]))
        raises(reading.DataError, ["data.json: row 2", "'answer'"], reading.load_problems, whole)
        table = folder / "data.parquet"
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            table.write_bytes(b"PAR1")
            assert "\n" not in raises(reading.DataError, "pip install pyarrow", reading.load_problems, table)
            return
        png = (folder / "a.png").read_bytes()
        rows = [{**r, "images": [{"bytes": png, "path": None}]} for r in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
        assert same(reading.load_problems(table), reading.load_problems(path))
        table.write_bytes(table.read_bytes()[:-9])
        raises(reading.DataError, "not a readable parquet", reading.load_problems, table)


def test_check_names_all_bad_rows_and_counts_tokens():
    """--check: more bad rows than the loader would name, every one of them; exit code 1, or 0 without."""
    with scratch() as folder:
        good = {"images": ["a.png"], "problem": "<image>Find x.", "answer": "48", "demonstration": "x is 48"}
        bad = [{**good, "images": ["none.png"]}, {**good, "answer": ""}, '{"half',
               {**good, "problem": "x " * 400}]
        write_rows(folder, [good] * 5 + bad * 8)
        path = folder / "data.jsonl"
        flags = ["--check", "--data", str(path), "--model", TINY, "--max_prompt_tokens", "300"]
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            raises(SystemExit, "1", train.main, flags)
        lines = out.getvalue().splitlines()
        assert "5 good rows, 32 bad ones" in lines[0]
        named = [x for x in lines if x.startswith(str(folder))][1:]
        assert sorted(int(x[len(str(folder)):].split(":")[1]) for x in named) == list(range(6, 38))
        write_rows(folder, [good])
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            raises(SystemExit, "0", train.main, flags)
        p, codec = reading.load_problems(path, None, reading.INSTRUCTION)[0], load_codec(TINY)
        prompt = rollout.encode_prompt(p, codec)
        table = [x.split("|") for x in out.getvalue().splitlines() if "|" in x]
        cells = {x[1].strip(): x[2].strip() for x in table}
        assert cells["prompt tokens"] == str(len(prompt.ids)) and cells["images"] == "1"
        assert int(cells["of these image tokens"]) * codec.image_config.merge_size ** 2 == \
            len(prompt.pixel_values)
        assert cells["demonstration tokens"] == str(len(rollout.token_ids("x is 48", codec)) + 1)
        raises(SystemExit, "--check", train.main, ["--check"])


def test_bad_rows_among_ten_thousand():
    """Every kind of bad row is named, with file and line, and nothing is trained on."""
    good = {"images": ["a.png"], "problem": "<image>Find x.", "answer": "48"}
    bad = {"not JSON": "{", "a list": "[1]", "no answer": {**good, "answer": ""},
           "no problem": {"answer": "1"}, "no such file": {**good, "images": ["b.png"]},
           "too many tags": {**good, "problem": "<image><image>x"},
           "cut off": {**good, "images": ["cut.png"]}, "a text file": {**good, "images": ["text.png"]},
           "too large": {**good, "images": ["bomb.png"]}, "outside": {**good, "images": ["../a.png"]},
           "no options": {**good, "choices": "AB"}, "no option": {**good, "choices": ["1"]},
           "a number for an image": {**good, "images": [3]}, "an id twice": {**good, "id": "row 5"}}
    with scratch() as folder:
        Image.new("RGB", (40, 30), "red").save(folder / "a.png")
        whole = (folder / "a.png").read_bytes()
        (folder / "cut.png").write_bytes(whole[:60])
        (folder / "text.png").write_text("no image")
        header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"     # 3.6 billion pixels
        crc = zlib.crc32(header).to_bytes(4, "big")
        (folder / "bomb.png").write_bytes(whole[:8] + b"\0\0\0\x0d" + header + crc + whole[33:])
        rows = [json.dumps({**good, "id": f"row {n}"}) for n in range(10_000)]
        lines = {}
        for n, (kind, row) in enumerate(bad.items()):
            rows.insert(700 * n + 10, row if isinstance(row, str) else json.dumps(row))
            lines[kind] = 700 * n + 11
        (folder / "train.jsonl").write_text("\n".join(rows))
        out = folder / "run"
        said = raises(SystemExit, [], train.main, ["--data", str(folder / "train.jsonl"), "--out", str(out),
                                                   "--device", "cpu"])
        for kind, line in lines.items():
            assert f"train.jsonl:{line}: " in said, kind
        assert len(said.strip().splitlines()) == len(bad) and not out.exists()


def test_chunks_hold_what_fits():
    for lengths in ([], [5], [3, 3, 3, 3], [1, 9, 1, 1], [50, 1, 1], list(range(20))):
        found = list(rollout.chunks(lengths, 10))
        assert [n for c in found for n in c] == list(range(len(lengths)))
        assert all(len(c) == 1 or len(c) * max(lengths[n] for n in c) <= 10 for c in found)
        assert all(len(a) + 1 > 10 // max(1, max(lengths[n] for n in [*a, b[0]]))
                   for a, b in zip(found, found[1:]))
    full = list(rollout.chunks([5, 5, 1, 10, 4, 4], 10))
    assert full == [range(0, 2), range(2, 3), range(3, 4), range(4, 6)]


def test_what_sample_takes_and_gives():
    net, codec = m.load_model(TINY).eval(), load_codec(TINY)
    problem = shapes.make_problem("tiles", 2, index=0)
    groups = rollout.sample(net, [problem] * 2, codec, max_new_tokens=4)                # one each by default
    assert [len(group) for group in groups] == [1, 1]
    for prefixes in ([[9] * 4, [9]], [[9]], [[9]] * 3):                 # no room left; not one a row
        raises(ValueError, ["prefix_ids must hold 2"], rollout.sample, net, [problem] * 2, codec, 1, 4, 1.0,
               None, prefixes)
    (a,), (b,) = rollout.sample(net, [problem] * 2, codec, 1, 4, 1.0, None, [[9] * 3, []])
    assert (a.ids[:3], a.sampled) == ([9] * 3, [0, 0, 0, 1]) and b.sampled == [1] * len(b.ids)
    (t,), = rollout.sample(net, [problem], codec, 1, 4, 1.0, torch.ones(1, 4))          # the very edge
    assert all(codec.logit_mask[i] == 0 for i in t.ids)


def test_pad():
    data, mask = rollout.pad([], 0)
    assert data.shape == mask.shape == (0, 0)
    data, mask = rollout.pad([[1], [2, 3, 4], []], 0)
    assert data.tolist() == [[1, 0, 0], [2, 3, 4], [0, 0, 0]] and mask.sum(1).tolist() == [1, 3, 0]
    data, mask = rollout.pad([[1], [2, 3, 4]], 9, left=True)
    assert data.tolist() == [[9, 9, 1], [2, 3, 4]] and mask.tolist() == [[False, False, True], [True] * 3]


# ------------------------------------------------------------------------------------------------------------
# reward.py

COLOURS = ["red", "green", "blue", "yellow"]
NUMBERS = ["1", "12", "2", "21"]

MATCH = r"""
0.5            1/2             yes      numbers
\frac12        0.5             yes
\frac{3}4      0.75            yes
\dfrac{6}{8}   3/4             yes
1,234          1234            yes
12,345,678     12345678        yes
12,34          1234            no
1{,}234        1234            yes
(1,234)        1234            no
3.0            3               yes
-0             0               yes
2e3            2000            yes
2.5E-3         0.0025          yes
4 \times 10^{-2}   0.04        yes
6.02 x 10^23   6.02*10^{23}    yes
3              30              no
3              -3              no
- 3            -3              yes
1 3/4          1.75            yes
2\frac{1}{3}   7/3             yes
2½             5/2             yes
-1 1/2         -1.5            yes
2\frac{3}{2}   3               yes
1000000 1/3    1000000         no
0.3333333      0.33333333      no
12345678901234/2   6172839450617    yes
0.3333333      1/3             yes
0.333          1/3             no
1000000        1000001         no
1234567.1      1234567         no
22/7           \pi             no
25%            25 \%           yes
25%            0.25            yes
25 percent     25%             yes
25%            75%             no
５７             57              yes
\$3.20         3.2             yes
$17$           17              yes
16-8\pi        8               no       expressions
16-8\pi        -8π+16          yes
3π             9.42477796      yes
3 pi           3*\pi           yes
√50            5\sqrt{2}       yes
\sqrt[3]{27}   3               yes
\frac{2}{\sqrt{2}}   sqrt(2)   yes
3**2           9               yes
x²             x^2             yes
x^2            x2              no
x_1            x_{1}           yes
x₁             x_1             yes
blue+1         lueb+1          no
2^3^2          512             yes
2^3^2          64              no
|x|            x               no
\sqrt[3]{-8}   -2              yes
2^{10}         1024            yes
2^-2           0.25            yes
-2^2           -4              yes
(-2)^2         4               yes
-2^2           4               no
2(3+4)         14              yes
|-7|           7               yes
\sin 30°       0.5             yes
\sin 2x        \sin(2x)        yes
\sin 2x        2\sin x         no
\sin 2x        x\sin 2         no
\cos 2(x+1)    \cos(2x+2)      yes
\sin x         \sin(x)         yes
3\sin x \cos x   1.5\sin 2x      yes
\sin^2 x       (\sin x)^2      yes
\sin^{2}(x)    1-\cos² x       yes
\sin^2 30°     1/4             yes
\sin^2 x       \sin x^2        no
\sin^{-1} x    1/\sin x        no
\ln 2x         \ln 2 + \ln x   yes
\log_2 8       3               yes
\ln e          1               yes
(x+1)(x-1)     x^2-1           yes
(a+b)^2        a^2+b^2         no
2xy            2yx             yes
\frac{x}{y}    \frac{y}{x}     no
1/0            1/0+1           no
6/2/3          1               yes
5-3-1          3               no
70°            70              yes      units and labels
70^\circ       70 degrees      yes
8 cm           8               yes
8\text{ cm}^2  8 square centimetres    yes
8 cm           8 m             no
8 cm           9 cm            no
8 N            8               yes
8 n            8               no
25 °C          25              yes
25°C           25 ℃            yes
30 km/h        30              yes
x = 8          8               yes
8 = x          8               yes
x = 8          y = 8           no
Area = 8       8               yes
x = 16/2 = 8   8               yes
7 = 8          8               no
3 + 5 = 8      8               yes
x + 1 = 8      8               no
2x = 8         8               no
y = 3x - 1     y=-1+3x         yes      relations
2x + 4y = 6    x + 2y = 3      yes
x > 3          3 < x           yes
x > 3          x < 3           no
x > 3          x \ge 3         no
-2x < 4        x > -2          yes
-2x < 4        x < -2          no
1 < x \leq 5   5 \geq x > 1    yes
(1,2)          (1, 2)          yes      sequences
(1,2)          (2,1)           no
x \in [0, 2)   [0,2)           yes
square 5       25              no
[1,2)          (1,2)           no
(1,2]          (1,2]           yes
(1,\frac12)    (1.0, 0.5)      yes
{3, 1, 2}      \{1,2,3\}       yes
{1, 1, 2}      {1, 2, 2}       no
1, 2, 3        3, 2, 1         no
1 and 2        1, 2            yes
1, 2           1               no
[5]            5               no
1 < 2          3 < 5           no
2x = 4y        x = 3z          no
x=1, y=2       y=2, x=1        yes
\pm 4          4, -4           yes
\pm 4          4               no
(-\infty, 1) \cup (3, ∞)    (3,\infty)∪(-∞,1)   yes
Blue.          blue            yes      words
"Blue"         blue            yes
\text{blue}    blue            yes
**blue**       blue            yes
redblue        red blue        no
red            blue            no
yes            no              no
not            no              no
on             no              no
der            red             no
A B C          C B A           no
two            2               no
red 7 0        red 70          no       embedded task
red 4 blue     red 4 blue 5    no
red 4 blue 5   blue 5 red 4    no
red 0 blue 5   red 0 blue 6    no
4 red 5 dog    4 dog 5 red     no
a 1 b 2        b 2 a 1         no
5 A            A               no       others
\boxed{5}      5               yes
The answer is \boxed{5}.    5  yes
2\boxed{5}     5               no
The answer is 5    5           yes
5 or 6         5               no
5; 6           6               no
"""

EXTRACT = [
    ("<think>a</think><answer> 7 </answer>", "7"), ("<answer>6</answer> no: <answer>7</answer>", "7"),
    ("<think>It is 6", None), ("<think>a</think><think><answer>7</answer>", None),
    ("<answer></answer>", None), ("<answer>  </answer>", None), ("<answer>7", None), ("7</answer>", None),
    ("<answer>6</answer> or <answer>7", None), ("<answer><answer>7</answer></answer>", None),
    ("<answer><think>a</think>7</answer>", None), ("<answer><think>7</answer>", None),
    ("<think><answer>7</answer></think>", None), ("", None),
    ("<think>\\boxed{6}</think> it is \\boxed{7}", "7"), ("\\boxed{6}, rather \\boxed{7}", "7"),
    ("\\boxed{7", None), ("\\boxed{\\frac{1}{2}} cm", "\\frac{1}{2}"), ("\\boxed{}", None),
    ("\\boxed{\\{1\\}}", "\\{1\\}"), ("It is \\boxed{16-8\\pi}.", "16-8\\pi"), ("The answer is 7.", "7"),
    ("Answer: blue", "blue"), ("1+1\n#### 2", "2"), ("The answer is 7, since 3 + 4 = 7, not 9.", "7"),
    ("6 + 2 = 8 cm", "8"), ("Of 4 and 3 it has 3", "3"), ("It costs $2.50 today.", "2.50"),
    ("Hence $x = 4$ and so on", "x = 4"), ("It is 1,250 altogether", "1,250"),
    ("The final answer is:\n7", "7"), ("**Answer:** 7", "7"), ("<answer>5 and 7</answer>", "5 and 7"),
    ("blue", "blue"), ("The area is 16-8\\pi here", "The area is 16-8\\pi here"), ("mm " * 100, None),
    ("a</think>7", "7"), ("The answer is (1, 2).", "(1, 2)"), ("It is $5 and $6", "6"),
    ("So \\(\\frac{3}{4}\\) is it", "\\(\\frac{3}{4}\\)"), ("The answer is y > 3.", "y > 3"),
    ("<think>a</think>The answer is seven.", "seven"),
]

CHOOSE = [
    ("B", "B"), ("(B)", "B"), ("B.", "B"), ("B) green", "B"), ("**B**", "B"), ("Option B", "B"),
    ("The answer is (C).", "C"), ("<answer>b</answer>", "B"), ("<answer>green</answer>", "B"),
    ("<answer>Green.</answer>", "B"), ("Ｂ", "B"), ("<answer>E</answer>", None),
    ("<answer>A. red B. green</answer>", None), ("<answer>A, B</answer>", None),
    ("<answer>A or B</answer>", None), ("red or green", None), ("It is the green one.", "B"),
    ("It is not green.", None), ("<answer>B. red</answer>", None), ("I do not know.", None),
    ("A red car", "A"), ("A car", None), ("greenish", None), ("Answer: C since A is too dark.", "C"),
    ("<think>B</think>C", "C"), ("\\boxed{\\text{D}}", "D"), ("purple", None), ("$\\boxed{(D)}$", "D"),
    ("5 A", None), ("B. It is that one", "B"), ("Neither A nor B", None), ("A is out, B is out\nSo D.", "D"),
    ("The answer is A or B.", None), ("A is wrong. B is right.", "B"), ("(A) is not right, so (B).", "B"),
    ("A and B are wrong. So C", "C"), ("B is right. A is wrong.", "B"), ("A is incorrect.", None),
]

REWARD = [
    ("<think>a</think><answer>7</answer>", "7", None, 1.0, 1.0),
    ("<think>a</think><answer>8</answer>", "7", None, 0.0, 1.0),
    ("<answer>7</answer>", "7", None, 1.0, 0.0),
    ("<think>a</think>\\boxed{7}", "7", None, 1.0, 0.0),
    ("<think>a</think><answer>\\boxed{7}</answer>", "7", None, 1.0, 1.0),
    ("<think>a</think><answer>6</answer><answer>7</answer>", "7", None, 0.0, 0.0),
    ("<think><answer>6</answer></think><answer>7</answer>", "7", None, 0.0, 0.0),
    ("<think><answer>7</answer></think>", "7", None, 0.0, 0.0),
    ("<think>7</think>", "7", None, 0.0, 0.0),
    ("<think>\\boxed{7}</think>", "7", None, 0.0, 0.0),
    ("The answer is 7", "7", None, 0.0, 0.0),
    ("<think>a</think>\\boxed{6}\\boxed{7}", "7", None, 0.0, 0.0),
    ("<think>a</think><answer>\\boxed{6} \\boxed{7}</answer>", "7", None, 0.0, 1.0),
    ("<think>a</think><answer>6, 7</answer>", "7", None, 0.0, 1.0),
    ("<think>a</think><answer>6 or 7</answer>", "7", None, 0.0, 1.0),
    ("<think>a</think><answer>How many? 6 7 8</answer>", "7", None, 0.0, 1.0),
    ("<think>a</think><answer>6 = 7</answer>", "7", None, 0.0, 1.0),
    ("", "7", None, 0.0, 0.0),
    ("<think>a</think><answer>red 70</answer>", "red 7 0", None, 0.0, 1.0),
    ("<think>a</think><answer>(B)</answer>", "B", COLOURS, 1.0, 1.0),
    ("<think>a</think><answer>green</answer>", "B", COLOURS, 1.0, 1.0),
    ("<think>a</think><answer>B. green</answer>", "green", COLOURS, 1.0, 1.0),
    ("<think>a</think><answer>B. red</answer>", "B", COLOURS, 0.0, 1.0),
    ("<think>a</think><answer>Which colour? A. red B. green C. blue D. yellow</answer>",
     "B", COLOURS, 0.0, 1.0),
    ("<think>a</think><answer>A. red B. green C. blue D. yellow</answer>", "A", COLOURS, 0.0, 1.0),
    ("<think>a</think><answer>A B C D</answer>", "B", COLOURS, 0.0, 1.0),
    ("<think>a</think><answer>ABCD</answer>", "A", COLOURS, 0.0, 1.0),
    ("<think>a</think><answer>B or green or blue</answer>", "B", COLOURS, 0.0, 1.0),
    ("<think>B</think>", "B", COLOURS, 0.0, 0.0),
    ("<answer>B. It is that one</answer>", "B", COLOURS, 0.0, 0.0),
    ("<think>a</think>\\boxed{B}", "B", COLOURS, 1.0, 0.0),
    ("<answer>\\boxed{A} \\boxed{B}</answer>", "B", COLOURS, 0.0, 0.0),
    ("<answer>A</answer><answer>B</answer>", "B", COLOURS, 0.0, 0.0),
    ("a</think><answer>7</answer>", "7", None, 1.0, 0.0),
    ("<think>a<answer>7</answer>", "7", None, 0.0, 0.0),
    ("<answer>7</answer></answer>", "7", None, 0.0, 0.0),
]

FORMAT = [
    ("<think>a</think><answer>b</answer>", True), ("<think>a\nb</think>\n\n<answer>c</answer>", True),
    ("<think></think><answer>b</answer>", False), ("<think>a</think><answer> </answer>", False),
    ("x<think>a</think><answer>b</answer>", False), ("<think>a</think><answer>b</answer>x", False),
    ("<think>a</think>x<answer>b</answer>", False), ("<answer>b</answer><think>a</think>", False),
    ("<think>a<answer>b</answer></think>", False),
    ("<think>a</think><answer>b</answer><answer>b</answer>", False),
    ("<think><think>a</think><answer>b</answer>", False), ("<think>a</think><answer>b", False), ("", False),
    ("<think>a<answer></think>b</answer>", False), ("<think>a</answer></think><answer>b</answer>", False),
]

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


def match_rows():
    return [line.replace("\t", " ") for line in MATCH.strip("\n").split("\n")]


def fields(line):
    """Prediction, gold and verdict: columns are two or more spaces apart."""
    columns = [c.strip() for c in line.split("  ") if c.strip()]
    return columns[0], columns[1], columns[2] == "yes"


def test_reward_match():
    cases = [fields(line) for line in match_rows()]
    cases += [("red 4   blue\t5", "red 4 blue 5", True), ("", "", False), (None, "7", False),
              (" ", " ", False), ("7", "", False)]
    wrong = [c for c in cases if answers_match(c[0], c[1]) is not c[2]]
    assert not wrong, wrong
    swapped = [c for c in cases if c[0] and c[1] and answers_match(c[1], c[0]) is not c[2]]
    assert not swapped, swapped
    assert len(cases) > 120


def test_small_print_of_equality():
    """Products of up to three letters, a minus before a power, roots as powers."""
    for a, b, same in (("2abc", "2cab", True), ("2abcd", "2dcba", False), ("2abc", "2ac", False),
                       ("-x^2", "0-x^2", True), ("-x^2", "(-x)^2", False), ("-2x", "0-2x", True),
                       ("4^(1/2)", "2", True), ("4^(1/2)", "1", False), ("2^64", str(2 ** 64), True),
                       ("x-x=0", "y=2", False), ("x-x=y-y", "x-x=2", False), ("2x<4", "-2x<-4", False),
                       ("sqrt(2)/10^13", "sqrt(3)/10^13", False), ("sin(π)", "0", True)):
        assert equal.equal(a, b) == equal.equal(b, a) == same, (a, b)


def test_how_far_back_an_answer_is_looked_for():
    """4,000 characters, and 300 for a letter in passing."""
    passing = lambda n: extract_answer("So B,\n" + "z" * n, ["red", "blue", "teal"])
    assert passing(297) == "B" and passing(298) is None
    said = lambda n: extract_answer("The answer is 7\n" + "so it goes\n" * (n // 11) + "z" * (n % 11))
    assert said(3998) == "7" and said(3999) != "7"
    words = [f"word{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(30)]          # letters end at Z
    assert [extract_answer(f"<answer>{words[n]}</answer>", words) for n in (0, 25, 26)] == ["A", "Z", None]


def test_reward_extract():
    wrong = [(t, extract_answer(t), want) for t, want in EXTRACT if extract_answer(t) != want]
    assert not wrong, wrong


def test_reward_choose():
    given = [(t, extract_answer(t, COLOURS), want) for t, want in CHOOSE]
    wrong = [case for case in given if case[1] != case[2]]
    assert not wrong, wrong
    assert extract_answer("12.0", NUMBERS) == "B" and extract_answer("so 21 of them", NUMBERS) == "D"
    assert extract_answer("<answer>$\\frac{24}{2}$</answer>", NUMBERS) == "B"
    assert extract_answer("120", NUMBERS) is None
    assert extract_answer("C. D", ["A", "B", "D", "E"]) == "C"
    assert extract_answer("E", ["A", "B", "D", "E"]) == "D"
    assert extract_answer("a dog", ["A", "B"]) is None
    assert extract_answer("I think it is J", [str(i) for i in range(10)]) == "J"
    assert extract_answer("a dark red one", ["red", "dark red"]) == "B"
    assert extract_answer("5", ["5 cm", "5 m"]) is None
    assert extract_answer("12", ["(A) 11", "(B) 12"]) == "B"


def test_reward_match_choices():
    cases = [("B", "B", True), ("(b)", "B", True), ("green", "B", True), ("B", "green", True),
             ("B) green", "green", True), ("A", "B", False), ("red", "B", False), (None, "B", False),
             ("", "B", False), ("5 A", "A", False), ("A or B", "B", False), ("E", "B", False),
             ("AB", "B", False), ("green red", "B", False)]
    for prediction, gold, want in cases:
        assert answers_match(prediction, gold, COLOURS) is want, (prediction, gold)
    assert answers_match("C", "A", ["same", "other", "same"])                 # two options with one text


def test_reward_hostile_text():
    start = time.perf_counter()
    for text in HOSTILE:
        for wrapped in (text, f"<answer>{text}</answer>", f"\\boxed{{{text}}}", "The answer is " + text):
            extract_answer(wrapped), extract_answer(wrapped, COLOURS)
            format_ok(wrapped), reward_parts(wrapped, "7")
        assert answers_match(text, "7") is False and answers_match("7", text) is False, text[:50]
        assert not answers_match(text, "B", COLOURS), text[:50]
    large = ["<think>" * 10 ** 5, "<answer>" * 10 ** 5, "\\boxed{" * 10 ** 5, "answer is " * 10 ** 5,
             " " * 10 ** 6, "1" * 10 ** 6, "1,111" * 10 ** 5,
             "<think>" + "a " * 10 ** 5 + "</think><answer>7</answer>"]
    for text in large:
        extract_answer(text), extract_answer(text, COLOURS), format_ok(text), reward_parts(text, "7")
        answers_match(text, "7")
    assert not answers_match("y=1e99*1e99*1e99*1e99*x", "y=πx")
    assert answers_match("1 " * 400, "1 " * 400)            # large: verbatim
    assert not answers_match("a" * 2001, "a" * 2001)        # or never
    assert time.perf_counter() - start < 60                 # a hang, on any machine


def random_expression(rng, depth):
    """A random tree: a number, a variable, or (operator, left, right)."""
    if depth == 0 or rng.random() < 0.15:
        return rng.choice((rng.randint(1, 12), rng.randint(2, 9), "x", "y"))
    op = rng.choice("++--**/^r")
    if op == "^":
        return "^", random_expression(rng, depth - 1), rng.choice((2, 3))
    if op == "r":                                       # a root of something positive
        inner = random_expression(rng, depth - 1)
        return "r", ("+", ("^", inner, 2), rng.randint(1, 9)), None
    return op, random_expression(rng, depth - 1), random_expression(rng, depth - 1)


def expression_value(tree, x, y):
    """The slow, obvious evaluator."""
    if not isinstance(tree, tuple):
        return {"x": x, "y": y}.get(tree, tree)
    op, a, b = tree[0], expression_value(tree[1], x, y), tree[2] and expression_value(tree[2], x, y)
    return {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b,
            "^": lambda: a ** b, "r": lambda: a ** 0.5}[op]()


def expression_text(tree, rng):
    """One of the ways to write it: LaTeX or plain, factors turned round, implicit products, decimals."""
    if not isinstance(tree, tuple):
        return rng.choice((str(tree), f"{tree}.0", f"({tree})")) if isinstance(tree, int) else tree
    op, a, b = tree[0], expression_text(tree[1], rng), tree[2] and expression_text(tree[2], rng)
    if op in "+*" and rng.random() < 0.5:
        a, b = b, a
    return rng.choice({
        "+": (f"({a} + {b})", f"\\left({a}+{b}\\right)", f"({a}-(-({b})))"),
        "-": (f"({a}-{b})", f"({a} + (-1)*({b}))", f"(-({b})+{a})"),
        "*": (f"({a})*({b})", f"({a}) \\cdot ({b})", f"({a})({b})", f"({a}) \\times ({b})"),
        "/": (f"\\frac{{{a}}}{{{b}}}", f"(({a})/({b}))", f"({a})*({b})^{{-1}}"),
        "^": (f"({a})^{b}", f"({a})^{{{b}}}", f"({a})**({b})"),
        "r": (f"\\sqrt{{{a}}}", f"({a})^(1/2)", f"sqrt({a})")}[op])


def perturbed(tree, rng):
    """One leaf or operator changed."""
    if not isinstance(tree, tuple):
        return tree + rng.choice((-1, 1, 10)) if isinstance(tree, int) else {"x": "y", "y": "x"}[tree]
    op, a, b = tree
    if op in "+-*/" and rng.random() < 0.3:
        return rng.choice([o for o in "+-*/" if o != op]), a, b
    if b is None or op == "^" or rng.random() < 0.5:
        return op, perturbed(a, rng), b
    return op, a, perturbed(b, rng)


def test_reward_random_expressions():
    """An expression equals itself rewritten and differs from itself perturbed; a for-loop over points is the
    judge."""
    rng, counts = random.Random(0), {True: 0, False: 0}
    points = [(1.37, 2.21), (0.83, 3.19), (2.71, 0.57)]

    def values(tree):
        try:
            found = [expression_value(tree, *p) for p in points]
        except ZeroDivisionError:
            return None
        return found if all(isinstance(v, (int, float)) and 1e-3 < abs(v) < 1e6 for v in found) else None

    while min(counts.values()) < 400:
        tree = random_expression(rng, rng.choice((1, 2, 3)))
        other = perturbed(tree, rng)
        mine, its = values(tree), values(other)
        if mine is None or its is None or not isinstance(tree, tuple):
            continue
        text = expression_text(tree, rng)
        if len(text) < 200:
            again = expression_text(tree, rng)
            assert answers_match(text, again), (text, again)
            counts[True] += 1
        if all(abs(a - b) > 1e-3 * abs(a) for a, b in zip(mine, its)):
            changed = expression_text(other, rng)
            assert not answers_match(text, changed), (text, changed)
            counts[False] += 1


def test_mutated_completions():
    """No exception and no control token in a prompt; `experiments/fuzz.py --count 500000` tries more, and
    times them."""
    from experiments import fuzz                        # it takes cases of this file
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        fuzz.main(["--count", "600", "--seed", str(time.time_ns() % 1000)])
    assert "600 completions, no exception" in said.getvalue()


def test_reward_parts_and_hacks():
    for text, gold, choices, accuracy, form in REWARD:
        parts = reward_parts(text, gold, choices)
        assert (parts["accuracy"], parts["format"]) == (accuracy, form), (text, parts)
        assert abs(parts["total"] - (0.9 * accuracy + 0.1 * form)) < 1e-12
        assert set(parts) == {"accuracy", "format", "total"}
    good = "<think>a</think><answer>7</answer>"
    assert reward_parts(good, "7", finished=False) == {"accuracy": 0.0, "format": 0.0, "total": 0.0}
    assert reward_parts(good, "7", format_weight=0.0)["total"] == 1.0
    assert abs(reward_parts(good, "8", format_weight=0.3)["total"] - 0.3) < 1e-12


def test_reward_format():
    for text, want in FORMAT:
        assert format_ok(text) is want, text


def ours(steps, answer="7", between="\n", behind=""):
    return f"<think>{steps}</think>{between}<answer>{answer}</answer>{behind}"


def theirs(*headers, **bodies):
    """R1-VL's form from its headers in short: "i", "r", "1", "2", "a". Bodies: "x", the answer 7."""
    names = {"i": "Image Description", "r": "Rationales", "a": "The final answer is"}
    body = {"a": "7", **bodies}
    return "\n\n".join(f"### {names.get(h, 'Step ' + h)}:\n{body.get('s' + h, body.get(h, 'x'))}"
                       for h in headers)


def test_step_rar_counts_groups():
    text = ours("Red 4\n  7, then\tblue  2 3.\nIt is 15, or 3.5; x=9", answer="green 1")
    for key_steps, want in [
            (["red 4 7", "blue 2 3"], 1.0), (["red 4 7", "blue 3"], 0.5),              # any white space
            (["RED 4"], 1.0), (["BLUE 2 3", "red 5"], 0.5),
            (["green 1"], 0.0),                                         # only said in the answer
            ([["four", "red 4"], "two"], 0.5), ([["four", "fore"], "x = 9"], 0.5),              # alternates
            ([["red 4", "blue 2"]], 1.0), ([["red 4", "blue 2"], "no"], 0.5),   # a group counts once ..
            (["red 4", "red  4", "no"], 0.5),                           # .. and so does one given twice
            (["5"], 0.0), (["1"], 0.0), (["3.5"], 1.0), (["15"], 1.0), (["ed 4"], 0.0), (["re"], 0.0),
            (["3"], 1.0),                                               # of "2 3."
            (["it is 15", "7 , then", "nought"], 2 / 3)]:
        assert step_rar(text, key_steps) == want, (key_steps, step_rar(text, key_steps))


def test_step_rar_key_steps_of_any_shape():
    text = ours("red 4")
    for nothing in (None, [], {}, "red 4", 7, [None], [7, {}, ["red 4", 7]], [""], [" "], [[]], [["", "\n"]]):
        assert step_rar(text, nothing) == 0.0, nothing
    assert step_rar(text, ["red 4", 7, None, {"red": 4}, [], "", ["red 4", None]]) == 1.0       # ignored
    assert step_rar(text, ["red 4", "x" * 201]) == 1.0 and step_rar(text, ["red 4", "x" * 200]) == 0.5
    assert step_rar(text, ["no"] + [f"no {k}" for k in range(199)] + ["red 4"]) == 0.0          # the 201st
    assert step_rar(text, [f"no {k}" for k in range(199)] + ["red 4"]) == 1 / 200
    assert step_rar(text, [["no"] * 10 + ["red 4"]]) == 0.0             # the 11th
    assert step_rar(text, [["no"] * 9 + ["red 4"]]) == 1.0
    assert step_rar(ours("a " * 9998 + "red 4"), ["red 4"]) == 0.0      # ends behind character 20,000
    assert step_rar(ours("a " * 9997 + "red 4"), ["red 4"]) == 1.0


def test_step_rar_reads_steps_only():
    steps = ["red 4"]
    assert step_rar("red 4 <think>a</think> red 4 <answer>red 4</answer>", steps) == 0.0
    assert step_rar("<think>red 4", steps) == 0.0                       # never closed
    assert step_rar("red 4</think><answer>red 4</answer>", steps) == 0.0
    assert step_rar("red 4", steps) == 0.0 and step_rar("", steps) == 0.0
    assert step_rar("<think>a</think><think>red 4</think>", steps) == 0.0
    form = "ir12a"
    assert step_rar(theirs(*form, s2="so red 4"), steps) == 1.0 == step_rar(theirs(*form, s1="red 4."), steps)
    assert step_rar(theirs(*form, i="red 4", r="red 4", a="red 4"), steps) == 0.0
    assert step_rar(theirs(*form, s1="so red", s2="4"), steps) == 1.0   # one text, as R1-VL has it
    assert step_rar("<think>a</think>" + theirs(*form, s1="red 4"), steps) == 0.0   # one form or the other


def test_step_rvr_of_our_form():
    for text, want in [
            (ours("red 4 7"), 1.0), (ours("\nred 4 7\nblue 2 3\n", behind="\n"), 1.0),
            (ours(" \n "), 0.0), (ours(""), 0.0), (ours("a", answer=" "), 0.0),         # complete?
            ("<think>a</think>", 0.0), ("<answer>7</answer>", 0.0), ("<think>a<answer>7</answer>", 0.0),
            ("", 0.0), ("<think>a</think>\\boxed{7}", 0.0),
            ("<answer>7</answer><think>a</think>", 0.0), (ours("a", between=" so "), 0.0),      # in order?
            (ours("a", behind=" done"), 0.0), ("So: " + ours("a"), 0.0), (ours("a") + ours("a"), 0.0),
            (ours("a", between="</think>"), 0.0),
            (ours("Step 1: a\nStep 2: b"), 1.0), (ours("### Step 1: a\n### Step 2: b\n"), 1.0),   # numbered?
            (ours("Step 1: a\nStep 3: b"), 0.0), (ours("### Step 1: a\n### Step 3: b"), 0.0),
            (ours("Step 2: a"), 0.0), (ours("Step 0: a\nStep 1: b"), 0.0),
            (ours("Step 2: a\nStep 1: b"), 0.0), (ours("Step 1: a\nStep 1: b"), 0.0),
            (ours("### Step 1: a\n  step 3 : b"), 0.0), (ours("Step 1: a\nStep 02: b"), 0.0),
            (ours("as in step 3: a"), 1.0), (ours("Step 3 is red"), 1.0),       # not a number of a step
            (ours("Step 1: a\nStep " + "9" * 5000 + ": b"), 0.0)]:              # too long for int()
        assert step_rvr(text) == want, text[:80]
        assert isinstance(step_rvr(text), float)


def test_step_rvr_of_their_form():
    for form, want in [("ir1a", 1.0), ("ir123a", 1.0), ("ira", 0.0), ("r1a", 0.0), ("i1a", 0.0), ("ir1", 0.0),
                       ("ir1a2", 0.0), ("air1", 0.0), ("ir13a", 0.0), ("ir2a", 0.0), ("ir21a", 0.0),
                       ("ir11a", 0.0), ("ir1aa", 0.0), ("1ira", 0.0), ("ri1a", 0.0), ("i1ra", 0.0),
                       ("ir1r", 0.0), ("ir1ar", 0.0)]:
        assert step_rvr(theirs(*form)) == want, form
    assert step_rvr(theirs(*"ir1a", r="y\n\n### Let's think step by step.")) == 1.0
    for empty in ({"i": " "}, {"r": ""}, {"s1": "\n"}, {"s2": ""}, {"a": " "}):
        assert step_rvr(theirs(*"ir12a", **empty)) == 0.0, empty
    assert step_rvr("see " + theirs(*"ir1a")) == 0.0                    # a header opens a line


def test_step_reward_total():
    def check(text, accuracy, form, rar, rvr, total, **more):
        parts = step_reward_parts(text, "7", key_steps=["red 4", ["blue 2", "blue two"]], **more)
        want = {"accuracy": accuracy, "format": form, "rar": rar, "rvr": rvr, "total": total}
        assert parts.keys() == want.keys(), parts
        assert all(abs(parts[k] - want[k]) < 1e-12 for k in want), (text, parts)

    zero = dict(accuracy=0, form=0, rar=0, rvr=0, total=0)
    both, one = "red 4\nblue two", "red 4"
    check(ours(both), 1, 1, 1, 1, 2.1)
    check(ours(one), 1, 1, 0.5, 1, 2.05)
    check(ours("a"), 1, 1, 0, 1, 2.0)
    check(ours(one, answer="8"), 0, 1, 0.5, 1, 1.05)
    check(ours(both, between=" so "), 1, 0, 1, 0, 1.1)
    check(ours(both, answer="8", between=" so "), 0, 0, 1, 0, 0.1)
    check(ours(both, behind="\n"), 1, 0, 1, 1, 2.1)                     # format is logged, not paid
    check(f"<think>{both}</think>\\boxed{{7}}", 1, 0, 1, 0, 1.1)        # a box is an answer
    for unanswered in (f"<think>{both}</think>", f"<think>{both}</think> It is 7.",
                       f"<think>{both}</think><answer> </answer>", f"<think>{both} \\boxed{{7}}</think>"):
        check(unanswered, 0, 0, 1, 0, 0.0)
    check(ours(both), finished=False, **zero)
    check(theirs(*"ir1a", s1=both), finished=False, **zero)
    check("", **zero)
    check(ours(one), 1, 1, 0.5, 1, 2.25, alpha=0.5)
    check(ours(one), 1, 1, 0.5, 1, 2.0, alpha=0)


def test_step_reward_of_their_form():
    for text, rar, rvr, total in [
            (theirs(*"ir12a", s2="red 4"), 1.0, 1.0, 2.1), (theirs(*"ir12a", a="8"), 0.0, 1.0, 1.0),
            (theirs(*"ir12a", s1="red 4", a="\\boxed{7}"), 1.0, 1.0, 2.1),
            (theirs(*"air1", s1="red 4"), 1.0, 0.0, 1.1), (theirs(*"ir1", s1="red 4"), 1.0, 0.0, 0.0),
            (theirs(*"ir1a", s1="red 4", a=""), 1.0, 0.0, 0.0),         # no answer
            (theirs(*"ir1aa", s1="red 4"), 1.0, 0.0, 0.1),              # two answers: wrong
            (theirs(*"ir1", s1="red 4 \\boxed{7}"), 1.0, 0.0, 0.0),     # only thought of
            (theirs(*"ir1", s1="red 4") + "\n<answer>7</answer>", 1.0, 0.0, 1.1),
            (theirs(*"ir1a", s1="red 4", a="<answer>7</answer>"), 1.0, 1.0, 2.1)]:
        parts = step_reward_parts(text, "7", key_steps=["red 4"])
        assert (parts["rar"], parts["rvr"]) == (rar, rvr), (text, parts)
        assert abs(parts["total"] - total) < 1e-12, (text, parts)
    assert step_reward_parts(theirs(*"ir1aa"), "77")["accuracy"] == 0.0


def test_step_reward_choices_and_no_key_steps():
    right, wrong = ours("a", answer="B"), ours("a", answer="A")
    assert step_reward_parts(right, "B", ["red", "green"])["total"] == 2.0          # key_steps None
    assert step_reward_parts(wrong, "B", ["red", "green"])["total"] == 1.0
    assert step_reward_parts(ours("a", answer="green"), "B", ["red", "green"])["accuracy"] == 1.0
    for text in (right, wrong, "", "B", "<think>a</think>\\boxed{B}", ours("a", behind="x")):
        parts, plain = (f(text, "B", ["red", "green"]) for f in (step_reward_parts, reward_parts))
        assert all(parts[name] == plain[name] for name in ("accuracy", "format")) and parts["rar"] == 0.0


def test_step_reward_hostile_text():
    key_steps = [[f"red {k} 7", "1" * 200, "a " * 90 + "b"] for k in range(20)]
    size = 3 * 10 ** 4
    hostile = ["a" * size, "a " * size, " " * size, "\n" * size, "1" * size, "1," * size, "." * size,
               "\\" * size, "### " * size, "\n###" * size, "\n### Step 1:" * (size // 10), "step " * size,
               "\nstep 1" * size,
               "\n   step  1 " * (size // 10), "Step 1:\n" * (size // 10), "\t " * size + "Step 1:",
               "<think>" * size, "</think>" * size, "\n### The final answer is:7" * (size // 10), "İ" * size]
    for text in hostile:
        forms = [theirs(*"ir12a", s1=text), theirs(*"ir12a", a=text)]
        for whole in (text, ours(text), f"<think>{text}", *forms):
            best = 9.0
            for _ in range(3):                          # the machine may be busy: the best of three
                start = time.perf_counter()
                parts = step_reward_parts(whole, "7", key_steps=key_steps)
                best = min(best, time.perf_counter() - start)
                if best < 0.5:
                    break
            assert best < 0.5, (text[:20], whole[:40], best)
            assert 0.0 <= parts["rar"] <= 1.0 and parts["rvr"] in (0.0, 1.0) and 0.0 <= parts["total"] <= 2.1


# ------------------------------------------------------------------------------------------------------------
# attribute.py


def encode(codec, text):
    return codec.tokenizer(text, add_special_tokens=False)["input_ids"]


def chain(codec, problem, steps, answer="none", text=None):
    """A finished rollout of the given steps (or of a whole text)."""
    text = text or "<think>" + "\n".join(steps) + f"</think><answer>{answer}</answer>"
    ids = encode(codec, text) + [codec.eos_ids[0]]
    t = rollout.Trajectory(problem, ids, [1] * len(ids), [0.0] * len(ids), True, text)
    t.steps = attribute.split_steps(ids, codec)
    return t


def token_owners(codec, ids, text, starts, end):
    """The slow, obvious way: the step (or None) that each token's first character lies in."""
    owners = []
    for n in range(len(ids)):
        at = len(codec.tokenizer.decode(ids[:n]))               # ASCII texts only
        owners.append(max((k for k, s in enumerate(starts) if s <= at), default=None) if at < end else None)
    return owners


def assert_steps(codec, text, want, end=None):
    """The text has exactly the steps `want`, each from its line's first character on, up to the tag `end`."""
    ids = encode(codec, text) + [codec.eos_ids[0]] * (end is not None)
    steps = attribute.split_steps(ids, codec)
    assert [s.text for s in steps] == want, [s.text for s in steps]
    assert all(0 <= s.start < s.stop <= len(ids) for s in steps)
    assert all(a.stop <= b.start for a, b in zip(steps, steps[1:]))
    found = [next((k for k, s in enumerate(steps) if s.start <= n < s.stop), None) for n in range(len(ids))]
    begin = at = text.find("<think>") + 7 if "<think>" in text else 0
    starts = []
    for w in want:
        at = text.index(w, at)
        starts.append(max(begin, text.rfind("\n", 0, at) + 1))
        at += len(w)
    assert found == token_owners(codec, ids, text, starts, text.index(end) if end else len(text))


def test_split_steps_of_tiny_chains():
    """Every line of the think block is a step and owns its tokens and its line break."""
    codec, rng = load_codec(TINY), random.Random(0)
    for i in range(24):
        p = shapes.make_problem(shapes.KINDS[i % 4], 1 + i // 2, index=i)
        text = shapes.demonstrate(p, (0.3, 0.3), rng)
        lines = text[7:text.index("</think>")].split("\n")
        assert_steps(codec, text, lines, "</think>")
        steps = attribute.split_steps(encode(codec, text), codec)
        for s, line in zip(steps, lines):
            decoded = codec.tokenizer.decode(encode(codec, text)[s.start:s.stop])
            assert decoded == line + "\n" * (s is not steps[-1])
        assert all(a.stop == b.start for a, b in zip(steps, steps[1:]))         # nothing between them is lost
    for i in range(60):                                     # blank lines anywhere, steps of any length
        lines = [rng.choice(["", " ", "red 4 6", "so it is 7.", "a", "\t", "1. the bar"]) for _ in range(8)]
        want = [line.strip() for line in lines if line.strip()]
        assert_steps(codec, "<think>" + "\n".join(lines) + "</think><answer>5</answer>", want, "</think>")
        assert_steps(codec, "\n".join(lines) + "\n<answer>5</answer>", want, "<answer>")


def test_split_steps_of_qwen_like_texts():
    codec = load_codec(TINY)
    assert_steps(codec, "<think>\n1. First, AB = 3.\n2. Then BC = 4.\n\n3. So AC = 5.\n</think>\n\n"
                 "<answer>5</answer>", ["1. First, AB = 3.", "2. Then BC = 4.", "3. So AC = 5."], "</think>")
    assert_steps(codec, "<think>\nFirst:\n- AB is 3\n  - by the figure\n* BC is 4</think>",
                 ["First:", "- AB is 3", "- by the figure", "* BC is 4"], "</think>")
    for mark in ("### Step {}:", "Step {}:", "**Step {}:**", "## step {}.", "  STEP {} -"):
        one, two, ten = (mark.format(n).strip() for n in (1, 2, 10))
        text = (f"<think>\nLet me see.\n{mark.format(1)} look\nAB is 3.\n\nStepping on.\n"
                f"{mark.format(2)} add\n$$\n3 + 4\n$$\n{mark.format(10)} done\n</think><answer>7</answer>")
        assert_steps(codec, text, [f"{one} look\nAB is 3.\n\nStepping on.", f"{two} add\n$$\n3 + 4\n$$",
                                   f"{ten} done"], "</think>")
    assert_steps(codec, "### Image:\na cat\n### Step 1: look\nit is 3\n### Step 2: add\n7\n"
                 "### The final answer is: 7", ["### Step 1: look\nit is 3", "### Step 2: add\n7"],
                 "### The final answer")
    for a, b in (("$$", "$$"), ("\\[", "\\]")):
        assert_steps(codec, f"<think>The area:\n{a}\nA = bc\n\n= 12\n{b}\nSo 12.\n{a} x = 1 {b}\n"
                     f"and {a} y\n= 2 {b}.\nEnd\n</think>",
                     ["The area:", f"{a}\nA = bc\n\n= 12\n{b}", "So 12.", f"{a} x = 1 {b}",
                      f"and {a} y\n= 2 {b}.", "End"], "</think>")
    # no tags; an open one; a closing one alone; nothing at all
    assert_steps(codec, "AB is 3.\nSo 7.", ["AB is 3.", "So 7."])
    assert_steps(codec, "It is 7.", ["It is 7."])
    assert_steps(codec, "well\n<think>red 4\nblue", ["red 4", "blue"])
    assert_steps(codec, "red 4\nblue 5\n</think><answer>7</answer>", ["red 4", "blue 5"], "</think>")
    assert_steps(codec, "<think>red 4\nblue 5<answer>7</answer></think>", ["red 4", "blue 5"], "<answer>")
    assert_steps(codec, "</think> so <think>red 4\nblue 5", ["red 4", "blue 5"])
    for text in ("<think></think><answer>7</answer>", "<think>\n \n\t\n</think><answer>7</answer>", "", "\n",
                 "<think>", "<answer>7</answer>"):
        assert attribute.split_steps(encode(codec, text), codec) == []
    assert attribute.split_steps([], codec) == []


def test_split_steps_first_header_behind_the_tag():
    """"<think>Step 1: ..." on one line: the first step is one as well."""
    codec = load_codec(TINY)
    assert_steps(codec, "<think>Step 1: red\nis 4\nStep 2: blue\n</think><answer>7</answer>",
                 ["Step 1: red\nis 4", "Step 2: blue"], "</think>")


def test_split_steps_line_spacing_is_no_formula():
    """The \\[4pt] of a table of equations opens nothing."""
    codec = load_codec(TINY)
    formula = "$$\n\\begin{aligned} a &= b \\\\[4pt]\nc &= d \\end{aligned}\n$$"
    assert_steps(codec, f"<think>See:\n{formula}\nSo 7.\nEnd.</think>", ["See:", formula, "So 7.", "End."],
                 "</think>")


def test_split_steps_without_the_end_token():
    """The end token is no part of the last step where no tag closes it: neither its text nor its token."""
    codec = load_codec(TINY)
    for text in ("<think>red 4\nblue 5", "red 4\nblue 5", "Step 1: red\nStep 2: blue\n"):
        ids = encode(codec, text)
        plain = attribute.split_steps(ids, codec)
        ended = attribute.split_steps(ids + [codec.eos_ids[0]], codec)
        assert plain == ended and len(plain) == 2, ended


def test_split_steps_keeps_unicode():
    """Characters that take several tokens (all but ASCII in a byte-level tokenizer) come out whole."""
    codec = load_codec(TINY)
    for lines in (["∠ABC = 60°", "角 90°"], ["√2 ≈ 1.41", "é🙂👩\u200d👧", "x² ≤ 5°"],
                  ["\u202e\u05d0 7", "a\u2028b"]):
        ids = encode(codec, "<think>" + "\n".join(lines) + "</think><answer>5</answer>")
        steps = attribute.split_steps(ids, codec)
        assert [s.text for s in steps] == lines, [s.text for s in steps]
        assert [codec.tokenizer.decode(ids[s.start:s.stop]).strip() for s in steps] == lines


def test_split_steps_token_belongs_to_its_first_character():
    """Tokens that reach over a line break or a tag, as large vocabularies have them."""
    def split(pieces):
        def decode(ids, **kwargs):
            return "".join(pieces[i] for i in ids)
        codec = SimpleNamespace(tokenizer=SimpleNamespace(decode=decode), eos_ids=(-1,))
        return [(s.start, s.stop, s.text) for s in attribute.split_steps(list(range(len(pieces))), codec)]

    assert split(["<think", ">\n", "a", " b.\n", "c d", ".\n\n", "e", ".</", "think", ">", "f"]) == [
        (2, 4, "a b."), (4, 6, "c d."), (6, 8, "e.")]
    assert split(["<think>a", "b.\nc", " d", "\n", "e", "</think>"]) == [
        (1, 2, "ab."), (2, 4, "c d"), (4, 5, "e")]
    assert split(["a", "\nb\nc", "\nd", "e"]) == [(0, 2, "a"), (2, 3, "c"), (3, 4, "de")]   # b has no token


def test_split_steps_unicode_and_tags_in_one_token():
    """A character of two tokens, the second of which reaches into the closing tag or the next line."""
    for pieces, want in (([b"<think>", b"\xe8\xa7", b"\x92 9.</", b"think>"], [(1, 3, "角 9.")]),
                         ([b"\xe8\xa7", b"\x92", b".\nb", b" c"], [(0, 3, "角."), (3, 4, "b c")])):
        def decode(ids, **kwargs):
            return b"".join(pieces[i] for i in ids).decode("utf-8", "replace")
        codec = SimpleNamespace(tokenizer=SimpleNamespace(decode=decode), eos_ids=(-1,))
        steps = attribute.split_steps(list(range(len(pieces))), codec)
        assert [(s.start, s.stop, s.text) for s in steps] == want, steps


def test_split_steps_of_hostile_texts():
    codec = load_codec(TINY)
    for text, count in (("x" * 20_000, 1), ("\n" * 3000, 0), ("a\n" * 3000, 3000), (" " * 20_000, 0),
                        ("\t\n " * 5000, 0), ("é中\u202e\U0001f642\x00\r\u2028\ud7ff" * 1500, 1),
                        ("<think>" * 3000, 1), ("$$\n" * 3000, 1500), ("\\[" * 5000, 1),
                        ("Step 1" * 3000, 1), ("Step 1\n" * 3000, 3000),
                        ("#" * 20_000, 1), ("### Step " * 2000, 1), ("</think>" * 3000, 0)):
        ids = encode(codec, text)
        started = time.process_time()
        steps = attribute.split_steps(ids, codec)
        assert time.process_time() - started < 1, text[:10]
        assert len(steps) == count and all(0 <= s.start < s.stop <= len(ids) and s.text for s in steps)
        assert all(a.stop <= b.start for a, b in zip(steps, steps[1:]))


def test_split_steps_of_random_tokens():
    """Whatever a policy may sample, control tokens and broken characters among it."""
    codec, rng = load_codec(TINY), random.Random(0)
    for _ in range(50):
        ids = [rng.choice((rng.randrange(len(codec.tokenizer)), encode(codec, "\n")[0])) for _ in range(200)]
        steps = attribute.split_steps(ids, codec)
        assert all(0 <= s.start < s.stop <= len(ids) and s.text for s in steps)
        assert all(a.stop <= b.start for a, b in zip(steps, steps[1:]))


def test_flawed_screens_what_cannot_be_located():
    codec, (p, *_) = load_codec(TINY), mixed_problems()
    good = replace(chain(codec, p, ["red 4", "blue 5"], "red 4"), rewards={"accuracy": 0.0})
    choice = replace(p, choices=["a cat", "a dog", "a cow"], answer="A")
    left_out = {
        "right": replace(good, rewards={"accuracy": 1.0}),
        "cut off": replace(good, finished=False),
        "one step": replace(chain(codec, p, ["red 4"], "red 4"), rewards={"accuracy": 0.0}),
        "no step": replace(chain(codec, p, [], "red 4"), rewards={"accuracy": 0.0}),
        "empty answer": replace(good, text="<think>red 4\nblue 5</think><answer></answer>"),
        "open think": replace(good, text="<think>red 4\nblue 5"),
        "no option": replace(good, problem=choice, text="<think>red 4\nblue 5</think><answer>F</answer>")}
    kept = replace(good, problem=choice, text="<think>red 4\nblue 5</think><answer>B</answer>")
    for reason, t in left_out.items():
        assert attribute.flawed([t]) == [], reason
    found = attribute.flawed([good, *left_out.values(), kept])
    assert len(found) == 2 and found[0] is good and found[1] is kept and attribute.flawed([]) == []


def distribution(net, prompt, ids):
    """Logits of what follows the prompt and `ids`: one uncached forward."""
    grids = torch.tensor(prompt.grids) if prompt.grids else None
    with torch.no_grad():
        return net(torch.tensor([prompt.ids + list(ids)]), None, prompt.pixel_values, grids)[0, -1]


def some_claims(problems):
    """Claims of several problems, interleaved: true, wrong, long (below e^-50), and hostile ones."""
    texts = ["red 4 6", "blue", "a long step: red 4 and blue 5, so green is 12.", "<|im_end|>", "∠A"]
    texts += [problems[0].key_steps[0], problems[3].key_steps[1]]
    return ([(p, t) for t, p in itertools.product(texts[:3], problems)] + list(zip(problems * 2, texts[3:]))
            + [(problems[1], "4")])


def same_checks(a, b, tolerance=1e-3):
    assert [c.token for c in a] == [c.token for c in b]
    close([math.log(c.same) for c in a], [math.log(c.same) for c in b], tolerance)


def test_pristine_check_is_the_uncached_forward():
    """Against the claim rendered as a whole prompt of its own and one uncached forward a token; in any order
    and in any number at once."""
    net, codec, problems = random_model(spread=0.12), load_codec(TINY), mixed_problems()
    claims, want = some_claims(problems), []
    for p, text in claims:
        whole = replace(p, question=p.question + attribute.CHECK + text)
        logps = uncached_logps(net, codec, whole, encode(codec, rollout.plain(text, codec)))
        token = min(range(len(logps)), key=lambda n: logps[n])
        want.append(attribute.Check(math.exp(max(-50.0, logps[token])), token))
    found = attribute.pristine_check(net, codec, claims)
    same_checks(found, want)
    assert len({c.token for c in found}) > 2 and len({round(math.log(c.same), 1) for c in found}) > 10
    order = random.Random(0).sample(range(len(claims)), len(claims))
    for budget in (512, 30, 1):
        part = order if budget > 1 else order[:5]
        again = attribute.pristine_check(net, codec, [claims[i] for i in part], budget=budget)
        same_checks(again, [want[i] for i in part])
    assert attribute.pristine_check(net, codec, []) == []
    (check,) = attribute.pristine_check(net, codec, [(problems[0], "<image> red")])         # just text
    assert 0 < check.same < 1


def test_pristine_check_is_a_probability():
    """Over all next tokens the checks of one-token claims add up to 1."""
    net, codec, (p, *_) = random_model(spread=0.02), load_codec(TINY), mixed_problems()
    texts = ["red", "blue", "4", "x"]
    asked = [replace(p, question=p.question + attribute.CHECK + t) for t in texts]
    checks = attribute.pristine_check(net, codec, [(p, t) for t in texts])
    for t, whole, check in zip(texts, asked, checks):
        (token,), prompt = encode(codec, t), rollout.encode_prompt(whole, codec)
        probs = (distribution(net, prompt, []) + codec.logit_mask).softmax(-1)
        assert abs(probs.sum().item() - 1) < 1e-5 and check.token == 0
        close(check.same, probs[token], 1e-5)


def test_pristine_check_of_a_question_with_the_slot():
    """A question that happens to hold the character which stands for the step."""
    net, codec, (p, *_) = random_model(), load_codec(TINY), mixed_problems()
    p = replace(p, question=p.question + " " + attribute.SLOT)
    whole = replace(p, question=p.question + attribute.CHECK + "red 4")
    logps = uncached_logps(net, codec, whole, encode(codec, "red 4"))
    close(math.log(attribute.pristine_check(net, codec, [(p, "red 4")])[0].same), min(logps), 1e-3)


def test_answer_margins_are_the_uncached_forward():
    net, codec, (a, b, c, _) = random_model(), load_codec(TINY), mixed_problems()
    chains = [chain(codec, a, ["red 4 6", "blue 5 7"], "red 6 blue 7"),
              chain(codec, b, ["red 4"], "9"),
              chain(codec, c, ["red 4", "blue 5", "so 9"], text="red 4\nblue 5\nso 9\n<answer>9 9</answer>"),
              chain(codec, a, ["lime 4", "navy 5"], text="<think>lime 4\nnavy 5</think><answer></answer>"),
              chain(codec, replace(a, answer="<|im_end|>"), ["pink 1 2"], "4")]
    # the steps before the cue as text: all of them end with a line break but the last
    before = [[t.text[:t.text.index(s.text)] for s in t.steps] for t in chains]
    before = [starts + [t.text[:t.text.index(t.steps[-1].text) + len(t.steps[-1].text)]]
              for starts, t in zip(before, chains)]
    before[2][3] += "\n"                                    # no tag behind the last step, but a line break
    want = []
    for t, starts in zip(chains, before):
        cue = "\nThe answer is " if t is chains[2] else "</think><answer>"
        p = rollout.encode_prompt(t.problem, codec)
        own, margins = extract_answer(t.text), []
        for start in starts:
            means = []
            for answer in (t.problem.answer, own or ""):
                ids, logps = encode(codec, rollout.plain(answer, codec)), []
                for n in range(len(ids)):
                    logits = distribution(net, p, encode(codec, start) + encode(codec, cue) + ids[:n])
                    logps.append((logits + codec.logit_mask).log_softmax(-1)[ids[n]].item())
                means.append(sum(logps) / len(logps) if logps else 0.0)
            margins.append(means[0] - means[1])
        want.append(margins)
    assert want[3][0] < -1 and min(abs(x) for row in want for x in row) > 1e-3      # no answer: 0 to subtract
    for budget in (9999, 60):
        found = attribute.answer_margins(net, codec, chains, budget=budget)
        assert [len(f) for f in found] == [len(t.steps) + 1 for t in chains]
        for f, w in zip(found, want):
            close(f, w, 1e-3)
        last = attribute.answer_margins(net, codec, chains, last=True, budget=budget)
        assert all(len(x) == 1 for x in last)
        close([x[0] for x in last], [w[-1] for w in want], 1e-3)


def test_margin_drop():
    assert attribute.margin_drop([2.0, 1.5, -1.0, -1.2]) == 1
    assert attribute.margin_drop([3.0, 2.0, 1.5]) == 0 and attribute.margin_drop([-1.0, -2.0, -4.0]) == 1
    assert attribute.margin_drop([1.0, -1.0]) == 0 == attribute.margin_drop([-1.0, 1.0])    # a single step
    assert attribute.margin_drop([0.0, 1.0, 3.0, 3.5]) == 2         # it only rises: where it rises least
    assert attribute.margin_drop([2.0, 1.0, 0.0]) == 0              # equal drops: the first
    rng = random.Random(0)
    for _ in range(200):
        margins, best = [rng.gauss(0, 1) for _ in range(rng.randint(2, 9))], 0
        for k in range(len(margins) - 1):
            if margins[k] - margins[k + 1] > margins[best] - margins[best + 1]:
                best = k
        assert attribute.margin_drop(margins) == best


def test_no_return():
    """Step k leads from M_k to M_k+1: the first behind which no margin is 0 or more; else the last."""
    assert attribute.no_return([2.0, 1.5, -1.0, -1.2]) == 1
    assert attribute.no_return([1.0, -1.0, 1.0, -1.0]) == 2 and attribute.no_return([1.0, 0.0, -1.0]) == 1
    assert attribute.no_return([-1.0, -1.0, -1.0]) == 0             # from the start: the first
    assert attribute.no_return([1.0, 1.0, 1.0]) == 1                # never: the last
    assert attribute.no_return([1.0, -1.0]) == 0 == attribute.no_return([1.0, 1.0])
    for n in range(2, 7):
        for margins in itertools.product((-1.0, 0.0, 1.0), repeat=n):
            first = next((k for k in range(n) if all(x < 0 for x in margins[k:])), None)
            want = n - 2 if first is None else max(0, first - 1)
            assert attribute.no_return(list(margins)) == want, margins


def block_prompt(codec):
    """A prompt whose image is 5 x 3 merged blocks, each of a colour of its own."""
    cells = np.random.default_rng(0).integers(0, 250, (3, 5, 3)).astype(np.uint8)
    image = Image.fromarray(np.repeat(np.repeat(cells, 28, 0), 28, 1))
    p = reading.Problem("blocks", "<image>Which?", "a", [image, image.transpose(Image.Transpose.ROTATE_90)])
    return rollout.encode_prompt(replace(p, question="<image><image>Which?"), codec)


def test_drop_patches_takes_whole_blocks():
    """The four patches of a merged block (the same colour here) stay or go together."""
    codec = load_codec(TINY)
    prompt, rng = block_prompt(codec), torch.Generator().manual_seed(1)
    pixels = prompt.pixel_values.clone()
    half = len(pixels) // 2                                         # two pictures with the same colours
    colours = [(n // half, *(round(x, 3) for x in row)) for n, row in enumerate(pixels.tolist())]
    assert len(pixels) == 2 * 15 * 4 and len(set(colours)) == 30 and pixels.abs().sum(1).min() > 0
    shares = []
    for _ in range(40):
        dropped = attribute.drop_patches(prompt, codec.image_config.merge_size, 0.6, rng)
        assert dropped.ids == prompt.ids and dropped.grids == prompt.grids
        gone = (dropped.pixel_values == 0).all(1)
        assert torch.equal(dropped.pixel_values[~gone], pixels[~gone])
        fate = {}
        for colour, away in zip(colours, gone.tolist()):
            assert fate.setdefault(colour, away) == away
        shares.append(sum(fate.values()) / len(fate))
    assert abs(np.mean(shares) - 0.6) < 0.06 and len(set(shares)) > 3
    merge = codec.image_config.merge_size
    assert torch.equal(attribute.drop_patches(prompt, merge, 0.0, rng).pixel_values, pixels)
    assert not attribute.drop_patches(prompt, merge, 1.0, rng).pixel_values.any()
    assert torch.equal(prompt.pixel_values, pixels)                 # the prompt itself is left alone


def test_visual_dependence_is_the_divergence_of_full_logits():
    """Token by token against two uncached forwards, with the image and without (all zeros)."""
    net, codec, problems = random_model(), load_codec(TINY), mixed_problems()
    groups = rolled(net, codec, problems, 2, 6)
    mixed = [t for pair in zip(*groups) for t in pair]              # neighbours belong to different problems
    want = []
    for t in mixed:
        prompt = rollout.encode_prompt(t.problem, codec)
        if prompt.pixel_values is None:
            want.append([0.0] * len(t.ids))
            continue
        blank, row = replace(prompt, pixel_values=torch.zeros_like(prompt.pixel_values)), []
        for n in range(len(t.ids)):
            p, q = (distribution(net, x, t.ids[:n]).log_softmax(-1) for x in (prompt, blank))
            row.append(sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist())))
        want.append(row)
    assert max(map(max, want)) > 0.1
    for masks in (1, 3):
        found = attribute.visual_dependence(net, codec, mixed, share=1.0, masks=masks)
        assert [len(f) for f in found] == [len(t.ids) for t in mixed]
        for f, w in zip(found, want):
            close(f, w, 1e-3)
    for f, t in zip(attribute.visual_dependence(net, codec, mixed, share=0.5, masks=1), mixed):
        assert all(abs(x) < 1e-5 for x in f) if not t.problem.images else max(f) > 1e-3
    for f in attribute.visual_dependence(net, codec, mixed, share=0.0, masks=1):
        close(f, [0.0] * len(f), 1e-4)
    # a random share: the mean over masks, each drawn anew
    t, drop, drawn = mixed[0], attribute.drop_patches, []
    attribute.drop_patches = lambda *args: drawn.append(drop(*args)) or drawn[-1]
    try:
        (found,) = attribute.visual_dependence(net, codec, [t], share=0.6, masks=3)
    finally:
        attribute.drop_patches = drop
    rows, prompt = [], rollout.encode_prompt(t.problem, codec)
    for masked in drawn:
        pairs = [[distribution(net, x, t.ids[:n]).log_softmax(-1) for x in (prompt, masked)]
                 for n in range(len(t.ids))]
        rows.append([(p.exp() * (p - q)).sum().item() for p, q in pairs])
    assert len(rows) == 3 and rows[0] != rows[1]
    close(found, np.mean(rows, 0), 1e-3)


def test_visual_dependence_alone_equals_in_batch():
    """A problem's masks are its own: what is measured beside it, and on how many ranks, changes nothing."""
    net, codec, problems = random_model(), load_codec(TINY), mixed_problems()
    both = [group[0] for group in rolled(net, codec, problems[:2], 1, 8)]
    together = attribute.visual_dependence(net, codec, both)
    for t, d in zip(both, together):
        close(attribute.visual_dependence(net, codec, [t])[0], d, 1e-3)


def test_step_dependence_and_erosion_by_hand():
    steps = [attribute.Step(1, 6, "a"), attribute.Step(6, 7, "b"), attribute.Step(8, 11, "c")]
    d = [9.0, 1.0, 5.0, 2.0, 4.0, 3.0, 0.5, 9.0, 0.25, 0.75, 0.5, 9.0]
    each = attribute.step_dependence(d, steps)
    close(each, [4.5, 0.5, 0.75], 1e-9)                             # the 2 best of 5, the only one, 1 of 3
    close(attribute.step_dependence(d, steps, top=1.0), [3.0, 0.5, 0.5], 1e-9)
    close(attribute.step_dependence(d, steps, top=0.0), [5.0, 0.5, 0.75], 1e-9)     # at least one
    std = math.sqrt((0.75 ** 2 + 1.25 ** 2 + 0.75 ** 2 + 0.25 ** 2) / 4)
    for k, behind in enumerate((0.0, 0.0, 2.0, 1.0)):
        close(attribute.erosion([1.0, 3.0, 1.0, 2.0], k), behind / (std + 0.1), 1e-6)
    assert attribute.erosion([2.0], 0) == 0 and attribute.most_eroded(d, steps) == 1
    assert attribute.erosion([1.0, 2.0, 3.0], 1) == 0               # what comes later does not count
    assert attribute.most_eroded([1.0, 5.0, 3.0], [attribute.Step(n, n + 1, "") for n in range(3)]) == 2
    assert attribute.most_eroded([1.0, 2.0], [attribute.Step(n, n + 1, "") for n in range(2)]) == 0


def test_search_is_a_linear_scan():
    for steps in range(1, 13):
        for true in range(steps):
            alive = lambda k: k <= true                             # do restarts behind k steps ever succeed?
            scanned = next(k for k in range(1, steps + 1) if k == steps or not alive(k)) - 1
            assert scanned == true
            for guess in (None, *range(-1, steps + 1)):
                asked, questions, answer = [], attribute.search(steps, guess), None
                while True:
                    try:
                        asked.append(questions.send(answer))
                    except StopIteration as end:
                        found = end.value
                        break
                    assert 0 < asked[-1] < steps
                    answer = alive(asked[-1])
                assert found == true, (steps, true, guess, found)
                assert len(set(asked)) == len(asked) <= math.log2(steps) + 3
                if guess is None:
                    assert len(asked) <= math.ceil(math.log2(steps))
                if guess == true:
                    assert len(asked) <= 2                          # a right guess is only confirmed


def test_monte_carlo_finds_where_success_dies():
    """With a sampler whose restarts succeed (one in four) up to a planted step and never behind it."""
    codec, asked, seen, known = load_codec(TINY), [], [], {}
    plants = [(6, 4), (3, 0), (9, 8), (1, 0), (6, 2)]
    problems = [shapes.make_problem("tiles", steps, index=n) for n, (steps, _) in enumerate(plants)]
    chains = [chain(codec, p, [f"red {k} {k}" for k in range(n)]) for p, (n, _) in zip(problems, plants)]
    place = {t.problem.id: n for n, t in enumerate(chains)}
    assert len(place) == len(plants)

    def planted(model, problems, codec, restarts, limit, temperature, numbers, prefixes):
        assert restarts == 4 and limit == 99 and temperature == 1.0
        assert numbers.shape == (4 * len(problems), 99) and len(prefixes) == 4 * len(problems)
        seen.extend(tuple(row) for row in numbers.tolist())
        groups = []
        for i, p in enumerate(problems):
            n = place[p.id]
            k = codec.tokenizer.decode(prefixes[4 * i]).count("\n")
            assert prefixes[4 * i:4 * i + 4] == [chains[n].ids[:chains[n].steps[k].start]] * 4
            asked.append((n, k))
            own = numbers[4 * i:4 * i + 4]                      # its own, whatever is searched beside it
            assert torch.equal(known.setdefault((n, k), own), own)
            answers = ["no", "no", p.answer if k <= plants[n][1] else "no", "no"]
            ids, sampled = prefixes[4 * i] + [5] * 7, [0] * len(prefixes[4 * i]) + [1] * 7
            texts = [f"<think>a</think><answer>{a}</answer>" for a in answers]
            groups.append([rollout.Trajectory(p, ids, sampled, [], True, text) for text in texts])
        return groups

    sample, rollout.sample = rollout.sample, planted
    try:
        for guesses in (None, [4, None, 2, 0, 5]):
            asked.clear(), seen.clear()
            found, tokens = attribute.monte_carlo(None, codec, chains, 99, guesses=guesses)
            assert found == [true for _, true in plants], found
            assert tokens == 7 * 4 * len(asked) and len(set(asked)) == len(asked)
            assert len(set(seen)) == len(seen) == 4 * len(asked)        # every restart has its own numbers
    finally:
        rollout.sample = sample


def test_monte_carlo_of_the_tiny_model():
    """A wrong reading planted in chains of two steps: behind it no restart is right, before it some are."""
    net, codec, rng = m.load_model(TINY).eval(), load_codec(TINY), random.Random(0)
    problems = [shapes.make_problem(kind, 2, "free", "heldout", 7) for kind in ("tiles", "bars")]
    wrong = [(p, shapes.corrupt(p.oracle, {k}, rng)) for p in problems for k in (0, 1)]
    chains = [chain(codec, p, steps, shapes.answer_from_steps(p.oracle, steps)) for p, steps in wrong]
    found, tokens = attribute.monte_carlo(net, codec, chains, 40)
    assert found == [0, 1, 0, 1], found
    assert 0 < tokens <= 4 * 4 * 40


def test_restarts_are_judged_by_the_training_reward():
    codec, (p, *_) = load_codec(TINY), mixed_problems()
    t = chain(codec, p, ["red 4"], p.answer)
    assert attribute.right(t) and not attribute.right(replace(t, text=t.text.replace(p.answer, "no")))
    assert not attribute.right(replace(t, text=t.text + "<answer>no</answer>"))     # two answers earn nothing


def test_localise_worked_example_and_kinds():
    checks = [attribute.Check(p, 0) for p in (0.98, 0.95, 0.02, 0.90)]
    steps = [attribute.Step(4 * k + 1, 4 * k + 5, "") for k in range(4)]
    fault = attribute.localise(checks)
    assert (fault.step, fault.kind, round(fault.confidence, 2)) == (2, "misread", 0.91)         # the header's
    close(fault.confidence, 0.98 * 0.95 * (1 - 0.02), 1e-12)

    def kind(token, *means, seen=1.0):
        """Of the doubted third step, when steps depend on the image by `means`, its token by `seen`."""
        d = [0.0] + [x for x in means for _ in range(4)] + [0.0]
        checks[2] = attribute.Check(0.02, token)
        d[min(9 + token, 12)] = seen
        fault = attribute.localise(checks, [1.0, -9.0, 0.0, 0.0, 0.0], d, steps)
        assert fault.step == 2 and round(fault.confidence, 2) == 0.91       # neither depends on the kind
        return fault.kind

    assert kind(0, 1, 1, 1, 1) == kind(3, 1, 1, 1, 1) == "misread"
    assert kind(1, 1, 1, 1, 0, seen=0.001) == "reasoning"                       # that token does not look
    assert kind(9, 1, 1, 1, 1, seen=0.001) == "reasoning"                   # counted past the step: its last
    assert kind(0, 1, 4, 0.1, 4, seen=0.5) == "eroded" and kind(0, 4, 4, 4, 0.1, seen=4) == "misread"
    # e_k > 1 between 0.19 / (0.095 + 0.1) = 0.97 and 0.21 / (0.105 + 0.1) = 1.02
    for fall, want in ((0.19, "misread"), (0.21, "eroded")):
        fault = attribute.localise([attribute.Check(1.0, 0), attribute.Check(0.1, 0)], None, [1.0, 1 - fall],
                                   [attribute.Step(0, 1, ""), attribute.Step(1, 2, "")])
        assert (fault.step, fault.kind) == (1, want)
    # half is not doubted; with no doubt A2's largest drop, or the last step
    calm = [attribute.Check(p, 0) for p in (0.9, attribute.DOUBT, 0.8)]
    for margins, want in ((None, 2), ([2.0, 1.0, -3.0, -3.0], 1), ([5.0, 1.0, 0.5, -1.0], 0)):
        fault = attribute.localise(calm, margins, [1.0] * 14, steps)
        assert (fault.step, fault.kind) == (want, "reasoning")
        close(fault.confidence, 0.9 * 0.5 * 0.8, 1e-12)
    assert attribute.localise([attribute.Check(0.49, 0), None, None]) == attribute.Fault(0, "misread", 0.51)
    assert attribute.localise([attribute.Check(1.0, 0), attribute.Check(0.0, 0), None]).confidence == 1
    for token, want in ((None, "misread"), (0, "reasoning"), (1, "misread")):   # unknown: any may look
        fault = attribute.localise([attribute.Check(0.1, token)], None, [0.0, 1.0],
                                   [attribute.Step(0, 2, "")])
        assert fault.kind == want


def test_localise_without_images_is_reasoning():
    """Nothing depends on an image that is not there: no kind of seeing it wrong."""
    steps = [attribute.Step(0, 1, ""), attribute.Step(1, 2, "")]
    fault = attribute.localise([attribute.Check(0.9, 0), attribute.Check(0.1, 0)], None, [0.0, 0.0], steps)
    assert (fault.step, fault.kind) == (1, "reasoning")


def test_locator_asks_each_claim_once():
    net, codec, problems = random_model(), load_codec(TINY), mixed_problems()
    a, b = problems[0], problems[3]
    chains = [chain(codec, a, ["red 4", "blue 5"]), chain(codec, a, ["red 4", "red 4", "lime 1"]),
              chain(codec, b, ["red 4", "blue 6"]), chain(codec, b, [])]
    locate = attribute.Locator(net, codec)
    locate(chains)
    assert locate.tokens == 5                               # a: red, blue, lime; b: red, blue
    for t in chains[:3]:
        same_checks(t.checks, attribute.pristine_check(net, codec, [(t.problem, s.text) for s in t.steps]))
    assert chains[3].checks is None                         # nothing to ask
    first = [t.checks for t in chains]
    locate.model = None                                     # from here on nothing can be asked
    locate(chains)
    assert locate.tokens == 5 and all(x is y for x, y in zip([t.checks for t in chains], first))
    again = [replace(t, checks=None) for t in reversed(chains)]
    locate(again)
    assert [t.checks for t in again] == first[::-1] and locate.tokens == 5
    locate([]), locate([chains[3]])
    known = [attribute.Check(1.0, 0), attribute.Check(0.0, 0), None]
    done = replace(chain(codec, a, ["navy 1", "navy 2", "navy 3"]), checks=known)
    locate([done])                                          # settled: the first fault is known
    assert done.checks is known
    locate.model, done.checks = net, [known[0], None, known[1]]
    locate([done])                                          # unknown before the first doubted one
    assert None not in done.checks and locate.tokens == 8


def test_doubted_token_is_found_in_the_chain():
    """Whatever stands before the step and however its text falls into tokens there."""
    codec = load_codec(TINY)
    for lead in ("", "  ", "\t", " "):
        ids = encode(codec, f"<think>{lead}blue 3 5\nred 1 2</think><answer>9</answer>")
        step = attribute.split_steps(ids, codec)[0]
        alone = encode(codec, "blue 3 5")
        for n, token in enumerate(alone):
            found = attribute.in_chain(attribute.Check(0.1, n), step, ids, codec)
            start, stop = attribute.at_fault(step, found)
            assert stop == start + 1 and found.same == 0.1
            said, want = (codec.tokenizer.decode([i]).strip() for i in (ids[start], token))
            assert said == want, lead
    whole = attribute.Check(0.1)
    assert attribute.in_chain(whole, step, ids, codec) is whole


def test_locator_oracle_is_the_truth():
    codec, rng, verdicts = load_codec(TINY), random.Random(0), set()
    problems = [shapes.make_problem(shapes.KINDS[i % 4], 5, index=i) for i in range(8)]
    chains = [chain(codec, p, shapes.corrupt(p.oracle, set(rng.sample(range(5), 2)), rng) + ["hm"])
              for p in problems]
    locate = attribute.Locator(None, codec, "oracle", shapes.is_right)
    locate(chains)
    for t in chains:
        for s, c in zip(t.steps, t.checks, strict=True):
            assert c == attribute.Check(1.0 if shapes.is_right(t.problem, s.text) else 0.0)
            verdicts.add(c.same)
    assert verdicts == {0.0, 1.0} and locate.tokens == 0


def test_locators_of_one_step():
    """margin, dependence, monte_carlo and random know one fault: right before it, unknown behind it."""
    net, codec, problems = random_model(), load_codec(TINY), mixed_problems()
    chains = [chain(codec, p, [f"red {k} {n}" for k in range(2 + n)], "9") for n, p in enumerate(problems)]

    def cuts(name, some=chains, **kwargs):
        locate, some = attribute.Locator(net, codec, name, **kwargs), [replace(t, checks=None) for t in some]
        locate(some)
        at = [t.checks.index(attribute.Check(0.0)) for t in some]
        for t, k in zip(some, at):
            assert t.checks[:k] == [attribute.Check(1.0)] * k
            assert t.checks[k + 1:] == [None] * (len(t.steps) - k - 1)
            assert attribute.settled(t.checks)
            assert attribute.localise(t.checks) == attribute.Fault(k, "misread", 1.0)
        before = locate.tokens
        locate(some)
        assert locate.tokens == before                      # settled
        return at, before

    margins = attribute.answer_margins(net, codec, chains)
    assert cuts("margin") == ([attribute.margin_drop(x) for x in margins], 0)
    depends = attribute.visual_dependence(net, codec, chains)
    assert cuts("dependence") == ([attribute.most_eroded(d, t.steps) for d, t in zip(depends, chains)], 0)
    found, tokens = cuts("monte_carlo", chains[:2], max_new_tokens=40)
    assert found == [0, 0] and tokens > 0                   # random weights never succeed
    many = [SimpleNamespace(problem=problems[0], ids=[n], steps=[0] * 5, checks=None, finished=True)
            for n in range(600)]
    for key in "ab":
        attribute.Locator(None, codec, "random", key=key)(many)
        drawn = [t.checks.index(attribute.Check(0.0)) for t in many]
        assert all(80 < drawn.count(k) < 160 for k in range(5))
        for t in many:
            t.checks = None
        attribute.Locator(None, codec, "random", key=key)(many[::-1])       # its own, whatever stands beside
        assert drawn == [t.checks.index(attribute.Check(0.0)) for t in many]
        first = drawn if key == "a" else first
        for t in many:
            t.checks = None
    assert first != drawn


def test_settled_truth_table():
    """The first fault is known: somebody asked every step before it."""
    kinds = [None, *(attribute.Check(p, 0) for p in (1.0, attribute.DOUBT, 0.49, 0.0))]
    for n in range(4):
        for checks in itertools.product(kinds, repeat=n):
            want = True
            for c in checks:
                if c is None:
                    want = False
                    break
                if c.same < attribute.DOUBT:
                    break
            assert attribute.settled(list(checks)) is want, checks


# ------------------------------------------------------------------------------------------------------------
# rereason.py


def planted(codec, kind="tiles", steps=6, wrong=(1, 4), index=0, rng_seed=0):
    """A failed rollout with wrong readings at the given steps, as the sampler would have left it."""
    p = shapes.make_problem(kind, steps, "free", "heldout", 11, index)
    chain = shapes.corrupt(p.oracle, set(wrong), random.Random(rng_seed))
    text = f"<think>{chr(10).join(chain)}</think><answer>{shapes.answer_from_steps(p.oracle, chain)}</answer>"
    ids = codec.tokenizer(text, add_special_tokens=False)["input_ids"] + [codec.eos_ids[0]]
    t = rollout.Trajectory(p, ids, [1] * len(ids), [-0.5] * len(ids), True, text)
    t.rewards, t.steps = reward_parts(text, p.answer), attribute.split_steps(ids, codec)
    return t


def repaired(net, codec, parents, **rules):
    locate = attribute.Locator(net, codec)
    locate(parents)
    return rereason.rectify(net, codec, parents, [len(t.ids) for t in parents], [str(t.ids) for t in parents],
                            locate, 120, rereason.Rules(**rules))


@functools.lru_cache(None)
def loop_results():
    """The tiny model, its codec, and what the loop made of a dozen planted failures."""
    net, codec = m.load_model(TINY).eval(), load_codec(TINY)
    parents = [planted(codec, kind, 6, wrong, i) for i in range(2) for kind in ("tiles", "bars")
               for wrong in ((1,), (0, 3), (2, 5))]
    blank = [replace(t, logps=[0.0] * len(t.ids)) for t in parents]
    for t, logps in zip(parents, rereason.log_weights(net, codec, blank)):
        t.logps = logps                                 # mu: as if sampled in the clean context
    return net, codec, parents, repaired(net, codec, parents)


def test_loop_repairs_planted_errors_one_by_one():
    _, codec, parents, repairs = loop_results()
    done = [r for r in repairs if r.outcome == "repaired"]
    assert len(done) >= 9, [r.outcome for r in repairs]
    for r in done:
        t, parent = r.chain, r.parent
        assert attribute.right(t) and not attribute.right(parent) and t.problem is parent.problem
        assert t.ids[:r.changed] == parent.ids[:r.changed] and t.ids[r.changed:] != parent.ids[r.changed:]
        assert len(t.ids) == len(t.logps) == len(t.sampled) and t.finished and t.ids[-1] in codec.eos_ids
        assert codec.tokenizer.decode(t.ids[:-1]) == t.text
        assert [s.text for s in t.steps] == shapes.true_steps(t.problem.oracle)
        assert r.looks >= 1 and r.tokens < 1.5 * len(parent.ids) + 120
        assert r.failed or r.cuts == sorted(set(r.cuts)), "from left to right"
        assert t.provenance in (f"relook {r.looks}", "regenerated")
    two = [r for r in done if len(r.cuts) == 2]
    assert two and all(r.looks == 2 for r in two), "chains with two errors take two looks"
    assert min(r.tokens for r in two) < 0.9 * len(two[0].parent.ids), "later steps are kept, not sampled anew"
    for r, t in zip(repairs, parents):                                  # parents stay what they were
        assert r.parent is t and len(t.logps) == len(t.ids) and not attribute.right(t)


def test_behaviour_logps_are_those_of_the_context_a_token_was_sampled_in():
    net, codec, _, repairs = loop_results()
    for r in [r for r in repairs if r.outcome == "repaired" and r.looks == 1][:2]:
        t, k = r.chain, r.cuts[0]
        step, parent = t.steps[k], r.parent
        assert t.logps[:step.start] == parent.logps[:step.start], "the trusted prefix keeps its mu"
        before = codec.tokenizer.decode(t.ids[:step.start])
        look = rereason.relook_problem(t.problem, before, parent.steps[k].text)
        words = [n for n in range(step.start, step.stop) if codec.tokenizer.decode([t.ids[n]]).strip()]
        close([t.logps[n] for n in words], uncached_logps(net, codec, look, [t.ids[n] for n in words]))
        clean = uncached_logps(net, codec, t.problem, t.ids)
        tail = next(n for n in range(t.steps[-1].stop, len(t.ids)) if t.ids[n] != parent.ids[n])
        close(t.logps[tail:], clean[tail:])                             # sampled on in the clean context
        close(rereason.log_weights(net, codec, [t])[0], [a - b for a, b in zip(clean, t.logps)])


def test_no_prompt_holds_an_answer():
    """Every prompt of the loop and of the pristine check, searched for the ids of the right and the wrong
    answer."""
    net, codec, parents, _ = loop_results()
    seen, render = [], rollout.render

    def recording(problem, codec):
        seen.append((problem, render(problem, codec)))
        return seen[-1][1]

    rollout.render = recording
    try:
        repaired(net, codec, parents[:4])
    finally:
        rollout.render = render
    relooks = [p for p, _ in seen if not isinstance(p.question, str)]
    assert relooks and all(len(p.images) == 2 and len(p.question) == 3 for p in relooks)
    own = {t.problem.id: [extract_answer(x.text) for x in parents if x.problem.id == t.problem.id]
           for t in parents}
    ids = lambda text: codec.tokenizer(text, add_special_tokens=False)["input_ids"]
    for problem, text in seen:
        whole = " ".join(map(str, ids(text)))
        for answer in [problem.answer, *own[problem.id]]:
            for form in (answer, " " + answer):
                assert " ".join(map(str, ids(form))) not in whole, (answer, text)


def test_when_a_second_look_is_fair():
    t = lambda text, **more: rollout.Trajectory(
        reading.Problem("p", "<image>q", more.pop("answer", "48"), [], **more), [], [], [], True, text)
    wrong = "<think>a\nb</think><answer>47</answer>"
    assert rereason.may_look(t(wrong), "a\nthe sum is 46 or 480")
    assert not rereason.may_look(t(wrong), "a\nso 48") and not rereason.may_look(t(wrong), "it is (47).")
    for answer in ("yes", "No", "true"):
        assert not rereason.may_look(t(wrong, answer=answer), "a")
    assert not rereason.may_look(t(wrong, answer="A", choices=["x", "y"]), "c")
    letter = t("<think>a</think><answer>B</answer>", answer="A", choices=["x", "y", "z"])
    assert rereason.may_look(letter, "c")


def test_two_turns_two_images():
    p, codec = shapes.make_problem("tiles", 3), load_codec(TINY)
    look = rereason.relook_problem(p, "<think>red 1 2\n", "blue 3 4")
    text, prompt = rollout.render(look, codec), rollout.encode_prompt(look, codec)
    assert text.count("<|im_start|>user") == 2 and text.count("<|im_start|>assistant") == 2
    assert text.index("red 1 2") < text.rindex("<|image_pad|>") < text.index("blue 3 4")
    assert len(prompt.grids) == 2 and len(prompt.pixel_values) == 2 * prompt.grids[0][1] * prompt.grids[0][2]
    blind = rereason.relook_problem(p, "<think>", "blue 3 4", image=False)
    prompt = rollout.encode_prompt(blind, codec)
    assert prompt.pixel_values is None and "blue 3 4" in rollout.render(blind, codec)


def test_new_step_ends_with_its_line():
    def ends(pieces, several_lines=False):
        codec = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: "".join(pieces[i] for i in ids)),
                                eos_ids=(len(pieces) - 1,) if pieces[-1:] == [""] else (-1,))
        return rereason.new_step(list(range(len(pieces))), several_lines, codec)

    assert ends(["a", " b", ".\n"]) == ("a b.", 3) and ends(["a", "\n", "b"]) == ("a", 1)
    assert ends(["a", " b", "</", "think>"]) == ("a b", 2) and ends(["a", ".</", "think>"]) == ("", 0)
    assert ends(["a", "b"]) == ("", 0) == ends([]) and ends(["a", "b", ""]) == ("ab", 2)
    assert ends(["a", "\n", "b", ""]) == ("a", 1) and ends(["a", "\n", "b", ""], True) == ("a\nb", 3)
    assert ends(["\n", "a", "\n"]) == ("a", 2) and ends([""]) == ("", 0)


def test_hostile_chains_do_not_stop_the_loop():
    """Tags and control tokens in steps, no steps, a choice answered without a step."""
    net, codec, parents, _ = loop_results()
    p = parents[0].problem
    choice = replace(p, answer="A", choices=["x", "y", "z"])
    failures = []
    for problem, text in ((p, "<think><image> 1 2\n<|im_end|> <image>\nred 4 6</think>"
                           "<answer>red 6</answer>"),
                          (p, "<think>" + "a b " * 30 + "\nred\n</think><answer>red 6</answer>"),
                          (p, "<think>Step 1: red\nis 4\nStep 2: blue\nis 5</think><answer>4</answer>"),
                          (choice, "<think>red 4\nblue 5</think><answer>B</answer>")):
        ids = encode(codec, rollout.plain(text, codec)) + [codec.eos_ids[0]]
        t = rollout.Trajectory(problem, ids, [1] * len(ids), [-0.5] * len(ids), True, text)
        t.rewards = reward_parts(text, problem.answer, problem.choices)
        t.steps = attribute.split_steps(ids, codec)
        assert attribute.flawed([t]) == [t]
        failures.append(t)
    for relook in rereason.RELOOKS:
        assert all(r.outcome for r in repaired(net, codec, failures, relook=relook))
    bare = rollout.Trajectory(choice, encode(codec, "<answer>A</answer>") + [codec.eos_ids[0]], [], [], True,
                              "<answer>A</answer>", steps=[], checks=[])
    bare.sampled, bare.logps = [1] * len(bare.ids), [0.0] * len(bare.ids)
    r = rereason.Repair(replace(failures[3], text="B"), bare, "key", 50.0, changed=0)
    rereason.accept(net, codec, [r], 40, rereason.Rules(min_log_w=-99.0))
    assert r.outcome == "a lucky guess"


def test_what_comes_next_for_a_chain():
    """rereason.plan by a table: look, redo, go on, make it anew, give up; and what counts as a failure."""
    good, bad = attribute.Check(0.9, 0), attribute.Check(0.1, 0)
    margins = [[0.5]]

    def ask(checks, finished=True, cuts=(), failed=0, tokens=0, relook="image", line="blue 2", lines=3):
        texts = ["red 1", line, "teal 3"][:lines]
        steps = [attribute.Step(3 * n, 3 * n + 3, text) for n, text in enumerate(texts)]
        chain = rollout.Trajectory(reading.Problem("p", "<image>q", "9", []), list(range(12)), [1] * 12,
                                   [0.0] * 12, finished, "<think>x</think><answer>7</answer>", steps=steps,
                                   checks=list(checks))
        r = rereason.Repair(chain, chain, "key", 50.0, cuts=list(cuts), failed=failed, tokens=tokens)
        with swapped(attribute, "answer_margins", lambda *args, last=False: [[margins[0][-1]]] if last
                     else margins):
            found = rereason.plan(r, None, None, rereason.Rules(relook=relook))
        return (*(found if found[0] else (r.outcome,)), r.failed, r.cuts)

    one, fine = [good, bad, good], [good] * 3
    assert ask(one) == ("look", 1, 0, [1])
    assert ask(one, cuts=[1]) == ("look", 1, 1, [1, 1]) and ask(one, cuts=[2]) == ("look", 1, 1, [2, 1])
    assert ask(one, cuts=[0]) == ("look", 1, 0, [0, 1])                     # it got further
    assert ask(fine, finished=False) == ("go on", 12, 0, [])                # so far every step agrees
    assert ask(fine, finished=False, cuts=[2]) == ("go on", 12, 0, [2])
    assert ask(one, finished=False, cuts=[1]) == ("look", 1, 1, [1, 1])
    assert ask(one, failed=3) == ("look", 1, 3, [1])
    assert ask(one, failed=4) == ("go on", 0, 4, [-1])                      # the whole chain anew, once
    assert ask(one, cuts=[-1], failed=3) == ("look", 1, 3, [-1, 1])
    assert ask(one, cuts=[-1], failed=4) == ask(one, cuts=[-1, 0], failed=4)[:1] + (4, [-1])
    assert ask(one, cuts=[-1], failed=4)[0] == "given up"
    assert ask(one, cuts=[1], failed=4) == ("go on", 0, 5, [1, -1])
    assert ask([], lines=0) == ("go on", 0, 0, [-1])
    assert ask(one, tokens=100)[0] == "look" and ask(one, tokens=101)[0] == "given up"
    assert ask(fine) == ("go on", 9, 0, [3])                                # the steps lead to the answer
    assert ask(fine, cuts=[1]) == ("go on", 9, 1, [1, 3])
    margins = [[2.0, 1.5, -4.0, -5.0]]                                      # lost at the second step
    assert ask(fine) == ("redo", 1, 0, [1]) and ask(fine, line="blue\n2") == ("go on", 3, 0, [1])
    assert ask(one, relook="none") == ("redo", 1, 0, [1])
    assert ask(one, relook="none", line="blue\n2") == ("go on", 3, 0, [1])
    assert ask(one, line="blue\n2") == ("look", 1, 0, [1])
    assert ask(one, line="so 9") == ("redo", 1, 0, [1])                     # it says the answer: no look
    assert ask(one, relook="only") == ("look", 1, 0, [1])
    assert ask(one, relook="only", line="so 9")[0] == ask(one, relook="only", cuts=[1])[0] == "given up"
    assert ask(fine, relook="only", finished=False) == ("go on", 12, 0, [])


def test_a_step_written_anew():
    """rereason.rewrite: how much a reply may write; one that says nothing new goes back one step."""
    codec, asked = load_codec(TINY), []
    t = planted(codec, steps=5, wrong=(2,))
    t.checks = [attribute.Check(0.9, 0)] * 5

    def reply(text):
        def one_each(model, codec, problems, keys, prefixes, limits, stop_ids=()):
            asked.append((keys, prefixes, limits, stop_ids))
            new, before = encode(codec, text) + [codec.eos_ids[0]], prefixes[0]
            return [rollout.Trajectory(problems[0], before + new, [0] * len(before) + [1] * len(new),
                                       [-0.1] * len(before + new), True, text)]
        return one_each

    def after(what, k, text, relook="image"):
        r = rereason.Repair(t, replace(t), "key", 50.0, cuts=[4, k])
        with swapped(rereason, "one_each", reply(text)), swapped(rereason, "still_holds", lambda *a: a[2]):
            found = rereason.rewrite(None, codec, [(r, what, k)], 7, rereason.Rules(relook=relook))
        return r, found

    size = lambda k: t.steps[k].stop - t.steps[k].start
    for what, k, before in (("look", 3, 0), ("redo", 3, t.steps[3].start)):
        r, found = after(what, k, "red 1 2")
        assert asked[-1] == ([f"key/{what}/7"], [t.ids[:before]], [before + 16 + 2 * size(k)],
                             () if what == "look" else codec.newline_ids)
        assert found == [(r, k)] and r.cuts == [4, k] and r.failed == 0 and r.looks == (what == "look")
        assert r.tokens == len(encode(codec, "red 1 2")) + 1 and r.chain.steps[k].text == "red 1 2"
    for k, back in ((3, 2), (1, 0), (0, 0)):
        r, found = after("look", k, t.steps[k].text)                        # the same again
        assert found == [(r, t.steps[back].start)] and r.cuts == [4, back] and (r.failed, r.looks) == (1, 0)
        assert r.chain.ids == t.ids
        r, found = after("look", k, t.steps[k].text, "only")
        assert found == [] and r.cuts == [4, back] and r.failed == 1


def test_how_far_a_chain_is_sampled_on():
    """rereason.go_on: two steps ahead, twice as far each time nothing was completed, within the limit."""
    codec, asked = load_codec(TINY), []
    t = planted(codec, steps=5, wrong=(2,))
    t.checks = [attribute.Check(0.9, 0)] * 5
    a_step = t.steps[-1].stop // 5

    def one_each(model, codec, problems, keys, prefixes, limits, stop_ids=()):
        asked.append((keys, prefixes, limits))
        n = limits[0]
        return [rollout.Trajectory(problems[0], t.ids[:n], [1] * n, [-0.1] * n, False, "")]

    for stalled, at, most in ((0, t.steps[1].stop, 200), (1, t.steps[0].stop, 200), (0, t.steps[1].stop, 12),
                              (0, t.steps[1].stop, t.steps[1].stop)):
        r = rereason.Repair(t, replace(t), "key", 50.0, stalled=stalled)
        with swapped(rereason, "one_each", one_each):
            rereason.go_on(None, codec, [(r, at)], most, 3, rereason.Rules())
        if at >= most:
            assert r.outcome == "too long" and len(asked) == 3
            continue
        limit = min(most, at + 2 ** stalled * max(8, 2 * a_step))
        assert asked[-1] == (["key/go on/3"], [t.ids[:at]], [limit])
        assert r.tokens == limit and r.chain.logps[:at] == t.logps[:at] and not r.fresh
        assert len(r.chain.ids) <= limit and r.chain.checks[:1] == [t.checks[0]]
        assert r.chain.steps == t.steps[:len(r.chain.steps)]                    # whole steps alone


def test_put_step_moves_what_follows():
    codec = load_codec(TINY)
    t = planted(codec, steps=5, wrong=(2,))
    t.checks = [attribute.Check(1.0, 0)] * 5
    for k, text in ((2, "red 4 6 8"), (4, "blue 1"), (0, "a")):  # longer, shorter; the last has no line break
        ids = codec.tokenizer(text, add_special_tokens=False)["input_ids"]
        r = rereason.Repair(t, replace(t), "key", 50.0)
        rereason.put_step(r, k, ids, [-0.1] * len(ids), text, codec)
        assert [(s.start, s.stop, s.text) for s in r.chain.steps] == [
            (s.start, s.stop, s.text) for s in attribute.split_steps(r.chain.ids, codec)]
        assert [s.text for s in r.chain.steps] == [s.text if n != k else text for n, s in enumerate(t.steps)]
        assert (len(r.chain.ids) == len(r.chain.logps) == len(r.chain.sampled)
                and r.changed == t.steps[k].start)
        assert r.chain.logps.count(-0.1) == len(ids) and not r.fresh and len(t.steps) == 5


def test_steps_stay_only_as_long_as_they_hold():
    """Behind a corrected step: good and still likely stays, doubted stops the look, unknown or unlikely is
    sampled anew."""
    net, codec, parents, _ = loop_results()
    t = parents[0]
    good, bad = attribute.Check(0.9, 0), attribute.Check(0.1, 0)
    clean = uncached_logps(net, codec, t.problem, t.ids)

    def after(checks, logps=clean, finished=True):
        chain = replace(t, checks=checks, logps=list(logps), finished=finished)
        r = rereason.Repair(t, chain, "key", 50.0)
        found = rereason.still_holds(net, codec, [(r, 0)], rereason.Rules())
        return found[0][1] if found else ("fresh" if r.fresh else None)

    assert after([good] * 6) == "fresh"                                 # all of it, the answer too
    assert after([good] * 3 + [bad] + [good] * 2) is None               # look there next
    assert after([good] * 3 + [None] + [bad] * 2) == t.steps[3].start
    strange = list(clean)
    strange[t.steps[2].start + 1] += 4.0                                # mu was e^4 times higher there
    assert after([good] * 6, strange) == t.steps[2].start
    for place in (t.steps[2].start + 1, t.steps[5].stop + 3):            # twice min_log_w, not half of it
        strange = list(clean)
        strange[place] += 2.0
        assert after([good] * 6, strange) == "fresh"
    strange = list(clean)
    strange[t.steps[5].stop + 3] += 4.0
    assert after([good] * 6, strange) == t.steps[5].stop + 3            # a token of the answer
    assert after([bad] * 6, clean) is None and after([good] * 6, clean, False) == len(t.ids)


def test_what_is_accepted():
    net, codec, parents, repairs = loop_results()
    r = next(r for r in repairs if r.outcome == "repaired")

    def verdict(rules=rereason.Rules(), median=50.0, cuts=(), looks=1, **change):
        again = rereason.Repair(r.parent, replace(r.chain, **change), "key", median, changed=r.changed,
                                looks=looks, cuts=list(cuts))
        rereason.accept(net, codec, [again], 120, rules)
        return (again.chain.provenance if cuts else "") or again.outcome

    assert verdict() == "repaired"
    assert verdict(cuts=[1]) == "relook 1" and verdict(cuts=[0, 1], looks=2) == "relook 2"
    assert verdict(cuts=[1], looks=0) == verdict(cuts=[-1, 1], looks=0) == "restart"
    assert verdict(cuts=[1, -1]) == verdict(cuts=[-1], looks=0) == "regenerated"
    assert verdict(median=len(r.chain.ids) / 1.6) == "not well-formed"
    assert verdict(text=r.chain.text.replace("<think>", "")) == "not well-formed"
    hinted = r.chain.text.replace("</think>", "\nLooking again, fine</think>")
    assert verdict(text=hinted) == "talks of the hint"
    assert verdict(rereason.Rules(min_log_w=5.0)) == "too unlikely"
    logps, last = list(r.chain.logps), r.chain.steps[-1]
    logps[last.start:last.stop] = [x + 9.0 for x in logps[last.start:last.stop]]
    assert verdict(logps=logps) == "too unlikely"                      # one part of several is enough
    lucky = replace(r.chain.problem, answer="A", choices=["unheard of", "x", "y", "z"])
    assert verdict(problem=lucky) == "a lucky guess"                   # the steps do not lead to it again
    asked = []
    for right, want in ((3, "repaired"), (2, "repaired"), (1, "a lucky guess"), (0, "a lucky guess")):

        def votes(net, problems, codec, group_size, longest, temperature, numbers, prefixes):
            asked.append((problems, group_size, prefixes))
            wrong = replace(r.chain, text=r.parent.text)
            return [[r.chain] * right + [wrong] * (3 - right)]

        with swapped(rollout, "sample", votes), swapped(rereason, "guessable", lambda problem: True):
            assert verdict() == want
        assert asked[-1] == ([r.chain.problem], 3, [r.chain.ids[:r.chain.steps[-1].stop]] * 3)


def test_restarts_only_and_blind_looks():
    """The ablations: without second looks every token is clean; without the image a look has none."""
    net, codec, parents, _ = loop_results()
    restarts = repaired(net, codec, parents[:6], relook="none", spend=4.0)
    for r in restarts:
        assert r.looks == 0
        assert r.outcome != "repaired" or r.chain.provenance in ("restart", "regenerated")
        if r.outcome == "repaired" and len(r.cuts) == 1:
            step = r.chain.steps[r.cuts[0]]
            clean = uncached_logps(net, codec, r.chain.problem, r.chain.ids[:step.stop - 1])
            close(r.chain.logps[step.start:step.stop - 1], clean[step.start:])
    assert any(r.outcome == "repaired" for r in restarts)
    for r, usual in zip(repaired(net, codec, parents[:6], relook="only"), loop_results()[3]):
        assert r.looks == len(r.cuts) if r.outcome == "repaired" else r.outcome == "given up"
        assert r.outcome != "repaired" or r.chain.ids == usual.chain.ids
    failed = lambda repairs: sum(r.failed for r in repairs)
    blind = repaired(net, codec, parents, relook="text")
    assert failed(blind) > failed(loop_results()[3]) + 2, "unseen is guessed"


def test_loop_ends_after_its_turns():
    """What is not done by then is given up; the rest is as it would be with more turns."""
    net, codec, parents, usual = loop_results()
    done = []
    for turns in (0, 2, 3, 4):
        found = repaired(net, codec, parents, turns=turns)
        for r, free in zip(found, usual):
            assert r.outcome == "too many turns" or (r.outcome, r.chain.ids) == (free.outcome, free.chain.ids)
        done.append(sum(r.outcome == "repaired" for r in found))
    assert 0 == done[0] < done[1] < done[2] < done[3] <= sum(r.outcome == "repaired" for r in usual)


def test_loop_is_the_same_in_any_company():
    net, codec, parents, repairs = loop_results()
    for some in ((1,), (11, 4, 7, 0)):
        for r, n in zip(repaired(net, codec, [parents[n] for n in some]), some):
            assert (r.outcome, r.chain.ids, r.tokens) == (repairs[n].outcome, repairs[n].chain.ids,
                                                          repairs[n].tokens)


def test_restarts_follow_the_gradient_of_log_value():
    """Verified restarts in an enumerable policy: sum over right y of pi(y | s, right) grad of the loss equals
    -A grad log V(s), through policy_loss itself."""
    torch.manual_seed(0)
    # one row a prefix of up to 3 binary tokens
    table = torch.randn(7, 2, dtype=torch.double, requires_grad=True)
    right = {(0, 1, 1), (1, 0, 1), (1, 1, 1)}

    def logps_of(y):
        rows = [0, 1 + y[0], 3 + 2 * y[0] + y[1]]
        return torch.stack([table[row].log_softmax(-1)[token] for row, token in zip(rows, y)])

    value = sum(logps_of(y).sum().exp() for y in right)
    want, = torch.autograd.grad(value.log(), table)
    total = torch.zeros_like(table)
    for y in right:
        logps = logps_of(y)[None]
        share = (logps.sum().exp() / value).item()
        loss, _ = grpo.policy_loss(logps, logps.detach(), torch.tensor([[0.875]], dtype=torch.double),
                                   torch.ones(1, 3, dtype=torch.double), 1.0,
                                   rectified=torch.tensor([[True]]))
        total += share * torch.autograd.grad(loss, table)[0]
    close(total, -0.875 * want, 1e-9)


# ------------------------------------------------------------------------------------------------------------
# tiny/shapes.py


def test_problems_are_reproducible_and_varied():
    for kind in shapes.KINDS:
        for steps in (1, 3, 8, 20):
            for form in shapes.FORMS:
                a, b = (shapes.make_problem(kind, steps, form, "train", 1, 2) for _ in range(2))
                assert a.question == b.question and a.answer == b.answer
                assert np.array_equal(np.asarray(a.images[0]), np.asarray(b.images[0]))
                assert len(a.key_steps) == steps and a.question.count("<image>") == 1
    pictures = [shapes.make_problem("tiles", 5, index=i).images[0] for i in range(20)]
    assert len({p.tobytes() for p in pictures}) == 20 and len({p.size for p in pictures}) > 3


def test_splits_share_no_image():
    """No content of a held-out picture is ever drawn in training, whatever the seed."""
    def content(p):
        return json.dumps([p.oracle["kind"], sorted(p.oracle["show"].items()),
                           sorted(p.oracle.get("next", {}).items())])
    for kind in shapes.KINDS:
        sides = [{content(shapes.make_problem(kind, 2, "free", split, seed, i))
                  for seed in (0, 1) for i in range(150)}
                 for split in ("train", "heldout")]
        assert not sides[0] & sides[1] and min(map(len, sides)) > 50


def test_true_chain_is_true_and_gives_the_answer():
    rng = random.Random(0)
    for kind, steps, form in itertools.product(shapes.KINDS, (1, 5, 12), shapes.FORMS):
        p = shapes.make_problem(kind, steps, form, "heldout", 3, steps)
        assert shapes.check_steps(p, p.key_steps) == ["true"] * steps
        text = shapes.demonstrate(p, (0.0, 0.0), rng)
        assert text == "<think>" + "\n".join(p.key_steps) + f"</think><answer>{p.answer}</answer>"
        if p.choices:
            assert p.choices["ABCD".index(p.answer)] == shapes.answer_from_steps(p.oracle, p.key_steps)
            assert len(set(p.choices)) == 4


def test_oracle_names_what_is_wrong():
    p = shapes.make_problem("tiles", 4, index=1)
    s = p.key_steps
    name, value, shifted = s[2].split()
    misread = f"{name} {(int(value) + 1) % 10} {(int(shifted) + 1) % 10}"
    slip = f"{name} {value} {(int(shifted) + 1) % 10}"
    assert shapes.check_steps(p, [s[0], s[1], misread, s[3]]) == ["true", "true", "misread", "true"]
    assert shapes.check_steps(p, [s[0], s[1], slip, s[3]]) == ["true", "true", "logic", "true"]
    assert shapes.check_steps(p, [s[1], s[0]]) == ["logic", "logic"]            # true, but not what was asked
    assert shapes.check_steps(
        p, ["hello", "red", "", s[3], s[3] + " 1", "gold 3 4", "red ² 3"]).count("unparsed") == 6
    assert shapes.is_right(p, s[3]) and not shapes.is_right(p, slip) and not shapes.is_right(p, misread)
    absent = next(n for n in shapes.NAMES if n not in p.oracle["show"])
    assert shapes.check_steps(p, [f"{absent} 3 4"]) == ["misread"]
    p = shapes.make_problem("path", 5, index=2)
    s = p.key_steps
    astray = [n for n in p.oracle["show"] if n not in s[1].split()][0]
    name, value, _ = s[1].split()
    assert shapes.check_steps(p, [s[0], f"{name} {value} {astray}", s[2]]) == ["true", "misread", "logic"]
    p = shapes.make_problem("bars", 3, index=0)
    name, value, verdict = p.key_steps[0].split()
    assert shapes.check_steps(p, [f"{name} {value} {'no' if verdict == 'yes' else 'yes'}"]) == ["logic"]


def test_erosion_grows_with_depth_and_stays_consistent():
    assert (abs(shapes.erosion_rate(1, 0.05, 0.4) - 0.05) < 1e-9
            and abs(shapes.erosion_rate(9, 0.05, 0.4) - 0.4) < 1e-9)
    rng, wrong = random.Random(0), np.zeros(9)
    for i in range(600):
        p = shapes.make_problem(("tiles", "count", "bars")[i % 3], 9, "free", "train", 4, i)
        text = shapes.demonstrate(p, (0.05, 0.4), rng)
        steps = text[7:text.index("</think>")].split("\n")
        verdicts = shapes.check_steps(p, steps)
        assert set(verdicts) <= {"true", "misread"}
        wrong += [v == "misread" for v in verdicts]
        assert text.endswith(f"<answer>{shapes.answer_from_steps(p.oracle, steps)}</answer>")
    rates, expected = wrong / 600, [shapes.erosion_rate(d, 0.05, 0.4) for d in range(1, 10)]
    close(rates, expected, 0.06)
    for i in range(100):                                # a path misread walks on from where it believes to be
        p = shapes.make_problem("path", 9, "free", "train", 4, i)
        text = shapes.demonstrate(p, (0.3, 0.3), rng)
        steps = [s.split() for s in text[7:text.index("</think>")].split("\n")]
        assert all(a[2] == b[0] for a, b in zip(steps, steps[1:])) and steps[-1][2] == "end"


def test_answers_are_hard_to_guess():
    for kind in shapes.KINDS:
        assert shapes.guess_rate(kind, 3) < 0.03 and shapes.guess_rate(kind, 5) < 0.005
        for steps in (1, 4):
            assert 0.15 < shapes.guess_rate(kind, steps, "choice", 300) < 0.35
            assert 0.4 < shapes.guess_rate(kind, steps, "yesno", 300) < 0.6


def test_stream_spec():
    stream = shapes.Stream("tiny:steps=3-6,kinds=tiles+path,forms=free+choice", "heldout", run=8)
    got = [stream[i] for i in range(64)]
    assert {p.task for p in got} == {"tiles/free", "tiles/choice", "path/free", "path/choice"}
    assert {len(p.key_steps) for p in got} == {3, 4, 5, 6}
    assert all(len({len(p.key_steps) for p in got[i:i + 8]}) == 1 for i in range(0, 64, 8))
    assert all("-heldout-" in p.id for p in got)
    for spec, word in (("tiny:step=3", "step"), ("tiny:steps=0", "steps"), ("tiny:steps=6-3", "steps"),
                       ("tiny:kinds=cats", "cats"), ("tiny:forms=", "not among"), ("tiny:steps=²", "steps")):
        raises(ValueError, [spec, word], shapes.Stream, spec)


# ------------------------------------------------------------------------------------------------------------
# grpo.py


def test_eq1_group_advantages():
    close(grpo.group_advantages(torch.tensor([[1.0, 0, 0, 0]])), [[0.75, -0.25, -0.25, -0.25]], 1e-6)
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    plain, scaled = grpo.group_advantages(rewards), grpo.group_advantages(rewards, use_std=True)
    for b in range(5):
        mean = sum(rewards[b].tolist()) / 8
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards[b].tolist()) / 7)
        for g in range(8):
            assert abs(plain[b, g].item() - (rewards[b, g].item() - mean)) < 1e-5
            assert abs(scaled[b, g].item() - (rewards[b, g].item() - mean) / (std + 1e-4)) < 1e-4
    assert torch.equal(grpo.group_advantages(torch.ones(2, 4), True), torch.zeros(2, 4))
    assert torch.equal(grpo.group_advantages(torch.ones(2, 1), True), torch.zeros(2, 1))


def test_token_logps_in_chunks_equal_plain():
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(37, 16, generator=g), torch.randn(50, 16, generator=g)
    targets, banned = torch.randint(0, 45, (37,), generator=g), torch.zeros(50)
    banned[45:] = -torch.inf
    for temperature in (1.0, 0.7):
        results = []
        for chunk in (5, 37, 1000, None):
            h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
            if chunk:
                logps, entropy = grpo.token_logps(h, w, targets, banned, temperature, chunk, entropy=True)
            else:
                full = ((h @ w.T + banned) / temperature).softmax(-1)
                logps = full[torch.arange(37), targets].log()
                entropy = torch.stack([-(p[:45] * p[:45].log()).sum() for p in full])
            (logps * torch.arange(37)).sum().backward()
            results.append((logps.detach(), entropy.detach(), h.grad, w.grad))
        for r in results[:-1]:
            for a, b in zip(r, results[-1]):
                close(a, b, 2e-4)
    assert not grpo.token_logps(hidden, head, targets, banned)[1].any()
    assert len(grpo.token_logps(hidden[:0], head, targets[:0], banned)[0]) == 0


def test_full_logits_never_exist():
    """The largest tensor made, forward and backward, is chunk x V, not T x V."""
    from torch.utils._python_dispatch import TorchDispatchMode
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, (tuple, list)) else [out])
                         if torch.is_tensor(x))
            return out

    hidden, head = torch.randn(64, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
    with Watch():
        grpo.token_logps(hidden, head, torch.arange(64), torch.zeros(100), chunk=16,
                         entropy=True)[0].sum().backward()
    assert 16 * 100 == max(sizes), max(sizes)


def loss_by_loops(logps, old, advantages, weights, normaliser, low, high, dual, beta, ref):
    """Eq. (2) to (5), a token at a time."""
    total = 0.0
    for i, j in itertools.product(range(len(logps)), range(len(logps[0]))):
        a, w = advantages[i][0], weights[i][j]
        ratio = math.exp(logps[i][j] - old[i][j])                                       # Eq. (2)
        clipped = min(max(ratio, 1 - low), 1 + high)
        term = min(ratio * a, clipped * a)                                              # Eq. (3)
        if a < 0:
            term = max(term, dual * a)                                                  # Eq. (4)
        total -= w * term
        if beta:
            d = ref[i][j] - logps[i][j]
            total += beta * w * (math.exp(d) - d - 1)                                   # Eq. (5)
    return total / normaliser


def loss_inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    logps = -torch.rand(6, 9, generator=g) * 3
    old = logps + torch.randn(6, 9, generator=g) * 0.7
    advantages = torch.tensor([0.75, -0.25, -0.25, 0.5, -2.0, 0.0])[:, None]
    weights = (torch.rand(6, 9, generator=g) > 0.3).float() * torch.rand(6, 9, generator=g).clamp(min=0.3)
    return logps, old, advantages, weights, logps + torch.randn(6, 9, generator=g) * 0.5


def test_edges_of_the_loss():
    """No tokens at all; a ratio on the edge of the clip range; an advantage of 0; a bounded KL."""
    logps, spread = grpo.token_logps(torch.zeros(0, 4), torch.zeros(3, 4), torch.zeros(0).long(),
                                     torch.zeros(3), entropy=True)
    assert logps.shape == spread.shape == (0,)
    hidden, head = torch.randn(5, 4), torch.randn(3, 4)
    every = grpo.token_logps(hidden, head, torch.tensor([0, 2, 1, 0, 1]), torch.zeros(3))[0]
    close(grpo.token_logps(hidden[:1], head, torch.tensor([0]), torch.zeros(3))[0], every[:1], 1e-6)
    one = torch.ones(1, 1)

    def stats(ratio, advantage, **kwargs):
        return grpo.policy_loss(one * math.log(ratio), one * 0, one * advantage, one, 1.0, **kwargs)

    for advantage in (1.0, -1.0):
        assert stats(1.0, advantage, clip_low=0.0, clip_high=0.0)[1]["clip_fraction"] == 0
        for ratio in (0.1, 2.0):
            assert stats(ratio, 0.0)[1]["clip_fraction"] == 0
            assert stats(ratio, advantage)[1]["clip_fraction"] == float((ratio > 1) == (advantage > 0))
    for gap, wanted in ((30.0, math.exp(10) - 11), (-30.0, math.exp(-10) + 9)):
        loss, found = stats(1.0, 0.0, beta=1.0, ref_logps=one * gap)
        close([loss, found["kl_ref"]], [wanted, wanted], 1e-2)


def test_eq2_to_eq5_policy_loss():
    logps, old, advantages, weights, ref = loss_inputs()
    for low, high, dual, beta in ((0.2, 0.28, 3.0, 0.0), (0.1, 0.5, 1.5, 0.04), (0.2, 0.2, 100.0, 1.0)):
        loss, _ = grpo.policy_loss(logps, old, advantages, weights, 54, low, high, dual, beta, ref)
        want = loss_by_loops(*(x.tolist() for x in (logps, old, advantages, weights)), 54, low, high, dual,
                             beta, ref.tolist())
        close(loss, want, 1e-5)


def test_eq3_gradient_and_worked_example():
    """On policy the gradient is the plain policy gradient; outside the clip it is zero; weight 0 means
    no gradient."""
    logps, _, advantages, weights, _ = loss_inputs()
    x = logps.clone().requires_grad_()
    grpo.policy_loss(x, logps, advantages, weights, 10.0)[0].backward()
    close(x.grad, -advantages * weights / 10.0, 1e-6)
    x = torch.tensor([[math.log(0.3)]], requires_grad=True)
    loss, stats = grpo.policy_loss(x, torch.tensor([[math.log(0.2)]]), torch.tensor([[0.75]]),
                                   torch.ones(1, 1), 1.0)
    loss.backward()
    assert abs(loss.item() + 0.96) < 1e-6 and x.grad.item() == 0 and stats["clip_fraction"] == 1
    x = torch.tensor([[0.0, 0.0]], requires_grad=True)
    grpo.policy_loss(x, torch.tensor([[0.0, -torch.inf]]), torch.tensor([[1.0]]),
                     torch.tensor([[1.0, 0.0]]), 1.0)[0].backward()
    assert x.grad.tolist() == [[-1.0, 0.0]]             # even where an unused log-prob is not finite


def test_eq4_dual_clip_bounds_the_push():
    x = torch.tensor([[2.0]], requires_grad=True)       # ratio e^2 = 7.4 > 3 at a negative advantage
    loss, _ = grpo.policy_loss(x, torch.zeros(1, 1), torch.tensor([[-1.0]]), torch.ones(1, 1), 1.0)
    loss.backward()
    assert loss.item() == 3.0 and x.grad.item() == 0


def test_eq5_k3_is_not_negative_and_unbiased():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    k3 = torch.stack([grpo.policy_loss(a.log().view(1, 1), a.log().view(1, 1), torch.zeros(1, 1),
                                       torch.ones(1, 1), 1.0, beta=1.0, ref_logps=b.log().view(1, 1))[0]
                      for a, b in zip(p, q)])
    assert (k3 >= 0).all()
    close((p * k3).sum(), (p * (p / q).log()).sum(), 1e-5)


def test_eq6_step_credit():
    """A token counts where it is at fault: the one the policy would have written otherwise; all of a step of
    which no more is known."""
    codec, rng = load_codec(TINY), random.Random(0)
    for i in range(20):
        t = chain(codec, None, [f"red {k} {i}" for k in range(1 + i % 5)], "9")
        checks = [rng.choice((None, attribute.Check(0.0), attribute.Check(0.1, rng.randrange(3))))
                  for _ in t.steps]
        spans = [attribute.at_fault(s, c) for s, c in zip(t.steps, checks)]
        want = [float(any(s.start <= n < s.stop and (c is None or c.token in (None, n - s.start))
                          for s, c in zip(t.steps, checks))) for n in range(len(t.ids))]
        found = grpo.step_credit(len(t.ids), spans)
        assert found == want and found[0] == 0 and found[-1] == 0       # neither tag nor answer is to blame
        assert sum(found) == sum(stop - start for start, stop in spans) >= len(spans)
    assert grpo.step_credit(3, []) == [0.0, 0.0, 0.0]
    step = attribute.Step(4, 8, "red 7 9")
    assert attribute.at_fault(step, attribute.Check(0.1, 1)) == (5, 6)  # the reading, not what follows
    assert attribute.at_fault(step, attribute.Check(0.1, 9)) == (7, 8)  # counted past the step: its last


def weight(w, gamma):
    return (1 + gamma) ** 2 * w / (w + gamma) ** 2


def test_eq7_shape():
    for gamma in (0.01, 0.1, 0.5, 2.0):
        close(grpo.shape(torch.tensor(1.0), gamma), 1.0, 1e-4)
        for w in (1e-4, 0.03, gamma, 1 / 3, 1.0, 2.5, 10.0):
            x = torch.tensor(w, dtype=torch.double, requires_grad=True)
            grpo.shape(x, gamma).backward()
            close(x.grad * w, weight(w, gamma), 1e-9)                       # g(w) = w f'(w)
            log = torch.tensor(math.log(w), dtype=torch.double, requires_grad=True)
            grpo.shape(log.exp(), gamma).backward()
            close(log.grad, weight(w, gamma), 1e-9)                         # = d f / d log pi
        peak = weight(gamma, gamma)
        close(peak, (1 + gamma) ** 2 / (4 * gamma), 1e-9)
        assert all(weight(gamma * s, gamma) < peak for s in (0.5, 0.9, 1.1, 2))
        assert abs(weight(1.0, gamma) - 1) < 1e-12                          # where policy and mu agree: GRPO
    w = torch.tensor(0.3 / 0.9, requires_grad=True)                         # the header's worked example
    grpo.shape(w).backward()
    assert round((w * w.grad).item(), 2) == 2.15


def rectified_inputs():
    """Log-probs whose w lies well below, around and (a few) above the bound of 10."""
    logps, old, advantages, weights, ref = loss_inputs(3)
    old[1, :4] = logps[1, :4] - torch.tensor([math.log(10.5), math.log(9.5), 3.0, -4.0])
    weights[1, :4] = torch.tensor([1.0, 1.0, 0.5, 0.7])
    return logps, old, advantages, weights, ref, torch.tensor([0, 1, 0, 1, 1, 0])[:, None].bool()


def test_eq8_rectified_rows():
    """A token at a time: rectified rows are shaped, bounded and weighted by lambda_r, the others clipped as
    ever; all share the normaliser and the KL."""
    logps, old, advantages, weights, ref, rectified = rectified_inputs()
    for lambda_r, gamma, beta in ((1.0, 0.1, 0.0), (0.3, 0.5, 0.04), (2.0, 0.0, 0.0), (0.0, 0.1, 0.0)):
        total = 0.0
        for i, j in itertools.product(range(6), range(9)):
            if weights[i, j] == 0:
                continue
            a, omega, d = advantages[i, 0].item(), weights[i, j].item(), (logps[i, j] - old[i, j]).item()
            if rectified[i, 0]:
                w = min(math.exp(d), 10.0)
                f = (1 + gamma) ** 2 / gamma * w / (w + gamma) - (1 + gamma) / gamma + 1 if gamma else w
                total -= omega * lambda_r * a * f                           # Eq. (7), (8)
            else:
                term = min(math.exp(d) * a, min(max(math.exp(d), 0.8), 1.28) * a)
                total -= omega * (max(term, 3.0 * a) if a < 0 else term)
            if beta:
                k = (ref[i, j] - logps[i, j]).item()
                total += beta * omega * (math.exp(k) - k - 1)
        loss, _ = grpo.policy_loss(logps, old, advantages, weights, 54, beta=beta, ref_logps=ref,
                                   rectified=rectified, lambda_r=lambda_r, gamma=gamma)
        close(loss, total / 54, 1e-5)


def test_eq8_gradient_of_rectified_tokens():
    """dL / dlog pi = -lambda_r A omega g(w) / normaliser; zero above w = 10 and where omega is zero."""
    logps, old, advantages, weights, _, rectified = rectified_inputs()
    old[3, 0], weights[3, 0] = -torch.inf, 0.0              # never sampled: not finite, not used
    old[5, 0], weights[5, 0] = -torch.inf, 0.0
    for gamma, lambda_r in ((0.1, 0.7), (0.0, 1.0), (1.0, 2.0)):
        x = logps.clone().requires_grad_()
        loss, stats = grpo.policy_loss(x, old, advantages, weights, 7.0, rectified=rectified,
                                       lambda_r=lambda_r, gamma=gamma)
        loss.backward()
        assert all(value.isfinite() for value in (loss, *stats.values()))
        y = logps.clone().requires_grad_()
        grpo.policy_loss(y, old, advantages, weights, 7.0)[0].backward()
        seen = set()
        for i, j in itertools.product(range(6), range(9)):
            a, omega, w = advantages[i, 0].item(), weights[i, j].item(), math.exp(logps[i, j] - old[i, j])
            if omega == 0:
                assert x.grad[i, j].item() == 0
            elif not rectified[i, 0]:
                assert x.grad[i, j] == y.grad[i, j]         # the policy's own rows know nothing of the others
            elif w > 10:
                assert x.grad[i, j].item() == 0
                seen.add("above")
            else:
                g = weight(w, gamma) if gamma else w        # gamma 0: f(w) = w, so g(w) = w
                close(x.grad[i, j], -lambda_r * a * omega * g / 7.0, 1e-5)
                seen.add("near" if w > 9 else "")
        assert seen == {"above", "near", ""} and (x.grad != 0).sum() > 15
    x = logps.clone().requires_grad_()                      # on policy (w = 1) it is GRPO, whatever gamma
    grpo.policy_loss(x, logps, advantages, weights, 7.0, rectified=rectified, gamma=0.3)[0].backward()
    close(x.grad, -advantages * weights / 7.0, 1e-6)


def test_eq8_no_rectified_rows_is_grpo():
    logps, old, advantages, weights, ref = loss_inputs(1)
    for beta in (0.0, 0.1):
        results = []
        for rectified in (None, torch.zeros(6, 1, dtype=torch.bool)):
            x = logps.clone().requires_grad_()
            loss, stats = grpo.policy_loss(x, old, advantages, weights, 9.0, beta=beta, ref_logps=ref,
                                           rectified=rectified, lambda_r=5.0, gamma=0.2)
            loss.backward()
            results.append((loss.detach(), x.grad, torch.stack([stats[k].float() for k in sorted(stats)])))
        for a, b in zip(*results):
            close(a, b, 1e-7)


def test_eq8_diagnostics_count_only_on_policy_rows():
    logps, old, advantages, weights, ref, rectified = rectified_inputs()
    _, stats = grpo.policy_loss(logps, old, advantages, weights, 9.0, beta=0.1, ref_logps=ref,
                                rectified=rectified)
    own = ~rectified[:, 0]
    _, want = grpo.policy_loss(logps[own], old[own], advantages[own], weights[own], 9.0, beta=0.1,
                               ref_logps=ref[own])
    assert stats.keys() == want.keys() and stats["tokens"] == (weights[own] > 0).sum() > 0
    for name in want:
        close(stats[name], want[name], 1e-4)
    assert stats["clip_fraction"] > 0 and stats["kl_ref"] > 0


def test_group_shares():
    shares = grpo.group_shares(torch.tensor([[1, 1], [0, 0], [1, 0], [0, 1]]))
    assert shares == {"all_right": 0.25, "all_wrong": 0.25, "mixed": 0.5}


# ------------------------------------------------------------------------------------------------------------
# eval.py


def test_pass_at_k_by_counting():
    for n, c in ((4, 0), (4, 1), (6, 3), (5, 5)):
        for k in range(1, n + 1):
            draws = list(itertools.combinations(range(n), k))
            want = sum(any(i < c for i in d) for d in draws) / len(draws)
            assert abs(figures.pass_at_k(n, c, k) - want) < 1e-9


def test_interval_is_wilsons():
    low, high = figures.interval([1.0] * 8 + [0.0] * 2)                       # textbook values for 8 of 10
    assert abs(low - 0.4902) < 2e-3 and abs(high - 0.9433) < 2e-3
    assert figures.interval([0.0] * 10)[0] == 0 and 0.2 < figures.interval([0.0] * 10)[1] < 0.35
    close(figures.interval([1.0, 0.0] * 5), figures.interval([1.0] * 5 + [0.0] * 5), 1e-9)
    narrow, wide = figures.interval([0.5] * 9 + [0.25]), figures.interval([1.0] * 5 + [0.0] * 5)
    assert narrow[1] - narrow[0] < wide[1] - wide[0]
    rng, hits = np.random.default_rng(0), 0             # coverage, with 4 dependent samples a problem
    for _ in range(400):
        values = rng.binomial(4, rng.beta(1, 2, size=60)) / 4
        low, high = figures.interval(values.tolist())
        hits += low <= 1 / 3 <= high
    assert 0.91 <= hits / 400 <= 0.98, hits / 400


def test_summary_figures():
    rows = [{"id": i, "groups": {"task": "a" if i < 2 else "b", "skill": ["x"] * (i > 0)}, "mode": "sample",
             "correct": c, "format": True, "extracted": "x" if c else None}
            for i, cs in enumerate(((1, 1), (1, 0), (0, 0), (0, 0))) for c in cs]
    rows += [{**r, "mode": "greedy"} for r in rows[::2]]
    s = figures.summarise(rows)
    assert (s["n"] == 4 and s["greedy"]["mean"] == 0.5 and s["avg@2"]["mean"] == 0.375
            and s["pass@2"]["mean"] == 0.5)
    assert s["sample parse fail"]["mean"] == 0.625 and s["sample format"]["mean"] == 1
    table = figures.report(rows).splitlines()
    assert len(table) == 5 and "task a" in table[3] and "100.0 %" in table[3]
    rows[0]["groups"]["skill"] = ["x", "y"]
    table = {x.split("|")[1].strip(): x.split("|")[2].strip() for x in figures.report(rows).splitlines()}
    assert table["skill x"] == "4" and table["skill y"] == "1"


def test_eval_command_on_a_file():
    """JSONL in, one row a completion out, the same again with the same seed; a problem's samples do not
    depend on the company it is in."""
    with scratch() as folder:
        rows = [{"id": f"p{i}", "images": ["a.png"], "problem": "<image>red 1?", "answer": "1"}
                for i in range(3)]
        path = write_rows(folder, rows)
        flags = ["--model", TINY, "--data", str(path), "--samples", "2", "--max_new_tokens", "12", "--out"]
        got = []
        for name, more in (("a", []), ("b", ["--batch", "1"]), ("c", ["--problems", "1", "--greedy"])):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                evaluation.main(flags + [str(folder / name)] + more)
            got.append([json.loads(x) for x in (folder / name).read_text().splitlines()])
        assert "avg@2" in printed.getvalue() and "greedy" in printed.getvalue()
        assert got[0] == got[1] and len(got[0]) == 6 and len(got[2]) == 3
        assert [r for r in got[2] if r["mode"] == "sample"] == got[0][:2]
        assert {"id", "completion", "extracted", "correct", "gold"} <= set(got[0][0])


def test_flags_of_a_dataclass():
    config = parse_flags(evaluation.EvalConfig, ["--samples", "3", "--greedy"])
    assert config.samples == 3 and config.greedy is True and config.data == "tiny"
    assert parse_flags(train.TrainConfig, ["--no-freeze_vision"],
                                  {"freeze_vision": True}).freeze_vision is False
    with contextlib.redirect_stderr(io.StringIO()) as err:
        for flags in (["--no_such_flag", "1"], ["--sample", "3"], ["--samples", "many"]):
            raises(SystemExit, "2", parse_flags, evaluation.EvalConfig, flags)
    assert "no_such_flag" in err.getvalue()
    source = Path(train.__file__).read_text()
    for name in asdict(train.TrainConfig()):
        assert (f"    {name}: " in source
                and "#" in source.split(f"    {name}: ", 1)[1].split("\n", 1)[0]), name


# ------------------------------------------------------------------------------------------------------------
# benchmarks/


def base64_png(colour="red", size=(40, 30), noise=False):
    out = io.BytesIO()
    image = Image.new("RGB", size, colour)
    if noise:
        image = Image.effect_noise(size, 90)
    image.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def write_tsv(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(
            f, list(dict.fromkeys(k for r in rows for k in r)), delimiter="\t", restval=""
        )
        writer.writeheader()
        writer.writerows(rows)
    return path


def official_query(question, kind, choices=(), unit=""):
    ask = {
        "choice": "provide the correct option letter, e.g., A, B, C, D, at the end",
        "integer": "requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end",
        "float": "requiring a floating-point number with two decimal places and provide the final value, "
        "e.g., 1.23, 1.34, 1.45, at the end",
    }[kind]
    listed = "\nChoices:\n" + "\n".join(f"({a}) {c}" for a, c in zip("ABCDEFGH", choices)) if choices else ""
    return f"Hint: Please answer the question and {ask}.\nQuestion: {question}{unit}{listed}"


def load(path, prompt="own", instruction="", **kwargs):
    return formats.load_benchmark(path, prompt, instruction, **kwargs)


def mathvista_rows():
    """A choice with a picture, an integer that borrows it, and a number of two decimals."""
    red = base64_png()
    return [
        {"index": 1, "image": red, "question": official_query("How many?", "choice", ["9", "9", "12"]),
         "answer": "9", "answer_option": "A", "choices": "['9', '9', 'twelve \"12\"']",
         "question_type": "multi_choice", "answer_type": "text", "task": "figure question answering",
         "skills": "['numeric', 'algebra']"},
        {"index": 2, "image": "1", "question": official_query("Sum?", "integer", unit=" (Unit: kg)"),
         "answer": "14", "choices": "[]", "question_type": "free_form", "answer_type": "integer",
         "task": "math word problem", "skills": "['algebra']"},
        {"index": 3, "image": red, "question": official_query("Mean?", "float"), "answer": "0.80",
         "choices": "", "question_type": "free_form", "answer_type": "float", "task": "x", "skills": "[]"}]


def test_mathvista_files():
    with scratch() as folder:
        rows = mathvista_rows()
        path = write_tsv(folder / "MathVista_MINI.tsv", rows)
        items, note = load(path, instruction="Think.")
        assert [i.id for i in items] == ["1", "2", "3"] and not note
        assert items[0].question == "<image>How many?\nChoices:\n(A) 9\n(B) 9\n(C) 12\nThink."
        assert items[0].choices == ["9", "9", 'twelve "12"'] and items[0].answer == "A"
        assert items[1].question == "<image>Sum? (Unit: kg)\nThink." and items[1].images == items[0].images
        assert items[0].groups == {"task": "figure question answering", "skill": ["numeric", "algebra"]}
        assert (items[2].answer_type, items[2].precision) == ("float", 2)
        assert load(path, "direct", "Think.")[0][1].question == "<image>" + rows[1]["question"]
        Image.new("RGB", (9, 9)).save(folder / "1.jpg")
        official = {
            str(r["index"]): {
                "question": "Sum?",
                "image": "1.jpg",
                "choices": ["9", "9"] if n == 0 else None,
                "unit": None,
                "precision": 1.0 if n == 2 else None,
                "answer": r["answer"],
                "question_type": r["question_type"],
                "answer_type": r["answer_type"],
                "pid": str(r["index"]),
                "query": r["question"],
                "metadata": {"split": "testmini", "task": r["task"], "skills": ["algebra"]},
            }
            for n, r in enumerate(rows)
        }
        (folder / "testmini.json").write_text(json.dumps(official))
        items, _ = load(folder / "testmini.json")
        assert [i.benchmark for i in items] == ["MathVista"] * 3 and items[0].answer == "A"
        assert items[2].precision == 1 and items[1].question == "<image>Sum? (Unit: kg)"
        assert items[1].groups["skill"] == ["algebra"] and reading.open_image(items[0].images[0]).size == (
            9,
            9,
        )


def mathverse_rows(text, shown):
    """A question as text, the same in the picture only, one without options, and two other golds."""
    ask = "Please directly answer the question and provide the "
    row = {"image": base64_png(), "question": f"{ask}correct option letter, e.g., A, B.\nQuestion: {text}",
           "query_cot": "cot " + text, "answer": "B", "question_type": "multi-choice",
           "problem_version": "Text Lite", "problem_index": 7, "question_for_eval": text, "index": 1,
           "metadata": "{'split': 'testmini', 'subject': 'Plane Geometry', 'subfield': 'Angle'}"}
    return [
        row,
        {**row, "index": 2, "problem_version": "Vision Only", "question": shown, "question_for_eval": ""},
        {**row, "index": 3, "question_type": "free-form", "answer": "$$r=7.00$$",
         "question": f"{ask}final value, e.g., 1, 2.5.\nQuestion: Find r."},
        {**row, "index": 4, "answer": "C\nD"},
        {**row, "index": 5, "answer": "(B)"}]


def test_mathverse_files():
    with scratch() as folder:
        shown = (
            "According to the question shown in the image, please directly answer the question and provide "
            "the correct option letter, e.g., A, B, C, D."
        )
        text = "Find the angle.\nChoices:\nA:40°\nB:60°\nC:80°\nD:100°"
        rows = mathverse_rows(text, shown)
        items, _ = load(write_tsv(folder / "MathVerse_MINI.tsv", rows))
        assert items[0].question == "<image>" + text and items[0].answer == items[4].answer == "B"
        assert items[0].choices == items[1].choices == ["40°", "60°", "80°", "100°"]  # borrowed
        assert (
            "shows. Give the option letter." in items[1].question
            and items[1].groups["version"] == "Vision Only"
        )
        assert items[2].choices is None and items[2].question == "<image>Find r."
        assert items[3].choices is None and items[3].answer == "C,D"
        assert items[0].groups == {"version": "Text Lite", "subject": "Plane Geometry"}
        path = folder / "MathVerse_MINI.tsv"
        assert load(path, "direct")[0][1].question == "<image>" + shown
        assert load(path, "cot")[0][0].question == "<image>cot " + text
        Image.new("RGB", (9, 9)).save(folder / "1.png")
        official = [
            {
                "sample_index": "9",
                "problem_index": "7",
                "problem_version": "Vision Only",
                "question": "",
                "image": "1.png",
                "answer": "B",
                "question_type": "multi-choice",
                "query_wo": shown,
                "query_cot": "first reason",
                "metadata": {"subject": "Functions"},
            }
        ]
        (folder / "x.json").write_text(json.dumps(official))
        item = load(folder / "x.json", "cot")[0][0]
        assert (item.benchmark, item.id, item.question) == ("MathVerse", "9", "<image>first reason")
        for text, right in (("B", True), ("(B)", True), ("so the answer is C", False)):
            assert rules.grade(item, text)[1] is right  # no option text is known, letters still are


def test_mathvision_files():
    with scratch() as folder:
        row = {
            "index": 3,
            "image": base64_png(),
            "question": "Which of <image1>?",
            "answer": "C",
            "category": "logic",
            "choices": "['A', 'B', 'C', 'D', 'E']",
        }
        rows = [
            row,
            {**row, "index": 4, "choices": "[]", "answer": "\x0crac{36}{13}"},
            {**row, "index": 5, "choices": "['1', '2', '3', '4', '5']", "answer": "B"},
            {**row, "index": 6, "choices": "[]", "answer": "11 "},
        ]
        path = write_tsv(folder / "MathVision_MINI.tsv", rows)
        items, _ = load(path)
        assert items[0].question == "<image>Which of [image 1]?" and items[0].choices == list("ABCDE")
        assert items[1].answer == "\\frac{36}{13}" and rules.grade(items[1], "\\boxed{36/13}")[1]
        assert items[2].question.endswith("\nA. 1\nB. 2\nC. 3\nD. 4\nE. 5") and items[3].answer == "11"
        assert rules.grade(items[0], "<answer>C</answer>") == ("C", True)
        cot = load(path, "cot")[0][2].question
        assert cot.startswith("<image>Please solve the problem step by step") and "(B) 2\n" in cot
        assert load(path, "direct")[0][0].question.endswith("single word or phrase.")
        Image.new("RGB", (9, 9)).save(folder / "1.jpg")
        line = {
            "id": "1",
            "question": "What? <image1> <image2>",
            "options": [],
            "answer": "7",
            "solution": None,
            "image": "1.jpg",
            "level": 2,
            "subject": "graph theory",
        }
        (folder / "test.jsonl").write_text(json.dumps(line) + "\n")
        item = load(folder / "test.jsonl")[0][0]
        assert (item.benchmark, item.choices, item.groups) == (
            "MathVision",
            None,
            {"subject": "graph theory", "level": "2"},
        )
        assert item.question == "<image>What? [image 1] [image 2]" and len(item.images) == 1


def mmmu_rows():
    """A choice between two pictures, a row of the dev split, an open question, a row without a picture."""
    red, blue = base64_png("red"), base64_png("blue")
    row = {"id": "validation_Art_1", "index": 1, "split": "validation",
           "question": "Is <image 2> like <image 1>?", "A": "None", "B": "<image 1>", "C": "both",
           "answer": "B", "question_type": "multiple-choice", "image": str([red, blue]), "category": "Art",
           "l2-category": "Art and Design"}
    return [
        row,
        {**row, "index": 2, "id": "dev_Art_1", "split": "dev"},
        {**row, "index": 3, "question": "x = <?> mass", "A": "", "B": "", "C": "", "image": red,
         "question_type": "open", "answer": "['24/7', '3.429']"},
        {**row, "index": 4, "image": ""}]


def test_mmmu_files():
    """Images stand where their tags do, in questions and options; lists of images; dev rows are left out."""
    with scratch() as folder:
        rows = mmmu_rows()
        path = write_tsv(folder / "MMMU_DEV_VAL.tsv", rows)
        items, note = load(path, instruction="Think.")
        assert [i.id for i in items] == ["1", "3"] and note == "left out: 1 rows without an image, 1 dev rows"
        assert items[0].question == "Is <image> like <image>?\nA. None\nB. <image>\nC. both\nThink."
        colours = [reading.open_image(im).getpixel((0, 0)) for im in items[0].images]
        assert colours == [(0, 0, 255), (255, 0, 0), (255, 0, 0)]
        assert items[1].golds == ["24/7", "3.429"] and items[1].choices is None
        assert items[1].question == "<image>x = <?> mass\nThink."
        for text, right in (("3.43", True), ("24/7", True), ("3.4", False), ("about 3.4294", True)):
            assert rules.grade(items[1], text)[1] is right, text
        want = (
            "Question: Is <image> like <image>?\nOptions:\nA. None\nB. <image>\nC. both\n"
            "Please select the correct answer from the options above. \n"
        )
        assert load(path, "direct", "Think.")[0][0].question == want
        assert (
            rules.grade(items[0], "It is None", "vlmeval")[0] is None
            and rules.grade(items[0], "B", "vlmeval")[1]
        )
        codec = load_codec(TINY)
        assert len(rollout.encode_prompt(items[0], codec).grids) == 3
        bad = write_tsv(folder / "mmmu_bad.tsv",
                        [{**rows[0], "question": "<image 3>"}, {**rows[0], "image": "%%%" * 40}])
        message = raises(reading.DataError, ["row 1", "<image 3>", "2 images", "row 2"], load, bad)
        assert len(message.splitlines()) == 2


def test_mmmu_pro_files():
    with scratch() as folder:
        letters = dict(zip("ABCDEFGHIJKL", (f"option {n}" for n in range(12))))
        row = {
            "index": 5,
            "image": base64_png(),
            "question": "Which <image 1>?",
            "answer": "L",
            "category": "Math",
            **letters,
        }
        path = write_tsv(
            folder / "MMMU_Pro_10c.tsv",
            [row, {**row, **dict.fromkeys(letters, ""), "A": "only", "answer": "A", "index": 6}],
        )
        items, _ = load(path)
        assert (
            items[0].benchmark == "MMMU-Pro" and len(items[0].choices) == 12 and items[1].choices == ["only"]
        )
        assert items[0].question.startswith("Which <image>?\nA. option 0") and items[0].split.startswith(
            "standard"
        )
        cot = load(path, "cot")[0][0].question
        assert cot.startswith("Question: Which <image>?\nOptions:\nA. option 0") and cot.endswith(
            "step by step before " "answering. "
        )
        assert load(path, "direct")[0][0].question.endswith(
            "Answer directly with the option letter from the given " "choices. "
        )
        items, _ = load(
            write_tsv(folder / "MMMU_Pro_V.tsv", [{**row, "question": "placeholder"}]), instruction="Think."
        )
        assert (
            items[0].question == "<image>Answer the following multiple-choice question in the image. \nThink."
        )
        assert items[0].choices[11] == "option 11" and items[0].split == "vision"
        for text, rule, right in (
            ("Reason.\nAnswer: L", "vlmeval", True),
            ("Answer: L or K", "vlmeval", False),
            ("I think (L)", "official", True),
            ("Answer: L", "official", True),
            ("I can't help", "official", False),
            ("<answer>L</answer>", "strict", True),
        ):
            assert rules.grade(items[0], text, rule)[1] is right, (text, rule)


def test_mmstar_files():
    with scratch() as folder:
        star = {"index": 0, "image": base64_png(), "question": "See <image 1>. Which?", "A": "red",
                "B": "blue", "C": "", "D": "", "answer": "B", "category": "logical reasoning",
                "l2_category": "x", "bench": "MMMU"}
        item = load(write_tsv(folder / "MMStar.tsv", [star]))[0][0]
        assert item.question == "<image>See <image 1>. Which?\nA. red\nB. blue" and item.choices == [
            "red",
            "blue",
        ]
        plain = {k: v for k, v in star.items() if k not in "ABCD"}
        for question, choices in (
            ("Which?\nOptions: A: red, B: blue, C: x, y, D: z", ["red", "blue", "x, y", "z"]),
            (official_query("Which?", "choice", ["red", "blue"]), ["red", "blue"]),
        ):
            item = load(write_tsv(folder / "MMStar_official.tsv", [{**plain, "question": question}]))[0][0]
            assert item.choices == choices, item.choices
            assert rules.grade(item, "It is blue.")[1] and not rules.grade(item, "A")[1]
        raises(reading.DataError, "stands twice", load, write_tsv(folder / "MMStar2.tsv", [star, star]))
        Image.new("RGB", (9, 9)).save(folder / "o.png")
        row = {"question": "Which?", "A": "red", "B": "blue", "answer": "B", "image": "o.png"}
        rows = [{**row, "index": n} for n in range(3)]                                  # 0 is a name too
        (folder / "mmstar.json").write_text(json.dumps(rows))
        assert [i.id for i in load(folder / "mmstar.json")[0]] == ["0", "1", "2"]


def test_broken_benchmark_files():
    with scratch() as folder:
        unknown = write_tsv(folder / "unknown.tsv", [{"index": 1, "question": "x"}])
        raises(reading.DataError, "which benchmark", load, unknown)
        Image.new("RGB", (9, 9)).save(folder / "o.png")
        row = {"index": 0, "question": "Which?", "A": "red", "B": "blue", "answer": "B", "image": "o.png"}
        for bad, words in (([1], "JSON object"), ('{"half', "not JSON"),
                           ({**row, "image": "../o.png"}, "outside"),
                           ({**row, "image": "none.png"}, "no such file")):
            lines = [json.dumps({**row, "index": 1}), bad if isinstance(bad, str) else json.dumps(bad)]
            (folder / "mmstar.jsonl").write_text("\n".join(lines))
            raises(reading.DataError, ["mmstar.jsonl:2", words], load, folder / "mmstar.jsonl")
        (folder / "mmstar.tsv").write_bytes("index\tquestion\n1\t30\xb0?".encode("latin-1"))
        raises(reading.DataError, ["mmstar.tsv", "not a readable TSV"], load, folder / "mmstar.tsv")
        bad = {"question": "x", "choices": "['1', '2']", "answer": "1", "answer_type": "float",
               "question_type": "x", "precision": "two", "image": base64_png()}
        raises(reading.DataError, ["row 1", "MathVista"], load, write_tsv(folder / "MathVista_x.tsv", [bad]))


RULES = r"""
# benchmark; choices; gold; completion; strict; vlmeval; official
MMStar | red/blue | B | B | B+ | B+ | B+
MMStar | red/blue | B | <answer>B</answer> | B+ | B+ | B+
MMStar | red/blue | B | <think>A or B? (A)</think><answer>B</answer> | B+ | B+ | B+
MMStar | red/blue | B | so it is (B). | B+ | B+ | B+
MMStar | red/blue | B | blue | B+ | B+ | B+
MMStar | red/blue | A | The answer is about 5 | - | - | A+
MMStar | red/blue/x/y | C | answer is clearly B, since A is wrong | B- | - | -
MMStar | red/blue | B | I give up | - | - | -
MMMU | 12 m/15 m | B | The area is 15 m | B+ | B+ | -
MMMU | 12 m/15 m | B | The area of it is 15 m | B+ | - | B+
MMMU | 12 m/15 m | B | First (A) then (B) | - | - | B+
MMMU | 12 m/15 m | B | \boxed{B} | B+ | B+ | B+
MMMU | | 8 | 18 | 18- | A+ | 18-
MMMU | | 8 | The result is 8 | 8+ | A+ | 8+
MMMU | | $MgS$ | It is MgS | It is MgS- | - | MgS-
MathVision | 1/2/3/4/5 | B | 2 | B+ | B+ | 2+
MathVision | | \frac{1}{3} | 0.333 | 0.333- | 0.333- | 0.333+
MathVision | | 7 | The answer is 7. | 7+ | 7+ | 7+
MathVision | | 69 | \boxed{69^\circ} | 69^\circ+ | 69^\circ+ | 69+
MathVista | Yes/None | B | B | B+ | B+ | None+
MMMU | x//z | C | not B but C | - | C+ | C+
MMMU | | x | the answer is x, as said | x, as said- | A+ | x, as said+
MMMU-Pro | 1/2/3 | C | A is wrong, therefore C | C+ | - | C+
MathVerse | 40°/60° | B | so B | B+ | B+ | B+
MathVerse | | $$r=7.00$$ | <answer>7</answer> | 7+ | 7- | 7-
"""


def test_rules_on_texts():
    """Every rule set on one table: what it finds ("-" nothing) and whether that is right ("+")."""
    for line in RULES.strip().splitlines()[1:]:
        name, choices, gold, text, *wanted = [c.strip() for c in line.split("|")]
        item = formats.Item(
            "1", "q", gold, [], choices.split("/") if choices else None, benchmark=name, golds=[gold]
        )
        for rule, want in zip(rules.RULES, wanted):
            found, right = rules.grade(item, text, rule)
            assert (found, right) == (want[:-1] or None, want[-1] == "+"), (name, text, rule, found, right)


def test_rules_of_mathvista():
    make = lambda kind, gold, precision=0, choices=None: formats.Item(
        "1",
        "q",
        gold,
        [],
        choices,
        benchmark="MathVista",
        golds=[gold],
        answer_type=kind,
        precision=precision,
    )
    whole, real, choice = (
        make("integer", "14"),
        make("float", "0.8", 1),
        make("text", "A", 0, ["9", "9", "12"]),
    )
    for item, text, wanted in (
        (whole, "14", (1, 1, 1)),
        (whole, "14.7", (0, 0, 1)),
        (whole, "14.0", (1, 0, 1)),
        (whole, "The answer is 14.", (1, 1, 1)),
        (whole, "fourteen", (0, 0, 0)),
        (real, "0.8", (1, 1, 1)),
        (real, "0.84", (1, 0, 1)),
        (real, "0.86", (0, 0, 0)),
        (choice, "B", (1, 0, 1)),
        (choice, "(A)", (1, 1, 1)),
        (choice, "9", (1, 0, 1)),
        (choice, "12", (0, 0, 0)),
        (choice, "none", (0, 0, 0)),
        (make("list", "[1, 2, 3]"), "[1, 2, 3]", (1, 0, 1)),
        (make("list", "[1, 2, 3]"), "[1,2]", (0, 0, 0)),
        (whole, "9" * 3000, (0, 0, 0)),
        (whole, "1e999", (0, 0, 0)),
    ):
        for rule, want in zip(rules.RULES, wanted):
            assert rules.grade(item, text, rule)[1] == bool(want), (item.answer, text[:20], rule)


def test_gold_against_itself_scores_under_strict_rules():
    """The golds that trip scorers (units, labels, degrees, tuples, sentences) are right answers to
    themselves."""
    golds = [
        "Area $=9 \\pi \\mathrm{cm}^{2}$",
        "$$r=7.00$$",
        "$5=s$",
        "N 34° W",
        "118掳T",
        "{8}{5} \\pi",
        "\\sqrt{147}",
        "domain: [-4, 0) and range: (-3, 1]",
        "even",
        "$\\boxed{\\frac{16}{7}}$",
        "69{degrees}",
        "45^2",
        "1:2",
        "8\\sqrt{3}{squareinches}",
        "\\frac{360}7",
        "11 ",
        "(3,-4)",
        "$\\frac{90}{23}^{\\circ}$",
        "8.0",
        "C,D",
        "090^\\circ T",
        "False",
        "24/7",
        "$MgS$",
        "Tampa",
    ]
    for gold in golds:
        item = formats.Item("1", "q", gold, [], benchmark="MathVerse", golds=[gold])
        assert rules.grade(item, f"<think>so</think><answer>{gold}</answer>") == (gold.strip(), True), gold


def test_rules_survive_hostile_text():
    rng, alphabet = random.Random(0), [
        "(",
        "A",
        "B)",
        " ",
        "\n",
        "Answer:",
        "is ",
        "\\boxed{",
        "}",
        "<answer>",
        "9",
        "$",
        "=",
        "I ",
        "（",
        "\u202e",
        "**",
        "</think>",
        "\x00",
        "12,",
        "^",
        "[[",
    ]
    texts = ["".join(rng.choices(alphabet, k=rng.choice((3, 30, 3000)))) for _ in range(60)]
    texts += [
        "(" * 20000,
        "9" * 100000,
        "Answer: " * 5000,
        "is " * 20000,
        "\\boxed{" * 3000,
        "A. " * 30000,
        "",
        "[" * 9000,
    ]
    for name, choices, kind in (
        ("MMStar", ["red", "blue"], "text"),
        ("MMMU", None, "text"),
        ("MMMU", ["1", ""], "text"),
        ("MMMU-Pro", list("ABCDEFGHIJ"), "text"),
        ("MathVision", None, "text"),
        ("MathVision", ["1", "2"], "text"),
        ("MathVista", None, "float"),
        ("MathVerse", None, "text"),
        ("MathVista", None, "list"),
        ("MathVista", ["a", "b"], "text"),
    ):
        item = formats.Item("1", "q", "A", [], choices, benchmark=name, golds=["A"], answer_type=kind)
        for text in texts:
            for rule in rules.RULES:
                started = time.time()
                found, right = rules.grade(item, text, rule)
                assert isinstance(right, bool) and (found or not right), (name, rule)
                assert time.time() - started < 60, (name, rule, text[:40])             # a hang


def test_benchmark_run_resumes_and_ranks_share_it():
    """A stopped run goes on with the rows there are, other rules only judge anew, two ranks write what one
    does, and rows of other settings are refused."""
    with scratch() as folder:
        rows = [{"index": i, "image": base64_png(), "question": "Which?", "A": "red", "B": "blue",
                 "answer": "A", "category": "ab"[i % 2]} for i in range(5)]
        path, out = write_tsv(folder / "MMStar.tsv", rows), folder / "rows.jsonl"
        flags = ["--model", TINY, "--bench", str(path), "--greedy", "--samples", "2", "--max_new_tokens",
                 "12", "--device", "cpu", "--batch", "2", "--out"]

        def run(out, *more):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                evaluation.main(flags + [str(out), *more])
            return printed.getvalue(), sorted(out.read_text().splitlines())

        printed, whole = run(out)
        assert "MMStar, split val, rules strict, prompt own, 5 questions" in printed and len(whole) == 15
        assert "category a" in printed and "parse fail" in printed and not list(folder.glob("*.part*"))
        called, sampler = [], rollout.sample
        rollout.sample = lambda *args, **kwargs: called.append(len(args[1])) or sampler(*args, **kwargs)
        try:
            assert run(out)[1] == whole and not called
            assert "rules official" in run(out, "--rules", "official")[0] and not called
            part = folder / "rows.jsonl.part0"
            kept = out.read_text().splitlines()
            out.unlink()
            part.write_text("\n".join(kept[:4]) + "\n" + kept[4][:30])  # killed while writing
            assert run(out)[1] == whole and 0 < sum(called) < 10
        finally:
            rollout.sample = sampler
        raises(SystemExit, ["other settings", "seed"], run, out, "--seed", "1")
        raises(SystemExit, ["other settings", "dtype"], run, out, "--dtype", "float32")
        write_tsv(path, [{**rows[0], "question": "What?"}, *rows[1:]])
        raises(SystemExit, ["other settings", "file"], run, out)
        write_tsv(path, rows)
        notes = folder / "notes.txt"
        notes.write_text("mine")
        raises(SystemExit, ["notes.txt", "not written by an evaluation"], run, notes)
        assert notes.read_text() == "mine"
        assert {json.loads(r)["rules"] for r in run(out, "--problems", "2", "--rules", "vlmeval")[1]} == {
            "vlmeval", "strict"}                        # the other three are not of this run
        assert len(run(out)[1]) == 15
        two = folder / "two.jsonl"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
                   str(ROOT / "eval.py"), *flags, str(two)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        assert sorted(two.read_text().splitlines()) == whole and done.stdout.count("MMStar, split") == 1


def test_answers_in_the_terminal():
    """--image and --ask, and --show: steps with the checks of attribute.py; control characters do not get
    through."""
    with scratch() as folder:
        p = shapes.make_problem("tiles", 3, "free", "heldout", 0, 1)
        p.images[0].save(folder / "a.png")
        flags = ["--model", TINY, "--device", "cpu", "--max_new_tokens", "60"]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            evaluation.main([*flags, "--image", str(folder / "a.png"), "--instruction", "", "--ask",
                             p.question.replace("<image>", "")])
        lines = printed.getvalue().splitlines()
        assert lines[0].startswith("question  ") and lines[-1].startswith("answer    ")
        net, codec = m.load_model(TINY).eval(), load_codec(TINY)
        t = rollout.sample(net, [p], codec, 1, 60, 0.0)[0][0]
        t.steps = attribute.split_steps(t.ids, codec)
        attribute.Locator(net, codec)([t])
        wanted = [f"{n:3}  {c.same:.2f}  {s.text}"
                  for n, (s, c) in enumerate(zip(t.steps, t.checks), start=1)]
        assert lines[1:-1] == wanted and len(wanted) == 3
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            evaluation.main([*flags, "--data", "tiny:steps=3", "--problems", "2", "--greedy", "--show", "2"])
        assert printed.getvalue().count("question  ") == 2 and "\033" not in printed.getvalue()
        hostile = "<think>\033[2Jred 1 2\nblue \x07 3</think><answer>\u202e4</answer>"
        for colour in (True, False):
            judged = evaluation.judge(p, hostile, True)
            said = terminal.describe(net, codec, p, judged, colour)
            for code in (terminal.RED, terminal.GREEN, terminal.END):
                said = said.replace(code, "")
            assert not any(c in said for c in "\033\x07\u202e") and "(wrong)" in said
        raises(SystemExit, "belong together", evaluation.main, ["--ask", "x"])
        (folder / "b.png").write_bytes(b"no image")
        raises(SystemExit, "--image", evaluation.main,
               [*flags, "--image", str(folder / "b.png"), "--ask", "x"])


def test_localisation_report_of_a_few():
    """`eval.py --localise`: every signal and the confusion of planted kinds, on a few rollouts."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluation.main(
            [
                "--localise",
                "--flawed",
                "12",
                "--planted",
                "24",
                "--data",
                "tiny:steps=4,kinds=tiles",
                "--device",
                "cpu",
            ]
        )
    table = [x.split("|") for x in printed.getvalue().splitlines()]
    exact = {
        x[1].strip(): float(x[2].split("%")[0]) for x in table if len(x) > 3 and x[2].strip().endswith("]")
    }
    assert {"A1, else A2 (default)", "A1 check", "A2 drop", "A3 erosion", "A4 Monte Carlo", "random"} <= set(
        exact
    )
    assert exact["A1 check"] >= 60 and exact["A1 check"] >= exact["random"]
    counts = {
        x[1].strip(): [int(c) for c in x[2:5]]
        for x in table
        if x[1:2] and x[1].strip() in ("eroded", "misread", "reasoning")
    }
    assert sum(map(sum, counts.values())) == 24 and counts["reasoning"][2] > counts["reasoning"][1]


# ------------------------------------------------------------------------------------------------------------
# train.py


def small_run(out, **kwargs):
    """A few real steps of the real loop on few, short problems."""
    defaults = dict(model=TINY, data="tiny:steps=3", out=str(out), max_steps=3, batch=4, group_size=4,
                    max_new_tokens=40, eval_problems=0, lr=1e-3, warmup_steps=1, save_every=100,
                    print_every=0, device="cpu")
    config = train.TrainConfig(**{**defaults, **kwargs})
    with contextlib.redirect_stdout(io.StringIO()):
        train.run(train.Trainer(config))
    return config


def metrics(folder):
    return [json.loads(x) for x in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder):
    return load_file(sorted(Path(folder).glob("checkpoint-*"))[-1] / "model.safetensors")


def same_weights(a, b, tolerance):
    for name in a:
        close(a[name], b[name], tolerance)


def flags_of(config):
    out = []
    for name, value in asdict(config).items():
        out += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return out


def hub_tokenizer(folder):
    """Write hub_folder's tokenizer and the two templates; return the id of every token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: n for n, c in enumerate(alphabet)}
    vocab.update({"\u0120t": 256, "he": 257, "\u0120the": 258})
    merges = [("\u0120", "t"), ("h", "e"), ("\u0120t", "he")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
                "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
                "model_max_length": 131072, "clean_up_tokenization_spaces": False,
                "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in merges))
    template = ("{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
                "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
                "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
                "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
                "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
                "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return tokenizer.get_vocab()


def hub_folder(folder, tied: bool):
    """A folder laid out like Qwen2.5-VL-3B-Instruct (tied) or 7B (not): a flat config, bf16 shards with an
    index, a byte-level tokenizer whose embedding has spare rows, generation config, and a chat template
    beside the tokenizer's own that knows system messages and images. Random weights, reduced width."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    folder.mkdir(parents=True)
    ids = hub_tokenizer(folder)
    end, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    (folder / "generation_config.json").write_text(json.dumps({
        "bos_token_id": pad, "pad_token_id": pad, "do_sample": True, "eos_token_id": [end, pad],
        "repetition_penalty": 1.05, "temperature": 1e-6}))
    (folder / "preprocessor_config.json").write_text(json.dumps({
        **json.loads((Path(TINY) / "preprocessor_config.json").read_text()), "min_pixels": 3136,
        "max_pixels": 12845056, "processor_class": "Qwen2_5_VLProcessor"}))
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": len(ids) + 39}
    vision = {"depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
              "fullatt_block_indexes": [1, 3], "window_size": 112, "patch_size": 14}
    marks = {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
             "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"]}
    torch.manual_seed(int(tied))
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    reference = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config={**shape, "rope_parameters": rope, "bos_token_id": pad, "eos_token_id": end},
        vision_config=vision, tie_word_embeddings=tied, **marks))
    reference.to(torch.bfloat16).save_pretrained(folder / "weights", max_shard_size="100KB")
    for file in (folder / "weights").glob("model*"):
        file.rename(folder / file.name)
    (folder / "config.json").write_text(json.dumps({                    # flat, as the hub has it
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", **shape, **marks,
        "bos_token_id": pad, "eos_token_id": end, "hidden_act": "silu", "max_position_embeddings": 128000,
        "max_window_layers": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 32768,
        "use_sliding_window": False, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "use_cache": True,
        "vision_config": {**vision, "in_chans": 3, "spatial_merge_size": 2, "spatial_patch_size": 14,
                          "temporal_patch_size": 2, "tokens_per_second": 2, "hidden_act": "silu"}}))
    return folder


def test_folders_like_the_hubs_train_and_open_again():
    """Tied and untied: our prompts and greedy answers are those of transformers, a step of IVR-R1 runs on the
    folder, and transformers opens the checkpoint, tokenizer and template with it."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    for tied in (True, False):
        with scratch() as scratched:
            folder = hub_folder(scratched / "Qwen2.5-VL-xB-Instruct", tied)
            assert len(list(folder.glob("model-*.safetensors"))) > 1
            rows = [{"images": ["a.png"], "problem": f"<image>What is the {i}?", "answer": str(i)}
                    for i in range(4)]
            data = write_rows(scratched, rows)
            config = small_run(scratched / "run", model=str(folder), data=str(data), max_steps=1,
                              max_new_tokens=12, batch=2, group_size=2)
            saved = sorted(Path(config.out).glob("checkpoint-*"))[-1]
            for name in ("tokenizer.json", "chat_template.json", "generation_config.json",
                         "preprocessor_config.json", "vocab.json", "merges.txt"):
                assert (saved / name).read_bytes() == (folder / name).read_bytes(), name
            for place in (folder, saved):
                p, codec = reading.load_problems(data)[0], load_codec(str(place))
                assert len(codec.eos_ids) == 2 and "You are a helpful assistant." in rollout.render(p, codec)
                found = rollout.sample(m.load_model(place).eval(), [p], codec, 1, 12, 0.0)[0][0]
                reference, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                    place, dtype=torch.float32, output_loading_info=True)
                assert not any(info.values()), info
                tokenizer = AutoTokenizer.from_pretrained(place)
                processor = Qwen2VLImageProcessorPil.from_pretrained(place)
                image = processor(images=[reading.open_image(p.images[0])], return_tensors="pt")
                text = rollout.render(p, codec).replace(
                    "<|image_pad|>", "<|image_pad|>" * (len(image.pixel_values) // 4))
                inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
                assert inputs.input_ids[0].tolist() == rollout.encode_prompt(p, codec).ids
                marks = (inputs.input_ids == codec.image_token_id).int()
                out = reference.eval().generate(
                    **inputs, pixel_values=image.pixel_values, image_grid_thw=image.image_grid_thw,
                    mm_token_type_ids=marks, max_new_tokens=12, do_sample=False, repetition_penalty=1.0,
                    bad_words_ids=[[i] for i in (codec.logit_mask < 0).nonzero()[:, 0].tolist()])
                assert out[0, inputs.input_ids.shape[1]:].tolist() == found.ids


def test_work_is_dealt_evenly():
    """Against the best of all ways to deal; what costs nothing stays, what has gone away comes back."""
    rng = random.Random(0)
    for _ in range(60):
        world, n = rng.choice((2, 3)), rng.randint(1, 7)
        costs, holders = [rng.choice((0, 1, 5, 9, 40)) for _ in range(n)], [i % world for i in range(n)]
        owners = balance.deal(costs, holders, world)
        longest = lambda owners: max(sum(c for c, o in zip(costs, owners) if o == r) for r in range(world))
        best = min(map(longest, itertools.product(range(world), repeat=n)))
        assert longest(owners) <= 4 / 3 * best and longest(owners) <= max(costs) + sum(costs) / world
        assert all(o == h for o, h, c in zip(owners, holders, costs) if c == 0)
        assert n < world or set(owners) == set(range(world))            # nobody is left without a group
    assert balance.deal([5, 5, 5], [2, 1, 0], 3) == [2, 1, 0]
    assert [balance.work([2, 3], *how) for how in ((False, False), (True, False), (False, True), (True, True))
            ] == [0, 5, 7.5, 7.5]
    t = rollout.Trajectory("problem", [1], [1], [0.0], True, "")
    held = {0: ([0, 2, 4], [9, 8, 1]), 1: ([1, 3, 5], [0, 0, 1])}       # places and costs of two ranks
    group = lambda place: [replace(t, text=str(place))]
    sent = [[(c, r, p) for r, (places, costs) in held.items() for p, c in zip(places, costs)],
            [(2, [replace(t, text="2", problem=None)]), (4, [replace(t, text="4", problem=None)])]]
    for rank, want in ((0, [0]), (1, [1, 2, 3, 4, 5])):
        told, places = iter(sent), held[rank][0]
        asked = SimpleNamespace(rank=rank, world=2, gather=lambda rows: next(told))
        found, groups = balance.exchange(asked, places, [group(p) for p in places], held[rank][1])
        assert found == want
        assert [g[0].text for g in groups] == [str(p) for p in found]
        assert [g[0].problem for g in groups] == ["problem" if p in places else None for p in found]


def test_queue_gives_every_group_once():
    """Own groups first, the largest of them first; then what others have left. Nothing of an earlier update
    stays in the store."""
    store = torch.distributed.HashStore()
    queues = [balance.Queue(SimpleNamespace(rank=rank, world=2, store=store)) for rank in (0, 1)]
    t = rollout.Trajectory("problem", [1, 2], [1, 1], [0.5, 0.25], True, "text", "rectified", advantage=2.0,
                           weights=[1.0, 0.5], parent="parent")
    long = replace(t, ids=list(range(10 ** 6)))                 # more than the store takes at once
    for name in ("0/0", "0/1", "1/0"):
        late = queues[1].take(name, [(1, t), (3, long), (3, long), (5, long)])
        assert [n for n, _ in next(late)] == [3, 3]
        early = list(queues[0].take(name, [(0, t), (2, t), (2, t)]))
        assert [[n for n, _ in rows] for rows in early] == [[2, 2], [0], [5], [1]]
        assert list(late) == []
        kept = replace(t, problem=None, parent=None, text="")
        assert early[1:] == [[(0, kept)], [(5, replace(kept, ids=long.ids))], [(1, kept)]]
    for rank, queue in enumerate(queues):
        assert [n for n, _ in next(queue.take("last", [(rank, t)]))] == [rank]
    assert not any(store.check([f"circle 0/{key}"]) for key in ("1/0 list 2", "1/0 group 3 0", "1/0 taken 1"))
    assert balance.Queue(SimpleNamespace(rank=9, world=11, store=store)).ranks == 3


def same_metrics(one, two):
    for a, b in zip(metrics(one), metrics(two), strict=True):
        for key in a:
            if isinstance(a[key], list):
                assert a[key] == b[key], key
            elif key != "seconds":
                assert abs(a[key] - b[key]) <= 1e-4 * max(1, abs(a[key])), (key, a[key], b[key])


def test_sharded_weights_train_alike():
    """--shard all (FSDP2) on two ranks against one process: in passes of few rows, so that the ranks have
    different numbers of them, with activations made again. One process goes on from its checkpoint."""
    with scratch() as folder:
        kwargs = dict(max_new_tokens=60, micro_rows=2, lr=1e-4, remat=True, data="tiny:steps=5")
        one = small_run(folder / "one", **kwargs)
        many = replace(one, out=str(folder / "many"), shard="all", save_every=1, keep=3)
        done = torchrun(folder, "", *flags_of(many))
        assert done.returncode == 0, done.stderr[-3000:]
        same_metrics(folder / "one", folder / "many")
        same_weights(weights_of(folder / "one"), weights_of(folder / "many"), 1e-3)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train.main(["--resume", f"{folder}/many/checkpoint-000001", "--shard", "optimizer"])
        same_metrics(folder / "one", folder / "many")
        same_weights(weights_of(folder / "one"), weights_of(folder / "many"), 1e-3)
        raises(SystemExit, ["--shard all", "torchrun"], train.main,
               flags_of(replace(one, shard="all", out="")))


def test_two_ranks_equal_one():
    """torchrun with two gloo processes against one process, RL and supervised: losses, norms and weights."""
    for kwargs in (dict(updates_per_batch=2, micro_rows=5, beta=0.1, lr=1e-4, max_new_tokens=80,
                        data="tiny:steps=7,kinds=tiles+bars"),
                   dict(stage="sft", max_new_tokens=60)):
        with scratch() as folder:
            config = small_run(folder / "one", **kwargs)
            two = replace(config, out=str(folder / "two"))
            done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                            "--nproc_per_node", "2", str(ROOT / "train.py"), *flags_of(two)],
                           capture_output=True, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
            assert done.returncode == 0, done.stderr[-3000:]
            same_metrics(folder / "one", folder / "two")
            assert any(a["grad_norm"] > 0 for a in metrics(folder / "one"))
            assert "stage" in kwargs or any(0 < a["repaired"] < 4 for a in metrics(folder / "one"))
            same_weights(weights_of(folder / "one"), weights_of(folder / "two"), 1e-3)


def test_ranks_that_take_others_groups_train_alike():
    """--balance queue with one rank late against one process: two updates a batch, prompts of others."""
    with scratch() as folder:
        kwargs = dict(updates_per_batch=2, micro_rows=3, beta=0.1, lr=1e-4, max_new_tokens=80,
                      data="tiny:steps=7,kinds=tiles+bars")
        one = small_run(folder / "one", **kwargs)
        late = ("import time\nbackward = train.Trainer.backward\ndef late(*given):\n"
                "    time.sleep(0.1 * rank)\n    return backward(*given)\ntrain.Trainer.backward = late")
        done = torchrun(folder, late, *flags_of(replace(one, out=str(folder / "two"), balance="queue")))
        assert done.returncode == 0, done.stderr[-3000:]
        same_metrics(folder / "one", folder / "two")
        same_weights(weights_of(folder / "one"), weights_of(folder / "two"), 1e-3)
        raises(ValueError, ["--balance queue", "--shard all"],
               replace(one, balance="queue", shard="all").validate, 2)


def test_ivr_without_repairs_is_grpo():
    """No rectified trajectory and no step credit: the same losses and weights as --algo grpo, to 1e-6."""
    with scratch() as folder:
        small_run(folder / "a", algo="ivr", rectify_below=-1.0, credit="rollout", data="tiny:steps=4")
        small_run(folder / "b", algo="grpo", data="tiny:steps=4")
        for a, b in zip(metrics(folder / "a"), metrics(folder / "b"), strict=True):
            close(a["loss"], b["loss"], 1e-6), close(a["grad_norm"], b["grad_norm"], 1e-6)
        same_weights(weights_of(folder / "a"), weights_of(folder / "b"), 1e-6)


def ivr_trainer(folder, **kwargs):
    config = train.TrainConfig(**{**dict(model=TINY, data="tiny:steps=9,kinds=tiles+bars", batch=6,
                                         group_size=4, max_new_tokens=110, device="cpu", eval_problems=0,
                                         out=str(folder)),
                                  **kwargs})
    trainer = train.Trainer(config)
    problems = trainer.draw(0)
    prompts = [rollout.encode_prompt(p, trainer.codec) for p in problems]
    groups = trainer.roll_out(problems, prompts)
    trainer.score(groups)
    return trainer, groups, prompts


def test_rectified_groups_and_their_credit():
    """The group keeps its size and the parent; y' is credited whole; in wrong rollouts only the tokens at
    fault are; what has no weight has no gradient."""
    with scratch() as folder:
        trainer, before, prompts = ivr_trainer(folder)
        chosen = trainer.to_rectify(before, 0.0)
        locate = trainer.localise(before, chosen)
        groups, repairs = trainer.rectify(before, chosen, locate)
        trainer.assign_advantages(groups)
        trainer.assign_credit(groups)
        done = [r for r in repairs if r.outcome == "repaired"]
        assert len(done) >= 2 and all(len(g) == 4 for g in groups) and all(len(g) == 4 for g in before)
        for r in done:
            group = next(g for g in groups if any(t is r.chain for t in g))
            assert any(t is r.parent for t in group) and r.chain.weights == [1.0] * len(r.chain.ids)
            assert r.chain.rewards["accuracy"] == 1 and r.chain.advantage > 0 > r.parent.advantage
            rewards = [t.rewards["total"] for t in group]
            close(r.chain.advantage, r.chain.rewards["total"] - sum(rewards) / 4, 1e-6)
            assert r.chain.parent is r.parent and r.chain.kept == r.changed
            doubted = [(s, c) for s, c in zip(r.parent.steps, r.parent.checks) if c.same < 0.5]
            on = {min(s.start + c.token, s.stop - 1) for s, c in doubted}
            assert doubted and r.parent.weights == [float(n in on) for n in range(len(r.parent.ids))]
        trainer.config.credit = "step"
        trainer.assign_credit(groups)
        for r in done:
            on = {n for s, c in zip(r.parent.steps, r.parent.checks) if c.same < 0.5
                  for n in range(s.start, s.stop)}
            assert r.parent.weights == [float(n in on) for n in range(len(r.parent.ids))]
        trainer.config.mask_prefix = True
        trainer.assign_credit(groups)
        for r in done:
            assert r.chain.weights == [float(n >= r.changed) for n in range(len(r.chain.ids))]
        parents = [r.parent for r in repairs]
        assert len({id(t) for t in parents}) == len(parents)
        for r in repairs:                               # the one that needs the fewest looks
            flawed = attribute.flawed(next(g for g in before if any(t is r.parent for t in g)))
            doubts = lambda t: sum(c.same < 0.5 for c in t.checks)
            assert doubts(r.parent) == min(map(doubts, flawed))


def test_degenerate_groups():
    """All right, all wrong, all cut off: no gradient, nothing that is not finite; a group of one is
    refused."""
    raises(ValueError, "--group_size", train.TrainConfig(group_size=1).validate, 1)
    for right, finished in ((1.0, True), (0.0, True), (0.0, False)):
        with scratch() as folder:
            trainer, groups, prompts = ivr_trainer(folder)
            for t in (t for g in groups for t in g):
                t.rewards = {"accuracy": right, "format": right, "total": right}
                t.finished = finished
            before = [p.clone() for p in trainer.model.parameters()]
            assert right == 1.0 or len(trainer.to_rectify(groups, 0.0)) == len(groups)
            if not finished:                                # neither located nor repaired, and nobody pays
                locate = trainer.localise(groups, [0])
                same, repairs = trainer.rectify(groups, [0], locate)
                assert not repairs and locate.tokens == 0 and same == groups
            trainer.assign_advantages(groups)
            trainer.assign_credit(groups)
            stats = trainer.update(groups, prompts, 0.0)
            assert all(t.advantage == 0 for g in groups for t in g) and stats["grad_norm"] == 0
            assert all(v is None or math.isfinite(v) for v in stats.values()) and stats["loss"] == 0
            assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
            figures = trainer.describe(groups)
            assert figures["all_right"] == right and figures["all_wrong"] == 1 - right


def test_entropy_is_that_of_the_policys_own_tokens():
    """Rectified rows have another context: their tokens are in neither sum."""
    with scratch() as folder:
        trainer, groups, prompts = ivr_trainer(folder)
        locate = trainer.localise(groups, trainer.to_rectify(groups, 0.0))
        groups, repairs = trainer.rectify(groups, trainer.to_rectify(groups, 0.0), locate)
        assert any(r.outcome == "repaired" for r in repairs)
        trainer.assign_advantages(groups)
        trainer.assign_credit(groups)
        own, used = 0.0, 0
        for n, group in enumerate(groups):
            for t in (t for t in group if t.advantage and t.provenance == "policy"):
                _, spread, _ = rollout.completion_logps(trainer.model, [prompts[n]], [0], [t.ids],
                                                        trainer.codec, entropy=True)
                on = [w > 0 for w in (t.weights or t.sampled)]
                own, used = own + sum(x for x, o in zip(spread[0].tolist(), on) if o), used + sum(on)
        close(trainer.update(groups, prompts, 0.0)["entropy"], own / used, 1e-4)


def test_which_groups_are_repaired():
    """Two wrong ones, few right ones; over the last `anneal` of the training an ever smaller share."""
    with scratch() as folder:
        trainer, *_ = ivr_trainer(folder, rectify_below=0.25, batch=2)
        trainer.places = range(400)
        group = lambda *right: [rollout.Trajectory(None, [1], [1], [0.0], True, "",
                                                   rewards={"accuracy": float(r)}) for r in right]
        groups = [group(0, 0, 0, 0), group(1, 0, 0, 0), group(1, 1, 0, 0), group(1, 1, 1, 1)]
        assert trainer.to_rectify(groups, 0.0) == trainer.to_rectify(groups, 0.6) == [0, 1]
        trainer.config.rectify_below = 1.0
        assert trainer.to_rectify([*groups, group(1, 1, 1, 0)], 0.0) == [0, 1, 2]
        many = [group(0, 0, 0, 0)] * 400
        for progress, share in ((0.6, 1), (0.7, 0.75), (0.9, 0.25), (1.0, 0), (1.2, 0)):
            assert abs(len(trainer.to_rectify(many, progress)) / 400 - share) < 0.08
        trainer.config.anneal = 0.0
        assert len(trainer.to_rectify(many, 0.99)) == 400
        trainer.config.max_tokens, trainer.tokens = 1000, 900
        assert trainer.progress() == 0.9


def test_tokens_of_every_kind_are_counted():
    with scratch() as folder:
        trainer, groups, _ = ivr_trainer(folder)
        trainer.describe(groups)
        rolled_out = sum(len(t.ids) for g in groups for t in g)
        assert trainer.tokens == rolled_out
        chosen = trainer.to_rectify(groups, 0.0)
        locate = trainer.localise(groups, chosen)
        claims = {(t.problem.id, s.text) for n, g in enumerate(groups)
                  if n in chosen or any(t.rewards["accuracy"] for t in g)
                  for t in attribute.flawed(g) for s in t.steps}
        assert locate.tokens == len(claims) > 0
        _, repairs = trainer.rectify(groups, chosen, locate)
        figures = trainer.describe_repairs(repairs, locate)
        assert figures["repair_tokens"] == locate.tokens + sum(r.tokens for r in repairs) > len(claims)
        assert trainer.tokens == rolled_out + figures["repair_tokens"]
        assert figures["repair_tokens"] < 0.6 * rolled_out


def test_stepgrpo_is_r1_vls():
    """Rewards with StepRAR and StepRVR, standardised advantages, a mean over each sequence, KL 0.04 by
    preset."""
    with scratch() as folder, contextlib.redirect_stdout(io.StringIO()):
        train.main(["--algo", "stepgrpo", "--data", "tiny:steps=3", "--batch", "2", "--group_size", "4",
                    "--max_steps", "1", "--eval_problems", "0", "--device", "cpu", "--out",
                    str(folder / "run")])
        saved = json.loads((folder / "run" / "config.json").read_text())
        assert saved["use_std"] is True and saved["beta"] == 0.04
        train.main(["--algo", "stepgrpo", "--beta", "0", "--data", "tiny:steps=3", "--batch", "2",
                    "--max_steps", "1", "--eval_problems", "0", "--device", "cpu", "--out",
                    str(folder / "free")])
        assert json.loads((folder / "free" / "config.json").read_text())["beta"] == 0.0
        trainer, groups, _ = ivr_trainer(folder, algo="stepgrpo", use_std=True, data="tiny:steps=3")
        trainer.assign_advantages(groups)
        trainer.assign_credit(groups)
        for group in groups:
            rewards = [step_reward_parts(t.text, t.problem.answer, None, t.finished,
                                         t.problem.key_steps)["total"] for t in group]
            mean, std = np.mean(rewards), np.std(rewards, ddof=1)
            for t, reward in zip(group, rewards):
                assert t.rewards["total"] == reward
                close(t.advantage, (reward - mean) / (std + 1e-4), 1e-4)
                close(sum(t.weights), trainer.config.max_new_tokens, 1e-3)  # so each sequence weighs the same


def test_resumed_run_equals_uninterrupted():
    with scratch() as folder:
        longer = dict(max_steps=4, data="tiny:steps=9,kinds=tiles+bars", max_new_tokens=100, lr=1e-4)
        whole = small_run(folder / "whole", **longer)
        assert any(r["repaired"] for r in metrics(folder / "whole")[2:])
        small_run(folder / "cut", save_every=2, **longer)
        for late in ("checkpoint-000004",):
            for f in (folder / "cut" / late).iterdir():
                f.unlink()
            (folder / "cut" / late).rmdir()
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(["--resume", str(folder / "cut")])
        assert [r["step"] for r in metrics(folder / "cut")] == [1, 2, 3, 4]
        same_weights(weights_of(folder / "whole"), weights_of(folder / "cut"), 0)
        for a, b in zip(metrics(folder / "whole"), metrics(folder / "cut"), strict=True):
            assert ({k: v for k, v in a.items() if k != "seconds"}
                    == {k: v for k, v in b.items() if k != "seconds"})
        assert json.loads((folder / "cut" / "config.json").read_text())["lr"] == whole.lr


def started(out, *flags, **kwargs):
    """A small run of train.py in a process of its own."""
    defaults = dict(model=TINY, data="tiny:steps=3", stage="sft", out=str(out), max_steps=4, batch=4,
                    max_new_tokens=60, eval_problems=0, lr=1e-3, warmup_steps=1, save_every=1, keep=3,
                    device="cpu")
    words = [w for k, v in {**defaults, **kwargs}.items() for w in (f"--{k}", str(v))]
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words, *flags], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def await_file(process, pattern, folder, seconds=120):
    """Until a file of that pattern is there (or the process has ended)."""
    for _ in range(seconds * 500):
        if list(folder.glob(pattern)) or process.poll() is not None:
            return
        time.sleep(0.002)


def test_killed_runs_of_every_kind_go_on_bit_for_bit():
    """sft, grpo and ivr on one and two ranks, killed at random moments and while a checkpoint is written."""
    done = subprocess.run([sys.executable, str(ROOT / "experiments" / "kills.py")], cwd=ROOT, text=True,
                          capture_output=True, timeout=600)
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    assert done.returncode == 0 and len(rows) == 6, done.stdout + done.stderr[-3000:]
    assert all(row[-1] == "nothing |" for row in rows), done.stdout


def test_rows_cut_off_by_a_kill_are_made_again():
    with scratch() as folder:
        out = folder / "run"
        small_run(out, stage="sft", max_new_tokens=60, save_every=1)
        whole = (out / "metrics.jsonl").read_text()
        (out / "metrics.jsonl").write_text(whole + '{"step": 4, "lo')
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(["--resume", str(out), "--max_steps", "3"])
        assert (out / "metrics.jsonl").read_text() == whole


def test_stopped_run_goes_on_bit_for_bit():
    """SIGTERM in the middle of the run: what is resumed ends with the rows and weights of an uninterrupted
    run."""
    with scratch() as folder:
        whole, cut = folder / "whole", folder / "cut"
        other, stopped = started(whole), started(cut)
        await_file(stopped, "checkpoint-000001", cut)
        stopped.send_signal(signal.SIGTERM)
        said = stopped.communicate(timeout=200)[0]
        assert other.wait(timeout=200) == 0, other.stdout.read()[-2000:]
        if stopped.returncode:                                              # else it was done already
            assert stopped.returncode == 143 and f"--resume {cut}" in said, said[-2000:]
            resumed = started(cut, "--resume", str(cut))
            assert resumed.wait(timeout=200) == 0, resumed.stdout.read()[-2000:]
        assert not kills.differences(whole, cut)


def test_damaged_checkpoints_are_passed_over():
    with scratch() as folder:
        out = folder / "run"
        small_run(out, stage="sft", max_new_tokens=60, save_every=1, keep=3)
        last = sorted(out.glob("checkpoint-*"))[-1]
        whole = (last / "model.safetensors").read_bytes()
        for broken in (whole[:-1], whole[:5000] + bytes([whole[5000] ^ 4]) + whole[5001:]):
            (last / "model.safetensors").write_bytes(broken)
            assert "model.safetensors" in files.damage(last)
            with contextlib.redirect_stderr(io.StringIO()) as warned:
                assert files.intact(sorted(out.glob("checkpoint-*"))).name == "checkpoint-000002"
            assert "model.safetensors" in warned.getvalue()
        (last / "optimizer-00001-of-00001.safetensors").unlink()
        (last / "model.safetensors").write_bytes(whole)
        assert "optimizer-00001-of-00001.safetensors is missing" in files.damage(last)
        (last / "trainer.json").write_text("{")
        raises(ValueError, ["no whole", "checkpoint-000003"], files.intact, [last])
        raises(SystemExit, "no whole", train.main, ["--resume", str(last)])


def test_going_on_from_an_earlier_checkpoint():
    """What was later is laid aside, and pruning never takes the checkpoint just written."""
    with scratch() as folder:
        out = folder / "run"
        small_run(out, stage="sft", max_new_tokens=60, save_every=1, keep=4)
        assert [c.name[-1] for c in sorted(out.glob("checkpoint-*"))] == ["0", "1", "2", "3"]
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(["--resume", str(out / "checkpoint-000001"), "--max_steps", "2", "--keep", "1"])
        assert {f.name for f in out.glob("*checkpoint*")} == {
            "checkpoint-000002", "abandoned-checkpoint-000002", "abandoned-checkpoint-000003"}
        assert [r["step"] for r in metrics(out)] == [1, 2] and not files.damage(out / "checkpoint-000002")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = (out / "config.json").read_text()
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        try:
            raises(OSError, [], files.rewrite, out / "config.json", before)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (out / "config.json").read_text() == before
        net = random_model().to(torch.bfloat16)                 # from bfloat16 to float32: the masters go on
        config, ranks = train.TrainConfig(), Ranks()
        first = Optimizer(net, config, ranks)
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        first.collect()
        first.step(1e-3)
        save_file(first.state(), folder / "optimizer-x.safetensors")
        wide = random_model()
        again = Optimizer(wide, config, ranks)
        again.load([folder / "optimizer-x.safetensors"])
        assert all(torch.equal(a, b) for a, b in zip(first.masters.values(), wide.parameters()))
        state = {k: v for k, v in first.state().items() if not k.startswith(first.names[3])}
        save_file(state, folder / "optimizer-x.safetensors")
        raises(ValueError, ["no optimiser state", first.names[3]], again.load,
               [folder / "optimizer-x.safetensors"])


def test_full_disk_leaves_the_last_checkpoint():
    """A file-size limit stands for the full disk."""
    with scratch() as folder:
        config = train.TrainConfig(model=TINY, out=str(folder), device="cpu", eval_problems=0)
        trainer = train.Trainer(config)
        trainer.save()
        good = folder / "checkpoint-000000"
        before, limits = files.checksum(good / "model.safetensors"), resource.getrlimit(resource.RLIMIT_FSIZE)
        trainer.step = 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        try:
            raises(OSError, ["checkpoint-000001", "could not be written"], trainer.save)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [f.name for f in folder.iterdir()] == [good.name] and not files.damage(good)
        assert files.checksum(good / "model.safetensors") == before


def test_steps_without_a_finite_gradient_are_skipped_and_end_the_run():
    with scratch() as folder:
        config = train.TrainConfig(model=TINY, data="tiny:steps=2", stage="sft", out=str(folder), batch=2,
                                   max_steps=9, eval_problems=0, device="cpu", max_bad_steps=3,
                                   max_new_tokens=60)
        trainer = train.Trainer(config)
        weights = [p.clone() for p in trainer.model.parameters()]
        collect = trainer.optimizer.collect

        def poisoned():
            collect()
            next(p for p in trainer.optimizer.params if p.grad is not None).grad.fill_(math.nan)

        trainer.optimizer.collect = poisoned
        with contextlib.redirect_stdout(io.StringIO()) as said:
            raises(train.Diverged, ["3 steps", "not-finite.json"], train.run, trainer)
        assert said.getvalue().count("was skipped") == 3
        assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters()))
        saved = json.loads((folder / "not-finite.json").read_text())
        assert saved["steps"] == [1, 2, 3] and len(set(saved["problems"])) == 6


def test_collapse_is_warned_of():
    first = {"finished": 1.0, "format": 0.9, "entropy": 0.3, "accuracy": 0.2, "all_wrong": 0.4, "mixed": 0.6}
    assert not log.warnings_of(first, first)
    for change, kind in (({"finished": 0.4}, "cut off"), ({"format": 0.3}, "format"),
                         ({"entropy": 0.001}, "entropy")):
        found = log.warnings_of({**first, **change}, first)
        assert list(found) == [kind] and "--" in found[kind]
    wrong = {**first, "all_wrong": 1.0, "mixed": 0.0, "entropy": None}      # no token was trained on
    assert list(log.warnings_of(wrong, wrong)) == ["all wrong"] and not log.warnings_of(wrong, first)
    assert not log.warnings_of({**first, "entropy": 0.001, "accuracy": 0.95}, first)


def torchrun(folder, script, *flags, restarts=0):
    """Two gloo processes of a script that changes train.py before it runs it."""
    file = folder / "script.py"
    file.write_text(f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n"
                    f"rank, count = int(os.environ['RANK']), int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
                    f"step = train.Trainer.rl_step\n{script}\ntrain.main()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "--max-restarts", str(restarts), str(file), "--model", TINY, "--data", "tiny:steps=2",
               "--batch", "4", "--group_size", "2", "--max_new_tokens", "30", "--eval_problems", "0",
               "--device", "cpu",
               "--save_every", "1", "--max_steps", "3", "--print_every", "0", "--lr", "1e-4", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_torchrun_restarts_from_the_last_checkpoint():
    """A rank killed in the middle of a step: the job comes back and ends as if nothing had been."""
    with scratch() as folder:
        kill = ("def rl_step(self):\n    if self.step == 2 and rank == 1 and count == 0:\n"
                "        os.kill(os.getpid(), signal.SIGKILL)\n    return step(self)\n"
                "train.Trainer.rl_step = rl_step")
        done = torchrun(folder, kill, "--out", str(folder / "run"), restarts=1)
        assert done.returncode == 0, done.stderr[-3000:]
        assert [r["step"] for r in metrics(folder / "run")] == [1, 2, 3]
        one = small_run(folder / "one", data="tiny:steps=2", group_size=2, max_new_tokens=30, lr=1e-4,
                        warmup_steps=5)
        for a, b in zip(metrics(folder / "run"), metrics(one.out), strict=True):
            close(a["loss"], b["loss"], 1e-5), close(a["generated_tokens"], b["generated_tokens"], 0)


def test_a_rank_that_raises_ends_the_job():
    with scratch() as folder:
        fail = ("def rl_step(self):\n    if self.step == 1 and rank == 1:\n"
                "        raise ValueError('a fault on rank one')\n    return step(self)\n"
                "train.Trainer.rl_step = rl_step")
        begun = time.time()
        done = torchrun(folder, fail, "--out", str(folder / "run"))
        last = (folder / "run" / "metrics.jsonl").stat().st_mtime
        assert done.returncode != 0 and "a fault on rank one" in done.stderr and "Traceback" in done.stderr
        assert time.time() - last < 300 and last > begun                   # not at a timeout of half an hour


def test_micro_batches_change_nothing():
    with scratch() as folder:
        small_run(folder / "a", micro_rows=1000)
        small_run(folder / "b", micro_rows=3)
        for a, b in zip(metrics(folder / "a"), metrics(folder / "b"), strict=True):
            close(a["loss"], b["loss"], 1e-5), close(a["grad_norm"], b["grad_norm"], 1e-4)
        same_weights(weights_of(folder / "a"), weights_of(folder / "b"), 1e-3)


def test_first_update_is_the_plain_policy_gradient():
    """The gradient of a whole step against autograd on uncached log-probs: -sum A_i log pi(y_i) /
    (B G L_max)."""
    with scratch() as folder:
        config = train.TrainConfig(model=TINY, data="tiny:steps=3", batch=3, group_size=3, max_new_tokens=24,
                                   device="cpu", eval_problems=0, max_grad_norm=1e9, out=str(folder))
        trainer = train.Trainer(config)
        trainer.model = random_model(spread=0.2)
        trainer.optimizer = Optimizer(trainer.model, config, Ranks())
        problems = trainer.draw(0)
        prompts = [rollout.encode_prompt(p, trainer.codec) for p in problems]
        groups = trainer.roll_out(problems, prompts)
        for i, t in enumerate(t for g in groups for t in g):
            t.advantage = math.sin(i + 1)
        net, seen = trainer.model, {}
        trainer.optimizer.step = lambda lr: seen.update(
            {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}) or 0.0
        stats = trainer.update(groups, prompts, 0.0)
        assert abs(stats["ratio"] - 1) < 1e-4 and stats["clip_fraction"] == 0 and abs(stats["kl_old"]) < 1e-6
        net.zero_grad()
        for i, group in enumerate(groups):
            for t in group:
                row = torch.tensor([prompts[i].ids + t.ids])
                logits = (net(row, None, prompts[i].pixel_values, torch.tensor(prompts[i].grids))[0]
                          + trainer.codec.logit_mask)
                at = torch.arange(len(t.ids))
                logps = logits.log_softmax(-1)[len(prompts[i].ids) - 1 + at, torch.tensor(t.ids)]
                (-t.advantage * logps.sum() / (9 * 24)).backward()
        for name, p in net.named_parameters():
            if p.grad is not None:
                close(seen[name], p.grad, 1e-4 * max(1.0, p.grad.abs().max().item()))


def test_forced_tokens_and_weights_carry_no_gradient():
    with scratch() as folder:
        config = train.TrainConfig(model=TINY, batch=2, group_size=2, max_new_tokens=20, device="cpu",
                                   eval_problems=0, out=str(folder))
        trainer = train.Trainer(config)
        problems = trainer.draw(0)
        prompts = [rollout.encode_prompt(p, trainer.codec) for p in problems]
        t = trainer.roll_out(problems, prompts)[0][0]
        t.advantage = 1.0
        losses = []
        for sampled, weights in (([0] * len(t.ids), None), (t.sampled, [0.0] * len(t.ids)),
                                 (t.sampled, None)):
            t.sampled, t.weights = sampled, weights
            trainer.model.zero_grad()
            trainer.backward([(0, t)], prompts, 1.0)
            losses.append(sum(p.grad.abs().sum().item()
                              for p in trainer.model.parameters() if p.grad is not None))
        assert losses[0] == 0 and losses[1] == 0 and losses[2] > 0


def test_bf16_master_weights():
    """In bfloat16 a small update would be lost in rounding; the fp32 masters keep it."""
    config = train.TrainConfig(lr=1e-6, weight_decay=0.0, max_grad_norm=1e9)
    net = random_model().to(torch.bfloat16)
    optimizer = Optimizer(net, config, Ranks())
    start = [x.clone() for x in optimizer.masters.values()]
    for _ in range(3):
        for part in (1.0, 2 ** -9):                     # two micro-batches; their sum is no bfloat16 number
            for p in net.parameters():
                p.grad = torch.full_like(p, part)
            optimizer.collect()
        assert all(p.grad is None for p in net.parameters())
        assert all((x == 1 + 2 ** -9).all() for x in optimizer.sums)
        optimizer.step(1e-6)
    for a, b, p in zip(start, optimizer.masters.values(), net.parameters()):
        close(b, a - 3e-6, 1e-6)
        assert torch.equal(p, b.to(torch.bfloat16))


def test_optimizer_state_is_sharded():
    """Three ranks, one after the other: each parameter has one owner, shares are even, and a rank takes its
    share out of the files of one rank or of three."""
    net, config = random_model(), train.TrainConfig(lr=1e-3)
    one = Optimizer(net, config, Ranks())
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    one.step(1e-3)
    shards = [Optimizer(net, config, Ranks(r, 3)) for r in range(3)]
    owned = [sorted(s.masters) for s in shards]
    assert sorted(sum(owned, [])) == list(range(len(one.params)))
    sizes = [sum(m.numel() for m in s.masters.values()) for s in shards]
    assert max(sizes) - min(sizes) <= max(p.numel() for p in net.parameters())
    with scratch() as folder:
        whole = {k: v.clone() for k, v in one.state().items()}
        save_file(whole, folder / "optimizer-00001-of-00001.safetensors")
        for r, shard in enumerate(shards):
            shard.load(sorted(folder.glob("*")))
        for file in folder.glob("*"):
            file.unlink()
        for r, shard in enumerate(shards):
            save_file({k: v.clone() for k, v in shard.state().items()}, folder / f"optimizer-{r}.safetensors")
        again = Optimizer(net, config, Ranks())
        again.load(sorted(folder.glob("*")))
        found, wanted = again.state(), one.state()
        assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


def test_gradient_that_is_not_finite_is_skipped():
    net = random_model()
    optimizer = Optimizer(net, train.TrainConfig(), Ranks())
    before = [p.clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.full_like(p, torch.nan)
    assert math.isnan(optimizer.step(1e-2))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_learning_rate():
    config = train.TrainConfig(lr=1.0, warmup_steps=4, max_steps=10, lr_end=0.0)
    rates = [learning_rate(config, s, s / 10) for s in range(10)]
    assert rates[0] == 0.25 and rates == [min(1, (s + 1) / 4) * (1 - s / 10) for s in range(10)]
    assert learning_rate(replace(config, lr_end=1.0), 9, 0.9) == 1.0


def test_supervised_stage_learns_from_a_file():
    """A JSONL of demonstrations: the loss falls, and the instruction reaches the prompt."""
    with scratch() as folder:
        rows = [{"images": ["a.png"], "problem": "<image>What colour?", "answer": "black",
                 "demonstration": "<think>black 1</think><answer>black</answer>"}] * 4
        path = write_rows(folder, rows)
        small_run(folder / "run", stage="sft", data=str(path), max_steps=12, lr=3e-3)
        losses = [r["loss"] for r in metrics(folder / "run")]
        assert losses[-1] < 0.3 * losses[0], losses
        path.write_text(json.dumps({k: v for k, v in rows[0].items() if k != "demonstration"}))
        raises(reading.DataError, ["demonstration"], small_run, folder / "other", stage="sft", data=str(path))


def test_bad_input_ends_with_one_line():
    """Each as a user would meet it: exit code not 0, one line on stderr, no traceback, nothing written."""
    with scratch() as folder:
        bad = write_rows(folder, [{"images": ["none.png"], "problem": "x", "answer": "1"}])
        other = folder / "llama"
        other.mkdir()
        (other / "config.json").write_text('{"model_type": "llama"}')
        (folder / "used").mkdir()
        (folder / "used" / "metrics.jsonl").write_text("{}\n")
        cases = [(["--data", str(bad)], ["data.jsonl:1", "images", "none.png"]),
                 (["--batches", "3"], ["--batches"]),
                 (["--model", str(other)], ["llama", "model_type"]), (["--batch", "0"], ["--batch"]),
                 (["--stage", "ppo"], ["--stage"]), (["--data", "tiny:steps=99"], ["steps"]),
                 (["--dtype", "int4"], ["--dtype"]), (["--group_size", "1"], ["--group_size"]),
                 (["--resume", str(folder)], ["--resume", "no checkpoint"]),
                 (["--out", str(folder / "used")], ["--out", "holds a run"]),
                 (["--model", "./nowhere"], ["./nowhere"]),
                 (["--max_prompt_tokens", "4"], ["--max_prompt_tokens"]), (["--device", "gpu"], ["--device"]),
                 (["--save_every", "-1"], ["--save_every"])]
        for flags, words in cases:
            out = [] if "--out" in flags or "--resume" in flags else ["--out", str(folder / "new")]
            with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
                try:
                    train.main([*out, *flags])
                    code = 0
                except SystemExit as e:
                    code = e.code
            message = code if isinstance(code, str) else err.getvalue()
            assert code not in (0, None) and all(w in message for w in words), (flags, message)
            assert not (folder / "new").exists(), flags


def test_the_readme_run_improves():
    """The shipped model and the default flags, cut short: the log is written, figures are sane, a sample is
    shown."""
    with scratch() as folder, contextlib.redirect_stdout(io.StringIO()) as printed:
        train.main(["--out", str(folder / "run"), "--max_steps", "2", "--batch", "8", "--eval_problems", "12",
                    "--print_every", "1", "--device", "cpu"])
        text = printed.getvalue()
        for words in ("held-out before: greedy", "held-out after:  greedy", "avg@4", "step 2/2",
                      "question", "steps "):
            assert words in text, words
        figures = json.loads((folder / "run" / "heldout.json").read_text())
        assert figures["before"]["n"] == figures["after"]["n"] == 12
        assert 0.2 < figures["before"]["greedy"]["mean"] > figures["before"]["avg@4"]["mean"] - 0.2
        assert [r["step"] for r in metrics(folder / "run")] == [1, 2]


# ------------------------------------------------------------------------------------------------------------
# viewer/


def traced_run(folder):
    """A small run with its trace, and one more group whose every text is hostile."""
    out = folder / "run"
    small_run(out, data="tiny:steps=5,kinds=tiles+bars", max_steps=2, batch=4, group_size=4,
              max_new_tokens=80, trace_every=1)
    assert len((out / "groups.jsonl").read_text().splitlines()) == 2
    hostile = "</script><img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"
    row = json.loads((out / "groups.jsonl").read_text().splitlines()[0])
    row.update(step=3, question=hostile, gold=hostile, task=hostile, id=hostile,
               images=["javascript:alert(1)", hostile])
    for r in row["rollouts"]:
        r.update(tokens=[hostile] * len(r["tokens"]), answer=hostile, provenance=hostile)
    with open(out / "groups.jsonl", "a") as f:
        f.write(json.dumps(row) + "\n")
    trace.write(out)
    return out, hostile


def test_large_products_are_those_of_linear():
    """Above the size at which another library multiplies, with and without bias, whatever the strides; and
    gradients flow."""
    from runtime.linear import LARGE, linear
    rng = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=rng) for size in ((4, 16, 512), (1024, 512), (1024,)))
    turned = torch.randn(512, 1024, generator=rng).t()
    assert x.numel() * len(weight) >= LARGE
    for given in (x, x.transpose(0, 1), x[0].repeat(64, 1), x[:, :1].expand(-1, 16, -1)):
        for w, b in ((weight, bias), (weight, None), (turned, bias)):
            want = given.double() @ w.double().t() + (0 if b is None else b.double())
            with torch.no_grad():
                assert linear(given, w, b).shape == want.shape
                close(linear(given, w, b), want.float(), 2e-4)
            w.requires_grad_().grad = None
            linear(given, w, b).sum().backward()
            close(w.grad, given.reshape(-1, 512).sum(0).expand(1024, -1), 1e-3)
            w.requires_grad_(False)


def test_static_shapes_sample_alike():
    """What a CUDA graph needs: buffers that stand still. Rows of different prefixes and ends; buffers that
    grow."""
    net, codec = m.load_model(TINY).eval(), load_codec(TINY)
    problems = [shapes.make_problem("tiles", 4 * n + 3, index=n) for n in range(4)]
    numbers = rollout.uniforms("static", 16, 110)
    for prefixes in (None, [[9 + n] * (n % 5) for n in range(16)]):
        found = []
        for net.graphs in (False, True):
            groups = rollout.sample(net, problems, codec, 4, 110, 1.0, numbers, prefixes)
            found.append([t for group in groups for t in group])
        assert len({len(t.ids) for t in found[0]}) > 2 and max(len(t.ids) for t in found[0]) > 66
        for a, b in zip(*found):
            assert a.ids == b.ids
            close(a.logps, b.logps, 1e-4)


def test_memory_reckoned_is_what_autograd_keeps():
    """With and without recomputation, to within a sixth; and the figures of a 7B model add up."""
    from experiments import memory
    tiny = m.Config.from_dict(files.read_json(ROOT / "tiny" / "config.json"))
    for remat in (False, True):
        reckoned, counted = memory.counted(tiny, 2, 4, 120, remat)
        assert 0.85 * counted < reckoned < 1.17 * counted, (remat, reckoned, counted)
    seven = m.Config.from_dict(memory.SIZES["7B"])
    one, eight = (memory.footprint(seven, world) for world in (1, 8))
    size = memory.parameters(seven)["all"]
    assert abs(size - 8.29e9) < 1e7 and one["weights"] == 2 * size and one["optimizer"] == 12 * size
    assert eight["optimizer"] == one["optimizer"] // 8 and eight["gradients"] == one["gradients"]
    assert sum(v for k, v in one.items() if k not in ("total", "while sampling")) == one["total"]
    spread = memory.footprint(seven, 8, shard_all=True)
    assert spread["optimizer"] == 12 * size // 8 and spread["while sampling"] > 2 * size + 12 * size // 8
    assert spread["total"] < eight["total"] - 2 * size and spread["activations"] == eight["activations"]


def test_worked_examples_of_the_headers():
    """Those that no other test recomputes."""
    codec = load_codec(TINY)
    height, width = m.smart_resize(200, 300, 28, 56 * 56, 10 ** 6)                          # model.py
    assert (width, height) == (308, 196)
    grid = (1, height // 14, width // 14)
    ids = torch.tensor([[9] * 5 + [codec.image_token_id] * 77 + [9]])
    positions, following = m.mrope_positions(ids, torch.ones_like(ids), [grid], codec.image_token_id, 2)
    axes = [sorted(set(axis[0, 5:82].tolist())) for axis in positions]
    assert grid == (1, 14, 22) and axes == [[5], list(range(5, 12)), list(range(5, 16))]
    assert positions[:, 0, 82].tolist() == [16] * 3 and following.item() == 17
    found = reward_parts("<think>6 / 12 is half.</think><answer>x = \\frac12</answer>", "0.5")  # reward.py
    assert found == {"accuracy": 1.0, "format": 1.0, "total": 1.0}
    assert equal.equal("x = \\frac12", "0.5")                                               # answers/equal.py
    reply = encode(codec, "red 7 9") + [codec.eos_ids[0]]                                   # rereason.py
    t = chain(codec, None, ["red 4 6", "blue 3 5", "teal 9 1"], "9")
    assert rereason.new_step(reply, False, codec) == ("red 7 9", 3) and t.steps[0].start == 1
    rows = [{"id": i, "groups": {}, "mode": "sample", "sample": k, "correct": i == 0, "format": True,
             "finished": True, "extracted": "1"} for i in (0, 1) for k in range(4)]         # eval.py
    figure = figures.summarise(rows)
    assert [figure[n]["mean"] for n in ("avg@4", "pass@2", "pass@4")] == [0.5] * 3
    assert (figure["avg@4"]["low"], figure["avg@4"]["high"]) == figures.interval([1.0, 0.0])
    config = train.TrainConfig(lr=3e-5, warmup_steps=5, batch=4)                            # train.py
    close([learning_rate(config, n, 0.0) for n in (0, 4, 9)], [6e-6, 3e-5, 3e-5], 1e-12)
    rank = SimpleNamespace(config=config, share=[1, 3], data=shapes.Stream("tiny", run=4))
    for step, want in enumerate(((1, 3), (5, 7))):
        assert [p.id for p in train.Trainer.draw(rank, step)] == [rank.data[i].id for i in want]


def test_examples_of_the_readme_run():
    """The blocks that begin with a file's name, as they stand, side by side."""
    text = (ROOT / "README.md").read_text()
    blocks = [b.split("```")[0] for b in text.split("```python\n# own_")[1:]]
    assert len(blocks) == 3 and all(len(b.strip().splitlines()) <= 15 for b in blocks)
    with scratch() as folder:
        (folder / "tiny").symlink_to(TINY)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        jobs = [subprocess.Popen([sys.executable, "-c", b.partition("\n")[2]], cwd=folder, env=env, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for b in blocks]
        said = [job.communicate(timeout=300)[0] for job in jobs]
        for job, block, text in zip(jobs, blocks, said):
            assert job.returncode == 0, block + text[-2000:]
        reward, signal, data = said
        assert reward.count("held-out") >= 2 and signal.count("held-out") >= 2
        assert "8 good rows, 0 bad ones" in data
        rows = metrics(folder / "runs" / "brief")
        assert len(rows) == 2 and all(abs(r["reward"] - 0.9 * r["accuracy"] - 0.1 * r["format"]) > 0.01
                                      for r in rows)


def test_file_map_of_the_readme():
    """Each row of the map names what is there, with its lines to within a tenth; the eight files of the
    method stay under 3,000; no file imports upward."""
    rows = re.findall(r"^\| `([\w./]+)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    lines = lambda f: len(f.read_text(encoding="utf-8").splitlines())
    sizes = {}
    for name, said in rows:
        place = ROOT / name
        parts = [place] if place.is_file() else [f for f in place.iterdir() if f.suffix in (".py", ".html")]
        sizes[name] = sum(map(lines, parts))
        assert abs(sizes[name] - int(said)) <= 0.1 * sizes[name], f"{name}: {sizes[name]} lines, not {said}"
    there = {f.name for f in ROOT.glob("*.py")} | {
        f"{f.name}/" for f in ROOT.iterdir() if f.is_dir() and list(f.glob("*.py"))}
    assert there == set(sizes)
    assert sum(n for name, n in sizes.items() if name.endswith(".py") and name != "test_all.py") <= 3000
    order = ("runtime answers.equal reward data.reading model grpo data.codec rollout data.checking "
             "attribute rereason tiny.shapes data.loading benchmarks viewer eval train").split()
    place = lambda name: next((n for n, part in enumerate(order) if name.startswith(part)), -1)
    for name in ("answers", "data", "runtime", "benchmarks", "viewer", ""):
        for file in (ROOT / name).glob("*.py"):
            own = place(f"{name}.{file.stem}" if name else file.stem)
            for line in re.findall(r"^(?:from|import) ([\w.]+)(?: import (\w+))?", file.read_text(), re.M):
                target = max(place(line[0]), place(".".join(line)))
                assert own < 0 or target <= own, f"{file} imports {line}"


def test_explain_tells_one_group():
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train.main(["--explain", "--batch", "4", "--device", "cpu", "--out", "/nowhere"])
    text = said.getvalue()
    words = ("A problem", "The prompt", "rollouts", "A wrong rollout", "The Re-Reasoning Loop",
             "Advantages, Eq. (1)", "Credit, Eq. (6)", "The update")
    for n, word in enumerate(words, start=1):
        assert f"\n{n}. " in text and word in text, word
    assert "<- doubted" in text and "(false)" in text and "relook" in text
    rewards = [float(x) for x in re.search(r"rewards ([\d., ]+), mean", text)[1].split(", ")]
    close(float(re.search(r"mean (\d\.\d+)", text.split("6. Advantages")[1])[1]), sum(rewards) / 8, 1e-3)
    before, after = re.search(r"token ([-+.\d]+) -> ([-+.\d]+)", text).groups()
    assert float(after) > float(before)                             # the template was learned from


def test_explain_of_other_algorithms_and_of_nothing():
    """It tells what the algorithm does, also of a group without a signal; one process and --stage rl only."""
    flags = ["--explain", "--batch", "2", "--group_size", "2", "--device", "cpu", "--max_new_tokens"]
    for more in (["60", "--algo", "grpo"], ["60", "--algo", "stepgrpo"],
                 ["150", "--data", "tiny:steps=20", "--rectify_below", "-1"]):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            train.main(flags + more)
        assert "8. The update" in said.getvalue() and "relook" not in said.getvalue()
        assert ("all the same" in said.getvalue()) or "part of the loss" in said.getvalue()
    raises(SystemExit, "--explain", train.main, ["--explain", "--stage", "sft"])
    raises(ValueError, "--explain", train.TrainConfig(explain=True).validate, 2)
    raises(ValueError, "--parents", train.TrainConfig(parents=5).validate, 1)
    raises(ValueError, "--anneal", train.TrainConfig(anneal=-1.0).validate, 1)


def test_figures_reach_the_reports_and_the_card():
    row = {"step": 3, "accuracy": 0.5, "lr": 3e-5, "mixed": 0.25, "repaired_by_looks": [1, 2, 0, 0],
           "heldout": {"avg@1": {"mean": 0.4}, "n": 7}}
    assert report.scalars(row) == {
        "train/rewards/accuracy/mean": 0.5, "train/learning_rate": 3e-5, "train/mixed": 0.25,
        "train/frac_reward_zero_std": 0.75, "train/repaired_by_looks/0": 1, "train/repaired_by_looks/1": 2,
        "train/repaired_by_looks/2": 0, "train/repaired_by_looks/3": 0, "eval/avg@1": 0.4}
    raises(ValueError, ["--report_to", "nothing", "tensorboard"], report.check_report, "nothing")
    for name in ("tensorboard", "wandb"):
        if importlib.util.find_spec(name) is None:
            raises(ValueError, [f"pip install {name}"], report.check_report, f"none+{name}")
    with scratch() as folder:
        config = small_run(folder / "run", algo="ivr", data="tiny:steps=5", save_every=1, keep=9,
                           eval_every=2, eval_problems=4)
        last, first = (sorted((folder / "run").glob("checkpoint-*"))[i] for i in (-1, 1))
        text, rows = (last / "README.md").read_text(), metrics(folder / "run")
        seen, done = len(rows) * config.batch * config.group_size, sum(r["repaired"] for r in rows)
        assert text.startswith("---\n") and "base_model: tiny\n" in text and "tiny:steps=5" in text
        assert f"own rollouts | {seen - done:,} |" in text and "- lr: `" in text and "step 2: avg@1" in text
        assert f"counted | {rows[-1]['generated_tokens']:,} |" in text
        assert "step 2:" not in (first / "README.md").read_text()
        writer, written = report.Report(config, 0), []
        assert writer.board is None and writer.wandb is None
        writer.board = SimpleNamespace(add_scalar=lambda *row: written.append(row), flush=lambda: None)
        writer.write(row)
        assert ("eval/avg@1", 0.4, 3) in written and len(written) == 9


def test_trace_holds_the_run_and_no_markup_of_others():
    with scratch() as folder:
        out, hostile = traced_run(folder)
        page = (out / "trace.html").read_text()
        start = page.index('id="data">') + len('id="data">')
        data = page[start:page.index("</script>", start)]
        assert "<" not in data and page.count("<script") == 2 and "http-equiv" in page
        assert not any(f"{how}=\"http" in page or f"{how}='http" in page for how in ("src", "href"))
        data = json.loads(data)
        assert [m["step"] for m in data["metrics"]] == [1, 2] and len(data["groups"]) == 3
        assert data["groups"][2]["rollouts"][0]["tokens"][0] == hostile
        for g in data["groups"][:2]:
            assert len(g["rollouts"]) == 4 and g["images"][0].startswith("data:image/png;base64,")
            for r in g["rollouts"]:
                sizes = {len(r[k]) for k in ("tokens", "weights", "mu", "ratio", "sampled")}
                assert len(sizes) == 1 and "".join(r["tokens"]).startswith("<think>")
                for s in r["steps"]:
                    assert 0 <= s["start"] < s["stop"] <= len(r["tokens"])
                if r["rewards"]["accuracy"] == 0 and r["steps"]:
                    assert all(s["margin"] is not None and s["dependence"] >= 0 for s in r["steps"])
        # signals are those of attribute.py, behind the step: the last margin is that of the whole chain
        records = [r for g in data["groups"][:2] for r in g["rollouts"] if r["fault"]]
        assert records and all(r["fault"]["kind"] in ("eroded", "misread", "reasoning") for r in records)
        rows = (out / "groups.jsonl").read_text().splitlines()
        (out / "groups.jsonl").write_text("\n".join(rows * 40) + "\n")
        limit, trace.MAX_BYTES = trace.MAX_BYTES, 20 * len(rows[0])
        try:
            trace.write(out)
        finally:
            trace.MAX_BYTES = limit
        assert (out / "trace.html").stat().st_size < 25 * len(rows[0]) + 40_000


def test_trace_in_a_browser():
    """Where Chromium is installed: the page opens without console errors, filters work, a hostile completion
    stays text."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        return
    with scratch() as folder:
        out, hostile = traced_run(folder)
        page = (out / "trace.html").read_text()
        acts = """<script>
          const many = what => document.querySelectorAll(what).length;
          const press = key => document.dispatchEvent(new KeyboardEvent("keydown", { key }));
          const seen = { charts: many(".chart polyline"), groups: shown.length };
          $("right").value = "0"; refilter(); seen.wrong = many(".rollout");
          seen.right = many(".rollout.right");
          $("right").value = ""; refilter(); go(-9);
          press("t"); seen.tokens = many("table tr"); press("ArrowRight"); seen.at = at;
          go(9); seen.images = document.images.length; seen.scripts = document.scripts.length;
          seen.text = document.querySelector("#problem pre").textContent; seen.title = document.title;
          document.body.replaceChildren(JSON.stringify(seen)); </script></body>"""
        (out / "act.html").write_text(page.replace("</body>", acts))
        flags = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom "
                 "--disable-sync --disable-background-networking --disable-component-update "
                 "--enable-logging=stderr")
        done = subprocess.run([browser, *flags.split(), f"--user-data-dir={folder}/profile",
                               f"file://{out}/act.html"], capture_output=True, text=True, timeout=120)
        assert "CONSOLE" not in done.stderr, [x for x in done.stderr.splitlines() if "CONSOLE" in x]
        found = done.stdout[done.stdout.index("{\"charts"):done.stdout.rindex("}") + 1]
        seen = json.loads(html.unescape(found))
        first = json.loads((out / "groups.jsonl").read_text().splitlines()[0])
        assert seen["charts"] > 8 and seen["groups"] == 3 and seen["at"] == 1
        assert seen["right"] == 0 < seen["wrong"]
        assert seen["tokens"] == len(first["rollouts"][0]["tokens"]) + 1
        assert seen["images"] == 0 and seen["text"] == hostile and seen["title"] == "Training trace"
        assert seen["scripts"] == 3


# ------------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", help="run only tests whose name contains this")
    word = parser.parse_args().k
    os.environ["HF_HUB_OFFLINE"] = "1"                  # hermetic: a test that reaches for the network fails
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    passed = failed = 0
    for name, test in [(n, f) for n, f in globals().items() if n.startswith("test_") and word in n]:
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
    main()

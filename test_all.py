"""Every test, in file order: python test_all.py [-k WORD]

Each compares a component with a slow, obvious reference: transformers' own model, a for-loop, torch.autograd,
one rank, an uninterrupted run. No network, no GPU.
"""
import argparse
import contextlib
import io
import itertools
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import eval as evaluation
import grpo
import model as m
import rollout
import train
from reward import answers_match, extract_answer, format_ok, reward_parts
from tiny import shapes

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


def close(a, b, tolerance=1e-4):
    difference = (torch.as_tensor(a, dtype=torch.double)
                  - torch.as_tensor(b, dtype=torch.double)).abs().max().item()
    assert difference <= tolerance, f"differ by {difference:.2e}, allowed {tolerance:.0e}"


def random_model(seed=0, spread=0.25):
    """The tiny architecture with random weights large enough that nothing is nearly uniform or nearly
    certain."""
    config = m.Config.from_dict(m.read_json(Path(TINY) / "config.json"))
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
        raises(ValueError, ["config.json", "model_type", "llama"], m.load_model,
               broken(None, {"model_type": "llama"}))
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
    codec = rollout.load_codec(TINY)
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
    net, codec, problems = random_model(), rollout.load_codec(TINY), mixed_problems()
    lengths = set()
    for group in rolled(net, codec, problems):
        for t in group:
            lengths.add(len(t.ids))
            assert t.sampled == [1] * len(t.ids) and len(t.logps) == len(t.ids) <= 14
            close(t.logps, uncached_logps(net, codec, t.problem, t.ids))
    assert len({len(rollout.encode_prompt(p, codec).ids) for p in problems}) == 4


def test_sampled_logps_equal_training_logps():
    """What the update recomputes (prompts shared, rows padded) is what the sampler stored, to 1e-4."""
    net, codec, problems = random_model(), rollout.load_codec(TINY), mixed_problems()
    flat = [(i, t) for i, group in enumerate(rolled(net, codec, problems)) for t in group]
    flat = flat[::2] + flat[1::3]                       # any order, any number a prompt
    hidden, targets, mask = rollout.completion_hidden(
        net, [rollout.encode_prompt(p, codec) for p in problems], [i for i, _ in flat],
        [t.ids for _, t in flat], codec.pad_id)
    logps, _ = grpo.token_logps(hidden[mask], net.head_weight, targets[mask], codec.logit_mask)
    assert mask.sum(1).tolist() == [len(t.ids) for _, t in flat]
    close(logps, torch.tensor([x for _, t in flat for x in t.logps]))


def test_row_in_batch_equals_row_alone():
    net, codec, problems = random_model(), rollout.load_codec(TINY), mixed_problems()
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
    net, codec, problems = random_model(), rollout.load_codec(TINY), mixed_problems()
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
    net, codec, problems = random_model(), rollout.load_codec(TINY), mixed_problems()
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


def test_prompt_and_vision_once_whatever_the_group():
    net, codec, problems = random_model(), rollout.load_codec(TINY), mixed_problems()
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


def test_completions_of_one_token():
    """The shortest there are: the update's forward has no row tokens to run."""
    net, codec, problems = random_model(), rollout.load_codec(TINY), mixed_problems()
    groups = rolled(net, codec, problems, 2, 1)
    prompts = [rollout.encode_prompt(p, codec) for p in problems]
    ids = [t.ids for g in groups for t in g]
    hidden, targets, mask = rollout.completion_hidden(net, prompts, [0, 0, 1, 1, 2, 2, 3, 3], ids,
                                                      codec.pad_id)
    logps, _ = grpo.token_logps(hidden[mask], net.head_weight, targets[mask], codec.logit_mask)
    close(logps, torch.tensor([t.logps[0] for g in groups for t in g]))


def test_greedy_is_argmax():
    net, codec, problems = random_model(), rollout.load_codec(TINY), mixed_problems()
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
    grid = (torch.arange(10_000) + 0.5) / 10_000
    for temperature in (1.0, 0.5):
        token, logp = rollout.next_token(logits.expand(10_000, -1),
                                         torch.tensor([0.0, 0.0, -torch.inf, 0.0]), temperature, grid)
        want = torch.tensor([0.2, 0.5, 0.0, 0.0]) ** (1 / temperature)
        want /= want.sum()
        close(torch.bincount(token, minlength=4) / 10_000, want, 2e-4)
        close(logp.exp(), want[token])


def test_forbidden_tokens_never_come():
    net, codec, problems = random_model(), rollout.load_codec(TINY), mixed_problems()
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
    net, codec, problems = random_model(), rollout.load_codec(TINY), mixed_problems()
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
        assert rollout.encode_prompt(p, rollout.load_codec(str(folder))).ids == \
            rollout.encode_prompt(p, rollout.load_codec(TINY)).ids
        small = rollout.encode_prompt(p, rollout.load_codec(TINY, max_pixels=28 * 28 * 4))
        whole = rollout.encode_prompt(p, rollout.load_codec(TINY))
        assert len(small.pixel_values) <= 16 < len(whole.pixel_values)


def test_prompt_is_the_chat_template():
    codec = rollout.load_codec(TINY)
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
    raises(rollout.DataError, ["tiles-4", "--max_prompt_tokens is 5"], rollout.encode_prompt, p, codec, 5)


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
        got = rollout.load_problems(write_rows(folder, rows), instruction="Think.")
        assert [p.answer for p in got] == ["48", "7", "1", "yes", "B", "B"]
        assert [len(p.images) for p in got] == [1, 1, 0, 2, 0, 0]
        assert [p.question.count("<image>") for p in got] == [1, 1, 0, 2, 0, 0]
        assert got[4].choices == ["1", "2"] and len({p.id for p in got}) == 6
        assert got[5].question == "Which?\n(A) x (B) y\nThink."
        assert got[1].question == "<image>Find y.\nThink." and got[1].demonstration.startswith("<think>")
        assert got[3].id == "q" and "\nA. 1\nB. 2" in got[4].question
        codec = rollout.load_codec(TINY)
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
        message = raises(rollout.DataError, [], rollout.load_problems, path)
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
        raises(rollout.DataError, "latin.jsonl:1", rollout.load_problems, folder / "latin.jsonl")
        (folder / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"problem": "x", "answer": "1"}\r\n')
        assert rollout.load_problems(folder / "bom.jsonl")[0].question == "x"
        Image.new("RGB", (1, 300)).save(folder / "a.png")
        codec, thin = rollout.load_codec(TINY), rollout.load_problems(write_rows(folder, [good]))[0]
        Image.new("RGB", (1, 300)).save(folder / "a.png")
        raises(rollout.DataError, ["data.jsonl:1", "images", "aspect"], rollout.encode_prompt, thin, codec)
        raises(rollout.DataError, "no rows", rollout.load_problems, folder / "empty.jsonl")
        raises(rollout.DataError, "no such file", rollout.load_problems, folder / "nothing.jsonl")


def test_pad():
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
    s, shift = p.key_steps, p.oracle["shift"]
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
            assert abs(evaluation.pass_at_k(n, c, k) - want) < 1e-9


def test_interval_is_wilsons():
    low, high = evaluation.interval([1.0] * 8 + [0.0] * 2)                       # textbook values for 8 of 10
    assert abs(low - 0.4902) < 2e-3 and abs(high - 0.9433) < 2e-3
    assert evaluation.interval([0.0] * 10)[0] == 0 and 0.2 < evaluation.interval([0.0] * 10)[1] < 0.35
    close(evaluation.interval([1.0, 0.0] * 5), evaluation.interval([1.0] * 5 + [0.0] * 5), 1e-9)
    narrow, wide = evaluation.interval([0.5] * 9 + [0.25]), evaluation.interval([1.0] * 5 + [0.0] * 5)
    assert narrow[1] - narrow[0] < wide[1] - wide[0]
    rng, hits = np.random.default_rng(0), 0             # coverage, with 4 dependent samples a problem
    for _ in range(400):
        values = rng.binomial(4, rng.beta(1, 2, size=60)) / 4
        low, high = evaluation.interval(values.tolist())
        hits += low <= 1 / 3 <= high
    assert 0.91 <= hits / 400 <= 0.98, hits / 400


def test_summary_figures():
    rows = [{"id": i, "task": "a" if i < 2 else "b", "steps": 3, "mode": "sample", "correct": c,
             "format": True, "extracted": "x" if c else None}
            for i, cs in enumerate(((1, 1), (1, 0), (0, 0), (0, 0))) for c in cs]
    rows += [{**r, "mode": "greedy"} for r in rows[::2]]
    s = evaluation.summarise(rows)
    assert (s["n"] == 4 and s["greedy"]["mean"] == 0.5 and s["avg@2"]["mean"] == 0.375
            and s["pass@2"]["mean"] == 0.5)
    assert s["sample parse fail"]["mean"] == 0.625 and s["sample format"]["mean"] == 1
    table = evaluation.report(rows).splitlines()
    assert len(table) == 5 and "task a" in table[3] and "100.0 %" in table[3]


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
    config = evaluation.parse_flags(evaluation.EvalConfig, ["--samples", "3", "--greedy"])
    assert config.samples == 3 and config.greedy is True and config.data == "tiny"
    assert evaluation.parse_flags(train.TrainConfig, ["--no-freeze_vision"],
                                  {"freeze_vision": True}).freeze_vision is False
    with contextlib.redirect_stderr(io.StringIO()) as err:
        for flags in (["--no_such_flag", "1"], ["--sample", "3"], ["--samples", "many"]):
            raises(SystemExit, "2", evaluation.parse_flags, evaluation.EvalConfig, flags)
    assert "no_such_flag" in err.getvalue()
    source = Path(train.__file__).read_text()
    for name in asdict(train.TrainConfig()):
        assert (f"    {name}: " in source
                and "#" in source.split(f"    {name}: ", 1)[1].split("\n", 1)[0]), name


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


def test_two_ranks_equal_one():
    """torchrun with two gloo processes against one process, RL and supervised: losses, norms and weights."""
    for kwargs in (dict(stage="rl", updates_per_batch=2, micro_rows=5, beta=0.1, lr=1e-4),
                   dict(stage="sft", max_new_tokens=60)):
        with scratch() as folder:
            config = small_run(folder / "one", **kwargs)
            two = replace(config, out=str(folder / "two"))
            done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                            "--nproc_per_node", "2", str(ROOT / "train.py"), *flags_of(two)],
                           capture_output=True, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
            assert done.returncode == 0, done.stderr[-3000:]
            for a, b in zip(metrics(folder / "one"), metrics(folder / "two"), strict=True):
                for key in a:
                    if key != "seconds":
                        assert abs(a[key] - b[key]) <= 1e-4 * max(1, abs(a[key])), (key, a[key], b[key])
            assert any(a["grad_norm"] > 0 for a in metrics(folder / "one"))
            same_weights(weights_of(folder / "one"), weights_of(folder / "two"), 1e-3)


def test_resumed_run_equals_uninterrupted():
    with scratch() as folder:
        whole = small_run(folder / "whole", max_steps=4)
        small_run(folder / "cut", max_steps=4, save_every=2)
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
        trainer.optimizer = train.Optimizer(trainer.model, config)
        problems = trainer.draw(0)
        prompts = [rollout.encode_prompt(p, trainer.codec) for p in problems]
        groups = trainer.roll_out(problems, prompts)
        for i, t in enumerate(t for g in groups for t in g):
            t.advantage = math.sin(i + 1)
        net, seen = trainer.model, {}
        trainer.optimizer.step = lambda lr, ranks: seen.update(
            {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}) or 0.0
        stats = trainer.update(groups, prompts)
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
    optimizer = train.Optimizer(net, config)
    start = [x.clone() for x in optimizer.masters]
    for _ in range(3):
        for part in (1.0, 2 ** -9):                     # two micro-batches; their sum is no bfloat16 number
            for p in net.parameters():
                p.grad = torch.full_like(p, part)
            optimizer.collect()
        assert all(p.grad is None for p in net.parameters())
        assert all((x.grad == 1 + 2 ** -9).all() for x in optimizer.masters)
        optimizer.step(1e-6, train.Ranks())
    for a, b, p in zip(start, optimizer.masters, net.parameters()):
        close(b, a - 3e-6, 1e-6)
        assert torch.equal(p, b.to(torch.bfloat16))


def test_gradient_that_is_not_finite_is_skipped():
    net = random_model()
    optimizer = train.Optimizer(net, train.TrainConfig())
    before = [p.clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.full_like(p, torch.nan)
    assert math.isnan(optimizer.step(1e-2, train.Ranks()))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_learning_rate():
    config = train.TrainConfig(lr=1.0, warmup_steps=4, max_steps=10, lr_end=0.0)
    rates = [train.learning_rate(config, s) for s in range(10)]
    assert rates[0] == 0.25 and rates == [min(1, (s + 1) / 4) * (1 - s / 10) for s in range(10)]
    assert train.learning_rate(replace(config, lr_end=1.0), 9) == 1.0


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
        raises(rollout.DataError, ["demonstration"], small_run, folder / "other", stage="sft", data=str(path))


def test_bad_input_ends_with_one_line():
    """Each as a user would meet it: exit code not 0, one line on stderr, no traceback, nothing written."""
    with scratch() as folder:
        bad = write_rows(folder, [{"images": ["none.png"], "problem": "x", "answer": "1"}])
        other = folder / "llama"
        other.mkdir()
        (other / "config.json").write_text('{"model_type": "llama"}')
        (folder / "used").mkdir()
        (folder / "used" / "metrics.jsonl").write_text("")
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

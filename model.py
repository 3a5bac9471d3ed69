"""Qwen2.5-VL written out in PyTorch: vision tower, M-RoPE decoder, image preprocessing, KV cache, hub-format
files.

Place in the pipeline: the policy. `rollout.py` samples from it, `train.py` updates it; it imports no other
file of the method.
Source of the architecture: Qwen2.5-VL technical report (arXiv 2502.13923) and the published checkpoints,
whose tensor names and config keys we read and write. Parity with transformers is tested over random
configurations.

What is ours, not the reference's (same function, other bookkeeping):
  1. Window attention gathers each window by index, so patches are never permuted and permuted back.
  2. Attention is told what to attend to by a small context object (`Full`, `Rows`), so the layers know
     nothing of caches.
  3. `Rows` keeps the prompt's keys once and shares them among the G samples of that prompt (sampling and
     training).

Left out: video, dropout, sliding-window attention (the published checkpoints have it off).

Shapes: B prompts, R rows (B x G samples), T tokens, P prompt tokens, V vocabulary, D width, H heads,
K key/value heads, d head size, N image patches, M merged image tokens (N / 4).

Worked example: an image of 300 x 200 pixels is resized to 308 x 196, multiples of 28, so to 22 x 14 patches
and 11 x 7 = 77 image tokens. With 5 tokens before it, these have the positions (5, 5 .. 11, 5 .. 15) on the
axes of time, height and width, and the text goes on at 5 + 11 = 16.
"""
import json
import math
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from runtime.files import COMPANIONS, read_json, resolve
from runtime.linear import Linear, linear

# ------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class Config:
    """What the network needs of a checkpoint's config.json. Units: sizes in features, patch and window in
    pixels."""
    vocab_size: int
    hidden_size: int                # D
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int        # H
    num_key_value_heads: int        # K
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple            # frequencies given to (time, height, width), repeating; sums to d / 2
    tie_word_embeddings: bool
    initializer_range: float
    image_token_id: int
    v_depth: int
    v_hidden_size: int
    v_intermediate_size: int
    v_num_heads: int
    v_in_channels: int
    v_patch_size: int
    v_temporal_patch_size: int
    v_merge_size: int
    v_window_size: int
    v_full_blocks: tuple            # indices of the blocks with full instead of window attention

    @staticmethod
    def from_dict(c: dict, where: str = "config.json") -> "Config":
        """Read the hub's config.json, flat (as published) or nested (as transformers 5 writes it). ValueError
        names the file and the field."""
        if c.get("model_type") != "qwen2_5_vl":
            raise ValueError(f"{where}: model_type is {c.get('model_type')!r}; "
                             "only 'qwen2_5_vl' (Qwen2.5-VL) is supported")
        text, vision = c.get("text_config") or c, c.get("vision_config")
        if not isinstance(vision, dict):
            raise ValueError(f"{where}: vision_config is missing")
        # older files say rope_theta + rope_scaling, newer ones rope_parameters
        rope = text.get("rope_parameters") or {"rope_theta": text.get("rope_theta"),
                                               **(text.get("rope_scaling") or {})}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ("default", "mrope"):
            raise ValueError(f"{where}: rope type {kind!r} is not supported (only default M-RoPE)")
        if text.get("use_sliding_window"):
            raise ValueError(f"{where}: use_sliding_window is not supported")
        if (text.get("hidden_act", "silu"), vision.get("hidden_act", "silu")) != ("silu", "silu"):
            raise ValueError(f"{where}: hidden_act must be silu")

        def need(section, key, *old_names):
            for name in (key, *old_names):
                if section.get(name) is not None:
                    return section[name]
            raise ValueError(f"{where}: field {key!r} is missing")

        config = Config(
            vocab_size=need(text, "vocab_size"), hidden_size=need(text, "hidden_size"),
            intermediate_size=need(text, "intermediate_size"),
            num_hidden_layers=need(text, "num_hidden_layers"),
            num_attention_heads=need(text, "num_attention_heads"),
            num_key_value_heads=text.get("num_key_value_heads") or need(text, "num_attention_heads"),
            rms_norm_eps=text.get("rms_norm_eps", 1e-6), rope_theta=float(rope.get("rope_theta") or 1e6),
            mrope_section=tuple(rope.get("mrope_section") or (16, 24, 24)),
            tie_word_embeddings=bool(c.get("tie_word_embeddings", text.get("tie_word_embeddings"))),
            initializer_range=text.get("initializer_range", 0.02), image_token_id=need(c, "image_token_id"),
            v_depth=need(vision, "depth"), v_hidden_size=need(vision, "hidden_size"),
            v_intermediate_size=need(vision, "intermediate_size"), v_num_heads=need(vision, "num_heads"),
            v_in_channels=need({"in_channels": 3, **vision}, "in_channels"),
            v_patch_size=need(vision, "patch_size", "spatial_patch_size"),
            v_temporal_patch_size=vision.get("temporal_patch_size", 2),
            v_merge_size=vision.get("spatial_merge_size", 2), v_window_size=vision.get("window_size", 112),
            v_full_blocks=tuple(need(vision, "fullatt_block_indexes")))
        if vision.get("out_hidden_size", config.hidden_size) != config.hidden_size:
            raise ValueError(f"{where}: vision_config.out_hidden_size must equal "
                             f"hidden_size {config.hidden_size}")
        if sum(config.mrope_section) * 2 * config.num_attention_heads != config.hidden_size:
            raise ValueError(f"{where}: mrope_section {config.mrope_section} must sum to half the head size")
        return config


# ------------------------------------------------------------------------------------------------------------
# Image preprocessing (Pillow and numpy only; parity with transformers' Qwen2VLImageProcessor)


@dataclass(frozen=True)
class ImageConfig:
    """preprocessor_config.json. `min_pixels`, `max_pixels`: area bounds after resizing."""
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple = (0.26862954, 0.26130258, 0.27577711)

    @staticmethod
    def from_dict(c: dict) -> "ImageConfig":
        size, base = c.get("size") or {}, ImageConfig()
        return ImageConfig(
            min_pixels=c.get("min_pixels") or size.get("shortest_edge") or base.min_pixels,
            max_pixels=c.get("max_pixels") or size.get("longest_edge") or base.max_pixels,
            patch_size=c.get("patch_size", base.patch_size), merge_size=c.get("merge_size", base.merge_size),
            temporal_patch_size=c.get("temporal_patch_size", base.temporal_patch_size),
            image_mean=tuple(c.get("image_mean", base.image_mean)),
            image_std=tuple(c.get("image_std", base.image_std)))


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size (height, width) nearest to the given one with both sides multiples of `factor` and the area
    inside [min_pixels, max_pixels]. Source: Qwen2-VL. ValueError for aspect ratios beyond 200."""
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"aspect ratio of a {width}x{height} image is beyond 200:1")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / scale / factor) * factor)
        w = max(factor, math.floor(width / scale / factor) * factor)
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h, w = math.ceil(height * scale / factor) * factor, math.ceil(width * scale / factor) * factor
    return h, w


def preprocess_image(image: Image.Image, config: ImageConfig) -> tuple[np.ndarray, tuple[int, int, int]]:
    """One RGB image -> (patches (N, C * temporal * patch * patch) float32, grid (1, rows, columns) in
    patches). Patches are ordered merge block by merge block, the four of a block beside each other, as the
    merger needs them."""
    p, m = config.patch_size, config.merge_size
    h, w = smart_resize(image.height, image.width, p * m, config.min_pixels, config.max_pixels)
    if (w, h) != image.size:
        image = image.resize((w, h), Image.Resampling.BICUBIC)
    x = np.asarray(image, dtype=np.float32) / 255.0                                     # (h, w, C)
    x = (x - np.array(config.image_mean, np.float32)) / np.array(config.image_std, np.float32)
    rows, cols = h // p, w // p
    # (R/m, C/m, m, m, C, p, p)
    x = x.reshape(rows // m, m, p, cols // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    x = np.repeat(x[:, :, :, :, :, None], config.temporal_patch_size, axis=5)           # a still is 2 frames
    return np.ascontiguousarray(x.reshape(rows * cols, -1)), (1, rows, cols)


# ------------------------------------------------------------------------------------------------------------
# Building blocks


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the root mean square taken in fp32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden: int, bias: bool):
        super().__init__()
        self.gate_proj = Linear(dim, hidden, bias=bias)
        self.up_proj = Linear(dim, hidden, bias=bias)
        self.down_proj = Linear(hidden, dim, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotate(x, cos, sin):
    """Rotary embedding. x (..., d); cos, sin broadcastable to it; the pairs are (i, i + d/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


# ------------------------------------------------------------------------------------------------------------
# Vision tower


def vision_layout(grid_thw: list, merge: int, window: int):
    """Where the patches of all images lie. grid_thw: (frames, rows, cols) per image; `window`: window side in
    patches.

    Returns (hw (N, 2) row and column of each patch, full groups, window groups). A group list holds index
    tensors (n, L): n segments of equal length L that attend inside themselves; together they cover every
    patch once."""
    hw, frame_ids, window_ids, frames = [], [], [], 0
    for t, h, w in grid_thw:
        rows, cols = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        block = lambda a: a.reshape(h // merge, merge, w // merge, merge).transpose(1, 2).reshape(-1)
        one = torch.stack([block(rows), block(cols)], dim=1)                            # (h * w, 2) in blocks
        for _ in range(t):
            hw.append(one)
            frame_ids.append(torch.full((h * w,), frames))
            window_ids.append((frames << 40) + ((one[:, 0] // window) << 20) + one[:, 1] // window)
            frames += 1
    return torch.cat(hw), _segments(torch.cat(frame_ids)), _segments(torch.cat(window_ids))


def _segments(ids):
    """Group positions by id, then groups by size -> list of (n, L) index tensors."""
    counts = torch.unique(ids, return_counts=True)[1].tolist()
    segments = torch.argsort(ids, stable=True).split(counts)
    by_length = {}
    for s in segments:
        by_length.setdefault(len(s), []).append(s)
    return [torch.stack(g) for g in by_length.values()]


class VisionAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x, cos, sin, groups):
        n, dim = x.shape
        q, k, v = self.qkv(x).view(n, 3, self.heads, -1).unbind(1)                      # (N, H, d) each
        q = rotate(q.float(), cos, sin).to(x.dtype)
        k = rotate(k.float(), cos, sin).to(x.dtype)
        out = torch.empty_like(v)
        for index in groups:                                                            # (n, L)
            qg, kg, vg = (a[index].transpose(1, 2) for a in (q, k, v))                  # (n, H, L, d)
            out = out.index_put((index,), F.scaled_dot_product_attention(qg, kg, vg).transpose(1, 2))
        return self.proj(out.reshape(n, dim))


class VisionBlock(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(c.v_hidden_size, 1e-6), RMSNorm(c.v_hidden_size, 1e-6)
        self.attn = VisionAttention(c.v_hidden_size, c.v_num_heads)
        self.mlp = SwiGLU(c.v_hidden_size, c.v_intermediate_size, bias=True)

    def forward(self, x, cos, sin, groups):
        x = x + self.attn(self.norm1(x), cos, sin, groups)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A Conv3d whose stride is its kernel: one linear map a patch, kept in the hub's Conv3d weight shape."""

    def __init__(self, c: Config):
        super().__init__()
        self.proj = nn.Conv3d(c.v_in_channels, c.v_hidden_size, bias=False,
                              kernel_size=(c.v_temporal_patch_size, c.v_patch_size, c.v_patch_size))

    def forward(self, x):
        return linear(x.to(self.proj.weight.dtype), self.proj.weight.flatten(1))


class PatchMerger(nn.Module):
    """Concatenate each merge block's patches and map them to the decoder's width: (N, Dv) -> (M, D)."""

    def __init__(self, c: Config):
        super().__init__()
        self.ln_q = RMSNorm(c.v_hidden_size, 1e-6)
        self.width = c.v_hidden_size * c.v_merge_size ** 2
        self.mlp = nn.Sequential(Linear(self.width, self.width), nn.GELU(),
                                 Linear(self.width, c.hidden_size))

    def forward(self, x):
        return self.mlp(self.ln_q(x).view(-1, self.width))


class VisionTower(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.patch_embed = PatchEmbed(c)
        self.blocks = nn.ModuleList([VisionBlock(c) for _ in range(c.v_depth)])
        self.merger = PatchMerger(c)

    def forward(self, pixel_values, grid_thw, remat: bool = False):
        """pixel_values (N, C * temporal * patch * patch), grid_thw (images, 3) -> image tokens (M, D)."""
        c = self.c
        # a window is a whole number of merge blocks
        window = c.v_window_size // c.v_merge_size // c.v_patch_size * c.v_merge_size
        hw, full, windows = vision_layout(grid_thw.tolist(), c.v_merge_size, window)
        d = c.v_hidden_size // c.v_num_heads
        inv_freq = 1.0 / 10000.0 ** (torch.arange(0, d // 2, 2, dtype=torch.float) / (d // 2))
        angles = (hw[:, :, None].float() * inv_freq).flatten(1)                         # (N, d/2), rows first
        angles = torch.cat((angles, angles), dim=-1)[:, None].to(pixel_values.device)   # (N, 1, d)
        cos, sin = angles.cos(), angles.sin()
        full, windows = ([g.to(pixel_values.device) for g in groups] for groups in (full, windows))
        x = self.patch_embed(pixel_values)
        for i, block in enumerate(self.blocks):
            args = (x, cos, sin, full if i in c.v_full_blocks else windows)
            x = checkpoint(block, *args, use_reentrant=False) if remat else block(*args)
        return self.merger(x)


# ------------------------------------------------------------------------------------------------------------
# What a query attends to: a whole sequence, or rows that share their prompt


class Full:
    """Causal attention over whole right- or left-padded sequences; keeps keys and values if `keep`
    (prefill)."""

    def __init__(self, attention_mask=None, keep: bool = False):
        self.kv = {} if keep else None                          # layer -> (k, v)
        self.mask = None
        if attention_mask is not None and not bool(attention_mask.all()):
            t = attention_mask.shape[1]
            causal = torch.ones(t, t, dtype=torch.bool, device=attention_mask.device).tril()
            itself = torch.eye(t, dtype=torch.bool, device=attention_mask.device)       # padding: no NaN
            self.mask = (causal & attention_mask[:, None, None].bool()) | itself        # (B, 1, T, T)

    def attend(self, layer: int, q, k, v):
        """q (B, H, T, d), k and v (B, K, T, d) -> (B, H, T, d)."""
        if self.kv is not None:
            self.kv.setdefault(layer, (k, v))           # a layer recomputed in the backward pass comes twice
        return sdpa(q, k, v, self.mask, causal=self.mask is None)


class Rows:
    """R rows continuing B shared prompts: each row sees its prompt's keys and its own tokens so far.

    prefix_kv: {layer: (k, v)} of shape (B, K, P, d), stored once however many rows share it.
    prefix_mask (B, P) bool; prompt (R,): the prompt of each row.
    `mask` (R, S) marks the real tokens of the row part. The sampler pads on the left, so that all rows write
    the same column. With `grow=False` (training, padded on the right) one forward sees all row tokens,
    nothing is cached, and gradients flow."""

    def __init__(self, prefix_kv, prefix_mask, prompt, grow: bool = True):
        if grow:                            # laid out for the products, which else copy them at every step
            prefix_kv = {layer: (k.contiguous(), v.contiguous()) for layer, (k, v) in prefix_kv.items()}
        self.prefix_kv, self.prefix_mask, self.prompt, self.grow = prefix_kv, prefix_mask.bool(), prompt, grow
        self.kv = {layer: None for layer in prefix_kv}          # per layer: a buffer (2, R, K, capacity, d)
        self.mask = torch.zeros(len(prompt), 0, dtype=torch.bool, device=prompt.device)
        self.column = None                                      # static shapes: where the next token goes
        self._place()

    def _place(self):
        """Slot (prompt, g) of each row: the prompt part is computed on a dense (B, G_max) layout."""
        counts = torch.bincount(self.prompt, minlength=len(self.prefix_mask))
        order = torch.argsort(self.prompt, stable=True)
        first = (counts.cumsum(0) - counts)[self.prompt[order]]
        g = torch.empty_like(self.prompt)
        g[order] = torch.arange(len(order), device=order.device) - first
        self.g_max = int(counts.max())
        self.slot = self.prompt * self.g_max + g                                        # (R,)
        places = torch.arange(len(self.prefix_mask) * self.g_max, device=g.device)
        self.in_place = torch.equal(self.slot, places)              # every slot has its row, in order
        self.away = ~self.prefix_mask[:, None, None]

    def select(self, rows):
        """Keep only these rows (indices); prompts left without a row are dropped."""
        prompts, prompt = torch.unique(self.prompt[rows], return_inverse=True)
        self.kv = {layer: None if c is None else c[:, rows] for layer, c in self.kv.items()}
        if len(prompts) < len(self.prefix_mask):
            self.prefix_kv = {layer: (k[prompts], v[prompts]) for layer, (k, v) in self.prefix_kv.items()}
            self.prefix_mask = self.prefix_mask[prompts]
        self.mask, self.prompt = self.mask[rows], prompt
        self._place()

    def extend(self, new_mask):
        """Announce the tokens of the next forward: new_mask (R, T) bool."""
        if self.column is None:
            self.mask = torch.cat((self.mask, new_mask), dim=1)
        else:
            self.mask.index_copy_(1, self.column.add_(1), new_mask)
            self.used += 1

    def settle(self):
        """Static shapes from here on, for one token a row at a time: buffers and mask of more columns than
        the `used` ones, written in place. Columns not written yet are masked."""
        self.used = used = self.mask.shape[1] if self.column is None else self.used
        columns = max(64, 2 * used)
        for layer, buffer in self.kv.items():
            grown = buffer.new_zeros(*buffer.shape[:3], columns, buffer.shape[4])
            grown[:, :, :, :used] = buffer[:, :, :, :used]
            self.kv[layer] = grown
        self.mask = F.pad(self.mask[:, :used], (0, columns - used))
        self.column = torch.tensor([used - 1], device=self.mask.device)

    def attend(self, layer: int, q, k, v):
        """q (R, H, T, d), k and v (R, K, T, d) of the new tokens -> (R, H, T, d)."""
        if self.grow:
            k, v = self._append(layer, k, v)
        if q.shape[2] == 1 and not torch.is_grad_enabled():
            return self._decode(layer, q, k, v)
        t, s = q.shape[2], k.shape[2]
        kp, vp = (a[self.prompt] for a in self.prefix_kv[layer])                        # (R, K, P, d)
        causal = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
        itself = torch.eye(s, dtype=torch.bool, device=q.device)[s - t:]                # padding: no NaN
        own = (causal & self.mask[:, None, :]) | itself                                 # (R, T, S)
        shared = self.prefix_mask[self.prompt][:, None].expand(-1, t, -1)               # (R, T, P)
        mask = torch.cat((shared, own), dim=2)[:, None]
        return sdpa(q, torch.cat((kp, k), 2), torch.cat((vp, v), 2), mask)

    def _append(self, layer, k, v):
        """Write the new columns into the layer's buffer, which doubles when it is full."""
        end, new = self.mask.shape[1], k.shape[2]
        buffer = self.kv[layer]
        if self.column is not None:
            return buffer[0].index_copy_(2, self.column, k), buffer[1].index_copy_(2, self.column, v)
        if buffer is None or buffer.shape[3] < end:
            capacity = max(32, 2 * end)
            grown = k.new_zeros(2, *k.shape[:2], capacity, k.shape[3])
            if buffer is not None:
                grown[:, :, :, :end - new] = buffer[:, :, :, :end - new]
            self.kv[layer] = buffer = grown
        buffer[0, :, :, end - new:end] = k
        buffer[1, :, :, end - new:end] = v
        return buffer[0, :, :, :end], buffer[1, :, :, :end]

    def _decode(self, layer, q, k, v):
        """One new token a row. The prompt part is one matmul a prompt over all its rows: its keys are read
        once, not G times. Both parts share a softmax, laid out by prompt, since that part is longer."""
        kp, vp = self.prefix_kv[layer]                                                  # (B, K, P, d)
        (r, h, _, d), (b, kh, p, _) = q.shape, kp.shape
        rep, g = h // kh, self.g_max
        q = (q * d ** -0.5).view(r, kh, rep, d)

        def to_slots(a):                                                 # (R, K, rep, x) -> (B, K, G, rep, x)
            a = a if self.in_place else a.new_zeros(b * g, *a.shape[1:]).index_copy_(0, self.slot, a)
            return a.view(b, g, kh, rep, -1).transpose(1, 2)

        def to_rows(a):                                                                 # the inverse
            a = a.transpose(1, 2).reshape(b * g, kh, rep, -1)
            return a if self.in_place else a[self.slot]

        shared = to_slots(q).flatten(2, 3) @ kp.transpose(2, 3)                         # (B, K, G rep, P)
        shared = shared.masked_fill_(self.away, -torch.inf).reshape(b, kh, g, rep, p)
        own = (q @ k.transpose(2, 3)).masked_fill_(~self.mask[:, None, None], -torch.inf)
        weights = torch.cat((shared, to_slots(own)), dim=-1).softmax(-1, dtype=torch.float32).to(v.dtype)
        out = (weights[..., :p].flatten(2, 3) @ vp).reshape(b, kh, g, rep, d)
        return (to_rows(out) + to_rows(weights[..., p:]) @ v).reshape(r, h, 1, d)


def sdpa(q, k, v, mask=None, causal: bool = False):
    """Grouped-query attention: q (R, H, T, d), k and v (R, K, S, d); mask broadcastable to (R, H, T, S),
    True = see."""
    groups = q.shape[1] // k.shape[1]
    if mask is not None and groups > 1:         # no fused CUDA kernel takes both a mask and grouped heads
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=groups > 1)


# ------------------------------------------------------------------------------------------------------------
# Decoder


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer, self.d = layer, c.hidden_size // c.num_attention_heads
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * self.d)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * self.d)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * self.d)
        self.o_proj = Linear(c.num_attention_heads * self.d, c.hidden_size, bias=False)

    def forward(self, x, cos, sin, context):
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, -1, self.d).transpose(1, 2)
                   for f in (self.q_proj, self.k_proj, self.v_proj))
        out = context.attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v)   # (b, H, t, d)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class DecoderLayer(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = SwiGLU(c.hidden_size, c.intermediate_size, bias=False)

    def forward(self, x, cos, sin, context):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, context)
        return x + self.mlp(self.post_attention_layernorm(x))


@lru_cache                                      # a copy to the GPU at each token would halt it
def frequencies(d: int, theta: float, device):
    """Rotations a position (d/2,), computed on the CPU as transformers does."""
    return (1.0 / theta ** (torch.arange(0, d, 2, dtype=torch.float) / d)).to(device)


class Decoder(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(c, i) for i in range(c.num_hidden_layers)])
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def rope(self, position_ids, dtype):
        """M-RoPE: position_ids (3, B, T) of (time, height, width) -> cos, sin (B, 1, T, d). Section i of the
        frequencies turns with axis i mod 3."""
        inv_freq = frequencies(2 * sum(self.c.mrope_section), self.c.rope_theta, position_ids.device)
        angles = position_ids[..., None].float() * inv_freq                             # (3, B, T, d/2)
        parts = angles.split(self.c.mrope_section, dim=-1)
        angles = torch.cat([part[i % 3] for i, part in enumerate(parts)], dim=-1)       # (B, T, d/2)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(self, x, position_ids, context, remat: bool = False):
        """x (B, T, D) embeddings, context `Full` or `Rows` -> hidden states (B, T, D)."""
        cos, sin = self.rope(position_ids, x.dtype)
        for layer in self.layers:
            x = (checkpoint(layer, x, cos, sin, context, use_reentrant=False) if remat
                 else layer(x, cos, sin, context))
        return self.norm(x)


def mrope_positions(input_ids, attention_mask, grids: list, image_token_id: int, merge: int):
    """Positions (3, B, T) and the next free position (B,). Text advances all three axes by one; an image of
    h x w merged tokens keeps time fixed, counts rows and columns, and the text after it goes on at max(h, w).

    grids: (1, rows, cols) in patches for every image of the batch, in order. ValueError where the image
    tokens of a row do not match them."""
    ids, mask = input_ids.tolist(), attention_mask.tolist()
    positions = torch.ones(3, *input_ids.shape, dtype=torch.long)
    following, image = [], 0
    for b, row in enumerate(ids):
        at, t, columns = 0, 0, []
        real = [i for i, m in enumerate(mask[b]) if m]
        while t < len(real):
            if row[real[t]] != image_token_id:
                columns.append((at, at, at))
                at, t = at + 1, t + 1
                continue
            if image >= len(grids):
                raise ValueError(f"row {b}: more image tokens than the {len(grids)} images given")
            frames, h, w = grids[image][0], grids[image][1] // merge, grids[image][2] // merge
            n = frames * h * w
            if t + n > len(real) or any(row[i] != image_token_id for i in real[t:t + n]):
                raise ValueError(f"row {b}: image {image} needs {n} image tokens in a row, "
                                 "the prompt has fewer")
            columns += [(at + f, at + y, at + x) for f in range(frames) for y in range(h) for x in range(w)]
            at, t, image = at + max(h, w, frames), t + n, image + 1
        positions[:, b, real] = torch.tensor(columns, dtype=torch.long).view(-1, 3).T
        following.append(at)
    if image != len(grids):
        raise ValueError(f"{len(grids)} images given, but the image tokens are for {image}")
    return positions.to(input_ids.device), torch.tensor(following, device=input_ids.device)


class Qwen25VL(nn.Module):
    """The whole model. `forward` gives logits as transformers would; the pieces below serve sampler and
    trainer."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.visual = VisionTower(config)
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.remat = False          # activation checkpointing: recompute each layer in the backward pass
        self.graphs = False         # sample through CUDA graphs

    @property
    def head_weight(self):
        """Output embedding (V, D)."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def _remat(self):
        return self.remat and torch.is_grad_enabled()

    def prompt_hidden(self, input_ids, attention_mask, pixel_values, image_grid_thw, keep: bool = False):
        """Whole sequences -> (hidden (B, T, D), the `Full` context holding their keys if `keep`, next
        positions (B,))."""
        c = self.config
        grids = [] if image_grid_thw is None else image_grid_thw.tolist()
        positions, following = mrope_positions(input_ids, attention_mask, grids, c.image_token_id,
                                               c.v_merge_size)
        x = self.model.embed_tokens(input_ids)
        if pixel_values is not None:
            features = self.visual(pixel_values, image_grid_thw, self._remat())         # (M, D)
            x = x.masked_scatter((input_ids == c.image_token_id)[..., None], features.to(x.dtype))
        context = Full(attention_mask, keep)
        return self.model(x, positions, context, self._remat()), context, following

    def rows_hidden(self, input_ids, position_ids, context: Rows):
        """Text tokens (R, T) continuing their prompts -> hidden (R, T, D). position_ids (R, T)."""
        x = self.model.embed_tokens(input_ids)
        return self.model(x, position_ids[None].expand(3, -1, -1), context,
                          self._remat() and not context.grow)

    def next_hidden(self, token, position, context: Rows):
        """`rows_hidden` of one more real token a row: token, position (R, 1) -> hidden (R, 1, D)."""
        context.extend(torch.ones_like(token, dtype=torch.bool))
        return self.rows_hidden(token, position, context)

    def forward(self, input_ids, attention_mask=None, pixel_values=None, image_grid_thw=None):
        """input_ids (B, T), attention_mask (B, T), pixel_values (N, ...), image_grid_thw (images, 3), all as
        transformers' processor lays them out -> logits (B, T, V)."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden, _, _ = self.prompt_hidden(input_ids, attention_mask, pixel_values, image_grid_thw)
        return F.linear(hidden, self.head_weight)


# ------------------------------------------------------------------------------------------------------------
# Files: config.json, *.safetensors (one file or shards with an index), in the hub's names


def load_image_config(folder: Path) -> ImageConfig:
    """From preprocessor_config.json, or from where transformers 5 puts it: processor_config.json."""
    if not (folder / "preprocessor_config.json").is_file() and (folder / "processor_config.json").is_file():
        return ImageConfig.from_dict(read_json(folder / "processor_config.json").get("image_processor") or {})
    return ImageConfig.from_dict(read_json(folder / "preprocessor_config.json"))


def init_model(config: Config, seed: int = 0) -> Qwen25VL:
    """Random weights: matrices normal with `initializer_range`, biases zero, norms one."""
    model, rng = Qwen25VL(config), torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=config.initializer_range, generator=rng)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    return model


def load_model(path_or_id: str, device="cpu", dtype=torch.float32) -> Qwen25VL:
    """Build the model from a folder or hub id and load its safetensors. ValueError names every missing, extra
    or mis-shaped tensor before anything is allocated on `device`."""
    folder = resolve(str(path_or_id))
    with torch.device("meta"):
        model = Qwen25VL(Config.from_dict(read_json(folder / "config.json"), str(folder / "config.json")))
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    index = folder / "model.safetensors.index.json"
    files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    found, bad = {}, []
    for name in files:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: file is missing")
        try:
            with safe_open(folder / name, "pt") as f:
                for key in f.keys():
                    found[key] = (folder / name, tuple(f.get_slice(key).get_shape()))
        except SafetensorError as e:
            raise ValueError(f"{folder / name}: not a readable safetensors file: {e}") from None
    copied = model.config.tie_word_embeddings and found.pop("lm_head.weight", None)
    bad += [f"missing tensor {n}" for n in expected if n not in found]
    bad += [f"unexpected tensor {n}" for n in found if n not in expected]
    bad += [f"tensor {n} has shape {found[n][1]}, the config says {s}" for n, s in expected.items()
            if n in found and found[n][1] != s]
    if bad:
        raise ValueError(f"{folder}: {'; '.join(bad[:5])}"
                         + (f" and {len(bad) - 5} more" if len(bad) > 5 else ""))
    state = {}
    for path in sorted({path for path, _ in found.values()}):
        with safe_open(path, "pt", device=str(device)) as f:
            # a copy: where a tensor lies in the file decides its alignment, that the last bits of a matmul
            state.update({k: f.get_tensor(k).to(dtype, copy=True) for k in f.keys() if k in expected})
    if copied:                                  # some tied checkpoints store the head as well
        with safe_open(copied[0], "pt", device=str(device)) as f:
            if not torch.equal(f.get_tensor("lm_head.weight").to(dtype), state["model.embed_tokens.weight"]):
                raise ValueError(f"{copied[0]}: lm_head.weight differs from the embedding it is tied to")
    model.load_state_dict(state, assign=True)
    return model.train()


def save_model(model: Qwen25VL, folder, source, dtype=None, max_shard_bytes: int = 5 * 10 ** 9):
    """Write the weights in the hub's names and shards, beside the config, tokenizer and processor files of
    `source` (a folder or hub id), so that transformers' from_pretrained opens the folder. dtype None keeps
    the model's."""
    folder, source = Path(folder), resolve(str(source))
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() != source.resolve():
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copy(source / name, folder / name)
    shards, size = [{}], 0
    for name, p in model.named_parameters():
        tensor = p.detach().to("cpu", dtype or p.dtype).contiguous()
        if size + tensor.nbytes > max_shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    for old in [*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"]:
        old.unlink(missing_ok=True)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards):
        save_file(shard, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for s in shards for t in s.values())},
                 "weight_map": {key: name for name, shard in zip(names, shards) for key in shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")

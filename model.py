"""Qwen2.5-VL in plain PyTorch: configuration, images, vision tower, decoder, caches, files as on the hub.

Takes token ids and image patches, gives hidden states or logits: the policy. `rollout.py` samples from it,
`train.py` updates it. The paper's abstract names no architecture; we chose Qwen2.5-VL (arXiv 2502.13923):
tensor names and config keys are those of the published checkpoints, the logits those of transformers to
1e-4. Computed in another way: windows gather their patches by index; a context object does the attending, so
the layers know nothing of caches; a prompt is computed and stored once for its G samples.
Left out: video, dropout, sliding-window attention (off in published checkpoints).

Shapes: B prompts, G samples a prompt, R = B * G rows, T tokens, S tokens of a row so far, P prompt tokens,
V vocabulary, D width, H heads, K key/value heads, d head size, N image patches, M = N / 4 image tokens.

Worked example: an image of 300 x 200 pixels is resized to 308 x 196, multiples of 28: 22 x 14 patches, merged
to 11 x 7 = 77 image tokens. After 5 tokens of text these have the positions (time, row, column) =
(5, 5 .. 11, 5 .. 15), and the text after the image continues at 5 + 11 = 16.
"""
import json
import math
import re
import shutil
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict, snapshot_download
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---- What others wrote: files and flags

class InputError(ValueError):
    """Of a file or flag, which the message names."""


@contextmanager
def reading(where):
    """For foreign input: what fails inside is an InputError of one line that begins with `where`."""
    try:
        yield
    except Exception as e:              # whatever a library makes of it
        text = " ".join(str(e).split())[:1000] or type(e).__name__
        raise InputError(text if text.startswith(str(where)) else f"{where}: {text}") from None


def require(name: str, value, kind, low=0, high=0):
    """InputError, which begins with `name`, unless the value is of this type and a number within bounds (nan
    never is). kind tuple[...]: also a list, its items within bounds."""
    kinds = get_args(kind)
    if kinds and isinstance(value, (list, tuple)):
        for item in value:
            require(name, item, kinds[0], low, high)
        good = kinds[-1] is ... or len(value) == len(kinds)
    else:
        good = type(value) is kind or (kind is float and type(value) is int)
    if kind in (int, float):
        good, kind = good and low <= value <= high, f"{kind.__name__} from {low:,} to {high:,}"
    if kind is str:                                         # else it is no file name, or not in UTF-8
        good = good and not re.search("[\0\ud800-\udfff]", value)
    if not good:
        raise InputError(f"{name} {value!r:.60}: must be {getattr(kind, '__name__', kind)}")


BOUNDS = {"num_hidden_layers": (1, 1000), "v_depth": (1, 1000), "v_fullatt_block_indexes": (0, 1000),
          "image_token_id": (0, 10 ** 7), "initializer_range": (0, 10), "image_mean": (-10, 10)}


def fill(config_class, given: dict, where: str = ""):
    """A configuration from a JSON object, absent and null fields by default. ValueError names one without
    default or out of BOUNDS; those of other integers are 1 and 10^8, of other numbers 10^-12 and 10^12."""
    values = {}
    for field in fields(config_class):
        value = given.get(field.name)
        name = f"{where}: field {field.name.replace('v_', 'vision_config.', 1)!r}"
        if value is not None:
            default = (1e-12, 1e12) if "float" in str(field.type) else (1, 10 ** 8)
            require(name, value, field.type, *BOUNDS.get(field.name, default))
            values[field.name] = tuple(value) if isinstance(value, list) else value
        elif field.default is MISSING:
            raise ValueError(f"{name} is missing")
    return config_class(**values)


# ---- Configuration

@dataclass(frozen=True, kw_only=True)
class Config:
    """What the network needs of config.json, under its names; v_: of vision_config. Patch, window: pixels."""
    vocab_size: int                 # V
    hidden_size: int                # D
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int        # H
    num_key_value_heads: int        # K
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)      # frequencies of (time, row, column): d / 2
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    image_token_id: int
    v_depth: int
    v_hidden_size: int
    v_intermediate_size: int
    v_num_heads: int
    v_in_channels: int = 3
    v_patch_size: int
    v_temporal_patch_size: int = 2
    v_spatial_merge_size: int = 2
    v_window_size: int = 112
    v_fullatt_block_indexes: tuple[int, ...]        # the blocks with full instead of window attention

    @staticmethod
    def from_dict(c: dict, where: str = "config.json") -> "Config":
        """From the hub's config.json, flat (as published) or nested (as transformers 5 writes it). ValueError
        names the file and the field."""
        for part in ("text_config", "vision_config", "rope_parameters", "rope_scaling"):
            require(f"{where}: field {part!r}", c.get(part) or {}, dict)
        text, vision = c.get("text_config") or c, c.get("vision_config") or {}
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}    # the new name, the old name
        for name, value, supported in (
                ("model_type", c.get("model_type"), ["qwen2_5_vl"]),
                ("rope type", rope.get("rope_type") or rope.get("type") or "default", ["default", "mrope"]),
                ("use_sliding_window", text.get("use_sliding_window"), [False, None]),
                ("hidden_act", text.get("hidden_act", "silu"), ["silu"]),
                ("vision_config.hidden_act", vision.get("hidden_act", "silu"), ["silu"])):
            if value not in supported:
                raise ValueError(f"{where}: {name} is {value!r}; only {supported[0]!r} is supported")

        given = {**text, **rope, "image_token_id": c.get("image_token_id")}
        if text.get("num_key_value_heads") is None:
            given["num_key_value_heads"] = text.get("num_attention_heads")
        given["tie_word_embeddings"] = c.get("tie_word_embeddings", text.get("tie_word_embeddings"))
        given |= {f"v_{key}": value for key, value in vision.items()}
        c = fill(Config, given, where)
        for good, rule in (
                (vision.get("out_hidden_size", c.hidden_size) == c.hidden_size,
                 "vision_config.out_hidden_size must be the hidden_size"),
                (2 * sum(c.mrope_section) * c.num_attention_heads == c.hidden_size,
                 f"mrope_section {c.mrope_section} must sum to half the head size"),
                (c.num_attention_heads % c.num_key_value_heads == 0, "num_key_value_heads must divide them"),
                (c.image_token_id < c.vocab_size, "image_token_id must be below vocab_size"),
                (c.v_hidden_size % (4 * c.v_num_heads) == 0, "vision_config.num_heads must fit its size"),
                (c.v_in_channels == 3, "vision_config.in_channels must be 3"),
                (c.v_window_size >= c.v_patch_size * c.v_spatial_merge_size, "window_size holds no patch")):
            if not good:
                raise ValueError(f"{where}: {rule}")
        return c


# ---- Image preprocessing (Pillow and numpy only; parity with transformers' Qwen2VLImageProcessor)

@dataclass(frozen=True)
class ImageConfig:
    """preprocessor_config.json. `min_pixels`, `max_pixels`: bounds of the area after resizing."""
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @staticmethod
    def from_dict(c: dict, where: str = "preprocessor_config.json") -> "ImageConfig":
        c = c.get("image_processor") or c                       # of processor_config.json
        size, given = c.get("size") or {}, dict(c)
        for name, other in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            given[name] = size.get(other) if c.get(name) is None else c[name]
        return fill(ImageConfig, given, where)


def smart_resize(height: int, width: int, config: ImageConfig) -> tuple[int, int]:
    """The size (height, width) nearest to the given one, both sides multiples of a merge block, the area
    within bounds. Source: Qwen2-VL. ValueError for aspect ratios beyond 200."""
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"aspect ratio of a {width}x{height} image is beyond 200:1")
    factor = config.patch_size * config.merge_size
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > config.max_pixels:
        scale = math.sqrt(height * width / config.max_pixels)
        h = max(factor, math.floor(height / scale / factor) * factor)
        w = max(factor, math.floor(width / scale / factor) * factor)
    elif h * w < config.min_pixels:
        scale = math.sqrt(config.min_pixels / (height * width))
        h, w = math.ceil(height * scale / factor) * factor, math.ceil(width * scale / factor) * factor
    return h, w


def preprocess_image(image: Image.Image, config: ImageConfig) -> tuple[np.ndarray, tuple[int, int, int]]:
    """One RGB image -> (patches (N, C * temporal * patch * patch), grid (1, rows, columns) in patches).
    Patches are ordered by merge block, the four of a block beside each other."""
    p, m = config.patch_size, config.merge_size
    h, w = smart_resize(image.height, image.width, config)
    if (w, h) != image.size:
        image = image.resize((w, h), Image.Resampling.BICUBIC)
    x = np.asarray(image, dtype=np.float32) / 255.0                                     # (h, w, C)
    x = (x - np.array(config.image_mean, np.float32)) / np.array(config.image_std, np.float32)
    rows, cols = h // p, w // p
    x = x.reshape(rows // m, m, p, cols // m, m, p, 3)
    x = x.transpose(0, 3, 1, 4, 6, 2, 5)                            # (rows / m, cols / m, m, m, C, p, p)
    x = np.repeat(x[:, :, :, :, :, None], config.temporal_patch_size, axis=5)           # a still is 2 frames
    return np.ascontiguousarray(x.reshape(rows * cols, -1)), (1, rows, cols)


# ---- Building blocks and vision tower

class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, the root mean square taken in fp32."""

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotate(x, cos, sin):
    """Rotary embedding. x (..., d); cos, sin broadcastable to it; the pairs are (i, i + d/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


def run_layer(layer, checkpointing: bool, *args):
    """layer(*args); with `checkpointing` the backward pass computes its activations again: none are kept."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(layer, *args, use_reentrant=False)
    return layer(*args)


def vision_layout(grid_thw: list, merge: int, window: int, device):
    """Where the patches of all images lie. grid_thw: (1, rows, cols) an image; `window`: its side in patches.

    Returns (row and column of each patch (N, 2), full groups, window groups): groups are index tensors
    (n, L), n segments of equal length L that attend within themselves; each patch is in one of them."""
    places, image_ids = [], []
    for image, (_, h, w) in enumerate(grid_thw):
        place = torch.cartesian_prod(torch.arange(h), torch.arange(w))                  # (h * w, 2)
        place = place.view(h // merge, merge, w // merge, merge, 2).transpose(1, 2).reshape(-1, 2)  # by block
        places.append(place)
        image_ids.append(torch.full((h * w, 1), image))
    place, image_id = torch.cat(places), torch.cat(image_ids)                           # (N, 2), (N, 1)
    window_id = torch.cat((image_id, place // window), dim=1)                           # (N, 3)
    return place, segments(image_id, device), segments(window_id, device)


def segments(ids, device) -> list:
    """Indices of equal rows of ids, segments of equal length stacked -> list of (n, L) index tensors."""
    _, segment_of, counts = torch.unique(ids, dim=0, return_inverse=True, return_counts=True)
    by_length = {}
    for segment in torch.argsort(segment_of, stable=True).split(counts.tolist()):
        by_length.setdefault(len(segment), []).append(segment)
    return [torch.stack(group).to(device) for group in by_length.values()]


class VisionAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, cos, sin, groups):
        N, dim = x.shape
        q, k, v = self.qkv(x).view(N, 3, self.heads, -1).unbind(1)                      # (N, H, d) each
        q = rotate(q.float(), cos, sin).to(x.dtype)
        k = rotate(k.float(), cos, sin).to(x.dtype)
        out = torch.empty_like(v)
        for index in groups:                                                            # (n, L)
            q_group, k_group, v_group = (a[index].transpose(1, 2) for a in (q, k, v))   # (n, H, L, d)
            out[index] = F.scaled_dot_product_attention(q_group, k_group, v_group).transpose(1, 2)
        return self.proj(out.reshape(N, dim))


class VisionBlock(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.norm1 = RMSNorm(c.v_hidden_size, 1e-6)
        self.norm2 = RMSNorm(c.v_hidden_size, 1e-6)
        self.attn = VisionAttention(c.v_hidden_size, c.v_num_heads)
        self.mlp = SwiGLU(c.v_hidden_size, c.v_intermediate_size, bias=True)

    def forward(self, x, cos, sin, groups):
        x = x + self.attn(self.norm1(x), cos, sin, groups)
        return x + self.mlp(self.norm2(x))


class VisionTower(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c, self.merged_width = c, c.v_hidden_size * c.v_spatial_merge_size ** 2
        kernel = (c.v_temporal_patch_size, c.v_patch_size, c.v_patch_size)
        projection = nn.Conv3d(c.v_in_channels, c.v_hidden_size, kernel, bias=False)
        self.patch_embed = nn.ModuleDict({"proj": projection})
        self.blocks = nn.ModuleList([VisionBlock(c) for _ in range(c.v_depth)])
        mlp = nn.Sequential(nn.Linear(self.merged_width, self.merged_width), nn.GELU(),
                            nn.Linear(self.merged_width, c.hidden_size))
        self.merger = nn.ModuleDict({"ln_q": RMSNorm(c.v_hidden_size, 1e-6), "mlp": mlp})

    def forward(self, pixel_values, grid_thw, checkpointing: bool = False):
        """pixel_values (N, C * temporal * patch * patch), grid_thw (images, 3) -> image tokens (M, D)."""
        c, device = self.c, pixel_values.device
        # a window is a whole number of merge blocks
        window = c.v_window_size // c.v_spatial_merge_size // c.v_patch_size * c.v_spatial_merge_size
        place, full, windows = vision_layout(grid_thw.tolist(), c.v_spatial_merge_size, window, device)
        inv_freq = frequencies(c.v_hidden_size // c.v_num_heads // 2, 10000.0, "cpu")
        angles = (place[:, :, None].float() * inv_freq).flatten(1)                      # (N, d/2), rows first
        angles = torch.cat((angles, angles), dim=-1)[:, None].to(device)                # (N, 1, d)
        cos, sin = angles.cos(), angles.sin()
        weight = self.patch_embed["proj"].weight.flatten(1)     # stride = kernel: one linear map a patch
        x = F.linear(pixel_values.to(weight.dtype), weight)                             # (N, vision width)
        for i, block in enumerate(self.blocks):
            groups = full if i in c.v_fullatt_block_indexes else windows
            x = run_layer(block, checkpointing, x, cos, sin, groups)
        return self.merger["mlp"](self.merger["ln_q"](x).view(-1, self.merged_width))   # a merge block a row


# ---- Attention and its caches: context.attend(layer, q, k, v) of the new tokens -> (R, H, T, d), with q
# (R, H, T, d), k and v (R, K, T, d)

def sdpa(q, k, v, mask=None):
    """Grouped-query: k, v (R, K, S, d); mask broadcasts to (R, H, T, S), True = attend, None = causal."""
    rep = q.shape[1] // k.shape[1]
    if mask is not None and rep > 1:            # no fused CUDA kernel takes both a mask and grouped heads
        k, v, rep = k.repeat_interleave(rep, 1), v.repeat_interleave(rep, 1), 1
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=rep > 1)


def causal_mask(real, T: int):
    """real (R, S), False for padding -> (R, 1, T, S): what the last T tokens attend to."""
    S = real.shape[1]
    mask = torch.ones(T, S, dtype=torch.bool, device=real.device).tril(S - T) & real[:, None]
    mask.diagonal(S - T, 1, 2).fill_(True)      # padding too attends to itself: no NaN
    return mask[:, None]


class FullAttention:
    """Causal attention within whole sequences padded left or right: attention_mask (B, T). Keeps keys and
    values in kv: layer -> (k, v), each (B, K, T, d)."""

    def __init__(self, attention_mask, device):
        self.kv, self.mask = {}, None
        if not attention_mask[:, 0].all():              # else nothing real comes after padding
            self.mask = causal_mask(attention_mask.bool(), attention_mask.shape[1]).to(device)

    def attend(self, layer: int, q, k, v):
        self.kv.setdefault(layer, (k, v))               # with activation checkpointing a layer runs twice
        return sdpa(q, k, v, self.mask)


class SharedPrompt:
    """Rows that continue prompts computed once (training; gradients flow into both). prompt_kv: layer -> (k,
    v), each (B, K, P, d); prompt_mask (B, P), row_mask (R, T): False for padding; prompt_of_row (R,)."""

    def __init__(self, prompt_kv: dict, prompt_mask, prompt_of_row, row_mask):
        self.prompt_kv, self.prompt_mask, self.prompt_of_row = prompt_kv, prompt_mask.bool(), prompt_of_row
        self.mask = self.mask_rows(row_mask, row_mask.shape[1])

    def mask_rows(self, row_mask, T: int):
        """What the last T of the S tokens in row_mask (R, S) attend to: (R, 1, T, P + S)."""
        prompt = self.prompt_mask[self.prompt_of_row][:, None, None].expand(-1, 1, T, -1)
        return torch.cat((prompt, causal_mask(row_mask, T)), dim=3)

    def attend(self, layer: int, q, k, v):
        prompt_k, prompt_v = self.prompt_kv[layer]
        # index_select: the gradients of rows that share a prompt add up in a fixed order
        k = torch.cat((prompt_k.index_select(0, self.prompt_of_row), k), dim=2)         # (R, K, P + S, d)
        v = torch.cat((prompt_v.index_select(0, self.prompt_of_row), v), dim=2)
        return sdpa(q, k, v, self.mask)


class KVCache(SharedPrompt):
    """Sampling: G rows continue each of B prompts, row b * G + g is the g-th of prompt b. Keys and values go
    to buffers of `max_len` columns, all rows' into the same one: forced tokens are padded on the left."""

    def __init__(self, prompt_kv: dict, prompt_mask, group_size: int, max_len: int):
        B, device, self.G, self.len = len(prompt_mask), prompt_mask.device, group_size, 0
        self.row_mask = torch.zeros(B * group_size, max_len, dtype=torch.bool, device=device)
        self.kv = {}                                    # layer -> k and v (2, B, K, G, max_len, d)
        contiguous = {layer: (k.contiguous(), v.contiguous()) for layer, (k, v) in prompt_kv.items()}
        prompt_of_row = torch.arange(B, device=device).repeat_interleave(group_size)
        super().__init__(contiguous, prompt_mask, prompt_of_row, self.row_mask[:, :0])

    def extend(self, mask):
        """Announce the next T columns: mask (R, T), False where a row has padding."""
        T = mask.shape[1]
        self.row_mask[:, self.len:self.len + T] = mask
        self.len += T
        self.mask = self.mask_rows(self.row_mask[:, :self.len], T)

    def keep_prompts(self, indices):
        """Drop all prompts but these, with their rows."""
        self.prompt_kv = {layer: (k[indices], v[indices]) for layer, (k, v) in self.prompt_kv.items()}
        self.kv = {layer: kv[:, indices] for layer, kv in self.kv.items()}
        self.prompt_mask = self.prompt_mask[indices]
        self.row_mask = self.row_mask.unflatten(0, (-1, self.G))[indices].flatten(0, 1)
        self.prompt_of_row = self.prompt_of_row[:len(self.row_mask)]

    def attend(self, layer: int, q, k, v):
        T, max_len = q.shape[2], self.row_mask.shape[1]
        new = torch.stack((k, v)).unflatten(1, (-1, self.G)).transpose(2, 3)            # (2, B, K, G, T, d)
        if layer not in self.kv:
            self.kv[layer] = new.new_empty(*new.shape[:4], max_len, new.shape[5])
        kv = self.kv[layer][..., :self.len, :]          # (2, B, K, G, S, d): only what is written is read
        kv[..., -T:, :] = new
        if T == 1:
            return self.decode(layer, q, *kv)
        return super().attend(layer, q, *kv.transpose(2, 3).flatten(1, 2))              # k, v (R, K, S, d)

    def decode(self, layer: int, q, k, v):
        """One new token a row: q (R, H, 1, d), k and v (B, K, G, S, d) -> (R, H, 1, d). A group's queries
        meet its prompt's keys in one matmul, so these are read once a prompt, not once a row."""
        prompt_k, prompt_v = self.prompt_kv[layer]                                      # (B, K, P, d)
        (B, K, P, d), G, S = prompt_k.shape, self.G, self.len
        rep = q.shape[1] // K
        q = q.view(B, G, K, rep, d).transpose(1, 2).float() * d ** -0.5                 # (B, K, G, rep, d)
        on_prompt = q.reshape(B, K, G * rep, d) @ prompt_k.float().transpose(2, 3)      # (B, K, G * rep, P)
        on_own = q @ k.float().transpose(3, 4)                                          # (B, K, G, rep, S)
        scores = torch.cat((on_prompt.view(B, K, G, rep, P), on_own), dim=-1)
        scores = scores.masked_fill_(~self.mask.view(B, 1, G, 1, P + S), -torch.inf)
        weights = scores.softmax(-1).to(v.dtype)
        out = weights[..., :P].reshape(B, K, G * rep, P) @ prompt_v                     # (B, K, G * rep, d)
        out = out.view(B, K, G, rep, d) + weights[..., P:] @ v
        return out.transpose(1, 2).reshape(B * G, K * rep, 1, d)


# ---- Decoder

class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer, self.d = layer, c.hidden_size // c.num_attention_heads
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * self.d)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * self.d)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * self.d)
        self.o_proj = nn.Linear(c.num_attention_heads * self.d, c.hidden_size, bias=False)

    def forward(self, x, cos, sin, context):
        R, T, D = x.shape
        q = self.q_proj(x).view(R, T, -1, self.d).transpose(1, 2)                       # (R, H, T, d)
        k = self.k_proj(x).view(R, T, -1, self.d).transpose(1, 2)                       # (R, K, T, d)
        v = self.v_proj(x).view(R, T, -1, self.d).transpose(1, 2)
        out = context.attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v)   # (R, H, T, d)
        return self.o_proj(out.transpose(1, 2).reshape(R, T, D))


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
        """M-RoPE: position_ids (3, R, T) of (time, height, width) -> cos, sin (R, 1, T, d). Section i of the
        frequencies turns with axis i mod 3."""
        inv_freq = frequencies(2 * sum(self.c.mrope_section), self.c.rope_theta, position_ids.device)
        angles = position_ids[..., None].float() * inv_freq                             # (3, R, T, d/2)
        parts = angles.split(self.c.mrope_section, dim=-1)
        angles = torch.cat([part[i % 3] for i, part in enumerate(parts)], dim=-1)       # (R, T, d/2)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(self, x, position_ids, context, checkpointing: bool = False):
        """x (R, T, D) embeddings, position_ids (3, R, T), context -> hidden states (R, T, D)."""
        cos, sin = self.rope(position_ids, x.dtype)
        for layer in self.layers:
            x = run_layer(layer, checkpointing, x, cos, sin, context)
        return self.norm(x)


def mrope_positions(input_ids, attention_mask, grids: list, image_token_id: int, merge: int):
    """Positions (3, B, T) and the next free one (B,). Text advances all three axes by one; an image of h x w
    merged tokens keeps time fixed, counts rows and columns, and the text after it continues max(h, w) later.
    grids: (1, rows, cols) in patches of each image. ValueError where the image tokens do not match."""
    ids, mask = input_ids.cpu(), attention_mask.bool().cpu()
    positions = torch.ones(3, *ids.shape, dtype=torch.long)
    next_position, image = [], 0
    for b in range(len(ids)):
        row = ids[b, mask[b]].tolist()          # without padding
        done, free = [], 0                      # positions of the tokens so far, and the next free one
        while len(done) < len(row):
            t = len(done)
            if row[t] != image_token_id:
                done.append((free, free, free))
                free += 1
                continue
            if image >= len(grids):
                raise ValueError(f"row {b}: more image tokens than the {len(grids)} images given")
            h, w = grids[image][1] // merge, grids[image][2] // merge
            if row[t:t + h * w] != [image_token_id] * (h * w):
                raise ValueError(f"row {b}: image {image} needs {h * w} image tokens in a row, it has fewer")
            done += [(free, free + y, free + x) for y in range(h) for x in range(w)]
            free += max(h, w)
            image += 1
        positions[:, b, mask[b]] = torch.tensor(done, dtype=torch.long).view(-1, 3).T
        next_position.append(free)
    if image != len(grids):
        raise ValueError(f"{len(grids)} images given, but the image tokens are for {image}")
    return positions.to(input_ids.device), torch.tensor(next_position, device=input_ids.device)


class Qwen25VL(nn.Module):
    """The whole model. `forward` gives logits as transformers would; the rest serves sampler and training."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.visual = VisionTower(config)
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.activation_checkpointing = False   # True: less memory, each layer computed twice

    @property
    def head_weight(self):
        """Output embedding (V, D)."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def prompt_hidden(self, input_ids, attention_mask, pixel_values, image_grid_thw):
        """Whole sequences (arguments as for `forward`; on the CPU they do not halt a GPU) -> hidden
        (B, T, D), keys and values by layer, next positions (B,)."""
        c, device = self.config, self.head_weight.device
        grids = [] if image_grid_thw is None else image_grid_thw.tolist()
        positions, next_position = mrope_positions(input_ids, attention_mask, grids, c.image_token_id,
                                                   c.v_spatial_merge_size)
        input_ids = input_ids.to(device)
        x = self.model.embed_tokens(input_ids)
        if pixel_values is not None:
            pixels, is_image = pixel_values.to(device), input_ids == c.image_token_id
            features = self.visual(pixels, image_grid_thw, self.activation_checkpointing)           # (M, D)
            x = x.masked_scatter(is_image[..., None], features.to(x.dtype))
        context = FullAttention(attention_mask, device)
        hidden = self.model(x, positions.to(device), context, self.activation_checkpointing)
        return hidden, context.kv, next_position.to(device)

    def rows_hidden(self, input_ids, position_ids, context):
        """Text tokens (R, T) that continue their prompts, position_ids (R, T) -> hidden (R, T, D)."""
        x = self.model.embed_tokens(input_ids)
        positions = position_ids[None].expand(3, -1, -1)
        return self.model(x, positions, context, self.activation_checkpointing)

    def next_hidden(self, token, position, context: KVCache):
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


# ---- LoRA (arXiv 2106.09685): every matrix of the decoder's layers computes W x + alpha / r * B (A x)

class LoRALinear(nn.Linear):
    """A linear layer, frozen, with its adapter: A (r, in) random, B (out, r) zero, so it begins as it was."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, rng):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias, self.alpha, self.scale = base.weight, base.bias, alpha, alpha / r
        bound = base.in_features ** -0.5
        A = torch.empty(r, base.in_features).uniform_(-bound, bound, generator=rng)
        self.lora_A = nn.Parameter(A.to(self.weight))
        self.lora_B = nn.Parameter(self.weight.new_zeros(base.out_features, r))

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


def add_lora(model: Qwen25VL, r: int, alpha: float, seed: int = 0):
    """Freeze the model and give the decoder's layers adapters: they alone learn."""
    model.requires_grad_(False)
    rng = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in part.named_children():
                setattr(part, name, LoRALinear(linear, r, alpha, rng))


def without_lora(model: Qwen25VL) -> Qwen25VL:
    """The frozen model under the adapters: the same tensors, no copies."""
    with torch.device("meta"):
        base = Qwen25VL(model.config).requires_grad_(False)
    weights = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    base.load_state_dict(weights, assign=True)
    return base.eval()


def adapters(model: Qwen25VL) -> dict:
    """The adapters' matrices, by the names that PEFT and transformers' Qwen2.5-VL give them."""
    found = {}
    for name, p in model.named_parameters():
        if "lora_" in name:
            found[name.replace("model.", "base_model.model.model.language_model.", 1) + ".weight"] = p
    return found


# ---- Files: config.json, *.safetensors (one file or shards with an index), in the hub's names

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
              "special_tokens_map.json", "chat_template.json", "chat_template.jinja", "config.json",
              "generation_config.json", "preprocessor_config.json", "processor_config.json",
              "video_preprocessor_config.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def resolve(path_or_id: str) -> Path:
    """A local folder as it is, otherwise a hub id, downloaded. FileNotFoundError where it is neither."""
    path = Path(path_or_id)
    if path.is_dir():
        for file in map(path.joinpath, (*COMPANIONS, *ADAPTER_FILES)):
            if file.exists() and not file.is_file():        # opening a fifo would wait
                raise InputError(f"{file}: is not a regular file")
        return path
    if path_or_id.count("/") != 1 or path_or_id.startswith((".", "/")):
        raise FileNotFoundError(f"--model {path_or_id}: no such folder, nor a hub id of the form owner/name")
    patterns = ["*.safetensors", "*.safetensors.index.json", *COMPANIONS, *ADAPTER_FILES]
    with reading(f"--model {path_or_id}"):
        return Path(snapshot_download(path_or_id, allow_patterns=patterns))


def read_json(path: Path, parse=None):
    """A JSON object from a file, or parse(object, name of the file). ValueError names the file."""
    if not path.is_file():
        raise ValueError(f"{path}: file is missing")
    with reading(f"{path}: not JSON"):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected")
    with reading(path):
        return parse(value, str(path)) if parse else value


def load_image_config(folder: Path) -> ImageConfig:
    """From preprocessor_config.json, or from where transformers 5 puts it: processor_config.json."""
    old, new = folder / "preprocessor_config.json", folder / "processor_config.json"
    return read_json(new if new.is_file() and not old.is_file() else old, ImageConfig.from_dict)


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
    """Build the model from a folder or hub id and load its safetensors; an adapter is merged into its base.
    ValueError names what does not fit."""
    folder = resolve(str(path_or_id))
    if (folder / "adapter_config.json").is_file():
        return load_merged(folder, device, dtype)
    with torch.device("meta"):
        model = Qwen25VL(read_json(folder / "config.json", Config.from_dict))
    index, names, stored = folder / "model.safetensors.index.json", ["model.safetensors"], {}
    if index.is_file():
        with reading(f"{index}: field 'weight_map'"):
            names = sorted(set(read_json(index)["weight_map"].values()))
    for name in names:
        with reading(f"{folder}: weights {name!r}"):
            if (folder / name).parent != folder or not (folder / name).is_file():
                raise ValueError(f"{folder / name}: file is missing, or not one of {folder}")
            stored |= read_tensors(folder / name)
    # some tied checkpoints store the head as well
    head = stored.pop("lm_head.weight", None) if model.config.tie_word_embeddings else None
    # copies: where a tensor lies in the file decides its alignment, and so the last bits of a matmul
    state = {name: tensor.to(device, dtype, copy=True) for name, tensor in stored.items()}
    with reading(folder):                       # it names tensors that are missing, too many, of other shapes
        model.load_state_dict(state, assign=True)
    if head is not None and not torch.equal(head.to(device, dtype), model.head_weight):
        raise ValueError(f"{folder}: lm_head.weight differs from the embedding it is tied to")
    return model.train()


def read_tensors(file: Path) -> dict:
    """The tensors of a safetensors file, on the CPU: mapped into memory. Integers, nan, inf are refused."""
    with reading(f"{file}: not a readable safetensors file"):
        found = load_file(file)
    check_finite(found, file)
    return found


def check_finite(tensors: dict, where):
    """InputError names a tensor that is not all finite floating-point numbers."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise InputError(f"{where}: {name} is of {tensor.dtype} or holds numbers that are not finite")


def copy_companions(source: Path, folder: Path):
    """An adapter's folder may hold none: first come those of its base."""
    if (source / "adapter_config.json").is_file():
        copy_companions(resolve(read_json(source / "adapter_config.json")["base_model_name_or_path"]), folder)
    for name in COMPANIONS:
        if (source / name).is_file() and folder.resolve() != source.resolve():
            shutil.copy(source / name, folder / name)


# of a PEFT adapter; the vision tower has layers of the same names
LORA_SETTINGS = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0,
                 "target_modules": r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"}
UNUSED = dict.fromkeys(("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layer_replication",
                        "modules_to_save"), (None, False, {}, []))
# other kinds of init_lora_weights change the base as well
SUPPORTED_LORA = {"peft_type": ("LORA",), "init_lora_weights": (None, True, False, "gaussian"), **UNUSED}


def save_model(model: Qwen25VL, folder, source, dtype=None, max_shard_bytes: int = 5 * 10 ** 9):
    """Write weights in the hub's names and shards, beside the config, tokenizer and processor files of
    `source` (a folder or hub id), so that from_pretrained opens the folder. dtype None keeps the model's.
    Where there are adapters, these alone, as PEFT does, with `source` noted as their base."""
    folder, base, found = Path(folder), resolve(str(source)), adapters(model)
    parameters = found or dict(model.named_parameters())
    check_finite(parameters, folder)
    state = {name: p.detach().to("cpu", dtype or p.dtype) for name, p in parameters.items()}
    folder.mkdir(parents=True, exist_ok=True)
    copy_companions(base, folder)
    if not found:
        return save_torch_state_dict(state, folder, max_shard_size=max_shard_bytes)
    layer = model.model.layers[0].self_attn.q_proj
    source = str(base.resolve()) if Path(source).is_dir() else str(source)
    config = {**LORA_SETTINGS, "base_model_name_or_path": source, "r": len(layer.lora_A),
              "lora_alpha": layer.alpha}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    save_file(state, folder / "adapter_model.safetensors")


def load_adapter(model: Qwen25VL, folder: Path):
    """Fill the model's adapters from a folder. InputError where they are not the same matrices."""
    file, expected = folder / "adapter_model.safetensors", adapters(model)
    found = read_tensors(file)
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected or found[name].shape != expected[name].shape:
            raise InputError(f"{file}: {name} is missing, unknown or of another shape")
        expected[name].data.copy_(found[name])


def load_merged(folder: Path, device, dtype) -> Qwen25VL:
    """A plain model from an adapter's folder: W + alpha / r * B A, added in fp32. InputError for adapters
    of another form than `save_model` writes."""
    config, where = read_json(folder / "adapter_config.json"), f"{folder / 'adapter_config.json'}: field"
    base, r, alpha = (config.get(name) for name in ("base_model_name_or_path", "r", "lora_alpha"))
    require(f"{where} 'base_model_name_or_path'", base, str)
    require(f"{where} 'r'", r, int, 1, 4096)
    require(f"{where} 'lora_alpha'", alpha, float, 1e-6, 1e6)
    for name, supported in SUPPORTED_LORA.items():
        if config.get(name) not in supported:
            raise InputError(f"{where} {name!r} is {config.get(name)!r:.60}: not supported")
    if (resolve(base) / "adapter_config.json").exists():
        raise InputError(f"{where} 'base_model_name_or_path': {base} is an adapter itself, not supported")
    model = load_model(base, device, dtype)
    add_lora(model, r, alpha)
    load_adapter(model, folder)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            delta = layer.scale * layer.lora_B.float() @ layer.lora_A.float()
            layer.weight.data = (layer.weight.float() + delta).to(dtype)
    return without_lora(model).requires_grad_().train()

"""What turns text and images into tokens: a checkpoint's tokenizer, image settings and token rules.

Place in the pipeline: before rollout.py, which encodes prompts with it. Control tokens may not be generated:
`logit_mask` bans them, in the sampler and the trainer alike.
"""
from dataclasses import dataclass, replace

import torch

from model import Config, ImageConfig, load_image_config
from runtime.files import read_json, resolve


@dataclass
class Codec:
    """Tokenizer, image settings and token rules of one checkpoint."""
    tokenizer: object
    image_config: ImageConfig
    image_token_id: int
    eos_ids: tuple
    pad_id: int
    logit_mask: torch.Tensor            # (V,) float, 0 where a token may be generated, -inf where not
    specials: tuple                     # control tokens as text
    newline_ids: tuple                  # tokens that hold a line break


def load_codec(path_or_id: str, max_pixels: int = 0) -> Codec:
    """Read tokenizer and processor files of a checkpoint; `max_pixels` > 0 bounds images more tightly than
    the checkpoint does. ValueError names what is missing."""
    from transformers import AutoTokenizer
    folder = resolve(path_or_id)
    config = Config.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as e:
        raise ValueError(f"{folder}: no readable tokenizer: {str(e).splitlines()[0]}") from None
    image_id = config.image_token_id
    if (folder / "chat_template.json").is_file():           # where Qwen2.5-VL keeps the one that knows images
        tokenizer.chat_template = read_json(folder / "chat_template.json")["chat_template"]
    if not tokenizer.chat_template:
        raise ValueError(f"{folder}: neither chat_template.json nor the tokenizer has a chat template")
    if tokenizer.convert_tokens_to_ids("<|image_pad|>") != image_id:
        raise ValueError(f"{folder}: the tokenizer's <|image_pad|> is not "
                         f"image_token_id {image_id} of config.json")
    generation = folder / "generation_config.json"
    eos = ((read_json(generation) if generation.is_file() else {}).get("eos_token_id")
           or tokenizer.eos_token_id)
    eos = tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    if None in eos:
        raise ValueError(f"{folder}: neither generation_config.json nor the tokenizer names an eos token")
    mask = torch.zeros(config.vocab_size)
    mask[len(tokenizer):] = -torch.inf          # rows of the embedding that no token owns
    banned = (set(tokenizer.all_special_ids)
              | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special})
    mask[sorted(banned - set(eos))] = -torch.inf
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    image_config = load_image_config(folder)
    if max_pixels:
        image_config = replace(image_config, max_pixels=max_pixels)
    specials = tuple(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
    newlines = tuple(i for t, i in tokenizer.get_vocab().items() if "\n" in t or "\u010a" in t)  # byte level
    return Codec(tokenizer, image_config, image_id, eos, pad, mask, specials, newlines)

"""A small model with random weights behind Qwen's real vocabulary: what code must get through before a real
one.

    pip install --no-deps dashscope && python experiments/qwen_folder.py runs/qwen-random

Takes the 151,643 byte-pair ranks (Apache-2.0) that ship inside the package dashscope. Gives a folder in the
hub's form: tokenizer with Qwen2.5-VL's pre-tokenizer, control tokens and chat format, and 10 M random
weights. In this vocabulary ".\\n\\n" and ".</" are single tokens and a tag takes several. The merges, which
the ranks do not tell, are recovered: a token was merged of the two pieces that byte-pair encoding leaves of
it with lower ranks alone.

Worked example: " the" has rank 279; with ranks below that its bytes end up as " t" and "he": this is its
merge. """
import argparse
import base64
import json
import sys
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model as m  # noqa: E402

RANKS = "resources/qwen.tiktoken"
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")
CONTROL = ("endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
           "vision_start vision_end vision_pad image_pad video_pad").split()
WORDS = "<tool_call> </tool_call>".split() + [
    f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")]
CHAT = """{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{% if part.type == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SHAPE = {"vocab_size": 151936, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "image_token_id": 151655, "eos_token_id": 151645,
         "bos_token_id": 151643, "video_token_id": 151656, "vision_start_token_id": 151652,
         "vision_end_token_id": 151653}


def has_ranks() -> bool:
    return find_spec("dashscope") is not None


def read_ranks() -> dict[bytes, int]:
    """Each token's bytes and rank. SystemExit where the package is missing."""
    if not has_ranks():
        sys.exit("error: the vocabulary ships in a package: pip install --no-deps dashscope")
    ranks, file = {}, Path(find_spec("dashscope").origin).parent / RANKS
    for line in file.read_text().splitlines():
        token, _, rank = line.partition(" ")
        ranks[base64.b64decode(token)] = int(rank)
    return ranks


def pieces(token: bytes, ranks: dict) -> list[bytes]:
    """What byte-pair encoding with ranks below the token's own leaves of it."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        if ranks.get(parts[best] + parts[best + 1], len(ranks)) >= ranks[token]:
            break
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return parts


def byte_letters() -> dict[int, str]:
    """The printable letter that byte-level vocabularies write for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def write_tokenizer(folder: Path):
    ranks, letters = read_ranks(), byte_letters()
    vocabulary, merges = {}, []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        vocabulary["".join(map(letters.get, token))] = rank
        parts = pieces(token, ranks)
        if len(parts) == 2:
            merges.append(tuple("".join(map(letters.get, part)) for part in parts))
    tok = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tok.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Sequence([split, to_bytes]), decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in CONTROL])
    tok.add_tokens([AddedToken(word, special=False, normalized=False) for word in WORDS])
    tok.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
              "clean_up_tokenization_spaces": False, "model_max_length": 131072, "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    folder = parser.parse_args(argv).out
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    config = m.read_json(ROOT / "tiny" / "config.json") | SHAPE
    config["vision_config"]["out_hidden_size"] = config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643]}))
    (folder / "preprocessor_config.json").write_text((ROOT / "tiny" / "preprocessor_config.json").read_text())
    model = m.init_model(m.Config.from_dict(config))
    m.save_model(model, folder, folder)
    print(f"{sum(p.numel() for p in model.parameters()):,} random weights in {folder}")


if __name__ == "__main__":
    main()

"""Makes `tiktoken/`: a small made-up vocabulary in tiktoken's format, and the ids that tiktoken gives mixed text.

    python tests/golden/make_tiktoken.py write                       makes the folder
    python tests/golden/make_tiktoken.py check TOKENIZER FOLDER ...  a tokenizer.json made from it against tiktoken,
                                                                     for all text files below the folders

In an environment with tiktoken and tokenizers.
"""

import base64
import json
import pathlib
import random
import sys

import tiktoken
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).resolve().parent / "tiktoken"
TOKENS, MODEL = 700, 720  # ranks; ids of the model, the rest of them special
PATTERN = "|".join([  # as published by Moonshot
    r"""[\p{Han}]+""",
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
    r"""\p{N}{1,3}""", r""" ?[^\s\p{L}\p{N}]+[\r\n]*""", r"""\s*[\r\n]+""", r"""\s+(?!\S)""", r"""\s+"""])
TEXTS = [
    "The quick brown fox's den: it's 12345 steps AWAY, isn't it? I'LL go.\r\n\r\n  def f(x):\n\treturn x**2  # naïve\n",
    "深度学习模型 uses 注意力机制, 混合专家。東京タワー 한국어 텍스트 Ελληνικά Русский текст العربية हिन्दी ไทย",
    "café cafe\u0301 Ǆ ǅ ªº ʰ ⅷ ½ ²³ ٣٤٥ 😀👩‍👩‍👧 \u200b\u00a0\u3000\u0085 \ufeff tail   \n   \n",
    "<|im_end|> [BOS] HTTPServer XMLHttpRequest camelCase snake_case SCREAMING_CASE aaaaaaaaaa ababababa",
    "".join(chr(i) for i in range(0x20, 0x180)), "", " ", "\n", "'s'S'ſ", "a" * 200,
]


def write():
    text = " ".join(TEXTS) + " " + pathlib.Path(__file__).read_text()
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator([text], trainer)
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    bytes_of = {chr(b): b for b in printed} | {
        chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(printed)))}
    by_id = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    alphabet = by_id[:256]
    random.Random(0).shuffle(alphabet)  # ranks of single bytes are in no order
    by_id[:256] = alphabet
    ranks = {bytes(bytes_of[c] for c in token): rank for rank, (token, _) in enumerate(by_id)}
    HERE.mkdir(exist_ok=True)
    (HERE / "tiktoken.model").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in ranks.items()))
    named = {len(ranks): "[BOS]", len(ranks) + 1: "[EOS]", len(ranks) + 2: "<|im_end|>", len(ranks) + 5: "[PAD]"}
    (HERE / "tokenizer_config.json").write_text(json.dumps({
        "added_tokens_decoder": {str(i): {"content": t, "special": True} for i, t in named.items()},
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}, "bos_token": "[BOS]",
        "eos_token": "[EOS]", "pad_token": "[PAD]", "tokenizer_class": "TikTokenTokenizer"}, indent=2) + "\n")
    ids = [encoding().encode_ordinary(text) for text in TEXTS]
    (HERE / "expected.json").write_text(json.dumps(
        {"vocab_size": MODEL, "ranks": len(ranks), "texts": TEXTS, "ids": ids}) + "\n")


def encoding():
    lines = (HERE / "tiktoken.model").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    return tiktoken.Encoding("made up", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def check(path, folders) -> bool:
    ours, theirs = tokenizers.Tokenizer.from_file(path), encoding()
    ours.encode_special_tokens = True
    count = wrong = 0
    for file in sorted(p for folder in folders for p in pathlib.Path(folder).rglob("*") if p.is_file()):
        try:
            text = file.read_text()
        except (UnicodeDecodeError, OSError):
            continue
        count += len(text.encode())
        if ours.encode(text, add_special_tokens=False).ids != theirs.encode_ordinary(text):
            wrong += 1
            print(f"{file}: other ids")
    print(f"{count / 1e6:.1f} MB, {wrong} files with other ids")
    return not wrong


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write()
    else:
        sys.exit(0 if check(sys.argv[2], sys.argv[3:]) else 1)

"""Converts a tiktoken vocabulary, such as Moonlight's and Kimi's `tiktoken.model`, to a tokenizer.json.

In each piece matched by the pattern, tiktoken merges the pair whose joined bytes have the lowest rank, until none has a
rank. The `tokenizers` library does the same with a list of pairs: all pairs of each token, in the order of ranks.
"""

from __future__ import annotations

import base64
import binascii
import os
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from deepseek_jax import io, storage
from deepseek_jax.config import ConfigError, shown
from deepseek_jax.config.model import MOST
from deepseek_jax.data.tokenizer import BYTE_OF

FILE = "tiktoken.model"
_WORD = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE, _AFTER = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# As published next to the ranks: Chinese by itself, words by their case, digits by three, punctuation, white space.
PATTERN = "|".join([
    r"[\p{Han}]+", f"{_BEFORE}{_WORD[0]}*{_WORD[1]}+{_AFTER}", f"{_BEFORE}{_WORD[0]}+{_WORD[1]}*{_AFTER}",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])
_LETTER_OF = {byte: letter for letter, byte in BYTE_OF.items()}
_LONGEST = 1024  # bytes of a token; the published ones have up to a few hundred


def read(path: str) -> dict[bytes, int]:
    """{token: rank} from a file with a token in base64 and its rank on each line. Raises ConfigError."""
    try:
        with io.open_regular(path) as f:
            lines = f.read(io.MOST_JSON + 1).splitlines()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    ranks = {}
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            token = base64.b64decode(token, validate=True)
            if not 0 < len(token) <= _LONGEST or token in ranks or int(rank) != len(ranks):
                raise ValueError
        except (ValueError, binascii.Error):
            raise ConfigError(f"{path}, line {number}: {shown(line[:60])} is not a new token in base64 and the next "
                              f"rank, {len(ranks)}; fetch it again.") from None
        ranks[token] = len(ranks)
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking or len(ranks) > MOST["vocab_size"]:
        raise ConfigError(f"{path} has {len(ranks):,} tokens" + (
            f", none of them the byte {lacking[0]}; fetch it again." if lacking else ", more than a model may have."))
    return ranks


def tokenizer(ranks: dict[bytes, int], added: dict[int, dict[str, Any]], vocab_size: int) -> tokenizers.Tokenizer:
    """The tokenizer of these ranks.

    Args:
      added: `added_tokens_decoder` of tokenizer_config.json by id: {"content", "special"}, of ids after the ranks.
      vocab_size: of the model; unnamed ids up to it become reserved tokens, as in the published tokenizers.
    """
    spelled = {token: "".join(_LETTER_OF[byte] for byte in token) for token in ranks}
    merges = []
    for token in ranks:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = sorted((ranks[a], ranks[b], a, b) for a, b in pairs if a in ranks and b in ranks)
        merges += [(spelled[a], spelled[b]) for _, _, a, b in known]
    made = tokenizers.Tokenizer(models.BPE(vocab={spelled[token]: rank for token, rank in ranks.items()},
                                           merges=merges, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    # One at a time: the library gives ids in the order of the calls.
    for i in range(len(ranks), max(vocab_size, 1 + max(added, default=0))):
        about = added.get(i, {"content": f"<|reserved_token_{i}|>", "special": True})
        token = AddedToken(about["content"], special=about["special"], normalized=False)
        made.add_special_tokens([token]) if about["special"] else made.add_tokens([token])
    return made


def convert(source: str, folder: str, vocab_size: int) -> str:
    """Writes the tokenizer.json of `source`'s tiktoken.model, and its tokenizer_config.json, into `folder`.

    Returns:
      A line for the user.

    Raises:
      ConfigError: one of the two files is damaged, or names an id twice or beyond `vocab_size`.
    """
    path, about = os.path.join(source, FILE), os.path.join(source, "tokenizer_config.json")
    ranks = read(path)
    if len(ranks) > vocab_size:
        raise ConfigError(f"{path} has {len(ranks):,} ids, more than vocab_size={vocab_size:,}; fetch both again.")
    config = _config(about)
    added = _added(about, config, len(ranks), vocab_size)
    made = tokenizer(ranks, added, vocab_size)
    for i, token in added.items():
        if made.token_to_id(token["content"]) != i:
            raise ConfigError(f"{about}: added_tokens_decoder names {i} {shown(token['content'])}, which has "
                              "another id already; fetch it again.")
    io.write_text(os.path.join(folder, "tokenizer.json"), made.to_str(pretty=True))
    kept = {name: value for name, value in config.items() if name not in ("auto_map", "vocab_file")}
    io.write_json(os.path.join(folder, "tokenizer_config.json"), kept | {"tokenizer_class": "PreTrainedTokenizerFast"})
    return f"{path} became a tokenizer.json of {made.get_vocab_size(with_added_tokens=True):,} ids."


def _config(path):
    try:
        found = io.read_json(path) if storage.lexists(path) else {}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); fetch it again.") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a JSON object; fetch it again.")
    return found


def _added(path, config, first, vocab_size):
    """{id: {"content", "special"}} of the tokens that tokenizer_config.json adds to the ranks."""
    found = {}
    named = config.get("added_tokens_decoder") or {}
    for key, about in named.items() if isinstance(named, dict) else [(shown(named), None)]:
        about = about if isinstance(about, dict) else {}
        content, is_id = about.get("content"), key.isdecimal() and len(key) < 12
        is_text = isinstance(content, str) and content and not any("\ud800" <= c <= "\udfff" for c in content)
        if not (is_id and first <= int(key) < vocab_size and is_text):
            raise ConfigError(f"{path}: added_tokens_decoder names {shown(key)}: {shown(about)}, which is no token "
                              f"with an id from {first:,} on, the first after {FILE}, and below vocab_size="
                              f"{vocab_size:,}.")
        found[int(key)] = {"content": content, "special": about.get("special") is not False}
    return found

"""Untrusted folders: whatever their bytes, they load or are refused in one line that names the file, without delay."""

import copy
import json
import os
import pathlib
import random
import resource
import shutil
import signal

import pytest

from deepseek_jax.chat import template as chat_template
from deepseek_jax.config import ConfigError
from deepseek_jax.data.tokenizer import Tokenizer, train_tokenizer
from deepseek_jax.interop import load_hf, safetensors_io
from deepseek_jax.workdir import load_workdir_config
from tests.interop import checkpoints

HEAD = "lm_head.weight"
SECONDS, BYTES = 30, 2**30  # limit for any folder; most take milliseconds
# Values that JSON may have instead of a number, a string or a list.
VALUES = (None, True, -1, 0, 1, 3, 2**31, 10**9, 2**63, 10**400, 0.5, -1e308, float("nan"), float("inf"), "", "1",
          "\ud800", "a\nb\x1b[2J", "/etc/passwd", [], {}, [1], [[[]]], {"a": {}}, "x" * 10**5)


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "valid"
    shutil.copytree(checkpoints.golden("yarn_1.0"), folder)
    train_tokenizer(["some text, and more text\n"] * 3, 270).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"}, "add_bos_token": True,
        "chat_template": "{{ messages[0].content }}"}))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return folder


@pytest.fixture
def folder(valid, tmp_path):
    shutil.copytree(valid, tmp_path / "src")
    return tmp_path / "src"


def opened(folder):
    """The files of a folder that `serve --hf` reads."""
    tokenizer = Tokenizer.load(str(folder / "tokenizer.json"))
    load_hf(str(folder))
    chat_template.of_folder(str(folder), tokenizer)


def outcome(folder, what=opened) -> str | None:
    """The error message for a folder, None if it is valid; checks that it is one short line and comes in time."""
    def late(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        what(folder)
        return None
    except ConfigError as error:
        complaint = str(error)
    finally:
        signal.alarm(0)
    assert len(complaint) < 1000 and "\n" not in complaint and "\x1b" not in complaint
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began < BYTES / 1024
    return complaint


def places(value, path=()):
    """The path of every value inside a JSON value."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


def exchanged(value, rng):
    """A copy of a JSON value in which one part is replaced, removed or renamed."""
    value = copy.deepcopy(value)
    *above, last = rng.choice([path for path in places(value) if path])
    node = value
    for key in above:
        node = node[key]
    change = rng.randrange(8)
    if change == 0 and isinstance(node, dict):
        node["x"] = node.pop(last)
    elif change == 1:
        del node[last]
    else:
        node[last] = rng.choice(VALUES)
    return value


def torn(data, rng):
    """Bytes of which some are replaced, removed or repeated."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 20))):
        at = rng.randrange(len(data))
        change = rng.randrange(4)
        if change == 0:
            del data[at:]
        elif change == 1:
            data[at:at] = data[at:at + rng.randrange(1, 40)]
        else:
            data[at] = rng.choice((0, 255, data[at] ^ (1 << rng.randrange(8)), *b'"{}[]0,:'))
        if not data:
            return bytes(data)
    return bytes(data)


def with_header(folder, change):
    """Replaces the header of the weights with change(header), an object or its bytes."""
    path = pathlib.Path(folder, safetensors_io.SINGLE)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(json.loads(data[8:8 + length]))
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length:])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("seed", range(3))
def test_any_change_of_a_json_file_loads_or_gives_one_line(folder, name, seed):
    rng, path = random.Random(f"{name} {seed}"), folder / name
    original = path.read_bytes()
    for _ in range(15):
        path.write_bytes(torn(original, rng))
        outcome(folder)
        path.write_text(json.dumps(exchanged(json.loads(original), rng)))
        outcome(folder)


@pytest.mark.parametrize("seed", range(3))
def test_any_change_of_a_header_loads_or_gives_one_line(folder, seed):
    rng, path = random.Random(seed), folder / safetensors_io.SINGLE
    original = path.read_bytes()
    length = int.from_bytes(original[:8], "little")
    for _ in range(25):
        path.write_bytes(torn(original[:8 + length], rng) + original[8 + length:])
        outcome(folder)
        path.write_bytes(original)
        with_header(folder, lambda header: exchanged(header, rng))
        outcome(folder)


def deep(levels):
    return b'{"a": ' + b"[" * levels + b"]" * levels + b"}"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json",
                                  safetensors_io.INDEX])
@pytest.mark.parametrize("levels", [100, 10_000, 1_000_000])
def test_json_nested_too_deeply_is_named(folder, name, levels):
    (folder / name).write_bytes(deep(levels))
    assert name in (outcome(folder) or "")


def test_a_header_nested_too_deeply_is_named(folder):
    with_header(folder, lambda header: deep(10_000))
    assert "model.safetensors has no readable header" in (outcome(folder) or "")


def test_a_run_whose_config_is_nested_too_deeply_is_named(tmp_path):
    (tmp_path / "config.json").write_bytes(deep(10_000))
    assert "nested too deeply" in (outcome(tmp_path, lambda f: load_workdir_config(str(f))) or "")


@pytest.mark.parametrize("length", [0, 2**20, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_its_file_is_not_read(folder, length):
    path = folder / safetensors_io.SINGLE
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    assert "model.safetensors has no readable header" in (outcome(folder) or "")


def test_a_header_longer_than_any_is_not_read_even_where_its_file_is_as_long(folder):
    path = folder / safetensors_io.SINGLE
    path.write_bytes((2**34).to_bytes(8, "little") + path.read_bytes()[8:])
    os.truncate(path, 2**35)  # a hole, which takes no space on the disk
    assert "model.safetensors has no readable header" in (outcome(folder) or "")


@pytest.mark.parametrize(("fields", "words"), [
    ({"shape": [2**40, 2**40]}, "no readable header"), ({"shape": [-1, -5376]}, "no readable header"),
    ({"shape": [5376.0]}, "no readable header"), ({"shape": [True] * 8}, "no readable header"),
    ({"shape": [2] * 5000}, "no readable header"), ({"shape": [10**4000] * 8}, "no readable header"),
    ({"data_offsets": [-8, 0]}, "no readable header"), ({"data_offsets": [0, 2**62]}, "no readable header"),
    ({"data_offsets": [0]}, "no readable header"), ({"more": 1}, "no readable header"),
    ({"dtype": "F4"}, "has dtype 'F4'"), ({"dtype": ["F32"]}, r"has dtype ['F32']"),
    ({"shape": [10**12, 0, 7], "data_offsets": [0, 0]}, "which is empty"),
])
def test_what_a_header_says_of_a_tensor_is_checked_before_room_is_made_for_it(folder, fields, words):
    with_header(folder, lambda header: header | {HEAD: header[HEAD] | fields})
    assert words in (outcome(folder) or "")


def test_a_stack_of_more_experts_than_there_may_be_is_not_taken_apart(folder):
    many = 2**26
    header = {"model.layers.1.mlp.experts.down_proj": {
        "dtype": "F8_E4M3", "shape": [many, 1, 1], "data_offsets": [0, many]}}
    with_header(folder, lambda _: header)
    os.truncate(folder / safetensors_io.SINGLE, 8 + len(json.dumps(header)) + many)
    assert "does not fit its config.json" in (outcome(folder) or "")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "\ud800", "x" * 10**5])
def test_names_that_no_message_could_hold_are_refused(folder, name):
    with_header(folder, lambda header: header | {name: header.pop(HEAD)})
    assert "no readable header" in (outcome(folder) or "")


def test_metadata_that_no_export_could_write_are_refused(folder):
    with_header(folder, lambda header: header | {"__metadata__": {"format": "\ud800"}})
    assert "no readable header" in (outcome(folder) or "")


@pytest.mark.parametrize("fields", [
    {"num_hidden_layers": 10**9}, {"num_hidden_layers": -1}, {"num_hidden_layers": "3"}, {"hidden_size": 2**40},
    {"n_routed_experts": 10**9}, {"n_routed_experts": 10**400}, {"vocab_size": 2**40}, {"num_attention_heads": 10**9,
     "num_key_value_heads": 10**9}, {"num_hidden_layers": 4096, "n_routed_experts": 16384}, {"n_shared_experts": 10**9},
    {"num_nextn_predict_layers": "1"}, {"num_nextn_predict_layers": -1}, {"rope_theta": 10**400},
    {"routed_scaling_factor": float("nan")}, {"initializer_range": float("inf")}, {"hidden_size": [28]},
])
def test_numbers_that_no_model_has_are_refused_before_anything_is_made_of_them(folder, fields):
    raw = checkpoints.config(folder)
    (folder / "config.json").write_text(json.dumps(raw | fields))
    assert outcome(folder)


@pytest.mark.parametrize(("name", "value"), [
    ("factor", 1e300), ("beta_fast", 1e-300), ("beta_slow", 1e300), ("mscale_all_dim", -3.0),
    ("original_max_position_embeddings", 10**15), ("rope_theta", 1.0)])
def test_numbers_of_yarn_that_overflow_are_refused(folder, name, value):
    raw = checkpoints.config(folder)
    for dialect in ("rope_scaling", "rope_parameters"):
        if raw.get(dialect):
            raw[dialect][name] = value
    (folder / "config.json").write_text(json.dumps(raw))
    assert outcome(folder)


def test_a_config_that_names_a_key_twice_is_refused(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"hidden_size": 64, ', 1))
    assert "'hidden_size' is there twice" in (outcome(folder) or "")


def test_a_byte_order_mark_before_any_json_file_is_ignored(folder):
    for path in folder.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert outcome(folder) is None


def test_an_id_that_no_model_has_is_refused_before_tables_of_ids_are_made(folder):
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["added_tokens"][-1]["id"] = raw["model"]["vocab"]["<|fim_end|>"] = 2**32 - 1
    path.write_text(json.dumps(raw))
    assert "4,294,967,295" in (outcome(folder) or "")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                                  safetensors_io.SINGLE, safetensors_io.INDEX])
def test_a_named_pipe_is_refused_and_not_waited_for(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{name} cannot be read: Is a named pipe, not a file" in (outcome(folder) or "")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", safetensors_io.SINGLE, safetensors_io.INDEX])
def test_a_folder_in_the_place_of_a_file_is_named(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    assert name in (outcome(folder) or "")


def test_a_pipe_among_the_shards_is_named(tmp_path):
    folder = pathlib.Path(checkpoints.changed(tmp_path / "src", "plain", files=2))
    (folder / "model-00002-of-00002.safetensors").unlink()
    os.mkfifo(folder / "model-00002-of-00002.safetensors")
    complaint = outcome(folder, lambda f: load_hf(str(f)))
    assert "model-00002-of-00002.safetensors cannot be read: Is a named pipe, not a file" in (complaint or "")

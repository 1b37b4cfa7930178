"""The command lines, from a checkpoint folder to text and back."""

import importlib
import shlex
import sys

import numpy as np
import pytest

from deepseek_jax import convert, generate
from deepseek_jax.config import ConfigError, load_config
from deepseek_jax.data.tokenizer import train_tokenizer
from deepseek_jax.interop import save_hf
from deepseek_jax.workdir import load_workdir_config
from tests.model import naive

TEXT = "def value(self):\n    return print(other, 1234)\n\nclass While:\n    pass\n"
CFG = naive.tiny(vocab_size=300, num_layers=2, num_dense_layers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A complete checkpoint: FP8 weights, a tokenizer, a chat template."""
    path = tmp_path_factory.mktemp("hf") / "src"
    save_hf(str(path), CFG, naive.variables_of(CFG), fp8=True)
    train_tokenizer([TEXT], 300).save(str(path / "tokenizer.json"))
    return path


def run(monkeypatch, module, *words):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    return module.main()


def test_a_converted_checkpoint_says_what_the_folder_itself_says(tmp_path, monkeypatch, capsys, folder):
    ask = ("--prompt", "def value", "--max-new-tokens", 8)
    said = []
    for keep in ([], ["--keep-fp8"]):
        run(monkeypatch, convert, "from-hf", folder, tmp_path / f"run{len(keep)}", *keep)
        capsys.readouterr()
        run(monkeypatch, generate, "--workdir", tmp_path / f"run{len(keep)}", *ask)
        said.append(capsys.readouterr().out)
    run(monkeypatch, generate, "--hf", folder, *ask)
    said.append(capsys.readouterr().out)

    assert said[0].startswith("def value") and len(set(said)) == 1


def test_a_conversion_ends_with_commands_that_work(tmp_path, monkeypatch, capsys, folder):
    run(monkeypatch, convert, "from-hf", folder, tmp_path / "a run")
    said = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("  python")]

    names = [words[2].removeprefix("deepseek_jax.") for words in said]
    assert names == ["generate", "serve", "train"]
    for name, words in zip(names, said):
        monkeypatch.setattr(sys, "argv", words[2:])
        args = importlib.import_module(f"deepseek_jax.{name}").parse()
        if name == "train":
            args, overrides = args
            config = load_config(args.config, overrides)
            assert config.model == load_workdir_config(args.config[:-len("/config.json")]).model
            assert config.init.from_ == str(tmp_path / "a run")
        else:
            assert args.workdir == str(tmp_path / "a run")


def test_more_tokens_than_the_model_has_positions_are_one_line(tmp_path, monkeypatch, folder):
    run(monkeypatch, convert, "from-hf", folder, tmp_path / "run")
    for where in (("--hf", folder), ("--workdir", tmp_path / "run")):
        with pytest.raises(ConfigError, match="exceed the 4,096 positions"):
            run(monkeypatch, generate, *where, "--prompt", "def", "--max-new-tokens", 4096)


def test_to_hf_of_dequantized_weights_is_bfloat16_or_fp8_again(tmp_path, monkeypatch, folder):
    from tests.interop.checkpoints import config, tensors

    run(monkeypatch, convert, "from-hf", folder, tmp_path / "run")
    run(monkeypatch, convert, "to-hf", tmp_path / "run", tmp_path / "plain")
    run(monkeypatch, convert, "to-hf", tmp_path / "run", tmp_path / "fp8", "--fp8")

    name = "model.layers.1.mlp.experts.0.gate_proj.weight"
    plain, fp8, original = tensors(tmp_path / "plain"), tensors(tmp_path / "fp8"), tensors(folder)
    assert plain[name].dtype == "bfloat16" and "quantization_config" not in config(tmp_path / "plain")
    assert fp8.keys() == original.keys() and fp8[name].dtype == original[name].dtype
    scale = original[name + "_scale_inv"]
    np.testing.assert_allclose(fp8[name + "_scale_inv"], scale, rtol=0.01)
    assert (tmp_path / "fp8/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_folder_without_a_tokenizer_cannot_generate(tmp_path, monkeypatch):
    save_hf(str(tmp_path / "src"), CFG, naive.variables_of(CFG))

    with pytest.raises(ConfigError, match="there is no .*tokenizer.json"):
        run(monkeypatch, generate, "--hf", tmp_path / "src", "--prompt", "x")


@pytest.mark.parametrize("words", [(), ("from-hf",), ("from-hf", "a", "b", "--dtype", "int8"), ("up", "a", "b")])
def test_a_wrong_command_line_ends_in_one_line(monkeypatch, words):
    with pytest.raises(ConfigError) as error:
        run(monkeypatch, convert, *words)
    assert "\n" not in str(error.value) and "--help" in str(error.value)

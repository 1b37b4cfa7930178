"""Features of all commands: help with defaults, paths with a ~, suggestions for misspelled words."""

import re

import pytest

from deepseek_jax import cli
from deepseek_jax.config import ConfigError, DataConfig, DistillConfig, InitConfig, RolloutConfig


@pytest.fixture
def parser():
    made = cli.Parser("try", "Tries.")
    made.add_argument("--workdir", required=True)
    made.add_argument("--port", type=int, default=8000, help="of the server")
    made.add_argument("--depth", type=int, help="of drafts (default: the model's)")
    made.add_argument("--stop", action="append", default=[], help="ends a text")
    made.add_argument("--ema", action="store_true", help="of the weights")
    return made


def test_help_says_each_default_once(parser):
    text = " ".join(parser.format_help().split())
    assert "of the server (default: 8000)" in text and text.count("(default") == 2
    assert "of drafts (default: the model's)" in text and "ends a text --ema of the weights" in text


def test_a_tilde_in_a_path_is_the_users_folder_and_no_folder_of_that_name(parser, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert parser.parse_args(["--workdir=~/run"]).workdir == "/home/somebody/run"
    assert parser.parse_known_args(["--workdir", "~/run", "--other"])[0].workdir == "/home/somebody/run"
    assert InitConfig("~/run").from_ == "/home/somebody/run"


@pytest.mark.parametrize("address", ["gcs://bucket/run", "https://host/run", "hf://owner/data/*.parquet"])
def test_an_address_is_refused_before_a_folder_of_its_name_is_made(parser, address):
    for key, ask in (("--workdir", lambda: parser.parse_args([f"--workdir={address}"])),
                     ("init.from", lambda: InitConfig(address)), ("distill.from", lambda: DistillConfig(address)),
                     ("rollout.reward", lambda: RolloutConfig(reward=f"model:{address}")),
                     ("data.sources", lambda: DataConfig(sources=((address, 1.0),))),
                     ("data.cache_dir", lambda: DataConfig(cache_dir=address))):
        with pytest.raises(ConfigError, match=f"{key}={re.escape(address)} is an address, and only paths of this"):
            ask()


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3://bucket/run"])
def test_the_address_of_a_bucket_is_a_path(parser, address):
    assert parser.parse_args([f"--workdir={address}/"]).workdir == address == InitConfig(address).from_
    assert DataConfig(sources=((f"hf:{address}", 1.0),), cache_dir=address).cache_dir == address
    parser.add_argument("--prompts")
    with pytest.raises(ConfigError, match="--workdir=s3:/bucket/run has one slash .* write s3://bucket/run."):
        parser.parse_args(["--workdir=s3:/bucket/run"])
    with pytest.raises(ConfigError, match=f"--prompts={address} is an address, and only paths of this machine are"):
        parser.parse_args(["--workdir=run", f"--prompts={address}"])


def test_an_address_has_a_bucket_and_one_slash_between_its_parts(parser):
    assert parser.parse_args(["--workdir=gs://bucket//a///run//"]).workdir == "gs://bucket/a/run"
    for address in "gs://", "gs:///run", "s3://":
        scheme = address[:2]
        with pytest.raises(ConfigError, match=f"^--workdir={address} names no bucket; write {scheme}://BUCKET/NAME.$"):
            parser.parse_args([f"--workdir={address}"])


def test_a_misspelled_option_is_named_before_the_one_that_is_missing(parser, monkeypatch):
    monkeypatch.setattr("sys.argv", ["try", "--wrkdir=run", "--config.train.steps=3"])
    with pytest.raises(ConfigError, match="there is no --wrkdir; did you mean --workdir?"):
        parser.parse_known_args()
    monkeypatch.setattr("sys.argv", ["try", "--port", "1"])
    with pytest.raises(ConfigError, match="required: --workdir; see"):
        parser.parse_known_args()

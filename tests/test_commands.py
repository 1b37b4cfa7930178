"""Command lines: every mistake gives one line that says what would work, exit code 2 and no traceback."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests import runs

pytestmark = pytest.mark.slow  # complete runs and commands


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config file without a trained run."""
    return runs.write_config(tmp_path_factory.mktemp("commands"))


@pytest.fixture(scope="module")
def workdir():
    """The work directory of a finished run."""
    return runs.finished_run()[1]


def assert_only_error(result, *parts):
    result.assert_error(*parts)
    said = [line for line in result.err.strip().splitlines() if not line.startswith("training a tokenizer")]
    assert len(said) == 1, result


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--config, --workdir", "see python -m deepseek_jax.train --help"]),
        (["--config", "CONFIG"], ["the following arguments are required: --workdir"]),
        (["--config", "CONFIG", "--workdir"], ["argument --workdir: expected one argument"]),
        (["--config", "absent.py", "--workdir", "W"], ["no config file absent.py"]),
        (["--config", "CORPUS", "--workdir", "W"], ["no config file", "take one of distill", "small, tiny"]),
        (["CONFIG.train.stepz=3"], ["cannot read", "overrides look like --config.train.steps=50"]),
        (["--config.train.stepz=3"], ["unknown config key train.stepz; did you mean steps?"]),
        (["--config.trian.steps=3"], ["unknown config key trian; did you mean train?"]),
        (["--conf.train.steps=3"], ["cannot read '--conf.train.steps=3'"]),
        (["--config.train.steps", "3"], ["cannot read '--config.train.steps'"]),
        (["--config.train.steps=0"], ["train.steps=0 must be positive"]),
        (["--config.train.steps=ten"], ["train.steps='ten' should be int"]),
        (["--config.train.accumulation_steps=3"],
         ["accumulation_steps=3 does not divide batch_size=4; take one of [1, 2, 4]"]),
        (["--config.model.experts_per_token=5"], ["experts_per_token=5 asks for more than the 4 experts"]),
        (["--config.model.num_groups=3"], ["num_groups=3 does not divide num_experts=8; take one of [1, 2, 4, 8]"]),
        (["--config.model.rope_head_dim=7"], ["rope_head_dim=7 must be even"]),
        (["--config.model.yarn.factor=2"], ["model.yarn is None in this config"]),
        (["--config.model.vocab_size=100"], ["model.vocab_size=100 is too small"]),
        (["--config.data.sources=[('absent', 1)]"], ["data.sources: there is no absent"]),
        (["--config.data.sources=[('EMPTY', 1)]"], ["EMPTY has no file that can be read"]),
        (["--config.data.sources=[('BLANK', 1)]"], ["BLANK holds no text; give files with some"]),
        (["--config.data.sources=[('ONE', 1)]"], ["ONE holds one document, too few for training and validation"]),
        (["--config.init.from=absent"], ["absent holds no config.json; give the --workdir of a run"]),
        (["--workdir", "CONFIG"], ["config.py cannot be a folder", "is none; take another name"]),
    ],
    ids=lambda x: " ".join(x)[:60] if isinstance(x, list) else str(x))
def test_a_bad_training_is_one_line(config, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.chdir(tmp_path)
    for name, files in {"EMPTY": {}, "BLANK": {"a.txt": "", "b.py": ""}, "ONE": {"a.txt": "", "b.txt": "text"}}.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    whole = not arguments or arguments[0] == "--config"
    arguments = [a.replace("CONFIG", config).replace("CORPUS", os.path.dirname(config)) for a in arguments]

    result = runs.run("train", *([] if whole else ["--config", config, "--workdir", "W"]), *arguments)

    assert_only_error(result, *(part.replace("CONFIG", config) for part in parts))


def test_a_corpus_shorter_than_a_sequence_says_how_long_one_may_be(config, tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("ab" * i)
    result = runs.run("train", "--config", config, "--workdir", tmp_path / "W",
                      f"--config.data.sources=[('{tmp_path}/*.txt', 1)]", "--config.train.sequence_length=64")

    result.assert_error("fewer than the 65 of one sequence; add text or set train.sequence_length=")


@pytest.mark.parametrize(
    ("command", "arguments", "parts"),
    [
        ("evaluate", [], ["--workdir --hf is required", "see python -m deepseek_jax.evaluate --help"]),
        ("evaluate", ["--workdir", "absent"], ["absent holds no config.json; give the --workdir of a run"]),
        ("evaluate", ["--workdir", "RUN", "--dat", "x"], ["unrecognized arguments: --dat x"]),
        ("evaluate", ["--workdir", "RUN", "--data", "absent"], ["there is no absent"]),
        ("evaluate", ["--workdir", "RUN", "--data", "EMPTY"], ["no file that can be read"]),
        ("evaluate", ["--workdir", "CLAIMED"], ["CLAIMED holds no checkpoint"]),
        ("evaluate", ["--workdir", "BROKEN"], ["BROKEN/config.json is not JSON"]),
        ("evaluate", ["--workdir", "BYTES"], ["BYTES/config.json is not JSON"]),
        ("evaluate", ["--workdir", "LIST"], ["should be a section with keys"]),
        ("generate", ["--workdir", "RUN"], ["one of the arguments --prompt --prompts is required"]),
        ("generate", ["--workdir", "absent", "--prompt", "a"], ["absent holds no config.json"]),
        ("generate", ["--workdir", "CLAIMED", "--prompt", "a"], ["CLAIMED holds no checkpoint"]),
        ("generate", ["--workdir", "RUN", "--prompt", "a", "--max-new-tokens", "x"], ["invalid int value: 'x'"]),
        ("generate", ["--workdir", "RUN", "--prompt", "a", "--max-new-tokens=0"], ["tokens=0 must be positive"]),
        ("generate", ["--workdir", "RUN", "--prompt", "a", "--temperature=-1"], ["--temperature=-1.0 must be 0"]),
        ("generate", ["--workdir", "RUN", "--prompt", "a", "--temperature=nan"], ["--temperature=nan must be 0"]),
        ("generate", ["--workdir", "RUN", "--prompt", "a", "--seed=-1"], ["--seed=-1 must lie in [0, 2^32)"]),
        ("generate", ["--workdir", "RUN", "--prompt", "a\udce9"], ["--prompt is not UTF-8"]),
        ("generate", ["--workdir", "RUN", "--prompt", "a", "--top-p=0"], ["--top-p=0.0 must lie in (0, 1]"]),
        ("generate", ["--workdir", "RUN", "--prompt", "a", "--top-p=nan"], ["--top-p=nan must lie in (0, 1]"]),
        ("generate", ["--workdir", "RUN", "--prompt", "a", "--top-k=-1"], ["--top-k=-1 must be 0"]),
        ("generate", ["--workdir", "RUN", "--prompt", "a", "--stop="], ["--stop is empty"]),
        ("generate", ["--workdir", "RUN", "--prompt", "a", "--prompts", "b"], ["not allowed with argument --prompt"]),
        ("generate", ["--workdir", "RUN", "--prompts", "absent.txt"], ["absent.txt: No such file"]),
        ("generate", ["--workdir", "RUN", "--prompt", "a", "--chat-template-kwargs", "{}"], ["is for chats"]),
        ("generate", ["--workdir", "RUN", "--prompt", "a", "--top-k=99999999999"], ["less than 2^31"]),
        ("generate", ["--workdir", "RUN", "--prompt", "a", "--top-p=0.5"], ["change nothing at --temperature 0"]),
        ("generate", ["--workdir", "RUN", "--prompt", "a", "--top-k=5"], ["change nothing at --temperature 0"]),
        ("generate", ["--hf", "absent", "--prompt", "a"], ["there is no absent/tokenizer.json"]),
        ("compare", ["RUN"], ["two or more different runs"]),
        ("compare", ["RUN", "RUN/"], ["two or more different runs"]),
        ("compare", ["RUN", "absent"], ["absent holds no config.json"]),
        ("compare", ["RUN", "CLAIMED"], ["CLAIMED has no metrics yet"]),
    ],
    ids=lambda x: " ".join(x)[:60].encode("ascii", "replace").decode() if isinstance(x, list) else str(x))
def test_a_bad_question_to_a_run_is_one_line(workdir, tmp_path, monkeypatch, command, arguments, parts):
    monkeypatch.chdir(tmp_path)
    config = (workdir / "config.json").read_bytes()
    for name, content in {"CLAIMED": config, "BROKEN": config[:50], "BYTES": b"\xff\xfe", "LIST": b"[]"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes(content)
    (tmp_path / "EMPTY").mkdir()

    assert_only_error(runs.run(command, *(a.replace("RUN", str(workdir)) for a in arguments)), *parts)


def test_a_run_without_a_moving_average_says_how_to_get_one(workdir, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "run")
    for step in runs.checkpoints(copy):
        meta = json.loads((copy / f"checkpoints/{step}/meta.json").read_text())
        meta["leaves"] = {name: leaf for name, leaf in meta["leaves"].items() if not name.startswith("ema")}
        text = json.dumps(meta)
        (copy / f"checkpoints/{step}/meta.json").write_text(text)
        manifest = json.loads((copy / f"checkpoints/{step}/manifest.json").read_text())
        del manifest["files"]["meta.json"]
        (copy / f"checkpoints/{step}/manifest.json").write_text(json.dumps(manifest))

    assert_only_error(runs.run("generate", "--workdir", copy, "--prompt", "a", "--ema"), "keeps no moving average",
                      "--config.train.ema_decay=0.999")


def test_a_file_that_is_not_utf8_is_named_skipped_and_counted_and_the_run_goes_on(config, tmp_path):
    shutil.copytree(os.path.join(os.path.dirname(config), "corpus"), tmp_path / "corpus")
    (tmp_path / "corpus/latin.txt").write_bytes(b"caf\xe9")
    result = runs.run("train", "--config", config, "--workdir", tmp_path / "W", *runs.DENSE,
                      f"--config.data.sources=[('{tmp_path}/corpus', 1)]")

    assert result.code == 0, result
    assert result.err.count("skipped latin.txt: not UTF-8 (byte 3)") == 1
    meta, = (tmp_path / "W/cache").glob("shards-*/meta.json")
    assert json.loads(meta.read_text())["skipped"] == 1


def test_a_run_is_scored_as_its_last_evaluation_and_any_folder_can_be(workdir, tmp_path):
    last = runs.rows(workdir)[-1]
    own = runs.run("evaluate", "--workdir", workdir, "--json", tmp_path / "own.json")
    result = json.loads((tmp_path / "own.json").read_text())

    assert own.code == 0 and result["step"] == runs.STEPS, own
    assert [result[k] for k in ("loss", "bits_per_byte", "max_vio_global")] == pytest.approx(
        [last[k] for k in ("eval_loss", "eval_bits_per_byte", "max_vio_global")], rel=1e-5)
    (tmp_path / "words.txt").write_text("value_other(17):\n" * 50)
    scored = runs.run("evaluate", "--workdir", workdir, "--data", tmp_path / "words.txt", "--ema", "--compressors")
    assert scored.code == 0 and "bits_per_byte" in scored.out and "gzip_each" in scored.out


def test_a_prompt_is_continued_the_same_way_every_time(workdir):
    draw = lambda *more: runs.run("generate", "--workdir", workdir, "--prompt", "def ", "--max-new-tokens=5", *more)
    greedy, warm, again, other = (draw(*more) for more in ([], ["--temperature=1"], ["--temperature=1"],
                                                           ["--temperature=1", "--seed=1"]))

    assert greedy.code == 0 and greedy.out.startswith("def ") and len(greedy.out) > 6
    assert warm.out == again.out != other.out


def test_a_file_of_prompts_becomes_a_line_of_json_each_as_if_it_were_alone(workdir, tmp_path):
    (tmp_path / "prompts.txt").write_text("def \n\nclass \r\n", newline="")
    ask = ["generate", "--workdir", workdir, "--max-new-tokens=8"]
    alone = [runs.run(*ask, "--prompt", prompt).out[:-1] for prompt in ("def ", "class ")]

    result = runs.run(*ask, "--prompts", tmp_path / "prompts.txt")
    rows = [json.loads(line) for line in result.out.splitlines()]

    assert [row["prompt"] + row["text"] for row in rows] == alone and len(rows) == 2
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    assert "tokens in" in result.err


def test_a_chat_prints_the_answer_alone_and_a_stop_text_ends_it(workdir, tmp_path):
    ask = ["generate", "--workdir", workdir, "--max-new-tokens=12"]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "def "}]}))
    answer = runs.run(*ask, "--chat", "--prompt", "def ").out[:-1]
    (row,) = map(json.loads, runs.run(*ask, "--prompts", tmp_path / "chat.jsonl").out.splitlines())
    cut = runs.run(*ask, "--chat", "--prompt", "def ", "--stop", answer[3:5]).out[:-1]

    assert row["text"] == answer and len(answer) > 6 and row["messages"][0]["role"] == "user"
    assert cut == answer[:answer.index(answer[3:5])]


def test_a_chat_sets_names_of_its_template(workdir, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "run")
    (copy / "chat_template.jinja").write_text("{{ bos_token }}{{ 'def ' if thinking else messages[0].content }}")
    ask = ["generate", "--workdir", copy, "--max-new-tokens=8", "--prompt"]
    plain = runs.run(*ask, "def ").out
    assert plain == "def " + runs.run(*ask, "class", "--chat", "--chat-template-kwargs", '{"thinking": true}').out


def test_two_runs_side_by_side_show_where_they_differ_and_what_they_reached(workdir, tmp_path):
    other = shutil.copytree(workdir, tmp_path / workdir.name)  # two folders with the same name
    config = json.loads((other / "config.json").read_text())
    config["optimizer"]["learning_rate"] = 0.5
    (other / "config.json").write_text(json.dumps(config))

    result = runs.run("compare", workdir, other, "--plot", tmp_path / "both.png", "--json", tmp_path / "both.json")
    table = json.loads((tmp_path / "both.json").read_text())

    assert result.code == 0 and "optimizer.learning_rate" in result.out and "model.d_model" not in result.out
    rows = list(table.values())
    assert [row.pop("optimizer.learning_rate") for row in rows] == [0.01, 0.5] and rows[0] == rows[1]
    assert rows[0]["step"] == rows[0]["of"] == runs.STEPS and (tmp_path / "both.png").stat().st_size > 10_000
    last = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["bits_per_byte"] == [r["eval_bits_per_byte"] for r in last if "eval_loss" in r][-1]
    assert rows[0]["loss"] == pytest.approx(sum(r["loss"] for r in last if "loss" in r) / runs.STEPS)


def test_an_empty_prompt_begins_a_document(workdir):
    result = runs.run("generate", "--workdir", workdir, "--prompt", "", "--max-new-tokens=5")
    assert result.code == 0 and result.out.strip()


@pytest.mark.parametrize("name", sorted(runs.COMMANDS))
def test_help_shows_an_example_that_could_be_typed(name):
    result = runs.run(name, "--help")
    assert result.code == 0
    typed = f"    python -m deepseek_jax.{name} "
    example = next(line for line in result.out.splitlines() if line.startswith(typed))
    assert " run" in example
    assert all(f"--{word.split('=')[0].split()[0]}" in result.out for word in example.split(" --")[1:])


def test_a_mistake_costs_no_import_of_jax_and_reaches_the_shell_as_exit_code_2(config):
    code = ("import sys; sys.argv = ['train', '--config', sys.argv[1], '--workdir', 'W', '--config.train.steps=0']\n"
            "import atexit; atexit.register(lambda: print('jax' in sys.modules))\n"
            "from deepseek_jax import cli, train; cli.run(train.main)")
    done = subprocess.run([sys.executable, "-c", code, config], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr == "error: train.steps=0 must be positive.\n"

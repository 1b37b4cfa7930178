"""A batch is a function of the step alone: not of earlier steps, the number of hosts or restarts."""

import dataclasses
import json

import numpy as np
import pytest

from deepseek_jax.config import ConfigError, MeshConfig
from deepseek_jax.config.mesh import PipelineConfig
from deepseek_jax.data.loader import Loader, short_names
from deepseek_jax.data.prepare import prepare

FIELDS = ("tokens", "weights", "segment_ids", "active")


def assert_same(a, b):
    assert set(a) == set(b) == set(FIELDS)
    for name in FIELDS:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


def test_a_batch_is_a_function_of_step_alone(make_loader, folder):
    forward, backward = make_loader(folder), make_loader(folder)
    batches = {step: forward.batch(step) for step in range(8)}
    for step in reversed(range(8)):
        assert_same(backward.batch(step), batches[step])
    assert not np.array_equal(batches[0]["tokens"], batches[1]["tokens"])


def test_shapes_and_dtypes_are_those_promised(make_loader, folder):
    batch = make_loader(folder, batch_size=6, accumulation_steps=3).batch(0)
    assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
        "tokens": ("int32", (3, 2, 65)), "weights": ("float32", (3, 2, 65)), "segment_ids": ("int32", (3, 2, 65)),
        "active": ("int32", ())}
    assert not batch["weights"][..., 0].any() and (batch["weights"][..., 1:] == 1).all()
    assert (batch["segment_ids"][..., 0] == 1).all()


@pytest.mark.parametrize(("paths", "names"), [
    (["stdlib"], ["stdlib"]), (["/data/web/", "~/code"], ["web", "code"]),
    (["/data/a/text", "/data/b/text", "c"], ["a/text", "b/text", "c"]), (["/a/*.md", "/a/*.txt"], ["*.md", "*.txt"]),
    (["text", "/a/text"], ["text", "a/text"]), (["/text", "text"], ["/text", "text"]), (["a", "a/"], ["a", "a/"])])
def test_a_source_is_named_by_the_end_of_its_path_that_no_other_has(paths, names):
    assert short_names(paths) == names
    assert short_names(paths[::-1]) == names[::-1]


def in_stream_order(rows, loader):
    """Checks that `rows` are complete blocks of the stream's sequences, each once; returns their order."""
    stream = loader.streams[0].read(0, len(rows) * 64 + 1).tokens_T
    place = {stream[i * 64:i * 64 + 65].tobytes(): i for i in range(len(rows))}
    order = np.array([place[row.tobytes()] for row in rows])
    np.testing.assert_array_equal(np.sort(order), np.arange(len(rows)))
    return order


def test_an_epoch_of_steps_is_the_stream_shuffled(make_loader, folder):
    loader = make_loader(folder, batch_size=4, accumulation_steps=2)
    size = len(loader.streams[0].shard.tokens) // 64
    rows = np.concatenate([loader.batch(step)["tokens"].reshape(4, 65) for step in range(2 * size // 4 + 1)])
    order = in_stream_order(rows[:2 * size], loader)
    assert set(order[:size]) == set(range(size))  # the second epoch begins where the first one ends
    assert (np.abs(np.diff(order)) > 1).mean() > 0.9  # neighbours in a batch are not neighbours in a document
    assert not np.array_equal(order[:size], order[size:] - size)


def test_micro_batches_divide_the_same_rows(make_loader, folder):
    one, four = (make_loader(folder, accumulation_steps=m).batch(3)["tokens"].reshape(8, 65) for m in (1, 4))
    np.testing.assert_array_equal(one, four)


def test_hosts_partition_the_rows_of_every_micro_batch(make_loader, folder):
    fields = dict(batch_size=8, accumulation_steps=2)
    whole = make_loader(folder, **fields).batch(5)
    parts = [make_loader(folder, host=h, hosts=2, **fields).batch(5) for h in range(2)]
    for name in ("tokens", "weights", "segment_ids"):
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts], axis=1), whole[name])


def test_hosts_that_cannot_share_a_micro_batch_are_a_config_error(make_loader, folder):
    with pytest.raises(ConfigError, match="cannot be shared by 3 hosts"):
        make_loader(folder, hosts=3)


def test_the_ramp_fills_only_active_micro_batches_and_skips_no_row(make_loader, folder):
    loader = make_loader(folder, batch_size=8, accumulation_steps=4, ramp_from=2, ramp_until=0.3)
    batches = [loader.batch(step) for step in range(8)]
    active = [int(b["active"]) for b in batches]
    assert active == [1, 1, 2, 2, 3, 3, 4, 4]
    for batch, n in zip(batches, active):
        assert not any(batch[name][n:].any() for name in FIELDS[:3])
        assert batch["weights"][:n, :, 1:].all()
    rows = np.concatenate([b["tokens"][:n].reshape(-1, 65) for b, n in zip(batches, active)])
    np.testing.assert_array_equal(rows, [loader.sequence(g).tokens_T for g in range(len(rows))])


def test_the_ramp_of_a_pipeline_fills_the_first_micro_batches_of_a_round(make_config, folder, tmp_path):
    made = make_config(folder, batch_size=16)
    config = dataclasses.replace(made, mesh=MeshConfig(pipe=2), pipeline=PipelineConfig("dualpipe", 8),
                                 train=dataclasses.replace(made.train, ramp_from=8, ramp_until=0.3))
    prepared = prepare(config, str(tmp_path / "work"))
    hosts, rows, active = [Loader(config, prepared, host, 2) for host in range(2)], [], []
    for step in range(8):
        batch = {name: np.concatenate([x[name][0] for x in parts]) for parts in [[h.batch(step) for h in hosts]]
                 for name in FIELDS[:3]}
        active.append(int(hosts[0].batch(step)["active"]))
        assert not any(x[2 * active[-1]:].any() for x in batch.values())
        rows += list(batch["tokens"][:2 * active[-1]])
    assert active == [4, 4, 4, 6, 6, 6, 8, 8]
    np.testing.assert_array_equal(rows, [hosts[0].sequence(g).tokens_T for g in range(len(rows))])


def test_each_row_of_hosts_whose_devices_take_turns_is_the_sequence_of_its_place(make_config, folder, tmp_path):
    """Each host has two pieces of a batch, as on a torus: half of the micro-batches are the first half of the
    positions.
    """
    made = make_config(folder, batch_size=8)
    config = dataclasses.replace(made, mesh=MeshConfig(pipe=2), pipeline=PipelineConfig("1f1b", 8),
                                 train=dataclasses.replace(made.train, ramp_from=4, ramp_until=1.0))
    prepared, places = prepare(config, str(tmp_path / "work")), ([0, 1, 4, 5], [2, 3, 6, 7])
    whole = Loader(config, prepared).batch(0)
    assert int(whole["active"]) == 4 and whole["tokens"][0].any(axis=1).tolist() == 4 * [True] + 4 * [False]
    for host in range(2):
        own = Loader(config, prepared, host, 2, places[host]).batch(0)
        for name in FIELDS[:3]:
            np.testing.assert_array_equal(own[name], whole[name][:, places[host]])


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_iterating_from_the_middle_gives_the_batches_of_those_steps(make_loader, folder, prefetch):
    loader = make_loader(folder, prefetch=prefetch)
    seen = list(loader.iterate(13))
    assert [step for step, _ in seen] == list(range(13, 20))
    for step, batch in seen:
        assert_same(batch, loader.batch(step))


def test_iterating_from_the_end_gives_nothing(make_loader, folder):
    assert list(make_loader(folder).iterate(20)) == []


def test_sources_are_mixed_by_weight(make_loader, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(20):
            (tmp_path / name / f"{i}.txt").write_text(f"{name * 3}\n" * 200)
    loader = make_loader((str(tmp_path / "a"), 3.0), (str(tmp_path / "b"), 1.0), batch_size=1024, fim_rate=0.0)
    tokens = loader.batch(0)["tokens"][0]
    from_b = sum("bbb" in loader.tokenizer.decode(row) for row in tokens)
    assert from_b == 256


def test_fim_at_its_rate_reaches_the_batches(make_loader, folder):
    loader = make_loader(folder, batch_size=64, fim_rate=0.5, sequence_length=256)
    epoch = len(loader.streams[0].shard.tokens) // 256
    tokens = np.concatenate([loader.sequence(g).tokens_T[:-1] for g in range(epoch)])
    specials = [int((tokens == i).sum()) for i in (3, 4, 5)]
    assert max(specials) - min(specials) <= 1
    assert 0.4 < specials[0] / (tokens == 0).sum() < 0.6


def test_prompts_have_no_weight_and_answers_all(make_loader, tmp_path):
    rows = [{"prompt": f"question {i}?", "answer": f" answer {i}."} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loader = make_loader(tmp_path / "rows.jsonl", fim_rate=0.5)
    batch = loader.batch(0)
    scored = batch["weights"][0, :, 1:] > 0
    spelled = loader.tokenizer.decode(batch["tokens"][0, :, 1:][scored])
    assert "answer" in spelled and "question" not in spelled
    assert (batch["tokens"][0, :, 1:][~scored] != 1).all()  # every EOS is predicted
    assert 3 not in batch["tokens"]


def test_a_corpus_below_one_sequence_is_a_config_error(make_loader, tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("ab" * i)
    with pytest.raises(ConfigError, match=r"fewer than the 65 of one sequence; add text or set train") as error:
        make_loader(tmp_path)
    assert "\n" not in str(error.value)


def test_fim_without_its_tokens_is_a_config_error(make_loader, folder, tmp_path, trained):
    spelled = trained.backend.to_str().replace("<|fim_hole|>", "<|something|>")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "tokenizer.json").write_text(spelled)
    with pytest.raises(ConfigError, match=r"data\.fim_rate=0"):
        make_loader(folder)
    assert make_loader(folder, fim_rate=0.0).batch(0)["tokens"].any()


def test_batches_of_a_staged_run_are_functions_of_the_step_and_of_its_stage(make_loader, folder, own):
    other = own.data.sources[1][0]
    sources, later = ((folder, 1.0), (other, 0.0)), ((3, ((other, 2.0),)), (6, ((folder, 1.0), (other, 1.0))))
    first, second = make_loader(*sources, stages=later), make_loader(*sources, stages=later)
    batches = {step: first.batch(step) for step in range(8)}
    for step in reversed(range(8)):
        assert_same(second.batch(step), batches[step])
    alone = make_loader(folder)
    for step in range(3):
        assert_same(alone.batch(step), batches[step])
    given = first.mixture.given_before(first.position.sequences_before(first.config, 6))
    assert given == [3 * first.train.batch_size, 3 * first.train.batch_size]

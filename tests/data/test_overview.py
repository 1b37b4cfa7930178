"""The table of sources that a run prints at its start."""

import dataclasses

from deepseek_jax.data.overview import describe_sources
from deepseek_jax.data.prepare import prepare


def test_the_table_says_what_is_read_how_much_of_it_and_how_often(make_config, folder, tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.md").write_text(f"another source, document {i}\n" * 400)
    (tmp_path / "broken.md").write_bytes(b"\xff\xfe")
    (tmp_path / "notes.rst").write_text("not read")
    config = make_config((folder, 3.0), (str(tmp_path), 1.0))
    prepared = prepare(config, str(tmp_path / "work"))

    *table, note = describe_sources(config, prepared).splitlines()
    head, *rows = (line.split("  ") for line in table)
    assert note.startswith(f"note: {tmp_path}: 2 more files have other endings (.json, .rst) and are not read")
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert [cell.strip() for cell in head if cell.strip()] == [
        "source", "files", "MB", "skipped", "tokens", "held out", "share", "epochs"]
    train = config.train
    tokens = [len(shard.tokens) for shard in prepared.train]
    read = train.steps * train.batch_size * train.sequence_length
    for row, path, files, skipped, share, n, held in zip(
            cells, (folder, str(tmp_path)), ("40", "10"), ("0", "1"), (0.75, 0.25), tokens, prepared.validation):
        assert row[0] == path and row[1] == files and row[3] == skipped and row[6] == f"{share:.1%}"
        assert row[4:6] == [f"{n:,}", f"{len(held.tokens):,}"] and row[7] == f"{share * read / n:.2f}"


def test_the_share_of_a_source_is_that_of_all_stages_of_the_run(own, tmp_path):
    (first, _), (second, _) = own.data.sources
    data = dataclasses.replace(own.data, sources=((first, 1.0), (second, 0.0)), stages=(
        (5, ((first, 1.0), (second, 3.0))), (10, ((second, 1.0),)), (200, ((first, 1.0),))))
    config = dataclasses.replace(own, data=data)  # of 20 steps
    table = describe_sources(config, prepare(config, str(tmp_path / "work"))).splitlines()
    assert [line.split()[-2] for line in table[1:3]] == ["31.2%", "68.8%"]

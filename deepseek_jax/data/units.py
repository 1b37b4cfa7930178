"""A corpus divided into units for workers: some files each, or a stretch of a large file.

Units depend only on the names and sizes of the files, so the result is the same for any number of workers. A change to
how they are cut must raise `token_shards.FORMAT`, since existing parts would not fit the others.
"""

from __future__ import annotations

from collections.abc import Iterator

from deepseek_jax import storage
from deepseek_jax.data import array_record
from deepseek_jax.data.corpus import open_parquet, paths_of
from deepseek_jax.data.files import File, Stretch
from deepseek_jax.data.megatron import read_index

SMALLEST, LARGEST = 8 << 20, 1 << 30  # bytes of a unit: enough work to be worth a file, and what a restart may repeat
MOST = 1024  # units, unless they would be too large


def units(files: list[File]) -> list[list[File]]:
    """The files, or stretches of files, of each unit: about equally many bytes, in order."""
    sizes = [_size(file) for file in files]
    most = min(max(SMALLEST, -(-sum(sizes) // MOST)), LARGEST)
    made, room = [[]], most
    for file, size in zip(files, sizes):
        for piece, bytes in _pieces(file, size, most):
            if made[-1] and bytes > room:
                made.append([])
                room = most
            made[-1].append(piece)
            room -= bytes
    return made


def _size(file):
    try:
        return 0 if file.fault else sum(map(storage.size, paths_of(file)))
    except OSError:
        return 0  # will be skipped and named when it is read


def _pieces(file, size, most) -> Iterator[tuple[File, int]]:
    """The stretches of a file: of `most` bytes if it can be read from the middle, otherwise the complete file."""
    if size > most and file.name.endswith(".jsonl"):
        for start in range(0, size, most):
            stop = min(start + most, size)
            yield file._replace(stretch=Stretch(start, stop, int(start > 0))), stop - start
    elif size > most and file.name.endswith(".parquet"):
        yield from _row_groups(file, size, most)
    elif size > most and file.name.endswith(".idx"):
        yield from _numbered(file, size, most, lambda: len(read_index(file.path).first_D) - 1)
    elif size > most and array_record.ENDING.search(file.name):
        yield from _numbered(file, size, most, lambda: array_record.count_records(file.path))
    else:
        yield file, size


def _numbered(file, size, most, count_of):
    """Stretches of documents that are numbered."""
    try:
        count = count_of()
    except (OSError, ValueError):  # its reader reports that
        yield file, size
        return
    if not count:  # it is counted as a file that was read
        yield file, size
        return
    step = max(1, count * most // size)
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield file._replace(stretch=Stretch(start, stop, start)), size * (stop - start) // count


def _row_groups(file, size, most):
    try:
        with open_parquet(file.path) as opened:
            groups = [opened.metadata.row_group(i) for i in range(opened.num_row_groups)]
            rows = [group.num_rows for group in groups]
            bytes = [group.total_byte_size for group in groups]
    except (OSError, ValueError):  # damaged: its reader says so
        yield file, size
        return
    if not rows:  # it is counted as a file that was read
        yield file, size
        return
    start, scale = 0, size / max(sum(bytes), 1)  # to bytes on the disk
    while start < len(rows):
        stop = start + 1
        while stop < len(rows) and sum(bytes[start:stop + 1]) * scale <= most:
            stop += 1
        yield file._replace(stretch=Stretch(start, stop, sum(rows[:start]))), int(sum(bytes[start:stop]) * scale)
        start = stop


def count_lines(file: File) -> int:
    """The number of lines that start in a stretch of jsonl, by which rows of the next stretch are offset; 0 for other
    files."""
    if file.stretch is None or not file.name.endswith(".jsonl"):
        return 0
    start, stop, _ = file.stretch
    left, lines = stop - 1 - max(start - 1, 0), int(start == 0)
    try:
        with storage.open_file(file.path) as f:
            f.seek(max(start - 1, 0))
            while left > 0 and (data := f.read(min(left, 1 << 20))):
                lines, left = lines + data.count(b"\n"), left - len(data)
    except OSError:
        return 0  # will be skipped and named when it is read
    return lines


def number_rows(made: list[list[File]], lines: list[list[int]]) -> list[list[File]]:
    """The units with the number of the first row of each stretch. lines: `count_lines` of each file of each unit."""
    row, numbered = 0, []
    for unit, counts in zip(made, lines):
        numbered.append([])
        for file, count in zip(unit, counts):
            if count and file.stretch is not None:
                row = 0 if file.stretch.start == 0 else row
                file = file._replace(stretch=file.stretch._replace(row=row))
                row += count
            numbered[-1].append(file)
    return numbered

"""Conversion of files: a Hugging Face checkpoint into a work directory, and back.

Streams pieces of single tensors through a few threads: read, dequantize, transpose, write, flush. The result is
a checkpoint at step 0 of a run that was never trained, the checkpoint's own tokenizer, and `hf_layout.json`, which
records the dtype and file of every tensor so that an export is exact.
"""

import collections
import concurrent.futures
import contextlib
import os
import shlex
import threading

import jax.numpy as jnp
import numpy as np
import tqdm

from deepseek_jax import io, storage
from deepseek_jax.chat.template import keep_built_in
from deepseek_jax.checkpoint import manifest
from deepseek_jax.checkpoint.adapters import base_of, stored
from deepseek_jax.checkpoint.arrays import Stored, Writer
from deepseek_jax.checkpoint.format import read_meta, write_meta
from deepseek_jax.checkpoint.manager import find_checkpoint
from deepseek_jax.config import Config, ConfigError, as_dict, freeze
from deepseek_jax.data.tokenizer import COMPANIONS, Tokenizer
from deepseek_jax.interop import hf_config, ranks, safetensors_io, save
from deepseek_jax.interop.load import Checkpoint
from deepseek_jax.interop.tensor_map import SCALE

LAYOUT = "hf_layout.json"
GENERATION = "generation_config.json"
# Files that are copied unchanged in both directions.
TEXT = ("tokenizer.json", *COMPANIONS)
THREADS = 4  # pieces in flight, some waiting for the disk; each needs about five times tensor_map.PIECE of memory


def from_hf(src: str, dst: str, dtype: str | None = None, keep_fp8: bool = False, without_mtp: bool = False,
            files: str | None = None) -> list[str]:
    """Converts a Hugging Face checkpoint into the work directory `dst`, which is committed atomically.

    Args:
      dtype: "float32" or "bfloat16"; None: as in the files, bfloat16 for FP8, int4 and float16.
      keep_fp8: FP8 weights keep their bytes and scales, and are dequantized when they are read.
      without_mtp: leaves MTP modules out.
      files: which checkpoint of a folder that holds two: a .safetensors file, or an index.

    Returns:
      Lines for the user.

    Raises:
      ConfigError: what is wrong with either side; nothing is left at `dst`.
    """
    manifest.check_name(dst)
    with save.building(dst) as partial, contextlib.ExitStack() as stack:
        source = Checkpoint(src, without_mtp, files)
        stack.callback(source.reader.close)
        if keep_fp8 and source.halves:
            raise ConfigError("--keep-fp8 keeps rows as stored, but rope_interleave=false needs them in another order; "
                              "omit --keep-fp8.")
        asked = None if dtype is None else np.dtype(jnp.dtype(dtype))
        text = _text(src, dst, partial, source.cfg.vocab_size)  # fails within seconds, so it comes before the weights
        _write_checkpoint(source, storage.as_path(partial) / "checkpoints", asked, keep_fp8)
        wide = source.dtype_of("params/embedding", asked).itemsize > 2
        cfg = hf_config.read(source.raw, source.cfg.mtp_depth, "float32" if wide else "bfloat16")
        held = {file: [_described(source.reader, name) for name in names] for file, names in
                source.reader.files.items()}
        io.write_json(os.path.join(partial, LAYOUT), {
            "config": source.raw, "files": held, "metadata": source.reader.metadata}, indent=None, sync=True)
        io.write_json(os.path.join(partial, "config.json"), as_dict(Config(model=cfg)))  # last: it makes a run of it
        notes = [*source.notes, *source.rounding(asked), *text]
    run = shlex.quote(dst)
    return [*notes, f"{dst} is a work directory. Next, one of",
            f"  python -m deepseek_jax.generate --workdir {run} --prompt TEXT",
            f"  python -m deepseek_jax.serve --workdir {run}",
            f"  python -m deepseek_jax.train --config {run}/config.json --workdir tuned --config.init.from={run}"]


def _text(src, dst, partial, vocab_size) -> list[str]:
    """Copies the tokenizer and its companions, or makes them of tiktoken's ranks. Lines for the user."""
    if _copy_text(src, partial):
        keep_built_in(src, partial)
        return []
    if storage.lexists(os.path.join(src, ranks.FILE)):
        return [ranks.convert(src, partial, vocab_size)]
    return [f"{src} has no tokenizer.json; put one into {dst} before you evaluate or generate there."]


def to_hf(src: str, dst: str, fp8: bool = False, dtype: str | None = None, merge: bool = False) -> list[str]:
    """Writes the newest checkpoint of the work directory `src` as a Hugging Face checkpoint in the folder `dst`.

    Args:
      fp8: quantizes what the released checkpoints hold in FP8.
      dtype: "float32" or "bfloat16", of all else but the routing biases. None: that of the checkpoint which this one
        was converted from, or fine-tuned from; a run that came from none goes out as it is held, in float32.
      merge: adds the adapters that a run trained to the weights of its base.

    Returns:
      Lines for the user.

    Raises:
      ConfigError: no checkpoint in `src`, `dst` exists, or no published model family has what the model has.
    """
    cfg, leaves = _leaves(src, merge)
    layout = None
    if storage.exists(os.path.join(src, LAYOUT)):
        layout = _json(os.path.join(src, LAYOUT))
        if not hf_config.same_model(cfg, hf_config.read(layout["config"], cfg.mtp_depth)):
            layout = None  # the config was changed since: another model
    origin = _origin(src) or {}
    if layout is None and dtype is None:
        dtype = next((origin[name] for name in ("dtype", "torch_dtype") if origin.get(name) in ("bfloat16", "float32")),
                     None)
    scales = (origin.get("quantization_config") or {}).get("scale_fmt")
    with save.building(dst) as partial:
        source = save.Export(cfg, leaves, fp8, layout, None if dtype is None else jnp.dtype(dtype), scales == "ue8m0")
        items = [item for items in source.files().values() for item in items]
        total = sum(item.nbytes for item in items)
        special = None if layout else _special(src, origin)
        has_tokenizer = _copy_text(src, partial)
        if layout is None and has_tokenizer:
            _describe_tokenizer(partial, special or {})
        with tqdm.tqdm(total=total, desc="to-hf", unit="B", unit_scale=True) as bar:
            save.export(partial, source, special, bar.update)  # last: its config.json makes a checkpoint of it
    sizes = collections.Counter()
    for item in items:
        sizes[item.dtype.name] += item.nbytes
    size = f"{total / 1e9:,.2f} GB" if total >= 1e8 else f"{total / 1e6:,.2f} MB"
    return [f"{dst} holds {size}, mostly {sizes.most_common(1)[0][0]}. Next: transformers, or python -m "
            f"deepseek_jax.serve --hf {dst}" + ("." if has_tokenizer else ", once it holds a tokenizer.json.")]


def _origin(workdir: str) -> dict | None:
    """The config.json of the Hugging Face checkpoint that a run was converted or fine-tuned from; None: of none that is
    still there."""
    seen = set()
    while workdir not in seen and storage.is_file(os.path.join(workdir, "config.json")):
        seen.add(workdir)
        if storage.is_file(os.path.join(workdir, LAYOUT)):
            return _json(os.path.join(workdir, LAYOUT))["config"]
        workdir = freeze(_json(os.path.join(workdir, "config.json"))).init.folder or ""
    return None


def _described(reader, name):
    tensor = reader.stacked.get(name) or reader.tensors[name]
    # Four bits come in as bfloat16, and go out so.
    return name, safetensors_io.SPELLED.get(tensor.dtype, "BF16"), tensor.shape


def _describe_tokenizer(folder, special):
    """Names the tokens that begin and end a text, if no file there does yet."""
    if not storage.is_file(os.path.join(folder, GENERATION)):
        io.write_json(os.path.join(folder, GENERATION), special)
    path = os.path.join(folder, "tokenizer_config.json")
    if not storage.is_file(path):
        tokenizer = Tokenizer.load(os.path.join(folder, "tokenizer.json"))
        spelled = {f"{role}_token": tokenizer.backend.id_to_token(getattr(tokenizer, role)) for role in ("bos", "eos")}
        io.write_json(path, {"tokenizer_class": "PreTrainedTokenizerFast"} | spelled)


def _copy_text(src, dst) -> bool:
    """Copies tokenizer and chat template as they are. Whether there was a tokenizer."""
    for name in TEXT:
        if storage.is_file(os.path.join(src, name)):
            storage.copy(os.path.join(src, name), os.path.join(dst, name))
    return storage.is_file(os.path.join(dst, TEXT[0]))


def _special(workdir, origin):
    """The ids that config.json names: of the tokenizer's special tokens, or all that end a text in the checkpoint that
    the run began from."""
    path = os.path.join(workdir, TEXT[0])
    if not storage.is_file(path):
        return None
    tokenizer = Tokenizer.load(path)
    settings = os.path.join(workdir, GENERATION)
    stated = _json(settings) if storage.is_file(settings) else {}
    ends = next((held["eos_token_id"] for held in (stated, origin) if isinstance(held, dict)
                 and held.get("eos_token_id") is not None), tokenizer.eos)
    return {"bos_token_id": tokenizer.bos, "eos_token_id": ends}


def _json(path):
    try:
        return io.read_json(path)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); restore it from a backup.") from None


def _leaves(workdir, merge=False):
    """-> (ModelConfig, {path: Stored or Merged}) of the newest checkpoint, converted or trained."""
    path = os.path.join(workdir, "config.json")
    if not storage.is_file(path):
        raise ConfigError(f"{workdir} holds no config.json; give a work directory of train or of convert from-hf.")
    config = freeze(_json(path))
    if config.preference.objective == "reward":
        raise ConfigError(f"{workdir} is a reward model, whose head no published format has; give a run that writes "
                          f"text, such as the one that it began from, {config.init.from_}.")
    manifest.check_name(workdir)
    newest = find_checkpoint(workdir)
    if (base_of(newest) is not None) != merge:
        raise ConfigError(f"{workdir} holds adapters, which no published checkpoint has; add --merge." if not merge else
                          f"{workdir} holds all weights of its model; leave out --merge.")
    files = manifest.files_of(newest)
    router = {name: Stored(newest, leaf, files, name) for name, leaf in read_meta(newest)["leaves"].items()
              if name.startswith("router/")}
    return config.model, stored(newest) | router


def _write_checkpoint(source, directory, dtype, keep_fp8):
    """Writes DIRECTORY/0: zarr folders, meta.json, and the manifest that makes it count."""
    partial = manifest.begin(directory, 0)
    storage.make_folder(partial)
    prints, leaves, jobs = {}, {}, []
    for path, entries in source.leaves.items():
        held = source.dtype_of(path, dtype)
        if keep_fp8 and source.keeps_fp8(path):
            leaves[path] = _describe_kept(source, path, held)
            jobs += _kept_jobs(source, partial, path, entries, leaves[path], prints)
        else:
            leaves[path] = {"shape": source.shapes[path], "dtype": held.name, "zarr": f"state/{_folder(path)}"}
            jobs += _jobs(source, partial, path, entries, leaves[path], prints)
    # In the order of the bytes in the files.
    jobs.sort(key=lambda job: (source.tensors[job[0]].file, source.tensors[job[0]].offset))
    with tqdm.tqdm(total=sum(job[1] for job in jobs), desc="from-hf", unit="B", unit_scale=True) as bar:
        _run(jobs, bar.update)
    write_meta(partial, 0, {"step": 0, "sequences": 0, "from": "Hugging Face"}, leaves)
    manifest.commit(partial, directory / "0", prints)


def _folder(path):
    return path.replace("/", ".")


def _describe_kept(source, path, dtype):
    inputs = source.leaves[path][0].transform.inputs
    return {"shape": source.shapes[path], "dtype": dtype.name, "zarr": f"state/{_folder(path)}.values",
            "scales": f"state/{_folder(path)}.scales", "inputs": inputs}


def _jobs(source, root, path, entries, leaf, prints):
    """[(name, bytes to read, function)] that write one leaf, a piece of one tensor each."""
    first, dtype = entries[0], np.dtype(leaf["dtype"])
    axis, step = first.transform.axis, first.steps(dtype.itemsize)
    piece = list(first.slice_shape)
    piece[axis] = step
    chunk = (1,) * len(first.index) + tuple(piece)
    writer = Writer(str(root), leaf["zarr"], leaf["shape"], chunk, dtype, prints)

    def job(entry, start):
        def work():
            stop = min(start + step, entry.slice_shape[axis])
            data = source.piece(entry, start, stop, dtype)
            place = [0] * len(entry.slice_shape)
            place[axis] = start // step
            writer.write((*entry.index, *place), data.reshape((1,) * len(entry.index) + data.shape))

        end = entry.slice_shape[axis]
        return entry.name, source.tensors[entry.name].nbytes * (min(start + step, end) - start) // end, work

    return [job(entry, start) for entry in entries for start in range(0, first.slice_shape[axis], step)]


def _kept_jobs(source, root, path, entries, leaf, prints):
    """The same for a leaf kept in FP8: bytes and scales as stored, a matrix a chunk."""
    stack = (1,) * len(entries[0].index)
    jobs = []
    for which, suffix in (("zarr", ""), ("scales", SCALE)):
        first = source.tensors[entries[0].name + suffix]
        shape = (*leaf["shape"][:len(stack)], *first.shape)
        writer = Writer(str(root), leaf[which], shape, (*stack, *first.shape), first.dtype, prints)

        def work(entry, writer=writer, suffix=suffix):
            data = source.reader.rows(source.tensors[entry.name + suffix])
            writer.write((*entry.index, 0, 0), data.reshape(stack + data.shape))

        jobs += [(e.name + suffix, source.tensors[e.name + suffix].nbytes, lambda e=e, work=work: work(e))
                 for e in entries]
    return jobs


def _run(jobs, progress):
    """Runs the jobs on THREADS threads; the first failure stops the rest and is raised."""
    todo, lock, stop = iter(jobs), threading.Lock(), threading.Event()

    def worker():
        while not stop.is_set():
            with lock:
                job = next(todo, None)
            if job is None:
                return
            try:
                job[2]()
            except BaseException:
                stop.set()
                raise
            with lock:
                progress(job[1])

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        running = [pool.submit(worker) for _ in range(THREADS)]
        try:
            for future in concurrent.futures.as_completed(running):
                future.result()
        finally:
            stop.set()

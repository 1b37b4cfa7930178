"""Who may import whom: the arrows of the house, read off the source without running it.

A room is a module or a folder of modules, and a file belongs to the longest room name that fits it. The table says
what each room may import besides itself; imports inside functions count like those at the top.
"""

import ast
import pathlib
import textwrap

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("deepseek_jax", "kernels_pallas")

# room -> the rooms it may import, besides itself. "training" stands for all of training, and so on.
MODEL_LEAVES = ("model.layers", "model.rope", "model.router")
MAY_IMPORT = {
    "checked": (),
    "mesh_config": ("checked",),
    "config": ("checked", "mesh_config"),
    "command": ("config",),
    "model": ("model.transformer", "model.attention", "model.experts", "model.mtp", *MODEL_LEAVES, "config"),
    "model.transformer": ("model.attention", "model.experts", "model.mtp", *MODEL_LEAVES, "parallel.mesh", "config"),
    "model.mtp": ("model.attention", "model.experts", *MODEL_LEAVES, "parallel.mesh", "config"),
    "model.attention": (*MODEL_LEAVES, "fp8", "parallel.mesh", "kernels_pallas.api", "config"),
    "model.experts": (*MODEL_LEAVES, "fp8", "parallel.dispatch", "parallel.mesh", "kernels_pallas.api", "config"),
    "model.router": ("model.layers", "parallel.mesh", "config"),
    "model.layers": ("fp8", "parallel.mesh", "config"),
    "model.rope": ("config",),
    "fp8": ("parallel.mesh", "kernels_pallas.api", "config"),
    "parallel": ("config",),
    "parallel.dispatch": ("parallel.mesh", "config"),
    "parallel.mesh": ("config",),
    "pipeline": (),
    "pipeline.orders": (),
    "pipeline.ticks": ("pipeline.orders",),
    "pipeline.schedule": ("pipeline.orders", "pipeline.ticks", "checked"),
    "pipeline.validate": ("pipeline.schedule", "pipeline.orders", "pipeline.ticks", "checked"),
    "pipeline.draw": ("pipeline.schedule", "pipeline.validate", "pipeline.orders", "checked"),
    "pipeline.__main__": ("pipeline", "command", "checked"),
    "pipeline.split": ("checked",),
    "pipeline.tables": ("pipeline.schedule", "pipeline.ticks"),
    # It is handed stage functions; it does not know the model.
    "pipeline.execute": ("pipeline.schedule", "pipeline.validate", "pipeline.split", "pipeline.tables", "parallel.mesh",
                         "checked", "config"),
    "data": ("config",),
    "training": ("config",),
    "training.loop": ("training", "data", "model", "parallel", "serving", "scale.costs", "config"),
    "training.devices": ("training.pipelined", "training.processes", "parallel.mesh", "config"),
    "training.report": ("training", "data", "serving", "config"),
    "training.step": ("model", "training.losses", "training.optimizer", "training.pipelined", "pipeline", "parallel",
                      "config"),
    # The glue: stage functions out of the model's pieces, handed to the executor.
    "training.pipelined": ("model", "training.losses", "pipeline", "parallel.mesh", "config"),
    "training.losses": ("model", "parallel.mesh", "config"),
    "training.optimizer": ("model.router", "config"),
    "training.checkpoint": ("training.step", "training.manifest", "training.arrays", "parallel.mesh", "config"),
    "interop": ("model", "fp8", "parallel.mesh", "training.manifest", "training.arrays", "config"),
    "interop.converter": ("interop", "training", "data.tokenizer", "config"),
    "serving": ("model", "fp8", "parallel", "kernels_pallas.api", "config"),
    "scale": ("config",),
    "scale.layout": ("pipeline.schedule", "config"),
    "scale.timing": ("scale", "pipeline.validate", "pipeline.orders", "config"),
    "scale.plan": ("scale", "pipeline.schedule", "pipeline.validate", "config"),
    "scale.targets": ("kernels_pallas.tools.compile_report", "config"),
    "scale.aot": ("scale", "training", "model", "serving", "parallel", "pipeline", "config",
                  "kernels_pallas.tools.compile_report"),
    "scale.aot_decode": ("scale", "model", "parallel", "serving", "config"),
}
COMMANDS = ("train", "evaluate", "generate", "serve", "convert", "plan", "compile")
MAY_IMPORT |= dict.fromkeys(
    COMMANDS, ("command", "training", "serving", "scale", "interop", "data", "model", "config"))
MAY_IMPORT["serve"] += ("generate",)  # which loads models

WITHOUT_JAX = ("checked", "mesh_config", "config", "command", "data", "pipeline.orders", "pipeline.ticks",
               "pipeline.schedule", "pipeline.validate", "pipeline.tables", "pipeline.draw", "pipeline.__main__",
               "scale.costs", "scale.layout", "scale.traffic", "scale.memory", "scale.hardware", "scale.timing",
               "scale.plan", "scale.decoding", "scale.tables", "scale.arguments", "scale.hlo", "plan")
JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "chex")
LONGEST_FILE, LONGEST_COMMAND = 400, 99


def imports(path, root):
    """Every module that the file at `path` imports, absolute, with the line it stands on."""
    package = path.relative_to(root).with_suffix("").parts
    package = package[:-1]  # both for a module and for an __init__.py, the folder it lies in
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            # `from a import b` may name the module a.b or the object b in a: both are asked for, and only one exists.
            for alias in node.names:
                file = root / pathlib.Path(*f"{module}.{alias.name}".split("."))
                is_module = file.with_suffix(".py").exists() or file.is_dir()
                yield (f"{module}.{alias.name}" if is_module else module, node.lineno)


def short(module):
    """`deepseek_jax.model.rope` -> `model.rope`; kernels_pallas keeps its name."""
    return module.removeprefix("deepseek_jax").removeprefix(".")


def lies_in(module, room):
    return module == room or module.startswith(room + ".")


def room_of(module):
    """The longest room name that fits, or None."""
    return max((room for room in MAY_IMPORT if lies_in(module, room)), key=len, default=None)


def module_of(path, root):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def violations(root):
    """One line for every import against the arrows and every file that has grown too long."""
    for path in sorted(p for package in PACKAGES for p in (root / package).rglob("*.py")):
        where, module = path.relative_to(root), module_of(path, root)
        lines = len(path.read_text().splitlines())
        if lines > LONGEST_FILE:
            yield f"{where} has {lines} lines; split it by its ideas, {LONGEST_FILE} is the limit."
        if module.startswith("kernels_pallas"):
            for imported, line in imports(path, root):
                if imported.startswith("deepseek_jax"):
                    yield f"{where}:{line} imports {imported}; kernels_pallas stands on jax alone."
            continue
        module = short(module)
        if not module:  # deepseek_jax/__init__.py
            continue
        room = room_of(module)
        if room is None:
            yield f"{where} is in no room of this table; add {module} to MAY_IMPORT with what it may import."
            continue
        if module in (*COMMANDS, "pipeline.__main__") and lines > LONGEST_COMMAND:
            yield f"{where} has {lines} lines; a command parses, calls one function and prints, in {LONGEST_COMMAND}."
        for imported, line in imports(path, root):
            if imported.split(".")[0] in JAX and any(lies_in(module, quiet) for quiet in WITHOUT_JAX):
                yield f"{where}:{line} imports {imported}; {module} works without jax."
            if imported.split(".")[0] not in PACKAGES or short(imported) in ("", room):
                continue
            # What a folder gives to all of its files it names in its own __init__.py: that file may import them.
            within = lies_in(short(imported), module if path.name == "__init__.py" else room)
            if not within and not any(lies_in(short(imported), allowed) for allowed in MAY_IMPORT[room]):
                allowed = ", ".join(MAY_IMPORT[room]) or "nothing"
                yield f"{where}:{line} imports {imported}; {room} may import {allowed}."


def test_imports_follow_the_arrows():
    found = list(violations(ROOT))
    assert not found, "\n".join(["", *found])


def test_the_table_has_no_cycle():
    done, under_way = set(), []

    def visit(room):
        assert room not in under_way, f"cycle: {' -> '.join([*under_way, room])}"
        if room in done:
            return
        under_way.append(room)
        for allowed in MAY_IMPORT.get(room, ()):
            # A folder that holds this room is allowed for its other files, as training.loop may import training.
            if not lies_in(room, allowed):
                for inner in [allowed, *(r for r in MAY_IMPORT if lies_in(r, allowed))]:
                    if inner != room and room_of(inner):
                        visit(inner)
        done.add(under_way.pop())

    for room in MAY_IMPORT:
        visit(room)


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("deepseek_jax/model/rope.py", "from deepseek_jax.training import step", "model.rope may import config"),
        ("deepseek_jax/model/rope.py", "from ..training.step import train_step", "model.rope may import config"),
        ("deepseek_jax/model/rope.py", "def f():\n    import deepseek_jax.serving", "model.rope may import config"),
        ("deepseek_jax/pipeline/execute.py", "from deepseek_jax.model import DeepSeekV3", "pipeline.execute may"),
        ("deepseek_jax/serving/latent_cache.py", "from deepseek_jax import training", "serving may import model"),
        ("deepseek_jax/config/__init__.py", "import jax.numpy as jnp", "config works without jax"),
        ("deepseek_jax/data/loader.py", "from jax import numpy", "data.loader works without jax"),
        ("kernels_pallas/api.py", "import deepseek_jax.config", "stands on jax alone"),
        ("deepseek_jax/kitchen.py", "", "is in no room of this table"),
        ("deepseek_jax/train.py", "x = 1\n" * 100, "a command parses"),
        ("deepseek_jax/fp8/__init__.py", "x = 1\n" * 401, "split it by its ideas"),
    ],
)
def test_a_made_up_violation_is_found(tmp_path, path, source, complaint):
    for module in ("training/step", "serving/cache", "model/rope"):  # so that `from package import module` resolves
        (tmp_path / "deepseek_jax" / module).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "deepseek_jax" / module).with_suffix(".py").touch()
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(textwrap.dedent(source))

    found = list(violations(tmp_path))

    assert len(found) == 1 and complaint in found[0], found


def test_an_import_along_the_arrows_is_allowed(tmp_path):
    (tmp_path / "deepseek_jax/model").mkdir(parents=True)
    (tmp_path / "deepseek_jax/model/__init__.py").write_text("from .transformer import DeepSeekV3\n")
    (tmp_path / "deepseek_jax/model/transformer.py").write_text(
        "import jax\nfrom .rope import rotate\nfrom ..config import ModelConfig\nfrom deepseek_jax.model import rope\n")
    (tmp_path / "deepseek_jax/model/rope.py").write_text("from deepseek_jax.config import Yarn\n")

    assert not list(violations(tmp_path))

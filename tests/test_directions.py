"""Which package may import which: the directions of imports, read from the source without running it.

    python tests/test_directions.py docs/rooms.png      draws the rooms and their imports

A room is a module or a folder of modules, and a file belongs to the room with the longest matching name. The table says
what each room may import in addition to itself; imports inside functions count like those at the top.
"""

import ast
import pathlib
import textwrap

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("deepseek_jax", "kernels_pallas")

# room -> the rooms that it may import, in addition to itself. "serving" means all of serving, and so on.
MODEL = ("model.attention", "model.blockwise", "model.block", "model.experts", "model.grouped_matmul", "model.indexer",
         "model.layers", "model.lora", "model.mtp", "model.permute", "model.ring_attention", "model.rope",
         "model.router", "model.sparse_attention", "model.types")
SHARDING = ("parallel.mesh", "parallel.sharding", "parallel.context")
MAY_IMPORT = {
    # Foundations: no jax.
    "config": ("configs", "io", "storage"),  # `--config NAME` runs a file of that folder
    "configs": ("config",),
    "runtime": (),
    "stop": ("storage", "working_files", "config"),
    "history": ("io", "config"),
    "logs": ("storage",),
    "cli": ("runtime", "stop", "storage", "config"),
    "io": ("storage", "working_files"),
    "storage": (),
    "working_files": ("storage",),
    "table": (),
    "plugin": ("config",),
    # Many devices.
    "parallel.mesh": ("config",),
    "parallel.sharding": ("parallel.mesh",),
    "parallel.context": ("parallel.mesh", "parallel.sharding"),
    "parallel.capacity": ("parallel.sharding",),
    "parallel.dispatch": (*SHARDING, "kernels_pallas.constants", "config"),
    "parallel.meeting": ("stop", "config"),
    "parallel.watch": ("parallel.meeting", "stop"),
    "parallel.cluster": ("parallel.meeting", "config"),
    "parallel.coordinator": (),
    "parallel.processes": ("parallel.coordinator", "parallel.meeting", "parallel.watch", "stop", "config"),
    "parallel.compiler": (),
    "parallel.runner": (*SHARDING, "parallel.processes", "parallel.compiler", "config"),
    "parallel": (),
    # The network.
    "fp8": (*SHARDING, "kernels_pallas.api", "kernels_pallas.constants", "config"),
    "model.types": ("parallel.dispatch",),
    "model.layers": ("fp8", *SHARDING, "config"),
    "model.rope": ("config",),
    "model.router": ("model.layers", "model.types", *SHARDING, "plugin", "config"),
    "model.permute": ("model.layers", "model.router"),
    "model.grouped_matmul": ("model.layers", "fp8", "kernels_pallas.api"),
    "model.blockwise": ("model.layers", "fp8", *SHARDING, "kernels_pallas.api", "config"),
    "model.ring_attention": ("model.blockwise", "model.layers", "model.rope", *SHARDING, "config"),
    "model.attention": ("model.blockwise", "model.ring_attention", "model.layers", "model.rope", *SHARDING, "config"),
    "model.indexer": ("model.layers", "model.rope", "config"),
    "model.sparse_attention": ("model.attention", "model.indexer", "model.layers", "model.rope", "model.types",
                               *SHARDING, "config"),
    "model.experts": ("model.grouped_matmul", "model.layers", "model.permute", "model.router", "model.types", "fp8",
                      "parallel.dispatch", *SHARDING, "config"),
    "model.lora": ("model.layers", "config"),
    "model.block": SHARDING,
    "model.mtp": ("model.block", "model.layers", "model.types", "config"),
    "model.transformer": (*MODEL, "parallel.context", "plugin", "config"),
    "model.parts": ("model.router", "model.transformer", "config"),
    "model": ("model.transformer", "model.types"),
    # Pipelines: schedules and the executor get stage functions as arguments; only pipeline.model knows the model.
    "pipeline.orders": (),
    "pipeline.ticks": ("pipeline.orders",),
    "pipeline.schedule": ("pipeline.orders", "pipeline.ticks", "config"),
    "pipeline.validate": ("pipeline.schedule", "pipeline.orders", "pipeline.ticks", "config"),
    "pipeline.draw": ("pipeline.schedule", "pipeline.validate", "pipeline.orders", "plots.style", "config"),
    "pipeline.split": ("config",),
    "pipeline.tables": ("pipeline.schedule", "pipeline.orders", "pipeline.ticks"),
    "pipeline.interleave": ("pipeline.split",),
    "pipeline.execute": ("pipeline.schedule", "pipeline.validate", "pipeline.split", "pipeline.interleave",
                         "pipeline.tables", "pipeline.ticks", "config"),
    "pipeline.forward": ("pipeline.execute",),
    "pipeline.model": ("pipeline.schedule", "pipeline.execute", "pipeline.forward", "pipeline", "model",
                       "training.losses", "training.types", *SHARDING, "config"),
    "pipeline.__main__": ("pipeline.schedule", "pipeline.validate", "pipeline.draw", "pipeline", "cli", "io", "config"),
    "pipeline": ("pipeline.schedule", "pipeline.validate"),
    # Text, files, checkpoints.
    "chat": ("io", "storage", "config"),
    "data": ("chat", "checkpoint.manifest", "io", "storage", "working_files", "table", "config"),
    "checkpoint": ("parallel.coordinator", "io", "storage", "config", "kernels_pallas.constants"),
    "interop": ("model", "fp8", "checkpoint", "data.tokenizer", "chat", "io", "storage",
                "kernels_pallas.constants", "config"),
    "workdir": ("history", "checkpoint", "interop", "data.tokenizer", "stop", "io", "storage", "working_files",
                "config"),
    # Training.
    "training.types": ("parallel.dispatch",),
    "training.losses": ("training.types", "model", *SHARDING, "config"),
    "training.optimizer": ("parallel.sharding", "config"),
    "training.qk_clip": ("config",),
    "training.step": ("training.types", "training.losses", "training.optimizer", "training.qk_clip", "pipeline.model",
                      "model", *SHARDING, "config"),
    "training.background": (),
    "training.trackers": ("io", "storage", "working_files", "config"),
    "training.metrics": ("training.background", "training.trackers", "io", "storage", "working_files"),
    "training.goodput": ("io", "storage"),
    "training.profiler": ("storage", "working_files"),
    "training.stall": ("stop",),
    "training.watching": ("training.goodput", "training.profiler", "training.stall", "config"),
    "training.program": ("parallel.compiler", "config"),
    "training.base": ("training.step", "model", "fp8", "parallel", "checkpoint", "data.tokenizer", "workdir", "config"),
    "training.throughput": ("scale.hardware",),
    "training.evaluate": ("training.step", "training.types", "training.metrics", "data", "fp8", "workdir", "config"),
    "training.sample": ("training.step", "training.types", "pipeline.model", "model", "parallel", "serving.sampling",
                        "data.tokenizer", "config"),
    "training.comparison": ("training.metrics",),
    "training.selfcheck": ("fp8", "model.grouped_matmul", "parallel.compiler", "parallel.dispatch",
                           "kernels_pallas.api", "config"),
    "training.start": ("training.base", "training.step", "parallel", "checkpoint", "data", "history", "workdir",
                       "config"),
    "training.loop": ("training.evaluate", "training.sample", "training.selfcheck", "training.start", "training.base",
                      "training.step", "training.types", "training.metrics", "training.throughput", "pipeline.model",
                      "model.parts", "training.program", "training.trackers", "training.watching", "parallel",
                      "checkpoint", "data", "scale.costs", "workdir", "stop", "storage", "config"),
    "training.summary": ("training.loop", "training.metrics", "training.sample", "serving", "plots", "data", "config"),
    "training": (),
    "plots.style": ("io", "config"),
    "plots.sliders": (),
    "plots.training": ("plots.style", "training.metrics", "io", "storage"),
    "plots": (),
    # Serving.
    "serving.openai": ("serving.decode", "serving.engine", "serving.sequence", "chat", "io", "config"),
    "serving.harness": ("serving.engine", "serving.generation", "serving.openai", "serving.sequence", "chat", "config"),
    "serving": ("model", "fp8", *SHARDING, "kernels_pallas.api", "config"),
    # After pre-training.
    "posttraining": ("training", "serving", "chat", "parallel", "model", "fp8", "checkpoint", "data", "workdir", "cli",
                     "plugin", "io", "config"),
    # Planning and compiling for absent hardware.
    "scale.compile": ("scale", "training.base", "training.sample", "training.step", "pipeline.model", "pipeline.tables",
                      "parallel.compiler", "serving", "model", *SHARDING,
                      "kernels_pallas.tools.compile_report", "config"),
    "scale": ("pipeline.schedule", "pipeline.validate", "pipeline.orders", "plots.style", "kernels_pallas.constants",
              "interop.hf_config", "io", "config"),
    # Commands.
    "__main__": (),
    "train": ("cli", "logs", "stop", "config", "parallel.cluster", "parallel.processes", "posttraining.distill_logits",
              "posttraining.preferences", "training.loop", "training.summary"),
    "reinforce": ("cli", "logs", "stop", "parallel.cluster", "posttraining.loop", "config"),
    "prepare": ("cli", "data", "config"),
    "check": ("cli", "checkpoint.manifest", "storage", "config"),
    "evaluate": ("cli", "io", "training.evaluate", "serving", "chat", "workdir", "config"),
    "routing": ("model", "workdir", "config"),
    "compare": ("cli", "io", "table", "plots", "training.comparison", "training.metrics", "workdir", "config"),
    "generate": ("cli", "serving", "chat", "workdir", "config"),
    "serve": ("cli", "serving", "chat", "workdir", "config"),
    "convert": ("cli", "interop.convert", "config"),
    "plan": ("cli", "io", "scale", "config"),
    "compile": ("cli", "io", "scale", "config"),
}
COMMANDS = ("train", "prepare", "reinforce", "check", "evaluate", "compare", "generate", "serve", "convert", "plan",
            "compile")

WITHOUT_JAX = ("config", "configs", "cli", "runtime", "stop", "io", "history", "logs", "parallel.meeting",
               "parallel.watch", "plugin", "chat", "data", "workdir", "pipeline.orders", "pipeline.ticks",
               "pipeline.schedule", "pipeline.validate", "pipeline.tables", "pipeline.draw", "pipeline.__main__",
               "scale.costs", "scale.layout", "scale.traffic", "scale.memory", "scale.hardware", "scale.timing",
               "scale.plan", "scale.decoding", "scale.tables", "scale.arguments", "scale.serve", "scale.finetune",
               "scale.one_device", "scale.compile.hlo", "plots", "table", "training.comparison", *COMMANDS)
JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "chex")
LONGEST_COMMAND = 99


def imports(path, root):
    """Every module that the file at `path` imports, as an absolute name, with its line number."""
    package = path.relative_to(root).with_suffix("").parts
    package = package[:-1]  # for a module and for an __init__.py: the folder that contains it
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            # `from a import b` may mean the module a.b or the object b in a: both are tried, and only one exists.
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
    """The longest matching room name, or None."""
    return max((room for room in MAY_IMPORT if lies_in(module, room)), key=len, default=None)


def module_of(path, root):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def violations(root):
    """One line for every import against the arrows, and for every command module that is too long."""
    for path in sorted(p for package in PACKAGES for p in (root / package).rglob("*.py")):
        where, module = path.relative_to(root), module_of(path, root)
        lines = len(path.read_text().splitlines())
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
            # A folder's __init__.py names what all of its files may use: that file may import these rooms.
            within = lies_in(short(imported), module if path.name == "__init__.py" else room)
            if not within and not any(lies_in(short(imported), allowed) for allowed in MAY_IMPORT[room]):
                allowed = ", ".join(MAY_IMPORT[room]) or "nothing"
                yield f"{where}:{line} imports {imported}; {room} may import {allowed}."


def test_imports_follow_the_arrows():
    found = list(violations(ROOT))
    assert not found, "\n".join(["", *found])


def module_graph(root, packages=PACKAGES):
    """{module: modules of these packages that it imports at its top level}."""
    graph = {}
    for path in sorted(p for package in packages for p in (root / package).rglob("*.py")):
        module, tree = module_of(path, root), ast.parse(path.read_text())
        at_top = {node.lineno for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))}
        graph[module] = {imported for imported, line in imports(path, root)
                         if line in at_top and imported.split(".")[0] in packages and imported != module}
    return graph


def cycle_in(graph):
    """The first import cycle, as a list of modules; None if there is none."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return [*path[path.index(module):], module]
        if module in done or module not in graph:
            return None
        path.append(module)
        for imported in sorted(graph[module]):
            if found := visit(imported):
                return found
        done.add(path.pop())
        return None

    return next((found for module in sorted(graph) if (found := visit(module))), None)


def test_no_module_imports_itself_through_others():
    assert cycle_in(module_graph(ROOT, (*PACKAGES, "experiments", "benchmarks"))) is None
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("deepseek_jax/model/rope.py", "from deepseek_jax.training import step", "model.rope may import config"),
        ("deepseek_jax/model/rope.py", "from ..training.step import train_step", "model.rope may import config"),
        ("deepseek_jax/model/rope.py", "def f():\n    import deepseek_jax.serving", "model.rope may import config"),
        ("deepseek_jax/pipeline/execute.py", "from deepseek_jax.model import DeepSeekV3", "pipeline.execute may"),
        ("deepseek_jax/serving/engine.py", "from deepseek_jax import training", "serving may import model"),
        ("deepseek_jax/config/__init__.py", "import jax.numpy as jnp", "config works without jax"),
        ("deepseek_jax/data/loader.py", "from jax import numpy", "data.loader works without jax"),
        ("kernels_pallas/api.py", "import deepseek_jax.config", "stands on jax alone"),
        ("deepseek_jax/kitchen.py", "", "is in no room of this table"),
        ("deepseek_jax/train.py", "x = 1\n" * 100, "a command parses"),
        ("deepseek_jax/generate.py", "from deepseek_jax.training.loop import train", "generate may import cli"),
    ],
)
def test_a_made_up_violation_is_found(tmp_path, path, source, complaint):
    # So that `from package import module` resolves.
    for module in ("training/step", "training/loop", "serving/engine", "model/rope"):
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


def test_the_rooms_can_be_drawn(tmp_path):
    draw(tmp_path / "rooms.png")
    graph = room_graph()
    height = heights(graph)
    assert (tmp_path / "rooms.png").stat().st_size > 50_000
    assert all(height[room] > height[other] for room in graph for other in graph[room] if room not in graph[other])


FOUNDATIONS = ("config", "io", "cli", "table", "runtime", "plugin")  # any room may use these: drawn without arrows


def draw(path):
    """Draws the rooms as boxes, each above its imports. An import that a path of other arrows implies gets no arrow."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    graph = room_graph()
    height = heights(graph)
    down = {room: {r for r in imported if height[r] < height[room]} for room, imported in graph.items()}
    below = {}
    for room in sorted(graph, key=height.get):
        below[room] = down[room].union(*(below[r] for r in down[room]))
    arrows = {(room, r) for room in graph for r in down[room]
              if not any(r in below[other] for other in down[room] - {r})}  # others are implied by a longer path
    mutual = {(a, b) for a in graph for b in down[a] if a in graph[b]}
    place = placed(height | dict.fromkeys(FOUNDATIONS, 0), arrows)
    figure = Figure(figsize=(11, 8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.set_xlim(0, 1.04)
    axis.set_ylim(-0.5, max(height.values()) + 0.5)
    axis.set_axis_off()
    style = dict(boxstyle="round,pad=0.4", fc="#eaf2f8", ec="#0072B2")
    box = {room: axis.text(x, y, room, ha="center", va="center", bbox=style).get_bbox_patch()
           for room, (x, y) in place.items()}
    figure.draw_without_rendering()  # now the sizes of the boxes are known
    for pairs, style in ((arrows - mutual, dict(arrowstyle="-|>")), (mutual, dict(arrowstyle="<|-|>", linestyle="--"))):
        for a, b in sorted(pairs):
            axis.annotate("", xy=place[b], xytext=place[a], zorder=1, arrowprops=dict(
                color="#0072B2", patchA=box[a], patchB=box[b], shrinkA=0, shrinkB=1, mutation_scale=12, **style))
    axis.set_title("Rooms of deepseek_jax: arrows lead to what a room imports (dashed: parts of both do).\n"
                   "Left out: imports that a path of arrows shows, and those of the lowest row, which is open to all.",
                   loc="left")
    figure.savefig(path)


def room_graph():
    """{room: the rooms that it imports}, for top-level rooms, without those that any room may import."""
    graph = {}
    for file in sorted((ROOT / "deepseek_jax").rglob("*.py")):
        room = short(module_of(file, ROOT)).split(".")[0]
        names = {short(imported).split(".")[0] for imported, _ in imports(file, ROOT)
                 if imported.split(".")[0] in PACKAGES}
        graph.setdefault(room or "__init__", set()).update(names - {room, "", *FOUNDATIONS})
    return {room: graph.get(room, set()) for room in {*graph, "kernels_pallas"} - {"__init__", *FOUNDATIONS}}


def heights(graph):
    """{room: its row}, above the rows of all its imports; imports between two rooms in both directions are ignored."""
    height = dict.fromkeys(graph, 1)
    for _ in graph:
        for room, imported in graph.items():
            height[room] = max([height[room], *(height[r] + 1 for r in imported if room not in graph[r])])
    return height | dict.fromkeys(COMMANDS, max(height.values()) + 1)


def placed(height, arrows):
    """{room: (x, y)}: within a row, each near the mean of the rooms that are connected with it."""
    rows = {y: sorted(room for room in height if height[room] == y) for y in sorted(set(height.values()))}
    x = {room: (k + 0.5) / len(row) for row in rows.values() for k, room in enumerate(row)}
    for _ in range(20):
        for row in rows.values():
            near = {room: [x[b if a == room else a] for a, b in arrows if room in (a, b)] for room in row}
            row.sort(key=lambda room: sum(near[room]) / len(near[room]) if near[room] else x[room])
            x |= {room: (k + 0.5) / len(row) for k, room in enumerate(row)}
    return {room: (x[room] + 0.03 * (-1) ** y * (y > 0), y) for room, y in height.items()}


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Draws the rooms of deepseek_jax and what each imports.")
    parser.add_argument("picture", metavar="FILE", help="such as docs/rooms.png")
    draw(parser.parse_args().picture)

"""Features that only accelerators have, checked in programs compiled for absent H100s. Needs the extra `aot`."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None,
                                                   reason="needs jax-cuda13-plugin and nvidia-cuda-nvcc")]

CODE = '''
import json, re, sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding
from deepseek_jax.config import MeshConfig, model_config
from deepseek_jax.model import experts
from deepseek_jax.parallel import mesh, sharding
from kernels_pallas.tools.compile_report import described

devices = described("1x2x8")
cfg = MeshConfig(node=2, local=8, buffers="ragged", capacity=1.5)
model = model_config("v3_671b", num_experts=64, d_model=1024, expert_ffn_dim=512)
experts.implementation_here = lambda: "ragged"  # of the machine it is compiled for, not of this one
mesh = mesh.make_mesh(cfg, devices)
x = jax.ShapeDtypeStruct((16, 1024, 1024), jnp.bfloat16)
bias = jax.ShapeDtypeStruct((64,), jnp.float32)
shapes = jax.eval_shape(experts.MoE(model).init, jax.random.key(0), x, bias)
lie = lambda path, leaf: NamedSharding(
    mesh, sharding.leaf_sharding(path.replace("params", "layers/ffn"), leaf.shape, mesh).compute)
where = (jax.tree.map(lie, sharding.paths(shapes), shapes), NamedSharding(mesh, sharding.spec("batch", None, None)),
         NamedSharding(mesh, sharding.spec(None)))
def loss(variables, x, bias):
    return experts.MoE(model, cfg).apply(variables, x, bias)[0].astype(jnp.float32).sum()
def compiled(f):
    with jax.set_mesh(mesh):
        return jax.jit(f, in_shardings=where).lower(shapes, x, bias).compile(
            compiler_options={"xla_gpu_enable_latency_hiding_scheduler": True}).as_text()
forward = compiled(lambda *arguments: experts.MoE(model, cfg).apply(*arguments)[0])
under_way, hidden = set(), 0
for line in forward[forward.index("ENTRY"):].splitlines():
    name = line.split(" = ")[0].strip()
    if re.search(r"ragged-all-to-all-start[.\\d]* = ", line):
        under_way.add(name.replace("start", "done"))
    under_way.discard(name)
    hidden += bool(under_way) and "shared/dot_general" in line
count = lambda text: len(re.findall(r"ragged-all-to-all(?:-start)?\\(", text))
both = compiled(jax.value_and_grad(loss, (0, 1)))
print(json.dumps({"forward": count(forward), "both": count(both), "hidden": hidden}))
'''


def test_on_h100s_tokens_travel_ragged_and_the_shared_expert_computes_meanwhile():
    environment = os.environ | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])

    assert found["forward"] == 8 and found["both"] == 14  # choices, gates, tokens and results, twice; and back
    assert found["hidden"] >= 2, found

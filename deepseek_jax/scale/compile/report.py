"""The report of a compiled program, as text."""

from typing import Any

from deepseek_jax.scale.compile import clock


def table(found: dict[str, Any]) -> str:
    """The output of `compile`, from the data of its --json: sizes in GB (10^9 bytes) per device, times in seconds."""
    giga = lambda n: f"{n / 1e9:9.2f} GB"
    what = found.get("layout") or f"a step of {found['sequences']} x {found['length']} tokens on each device"
    lines = [f"{found['model']} on {found['target']}: {found.get('program', 'train')}, {what}",
             "lowered in {lowering:.0f} s, compiled in {compiling:.0f} s ({cpu:.0f} s of CPU in all), ".format(
                 **found["seconds"]) + f"{found['compiler_gigabytes']:.1f} GB here", ""]
    groups = {f"given: {name}": size for name, size in found.get("given", {}).items()} | found["bytes"]
    lines += [f"{name:28} {giga(size)}" for name, size in groups.items()]
    lines += [f"{'per device, by XLA':28} {giga(found['bytes_per_device'])}   of {found['memory'] / 1e9:.0f}: "
              f"{'fits' if found['fits'] else 'DOES NOT FIT'}"]
    if "planned" in found:
        lines.append(f"{'per device, planned':28} {giga(found['planned_bytes_per_device'])}   "
                     f"{found['planned_over_compiled'] - 1:+.1%}")
    if found.get("bytes_accessed_once"):  # XLA:GPU does not count them
        lines.append(f"{'accessed, loop bodies once':28} {giga(found['bytes_accessed_once'])}")
    if products := dict(found.get("products") or {}):
        useful, tera = products.pop("useful"), {name: f"{flops / 1e12:.1f}" for name, flops in products.items()}
        lines.append(f"{'TFLOP of products':28} {sum(products.values()) / 1e12:9.1f}     kernels of attention "
                     f"{tera['attention']}, of experts in bfloat16 {tera['experts']}, in FP8 {tera['fp8']}; "
                     f"useful {useful / 1e12:.1f}")
    if found.get("collectives"):
        lines += ["", "collective           axes                    count   GB once  async  hidden  GB exposed"]
        lines += [f"{row['kind']:20} {'+'.join(row['axes']) or '-':22} {row['count']:6} {row['bytes'] / 1e9:9.3f} "
                  f"{row['asynchronous']:6} {row['hidden']:7} {row['exposed_bytes'] / 1e9:11.3f}"
                  for row in found["collectives"]]
    lines += clock.lines(found.get("waits", {}))
    if found["kernels"]:
        lines += ["", f"{'kernel':48} {'count':>6} {'registers':>10} {'spilled':>8} {'shared':>8}"]
        lines += ["{kernel:48} {count:6} {registers:10} {spill_bytes:8} {shared_bytes:8}".format(**row)
                  for row in found["kernels"]]
    return "\n".join(lines)

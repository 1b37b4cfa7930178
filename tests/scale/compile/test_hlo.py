"""Collectives of a scheduled program: kinds, axes, bytes, and the products that hide them."""

import pytest

from deepseek_jax.scale.compile import hlo

SIZES = {"pipe": 2, "replica": 1, "node": 2, "local": 4, "tensor": 1}
PROGRAM = """HloModule jit_f, is_scheduled=true

%dot_computation (a: bf16[8,8], b: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  %b = bf16[8,8]{1,0} parameter(1)
  ROOT %d = bf16[8,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%wrapped_scatter (p: f32[64]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  ROOT %rs = f32[16]{0} reduce-scatter(%p), replica_groups=[4,4]<=[16], dimensions={0}, to_apply=%add
}

%body (t: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {
  %t = (s32[], bf16[8,8]{1,0}) parameter(0)
  %x = bf16[8,8]{1,0} get-tuple-element(%t), index=1
  %a2a = bf16[8,8]{1,0} all-to-all(%x), replica_groups=[8,2]<=[2,2,4]T(0,2,1), dimensions={0}
  ROOT %out = (s32[], bf16[8,8]{1,0}) tuple(%t, %a2a)
}

%branch_a (x: bf16[8,8]) -> bf16[8,8] {
  %x = bf16[8,8]{1,0} parameter(0)
  ROOT %cp = bf16[8,8]{1,0} collective-permute(%x), source_target_pairs={{0,8},{1,9}}
}

%branch_b (x: bf16[8,8]) -> bf16[8,8] {
  ROOT %x = bf16[8,8]{1,0} parameter(0)
}

ENTRY %main (x: bf16[8,8], y: f32[64]) -> bf16[8,8] {
  %x = bf16[8,8]{1,0} parameter(0)
  %y = f32[64]{0} parameter(1)
  %gather-start = (bf16[8,8]{1,0}, bf16[32,8]{1,0}) all-gather-start(%x), replica_groups={{0,1,2,3},{4,5,6,7}}
  %scatter-start = ((f32[64]{0}), f32[16]{0}, u32[]) async-start(%y), calls=%wrapped_scatter
  %f = bf16[8,8]{1,0} fusion(%x, %x), kind=kOutput, calls=%dot_computation
  %gather-done = bf16[32,8]{1,0} all-gather-done(%gather-start)
  %g = (bf16[8,4]{1,0}, s8[99]{0}) custom-call(%f, %k), custom_call_target="__cublas$gemm", NUMBERS
  %scatter-done = f32[16]{0} async-done(%scatter-start), calls=%wrapped_scatter
  %r-start = f32[16]{0} all-reduce-start(%scatter-done), replica_groups={}, to_apply=%add
  %r-done = f32[16]{0} all-reduce-done(%r-start)
  %w = (s32[], bf16[8,8]{1,0}) while(%t0), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"26"}}
  ROOT %last = bf16[8,8]{1,0} conditional(%i, %g, %g), branch_computations={%branch_a, %branch_b}
}
""".replace("NUMBERS", 'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{'
                       '"lhs_contracting_dimensions":["1"]}}}')


def found():
    return {one.kind: one for one in hlo.collectives(PROGRAM, SIZES)}


def test_every_collective_is_found_once():
    assert len(hlo.collectives(PROGRAM, SIZES)) == len(found()) == 5


@pytest.mark.parametrize(("kind", "axes"), [("all-gather", ("local",)), ("reduce-scatter", ("local",)),
                                            ("all-to-all", ("node",)), ("collective-permute", ("pipe",)),
                                            ("all-reduce", ("pipe", "node", "local"))])
def test_axes_are_those_along_which_a_group_differs(kind, axes):
    assert found()[kind].axes == axes


@pytest.mark.parametrize(("kind", "size"), [("all-gather", 32 * 8 * 2), ("reduce-scatter", 64 * 4),
                                            ("all-to-all", 8 * 8 * 2), ("all-reduce", 16 * 4)])
def test_bytes_are_the_larger_of_what_goes_in_and_what_comes_out(kind, size):
    assert found()[kind].bytes == size


def test_products_between_start_and_done_hide_and_nothing_else_does():
    assert {kind: one.products for kind, one in found().items()} == {
        "all-gather": 1, "reduce-scatter": 2, "all-reduce": 0, "all-to-all": None, "collective-permute": None}
    rows = {row["kind"]: row for row in hlo.table(list(found().values()))}
    assert {kind for kind, row in rows.items() if row["hidden"]} == {"all-gather", "reduce-scatter"}
    assert rows["all-reduce"]["asynchronous"] == 1 and rows["all-reduce"]["exposed_bytes"] == 64


def test_the_device_comes_to_starts_products_and_dones_in_order():
    passed = [(s.what, s.flops or s.key) for s in hlo.steps(PROGRAM, SIZES, "ENTRY")]

    assert passed[:6] == [("start", "%gather-start"), ("start", "%scatter-start"), ("work", 2 * 8 * 8 * 8),
                          ("done", "%gather-start"), ("work", 2 * 8 * 4 * 8), ("done", "%scatter-start")]
    assert passed[8:] == [("inner", "while"), ("inner", "conditional")]


def test_a_loop_of_products_works_as_often_as_it_turns():
    looped = PROGRAM.replace("all-to-all(%x), replica_groups=[8,2]<=[2,2,4]T(0,2,1), dimensions={0}",
                             "dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}")

    assert [s.flops for s in hlo.steps(looped, SIZES, "ENTRY") if s.what == "work"][-1] == 26 * 2 * 8 * 8 * 8
    assert hlo.work(looped).flops - hlo.work(PROGRAM).flops == 26 * 2 * 8 * 8 * 8


def test_of_branches_the_one_with_the_most_work_counts_and_no_part_of_another():
    kernel = ('custom-call(%x, %x), custom_call_target="mosaic_gpu_v2", operand_layout_constraints={bf16[8,8]{1,0}, '
              'bf16[1,4,8]{2,1,0}}, metadata={op_name="jit(step)/experts_products/mpmd_map"}')
    branched = PROGRAM.replace("collective-permute(%x), source_target_pairs={{0,8},{1,9}}",
                               "dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}")
    branched = branched.replace("ROOT %x = bf16[8,8]{1,0} parameter(0)",
                                f"%x = bf16[8,8]{{1,0}} parameter(0)\n  ROOT %e = bf16[8,4]{{1,0}} {kernel}")

    assert hlo.work(branched).flops - hlo.work(PROGRAM).flops == 2 * 8 * 8 * 8
    assert hlo.work(branched).experts == 0  # in the other branch, with half as many


@pytest.mark.parametrize(("part", "widths"), [("forward", 192 + 128), ("dq", 2 * 192 + 128), ("dkv", 2 * (192 + 128))])
def test_the_kernels_of_attention_multiply_half_of_a_square(part, widths):
    program = """HloModule m

ENTRY %main (q: bf16[2,64,4,192], v: bf16[2,64,4,128]) -> bf16[2,64,4,128] {
  %q = bf16[2,64,4,192]{3,2,1,0} parameter(0)
  %v = bf16[2,64,4,128]{3,2,1,0} parameter(1)
  ROOT %o = bf16[2,64,4,128]{3,2,1,0} custom-call(%q, %q, %v), custom_call_target="mosaic_gpu_v2", """
    program += f"""metadata={{op_name="jit(step)/attention_{part}/mpmd_map"}}
}}
"""
    assert [s.flops for s in hlo.steps(program, SIZES, "ENTRY")] == [2 * 4 * 64 * 64 * widths]
    assert hlo.work(program).attention == 2 * 4 * 64 * 64 * widths


@pytest.mark.parametrize(("kernel", "found"), [("fp8_products", [(1, 2 * 64 * 192 * 32, 2 * 64 * 192 * 32)]),
                                               ("experts_products", [(1, 2 * 64 * 192 * 32, 0)]), ("quantizer", [])])
def test_the_kernels_of_products_multiply_every_row_and_quantizers_multiply_nothing(kernel, found):
    program = """HloModule m

ENTRY %main (p: (f8e4m3fn[64,192], f8e4m3fn[4,32,192])) -> bf16[1,64,32] {
  %p = (f8e4m3fn[64,192]{1,0}, f8e4m3fn[4,32,192]{2,1,0}) parameter(0)
  ROOT %o = bf16[1,64,32]{2,1,0} custom-call(%p#0, %p#1), custom_call_target="mosaic_gpu_v2", """
    program += """operand_layout_constraints={f8e4m3fn[64,192]{1,0}, f8e4m3fn[4,32,192]{2,1,0}}, """
    program += f"""metadata={{op_name="jit(step)/{kernel}/mpmd_map"}}
}}
"""
    assert [(s.products, s.flops, s.fp8) for s in hlo.steps(program, SIZES, "ENTRY")] == found
    flops = sum(one[1] for one in found)
    in_fp8, of_experts = (flops * (kernel == name) for name in ("fp8_products", "experts_products"))
    assert hlo.work(program)[1:] == (flops, in_fp8, 0, of_experts)
    # In bfloat16 the kernel skips rows of the buffer to which nothing was sent.
    assert hlo.work(program, 48).flops == (3 / 4 * flops if kernel == "experts_products" else flops)
    assert hlo.work(program, 96).flops == flops


@pytest.mark.parametrize(("form", "what"), [("ragged-all-to-all-start", "start"), ("ragged-all-to-all", "synchronous")])
def test_a_ragged_exchange_has_the_bytes_of_what_is_sent_and_not_of_what_it_lands_in_besides(form, what):
    program = f"""HloModule m

ENTRY %main (x: u8[20,64], y: u8[40,64], n: s64[8]) -> u8[40,64] {{
  %x = u8[20,64]{{1,0}} parameter(0)
  %y = u8[40,64]{{1,0}} parameter(1)
  %n = s64[8]{{0}} parameter(2)
  ROOT %o = u8[40,64]{{1,0}} {form}(%x, %y, %n, %n, %n, %n), replica_groups=[2,8]<=[16]
}}
"""
    (step,) = hlo.steps(program, SIZES, "ENTRY")
    assert (step.what, step.collective.kind, step.collective.bytes) == (what, "ragged-all-to-all", 40 * 64)


def test_what_a_sparse_core_sends_starts_where_it_is_given_its_operands():
    program = """HloModule m

%sent (x: f32[16], y: f32[64]) -> f32[64] {
  %x = f32[16]{0} parameter(0)
  %y = f32[64]{0} parameter(1)
  ROOT %r = f32[64]{0} all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (x: f32[16], y: f32[64], a: bf16[4,4]) -> f32[64] {
  %x = f32[16]{0} parameter(0)
  %y = f32[64]{0} parameter(1)
  %a = bf16[4,4]{1,0} parameter(2)
  %s = ((), (), (s32[8]{0})) custom-call-start(), async_execution_thread="sparsecore", called_computations={%sent}
  %early = bf16[4,4]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %u = ((f32[16]{0}), f32[64]{0}, (s32[8]{0})) custom-call-update(%s, %x)
  %between = bf16[4,4]{1,0} dot(%early, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %d = f32[64]{0} custom-call-done(%u)
}
"""
    (one,) = hlo.collectives(program, SIZES)
    assert (one.kind, one.axes, one.products) == ("all-gather", ("local",), 1)
    there = program.replace("  ROOT %r", "  %p = f32[16,16]{1,0} dot(%x, %x), lhs_contracting_dims={}\n  ROOT %r")
    assert hlo.work(there).products == sum(step.products for step in hlo.steps(there, SIZES, "ENTRY")) == 2


def test_branches_are_found_by_their_number():
    assert hlo.branches(PROGRAM, 2) == ["%branch_a", "%branch_b"]
    with pytest.raises(ValueError, match="no conditional has 3 branches"):
        hlo.branches(PROGRAM, 3)


def test_loops_multiply_and_branches_are_marked():
    assert (found()["all-to-all"].times, found()["all-to-all"].branch) == (26, False)
    assert (found()["collective-permute"].times, found()["collective-permute"].branch) == (1, True)


@pytest.mark.parametrize(("text", "group"), [
    ("replica_groups=[2,8]<=[16]", [0, 1, 2, 3, 4, 5, 6, 7]),
    ("replica_groups=[8,2]<=[2,8]T(1,0)", [0, 8]),
    ("replica_groups=[4,4]<=[2,2,4]T(2,0,1)", [0, 4, 8, 12]),
    ("replica_groups=mesh['pipe'=2,'node'=1,'local'=8] {'pipe'}, use_global_device_ids=true", [0, 8]),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=4] {'axis_2','axis_0'}", [0, 8, 1, 9, 2, 10, 3, 11]),
    ("replica_groups=mesh['node'=2,'local'=8] {'node','local':(2)2}", [0, 2, 8, 10]),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}, dimensions={0}", [0, 1]),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [0, 2, 4, 6]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,0,2) {'a'}", [3, 0]),
    ("source_target_pairs={{0,0},{1,5},{5,1}}", [1, 5]), ("source_target_pairs={{2,2}}", [2, 2]),
    ("replica_groups={{3,7},{1,2}}", [3, 7]), ("replica_groups={}", [])])
def test_groups_are_read_in_every_form(text, group):
    assert hlo.first_group(text) == group


@pytest.mark.parametrize("text", ["replica_groups=<new>{0}, dimensions={0}",
                                  "replica_groups=mesh['a'=2,'b'=4], device_ids=(reversed) {'a'}"])
def test_groups_in_another_form_are_no_groups_of_all(text):
    with pytest.raises(ValueError, match="is no known"):
        hlo.first_group(text)


@pytest.mark.parametrize(("shape", "size"), [("bf16[2,3]{1,0}", 12), ("(f32[4]{0}, pred[8]{0}, s32[])", 28),
                                             ("f8e4m3fn[16]", 16), ("u8[3,5]", 15)])
def test_the_size_of_a_type_is_that_of_its_arrays(shape, size):
    assert hlo.size_of(shape) == size

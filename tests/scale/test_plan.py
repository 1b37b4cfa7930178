"""The planner: compared with the published figures of the report's run, and for consistency."""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from deepseek_jax.config import ConfigError, FP8Config, MeshConfig, model_config
from deepseek_jax.plan import main, parse
from deepseek_jax.scale import decoding, memory, plan, timing, traffic
from deepseek_jax.scale.hardware import DEVICE_MEMORY, HARDWARE, Measured, check_fp8, device, hardware, smallest
from deepseek_jax.scale.layout import Split, make_layout
from experiments.scale.agreement import described

SCALE = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "scale"
V3 = model_config("v3_671b", fp8=FP8Config(enabled=True), remat="report")
H800 = hardware("h800")


@functools.cache
def of_report(**changes):
    return make_layout(V3, Split(2048, 16, 64), 15360, buffers="ragged", capacity=1.25, dispatch_fp8=True, **changes)


@functools.cache
def found():
    return plan.plan(V3, H800, of_report())


def test_the_layout_of_the_report_is_two_replicas_of_120_micro_batches():
    layout = of_report()

    assert dataclasses.astuple(layout.mesh)[:5] == (16, 2, 8, 8, 1)
    assert (layout.microbatches, layout.rows, layout.copies) == (120, 1, 2)
    assert layout.tokens_a_step == 15360 * 4096


def long_context(length, parts, sequences, **changes):
    return make_layout(V3, Split(2048, 16, 64, parts=parts), sequences, 1, length, buffers="ragged", capacity=1.25,
                       dispatch_fp8=True, **changes)


def test_parts_of_sequences_go_over_the_nodes_of_experts_and_then_over_copies_of_them():
    shape = lambda layout: tuple(layout.mesh.sizes.values())
    short, long = long_context(32768, 8, 1920), long_context(131072, 16, 480)

    assert shape(short) == (16, 2, 1, 8, 1, 8, 1) and shape(long) == (16, 1, 2, 8, 1, 8, 1)
    assert shape(long_context(32768, 4, 1920)) == (16, 2, 1, 4, 2, 8, 1)
    assert (short.tokens, short.microbatches, long.tokens, long.microbatches) == (4096, 120, 8192, 60)
    assert short.tokens_a_step == 1920 * 32768 and long.tokens_a_step == 480 * 131072
    assert short.name.endswith("2 replicas, dualpipe, 120 x 1 sequences in 8 parts")
    with pytest.raises(ConfigError, match="32 parts .* on 8 nodes .* a multiple of 4 copies .* take one of .*16"):
        long_context(131072, 32, 480)


def test_a_part_of_a_long_sequence_takes_what_a_short_one_does():
    """State and copies of tokens sent to experts take the same bytes; the ring of latents is added."""
    short, split = of_report(), long_context(32768, 8, 1920)

    assert memory.state(V3, split) == memory.state(V3, short)
    assert traffic.layer_traffic(V3, split) == traffic.layer_traffic(V3, short)
    sent, before = traffic.step_traffic(V3, split), traffic.step_traffic(V3, short)
    assert sent.pop("latents") > before.pop("latents") == 0
    assert sent == before


def test_latents_go_around_and_their_gradients_after_them_and_home():
    tokens, latents = 16384, 512 + 64
    alone = make_layout(V3, Split(8, parts=8), 1, 1, 8 * tokens)
    once = 7 * tokens * (2 * latents + 4)
    back = 8 * tokens * 4 * latents

    assert traffic.ring_traffic(V3, alone) == {"forward": once, "backward": once + back}
    again = dataclasses.replace(V3, remat="full")
    assert traffic.ring_traffic(again, alone) == {"forward": once, "backward": 2 * once + back}
    of_pairs = traffic.ring_traffic(V3, long_context(8 * tokens, 8, 1920))
    assert of_pairs == {"forward": 2 * once, "backward": 2 * (once + back)}


@pytest.mark.parametrize("report", ["v3_671b_h100_2048_32k", "v3_671b_h100_2048_128k"])
def test_long_sequences_in_parts_are_planned_within_ten_percent_of_what_xla_takes(report):
    found = json.loads((SCALE / f"{report}.json").read_text())
    c, layout = described(found)

    assert found["fits"] and layout.mesh.parts > 1
    assert 0.9 < sum(memory.bytes_per_device(c, layout, "hopper").values()) / found["bytes_per_device"] < 1.1
    assert layout.name == found["layout"]


def test_without_a_kernel_the_scores_of_long_sequences_are_written():
    """The loop over blocks takes longer to move bytes than to compute its products; a kernel would not."""
    split = long_context(32768, 8, 1920)
    with_kernel = dataclasses.replace(split, mesh=of_report().mesh, sequence_length=4096)
    m = Measured()
    scores = lambda layout: timing._layer(V3, H800, m, layout, ("scores",))["forward"] / layout.tokens
    pairs = V3.num_heads * 32768 / 2

    assert scores(split) - 8 * scores(with_kernel) == pytest.approx(12 * pairs / (m.memory * H800.memory_bandwidth))


@pytest.mark.parametrize("what", ["step, s", "F alone, s", "W alone, s", "MFU, non-causal", "MFU, causal",
                                  "thousand GPU-hours per trillion tokens",
                                  "million GPU-hours, 14.8T tokens and after", "million dollars at $2"])
def test_the_report_s_run_is_predicted_within_15_percent(what):
    row = next(row for row in plan.published(found()) if row["what"] == what)

    assert 0.85 < row["ratio"] < 1.15, row


@pytest.mark.parametrize("deferred", [0, 1, 2, None])
def test_the_published_figures_stand_next_to_any_layout_of_the_run(deferred):
    layout = of_report(deferred=deferred)
    rows = plan.published(plan.plan(V3, H800, layout))
    assert ({row["what"]: row["planned"] for row in rows}["W alone, s"] == 0) == (deferred == 0)
    assert all(math.isfinite(row["planned"]) for row in rows)


def test_what_the_planner_misses_is_said_and_not_hidden():
    ratios = {row["what"]: row["ratio"] for row in plan.published(found())}

    # Ranks wait for the slowest, and their optimizer overlaps traffic that is exposed here.
    assert 0.3 < ratios["bubble, s"] < 0.5 and 1.5 < ratios["optimizer, s"] < 2 and 0.75 < ratios["B alone, s"] < 0.85


def test_a_step_is_its_cells_its_bubble_and_its_optimizer():
    step = found().step

    assert sum(step.cells.values()) + step.bubble + step.optimizer == pytest.approx(step.seconds)


def test_the_published_mfu_is_that_of_the_published_step():
    """Ours is counted like theirs: 19.926 s on 2048 devices of 989 TFLOP/s are 43.73 % and 38.94 %."""
    step = found().step

    assert step.mfu["non-causal"] * step.seconds / 19.926 == pytest.approx(0.4373, rel=5e-3)
    assert step.mfu["causal"] * step.seconds / 19.926 == pytest.approx(0.3894, rel=5e-3)


def test_each_invention_is_worth_something_and_all_of_them_more():
    found = plan.ablations(V3, H800, of_report(deferred=0))
    rows = {row["without"]: row["times"] for row in found}
    assert [row["without"] for row in found if not row["fits"]] == ["DualPipe: ZB1P"]
    base = rows.pop("nothing: the report's layout")
    everything = rows.pop("all of them")

    assert base == 1 and all(times > 1 for times in rows.values())
    assert everything > max(rows.values())
    assert rows["two hops and the limit"] > rows["the limit of 4 nodes"] > 1
    assert 14 < plan.sparsity(V3)["times"] < 18


def test_what_is_recomputed_is_chosen_by_the_seconds_of_the_same_figures():
    layout, slow = of_report(deferred=0), Measured(attention=0.01)
    last = plan.cheapest_remat(V3, H800, layout, slow, limited=False)[-1]
    found = plan.plan(dataclasses.replace(V3, remat=last.remat), H800, layout, measured=slow, limited=False)

    assert last.seconds == found.step.seconds != plan.cheapest_remat(V3, H800, layout)[-1].seconds


def test_what_stays_exposed_is_what_the_compiled_report_s_layout_waits():
    report = json.loads(pathlib.Path("experiments/scale/v3_671b_h100_2048_report.json").read_text())
    c, waits = dataclasses.replace(V3, remat=report["remat"]), report["waits"]["h800"]
    cell = timing.cells(c, H800, of_report(deferred=0), Measured())
    layers = -(-c.num_moe_layers // 16)  # of one stage; the planner uses the mean, including MTP
    network = (cell["F"].network + cell["Bi"].network) * layers / ((c.num_moe_layers + c.mtp_depth) / 16)

    assert Measured().exposed == pytest.approx(waits["planned"] * waits["seconds"] / network, rel=0.03)


def test_overlap_hides_the_network_behind_work_and_not_the_other_way_round():
    cell = {"F": timing.Cell(1, 3), "Bi": timing.Cell(1, 2), "W": timing.Cell(1)}
    m = Measured(reserved=0.25, exposed=0.0)

    assert timing.costs(cell, m) == {"f": 4, "b": 4, "w": 1, "fb": 5}
    assert timing.costs({**cell, "W": timing.Cell(4)}, m)["fb"] == pytest.approx(6 / 0.75)
    assert timing.costs(cell, dataclasses.replace(m, exposed=0.1))["fb"] == pytest.approx(5 + 0.5)
    # If there is little to hide, running one after the other on all SMs is faster.
    assert timing.costs({name: timing.Cell(1, 0.1) for name in cell}, m)["fb"] == pytest.approx(3.3)


# Traffic.


@pytest.mark.parametrize("limited", [True, False])
def test_expected_copies_are_those_of_drawn_routings(limited):
    layout, rng = of_report(), np.random.default_rng(0)
    nodes, devices, tokens = [], [], 4000
    for _ in range(tokens):
        groups = rng.permutation(8)[:4 if limited else 8]
        experts = (groups[:, None] * 32 + np.arange(32)).ravel()
        chosen = rng.permutation(experts)[:8]
        nodes.append(len(set(chosen // 32)))
        devices.append(len(set(chosen // 4)))
    two, flat = (traffic.copies(V3, layout, dispatch, limited) for dispatch in ("two_hop", "flat"))

    assert two["nodes"] == pytest.approx(np.mean(nodes), rel=0.01)
    assert two["across"] == pytest.approx(np.mean(nodes) * 7 / 8, rel=0.01)
    assert flat["across"] == pytest.approx(np.mean(devices) * 7 / 8, rel=0.01)


def test_a_token_that_may_go_anywhere_visits_all_nodes_it_can():
    assert traffic.distinct(4, 8, 1) == 1
    assert traffic.distinct(4, 8, 32) == 4
    assert traffic.distinct(2, 1, 1) == 1


def test_a_copy_travels_in_fp8_with_its_scales_and_comes_back_in_bf16():
    sent = traffic.layer_traffic(V3, of_report())

    assert traffic.copy_bytes(V3, True) == 7168 + 56
    assert sent["combine across"] / sent["dispatch across"] == pytest.approx(2 * 7168 / (7168 + 56))


def test_without_replicas_and_pipeline_only_the_tokens_and_what_is_split_travel():
    layout = make_layout(model_config("tiny"), Split(1), 8)

    assert not any(traffic.step_traffic(model_config("tiny"), layout).values())


# Search.


@functools.cache
def searched():
    c = model_config("v2_lite_16b", fp8=FP8Config(enabled=True))
    return plan.search(c, hardware("h100"), 8, 64, buffers="ragged", capacity=1.25)


def test_the_search_returns_layouts_that_fit_fastest_first():
    best, reasons = searched()

    assert best and all(p.fits for _, p in best)
    assert [p.hours for _, p in best] == sorted(p.hours for _, p in best)
    assert all(p.layout.mesh.devices == 8 for _, p in best)
    assert reasons["does not fit into memory"][0] > 0


def test_what_does_not_fit_says_by_how_much_and_what_to_change_first():
    c = model_config("v3_671b", remat="none")
    bad = plan.plan(c, H800, of_report())
    words = plan.what_to_change(c, bad.layout, bad)

    assert not bad.fits
    assert f"needs {(bad.total_bytes - 80e9) / 1e9:.1f} GB more" in words and "try remat=full" in words


def test_the_report_s_layout_is_a_preset_whose_options_may_be_given_besides(monkeypatch):
    monkeypatch.setattr("sys.argv", ["plan", "--layout", "report", "--remat=full"])
    args = parse()
    asked = {name: getattr(args, name) for name in ("model", "hardware", "devices", "pipe", "expert", "deferred")}

    assert asked == {"model": "v3_671b", "hardware": "h800", "devices": 2048, "pipe": 16, "expert": 64, "deferred": 0}
    assert (args.fp8, args.capacity, args.remat) == (True, 1.25, "full")
    monkeypatch.setattr("sys.argv", ["plan", "--layout", "report", "--deferred", "all"])
    assert parse().deferred is None


def test_who_names_the_devices_of_the_report_s_layout_means_its_other_options_too(monkeypatch, capsys):
    command = ["plan", "--model", "v3_671b", "--hardware", "h800", "--devices", "2048", "--pipe", "16", "--expert"]
    monkeypatch.setattr("sys.argv", [*command, "64", "--remat", "full"])
    args = parse()

    assert (args.fp8, args.capacity, args.deferred, args.remat) == (True, 1.25, 0, "full")
    assert "--layout report" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*command, "64", "--serve"])
    with pytest.raises(ConfigError, match="--serve plans one device and does not read --devices 2048"):
        parse()
    monkeypatch.setattr("sys.argv", [*command, "32"])
    assert parse().deferred is None and not capsys.readouterr().out


def test_a_search_tries_the_remat_and_the_deferred_gradients_that_are_asked_for():
    c = model_config("v2_lite_16b", fp8=FP8Config(enabled=True))
    for_report = functools.partial(plan.search, c, hardware("h100"), 8, 64, buffers="ragged", capacity=1.25)

    assert {remat for remat, _ in for_report(remats=("full",))[0]} == {"full"}
    assert {found.layout.deferred for _, found in for_report(deferred=0)[0]} == {0}
    best, reasons = for_report(remats=("auto",))
    assert best[0][1].hours <= searched()[0][0][1].hours
    assert reasons["does not fit into memory"][1][2] == "full"


def test_the_command_searches_with_the_options_that_are_given(monkeypatch):
    asked = {}
    monkeypatch.setattr(plan, "search", lambda *args, **options: asked.update(options) or ([], {}))
    monkeypatch.setattr("sys.argv", ["plan", "--model=tiny", "--hardware=h100", "--devices=8", "--search",
                                     "--remat=auto", "--deferred=2"])

    assert main() == 1
    assert (asked["remats"], asked["deferred"]) == (("auto",), 2)


def test_without_deferred_gradients_zb1p_is_still_shown_with_its_own():
    """Without deferred gradients it would be 1F1B under another name."""
    rows = {row["without"]: row for row in plan.ablations(V3, H800, of_report(deferred=0))}
    zb1p, one = (rows[f"DualPipe: {name}"] for name in ("ZB1P", "1F1B"))
    assert zb1p["gigabytes"] > 1.5 * one["gigabytes"] and not zb1p["fits"] and one["fits"]


def test_auto_recomputes_what_saves_most_for_a_second_and_no_more_than_it_must():
    roomy, tight = (dataclasses.replace(H800, memory=memory) for memory in (1e12, 60e9))
    layout = of_report(deferred=0)

    assert [one.remat for one in plan.cheapest_remat(V3, roomy, layout)] == ["none"]
    tried = plan.cheapest_remat(V3, tight, layout)
    assert [one.remat for one in tried[:2]] == ["none", "report"] and tried[-1].fits and not tried[-2].fits
    assert all(before.bytes > after.bytes and before.seconds <= after.seconds
               for before, after in itertools.pairwise(tried))
    nothing = plan.cheapest_remat(V3, dataclasses.replace(H800, memory=1e9), layout)
    assert nothing[-1].remat == "full" and not nothing[-1].fits


# Mistakes.


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [(dict(devices=2047), "does not divide 2047 devices"), (dict(pipe=0), "pipe=0 must be positive"),
     (dict(pipe=3), "with none of them can pipe stay"), (dict(expert=20), "does not divide 2048 devices"),
     (dict(expert=128), "over 16 nodes does not divide 256 experts in 8 groups"),
     (dict(sequences=1000), "take a multiple of 128"), (dict(pipe=64, expert=32), "more than the 58 MoE layers"),
     (dict(sequences=1280), "needs at least 32 micro-batches")])
def test_a_layout_that_cannot_be_says_what_could(changes, complaint):
    with pytest.raises(ConfigError, match=complaint) as error:
        asked = dict(devices=2048, pipe=16, expert=64, sequences=15360) | changes
        make_layout(V3, sequences=asked.pop("sequences"), split=Split(**asked))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("option", "complaint"), [
    *((f"--{name}={value}", f"argument --{name}: '{value}' is not a positive number")
      for name in ("price", "tokens") for value in ("nan", "inf", "-1", "0", "x")),
    ("--capacity=x", "argument --capacity: 'x' is neither a number nor none"),
    *((f"--deferred={value}", f"argument --deferred: '{value}' is neither a whole number")
      for value in ("-1", "x", "1.5")),
])
def test_numbers_that_mean_nothing_are_refused(option, complaint, monkeypatch):
    monkeypatch.setattr("sys.argv", ["plan", "--model", "tiny", "--hardware", "h100", "--devices", "8", option])
    with pytest.raises(ConfigError) as error:
        parse()
    assert complaint in str(error.value)


def test_unknown_hardware_names_what_is_known_and_every_figure_has_a_source():
    with pytest.raises(ConfigError, match="'h900' is unknown; take one of h800, h100"):
        hardware("h900")
    figures = {f.name for f in dataclasses.fields(H800)} - {"sources", "kernels"}
    assert all(set(row.sources) == figures for row in HARDWARE.values())


@pytest.mark.parametrize("name", ["a100", "t4", "v5p", "v6e"])
def test_fp8_is_refused_in_one_line_where_there_is_none_and_bfloat16_named(name):
    with pytest.raises(ConfigError, match=f"{name} has no FP8 units: products run in bfloat16") as error:
        check_fp8(name, hardware(name))
    assert "\n" not in str(error.value)
    assert "bfloat16 is used" in hardware(name).sources["fp8"]
    check_fp8("l40s", hardware("l40s"))


def test_a_card_without_bfloat16_computes_at_the_rate_of_float32_and_says_so():
    assert hardware("t4").bf16 == 8.1e12 and "float32" in hardware("t4").sources["bf16"]


def test_of_a_7x_one_device_is_half_a_chip():
    chip, half = hardware("7x"), device("7x")
    assert half.memory == DEVICE_MEMORY["7x"] == chip.memory / 2 and half.memory_bandwidth == chip.memory_bandwidth / 2
    assert device("v5p") == hardware("v5p")


def test_of_machines_that_fit_the_smallest_is_named():
    assert smallest(["h200", "h100", "a100", "b200"]) == "a100"


# Decoding.


def test_the_network_bound_of_decoding_is_the_published_one():
    """(1 + 2) B x 32 tokens x 9 x 7168 / 50 GB/s, twice, 61 layers: 15.1 ms, 66 tokens/s; published with 7K: 67."""
    found = decoding.decode(V3, H800, decoding.Serving(256, 64, 1))

    assert found.network == pytest.approx(121e-6, rel=0.03)
    assert found.bound_a_user == pytest.approx(67, rel=0.03)


def test_mtp_pays_when_weights_are_what_a_step_reads_and_not_when_the_network_is_full():
    speed = lambda batch, accepted: decoding.decode(V3, H800, decoding.Serving(144, batch, 5000),
                                                    accepted=accepted).tokens_a_user

    assert speed(8, 0.875) / speed(8, None) > 1.5
    assert speed(512, 0.875) / speed(512, None) < 1


def test_production_is_bounded_from_above():
    row = next(r for r in decoding.published(V3, H800) if r["layout"].startswith("production") and not r["mtp"])

    for name, theirs in row["published"].items():
        assert theirs < row[name] < 2 * theirs, name


@pytest.mark.parametrize("module", ["costs", "layout", "traffic", "memory", "timing", "hardware", "plan", "decoding",
                                    "tables", "arguments", "serve", "finetune", "one_device"])
def test_the_planner_needs_no_jax(module):
    code = f"import sys, deepseek_jax.scale.{module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_more_of_anything_that_is_needed_never_makes_a_step_slower():
    layout = of_report()
    base = timing.step(V3, H800, layout).seconds
    for name, share in itertools.product(("bf16", "fp8", "memory_bandwidth", "node_bandwidth"), (1.5, 4)):
        faster = dataclasses.replace(H800, **{name: share * getattr(H800, name)})
        assert timing.step(V3, faster, layout).seconds <= base * (1 + 1e-9), name


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipe", "dualpipev"])
def test_of_a_long_schedule_the_middle_is_counted_instead_of_worked_out(schedule, monkeypatch):
    c = model_config("tiny", num_layers=9)
    layout = make_layout(c, Split(4, 4), 64, schedule=schedule, sequence_length=256)
    short = timing.step(c, H800, layout)
    assert layout.pipeline.microbatches == 32
    monkeypatch.setattr("deepseek_jax.scale.layout.LONGEST", 16)

    assert layout.pipeline.microbatches == 64
    assert timing.step(c, H800, layout).seconds == pytest.approx(short.seconds, rel=1e-9)
    assert timing.step(c, H800, layout).bubble == pytest.approx(short.bubble)


def test_without_a_pipeline_a_step_is_micro_batches_one_after_the_other():
    c = model_config("v2_lite_16b")
    layout = make_layout(c, Split(8, expert=8), 64)
    once, twice = (timing.step(c, hardware("h100"), dataclasses.replace(layout, microbatches=n)) for n in (4, 8))

    assert layout.mesh == MeshConfig(local=8) and once.bubble == 0
    assert twice.seconds - twice.optimizer == pytest.approx(2 * (once.seconds - once.optimizer))

"""The page to play with: its numbers are the library's, and so is what its own arithmetic computes, in a real browser.

It fetches nothing, works by keyboard and on a narrow screen, and its texts have enough contrast, light and dark.
"""

import dataclasses
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import ConfigError, model_config
from deepseek_jax.model import router
from deepseek_jax.pipeline.schedule import make_schedule
from deepseek_jax.pipeline.validate import starts, validate
from deepseek_jax.scale import costs, plan
from deepseek_jax.serving.engine import Engine, EngineConfig
from deepseek_jax.serving.generation import run_requests
from deepseek_jax.serving.sequence import Request
from deepseek_jax.workdir import load
from docs.explore import __main__ as explore
from docs.explore import drafts, numbers, quiz
from kernels_pallas.api import dequantize, quantize
from kernels_pallas.formats import E4M3
from tests import browser, runs

SOURCE = explore.PAGE.read_text(encoding="utf-8")
NUMBERS = explore.inlined(SOURCE)
PROSE = re.sub(r"\s+", " ", explore.BETWEEN.sub("", SOURCE))
in_a_browser = pytest.mark.skipif(not browser.IS_HERE, reason="needs chromium and chromedriver")


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browser.window(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture
def page(window):
    window.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    window.width(1000)
    window.open(explore.PAGE.as_uri())
    window.complaints()
    return window


# ---- What is written into the page ----

@pytest.mark.parametrize("part", ["routing", "fp8", "pipeline", "cost"])
def test_the_numbers_of_the_page_are_those_of_the_library(part):
    """`python -m docs.explore` writes them."""
    assert NUMBERS[part] == json.loads(json.dumps(getattr(numbers, part)()))


def test_the_quiz_of_the_page_is_the_library_s():
    found = json.loads(json.dumps(quiz.questions()))
    assert NUMBERS["quiz"] == found and len(found) == 10
    assert all(0 <= one["right"] < len(one["choices"]) == len(set(one["choices"])) and one["why"] for one in found)


def test_a_question_whose_answer_is_no_longer_true_cannot_be_written():
    with pytest.raises(ValueError, match="not in tuple"):
        quiz.question("Two and two?", ("3", "5"), "4", "")


def test_numbers_are_written_between_the_marks_and_read_again():
    page = f"<p>a</p>{explore.BEGIN}\n{{}}\n{explore.END}<p>b</p>"
    found = {"a": [1, "</script>"], "b": {"c": "\\1 é"}}
    written = explore.with_numbers(page, found)
    assert explore.inlined(written) == found and explore.with_numbers(written, {}) == page.replace("{}", "{}")
    assert written.count("</script>") == 1 and written.startswith("<p>a</p>") and written.endswith("<p>b</p>")
    with pytest.raises(ConfigError, match="no numbers"):
        explore.with_numbers("<p></p>", found)


def test_prose_has_the_numbers_of_the_library():
    cost, fp8, routing = NUMBERS["cost"], NUMBERS["fp8"], NUMBERS["routing"]
    hours = cost["per_trillion"] * cost["tokens"] / 1e12 + cost["context"] + cost["post_training"]
    v3 = cost["models"]["v3_671b"]
    assert f"{v3['parameters'] / 1e9:.0f} billion parameters" in PROSE and f"{v3['active'] / 1e9:.0f} billion" in PROSE
    assert f"{hours / 1e6:.3f} million GPU hours" in PROSE and f"${hours * cost['price'] / 1e6:.3f} million" in PROSE
    assert f"rented for ${cost['price']:g} an hour" in PROSE
    assert f"2<sup>{int(np.log2(fp8['smallest']))}</sup> to {fp8['largest']:g}" in PROSE
    assert f"all {len(fp8['row'])}<" in PROSE and f"each {fp8['block']}<" in PROSE
    assert routing["experts"] == 64 and "Sixty-four experts" in PROSE


def test_the_page_fetches_nothing():
    outside = re.sub(r"http://www\.w3\.org/2000/svg", "", SOURCE)
    assert not re.findall(r"https?:|@import|url\(|fetch\(|XMLHttpRequest|import\(|Storage|document\.cookie", outside)
    assert set(re.findall(r"""(?:src|href)=["']([^"'#][^"']*)""", outside)) == {"data:,"}


def test_functions_of_the_page_are_short():
    script = SOURCE[SOURCE.index('"use strict"'):]
    functions = list(re.finditer(r"^function (\w+)\(.*?^}", script, re.M | re.S))
    assert len(functions) > 40 and not [match[1] for match in functions if match[0].count("\n") >= 60]
    named = script.count("\nfunction ")
    assert len(functions) == named


# ---- Drafts ----

def test_drafts_of_the_page_are_those_that_are_kept_and_add_up():
    assert NUMBERS["drafts"] == json.loads((numbers.FOLDER / "drafts.json").read_text(encoding="utf-8"))
    assert [sample["prompt"] for sample in NUMBERS["drafts"]["samples"]] == list(drafts.PROMPTS)
    for sample in NUMBERS["drafts"]["samples"]:
        kinds = [kind for _, kind, _ in sample["tokens"]]
        assert set(kinds) <= {"accepted", "rejected", "none"} and len(kinds) == drafts.NEW_TOKENS
        assert kinds.count("accepted") == sample["accepted"] and kinds[0] != "accepted"
        assert len(kinds) - kinds.count("none") == sample["drafted"]
        assert all(bool(draft) == (kind == "rejected") and draft != text for text, kind, draft in sample["tokens"])
        # After an accepted draft the step's last token is the model's own.
        assert all(after == "none" for before, after in itertools.pairwise(kinds) if before == "accepted")


@pytest.fixture(scope="module")
def folder():
    """A small run."""
    return str(runs.finished_run()[1])


def test_the_draft_that_is_read_between_steps_is_what_the_engine_then_accepts_or_rejects(folder):
    model = load(folder)
    engine = Engine(model.cfg, model.variables, EngineConfig(max_sequences=1, max_length=128, depth=1, most_steps=1))
    seen = {"accepted": 0, "rejected": 0, "none": 0}
    for stream, prompt in enumerate(("def ", "class ", "other ")):
        request = Request(tuple(model.tokenizer.encode(prompt)), 40, 0.7, stream=stream)
        sequence, begun = drafts.followed(engine, request)
        assert len(begun) == len(sequence.made) == 40
        for token, draft in zip(sequence.made, begun, strict=True):
            seen[token.draft] += 1
            if token.draft != "none":
                assert (draft == token.id) == (token.draft == "accepted")
    assert all(seen.values())


def test_a_run_is_decoded_with_the_draft_in_the_place_of_each_rejected_one(folder):
    found, model = drafts.drafted(folder, ("def ", "class "), 40), load(folder)
    assert found["run"]["steps"] == runs.STEPS and found["run"]["tokens"] > 0 and found["run"]["bits_per_byte"] > 0
    requests = [Request(tuple(model.tokenizer.encode(prompt)), 40, drafts.TEMPERATURE, top_p=drafts.TOP_P, stream=i)
                for i, prompt in enumerate(("def ", "class "))]
    sequences = run_requests(model.cfg, model.variables, requests, speculative=True).sequences
    for sample, sequence in zip(found["samples"], sequences, strict=True):
        kinds = [kind for _, kind, _ in sample["tokens"]]
        assert kinds == [token.draft for token in sequence.made]
        assert "".join(text for text, _, _ in sample["tokens"]) == model.tokenizer.decode(
            [token.id for token in sequence.made])
        assert all((draft == "") == (kind != "rejected") for _, kind, draft in sample["tokens"])
        assert (sample["drafted"], sample["accepted"]) == (sequence.drafted, sequence.accepted)


def test_a_run_that_cannot_draft_is_refused_by_name(monkeypatch, folder):
    model = load(folder)
    without = model._replace(cfg=dataclasses.replace(model.cfg, mtp_depth=0))
    monkeypatch.setattr(drafts, "load", lambda folder: without)
    with pytest.raises(ConfigError, match="no MTP module"):
        drafts.drafted("run")


# ---- Arithmetic of the page, in a browser, against the library's ----

@in_a_browser
def test_choices_gates_and_biases_are_the_router_s(page):
    rng = np.random.default_rng(0)
    float32 = lambda x: x.astype(np.float32).tolist()
    cases = [{"scores": float32(rng.uniform(0, 1, E)), "bias": float32(rng.normal(0, 0.3, E)), "count": K,
              "counts": rng.integers(0, 50, E).tolist(), "normalize": bool(i % 2), "speed": 10.0 ** -rng.integers(1, 4)}
             for i, (E, K) in enumerate([(3, 1), (3, 2), (64, 6), (256, 8)] * 6)]
    found = page.js("""return arguments[0].map((c) => { const chosen = choose(c.scores, c.bias, c.count);
        return [chosen, gatesOf(c.scores, chosen, c.normalize), movedBias(c.bias, c.counts, c.speed)]; })""", cases)
    for case, (chosen, gates, moved) in zip(cases, found, strict=True):
        cfg = numbers.one_layer(len(case["scores"]), case["count"], case["normalize"])
        scores_1E, bias_E = jnp.array([case["scores"]], jnp.float32), jnp.array(case["bias"], jnp.float32)
        chosen_1K = router.select(cfg, scores_1E, bias_E)
        assert chosen == chosen_1K[0].tolist()
        np.testing.assert_allclose(np.array(gates)[chosen], router.gates(cfg, scores_1E, chosen_1K)[0], rtol=1e-6)
        assert np.count_nonzero(gates) <= case["count"]
        theirs = router.update_bias(bias_E[None], jnp.array([case["counts"]], jnp.int32), case["speed"])
        np.testing.assert_allclose(moved, theirs[0], atol=1e-7)


@in_a_browser
def test_equal_sums_go_to_the_first_expert_as_in_the_library(page):
    scores, bias = [0.5, 0.25, 0.5, 0.25], [0.0, 0.25, 0.0, 0.25]
    cfg = numbers.one_layer(4, 2, True)
    assert page.js("return choose(arguments[0], arguments[1], 2)", scores, bias) == router.select(
        cfg, jnp.array([scores]), jnp.array(bias))[0].tolist() == [0, 1]


@in_a_browser
@pytest.mark.parametrize(("speed", "skew"), [(0.01, 1.0), (0.0, 1.0), (0.03, 2.0)])
def test_the_simulation_has_the_library_s_max_vio(page, speed, skew):
    found = page.js("return simulate(arguments[0], arguments[1], 15, NUMBERS.routing)", speed, skew)
    np.testing.assert_allclose(found, numbers.simulate(speed, skew, 15), atol=0.03)  # a tie or two of 6,144 choices


@in_a_browser
def test_random_numbers_are_the_same_here_and_there(page):
    found = page.js("return [range(50).map((i) => uniform(1003, i)), range(20).map((i) => bell(7, i))]")
    assert found[0] == numbers.uniform(1003, 50).tolist()
    np.testing.assert_allclose(found[1], numbers.bell(7, 20), atol=1e-12)


@in_a_browser
@pytest.mark.parametrize("kind", list(numbers.SCALES))
def test_fp8_rounding_is_the_quantizer_s(page, kind):
    rng = np.random.default_rng(1)
    rows = [(rng.normal(size=256) * 10.0 ** rng.uniform(-spread, spread, 256)).astype(np.float32)
            for spread in (0, 1, 4, 9)]
    rows += [np.zeros(256, np.float32), np.full(256, 448 * 2.0**-7, np.float32)]
    for row in rows:
        q = quantize(jnp.asarray(row[None]), **numbers.SCALES[kind])
        found = page.js("return quantizeRow(arguments[0], arguments[1])", row.tolist(), kind)
        assert found["scales"] == q.scales[0].tolist()
        assert found["values"] == q.values[0].astype(jnp.float32).tolist()
        assert found["back"] == dequantize(q)[0].tolist()


@in_a_browser
def test_examples_of_the_library_are_found_again(page):
    for one in NUMBERS["routing"]["examples"]:
        chosen, gates = page.js("""const chosen = choose(arguments[0], arguments[1], arguments[2]);
            return [chosen, gatesOf(arguments[0], chosen, arguments[3])]""", NUMBERS["routing"]["affinities"],
                                one["bias"], one["experts"], one["normalize"])
        assert sorted(chosen) == one["chosen"] and gates == pytest.approx(one["gates"], abs=1e-6)
    for one in NUMBERS["fp8"]["examples"]:
        found = page.js("""const [number, outlier, same, kind] = arguments;
            const row = rowWith(Math.fround(number), outlier, same);
            const q = quantizeRow(row, kind);
            return [q.scales[0], q.values[0], q.back[0], errorsOf(row, q.back)]""",
                        one["number"], one["outlier"], one["same_tile"], one["kind"])
        assert found[:3] == [one["scale"], one["value"], one["back"]]
        assert found[3]["mean"] == pytest.approx(one["error"], abs=1e-6) and found[3]["zeros"] == one["zeros"]
    for key, one in NUMBERS["pipeline"]["reports"].items():
        name, ranks, microbatches = key.split(",")
        found = page.js("""const found = report(ordersOf(...arguments), { f: 1, b: 2, w: 1, fb: 3 });
            return { makespan: found.makespan, idle: found.idle, activations: found.activations }""",
                        name, ranks, microbatches)
        assert found == {what: one[what] for what in found}


@in_a_browser
def test_all_eight_bit_numbers_and_their_bits_are_there(page):
    codes = np.arange(256, dtype=np.uint8)
    values = np.asarray(jax.lax.bitcast_convert_type(jnp.asarray(codes), E4M3).astype(jnp.float32))
    finite = np.isfinite(values)
    assert page.js("return allE4M3()") == sorted(set(values[finite].tolist()))
    bits = page.js("return arguments[0].map(([v, negative]) => bitsOf(v === 0 && negative ? -0 : v).join(''))",
                   [[float(v), bool(code >> 7)] for v, code in zip(values[finite], codes[finite])])
    assert bits == [f"{code:08b}" for code in codes[finite]]
    ordered = np.unique(values[finite])
    halves = (ordered[1:] + ordered[:-1]) / 2  # which go to the even neighbour
    between = np.concatenate([halves, np.random.default_rng(2).uniform(-470, 470, 2000)]).astype(np.float32)
    rounded = page.js("return arguments[0].map(roundE4M3).map((y) => (Number.isNaN(y) ? null : y))", between.tolist())
    theirs = np.asarray(jnp.asarray(between).astype(E4M3).astype(jnp.float32))
    assert rounded == [None if np.isnan(y) else float(y) for y in theirs]


@in_a_browser
@pytest.mark.parametrize("name", NUMBERS["pipeline"]["names"])
def test_the_schedule_is_drawn_at_the_library_s_times(page, name):
    rng = np.random.default_rng(3)
    for ranks, microbatches in ((2, 4), (4, 12), (8, 20), (6, 24)):
        if f"{name},{ranks},{microbatches}" in NUMBERS["pipeline"]["refused"]:
            continue
        b = rng.uniform(1, 3)
        times = {"f": rng.uniform(0.5, 2), "b": b, "w": rng.uniform(0, b), "fb": rng.uniform(2, 4)}
        schedule = make_schedule(name, ranks, microbatches)
        found = page.js("""const [name, ranks, microbatches, costs] = arguments;
            const orders = ordersOf(name, ranks, microbatches);
            const { cells, makespan, idle, activations } = report(orders, costs);
            return { cells: cells.map((c) => [c.start, c.rank, c.cell.map((o) => [o.kind, o.direction, o.microbatch])]),
                     makespan, idle, activations }""", name, ranks, microbatches, times)
        theirs = sorted((start, rank, [[numbers.LETTERS[op.kind], op.direction, op.microbatch] for op in cell])
                        for start, rank, cell in starts(schedule, times))
        ours = sorted((start, rank, cell) for start, rank, cell in found["cells"])
        key = lambda one: (one[1], one[2])
        for (start, *what), (other, *same) in zip(sorted(ours, key=key), sorted(theirs, key=key), strict=True):
            assert what == same and start == pytest.approx(other, abs=1e-9)
        report = validate(schedule, times)
        assert found["makespan"] == pytest.approx(report.makespan)
        assert found["activations"] == max(report.peak_activations)
        np.testing.assert_allclose(found["idle"], report.idle, atol=1e-9)


@in_a_browser
def test_every_operation_is_drawn_once_with_its_number(page):
    page.js("""byId('pipeline-ranks').value = '4'; byId('pipeline-microbatches').value = '12';
               byId('pipeline-name').value = 'dualpipe'; byId('pipeline-name').dispatchEvent(new Event('change'))""")
    operations = [op for row in make_schedule("dualpipe", 4, 12).table for cell in row for op in cell]
    assert len(page.texts("#pipeline-figure rect")) == len(operations)
    drawn = map(int, page.texts("#pipeline-figure text[style]"))
    assert sorted(drawn) == sorted(op.microbatch for op in operations)
    makespan = validate(make_schedule("dualpipe", 4, 12)).makespan
    assert f"12 micro-batches: {makespan:g} units" in page.texts("#pipeline-say")[0]


@in_a_browser
def test_a_schedule_that_cannot_be_says_the_library_s_words(page):
    page.js("""byId('pipeline-ranks').value = '8'; byId('pipeline-microbatches').value = '8';
               byId('pipeline-name').dispatchEvent(new Event('change'))""")
    with pytest.raises(ConfigError) as refused:
        make_schedule("dualpipe", 8, 8)
    assert page.texts("#pipeline-say") == [f"No such schedule: {refused.value}"]


@in_a_browser
def test_costs_are_products_of_what_is_there(page):
    found = page.js("""const c = NUMBERS.cost, flops = c.models.v3_671b.flops;
        const share = shareOfPeak(flops, c.per_trillion, c.peak);
        return [costOf({ perTrillion: c.per_trillion, trillions: c.tokens / 1e12, context: c.context,
                         post: c.post_training, price: c.price, devices: c.devices }),
                share, hoursPerTrillion(flops, share, c.peak)]""")
    hours = 180e3 * plan.TOKENS / 1e12 + sum(plan.AFTERWARDS.values())
    flops = costs.training_flops_per_token(model_config("v3_671b", mtp_depth=0), 4096)
    assert found[0]["hours"] == pytest.approx(hours) == pytest.approx(2.788e6)
    assert found[0]["dollars"] == pytest.approx(5.576e6) and found[0]["days"] == pytest.approx(hours / 2048 / 24)
    assert found[1] == pytest.approx(1e12 * flops / (180e3 * 3600 * 989e12))
    assert found[2] == pytest.approx(NUMBERS["cost"]["per_trillion"])
    assert page.texts("#cost-sum") == ["$5.576 million = 2.788M GPU hours x $2"]


# ---- The page itself ----

@in_a_browser
def test_nothing_is_complained_of_while_all_of_it_is_used(page):
    for button in page.js("return [...document.querySelectorAll('button')].map((b) => b.id)"):
        page.click(f"#{button}")
    page.js("""for (const input of document.querySelectorAll('input')) {
               if (input.type === 'range') input.value = input.max;
               input.dispatchEvent(new Event('input')); if (input.type !== 'number') input.click(); }
               for (const select of document.querySelectorAll('select')) for (const option of select.options) {
                 select.value = option.value; select.dispatchEvent(new Event('change')); }
               for (const number of ['', '0', '-1', '1e39', '1e-9']) { byId('fp8-number').value = number;
                 byId('fp8-number').dispatchEvent(new Event('input')); }
               dispatchEvent(new Event('resize'))""")
    page.until("document.getElementById('many-say').textContent.includes('Step')")
    assert page.complaints() == []


@in_a_browser
def test_a_bias_that_changes_no_choice_changes_no_gate(page):
    gates = lambda: page.texts("#three-table td:last-child")
    move = lambda slider, value: page.js("byId(arguments[0]).value = arguments[1];"
                                         "byId(arguments[0]).dispatchEvent(new Event('input'))", slider, value)
    before = gates()
    move("bias-0", "-0.3")
    assert gates() == before == ["0.900", "", ""]
    move("bias-0", "-0.8")
    assert gates() == ["", "", "0.260"]


@in_a_browser
def test_the_bias_levels_loads_and_without_speed_it_does_not(page):
    max_vio = lambda: float(re.search(r"MaxVio (\d+\.\d+) ", page.texts("#many-say")[0])[1])
    for _ in range(3):
        page.click("#many-jump")
    levelled = max_vio()
    page.js("byId('many-speed').value = '0'; byId('many-speed').dispatchEvent(new Event('input'))")
    page.click("#many-reset")
    for _ in range(3):
        page.click("#many-jump")
    assert levelled < 1 and max_vio() > 4


@in_a_browser
def test_drafts_appear_token_by_token(page):
    sample = NUMBERS["drafts"]["samples"][0]
    page.click("#drafts-all")
    assert page.texts("#drafts-text span") == [sample["prompt"], *(text for text, _, _ in sample["tokens"])]
    assert len(page.texts("#drafts-text .accepted")) == sample["accepted"]
    assert f"{sample['accepted']} of {sample['drafted']} drafts accepted" in page.texts("#drafts-say")[0]
    steps = len(sample["tokens"]) - sample["accepted"]
    assert f"{len(sample['tokens'])} tokens in {steps} steps" in page.texts("#drafts-say")[0]
    for _ in range(3):
        page.click("#drafts-back")
    assert len(page.texts("#drafts-text span")) == 1 + len(sample["tokens"]) - 3


@in_a_browser
def test_the_quiz_counts_right_answers_and_explains(page):
    for i, one in enumerate(NUMBERS["quiz"]):
        choice = one["right"] if i else (one["right"] + 1) % len(one["choices"])
        page.click(f"#quiz-{i}-{choice}")
    assert page.texts("#quiz-score") == ["9 of 10 right, 0 to go."]
    explained = page.texts(".question > p")
    assert explained[0].startswith("No: ") and all(text.startswith("Right. ") for text in explained[1:])
    assert all(one["why"] in text for one, text in zip(NUMBERS["quiz"], explained, strict=True))
    page.click("#quiz-reset")
    assert page.texts(".question > p") == [""] * 10


@in_a_browser
def test_it_works_by_keyboard_in_the_order_of_reading(page):
    page.press([browser.TAB])
    assert page.js("return document.activeElement.className") == "skip"
    assert page.js("return [...document.querySelectorAll('[tabindex]')].every((e) => e.tabIndex === 0)")
    page.js("byId('bias-2').focus()")
    page.press([browser.RIGHT] * 40)
    assert page.texts("#three-table tr.chosen th") == ["3"]
    page.press([browser.TAB])
    assert page.js("return document.activeElement.id") == "three-count"
    page.js("byId('many-step').focus()")
    before = page.texts("#many-say")[0]
    page.press([browser.SPACE])
    assert page.texts("#many-say")[0] != before
    page.js("byId('quiz-0-0').focus()")
    page.press([browser.SPACE])
    assert "of 1 right" in page.texts("#quiz-score")[0]


@in_a_browser
def test_everything_that_can_be_used_has_a_name(page):
    nameless = page.js("""return [...document.querySelectorAll('input, select, button, [tabindex], svg, nav')]
        .filter((e) => !(e.labels && e.labels.length) && !e.getAttribute('aria-label'))
        .filter((e) => !(e.tagName === 'BUTTON' && e.textContent.trim()))
        .map((e) => e.outerHTML.slice(0, 80))""")
    assert not nameless
    ids = page.js("return [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    assert set(page.js("return [...document.querySelectorAll('nav a, .skip')].map((a) => a.hash.slice(1))")) <= set(ids)
    levels = page.js("return [...document.querySelectorAll('h1, h2, h3')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))


@in_a_browser
@pytest.mark.parametrize("width", [320, 360, 768, 1600])
def test_nothing_sticks_out_on_a_narrow_screen(page, width):
    page.width(width)
    page.open(explore.PAGE.as_uri())
    assert page.js("return document.documentElement.scrollWidth") <= width
    small = page.js("""return [...document.querySelectorAll('button, select, input[type=number]')]
        .filter((e) => e.offsetHeight < 32).map((e) => e.id)""")
    assert not small


# The contrast of WCAG 2.2: of every text with what is behind it, of the edges of fields, and of bars.
CONTRAST = """
const parse = (color) => color.match(/[\\d.]+/g).map(Number);
const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
function ratio(a, b) {
  const [high, low] = [light(parse(a)), light(parse(b))].sort((p, q) => q - p);
  return (high + 0.05) / (low + 0.05);
}
function behind(e) {
  const color = getComputedStyle(e).backgroundColor;
  return parse(color)[3] === 0 ? behind(e.parentElement) : color;
}
function under(e) {  // a number in a cell of the pipeline is on the rectangle before it
  if (!(e instanceof SVGElement)) return behind(e);
  const before = e.previousElementSibling;
  return e.hasAttribute('style') && before ? getComputedStyle(before).fill : behind(e.closest('figure'));
}
const hasText = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
const ink = (e) => (e instanceof SVGElement ? getComputedStyle(e).fill : getComputedStyle(e).color);
const texts = [...document.querySelectorAll('body *')].filter((e) => !/SCRIPT|STYLE/.test(e.tagName) && hasText(e));
const fields = [...document.querySelectorAll('button:not(.main), select, input[type=number]')];
const bars = [...document.querySelectorAll('#three-figure rect, #many-loads rect, #many-biases rect')];
return [...texts.filter((e) => ratio(ink(e), under(e)) < 4.5),
        ...fields.filter((e) => ratio(getComputedStyle(e).borderTopColor, behind(e.parentElement)) < 3),
        ...bars.filter((e) => ratio(ink(e), behind(e.closest('figure'))) < 3)]
  .map((e) => e.outerHTML.slice(0, 90));
"""


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_bars_have_the_contrast_of_wcag(page, scheme):
    page.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.click("#drafts-all")
    page.click("#quiz-0-0")
    page.click("#quiz-1-1")
    paper = page.js("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    assert page.js(CONTRAST) == []


@in_a_browser
def test_too_little_contrast_is_seen(page):
    page.js("byId('routing-title').style.color = '#999'")
    assert len(page.js(CONTRAST)) == 1
    page.js("document.querySelector('#many-loads rect').style.fill = '#56b4e9'")
    assert len(page.js(CONTRAST)) == 2

"""Mutations of the explore page and of the site: each breaks one operation, and the tests named must fail.

Rows of the page need Chromium, as its tests do.
"""

from tests.mutations.row import Mutation

PAGE, TESTS = "docs/explore/index.html", "docs/test_explore.py"

MUTATIONS = [
    Mutation(
        name="the page chooses experts without their bias",
        file=PAGE,
        old="Math.fround(Math.fround(s) + Math.fround(bias[e]))",
        new="Math.fround(s)",
        tests=f"{TESTS}::test_choices_gates_and_biases_are_the_router_s",
    ),
    Mutation(
        name="the page never divides gates by their sum",
        file=PAGE,
        old="const total = normalize ?",
        new="const total = false ?",
        tests=f"{TESTS}::test_choices_gates_and_biases_are_the_router_s",
    ),
    Mutation(
        name="the page moves biases with the load",
        file=PAGE,
        old="Math.sign(mean - counts[e])",
        new="Math.sign(counts[e] - mean)",
        tests=f"{TESTS}::test_choices_gates_and_biases_are_the_router_s",
    ),
    Mutation(
        name="of equal experts the page takes the last",
        file=PAGE,
        old="numbers[b] - numbers[a] || a - b",
        new="numbers[b] - numbers[a] || b - a",
        tests=f"{TESTS}::test_equal_sums_go_to_the_first_expert_as_in_the_library",
    ),
    Mutation(
        name="the page's simulation forgets its bias",
        file=PAGE,
        old="    bias = movedBias(bias, counts, speed);",
        new="    movedBias(bias, counts, speed);",
        tests=f"{TESTS}::test_the_simulation_has_the_library_s_max_vio",
    ),
    Mutation(
        name="the page rounds halves up",
        file=PAGE,
        old="(rest === 0.5 && low % 2 === 1)",
        new="rest === 0.5",
        tests=f"{TESTS}::test_all_eight_bit_numbers_and_their_bits_are_there",
    ),
    Mutation(
        name="the page's powers of two are rounded down",
        file=PAGE,
        old="2 ** (2 ** e === scale ? e : e + 1)",
        new="2 ** e",
        tests=f"{TESTS}::test_fp8_rounding_is_the_quantizer_s",
    ),
    Mutation(
        name="the page has no subnormal numbers",
        file=PAGE,
        old="const exponent = normal ? e - low + 1 : 0,",
        new="const exponent = e - low + 1,",
        tests=f"{TESTS}::test_all_eight_bit_numbers_and_their_bits_are_there",
    ),
    Mutation(
        name="the page's ranks do not wait for their neighbours",
        file=PAGE,
        old="return next === null ? own : [...own, keyOf(op.kind, next, op.direction, op.microbatch)];",
        new="return own;",
        tests=f"{TESTS}::test_the_schedule_is_drawn_at_the_library_s_times",
    ),
    Mutation(
        name="on the page both directions run the same way",
        file=PAGE,
        old="direction === 0 ? way : -way",
        new="way",
        tests=f"{TESTS}::test_the_schedule_is_drawn_at_the_library_s_times",
    ),
    Mutation(
        name="the page draws an overlapped cell's first operation only",
        file=PAGE,
        old="  cell.forEach((op, i) => {",
        new="  cell.slice(0, 1).forEach((op, i) => {",
        tests=f"{TESTS}::test_every_operation_is_drawn_once_with_its_number",
    ),
    Mutation(
        name="the page counts a wrong answer",
        file=PAGE,
        old="NUMBERS.quiz[i].right === choice",
        new="true",
        tests=f"{TESTS}::test_the_quiz_counts_right_answers_and_explains",
    ),
    Mutation(
        name="a number of the page is not the library's",
        file="docs/explore/numbers.py",
        old="PER_TRILLION = 180e3",
        new="PER_TRILLION = 181e3",
        tests=f"{TESTS}::test_the_numbers_of_the_page_are_those_of_the_library",
    ),
    Mutation(
        name="a token can end the page's script",
        file="docs/explore/__main__.py",
        old='lines.replace("</", "<\\\\/")',
        new="lines",
        tests=f"{TESTS}::test_numbers_are_written_between_the_marks_and_read_again",
    ),
    Mutation(
        name="the draft that was rejected is read after the step",
        file="docs/explore/drafts.py",
        old="        waiting = engine._drafts\n",
        new="        engine.step()\n        waiting = engine._drafts\n",
        tests=f"{TESTS}::test_the_draft_that_is_read_between_steps_is_what_the_engine_then_accepts_or_rejects",
    ),
    Mutation(
        name="a link to the log leaves the site",
        file="docs/site_hooks.py",
        old="    if relative in pages:",
        new="    if False:",
        tests="docs/test_site.py::test_links_lead_to_pages_pictures_or_the_repository[training.md-../LOG.md-log.md]",
    ),
    Mutation(
        name="a link outside of the repository is followed",
        file="docs/site_hooks.py",
        old="path if path.is_relative_to(ROOT) and path.exists() else None",
        new="path",
        tests="docs/test_site.py::test_links_lead_to_pages_pictures_or_the_repository["
              "faq.md-../../outside.md-../../outside.md]",
    ),
    Mutation(
        name="bars are too pale to be seen",
        file="docs/explore/index.html",
        old="--bar: #3a94cc;",
        new="--bar: #56b4e9;",
        tests=f"{TESTS}::test_texts_and_bars_have_the_contrast_of_wcag[light]",
    ),
    Mutation(
        name="a command of a page describes a run that is refused",
        file="deepseek_jax/configs/problems.py",
        old="    config.data.fim_rate = 0.0\n",
        new="",
        tests="docs/test_commands.py::test_a_command_that_is_written_out_is_accepted",
    ),
    Mutation(
        name="a benchmark lacks an option that a page gives it",
        file="benchmarks/loop.py",
        old='parser.add_argument("--milliseconds",',
        new='parser.add_argument("--ms", dest="milliseconds",',
        tests="docs/test_checkout_commands.py::test_a_program_takes_the_options_that_are_printed["
              "benchmarks-loop-milliseconds-50]",
    ),
    Mutation(
        name="the page of files is that of other docstrings",
        file="deepseek_jax/stop.py",
        old='"""The end of a run: exit codes',
        new='"""The end of any run: exit codes',
        tests="docs/test_pages.py::test_the_page_of_files_has_what_modules_say",
    ),
    Mutation(
        name="a target that a page names is gone",
        file="Makefile",
        old="\nrehearse: ",
        new="\nrehearsal: ",
        tests="docs/test_checkout_commands.py::test_targets_of_make_and_their_variables_exist",
    ),
]

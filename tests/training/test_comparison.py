"""Tables of runs: the results of each, and the values that are equal in all of them."""

from deepseek_jax.training.comparison import compare, label, summary
from deepseek_jax.training.metrics import LAST_STEPS


def test_a_run_is_summed_up_by_its_last_steps():
    rows = [dict(step=s, tokens=10 * s, loss=float(s)) for s in range(1, 101)]
    rows += [dict(step=s, eval_loss=1.0, eval_bits_per_byte=s / 100) for s in (50, 100)]
    found = summary(rows, 200)
    assert (found["step"], found["of"], found["tokens"], found["bits_per_byte"]) == (100, 200, 1000, 1.0)
    assert found["loss"] == sum(range(101 - LAST_STEPS, 101)) / LAST_STEPS and found["max_vio"] is None


def test_a_label_says_what_is_averaged():
    assert label("loss") == f"loss, last {LAST_STEPS} steps" and label("bits_per_byte") == "bits_per_byte"


def test_losses_of_the_sources_that_all_runs_have_are_compared():
    def rows(**by_source):
        return [dict(step=1, tokens=64, loss=5.0),
                dict(step=1, eval_loss=4.0) | {f"eval_loss/{name}": loss for name, loss in by_source.items()}]

    configs = {run: {"train": {"steps": 1}} for run in "ab"}
    table = compare(configs, {"a": rows(code=1.0, prose=2.0), "b": rows(code=3.0)})
    assert [row["eval_loss/code"] for row in table.values()] == [1.0, 3.0]
    assert not any("eval_loss/prose" in row for row in table.values())

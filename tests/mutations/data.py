"""Mutations of data: each breaks one operation, and the tests named must go red."""

from tests.mutations.row import Mutation

MUTATIONS = [
    Mutation(
        name="of two that write the same shards the slower fails",
        file="deepseek_jax/io.py",
        old="if not (shared and os.path.isdir(folder)):",
        new="if True:",
        tests="test_io.py data/test_token_shards.py",
    ),
    Mutation(
        name="FIM puts the middle before the suffix",
        file="deepseek_jax/data/examples.py",
        old="prefix, [fim.hole], suffix, [fim.end], middle,",
        new="prefix, [fim.hole], middle, [fim.end], suffix,",
        tests="data/test_examples.py",
    ),
    Mutation(
        name="sequences start one token late",
        file="deepseek_jax/data/examples.py",
        old="stream.read(j * length, length + 1)",
        new="stream.read(j * length + 1, length + 1)",
        tests="data/test_loader.py",
    ),
    Mutation(
        name="prompts are learned",
        file="deepseek_jax/data/loader.py",
        old="weights_MBT[m, row, 1:] = window.predicted_T[1:]",
        new="weights_MBT[m, row, 1:] = 1",
        tests="data/test_loader.py",
    ),
    Mutation(
        name="epochs count every source as if it were alone",
        file="deepseek_jax/data/overview.py",
        old="epochs = share * sequences",
        new="epochs = sequences",
        tests="data/test_overview.py::test_the_table_says_what_is_read_how_much_of_it_and_how_often",
    ),
    Mutation(
        name="a source's loss is over every target of the batch",
        file="deepseek_jax/data/loader.py",
        old="self.validation.only(s, weights_BT, first) for s",
        new="weights_BT for s",
        tests="data/test_validation.py",
    ),
    Mutation(
        name="a small source is not among the evaluated batches",
        file="deepseek_jax/data/validation.py",
        old="chosen | {middle(s) for s in missed if len(self.shards[s].tokens)}",
        new="chosen",
        tests="data/test_validation.py::test_a_limit_leaves_no_source_out",
    ),
    Mutation(
        name="files of other endings are left out without a word",
        file="deepseek_jax/data/overview.py",
        old="if not ignored:",
        new="if True:",
        tests="data/test_overview.py",
    ),
    Mutation(
        name="a source is named by the last part of its path, whatever others have",
        file="deepseek_jax/data/loader.py",
        old="if all(other[-n:] != own[-n:] for other in others))",
        new=")",
        tests="data/test_loader.py",
    ),
]

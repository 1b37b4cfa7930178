"""Mutations of checkpoint: each breaks one operation, and the tests named must go red."""

from tests.mutations.row import Mutation

MUTATIONS = [
    Mutation(
        name="a flipped bit is restored",
        file="deepseek_jax/checkpoint/manifest.py",
        old="if found[1] != crc:",
        new="if False:",
        tests="checkpoint/test_manager.py",
    ),
    Mutation(
        name="all rows take the scales of the first block",
        file="deepseek_jax/checkpoint/arrays.py",
        old="strip *= scales[block]",
        new="strip *= scales[0]",
        tests="interop/test_tensor_map.py",
    ),
    Mutation(
        name="a part of a matrix takes the scales of its corner",
        file="deepseek_jax/checkpoint/arrays.py",
        old="(first_column + np.arange(values.shape[1]))",
        new="np.arange(values.shape[1])",
        tests="interop/test_tensor_map.py",
    ),
    Mutation(
        name="a failed write names its temporary file",
        file="deepseek_jax/io.py",
        old="if isinstance(error, OSError) and error.errno",
        new="if False and error.errno",
        tests="test_io.py",
    ),
    Mutation(
        name="a full disk names no file",
        file="deepseek_jax/io.py",
        old="error.filename in (partial, None)",
        new="error.filename == partial",
        tests="test_io.py",
    ),
    Mutation(
        name="a failed write leaves its temporary file",
        file="deepseek_jax/io.py",
        old="            os.unlink(partial)",
        new="            pass",
        tests="test_io.py",
    ),
    Mutation(
        name="a file is renamed before it is on the disk",
        file="deepseek_jax/io.py",
        old="        if sync:\n            sync_file(partial)\n        os.replace(partial, path)",
        new="        os.replace(partial, path)\n        if sync:\n            sync_file(path)",
        tests="test_io.py",
    ),
    Mutation(
        name="a file is written in its place",
        file="deepseek_jax/io.py",
        old="    partial = os.path.join(folder, f\".{name}.{uuid.uuid4().hex}.new\")",
        new="    partial = os.path.abspath(path)",
        tests="test_io.py",
    ),
    Mutation(
        name="a folder keeps what a killed process left",
        file="deepseek_jax/io.py",
        old="        shutil.rmtree(partial, ignore_errors=True)\n        os.makedirs(partial)",
        new="        os.makedirs(partial, exist_ok=True)",
        tests="test_io.py",
    ),
    Mutation(
        name="what is read for the host stays where the device has it",
        file="deepseek_jax/checkpoint/arrays.py",
        old="return jax.device_get(read(*args))",
        new="return read(*args)",
        tests="test_routing.py::test_on_the_host_the_same_variables_are_numpy_arrays",
    ),
]

"""Processes with a few devices each, for tests of their agreement."""

import json
import os
import subprocess
import sys

from tests.parallel.groups import free_port


def found_by_two(script, folder):
    return found_by(2, script, folder)


def found_by(count, script, folder, devices=1):
    """Runs the script in several processes. Returns what each printed after "found ", and all output of the first one.
    The arguments of the script are the coordinator's address, its process number and the folder."""
    address, flags = f"localhost:{free_port()}", f"--xla_force_host_platform_device_count={devices}"
    all_ = [subprocess.Popen([sys.executable, "-c", script, address, str(i), folder], text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, env=os.environ | {"XLA_FLAGS": flags}) for i in range(count)]
    try:
        said = [process.communicate(timeout=240)[0] for process in all_]
    finally:
        for process in all_:
            process.kill()
    lines = [[line for line in words.splitlines() if line.startswith("found ")] for words in said]
    assert all(lines), said
    return [json.loads(line[0].removeprefix("found ")) for line in lines], said[0]

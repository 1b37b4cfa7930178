"""Two processes with a device each, for tests of what they agree on."""

import json
import os
import subprocess
import sys

from tests.parallel.groups import free_port


def found_by_two(script, folder):
    """What each of two processes that run the script has printed behind "found ", and all that the first one said. The
    script is told the address where they meet, its number and the folder."""
    address = f"localhost:{free_port()}"
    both = [subprocess.Popen([sys.executable, "-c", script, address, str(i), folder], text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, env=os.environ | {"XLA_FLAGS": ""}) for i in range(2)]
    try:
        said = [process.communicate(timeout=240)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    lines = [[line for line in words.splitlines() if line.startswith("found ")] for words in said]
    assert all(lines), said
    return [json.loads(line[0].removeprefix("found ")) for line in lines], said[0]

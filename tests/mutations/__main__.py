import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # for `python tests/mutations`

from tests.mutations.run import main

sys.exit(main())

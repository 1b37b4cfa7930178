"""Redraws the pictures of this folder, each from its report; nothing is compiled.

    python -m experiments.scale.pictures
"""

import argparse
import json
import pathlib

from deepseek_jax.scale.draw import draw_report

HERE = pathlib.Path(__file__).parent


def main() -> None:
    argparse.ArgumentParser(prog="python -m experiments.scale.pictures", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path in sorted(HERE.glob("*.json")):
        report = json.loads(path.read_text())
        if "bytes_per_device" in report:  # reports of a compiled program; the others are plans and tables
            draw_report(str(path.with_suffix(".png")), report)
            print(path.with_suffix(".png").name)


if __name__ == "__main__":
    main()

"""Converts a Hugging Face checkpoint to a work directory, and a work directory to a Hugging Face checkpoint.

    python -m deepseek_jax.convert from-hf DeepSeek-V3 run --keep-fp8
    python -m deepseek_jax.generate --workdir run --prompt "def "
    python -m deepseek_jax.convert to-hf run exported --dtype bfloat16

Both stream: memory stays small whatever the size. An import followed by an export restores every tensor byte for byte.
"""

import argparse

from deepseek_jax import cli


class _Way(cli.Parser):
    def __init__(self, prog, **about):
        super().__init__(prog.rsplit(".", 1)[-1], __doc__)


def parse() -> argparse.Namespace:
    parser = cli.Parser("convert", __doc__)
    ways = parser.add_subparsers(dest="way", required=True, metavar="from-hf | to-hf", parser_class=_Way)
    way = ways.add_parser("from-hf", help="Hugging Face -> work directory")
    way.add_argument("src", help="folder with config.json, tokenizer.json and safetensors files")
    way.add_argument("dst", help="work directory to make; train takes it as --config.init.from=DST")
    way.add_argument("--dtype", choices=("bfloat16", "float32"),
                     help="of the parameters (default: that of the files, bfloat16 for FP8)")
    way.add_argument("--keep-fp8", action="store_true", help="keep FP8 values and scales; dequantize when reading")
    way.add_argument("--without-mtp", action="store_true", help="leave MTP modules out, such as one whose copies of "
                     "embedding and head are stale")
    way.add_argument("--files", metavar="NAME", help="the .safetensors file or the index to read, where SRC holds two "
                     "checkpoints")
    way = ways.add_parser("to-hf", help="work directory -> Hugging Face")
    way.add_argument("src", help="a run of deepseek_jax.train, or what from-hf made")
    way.add_argument("dst", help="folder to make")
    way.add_argument("--fp8", action="store_true", help="quantize to FP8 in blocks of 128 x 128, as released")
    way.add_argument("--dtype", choices=("bfloat16", "float32"), help="of what is not FP8; routing biases stay float32 "
                     "(default: that of the checkpoint which SRC came from; float32 if it came from none)")
    way.add_argument("--merge", action="store_true", help="add the adapters of a run of config `lora` to its base")
    return parser.parse_args()


def main() -> None:
    args = parse()

    from deepseek_jax.interop.convert import from_hf, to_hf

    if args.way == "to-hf":
        notes = to_hf(args.src, args.dst, args.fp8, args.dtype, args.merge)
    else:
        notes = from_hf(args.src, args.dst, args.dtype, args.keep_fp8, args.without_mtp, args.files)
    for note in notes:
        print(note)


if __name__ == "__main__":
    cli.run(main)

"""Speed of training, decoding and conversion compared with other programs: same machine, same run, in turns.

    python -m benchmarks.run                  training steps, against transformers
    python -m benchmarks.grouped_matmul       the experts' grouped product, against a dense one and `ragged_dot`
    python -m benchmarks.decode               greedy decoding, against transformers
    python -m benchmarks.speculative --workdir run     speculative decoding of a trained run, against plain decoding
    python -m benchmarks.convert_memory       conversion of a checkpoint, against copying its files
    python -m benchmarks.convert_limits moonlight kimi_int4     its memory at the sizes of published checkpoints

The `peer_*` and `decode_transformers` sides run in the environment of peer.txt, which `make bench` makes.
"""

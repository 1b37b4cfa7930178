"""Everything worth measuring in a short time on one Hopper GPU, most worth first.

    python -m benchmarks.gpu --out DIR [--minutes 25]      again with the same DIR: continues where it stopped
    python -m benchmarks.gpu --smoke                       is every kernel right at small shapes? (a minute)
    python -m benchmarks.gpu --rehearse                    without a GPU: the same stages, tiny, on an interpreter, and
                                                           the kernels at all shapes by the GPU's compiler

The parent process never touches the GPU: a stage is a child with a time limit, and a case that hangs or crashes costs
that case alone. docs/benchmarks.md says what to bring to such a machine and what to do where a stage fails.
"""

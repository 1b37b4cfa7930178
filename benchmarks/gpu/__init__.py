"""All measurements worth making in a short time on one Hopper GPU, the most important first.

    python -m benchmarks.gpu --out DIR [--minutes 25]      again with the same DIR: continues where it stopped
    python -m benchmarks.gpu --smoke                       is every kernel right at small shapes? (a minute)
    python -m benchmarks.gpu --rehearse                    without a GPU: the same stages, tiny, in an interpreter, and
                                                           all shapes of the kernels compiled by the GPU's compiler

The parent process never uses the GPU: a stage is a child with a time limit, and a case that hangs or crashes affects
only itself. docs/benchmarks.md says what to bring to such a machine and what to do if a stage fails.
"""

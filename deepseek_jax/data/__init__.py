"""From files to batches: corpus -> tokenizer -> shards -> examples -> loader, each of which reads only those before.

`prepare.prepare(config, workdir)` makes tokens of the configured sources once; `loader.Loader(config, prepared)`
answers any step's batch. The report's data recipe (section 4.1): byte-level BPE, punctuation-newline tokens split at
random, FIM at document level, packing without a mask between documents.
"""

"""From files to batches: corpus -> tokenizer -> shards -> examples -> loader, each of which reads only the ones before
it.

`prepare.prepare(config, workdir)` tokenizes the configured sources once; `loader.Loader(config, prepared)` returns the
batch of any step. The report's data recipe (section 4.1): byte-level BPE, punctuation-newline tokens split at random,
FIM at document level, packing without a mask between documents.
"""

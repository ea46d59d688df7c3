"""Training data: read once, tokenised and packed once per storage, mapped by every rank.

`prepare` is the way in. `sources` yields documents, `packing` turns them into one array,
`cache` keeps it under a name that says what it was made from, and `dataset` is what the
trainer's loader indexes.
"""

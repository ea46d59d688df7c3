"""Checkpoints: write, commit, verify, find, load.

Left of the torch wall: `index` (name and kind → shape, dtype, extents), `torch_file`, `formats`,
`manifest`, `staging`, `find`, `verify`. With torch: `save.save_checkpoint`, `load.open_checkpoint`.
"""

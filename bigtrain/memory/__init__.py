"""How much memory a run will take, before anything runs and without importing torch.

`discovery` finds the model's parameters (from weight files, by formula, or on the meta device),
`state` counts what each engine keeps of them on a rank, `activations` what one micro-batch leaves
for the backward pass, and `estimate` puts both on the timeline of a step to find its peak.
`trace` asks the real model, on fake tensors, instead of the activation formula. `disk` counts what
a checkpoint takes.
"""

"""Runs as Slurm jobs: described, submitted, listed, cancelled, and begun on every node.

    submit ─ options, settings  what the user asked for, checked
           ─ partition          what a node of the partition has
           ─ provenance         the code as it was
           ─ script             the batch script, as text
           ─ record             what was submitted, kept with the run
    node ─── identity           which node of the job this is; then bigtrain.cluster.nodes

No control plane of its own, no ssh: sbatch, srun, squeue, scancel and scontrol do the work.
"""

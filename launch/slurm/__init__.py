"""What runs under Slurm need: the batch script and its helpers, states, nodes that failed. `launch/backends/slurm.py` offers it."""

"""Runs on a Slurm cluster: checks before training, restarts, the state of a run."""

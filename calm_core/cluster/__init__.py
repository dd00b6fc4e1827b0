"""Runs on a Slurm cluster: checks before training, what to do when something ends it, the state of a run."""

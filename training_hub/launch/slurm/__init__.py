"""Slurm: a run as a batch job that is checked before it waits, saves before it is stopped, and goes on by itself."""

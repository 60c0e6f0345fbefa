"""Processes of one machine, their place among the ranks of a job, and services on SLURM. Prohibited here: torch."""

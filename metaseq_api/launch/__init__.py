"""Processes of one machine and their place among the ranks of a job. Prohibited here: torch."""

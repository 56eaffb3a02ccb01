"""Outputs of a teacher that are computed once and read in every run: rows by (view, sample) in memory-mapped files."""

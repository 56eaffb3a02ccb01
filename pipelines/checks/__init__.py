"""The checks that `pipelines/doctor.py` makes of a machine, each section in a process of its own."""

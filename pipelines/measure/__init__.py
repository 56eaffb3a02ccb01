"""What `pipelines/benchmark.py` is made of: time, memory and the machine's limits, measured."""

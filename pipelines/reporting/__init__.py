"""What `pipelines/evaluate.py --dump`, `pipelines/report.py` and `pipelines/compare.py` are made of."""

"""Training: state and step (what one update is), trainer and stages (what a run is), checkpoint, metrics.

`step.py` is pure and knows no files; `trainer.py` owns the run folder. A stage is a config, never a branch
in this code.
"""

"""Experiments on gates and frequencies, each with its results: `python -m experiments.NAME`, from a clone."""

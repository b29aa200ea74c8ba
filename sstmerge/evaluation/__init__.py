"""Evaluation: judges, data sets, classification tasks, drift, and the metrics of a trade-off."""

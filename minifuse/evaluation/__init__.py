"""Evaluation: data sets, prompts, runs, scores, statistics, report."""

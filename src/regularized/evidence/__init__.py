"""Runs experiments (arms x seeds x scale) and turns measurements into statistics, verdicts and reports."""

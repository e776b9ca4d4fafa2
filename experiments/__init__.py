"""Replays of public data that show what the service gives: data set, teacher, plots, and the demo's driver."""

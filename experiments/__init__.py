"""Replays of public data that show what the service gives: data set, teacher, students, plots, the demo's driver."""

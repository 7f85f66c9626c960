"""Measures: what was forgotten, what was kept, what it costs; with intervals and controls."""

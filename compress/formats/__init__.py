"""Checkpoint formats: one file each, writer beside reader."""

"""Leaving a model before its last layer: policies, generation, drafts and cost."""

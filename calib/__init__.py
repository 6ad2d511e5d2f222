"""Acceptance: turns a trained model into one accepted for a given line, through the very engine that runs it."""

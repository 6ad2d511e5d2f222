"""Inference backends behind one protocol; `registry.open_engine` loads the one that is asked for."""

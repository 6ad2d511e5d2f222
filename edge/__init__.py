"""Kizu's runtime: cameras in, verdicts and defect masks out. Nothing is loaded until a module is named."""

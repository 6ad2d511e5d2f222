"""The steps of one frame: preprocess, infer, segment, decide. Each takes one core type and returns the next."""

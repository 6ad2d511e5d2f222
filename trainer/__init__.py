"""Training: teachers, students and their export; the only package here that imports torch."""

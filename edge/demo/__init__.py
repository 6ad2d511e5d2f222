"""Package data of `kizu demo`: photographs, the shipped bundle and the simulated line."""

"""Valid files, damaged in ways that a reader could trip over, and what minifuse makes of them."""

"""Plain torch, float64-clean definitions that every fast path is tested and benchmarked against."""

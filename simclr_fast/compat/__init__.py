"""Losses with the signatures and the numbers of other libraries, one module for each."""

"""The signatures of other libraries over this one's kernels: change the import, nothing else."""

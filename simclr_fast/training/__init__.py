"""Training from images to an encoder: pretraining, the supervised baseline, ablations."""

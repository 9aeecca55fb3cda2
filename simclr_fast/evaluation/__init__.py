"""What an encoder has learned: k-NN, linear probes, fine-tuning, pictures of its features."""

"""Processes that are forks of one, which has imported torch and the package but called nothing."""

import multiprocessing

context = multiprocessing.get_context("forkserver")
# Modules that are found without pytest's paths: before Python 3.13 the server does not get them.
context.set_forkserver_preload(
    ["pytest", "torchvision.models", "simclr_fast.training.pretrain", "simclr_fast.doctor"]
)

"""Ctrl-C as in a terminal: a shell that starts the suite with & has it ignored."""

import signal


def pytest_configure():
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

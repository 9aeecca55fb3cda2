"""The parts of simclr_fast under the names and arguments of other libraries, a module for each."""

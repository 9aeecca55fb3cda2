"""The parts of simclr_fast with the names and arguments of other libraries, one module each."""

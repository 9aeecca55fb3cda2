"""Other libraries' signatures over simclr_fast, one module for each."""

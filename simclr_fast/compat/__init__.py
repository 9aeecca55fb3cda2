"""Other libraries' signatures over simclr_fast."""

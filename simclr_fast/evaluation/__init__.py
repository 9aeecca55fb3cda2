"""What an encoder has learnt: the protocols by which SimCLR's encoders are judged."""

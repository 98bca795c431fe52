"""Reading a model: its decoder, and what it costs, read off the model or a blank copy of it."""

"""The specification in plain torch, which every backend is held to."""

"""The protocols behind every figure of quality: perplexity, passkey retrieval, sweeps."""

"""What is learned from texts before a model is compiled: tables, clips, codebooks, and the file that keeps them."""

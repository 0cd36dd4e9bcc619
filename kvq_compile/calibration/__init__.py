"""What is learned from sequences before a model is compiled: tables, clips, codebooks, and the file that keeps them."""

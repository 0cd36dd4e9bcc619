"""The CPU backend: packed pages read in C++."""

"""The CPU backend: packed pages are written and read in C++."""

"""The passes that change a graph, one a file."""

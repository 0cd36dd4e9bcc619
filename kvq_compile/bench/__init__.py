"""What ``kvq bench`` measures: kernels, decoding steps, memory, and the rows, tables and plots of them."""

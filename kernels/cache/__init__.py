"""`QuantizedKV`: the tensor that models see in place of 16-bit keys or values."""

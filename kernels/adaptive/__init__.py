"""QAQ's options for pages that are already packed: targets, requantization, exact copies. Off by default."""

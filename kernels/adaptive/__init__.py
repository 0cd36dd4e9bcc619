"""What QAQ does to pages after they were packed; off unless its options ask for it."""

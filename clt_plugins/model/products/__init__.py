"""Matrix products: of numbers of different types, and of the dense path."""

"""What ranks do together: stop together, agree on a batch, find the best k, save their generators. And signals."""

"""What the weights alone say of features: norms, cosines, similar features, virtual weights, logits."""

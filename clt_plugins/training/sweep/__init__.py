"""Many transcoders on one stream of activations: `[sweep]` of a recipe."""

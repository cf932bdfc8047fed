"""Which choices there are: plugins found, loaded, and the chosen objects built and checked."""

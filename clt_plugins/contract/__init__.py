"""What a plugin author reads: specs, protocols, the typed recipe, the context, the hooks. Imports `data`."""

"""Where text comes from: files, the hub, the standard library."""

"""For authors of sources that read stored rows: protocol of the store, buffers, order, source."""
